"""How a member of a process group ends: none of the group's threads is left to abort the interpreter."""

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


def alone(*words, **variables):
    """The Outcome of a program in a new interpreter, as a process group of one that counts what it leaves."""
    with processes.group(1) as (place,):
        return processes.python("-c", COUNTING, *words, **place, **variables)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_leaves_no_thread_of_its_process_group_to_the_interpreter(program, tmp_path):
    outcome = alone(REPO / program.split()[0], *PROGRAMS[program](tmp_path))
    assert outcome.status == 0 and "left: []" in outcome.err, outcome
