"""torchrun for one machine, whose workers hear its signals: `python agent.py TORCHRUN_FLAGS PROGRAM ...`

Knows torchrun and its workers. Does not know what they compute. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are
passed on to the workers, which have all the time they need to write a checkpoint; torchrun passes on two of
these, and kills after 30 seconds. The exit status is that of the worker that failed first. A worker tells its
error itself; this program tells of one that was killed.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def workers():
    """Process ids of this process's children."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for text in lists for pid in text.read_text().split()]


def pass_on(number, frame):
    pids = workers()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if not pids:  # not started yet, or done
        sys.exit(128 + number)


def status_of(error):
    """The exit status of the worker that failed first; one line if a signal killed it."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    print(f"error: process {rank} was killed by {name}, the others are ended", file=sys.stderr)
    return 128 - failure.exitcode


def main():
    config, program, words = config_from_args(parse_args(sys.argv[1:]))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    status = []

    def launch():
        try:
            elastic_launch(config, program)(*words)
            status.append(0)
        except ChildFailedError as error:
            status.append(status_of(error))

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    thread = threading.Thread(target=launch, daemon=True)  # there torchrun leaves the signals to us
    thread.start()
    thread.join()
    sys.exit(status[0] if status else 1)


if __name__ == "__main__":
    main()
