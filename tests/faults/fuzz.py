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


# Writers of sound files, and readers that assert that what they return is sound.


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
    cache = TokenCache(folder)
    CacheWriter(folder, cache.meta).finish([])  # reads the names, as a resumed run does
    check_cache(cache)


def check_cache(cache):
    tokens = cache.tokens(np.repeat(np.arange(len(cache)), 2), np.tile([0, 1], len(cache)))
    assert tokens.shape == (2 * len(cache), cache.meta.num_tokens)
    assert tokens.min() >= 0 and tokens.max() < cache.meta.vocab_size
    assert 0 <= cache.labels.min() <= cache.labels.max() < len(cache.meta.class_names)


def write_mar(path):
    path.parent.mkdir(exist_ok=True)
    for name in (path.name, "1.npz"):
        np.savez(path.with_name(name), indices=np.arange(4), indices_flip=np.arange(4)[::-1])


def write_orders(path):
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)
    np.save(path, orders) if path.suffix == ".npy" else path.write_text(json.dumps(orders.tolist()))


def read_orders(path):
    orders = load_orders(path, 16)
    assert orders.dtype == np.uint16 and (np.sort(orders, axis=1) == np.arange(16)).all()


def read_statistics(path):
    mu, sigma = (load_statistics(path)[key] for key in ("mu", "sigma"))
    assert mu.shape * 2 == sigma.shape and np.isfinite(mu).all() and np.isfinite(sigma).all()


def write_pth(path, zipped=True):
    content = {"model": LPD(LPD_SIZE).state_dict(), "step": 3, "info": {"config": LPD_SIZE.__dict__}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def read_model(path, kind=LPD):
    model, _ = kind.load(path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def write_image(path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"compression": "tiff_lzw"} if path.suffix == ".tif" else {}))


def read_image(path):
    pixels = load_image(path, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


CACHE_FILES = [
    "meta.json", "plan.json", *(f"shard-00001.{kind}" for kind in ("names.json", "tokens.npy", "labels.npy")),
]
FORMATS = {  # name: the file to damage, its writer, its reader, both given its path
    "orders .npy": ("o.npy", write_orders, read_orders),
    "orders .json": ("o.json", write_orders, read_orders),
    "MAR .npz": ("cat/0.npz", write_mar, lambda path: check_cache(MarCache(path.parents[1], 64, 8))),
    "statistics .npz": (
        "s.npz", lambda path: save_statistics(path, {"": {"mu": np.ones(3), "sigma": np.eye(3), "n": 9}}),
        read_statistics),
    "images .npz": (
        "b.npz", lambda path: np.savez(path, arr_0=np.arange(48, dtype=np.uint8)),
        lambda path: np.array(map_array(path, "arr_0"))),
    "weights .safetensors": ("w.safetensors", lambda path: save_weights(path, LPD(LPD_SIZE)), read_model),
    "tokenizer .safetensors": (
        "v.safetensors", lambda path: save_weights(path, VQModel(VQ_SIZE)),
        lambda path: read_model(path, VQModel)),
    "weights .pth": ("w.pth", write_pth, read_model),
    "weights .pth, older": ("w.pth", lambda path: write_pth(path, zipped=False), read_model),
    "weights config.json": (
        "config.json", lambda path: LPD(LPD_SIZE).save_pretrained(path.parent, class_names=["cat"]),
        lambda path: read_model(path.parent)),
    "checkpoint .pth": ("c.pth", write_pth, read_pth),
    **{
        f"cache {name}": (name, lambda path: write_cache(path.parent), lambda path: read_cache(path.parent))
        for name in CACHE_FILES
    },
    **{
        f"image .{suffix}": (f"x.{suffix}", write_image, read_image)
        for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp")
    },
}


# Damage: bytes changed anywhere, and behind checksums and syntax, where random bytes rarely get.

VALUES = [None, True, 0, -1, 1, 2, 300, 0.5, float("nan"), "", "x", "..", [], [[]], {}, {"x": 1}, [0] * 100]


def damage_bytes(content, rng):
    """Change a few bytes at a random place."""
    at, length = rng.randrange(len(content) + 1), rng.randrange(1, 64)
    before, part, after = content[:at], content[at : at + length], content[at + length :]
    return rng.choice([
        before,
        before + after,
        before + rng.randbytes(length) + part + after,
        before + bytes(len(part)) + after,
        before + bytes(b ^ 1 << rng.randrange(8) for b in part[:1]) + part[1:] + after,
    ])


def places_of(value):  # every (holder, key) inside lists and dicts
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places_of(value[key])


def damage_json(content, rng):
    """Put one of VALUES somewhere into lists and dicts, or in place of all."""
    root = [json.loads(content)]
    holder, key = rng.choice(list(places_of(root)))
    holder[key] = rng.choice(VALUES)
    return json.dumps(root[0]).encode()


def damage_zip(content, rng):
    """Damage one part of a zip (a checkpoint's pickle, an array) and write all checksums again."""
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


def try_reading(read, path):
    """(outcome, text): "read", "refused" in one line, or "fault" for any other error or message."""
    try:
        read(path)
    except EXPECTED as error:
        is_line = str(error) and "\n" not in str(error) and len(str(error)) < 2000
        return ("refused" if is_line else "fault"), str(error)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return "fault", f"{type(error).__name__}: {str(error):.200}\n{where}"
    return "read", ""


def try_seeds(name, seeds):
    """Yield (seed, outcome, text) of reading one damaged file after another."""
    damaged, write, read = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and PIL warn about what is then refused
        path = Path(folder) / damaged
        write(path)
        files = {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
        for seed in seeds:
            for file, content in files.items():
                file.write_bytes(content)
            path.write_bytes(damage(files[path], path.suffix, random.Random(f"{name}:{seed}")))
            yield seed, *try_reading(read, path)


def main():
    parser = argparse.ArgumentParser(description="Damaged files for every reader")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()
    counts, start, first = collections.Counter(), time.monotonic(), args.seed * 10**6
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
