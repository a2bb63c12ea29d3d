"""main_lpd.py with a pause in each step, so that a short training reaches SLURM's shortest time limit."""

import time

import engine.train
import main_lpd
from util import cli

PAUSE = 2.5  # seconds
train_step = engine.train.train_step


def slow_step(*arguments):
    time.sleep(PAUSE)
    return train_step(*arguments)


if __name__ == "__main__":
    engine.train.train_step = slow_step
    cli.run(main_lpd.main)
