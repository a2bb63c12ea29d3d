"""No process outlives its program by more than a few seconds, whatever ended it and whatever it was doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from helpers import REPO, cache_flags, tokenizer_flags, train_flags, words_of

from engine.checkpoint import LAST
from models.weights import read_pth

SECONDS = 5  # workers look for their parent process once a second

SLOW_READING = """
import runpy, sys, time
import util.images
plain, seconds = util.images.load_image, float(sys.argv[1])
def slow(*args):
    time.sleep(seconds)
    return plain(*args)
util.images.load_image = slow
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SLOW_CONSUMER = """
import multiprocessing, pathlib, sys, time
from util.folders import list_images
from util.images import image_loader, in_order, readable_pixels
multiprocessing.set_start_method(sys.argv[4])
folder = list_images(sys.argv[1])
loader = image_loader(folder, 256, in_order(list(range(len(folder))) * 100, 8), int(sys.argv[2]))
for items in loader:
    readable_pixels(items)
    pathlib.Path(sys.argv[3]).touch()
    time.sleep(1000)
"""


def start(*words):
    """A Python process in a session of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def children(pid):
    """The ids of a process's children and their children."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except FileNotFoundError:
        return []
    own = [int(child) for part in lists for child in part]
    return own + [each for child in own for each in children(child)]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_nothing_outlives(program, number, processes, working):
    """Signal a process that has started `processes` others, once they have worked for so many seconds."""
    try:
        assert wait_for(lambda: len(children(program.pid)) >= processes, 120)
        time.sleep(working)
        started = children(program.pid)
        program.send_signal(number)
        program.wait(60)
        assert wait_for(lambda: not any(map(running, started)), SECONDS), f"{number.name}: {started}"
    finally:
        for pid in [program.pid, *children(program.pid)]:
            if running(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("method,workers", [("fork", 1), ("fork", 3), ("forkserver", 2), ("spawn", 2)])
def test_worker_reads_and_ends_when_its_program_is_killed(method, workers, tmp_path):
    """However it was started. The pipe between them is full."""
    read = tmp_path / "read"
    program = start("-c", SLOW_CONSUMER, helpers.images() / "train", workers, read, method)
    assert wait_for(lambda: read.exists() or program.poll() is not None, 120) and program.poll() is None
    assert_nothing_outlives(program, signal.SIGKILL, workers, working=2)


def flags_of(program, out):
    data = {"data_path": helpers.images(), "img_size": helpers.SIZE}
    return {
        "stats": lambda: words_of({**data, "features": "efficientnet_lite0", "output_file": out / "s.npz"}),
        "cache": lambda: cache_flags(out),
        "tokenizer": lambda: tokenizer_flags(out, epochs=1000),
        "lpd": lambda: train_flags(
            out, **data, cached_path=None, vqgan_path=helpers.tokenizer(), epochs=1000
        ),
    }[program]()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["stats", "cache", "tokenizer", "lpd"])
def test_program_ended_while_it_reads_leaves_no_worker(program, tmp_path):
    ends = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 3}
    started = {}
    # The last of three must still read when the others have ended: caching and statistics end by themselves.
    seconds = 0.3 if program in ("tokenizer", "lpd") else 3
    for number, workers in ends.items():
        flags = flags_of(program, tmp_path / number.name)
        words = ("-c", SLOW_READING, seconds, REPO / f"main_{program}.py", *flags, "--device", "cpu")
        started[number] = start(*words, "--num_workers", workers)
    for number, process in started.items():
        assert_nothing_outlives(process, number, ends[number], working=1)


@pytest.mark.slow
def test_training_saves_and_ends_when_its_launcher_is_killed(tmp_path):
    port = helpers.free_port()
    launcher = start(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, REPO / "main_lpd.py",
        *train_flags(tmp_path / "run", epochs=100000, save_last_freq=0, log_every=10),
    )
    assert wait_for((tmp_path / "run/metrics.jsonl").exists, 120)
    processes = children(launcher.pid)
    launcher.kill()
    assert wait_for(lambda: not any(map(running, processes)), 60)  # they notice within a second, then save
    assert read_pth(tmp_path / "run" / LAST)["step"] > 0
