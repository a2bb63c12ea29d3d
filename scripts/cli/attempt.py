"""The attempts of a SLURM job: their records, and whether another one follows.

An attempt ends by its command's own doing, or by the cluster's: a lost machine, a killed step, a preemption.
The first to notice records it beside the logs, as `JOB_ended_N.json`, and decides what follows.

    python -m scripts.cli.attempt FOLDER STATUS     what the batch script does when srun has failed
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from util.files import read_json, write_json

FINISHED, TIME_LIMIT, FAILED, LOST = "finished", "time limit", "failed", "lost"  # how an attempt ends
MAX_LOST = 10  # attempts in a row that the cluster ended, without progress


@dataclass(frozen=True)
class Attempt:
    """Attempt `number` of a job, counted from 0 as SLURM does. `folder` holds the records of all."""

    folder: str
    job_id: str
    number: int

    @classmethod
    def of_this_process(cls, folder):
        return cls(folder, os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    def begin(self, machines):
        """Record the start, and the end of earlier attempts that nothing was left to record. Raises
        RuntimeError: MAX_LOST attempts in a row were lost without progress."""
        for number in range(self.number):
            replace(self, number=number).end(LOST, "its machine was lost, or SLURM queued the job again")
        self._write("began", {"machines": machines})
        if self._is_stuck():
            reason = f"{MAX_LOST} attempts in a row were lost without progress"
            self.end(FAILED, reason)
            raise RuntimeError(reason)

    def end(self, cause, reason):
        """Record how the attempt ended. Returns False if that is recorded already."""
        facts = {"cause": cause, "reason": reason, "machine": socket.gethostname()}
        return self._write("ended", {**facts, "progress": progress(self.folder)})

    def _write(self, what, facts):
        path = Path(self.folder, f"{self.job_id}_{what}_{self.number}.json")
        own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        write_json(own, {"attempt": self.number, "time": time.strftime("%F %T"), **facts})
        try:
            os.link(own, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            return False
        finally:
            own.unlink()
        return True

    def is_refused_by_all(self, rank, machines, seconds):
        """Whether the command is wrong usage on every machine, not only here or after an earlier attempt."""
        Path(self.folder, f"{self.job_id}_refused_{rank}").touch()
        for _ in range(0 if self.number else seconds):
            if len([*Path(self.folder).glob(f"{self.job_id}_refused_*")]) == machines:
                return True
            time.sleep(1)
        return False

    def is_running(self):
        """Whether SLURM runs this very attempt: not cancelled, not preempted, and no newer one."""
        query = ["scontrol", "show", "job", "--oneliner", self.job_id]
        with contextlib.suppress(subprocess.TimeoutExpired):
            shown = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
            return {"JobState=RUNNING", f"Restarts={self.number}"} <= set(shown)
        return False

    def may_follow(self, max_retry):
        """Whether another attempt may follow this one, which has failed or was lost."""
        failures = sum(record["cause"] == FAILED for record in records(self.folder, self.job_id))
        return failures <= max_retry and not self._is_stuck()

    def _is_stuck(self):
        ended = records(self.folder, self.job_id)[::-1]
        lost = itertools.takewhile(lambda record: record["cause"] == LOST, ended)
        return sum(record["progress"] == ended[0]["progress"] for record in lost) >= MAX_LOST

    def queue_again(self):
        print("queued again", flush=True)
        subprocess.run(["scontrol", "requeue", self.job_id], check=True, timeout=60)

    def kill_earlier(self):
        """Kill what earlier attempts left on this machine, if it was cut off and is back."""
        here = {f"{name}={os.environ[name]}" for name in ("SLURM_JOB_ID", "SLURMD_NODENAME")}
        for path in Path("/proc").glob("[0-9]*/environ") if self.number else ():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                theirs = set(path.read_text(errors="replace").split("\0"))
                if here <= theirs and f"SLURM_RESTART_COUNT={self.number}" not in theirs:
                    os.kill(int(path.parent.name), signal.SIGKILL)


def records(folder, job_id, what="ended"):
    """The records of the attempts of a job that `ended` or `began`, in order."""
    found = [read_json(path) for path in Path(folder).glob(f"{job_id}_{what}_*.json")]
    return sorted(found, key=lambda record: record["attempt"])


def progress(folder):
    """Numbers that change as a run gets on: of its files, and the time of its last checkpoint."""
    run = Path(folder).parent
    last = run / "checkpoint-last.pth"
    outside = (names for place, _, names in os.walk(run) if not f"{place}/".startswith(f"{folder}/"))
    files = [name for names in outside for name in names]
    return [sum(not name.startswith(".") for name in files), last.stat().st_mtime if last.exists() else 0]


def story(folder, job_id):
    """A line for each attempt of a job: when and where it ran, and how it ended."""
    began, ended = ({r["attempt"]: r for r in records(folder, job_id, what)} for what in ("began", "ended"))
    for number in sorted(began.keys() | ended.keys()):
        line = f"attempt {number}"
        if start := began.get(number):
            line += f" on {', '.join(start['machines'])}, {start['time']}"
        if end := ended.get(number):
            line += f": {end['cause']}, {end['time']}" + (f": {end['reason']}" if end["reason"] else "")
        yield line


def main(folder, status):
    """Queue the job again, unless a machine has recorded why the step failed, or SLURM ends the job."""
    attempt = Attempt.of_this_process(folder)
    lost = attempt.is_running() and attempt.end(LOST, f"SLURM ended the step, srun's exit status {status}")
    if lost and attempt.may_follow(max_retry=sys.maxsize):
        attempt.queue_again()
    sys.exit(int(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
