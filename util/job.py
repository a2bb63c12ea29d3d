"""A command as a job: on each machine of a SLURM job, or here.

Knows process groups, signals, attempts and which machine of a job this is. Does not know what the command
does: only that it goes on where it was when it is started again, that SIGUSR2 asks it to end, and that exit
status 2 means that trying again is no use.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from util.files import write_json

WRONG_USAGE = 2


def descendants(pid):
    """Process ids of a process's children, their children and so on."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def _signal(number, pids, send=os.kill):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            send(pid, number)


def _ignore_user_signals():
    """A shell would die of them; programs that know them install handlers of their own."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def run_command(command, environment, *, patience=0, output=None):
    """Run a command in a process group of its own, to which the signals this process gets are passed on.

    Args:
        patience: seconds after SIGUSR2 until all that is left of the command is killed; 0 is no limit.
        output: a file for all that it prints.
    Returns:
        (exit status as a shell tells it, number of the first signal or 0)
    """
    asked, groups = [], []

    def pass_on(number, frame):
        asked.append(number)
        _signal(number, groups, os.killpg)
        if number == signal.SIGUSR2:
            signal.alarm(patience)

    def kill(number, frame):
        for pid in groups:
            _signal(signal.SIGKILL, [*descendants(pid), pid])

    handlers = {number: pass_on for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    before = {n: signal.signal(n, handler) for n, handler in {**handlers, signal.SIGALRM: kill}.items()}
    try:
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_ignore_user_signals, stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )  # fmt: skip
        groups.append(child.pid)
        for number in set(asked):  # what came before it was started
            _signal(number, groups, os.killpg)
        status = child.wait()
        while asked and _alive(child.pid):  # a shell may end of a signal before what it started
            time.sleep(0.2)
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return (status if status >= 0 else 128 - status), (asked or [0])[0]


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def last_error(path):
    """What a log says of a failure: its last line that begins with `error:`, else its last line."""
    lines = [line.split("\r")[-1] for line in Path(path).read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line.strip()] or [""]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


@dataclass(frozen=True)
class Job:
    """A command with its environment. FOLDER is for logs and records; `max_retry`: attempts after failures;
    `grace`: seconds between SLURM's signal and its time limit."""

    command: tuple[str, ...]
    environment: dict
    folder: str
    max_retry: int = 0
    grace: int = 120

    def _variables(self, nodes, rank, address, port):
        return {
            **os.environ, **self.environment, "NNODES": str(nodes), "NODE_RANK": str(rank),
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip

    def _failed(self, job_id, attempt, rank, status, log):
        """Write down a failure, once for all machines.

        Returns:
            the record, or None if another machine was first.
        """
        path = Path(self.folder) / f"{job_id}_failed_{attempt}.json"
        record = {
            "attempt": attempt, "machine": socket.gethostname(), "rank": rank, "status": status,
            "error": last_error(log),
        }  # fmt: skip
        try:
            with path.open("x") as file:
                json.dump(record, file)
        except FileExistsError:
            return None
        return record

    def _may_retry(self, job_id, status):
        failures = len(list(Path(self.folder).glob(f"{job_id}_failed_*.json")))
        return status != WRONG_USAGE and failures <= self.max_retry

    def __call__(self):
        """Run on one machine of a SLURM job, as submitit calls it: one process per machine.

        At the time limit, when SLURM sends SIGUSR2, the command is asked to end, and the job is queued again;
        after a failure too, as often as it may. After SIGTERM, which SLURM sends when it preempts a job that
        it queues again itself, and when a job is cancelled, the command ends in good order and nothing is
        queued here.

        Raises:
            RuntimeError: the command failed and is not tried again; the message is its own.
        """
        import submitit

        place = submitit.JobEnvironment()
        rank, attempt = place.global_rank, int(os.environ.get("SLURM_RESTART_COUNT", 0))
        port = 20000 + int(place.job_id) % 10000
        variables = self._variables(place.num_nodes, rank, place.hostnames[0], port)
        print(f"attempt {attempt}, machine {rank} of {place.num_nodes}: {' '.join(self.command)}", flush=True)
        status, asked = run_command(self.command, variables, patience=self.grace - 5)
        if status == 0:
            if rank == 0:
                write_json(Path(self.folder) / f"{place.job_id}_finished.json", {"attempt": attempt})
            return
        if asked == signal.SIGUSR2:
            print(f"time is up, status {status}", flush=True)
            if rank == 0:
                self._requeue(place.job_id, status)
            return
        if asked:
            sys.exit(status)
        record = self._failed(place.job_id, attempt, rank, status, place.paths.stderr)
        if record is None:
            time.sleep(60)  # the first machine to fail decides; it ends this process
            sys.exit(status)
        if self._may_retry(place.job_id, status):
            self._requeue(place.job_id, status)
        raise RuntimeError(f"exit status {status}: {record['error']}")

    def _requeue(self, job_id, status):
        print("queued again", flush=True)
        subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=60)
        sys.exit(status)

    def run_here(self):
        """Run on this machine without SLURM, in the foreground; the log is FOLDER/local_PID_log.out.

        Returns:
            the exit status.
        """
        job_id = f"local_{os.getpid()}"
        log = Path(self.folder) / f"{job_id}_log.out"
        for attempt in range(self.max_retry + 1):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            tee = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
            variables = self._variables(1, 0, "127.0.0.1", port)
            status, asked = run_command(self.command, variables, output=tee.stdin)
            tee.stdin.close()
            tee.wait()
            if status == 0 or asked:
                break
            self._failed(job_id, attempt, 0, status, log)
            if not self._may_retry(job_id, status):
                break
        return status


def slurm_state(job_id):
    """What SLURM says of a job, as `RUNNING`; None where it says nothing."""
    questions = (
        ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"],
        ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job_id}"],
    )
    for question in questions:
        if shutil.which(question[0]):
            answer = subprocess.run(question, capture_output=True, text=True, timeout=60).stdout.split()
            if answer:
                return answer[0]
    return None
