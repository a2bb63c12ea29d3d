"""kill -9 at random moments: a program started again by the same command ends as if nothing had happened.

    python tests/faults/kills.py --kills 30 --seed 0

Each of the programs below does a small real job once undisturbed, then again and again in new folders,
killed after a random part of its time and started again. What it leaves, left-overs and hidden files
included, must be the same bytes; of records only the seconds may differ, of checkpoints only how a tensor
lies in memory. fp32, on the CPU. The jobs are forked, so a kill falls into the work and not into imports.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import programs  # noqa: E402
import torch  # noqa: E402
from programs import ON_CPU, cache_flags, contents, evaluate_flags, train_flags  # noqa: E402

from engine.checkpoint import load_checkpoint  # noqa: E402
from util.files import value_digest  # noqa: E402

# Of records: what tells how long a run took.
TIMES = ("seconds", "images_per_s")


def order_flags(folder):
    """The command line of orders/run_lpd_order.py: 1,500 orders of 8x8 cells as `.npy` and `.json`."""
    names = [folder / "orders.npy", folder / "orders.json"]
    return ["--img_size", 128, "--generation_steps", 8, "--num_runs", 1500, "--max_workers", 1,
            "--output_file", *names]  # fmt: skip


def tokenizer_flags(folder):
    """The command line of main_tokenizer.py: 27 steps with a checkpoint every second."""
    return ["--data_path", programs.images(), "--img_size", programs.SIZE, "--vocab_size", 64,
            "--base_width", 32, "--multipliers", 1, 2, "--num_res_blocks", 1, "--z_channels", 32,
            "--batch_size", 4, "--epochs", 6, "--save_every", 2, "--output_dir", folder, *ON_CPU]  # fmt: skip


JOBS = {
    "orders": ("orders.run_lpd_order", order_flags),
    "caching": ("main_cache", lambda folder: cache_flags(folder, batch_size=2, shard_size=3)),
    "tokenizer": ("main_tokenizer", tokenizer_flags),
    "training": ("main_lpd", lambda folder: train_flags(folder, save_last_freq=0.25, ema=0.9)),
    "evaluation": (
        "main_lpd",
        lambda folder: evaluate_flags(
            folder, num_images=12, eval_bsz=1, cfg=2.0, features="efficientnet_lite0",
            save_npz=folder / "images.npz",
        ),
    ),
}  # fmt: skip


def start(job, folder):
    """Fork a process that runs the job's command; its output goes to FOLDER.log. Returns its pid."""
    module, flags = JOBS[job]
    argv = [str(word) for word in flags(folder)]
    main = __import__(module, fromlist=["main"]).main
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = main(argv) if module.startswith("orders") else programs.cli.run(lambda: main(argv))
    except SystemExit as end:
        status = end.code
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status or 0)


def finish(job, folder):
    """Run the job's command to its end; returns the seconds it took.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    begun = time.monotonic()
    _, status = os.waitpid(start(job, folder), 0)
    if status:
        raise RuntimeError(f"{job}: wait status {status}\n{Path(f'{folder}.log').read_text()[-2000:]}")
    return time.monotonic() - begun


def killed(job, folder, seconds):
    """Start the job's command and kill it after so many seconds; False if it was done before."""
    pid = start(job, folder)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def timeless(value, folder):
    """A record without the fields of TIMES, and with this run's folder named alike for all runs."""
    if isinstance(value, dict):
        return {k: timeless(v, folder) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [timeless(v, folder) for v in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


def results(folder):
    """Relative path -> digest of every file of a run; of JSON files, of what they say but for the times."""
    digests = contents(folder)
    for name in digests:
        if name.endswith((".json", ".jsonl")) and "order" not in name:
            text = (folder / name).read_text()
            lines = text.splitlines() if name.endswith(".jsonl") else [text]
            digests[name] = value_digest([timeless(json.loads(line), folder) for line in lines])
        if name.endswith(".pth"):
            digests[name] = value_digest(plain(load_checkpoint(folder / name)))
    return digests


def plain(value):
    """What a checkpoint says as plain values: of a tensor its bytes, not how they lie in memory."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes().hex()]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def survive(job, kills, seed, workspace):
    """Kill a job `kills` times, each time in a new folder, and start it again.

    Returns:
        dict: kills that fell into the run; seconds of the undisturbed run.
    Raises:
        AssertionError: a run started again ended otherwise; names the kill and the files.
    """
    plain = workspace / f"{job}-plain"
    finish(job, plain)  # once to warm up: the first call in a process is slower
    shutil.rmtree(plain)
    seconds = finish(job, plain)
    expected, hits, tries, whole = results(plain), 0, 0, seconds
    while hits < kills:
        if tries > 3 * kills + 5:
            raise RuntimeError(f"{job}: only {hits} of {tries} kills fell into the run")
        moment = random.Random(f"{seed} {job} {tries}").uniform(0, seconds)
        folder = workspace / f"{job}-{tries}"
        if killed(job, folder, moment):
            hits += 1
        else:
            seconds = moment  # it is quicker than it was undisturbed
        finish(job, folder)
        found = results(folder)
        wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
        assert not wrong, (
            f"{job}, killed after {moment:.3f} of {seconds:.3f} s (try {tries}): {sorted(wrong)}"
        )
        shutil.rmtree(folder)
        tries += 1
    return {"kills": hits, "seconds": round(whole, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each job")
    parser.add_argument("--jobs", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpd-kills-") as workspace:
        for job in args.jobs:
            report = survive(job, args.kills, args.seed, Path(workspace))
            print(
                f"{job}: {report['kills']} kills of a run of {report['seconds']} s, all survived", flush=True
            )


if __name__ == "__main__":
    main()
