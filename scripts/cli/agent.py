"""torchrun for one machine: `python agent.py TORCHRUN_FLAGS PROGRAM ...`

Signals are forwarded to the workers, which may take as long as they need to write a checkpoint; torchrun
forwards fewer of them and kills after 30 seconds. The first failure is reported once, as one line where the
worker recorded one, and its exit status becomes this program's.
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

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def forward(number, frame):
    """Signal handler: send the signal on to the workers, which are this process's children."""
    lists = Path("/proc/self/task").glob("*/children")
    workers = [int(pid) for text in lists for pid in text.read_text().split()]
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if not workers:  # not started yet or already ended; on macOS not found, but they miss this process then
        sys.exit(128 + number)


def report(error):
    """Print the first failure, as `util.cli.run` recorded it in the worker; return its exit status."""
    rank, failure = error.get_first_failure()
    if isinstance(failure.message, dict):
        print(failure.message["message"], file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was killed by {name}, the others are ended", file=sys.stderr)
    elif failure.exitcode < 128:  # above: the worker stopped because of a signal, and said so
        print(f"error: process {rank} ended with exit status {failure.exitcode}", file=sys.stderr)
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def main():
    args = parse_args(sys.argv[1:])
    if args.nnodes in ("1", "1:1"):  # nobody else needs to know the port: the kernel chooses it
        args.rdzv_backend, args.rdzv_endpoint, args.local_addr = "c10d", "127.0.0.1:0", "127.0.0.1"
    config, program, words = config_from_args(args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    status = []

    def launch():
        try:
            elastic_launch(config, program)(*words)
            status.append(0)
        except ChildFailedError as error:
            status.append(report(error))
        except Exception as error:  # such as a port in use
            print(f"error: {config.rdzv_endpoint}: {str(error).splitlines()[0]}", file=sys.stderr)

    for number in FORWARDED:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: by nohup
            signal.signal(number, forward)
    thread = threading.Thread(target=launch, daemon=True)  # there torchrun leaves signals alone
    thread.start()
    thread.join()
    sys.exit(status[0] if status else 1)


if __name__ == "__main__":
    main()
