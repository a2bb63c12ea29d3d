"""Faults of a cluster: a training on two of three machines must end as if there had been none.

    PYTHONPATH=tests python tests/faults/machines.py --faults 20 --seed 0

Each fault is of a random kind and comes at a random moment. Needs root, for the cluster of slurm/cluster.sh.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import helpers
import processes
import torch
from processes import REPO, wait_for

from engine.data import ImageStream
from models.weights import read_weights
from scripts.cli.attempt import records

RUN = REPO / "scripts/cli/run.py"
SLURM = REPO / "tests/faults/slurm"
TRAIN = ["bash", SLURM / "train.sh"]
IMAGES, BATCH, EPOCHS = 160, 12, 6  # 80 steps
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


class NoCluster(Exception):
    """There can be no cluster here; the message gives the reason."""


@dataclass(frozen=True)
class Cluster:
    """Three machines, numbered from 1, and their files."""

    folder: Path

    @property
    def env(self):
        """The variables by which programs find the cluster; two processes on each machine."""
        hidden = ("NNODES", "NGPU", "RANK", "WORLD_SIZE", "OUTPUT_DIR")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        path = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "NGPU": "2"}
        return {**env, **own, "PATH": path}

    def do(self, verb, *words):
        """Run cluster.sh, with the number of a machine for most verbs."""
        command = ["bash", SLURM / "cluster.sh", verb, self.folder, *words]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    def call(self, *words):
        """Run a command of SLURM; returns what it printed."""
        words = [str(word) for word in words]
        return subprocess.run(words, env=self.env, capture_output=True, text=True, check=True).stdout

    def run(self, *words, **variables):
        """Run scripts/cli/run.py; returns the Outcome."""
        words, env = [sys.executable, RUN, *map(str, words)], {**self.env, **variables}
        done = subprocess.run(words, env=env, cwd=REPO, capture_output=True, text=True)
        return processes.Outcome(done.returncode, done.stdout, done.stderr)

    def submit(self, folder, *words, **variables):
        """Submit a job with a run folder."""
        flags = ["-J", "test", "--gpus-per-node", 0, "--output-dir", folder]
        outcome = processes.finished(self.run(*flags, *words, **variables))
        return Job(self, Path(folder), re.match(r"job (\d+) submitted", outcome.out)[1])


@contextmanager
def cluster_in(folder):
    """A running Cluster."""
    cluster = Cluster(Path(folder))
    started = cluster.do("start", 3)
    if started.returncode:
        raise NoCluster(started.stderr.strip())
    try:
        yield cluster
    finally:
        cluster.do("stop")


@dataclass(frozen=True)
class Job:
    """A submitted job of a cluster, by default a training of slow_lpd.py."""

    cluster: Cluster
    folder: Path
    job_id: str

    @property
    def facts(self):
        """What SLURM says: JobState, Restarts and more."""
        shown = self.cluster.call("scontrol", "show", "job", "--oneliner", self.job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    @property
    def attempt(self):
        """The number of the current attempt of a job that must not have ended."""
        facts = self.facts
        assert facts["JobState"] not in ENDED, self.cluster.run("status", self.folder).out
        return int(facts["Restarts"])

    @property
    def machines(self):
        """The numbers of the machines of the latest attempt, rank 0's first."""
        return [int(name[3:]) for name in records(self.folder / "jobs", self.job_id, "began")[-1]["machines"]]

    def ended(self):
        """The final state, waiting for it."""
        wait_for(lambda: self.facts["JobState"] in ENDED, f"end of job {self.job_id}")
        return self.facts["JobState"]

    def steps(self, attempt):
        """How many steps rank 0 has begun in an attempt."""
        path = self.folder.with_name(f"{self.folder.name}-seen") / f"{attempt}-0"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_steps(self, count):
        wait_for(lambda: self.steps(self.attempt) >= count, f"{count} steps of an attempt")

    def wait_for_attempt(self, number):
        wait_for(lambda: self.attempt >= number, f"attempt {number}")

    def seen(self):
        """Step -> its images in the order of the processes; a step that was repeated had the same again."""
        parts = {}
        for path in self.folder.with_name(f"{self.folder.name}-seen").iterdir():
            rank = int(path.name.split("-")[1])
            for line in path.read_text().splitlines():
                if line.endswith("]]"):  # not cut short by a kill
                    step, images = json.loads(line)
                    assert parts.setdefault((step, rank), images) == images
        steps = {}
        for step, rank in sorted(parts):
            steps.setdefault(step, []).extend(parts[step, rank])
        return steps


# Faults: each is done to a job and returns when SLURM has begun the next attempt.


def requeue(job):
    """By hand."""
    job.cluster.call("scontrol", "requeue", job.job_id)


def reach_time_limit(job):
    """SLURM looks every 30 s, and signals up to a minute before the limit."""
    before = job.attempt
    hours, minutes, seconds = map(int, job.facts["RunTime"].split(":"))
    limit = (60 * minutes + seconds + 40) // 60 + 1
    job.cluster.call("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={limit}")
    job.wait_for_attempt(before + 1)
    job.cluster.call("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=600")


def preempt(job):
    """By a job of a higher partition that needs all machines."""
    before = job.attempt
    job.cluster.call("sbatch", "-p", "urgent", "-N", 3, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    job.wait_for_attempt(before + 1)


def lose(job, place, how, announce=False, back=True):
    """Turn off the machine `place` of the job (`how` is "die") or pull its cable ("cut"), and give it `back`
    when the attempt has ended. SLURM takes half a minute to notice, unless somebody tells it."""
    before, machine = job.attempt, job.machines[place]
    job.cluster.do(how, machine)
    if announce:
        job.cluster.call("scontrol", "update", f"NodeName=lpd{machine}", "State=DOWN", "Reason=test")
    job.wait_for_attempt(before + 1)
    if back:
        job.cluster.do("back", machine)


def hang(job, place):
    """Stop the processes on a machine of the job."""
    before = job.attempt
    job.cluster.do("hang", job.machines[place], job.job_id)
    job.wait_for_attempt(before + 1)


FAULTS = {
    "requeue": requeue,
    "time limit": reach_time_limit,
    "preemption": preempt,
    "power of rank 0": partial(lose, place=0, how="die"),
    "power of another": partial(lose, place=1, how="die"),
    "cable of rank 0": partial(lose, place=0, how="cut"),
    "cable of another": partial(lose, place=1, how="cut"),
    "hang of rank 0": partial(hang, place=0),
    "hang of another": partial(hang, place=1),
}


def survive(job, kind, steps=2, **options):
    """Do a fault of FAULTS after some steps of an attempt; returns the seconds until the job trains again."""
    job.wait_for_steps(steps)
    before, begun = job.attempt, time.monotonic()
    FAULTS[kind](job, **options)
    wait_for(lambda: job.attempt > before and job.steps(job.attempt) > 1, "training after a fault")
    return time.monotonic() - begun


# What a training must leave.


def make_tokens(folder):
    """A token cache of real images, 32x32, made with the shipped tokenizer."""
    helpers.fashion_mnist(folder / "images", IMAGES)
    vq = REPO / "assets/fashion_mnist/tokenizer.safetensors"
    words = ["--img_size", 32, "--vqgan_path", vq, "--data_path", folder / "images", *helpers.ON_CPU]
    processes.finished(helpers.call("cache", *words, "--cached_path", folder / "cache"))
    return folder / "cache"


def train_variables(tokens):
    return {"CACHED_PATH": str(tokens), "PROGRAM": str(SLURM / "slow_lpd.py")}


def start_plain(cluster, tokens, folder, epochs):
    """Start the undisturbed training of four processes on one machine."""
    env = {**cluster.env, "CACHED_PATH": str(tokens), "OUTPUT_DIR": str(folder), "NGPU": "4"}
    words = [*TRAIN, "--epochs", epochs]
    with Path(f"{folder}.log").open("w") as log:
        return subprocess.Popen(list(map(str, words)), env=env, stdout=log, stderr=log)


def same_weights(first, second):
    return helpers.same(*(read_weights(run / "lpd.safetensors")[0] for run in (first, second)))


def check_images(job, epochs, first=0):
    """Every image once an epoch, in the order of an undisturbed run, from step `first` on."""
    stream, steps = ImageStream(IMAGES, 0, BATCH), range(first, -(-epochs * IMAGES // BATCH))
    assert job.seen() == {step: stream.images(step)[0].tolist() for step in steps}
    seen = [stream.images(step)[0].tolist() for step in range(first)] + [job.seen()[step] for step in steps]
    seen = sum(seen, [])
    assert all(sorted(seen[i * IMAGES : (i + 1) * IMAGES]) == list(range(IMAGES)) for i in range(epochs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lpd-machines-") as space:
        with cluster_in(f"{space}/slurm") as cluster:
            repeat(cluster, Path(space), args)
    print(f"{args.faults} faults survived: the weights are those of the undisturbed run, bit for bit")


def repeat(cluster, space, args):
    """One training with many faults, compared with an undisturbed one."""
    rng, tokens, epochs = random.Random(args.seed), make_tokens(space), 2 * args.faults
    plain = start_plain(cluster, tokens, space / "plain", epochs)
    flags = ["-N", 2, "--time", 600, "--grace", 30, *TRAIN, "--epochs", epochs, "--timeout", 0.5]
    job = cluster.submit(space / "run", *flags, **train_variables(tokens))
    for number in range(args.faults):
        kind = rng.choice(args.kinds)
        seconds = survive(job, kind, steps=rng.randrange(1, 8))
        print(f"{number + 1}. {kind}: trains again after {seconds:.0f} s", flush=True)
    (space / "hurry").touch()
    state = job.ended()
    print(processes.finished(cluster.run("status", space / "run")).out)
    assert state == "COMPLETED" and plain.wait() == 0
    check_images(job, epochs)
    assert same_weights(space / "run", space / "plain")


if __name__ == "__main__":
    main()
