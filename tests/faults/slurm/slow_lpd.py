"""main_lpd.py for the tests: slow, until a file `hurry` is beside the run folder. It notes the images of each
step in RUN-seen/ATTEMPT-RANK."""

import json
import os
import time
from pathlib import Path

import engine.train
import main_lpd
from engine.data import ImageStream
from util import cli

PAUSES = [0.5] * 4  # seconds before the first steps of an attempt
PAUSE = 5  # and before later ones: there are still some left when all faults are done
take_step, micro_batches = engine.train.train_step, ImageStream.micro_batches
run = Path(os.environ["OUTPUT_DIR"])
seen = run.with_name(f"{run.name}-seen")
own = seen / f"{os.environ.get('SLURM_RESTART_COUNT', 0)}-{os.environ['RANK']}"


def slow_step(*arguments):
    if not run.with_name("hurry").exists():
        time.sleep(PAUSES.pop() if PAUSES else PAUSE)
    return take_step(*arguments)


def noted(self, steps, world):
    for step in steps:
        for indices, views in micro_batches(self, [step], world):
            with own.open("a") as file:
                print(json.dumps([step, indices.tolist()]), file=file)
            yield indices, views


if __name__ == "__main__":
    seen.mkdir(parents=True, exist_ok=True)
    engine.train.train_step, ImageStream.micro_batches = slow_step, noted
    cli.run(main_lpd.main)
