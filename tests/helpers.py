"""A small real run, made once per test session, and ways to call the programs. Its results are shared: read
them, never write to them."""

import contextlib
import gzip
import hashlib
import importlib
import io
import pickle
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Outcome, finished

from benchmarks.random_inception import save_random_inception
from engine.train import TrainConfig
from models.lpd import LPDConfig
from models.vqgan import VQConfig, VQModel
from models.weights import save_weights
from util import cli
from util.distributed import World
from util.token_cache import CacheMeta, CacheWriter, names_digest

CLASSES = ("00_bars", "01_noise", "02_rings")
TRAIN, VAL = 18, 6  # images in all, equally many of each class
SIZE, STRIDE, TOKENS = 16, 4, 16
VQ = VQConfig(
    vocab_size=64, code_dim=4, base_width=32, multipliers=(1, 2, 2), num_res_blocks=1, z_channels=32
)
ON_CPU = ("--device", "cpu", "--num_workers", "0")


# Calling programs.


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


# Files.


def contents(folder):
    """Relative path -> digest of every file below a folder, hidden ones too; empty if there is no folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def picture(path):
    """A picture file as uint8 [H, W, 3]; reading it proves that it is complete."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


class Marks:
    """Unpickled, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def hostile_pickle(marker):
    """Bytes of a bare pickle that creates the file `marker` when it is loaded."""
    return pickle.dumps({"model": Marks(marker)}, protocol=2)


def hostile_checkpoint(marker):
    """Bytes of a torch checkpoint of the same effect."""
    file = io.BytesIO()
    torch.save({"model": {"head.weight": torch.zeros(2)}, "args": Marks(marker)}, file)
    return file.getvalue()


def write_cache(folder, tokens):
    """A complete token cache of tokens [5, 2, 4] below 50,000, two classes, shards of 2, 2 and 1 images."""
    names = [f"{i}.png" for i in range(5)]
    meta = CacheMeta(
        img_size=8, grid_size=2, vocab_size=50000, class_names=("cat", "dog"), tokenizer_digest="0123",
        num_images=5, shard_size=2, names_digest=names_digest(names),
    )
    writer = CacheWriter(folder, meta)
    writer.begin()
    for shard in range(meta.num_shards):
        mine = list(writer.shard_range(shard))
        labels = np.array([0, 0, 1, 1, 1])[mine]
        writer.write_shard(shard, tokens[mine], labels, [names[i] for i in mine])
    writer.finish(names)
    return folder


# Images.


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
            image = Image.fromarray(draw(label, first_seed + i, width=SIZE + 9 if i == 0 else SIZE))
            (image.convert("L") if i == 1 else image).save(root / name / f"{i}.png")
    return root


def fashion_mnist(root, count):
    """The first `count` training images of Fashion-MNIST, 32x32, as an image folder; skips the test if the
    Debian package is not installed."""
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


# The shared run.


@lru_cache(maxsize=1)
def _session():
    return tempfile.TemporaryDirectory(prefix="lpd-tests-")  # removed when the interpreter ends


def workspace():
    """The folder of the shared run."""
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
    """Weights file of a random tokenizer of stride 4 with 64 codes."""
    path = workspace() / f"tokenizer-{seed}-{'-'.join(map(str, changes.values()))}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VQModel(VQConfig(**{**VQ.__dict__, **changes}))
        torch.nn.init.normal_(model.quantize.embedding.weight)
    save_weights(path, model)
    return path


@lru_cache(maxsize=1)
def token_cache():
    """The token cache of the 18 training images."""
    path = workspace() / "cache"
    finished(call("cache", *cache_flags(path)))
    return path


@lru_cache(maxsize=1)
def trained():
    """The run folder of a short training: config, metrics, checkpoint-last.pth, lpd.safetensors."""
    path = workspace() / "run"
    finished(call("lpd", *train_flags(path)))
    return path


@lru_cache(maxsize=1)
def inception():
    """A file of random Inception weights in the released layout."""
    return save_random_inception(workspace() / "inception.pth")


# Command lines; `changes` set flags, None removes one, True is a flag without a value.


def words_of(flags):
    """The words of a command line: --NAME VALUE, or several values of a list."""
    words = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def tokenizer_flags(output_dir, **changes):
    """main_tokenizer on the shared images: 6 images a step, 3 steps an epoch."""
    small = {"base_width": 32, "multipliers": [1, 2, 2], "num_res_blocks": 1, "z_channels": 32}
    flags = {"data_path": images(), "img_size": SIZE, "vocab_size": 64, "batch_size": 6, "epochs": 1, **small}
    return [*words_of({**flags, "output_dir": output_dir, **changes}), *ON_CPU]


def cache_flags(cached_path, **changes):
    """main_cache on the shared images: three shards of at most 7 images."""
    flags = {"img_size": SIZE, "vqgan_path": tokenizer(), "data_path": images(), "cached_path": cached_path}
    return [*words_of({**flags, "batch_size": 4, "shard_size": 7, **changes}), *ON_CPU]


def train_flags(output_dir, **changes):
    """main_lpd for a short training: 4 images a step, 18 steps in 4 epochs."""
    flags = {
        "model": "lpd_micro", "cached_path": token_cache(), "output_dir": output_dir, "epochs": 4,
        "batch_size": 4, "lr": 1e-3, "lr_schedule": "constant", "warmup_epochs": 0, "log_every": 1, **changes,
    }
    return [*words_of(flags), *(["--use_cached"] if flags["cached_path"] else []), *ON_CPU]


def _weights(output_dir):
    weights = trained() / "lpd.safetensors"
    return {"pretrained_ckpt": weights, "vqgan_path": tokenizer(), "output_dir": output_dir}


def evaluate_flags(output_dir, **changes):
    """main_lpd for an evaluation of the shared run: 6 images in 4 steps."""
    small = {"evaluate": True, "num_images": 6, "eval_bsz": 4, "generation_steps": 4}
    return [*words_of({**_weights(output_dir), **small, **changes}), *ON_CPU]


def sample_flags(output_dir, **changes):
    """main_sample for the shared run: one image of each class."""
    small = {"num_per_class": 1, "generation_steps": 4}
    return [*words_of({**_weights(output_dir), **small, **changes}), *ON_CPU]


def edit_flags(output_dir, part, **changes):
    """main_edit for the shared run: three results; `part` is --box or the like, as words."""
    image = images() / "val/02_rings/1.png"
    small = {"image": image, "class": "rings", "num": 3, "generation_steps": 3}
    return [*words_of({**_weights(output_dir), **small, **changes}), *part, *ON_CPU]


# Training inside this process.

ALONE = World(0, 1, torch.device("cpu"))
MODEL = LPDConfig(
    grid_size=4, vocab_size=16, num_classes=4, embed_dim=64, depth=2, num_heads=4, dropout=0.0,
    label_drop_prob=0.0,
)
CONFIG = TrainConfig(
    model=MODEL, num_images=4, schedules=((1,) * 16, (1, 3, 4, 8), (1, 1, 2, 2, 4, 6)), epochs=120,
    global_batch=4, lr=3e-3, lr_schedule="constant", warmup_epochs=0,
)


def four_images():
    """Tokens int64 [4, 16] of 16 codes and the labels 0..3."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 16, (4, 16))), torch.arange(4)


def same(first, second):
    """Whether two nested values of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second
