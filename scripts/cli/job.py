"""A command as a job: on each machine of a SLURM job, or on this machine.

The contract with the command: started again it resumes, SIGUSR2 asks it to stop, and exit status 2 means that
trying again is pointless.
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


def _ignore_user_signals():
    """They would kill a shell; a program that handles them installs its own handlers."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def run_command(command, environment=None, *, patience=0, output=None):
    """Run a command in a process group of its own and forward the signals that this process gets to it.

    patience: seconds after SIGUSR2 until whatever is left of the command is killed; 0 means no limit.
    output: file for stdout and stderr. Returns (exit status as in a shell, first signal received or 0).
    """
    received, groups = [], []

    def forward(number, frame):
        received.append(number)
        for group in groups:
            _send(number, group, os.killpg)
        if number == signal.SIGUSR2:
            signal.alarm(patience)

    def kill_all(number, frame):
        for pid in [pid for group in groups for pid in (*_descendants(group), group)]:
            _send(signal.SIGKILL, pid)

    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2), forward)
    handlers[signal.SIGALRM] = kill_all
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_ignore_user_signals,
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


def last_error(path):
    """The last line of a log that begins with `error:`, else its last line."""
    lines = [line.split("\r")[-1] for line in Path(path).read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line.strip()] or [""]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


@dataclass(frozen=True)
class Job:
    """A command, the variables it gets, and the folder for its logs and records.

    max_retry: attempts after failures. grace: seconds between SLURM's signal and its time limit.
    """

    command: tuple[str, ...]
    environment: dict
    folder: str
    max_retry: int = 0
    grace: int = 120

    def __call__(self):
        """Run on one machine of a SLURM job; submitit calls this once per machine.

        At the time limit (SIGUSR2) the command is asked to stop and the job is requeued; after a failure it
        is requeued `max_retry` times. SIGTERM means cancelled or preempted, when SLURM requeues by itself.
        Raises RuntimeError with the command's last error once it has failed for good.
        """
        import submitit

        place = submitit.JobEnvironment()
        job_id, rank = place.job_id, place.global_rank
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        print(f"attempt {attempt}, machine {rank} of {place.num_nodes}: {' '.join(self.command)}", flush=True)
        variables = self._variables(place.num_nodes, rank, place.hostnames[0], 20000 + int(job_id) % 10000)
        status, received = run_command(self.command, variables, patience=self.grace - 5)
        if status == 0:
            if rank == 0:
                write_json(Path(self.folder) / f"{job_id}_finished.json", {"attempt": attempt})
        elif received == signal.SIGUSR2:
            print(f"time is up, status {status}", flush=True)
            if rank == 0:
                _requeue(job_id, status)
        elif received:
            sys.exit(status)
        elif not self._record_failure(job_id, attempt, rank, status, place.paths.stderr):
            time.sleep(60)  # the first machine to fail decides, and that ends this process
            sys.exit(status)
        elif self._may_retry(job_id, status):
            _requeue(job_id, status)
        else:
            raise RuntimeError(f"exit status {status}: {last_error(place.paths.stderr)}")

    def run_here(self):
        """Run on this machine in the foreground, log to FOLDER/local_PID_log.out; returns the exit status."""
        job_id = f"local_{os.getpid()}"
        log = Path(self.folder) / f"{job_id}_log.out"
        for attempt in range(self.max_retry + 1):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                variables = self._variables(1, 0, "127.0.0.1", free.getsockname()[1])
            tee = subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True)
            status, received = run_command(self.command, variables, output=tee.stdin)
            tee.communicate()
            if status == 0 or received:
                break
            self._record_failure(job_id, attempt, 0, status, log)
            if not self._may_retry(job_id, status):
                break
        return status

    def _variables(self, nodes, rank, address, port):
        place = {"NNODES": nodes, "NODE_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
        return {**os.environ, **self.environment, **{name: str(value) for name, value in place.items()}}

    def _record_failure(self, job_id, attempt, rank, status, log):
        """Write the record of a failed attempt; returns whether this machine is the first to do so."""
        machine, error = socket.gethostname(), last_error(log)
        record = {"attempt": attempt, "machine": machine, "rank": rank, "status": status, "error": error}
        try:
            with Path(self.folder, f"{job_id}_failed_{attempt}.json").open("x") as file:
                json.dump(record, file)
        except FileExistsError:
            return False
        return True

    def _may_retry(self, job_id, status):
        failures = len(list(Path(self.folder).glob(f"{job_id}_failed_*.json")))
        return status != WRONG_USAGE and failures <= self.max_retry


def _requeue(job_id, status):
    print("queued again", flush=True)
    subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=60)
    sys.exit(status)


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
