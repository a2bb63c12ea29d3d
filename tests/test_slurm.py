"""scripts/cli/run.py on a real SLURM cluster of this one machine; skipped where there can be none.

tests/slurm/one_node.sh starts it, and installs SLURM first where this is root on Debian. All tests here are
slow: a training is under way beside them for the two minutes until SLURM's time limit is met.
"""

import os
import re
import subprocess
import sys
import time

import programs
import pytest
import torch
from programs import REPO

from engine.checkpoint import load_checkpoint, read_weights

RUN = REPO / "scripts/cli/run.py"
STEPS, IMAGES = 40, 160  # 4 images a step; 100 s with the pauses of slow_lpd.py
pytestmark = pytest.mark.slow
LIMIT, GRACE = 2, 30  # minutes, seconds: SLURM, which looks every 30 s, signals after 60 to 90 s


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which programs find a SLURM cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", REPO / "tests/slurm/one_node.sh"]
    env = {**os.environ, "PORT": str(programs.free_port())}
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
    """Call run.py in the cluster."""
    done = subprocess.run(
        [sys.executable, RUN, *map(str, words)], env=cluster, cwd=REPO, capture_output=True, text=True
    )
    return programs.Outcome(done.returncode, done.stdout, done.stderr)


def submit(cluster, output_dir, *words):
    flags = ["-J", "test", "--gpus-per-node", 0, "--output-dir", output_dir]
    outcome = programs.finished(run(cluster, *flags, *words))
    return re.match(r"job (\d+) submitted", outcome.out)[1]


def ended(cluster, job_id, seconds):
    """The state of a job when it has ended."""
    end = time.monotonic() + seconds
    question = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}"]
    while time.monotonic() < end:
        state = subprocess.run(question, env=cluster, capture_output=True, text=True).stdout.strip()
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return state
        time.sleep(1)
    raise AssertionError(f"job {job_id} is {state} after {seconds} s")


@pytest.fixture(scope="module")
def tokens(cluster, tmp_path_factory):
    """A token cache of real images, 32x32, made with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    programs.fashion_mnist(folder / "images", IMAGES)
    vq = REPO / "assets/fashion_mnist/tokenizer.safetensors"
    words = ["--img_size", 32, "--vqgan_path", vq, "--data_path", folder / "images", *programs.ON_CPU]
    programs.finished(programs.call("cache", *words, "--cached_path", folder / "cache"))
    return folder / "cache"


TRAIN = ["bash", REPO / "tests/slurm/train.sh", "--epochs", 1]


@pytest.fixture(scope="module", autouse=True)
def training(cluster, tokens, tmp_path_factory):
    """A training of two processes over gloo that is under way beside the other tests: (job, run folder)."""
    folder = tmp_path_factory.mktemp("training") / "run"
    slow = {**cluster, "CACHED_PATH": str(tokens), "PROGRAM": str(REPO / "tests/slurm/slow_lpd.py")}
    return submit(slow, folder, "--time", LIMIT, "--grace", GRACE, *TRAIN), folder


def test_failing_job_is_tried_again_and_reported_as_failed_with_its_error(cluster, tmp_path):
    script = 'echo "try of $(hostname)"; echo "error: no such luck" >&2; exit 5'
    job_id = submit(cluster, tmp_path, "--max-retry", 1, "bash", "-c", script)
    assert ended(cluster, job_id, 120) == "FAILED"
    status = programs.finished(run(cluster, "status", tmp_path)).out
    assert status.startswith(f"job {job_id}: FAILED\n")
    assert len(re.findall(r"attempt [01] on \S+: exit status 5: error: no such luck\n", status)) == 2
    logs = programs.finished(run(cluster, "logs", tmp_path)).out
    assert logs.count("\ntry of") == 2 <= logs.count("error: no such luck")


def test_job_is_cancelled_and_its_folder_then_free(cluster, tmp_path):
    job_id = submit(cluster, tmp_path, "sleep", 600)
    outcome = run(cluster, "--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 2 and f"is job {job_id}'s, which is" in outcome.err
    programs.finished(run(cluster, "cancel", tmp_path))
    assert ended(cluster, job_id, 60) == "CANCELLED"
    assert programs.finished(run(cluster, "status", tmp_path)).out.startswith(f"job {job_id}: CANCELLED\n")
    submit(cluster, tmp_path, "true")


def test_what_sbatch_refuses_is_told(cluster, tmp_path):
    outcome = run(cluster, "-p", "nowhere", "--gpus-per-node", 0, "--output-dir", tmp_path, "true")
    assert outcome.status == 1 and "invalid partition specified: nowhere" in outcome.err
    assert outcome.err.endswith("\nerror: sbatch refused the job: nothing was submitted\n")


def test_training_that_meets_the_time_limit_is_queued_again_and_ends_with_the_weights_of_one_undisturbed(
    cluster, tokens, training, tmp_path
):
    """Bit for bit, on real tokens."""
    job_id, folder = training
    plain = {**cluster, "CACHED_PATH": str(tokens), "OUTPUT_DIR": str(tmp_path / "plain")}
    undisturbed = subprocess.run(list(map(str, TRAIN)), env=plain, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert ended(cluster, job_id, 400) == "COMPLETED"
    out, err = (folder / f"jobs/{job_id}_0_log.{stream}" for stream in ("out", "err"))
    assert "time is up, status 140\nqueued again\n" in out.read_text()
    assert "attempt 1, machine 0 of 1" in out.read_text()
    assert "stopped: SIGUSR2: checkpoint-last.pth holds step" in err.read_text()
    assert load_checkpoint(folder / "checkpoint-last.pth")["step"] == STEPS
    ours, expected = (read_weights(end / "lpd.safetensors")[0] for end in (folder, tmp_path / "plain"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in expected)
    status = programs.finished(run(cluster, "status", folder)).out
    assert status.startswith(f"job {job_id}: COMPLETED\n")
