"""scripts/cli/run.py on a real SLURM cluster of this one machine; skipped where it cannot be installed.

All tests are slow: beside them a training runs for the two minutes until it reaches SLURM's time limit.
"""

import os
import re
import subprocess
import sys
import time

import helpers
import pytest
import torch
from helpers import REPO

from models.weights import read_pth, read_weights

RUN = REPO / "scripts/cli/run.py"
SLURM = REPO / "tests/faults/slurm"
STEPS, IMAGES = 40, 160  # 4 images a step; 100 s with the pauses of slow_lpd.py
LIMIT, GRACE = 2, 30  # minutes, seconds: SLURM, which looks every 30 s, signals after 60 to 90 s
TRAIN = ["bash", SLURM / "train.sh", "--epochs", 1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which programs find the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", SLURM / "one_node.sh"]
    env = {**os.environ, "PORT": str(helpers.free_port())}
    started = subprocess.run([*script, "start", folder], env=env, capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no SLURM cluster here: {started.stderr.strip()}")
    hidden = ("NNODES", "NGPU", "RANK", "WORLD_SIZE", "OUTPUT_DIR")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "NGPU": "2"}
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    yield env
    subprocess.run([*script, "stop", folder], check=True)


def run(cluster, *words):
    words = [sys.executable, RUN, *map(str, words)]
    done = subprocess.run(words, env=cluster, cwd=REPO, capture_output=True, text=True)
    return helpers.Outcome(done.returncode, done.stdout, done.stderr)


def submit(cluster, output_dir, *words):
    flags = ["-J", "test", "--gpus-per-node", 0, "--output-dir", output_dir]
    outcome = helpers.finished(run(cluster, *flags, *words))
    return re.match(r"job (\d+) submitted", outcome.out)[1]


def ended(cluster, job_id, seconds):
    """The final state of a job."""
    end = time.monotonic() + seconds
    query = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"]
    while time.monotonic() < end:
        state = subprocess.run(query, env=cluster, capture_output=True, text=True).stdout.strip()
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return state
        time.sleep(1)
    raise AssertionError(f"job {job_id} is {state} after {seconds} s")


@pytest.fixture(scope="module")
def tokens(cluster, tmp_path_factory):
    """A token cache of real images, 32x32, made with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    helpers.fashion_mnist(folder / "images", IMAGES)
    vq = REPO / "assets/fashion_mnist/tokenizer.safetensors"
    words = ["--img_size", 32, "--vqgan_path", vq, "--data_path", folder / "images", *helpers.ON_CPU]
    helpers.finished(helpers.call("cache", *words, "--cached_path", folder / "cache"))
    return folder / "cache"


@pytest.fixture(scope="module", autouse=True)
def training(cluster, tokens, tmp_path_factory):
    """(job id, run folder) of a training of two processes that runs beside the other tests."""
    folder = tmp_path_factory.mktemp("training") / "run"
    slow = {**cluster, "CACHED_PATH": str(tokens), "PROGRAM": str(SLURM / "slow_lpd.py")}
    return submit(slow, folder, "--time", LIMIT, "--grace", GRACE, *TRAIN), folder


def test_failing_job_is_retried_and_reported_with_its_error(cluster, tmp_path):
    script = 'echo "try of $(hostname)"; echo "error: no such luck" >&2; exit 5'
    job_id = submit(cluster, tmp_path, "--max-retry", 1, "bash", "-c", script)
    assert ended(cluster, job_id, 120) == "FAILED"
    status = helpers.finished(run(cluster, "status", tmp_path)).out
    assert status.startswith(f"job {job_id}: FAILED\n")
    assert len(re.findall(r"attempt [01] on \S+: exit status 5: error: no such luck\n", status)) == 2
    logs = helpers.finished(run(cluster, "logs", tmp_path)).out
    assert logs.count("\ntry of") == 2 <= logs.count("error: no such luck")


def test_cancelled_job_frees_its_folder(cluster, tmp_path):
    job_id = submit(cluster, tmp_path, "sleep", 600)
    outcome = run(cluster, "--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 2 and f"is used by job {job_id}, which is" in outcome.err
    helpers.finished(run(cluster, "cancel", tmp_path))
    assert ended(cluster, job_id, 60) == "CANCELLED"
    assert helpers.finished(run(cluster, "status", tmp_path)).out.startswith(f"job {job_id}: CANCELLED\n")
    submit(cluster, tmp_path, "true")


def test_reason_of_sbatch_is_reported(cluster, tmp_path):
    outcome = run(cluster, "-p", "nowhere", "--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 1 and "invalid partition specified: nowhere" in outcome.err
    assert outcome.err.endswith("\nerror: sbatch refused the job: nothing was submitted\n")


def test_training_resumes_after_the_time_limit_with_the_same_weights(cluster, tokens, training, tmp_path):
    """Bit for bit those of an undisturbed run, on real tokens."""
    job_id, folder = training
    plain = {**cluster, "CACHED_PATH": str(tokens), "OUTPUT_DIR": str(tmp_path / "plain")}
    undisturbed = subprocess.run(list(map(str, TRAIN)), env=plain, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert ended(cluster, job_id, 400) == "COMPLETED"
    out, err = ((folder / f"jobs/{job_id}_0_log.{stream}").read_text() for stream in ("out", "err"))
    assert "time is up, status 140\nqueued again\n" in out and "attempt 1, machine 0 of 1" in out
    assert "stopped: SIGUSR2: checkpoint-last.pth holds step" in err
    assert read_pth(folder / "checkpoint-last.pth")["step"] == STEPS
    ours, expected = (read_weights(end / "lpd.safetensors")[0] for end in (folder, tmp_path / "plain"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in expected)
    status = helpers.finished(run(cluster, "status", folder)).out
    assert status.startswith(f"job {job_id}: COMPLETED\n")
