"""How many epochs of a tokenizer and of LPD fit a time, for own_images.py: by steps that are timed, then, of
LPD, by the rate in its log. A recipe is a dict of training -> flags, of `rates`, images a second, and of the
number of `processes` that share the batches.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from engine import train, train_tokenizer
from models.lpd import LPD_CONFIGS
from models.vqgan import VQModel
from orders.schedule import training_steps
from util.device import is_cuda, synchronize
from util.distributed import World
from util.logging import read_metrics

SHARE, TUNED = 0.25, 100  # of the time, and epochs: the most that a tokenizer is tuned for
FIRST, GROWN = 0.5, 1.15  # of the epochs that fit, until a training shows its rate; more are worth a restart
OVERHEAD, START = 1.1, 10  # of a run over its steps: validation, checkpoints; seconds until it trains
READING = 1.4  # of a tokenizer's steps on a CPU over timed ones: its images are read on the same processors
MOST_EPOCHS = 300  # of LPD; more do not help


# How long a step takes here.


def seconds(step, device):
    """Wall time and processor time of a step, which on a GPU is its wall time."""
    synchronize(device)
    wall, own = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return wall, wall if is_cuda(device) else own


def faster(make_step, device, least=3.0):
    """The precision whose steps cost less processor time, which other programs hardly change: whether it is
    bfloat16, and the wall time and processor time of such a step."""
    steps = {bf16: make_step(bf16) for bf16 in (False, True)}
    first = {bf16: seconds(step, device)[1] for bf16, step in steps.items()}
    if first[True] > 4 * first[False]:  # emulated: nobody needs to wait for a second step
        del steps[True]
    times, begin = {bf16: [] for bf16 in steps}, time.perf_counter()
    while time.perf_counter() - begin < least:
        for bf16, step in steps.items():
            times[bf16].append(seconds(step, device))
    bf16 = min(times, key=lambda kind: min(own for _, own in times[kind]))
    return bf16, *np.mean(times[bf16], axis=0)


def num_processes(device):
    """How many processes share a training's batches here. On a CPU two of one thread take 1.7 times the steps
    of one of two threads (lpd_micro); on Linux only: elsewhere a launcher does not find its processes."""
    most = 1 if is_cuda(device) or sys.platform != "linux" else torch.get_num_threads()
    return max(count for count in (1, 2, 4) if count <= most)


@contextmanager
def threads_of(processes):
    """Inside it this process computes with as many threads as each of several has."""
    every = torch.get_num_threads()
    torch.set_num_threads(max(1, every // processes))
    try:
        yield
    finally:
        torch.set_num_threads(every)


def free_share(device):
    """The share of its processors that a product of matrices has now: 1 if no other program wants them. (A
    training step leaves some idle by itself.)"""
    if is_cuda(device):
        return 1.0
    matrix = torch.rand(1024, 1024)
    wall, own = seconds(lambda: [matrix @ matrix for _ in range(20)], device)
    return min(1.0, own / wall / torch.get_num_threads())


@lru_cache(maxsize=1)
def config_of(weights):
    """The VQConfig of a tokenizer's weights, which are read once."""
    return VQModel.load(weights)[0].config


def tokenizer_step(recipe, bf16, device):
    """A function that takes a process's training step of the tokenizer on random pixels."""
    flags = recipe["tokenizer"]
    size, batch = flags["img_size"], flags["batch_size"] // recipe["processes"]
    model = config_of(flags["pretrained_ckpt"])
    fixed = {"keep_tokens": flags["keep_tokens"], "warmup_steps": 0}
    config = train_tokenizer.TokenizerTrainConfig(model, size, batch_size=batch, bf16=bf16, **fixed)
    state = train_tokenizer.new_state(config, device)
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    return lambda: train_tokenizer.train_step(state, state.model, pixels, 10**6)


def lpd_step(recipe, bf16, device):
    """A function that takes a process's training step of LPD on random tokens."""
    flags, tuned = recipe["lpd"], recipe["tokenizer"]
    vq = config_of(tuned["pretrained_ckpt"] if tuned else flags["vqgan_path"])
    batch, grid = flags["batch_size"] // recipe["processes"], (tuned or flags)["img_size"] // vq.stride
    model = replace(LPD_CONFIGS[flags["model"]], grid_size=grid, vocab_size=vq.vocab_size, num_classes=1)
    config = train.TrainConfig(model, batch, training_steps(grid**2), global_batch=batch, bf16=bf16)
    state, world = train.new_state(config, device), World(0, 1, device)
    tokens, labels = torch.randint(vq.vocab_size, (batch, grid**2)), torch.zeros(batch, dtype=torch.long)
    return lambda: train.train_step(state, state.model.loss, world, 1, iter([(tokens, labels)]))


def measure(recipe, name, device):
    """Choose a training's precision, and note its images a second as things are now. Of several processes one
    is timed, by its processor time, of which each then has the share that is free."""
    make_step = {"tokenizer": tokenizer_step, "lpd": lpd_step}[name]
    with threads_of(recipe["processes"]):
        bf16, step, own = faster(lambda bf16: make_step(recipe, bf16, device), device)
        own /= torch.get_num_threads()
    if recipe["processes"] > 1:
        step = own / free_share(device)
    step *= READING if name == "tokenizer" and not is_cuda(device) else 1
    recipe[name]["bf16"], recipe["rates"][name] = bf16, recipe[name]["batch_size"] / step


# How many epochs fit.


def tuning_epochs(recipe, steps, seconds):
    """Epochs of the tokenizer in that many steps, or in the fewer that its share of all seconds allows."""
    n, flags = recipe["made_for"]["images"], recipe["tokenizer"]
    images = min(flags["batch_size"] * steps, SHARE * seconds * recipe["rates"]["tokenizer"] / OVERHEAD)
    return min(TUNED, float(f"{max(flags['batch_size'], images) / n:.2g}"))


@dataclass(frozen=True)
class Plan:
    """A recipe, the folder that its trainings write to, and the seconds that they have in all."""

    recipe: dict
    output: Path
    seconds: float

    def history(self, name):
        """Images that a training took so far and seconds that these took, by its logs; its images a second of
        the last minute, or as measured before it."""
        folder, measured = self.output / name, self.recipe["rates"][name]
        if not (folder / "metrics.jsonl").exists():
            return 0, 0.0, measured
        lines = [line for line in read_metrics(folder) if line.get("images_per_s")]
        images = np.diff([0, *(line["step"] * self.recipe[name]["batch_size"] for line in lines)])
        took = images / [line["images_per_s"] for line in lines]
        recent = took[::-1].cumsum()[::-1] <= max(60, took[-1:].sum())
        starts = len((folder / "runs.jsonl").read_text().splitlines())
        rate = images[recent].sum() / took[recent].sum() if len(lines) else measured
        return images.sum(), OVERHEAD * took.sum() + START * starts, rate

    def tuning(self):
        """Seconds that the tokenizer took, or is expected to take as long as it is not done."""
        flags, rate = self.recipe["tokenizer"], self.recipe["rates"].get("tokenizer")
        if flags and (self.output / "cache").exists():
            return self.history("tokenizer")[1]
        return OVERHEAD * flags["epochs"] * self.recipe["made_for"]["images"] / rate if flags else 0.0

    def epochs(self):
        """Epochs of LPD, those done included, that end when the time does; at least a step."""
        images, spent, rate = self.history("lpd")
        left = max(0, self.seconds - self.tuning() - spent)
        fitting = max(self.recipe["lpd"]["batch_size"], images + left * rate / OVERHEAD)
        return min(MOST_EPOCHS, float(f"{fitting / self.recipe['made_for']['images']:.2g}"))

    def room(self):
        """Whether clearly more epochs of LPD fit than are planned, by its log; False without one."""
        images, _, _ = self.history("lpd")
        return images > 0 and self.epochs() >= GROWN * self.recipe["lpd"]["epochs"]

    def update(self):
        """Set the epochs of LPD: to FIRST of those that fit, and later to more if there is room."""
        flags, fitting = self.recipe["lpd"], self.epochs()
        if "epochs" not in flags:
            flags["epochs"] = max(FIRST * fitting, flags["batch_size"] / self.recipe["made_for"]["images"])
        elif self.room():
            flags["epochs"] = fitting
        flags |= {"warmup_epochs": flags["epochs"] / 20, "sample_freq": flags["epochs"] / 4}
