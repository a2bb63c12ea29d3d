"""How a member of a process group ends: none of the group's threads is left to abort the interpreter."""

import signal

import helpers
import processes
import pytest
from helpers import cache_flags, evaluate_flags, tokenizer_flags, train_flags, words_of
from processes import REPO

# What the interpreter finds when it ends: threads that are not Python's own, beside the main one.
COUNTING = """
import atexit, os, runpy, sys, threading
def count():
    own = {thread.native_id for thread in threading.enumerate()}
    others = [int(number) for number in os.listdir("/proc/self/task") if int(number) not in own]
    names = [open(f"/proc/self/task/{number}/comm").read().strip() for number in others]
    print(f"left: {sorted(names)}", file=sys.stderr)
atexit.register(count)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stats_flags(out):
    features = {"features": "efficientnet_lite0", "output_file": out / "s.npz"}
    return [*words_of({"data_path": helpers.images(), "img_size": helpers.SIZE, **features}), *helpers.ON_CPU]


def likelihood_flags(out):
    small = {"steps": [2, 4], "orders": ["random"], "num_images": 6, "output_dir": out}
    weights = {"pretrained_ckpt": helpers.trained(), "vqgan_path": helpers.tokenizer()}
    return [*words_of({**weights, "data_path": helpers.images(), **small}), *helpers.ON_CPU]


PROGRAMS = {
    "main_tokenizer.py": lambda out: tokenizer_flags(out),
    "main_cache.py": lambda out: cache_flags(out),
    "main_lpd.py": lambda out: train_flags(out, epochs=1),
    "main_lpd.py --evaluate": lambda out: evaluate_flags(out, features="efficientnet_lite0"),
    "main_stats.py": stats_flags,
    "scripts/analysis/likelihood.py": likelihood_flags,
}


SHORT = "main_cache.py", "main_lpd.py", "scripts/analysis/likelihood.py"  # the others import what these do


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in PROGRAMS]
)
def test_program_leaves_no_thread_of_its_process_group_to_the_interpreter(program, tmp_path):
    """A group of one has the same threads."""
    flags = PROGRAMS[program](tmp_path)
    with processes.group(1) as (place,):
        outcome = processes.python("-c", COUNTING, REPO / program.split()[0], *flags, **place)
    assert outcome.status == 0 and "left: []" in outcome.err, outcome


ENDING = """
import atexit, os, signal, sys
from util import cli, distributed
class Last:
    def __del__(self):
        os.write(2, b"the interpreter ends")
last = Last()
atexit.register(print, " atexit", end="")
def main():
    distributed.init("cpu")
    print("buffered", end="")
    raise {error}
cli.run(main)
"""


@pytest.mark.parametrize(
    "error, status, line",
    [
        ("cli.UsageError('no such flag')", 2, "error: no such flag\n"),
        ("distributed.Stopped(signal.SIGTERM, 'so')", 128 + signal.SIGTERM, "stopped: SIGTERM: so\n"),
    ],
)
def test_member_that_ends_early_flushes_but_leaves_the_interpreter_out(error, status, line):
    with processes.group(1) as (place,):
        outcome = processes.python("-c", ENDING.format(error=error), **place)
    assert outcome == processes.Outcome(status, "buffered atexit", line)
