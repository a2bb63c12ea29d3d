"""No process outlives its program, whatever ended it and whatever it was doing."""

import os
import signal

import helpers
import processes
import pytest
from helpers import cache_flags, tokenizer_flags, train_flags, words_of
from processes import REPO, children, running, wait_for

from engine.checkpoint import LAST
from models.weights import read_pth

# The worker that reads notes each image; then it takes its time.
SLOW_READING = """
import runpy, sys, time
import util.images
plain, log, seconds = util.images.load_image, sys.argv[1], float(sys.argv[2])
def slow(*args):
    with open(log, "a") as file:
        print(file=file)
    time.sleep(seconds)
    return plain(*args)
util.images.load_image = slow
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Workers of any start method note each image, and the program reads one batch.
SLOW_CONSUMER = """
import multiprocessing, sys, time
from util.folders import list_images
from util.images import Reading, image_loader, in_order
class Noting(Reading):
    def rgb(self, image):
        with open(sys.argv[3], "a") as file:
            print(file=file)
        return super().rgb(image)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[4])
    folder = list_images(sys.argv[1], Noting())
    loader = image_loader(folder, 256, in_order(list(range(len(folder))) * 100, 8), int(sys.argv[2]))
    for items in loader:
        time.sleep(1000)
"""


def images_read(log):
    return log.read_text().count("\n") if log.exists() else 0


def assert_nothing_outlives(program, number, log, images):
    """Signal a program once its workers have begun to read that many images."""
    try:
        wait_for(lambda: images_read(log) >= images or not running(program.pid), "reading")
        assert running(program.pid)
        started = children(program.pid)
        os.kill(program.pid, number)
        wait_for(lambda: not running(program.pid), f"end of the program after {number.name}")
        wait_for(lambda: not any(map(running, started)), f"end of {started} after {number.name}")
    finally:
        for pid in [program.pid, *children(program.pid)]:
            if running(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "method,workers", [("fork", 3), ("forkserver", 1), pytest.param("spawn", 1, marks=pytest.mark.long)]
)
def test_worker_that_waits_for_its_killed_program_to_read_ends(method, workers, tmp_path):
    """The pipe between them is full: each worker is at its third batch of eight, and one takes up a pipe."""
    log, script = tmp_path / "log", tmp_path / "consumer.py"
    script.write_text(SLOW_CONSUMER)
    program = processes.background(script, helpers.images() / "train", workers, log, method)
    assert_nothing_outlives(program, signal.SIGKILL, log, images=16 * workers + 1)


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


MORE = [pytest.param(program, marks=pytest.mark.long) for program in ("stats", "tokenizer")]


@pytest.mark.parametrize("program", ["cache", "lpd", *MORE])
def test_program_ended_while_it_reads_leaves_no_worker(program, tmp_path):
    """Reading never ends in caching and statistics, which end by themselves; training ends after a step."""
    seconds = 0.1 if program in ("tokenizer", "lpd") else 1000
    started = {}
    for number, workers in {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 3}.items():
        log, flags = tmp_path / f"{number.name}.log", flags_of(program, tmp_path / number.name)
        words = REPO / f"main_{program}.py", *flags, "--device", "cpu", "--num_workers", workers
        started[number] = log, processes.fork("-c", SLOW_READING, log, seconds, *words)
    for number, (log, process) in started.items():
        assert_nothing_outlives(process, number, log, images=1)


@pytest.mark.long
def test_training_saves_and_ends_when_its_launcher_is_killed(tmp_path):
    launcher = processes.background(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, REPO / "main_lpd.py",
        *train_flags(tmp_path / "run", epochs=100000, save_last_freq=0, log_every=10),
    )
    wait_for((tmp_path / "run/metrics.jsonl").exists, "training")
    started = children(launcher.pid)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(running, started)), "end of the processes")  # they notice, then save
    assert read_pth(tmp_path / "run" / LAST)["step"] > 0
