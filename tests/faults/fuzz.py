"""Damage sound files of every format we read: the reader must refuse in one line or return a sound value.

    python tests/faults/fuzz.py --seconds 600 --seed 1

tests/faults/test_fuzz.py tries a few seeds of each format; this program goes on for as long as it is given.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.metrics import load_statistics, save_statistics
from models.lpd import LPD, LPDConfig
from models.vqgan import VQConfig, VQModel
from models.weights import read_pth, save_weights
from orders.order_file import load_orders
from util.files import map_array
from util.images import UnreadableImage, load_image
from util.token_cache import CacheMeta, CacheWriter, MarCache, TokenCache

EXPECTED = (ValueError, UnreadableImage)
BATCH, HANG = 100, 120  # tries of a format in a row, seconds for these

LPD_SIZE = LPDConfig(grid_size=2, vocab_size=4, num_classes=2, embed_dim=8, depth=1, num_heads=1)
VQ_SIZE = VQConfig(vocab_size=4, code_dim=2, base_width=32, multipliers=(1, 1), num_res_blocks=1)


class Fault(AssertionError):
    """A reader neither refused a file nor returned a sound value."""


@dataclass(frozen=True)
class Format:
    """`write(folder)` writes sound files, of which `damaged` is to be damaged; `read(folder)` raises one of
    EXPECTED or returns a value that `is_sound`."""

    damaged: str
    write: object
    read: object
    is_sound: object


# Sound files, and what any value read from them must satisfy.


def file_format(name, write, read, is_sound):
    return Format(name, lambda folder: write(folder / name), lambda folder: read(folder / name), is_sound)


def image_format(suffix, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return file_format(
        f"x.{suffix}", lambda path: Image.fromarray(pixels).save(path, **options),
        lambda path: load_image(path, 8), lambda image: image.shape == (8, 8, 3) and image.dtype == np.uint8,
    )


def orders_format(name, write):
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)
    return file_format(
        name, lambda path: write(path, orders), lambda path: load_orders(path, 16),
        lambda value: value.dtype == np.uint16 and (np.sort(value, axis=1) == np.arange(16)).all(),
    )


def statistics_are_sound(value):
    shapes = value["mu"].shape * 2 == value["sigma"].shape
    return shapes and np.isfinite(value["mu"]).all() and np.isfinite(value["sigma"]).all()


def model_is_finite(model):
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


def model_format(name, kind, write):
    return file_format(name, write, lambda path: kind.load(path)[0], model_is_finite)


def save_pth(path, zipped=True):
    content = {"model": LPD(LPD_SIZE).state_dict(), "step": 3, "info": {"config": LPD_SIZE.__dict__}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def write_cache(folder):
    meta = CacheMeta(
        img_size=8, grid_size=2, vocab_size=64, class_names=("cat", "dog"), tokenizer_digest="0123",
        num_images=6, shard_size=3, names_digest="4567",
    )
    writer, tokens = CacheWriter(folder, meta), np.arange(48).reshape(6, 2, 4)
    writer.begin()
    for shard, part in enumerate((tokens[:3], tokens[3:])):
        writer.write_shard(shard, part, np.array([0, 0, 1]), [f"{shard}/{i}.png" for i in range(3)])
    writer.finish([])


def read_cache(folder):
    """Everything in a token cache, also the names, which only a resumed run reads."""
    cache = TokenCache(folder)
    CacheWriter(folder, cache.meta).finish([])
    return cache, cache.tokens(np.repeat(np.arange(len(cache)), 2), np.tile([0, 1], len(cache)))


def cache_is_sound(value):
    cache, tokens = value
    codes = tokens.shape == (2 * len(cache), cache.meta.num_tokens) and tokens.max() < cache.meta.vocab_size
    return codes and 0 <= cache.labels.min() <= cache.labels.max() < len(cache.meta.class_names)


def write_mar(folder):
    (folder / "cat").mkdir(exist_ok=True)
    for i in range(2):
        np.savez(folder / f"cat/{i}.npz", indices=np.arange(4), indices_flip=np.arange(4)[::-1])


def read_mar(folder):
    cache = MarCache(folder, 64, 8)
    return cache, cache.tokens([0, 1, 0, 1], [0, 0, 1, 1])


SHARD_FILES = [f"shard-00001.{kind}" for kind in ("names.json", "tokens.npy", "labels.npy")]
STATISTICS = {"mu": np.ones(3), "sigma": np.eye(3), "n": 9}
FORMATS = {
    "orders .npy": orders_format("o.npy", np.save),
    "orders .json": orders_format(
        "o.json", lambda path, orders: path.write_text(json.dumps(orders.tolist()))),
    **{f"cache {name}": Format(name, write_cache, read_cache, cache_is_sound)
       for name in ("meta.json", "plan.json", *SHARD_FILES)},
    "MAR .npz": Format("cat/0.npz", write_mar, read_mar, cache_is_sound),
    "statistics .npz": file_format(
        "s.npz", lambda path: save_statistics(path, STATISTICS), load_statistics, statistics_are_sound),
    "images .npz": file_format(
        "b.npz", lambda path: np.savez(path, arr_0=np.arange(48, dtype=np.uint8)),
        lambda path: np.array(map_array(path, "arr_0")), lambda value: value.size <= 48),
    "weights .safetensors": model_format("w.safetensors", LPD, lambda p: save_weights(p, LPD(LPD_SIZE))),
    "tokenizer .safetensors": model_format(
        "v.safetensors", VQModel, lambda p: save_weights(p, VQModel(VQ_SIZE))),
    "weights .pth": model_format("w.pth", LPD, save_pth),
    "weights .pth, older": model_format("w.pth", LPD, lambda path: save_pth(path, zipped=False)),
    "weights config.json": Format(
        "config.json", lambda folder: LPD(LPD_SIZE).save_pretrained(folder, class_names=["cat"]),
        LPD.from_pretrained, model_is_finite),
    "checkpoint .pth": file_format("c.pth", save_pth, read_pth, lambda value: isinstance(value, dict)),
    "image .tif": image_format("tif", compression="tiff_lzw"),
    **{f"image .{suffix}": image_format(suffix) for suffix in ("png", "jpg", "gif", "webp", "bmp")},
}


# Damage: bytes changed anywhere, and behind checksums and syntax, where random bytes seldom get.

VALUES = [None, True, 0, -1, 1, 2, 300, 0.5, float("nan"), "", "x", "..", [], [[]], {}, {"x": 1}, [0] * 100]
KINDS = ("flip", "cut", "insert", "remove", "zero")


def damage_bytes(content, rng):
    """Change a few bytes at a random place."""
    at, kind, length = rng.randrange(len(content) + 1), rng.choice(KINDS), rng.randrange(1, 64)
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == "remove":
        return content[:at] + content[at + length :]
    if kind == "zero":
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    return content[:at] + bytes(b ^ 1 << rng.randrange(8) for b in content[at : at + 1]) + content[at + 1 :]


def places_of(value):  # every (holder, key) inside lists and dicts
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places_of(value[key])


def swap_a_value(whole, rng):
    """Put one of VALUES somewhere into lists and dicts, or in place of all."""
    root = [whole]
    holder, key = rng.choice(list(places_of(root)))
    holder[key] = rng.choice(VALUES)
    return root[0]


def damage_json(content, rng):
    return json.dumps(swap_a_value(json.loads(content), rng)).encode()


def damage_zip(content, rng):
    """Damage one part of a zip (a checkpoint's pickle, an array) and write all checksums anew."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*parts, *(name for name in parts if name.endswith(".pkl"))])
    parts[name] = damage_bytes(parts[name], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


INSIDE = {".json": damage_json, ".npz": damage_zip, ".pth": damage_zip}


def damage(content, suffix, rng):
    """Bytes of a sound file -> bytes of a damaged one."""
    if suffix in INSIDE and rng.random() < 0.5:
        with contextlib.suppress(zipfile.BadZipFile):  # an older .pth is not a zip
            return INSIDE[suffix](content, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = damage_bytes(content, rng)
    return content


def try_reading(form, folder):
    """Return "refused" or "read". Raises Fault for another error, a longer message, or a value not sound."""
    try:
        value = form.read(folder)
    except EXPECTED as error:
        if not str(error) or "\n" in str(error) or len(str(error)) > 2000:
            raise Fault(f"not a line: {str(error)!r:.200}") from error
        return "refused"
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        raise Fault(f"{type(error).__name__}: {str(error):.200}\n{where}") from error
    if not form.is_sound(value):
        raise Fault(f"not sound: {value!r:.200}")
    return "read"


def try_seeds(name, seeds):
    """Yield (seed, outcome, text of a Fault) for one damaged file after another."""
    form = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and PIL warn about what is then refused
        folder = Path(folder)
        form.write(folder)
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for seed in seeds:
            for path, content in files.items():
                path.write_bytes(content)
            path = folder / form.damaged
            path.write_bytes(damage(files[path], path.suffix, random.Random(f"{name}:{seed}")))
            try:
                yield seed, try_reading(form, folder), ""
            except Fault as fault:
                yield seed, "fault", str(fault)


def main():
    parser = argparse.ArgumentParser(description="Damaged files for every reader")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    counts, start = collections.Counter(), time.monotonic()
    first = args.seed * 10**6
    for begin, name in itertools.product(range(first, first + 10**6, BATCH), args.formats):
        if time.monotonic() - start > args.seconds:
            break
        print(f"{name}, {BATCH} seeds from {begin}", flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        for seed, outcome, text in try_seeds(name, range(begin, begin + BATCH)):
            counts[name, outcome] += 1
            if outcome == "fault":
                print(f"FAULT, seed {seed}: {text}")
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:29}{outcome:9}{count:9}")
    sys.exit(any(outcome == "fault" for _, outcome in counts))


if __name__ == "__main__":
    main()
