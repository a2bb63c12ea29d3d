"""main_lpd.py with a pause in each step: a short training that meets SLURM's shortest time limit."""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # imports start from the repository's root

import engine.train  # noqa: E402
import main_lpd  # noqa: E402
from util import cli  # noqa: E402

PAUSE = 2.5  # seconds
take_step = engine.train.train_step


def slow_step(*arguments):
    time.sleep(PAUSE)
    return take_step(*arguments)


if __name__ == "__main__":
    engine.train.train_step = slow_step
    cli.run(main_lpd.main)
