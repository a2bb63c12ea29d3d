"""kill -9 at random moments: a program started again by the same command ends as if nothing had happened.

    PYTHONPATH=tests python tests/faults/kills.py --kills 30 --seed 0

Each job runs once undisturbed, then again and again in new folders, killed at a random moment and started
again. What it leaves, hidden files included, must be the same bytes, apart from recorded durations and how
tensors of a checkpoint lie in memory. Jobs are forked, so that kills hit the work and not the imports.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from helpers import cache_flags, contents, evaluate_flags, tokenizer_flags, train_flags, words_of
from tqdm import tqdm

from models.weights import read_pth
from util import cli
from util.files import value_digest

DURATIONS = ("seconds", "images_per_s", "data_wait", "share_of_matrix_rate")


def order_flags(folder):
    """1,500 orders of 8x8 cells as `.npy` and `.json`."""
    flags = {"img_size": 128, "generation_steps": 8, "num_runs": 1500, "max_workers": 1}
    return words_of({**flags, "output_file": [folder / "orders.npy", folder / "orders.json"]})


def evaluation_flags(folder):
    small = {"num_images": 12, "eval_bsz": 1, "cfg": 2.0, "features": "efficientnet_lite0"}
    return evaluate_flags(folder, save_npz=folder / "images.npz", **small)


JOBS = {
    "orders": ("orders.run_lpd_order", order_flags),
    "caching": ("main_cache", lambda folder: cache_flags(folder, batch_size=2, shard_size=3)),
    "tokenizer": ("main_tokenizer", lambda folder: tokenizer_flags(folder, epochs=4, save_every=2)),
    "training": ("main_lpd", lambda folder: train_flags(folder, epochs=2, save_last_freq=0.25, ema=0.9)),
    "evaluation": ("main_lpd", evaluation_flags),
}


def start(job, folder):
    """Fork a process that runs the job's command; its output goes to FOLDER.log. Returns its pid."""
    module, flags = JOBS[job]
    argv = [str(word) for word in flags(folder)]
    main = importlib.import_module(module).main
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it
        status = cli.run(lambda: main(argv))
    except SystemExit as end:
        status = end.code
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status or 0)


def finish(job, folder):
    """Run the job's command to its end, which must be a success; returns the seconds it took."""
    begun = time.monotonic()
    _, status = os.waitpid(start(job, folder), 0)
    if status:
        raise RuntimeError(f"{job}: wait status {status}\n{Path(f'{folder}.log').read_text()[-2000:]}")
    return time.monotonic() - begun


def killed(job, folder, seconds):
    """Start the job's command and kill it after `seconds`; False if it had finished."""
    pid = start(job, folder)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def comparable(value, folder):
    """A record or checkpoint as plain values, without durations and the name of this run's folder."""
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, dict):
        return {str(k): comparable(v, folder) for k, v in value.items() if k not in DURATIONS}
    if isinstance(value, (list, tuple)):
        return [comparable(v, folder) for v in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


def results(folder):
    """Relative path -> digest of every file of a run but `runs.jsonl`, the history of its starts."""
    digests = contents(folder)
    digests.pop("runs.jsonl", None)
    for name in digests:
        path = folder / name
        if path.suffix == ".pth":
            digests[name] = value_digest(comparable(read_pth(path), folder))
        elif path.suffix in (".json", ".jsonl") and "order" not in name:
            text = path.read_text()
            records = text.splitlines() if path.suffix == ".jsonl" else [text]
            digests[name] = value_digest([comparable(json.loads(text), folder) for text in records])
    return digests


def survive(job, kills, seed, workspace):
    """Kill a job `kills` times, each time in a new folder, and start it again.

    Returns:
        seconds of the undisturbed run.
    Raises:
        AssertionError: a run started again left other files; names the moment of the kill and the files.
    """
    plain = workspace / f"{job}-plain"
    finish(job, plain)  # the first call in a process is slower
    shutil.rmtree(plain)
    seconds = whole = finish(job, plain)
    expected, hits, tries = results(plain), 0, 0
    while hits < kills:
        assert tries <= 10 * kills + 20, f"{job}: only {hits} of {tries} kills hit the run"
        moment = random.Random(f"{seed} {job} {tries}").uniform(0, seconds)
        folder = workspace / f"{job}-{tries}"
        if killed(job, folder, moment):
            hits += 1
        else:
            seconds = moment  # it is faster than it was undisturbed
        finish(job, folder)
        found = results(folder)
        wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
        assert not wrong, f"{job}, killed after {moment:.3f} of {seconds:.3f} s: {sorted(wrong)}"
        shutil.rmtree(folder)
        tries += 1
    return whole


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each job")
    parser.add_argument("--jobs", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpd-kills-") as workspace:
        for job in args.jobs:
            seconds = survive(job, args.kills, args.seed, Path(workspace))
            print(f"{job}: {args.kills} kills of a run of {seconds:.2f} s, all survived", flush=True)


if __name__ == "__main__":
    main()
