"""A command as a job: on each machine of a SLURM job, or on this machine.

The contract with the command: started again it resumes, SIGUSR2 asks it to stop, exit status 2 means that
trying again is pointless, and 75 that processes on another machine were lost.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.cli.attempt import FAILED, FINISHED, LOST, TIME_LIMIT, Attempt
from util.distributed import STOP_SIGNALS

WRONG_USAGE, PEER_LOST = 2, 75
PEER_WAIT = 30  # seconds that a machine which only lost others leaves to the one that failed


def _descendants(pid):
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in path.read_text().split():
                yield int(child)
                yield from _descendants(child)


def _send(number, pid, kill=os.kill):
    """Send a signal; returns whether there was a process to receive it."""
    try:
        kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def run_command(command, environment=None, *, kill_after=0, output=None, directory=None):
    """Run a command in a process group of its own and forward the signals that this process gets to it.

    kill_after: seconds after SIGUSR2 until whatever is left of the command is killed; 0 means no limit.
    output: file for stdout and stderr. Returns (exit status as in a shell, first signal received or 0).
    """
    received, groups = [], []

    def forward(number, frame):
        received.append(number)
        for group in groups:
            _send(number, group, os.killpg)
        if number == signal.SIGUSR2:
            signal.alarm(kill_after)

    def kill_all(number, frame):
        for pid in [pid for group in groups for pid in (*_descendants(group), group)]:
            _send(signal.SIGKILL, pid)

    def ignore_user_signals():  # they would kill a shell; a program that handles them has handlers of its own
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    handlers = {**dict.fromkeys(STOP_SIGNALS, forward), signal.SIGALRM: kill_all}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        child = subprocess.Popen(
            command, env=environment, cwd=directory, start_new_session=True, preexec_fn=ignore_user_signals,
            stdout=output, stderr=subprocess.STDOUT if output else None,
        )
        groups.append(child.pid)
        for number in set(received):  # those that came before the command was started
            _send(number, child.pid, os.killpg)
        status = child.wait()
        while received and _send(0, child.pid, os.killpg):  # a shell may end before what it started
            time.sleep(0.2)
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return (status if status >= 0 else 128 - status), (received or [0])[0]


def run_until(due, command, every=5):
    """Run a command, and stop it with SIGUSR1 once `due()` is true, which is asked after `every` seconds.
    Returns (exit status as in a shell, whether it was stopped so)."""
    ended, stopped = threading.Event(), threading.Event()

    def watch():
        while not ended.wait(every):
            if due():
                stopped.set()
                return os.kill(os.getpid(), signal.SIGUSR1)

    watcher = threading.Thread(target=watch)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it may come when the command has just ended
    watcher.start()
    try:
        status, received = run_command(command)
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
    return status, stopped.is_set() and received == signal.SIGUSR1


def last_error(path):
    """The last line of a log that begins with `error:`, else its last line."""
    lines = [line.split("\r")[-1] for line in Path(path).read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line.strip()] or [""]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


@dataclass(frozen=True)
class Job:
    """A command, the variables it gets, and the folder for its logs and records.

    max_retry: attempts after failures. grace: seconds between SLURM's signal and its time limit. directory:
    where the command runs, if not here.
    """

    command: tuple[str, ...]
    environment: dict
    folder: str
    max_retry: int = 0
    grace: int = 120
    directory: str | None = None

    def __call__(self):
        """Run on one machine of a SLURM job; submitit calls this once per machine.

        The job is queued again when the command has stopped for the time limit (SIGUSR2), after `max_retry`
        failures, and when processes on another machine were lost. On SIGTERM SLURM or the batch script
        decides. Raises RuntimeError with the reason of a final failure.
        """
        import submitit

        place = submitit.JobEnvironment()
        rank, hosts, log = place.global_rank, place.hostnames, place.paths.stderr
        attempt = Attempt.of_this_process(self.folder)
        attempt.kill_earlier()
        if rank == 0:
            attempt.begin(hosts)
        words = " ".join(self.command)
        print(f"attempt {attempt.number}, machine {rank} of {place.num_nodes}: {words}", flush=True)
        port = 20000 + int(place.job_id) % 10000
        variables = self._variables(place.num_nodes, rank, hosts[0], port)
        where = {"kill_after": self.grace - 5, "directory": self.directory}
        status, received = run_command(self.command, variables, **where)
        if status == 0 or received == signal.SIGUSR2:
            if rank == 0:
                self._conclude(attempt, TIME_LIMIT if status else FINISHED, status, "")
        elif received:
            sys.exit(status)
        elif status == PEER_LOST:
            time.sleep(PEER_WAIT)
            self._conclude(attempt, LOST, status, last_error(log))
        else:
            reason = f"exit status {status}: {last_error(log)}"
            if status == WRONG_USAGE and not attempt.is_refused_by_all(rank, place.num_nodes, PEER_WAIT):
                status = 1  # this machine's trouble, such as a disk that is not mounted
            self._conclude(attempt, FAILED, status, reason)

    def _conclude(self, attempt, cause, status, reason):
        """Record the end of an attempt and queue the job again, if this machine is the first to do so."""
        if cause != FINISHED and not attempt.is_running():
            sys.exit(status)  # a newer attempt runs, or none is wanted
        if not attempt.end(cause, reason):
            time.sleep(60)  # the first machine decides, and that ends this process
            sys.exit(status)
        if cause == TIME_LIMIT or status not in (0, WRONG_USAGE) and attempt.may_follow(self.max_retry):
            attempt.queue_again()
            sys.exit(status)
        if status:
            raise RuntimeError(reason)

    def run_here(self):
        """Run on this machine in the foreground, log to FOLDER/local_PID_log.out; returns the exit status."""
        job_id = f"local_{os.getpid()}"
        log = Path(self.folder) / f"{job_id}_log.out"
        variables = self._variables(1, 0, "127.0.0.1", 20000 + os.getpid() % 10000)
        for _ in range(self.max_retry + 1):
            tee = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
            status, received = run_command(self.command, variables, output=tee.stdin)
            tee.communicate()
            if received or status in (0, WRONG_USAGE):
                break
        return status

    def _variables(self, nodes, rank, address, port):
        place = {"NNODES": nodes, "NODE_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
        return {**os.environ, **self.environment, **{name: str(value) for name, value in place.items()}}


def slurm_state(job_id):
    """The state that SLURM reports for a job, e.g. `RUNNING`; None if SLURM does not know it (any more)."""
    queries = (
        ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"],
        ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job_id}"],
    )
    for query in queries:
        if shutil.which(query[0]):
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
            if answer:
                return answer[0]
    return None
