"""A small real run, made once per test session, and ways to call the programs.

Knows how to draw a folder of images, save a tiny tokenizer, cache and train with the real programs, and start
them in this process or as processes of their own. Holds no tests. What the functions below return is shared:
read it, never write to it.
"""

import contextlib
import gzip
import hashlib
import importlib
import io
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.random_inception import save_random_inception
from engine.checkpoint import save_weights
from models.vqgan import VQConfig, VQModel
from util import cli

REPO = Path(__file__).resolve().parents[1]
CLASSES = ("00_bars", "01_noise", "02_rings")
TRAIN, VAL = 18, 6  # images in all, equally many of each class
SIZE = 16
VQ = VQConfig(
    vocab_size=64, code_dim=4, base_width=32, multipliers=(1, 2, 2), num_res_blocks=1, z_channels=32
)
STRIDE, TOKENS = 4, 16
ON_CPU = ("--device", "cpu", "--num_workers", "0")

# As the processes below, whose results are compared bit by bit with those of this one. On tensors so small
# more threads would only cost time.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def call(program, *argv):
    """Run main_PROGRAM in this process as its command line would."""
    return call_main(importlib.import_module(f"main_{program}").main, *argv)


def call_main(main, *argv):
    """Run a program's `main` in this process as its command line would."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(lambda: main([str(word) for word in argv]))
        except SystemExit as end:
            status = end.code or 0
    return Outcome(status, out.getvalue(), err.getvalue())


def finished(outcome):
    """The outcome, which must be a success."""
    assert outcome.status == 0, f"exit status {outcome.status}\n{outcome.out}\n{outcome.err}"
    return outcome


def python(*words, cwd=None, timeout=500):
    """Run `python WORDS` as a process of its own, one thread, the repository importable."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LPD_INCEPTION")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=env, cwd=cwd or tempfile.gettempdir(), text=True,
        capture_output=True, timeout=timeout,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(program, *argv, cwd=None):
    """Run main_PROGRAM.py as a process of its own, from another working directory."""
    return python(REPO / f"main_{program}.py", *argv, cwd=cwd)


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes, program, *argv):
    """Run main_PROGRAM.py under torchrun on the CPU."""
    return python(
        "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_addr", "127.0.0.1",
        "--master_port", free_port(), REPO / f"main_{program}.py", *argv,
    )  # fmt: skip


def contents(folder):
    """Relative path -> digest of every file below a folder, hidden ones too; empty where there is none."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def draw(label, seed, width=SIZE, height=SIZE):
    """A picture of a class, uint8 [height, width, 3]: coloured bars, noise or rings, none symmetric."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:height, :width]
    colours = rng.integers(0, 256, (2, 3))
    if label == 0:
        first = (x + rng.integers(4)) // 3 % 2 == 0
    elif label == 1:
        first = rng.random((height, width)) < 0.5
    else:
        first = np.hypot(x - rng.integers(width), y - rng.integers(height)) // 3 % 2 == 0
    flat = np.where(first[..., None], *colours)
    return (flat + rng.integers(-20, 21, flat.shape)).clip(0, 255).astype(np.uint8)


def write_images(root, per_class, first_seed=0):
    """An ImageNet-style folder of the three classes; the first image of each class is wide, one is grey."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            wide = SIZE + 9 if i == 0 else SIZE
            image = Image.fromarray(draw(label, first_seed + i, width=wide))
            (image.convert("L") if i == 1 else image).save(root / name / f"{i}.png")
    return root


def fashion_mnist(root, count):
    """The first so many training images of Fashion-MNIST, 32x32, as an image folder; skips the test where the
    Debian package is not."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip(f"no Fashion-MNIST here: {folder} is Debian's package dataset-fashion-mnist")
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as images:
        pixels = np.frombuffer(images.read(16 + count * 784)[16:], np.uint8).reshape(count, 28, 28)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as labels:
        classes = labels.read(8 + count)[8:]
    for i, (image, label) in enumerate(zip(pixels, classes, strict=True)):
        path = root / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(image, 2)).save(path)
    return root


@lru_cache(maxsize=1)
def _session():
    return tempfile.TemporaryDirectory(prefix="lpd-tests-")  # removed when the interpreter ends


def workspace():
    """The folder in which the shared run lies."""
    return Path(_session().name)


@lru_cache(maxsize=1)
def images():
    """An image folder with train/ (18) and val/ (6)."""
    root = workspace() / "images"
    write_images(root / "train", TRAIN // 3)
    write_images(root / "val", VAL // 3, first_seed=100)
    return root


@lru_cache(maxsize=4)
def tokenizer(seed=0, **changes):
    """Weights of a tokenizer of stride 4 with 64 codes, its weights random but for the seed."""
    path = workspace() / f"tokenizer-{seed}-{'-'.join(map(str, changes.values()))}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VQModel(VQConfig(**{**VQ.__dict__, **changes}))
        torch.nn.init.normal_(model.quantize.embedding.weight)
    save_weights(path, model)
    return path


def cache_flags(cached_path, **changes):
    """The command line of main_cache for the shared images: three shards of at most 7 images."""
    flags = {
        "img_size": SIZE, "vqgan_path": tokenizer(), "data_path": images(), "cached_path": cached_path,
        "batch_size": 4, "shard_size": 7, **changes,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", value)] + list(ON_CPU)


@lru_cache(maxsize=1)
def token_cache():
    """The token cache of the 18 training images."""
    path = workspace() / "cache"
    finished(call("cache", *cache_flags(path)))
    return path


def train_flags(output_dir, **changes):
    """The command line of main_lpd for a short training: 4 images a step, 18 steps in 4 epochs."""
    flags = {
        "model": "lpd_tiny", "cached_path": token_cache(), "output_dir": output_dir, "epochs": 4,
        "batch_size": 4, "lr": 1e-3, "lr_schedule": "constant", "warmup_epochs": 0, "log_every": 1, **changes,
    }  # fmt: skip
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    return words + (["--use_cached"] if flags["cached_path"] else []) + list(ON_CPU)


@lru_cache(maxsize=1)
def trained():
    """The run folder of a short training: config, metrics, checkpoint-last.pth, lpd.safetensors."""
    path = workspace() / "run"
    finished(call("lpd", *train_flags(path)))
    return path


def sample_flags(output_dir, **changes):
    """The command line of main_sample for the shared run: one image of each class."""
    flags = {
        "pretrained_ckpt": trained() / "lpd.safetensors", "vqgan_path": tokenizer(), "output_dir": output_dir,
        "num_per_class": 1, "generation_steps": 4, **changes,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", value)] + list(ON_CPU)


def edit_flags(output_dir, part, **changes):
    """The command line of main_edit for the shared run: three results; `part` is --box or such, as words."""
    flags = {
        "pretrained_ckpt": trained() / "lpd.safetensors", "vqgan_path": tokenizer(), "output_dir": output_dir,
        "image": images() / "val/02_rings/1.png", "class": "rings", "num": 3, "generation_steps": 3,
        **changes,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", value)] + [*part, *ON_CPU]


@lru_cache(maxsize=1)
def inception():
    """A file of random Inception weights in the released layout."""
    return save_random_inception(workspace() / "inception.pth")


def evaluate_flags(output_dir, **changes):
    """The command line of main_lpd for an evaluation of the shared run: 6 images in 4 steps."""
    flags = {
        "pretrained_ckpt": trained() / "lpd.safetensors", "vqgan_path": tokenizer(), "output_dir": output_dir,
        "num_images": 6, "eval_bsz": 4, "generation_steps": 4, **changes,
    }  # fmt: skip
    words = ["--evaluate"]
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *values] if value is not None else []
    return words + list(ON_CPU)
