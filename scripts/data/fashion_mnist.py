"""Fashion-MNIST's four idx files -> an ImageNet-style folder of 32x32 grey PNGs.

Knows the idx format, the class names and where the files may be found. Knows nothing of crops, tokens or
models: every program reads the folder as it would read any other.
"""

import argparse
import gzip
import math
import shutil
import sys
import tempfile
from pathlib import Path

try:
    import numpy as np
    from PIL import Image
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {e.name} is not installed: run `bash environment_setup.sh` first")

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The number in front keeps the sorted folder names in the order of the labels.
CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)  # fmt: skip
SPLITS = {"train": "train", "val": "t10k"}
FILES = [f"{stem}-{kind}-ubyte.gz" for stem in SPLITS.values() for kind in ("images-idx3", "labels-idx1")]
PAD = 2  # 28 -> 32 pixels; the background is black


class DataError(Exception):
    """What is wrong with which file, in one line for the user."""


def read_idx(path, ndim):
    """Read a gzipped idx file of unsigned bytes: uint8 array of `ndim` dimensions, or DataError."""
    try:
        with gzip.open(path) as f:
            data = f.read()
    except (OSError, EOFError) as e:
        raise DataError(f"{path}: {e}") from e
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, 8, ndim)):
        raise DataError(f"{path}: not an idx file of unsigned bytes in {ndim} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, offset=4))
    found, expected = len(data) - header, math.prod(shape)
    if found != expected:
        raise DataError(f"{path}: {found} bytes of data, but its header {shape} says {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_split(source, stem):
    """Images [N, 28, 28] and labels [N] of one split in the folder `source`."""
    images = read_idx(source / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"{source}: {len(images)} {stem} images but {len(labels)} labels")
    if labels.size and labels.max() >= len(CLASSES):
        raise DataError(f"{source}: {stem} label {labels.max()} is not one of the {len(CLASSES)} classes")
    return images, labels


def write_split(images, labels, folder):
    """Write `folder`/<class>/<index>.png; the folder has its final name only when it is complete."""
    if folder.exists():
        found = sum(1 for _ in folder.glob("*/*.png"))
        if found != len(images):
            raise DataError(f"{folder}: {found} images instead of {len(images)}: remove it and run again")
        print(f"{folder}: {found} images are there already, left as they are")
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES:
        (partial / name).mkdir(parents=True)
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))
    rows = enumerate(zip(padded, labels, strict=True))
    for i, (image, label) in tqdm(rows, total=len(images), desc=str(folder), unit="img", mininterval=1):
        Image.fromarray(image).save(partial / CLASSES[label] / f"{i:05d}.png")
    partial.rename(folder)


def convert(source, output):
    """idx files in `source` -> `output`/train and `output`/val. Splits that are complete are kept."""
    for split, stem in SPLITS.items():
        write_split(*read_split(source, stem), output / split)


def download(folder):
    """Fetch the idx files with torchvision below `folder`; returns where they lie."""
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(folder, download=True)
    except Exception as e:  # no torchvision, no network, a checksum: all mean the same to the user
        raise DataError(
            f"no Fashion-MNIST here: {DEBIAN_FOLDER} is missing (Debian package dataset-fashion-mnist) "
            f"and torchvision's download failed: {' '.join(str(e).split())}"
        ) from e
    return Path(folder, "FashionMNIST", "raw")


def main(argv=None):
    """Command line: see `--help`. Exit status 1 with one line on stderr when it fails."""
    parser = argparse.ArgumentParser(description="Fashion-MNIST as a folder of 32x32 grey PNGs.")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets train/<class>/*.png and val/...")
    parser.add_argument("--source", type=Path, help="has the idx .gz files; default: Debian's, else download")
    args = parser.parse_args(argv)
    try:
        if args.source or all((DEBIAN_FOLDER / name).is_file() for name in FILES):
            convert(args.source or DEBIAN_FOLDER, args.output)
        else:
            with tempfile.TemporaryDirectory() as folder:
                convert(download(folder), args.output)
    except (DataError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
