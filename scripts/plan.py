"""How many epochs of a tokenizer and of LPD fit a time, for own_images.py: first by steps that are timed,
then by the rate in the logs of the trainings. A recipe is a dict of training -> flags, and of `rates`, images
a second.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine import train, train_tokenizer
from models.lpd import LPD_CONFIGS
from models.vqgan import VQConfig, VQModel
from orders.schedule import training_steps
from util.device import is_cuda, synchronize
from util.distributed import World
from util.logging import read_metrics

SHARE, TUNING = 0.35, 300  # the tokenizer's share of the time, at most; steps that help a shipped one
FIRST, GROWN = 0.5, 1.15  # of the epochs that fit, until a training shows its rate; more are worth a restart
OVERHEAD, START = 1.1, 10  # of a run over its steps: data, validation, checkpoints; seconds until it trains
MOST_EPOCHS = {"tokenizer": 100, "lpd": 300}  # more do not help
TOKENIZER_SIZES = ("vocab_size", "base_width", "multipliers", "num_res_blocks", "z_channels", "groups")


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
    bfloat16; the wall time of such a step; the share of the processors that it had."""
    steps = {bf16: make_step(bf16) for bf16 in (False, True)}
    first = {bf16: seconds(step, device)[1] for bf16, step in steps.items()}
    if first[True] > 4 * first[False]:  # emulated: nobody needs to wait for a second step
        del steps[True]
    times, begin = {bf16: [] for bf16 in steps}, time.perf_counter()
    while time.perf_counter() - begin < least:
        for bf16, step in steps.items():
            times[bf16].append(seconds(step, device))
    bf16 = min(times, key=lambda kind: min(own for _, own in times[kind]))
    wall, own = np.sum(times[bf16], axis=0)
    threads = 1 if is_cuda(device) else torch.get_num_threads()
    return bf16, wall / len(times[bf16]), min(1.0, own / wall / threads)


def sizes(flags):
    """The VQConfig that flags of main_tokenizer.py ask for."""
    if "pretrained_ckpt" in flags:
        return VQModel.load(flags["pretrained_ckpt"])[0].config
    return VQConfig(**{name: flags[name] for name in TOKENIZER_SIZES})


def tokenizer_step(recipe, bf16, device):
    """A function that takes a training step of the tokenizer on random pixels."""
    flags = recipe["tokenizer"]
    model, size, batch = sizes(flags), flags["img_size"], flags["batch_size"]
    config = train_tokenizer.TokenizerTrainConfig(model, size, batch_size=batch, bf16=bf16, warmup_steps=0)
    state = train_tokenizer.new_state(config, device)
    pixels = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    return lambda: train_tokenizer.train_step(state, state.model, pixels, 10**6)


def lpd_step(recipe, bf16, device):
    """A function that takes a training step of LPD on random tokens."""
    flags, batch = recipe["lpd"], recipe["lpd"]["batch_size"]
    tokenizer = recipe["tokenizer"] or {"pretrained_ckpt": flags["vqgan_path"], "img_size": flags["img_size"]}
    vq = sizes(tokenizer)
    grid, codes = tokenizer["img_size"] // vq.stride, vq.vocab_size
    model = replace(LPD_CONFIGS[flags["model"]], grid_size=grid, vocab_size=codes, num_classes=1)
    config = train.TrainConfig(model, batch, training_steps(grid**2), global_batch=batch, bf16=bf16)
    state, world = train.new_state(config, device), World(0, 1, device)
    tokens, labels = torch.randint(codes, (batch, grid**2)), torch.zeros(batch, dtype=torch.long)
    return lambda: train.train_step(state, state.model.loss, world, 1, iter([(tokens, labels)]))


def measure(recipe, name, device):
    """Choose a training's precision, and note its images a second as things are now."""
    make_step = {"tokenizer": tokenizer_step, "lpd": lpd_step}[name]
    bf16, step, share = faster(lambda bf16: make_step(recipe, bf16, device), device)
    recipe[name]["bf16"], recipe["rates"][name] = bf16, recipe[name]["batch_size"] / step
    if share < 0.8:
        print(f"{name}: busy processors, {share:.0%} for this; up to {1 / share:.1f} times the steps without")


# How many epochs fit.


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

    def budget(self, name):
        """Seconds for a training: the tokenizer has a share, or what tuning needs, and LPD what is left."""
        tokenizer, share = self.recipe["tokenizer"], SHARE * self.seconds
        if not tokenizer:
            return self.seconds
        _, spent, rate = self.history("tokenizer")
        if "pretrained_ckpt" in tokenizer:
            share = min(share, OVERHEAD * TUNING * tokenizer["batch_size"] / rate)
        if name == "tokenizer":
            return share
        return self.seconds - (spent if (self.output / "cache").exists() else max(spent, share))

    def epochs(self, name):
        """Epochs of a training, those done included, that end when its time does; at least a step."""
        images, spent, rate = self.history(name)
        left = max(0, self.budget(name) - spent)
        fitting = max(self.recipe[name]["batch_size"], images + left * rate / OVERHEAD)
        return min(MOST_EPOCHS[name], float(f"{fitting / self.recipe['made_for']['images']:.2g}"))

    def room(self, name):
        """Whether clearly more epochs of a training fit than are planned, by its log; False without one."""
        images, _, _ = self.history(name)
        return images > 0 and self.epochs(name) >= GROWN * self.recipe[name]["epochs"]

    def update(self, name):
        """Set a training's epochs: to FIRST of those that fit, and later to more if there is room."""
        flags, fitting = self.recipe[name], self.epochs(name)
        if "epochs" not in flags:
            flags["epochs"] = max(FIRST * fitting, flags["batch_size"] / self.recipe["made_for"]["images"])
        elif self.room(name):
            flags["epochs"] = fitting
        if name == "lpd":
            flags |= {"warmup_epochs": flags["epochs"] / 20, "sample_freq": flags["epochs"] / 4}
