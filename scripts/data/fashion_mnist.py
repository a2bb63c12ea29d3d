"""Fashion-MNIST's four idx files -> an ImageNet-style folder of 32x32 grey PNGs."""

import gzip
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from util import cli

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (  # the numbers keep the sorted folder names in the order of the labels
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)
SPLITS = {"train": "train", "val": "t10k"}
PAD = 2  # 28 -> 32 pixels; the background is black


def read_idx(path, ndim):
    """A gzipped idx file of unsigned bytes -> uint8 array of `ndim` dimensions."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise cli.Failure(f"{path}: {error}") from None
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, 8, ndim)):
        raise cli.Failure(f"{path}: not an idx file of unsigned bytes in {ndim} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, offset=4))
    if len(data) != header + math.prod(shape):
        raise cli.Failure(f"{path}: {len(data) - header} bytes of data, its header says {math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_split(source, stem):
    """Images [N, 28, 28] and labels [N] of one split in the folder `source`."""
    images = read_idx(source / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise cli.Failure(f"{source}: {len(images)} {stem} images but {len(labels)} labels")
    if labels.size and labels.max() >= len(CLASSES):
        raise cli.Failure(f"{source}: {stem} label {labels.max()} is not one of {len(CLASSES)} classes")
    return images, labels


def write_split(images, labels, folder):
    """Write `folder`/<class>/<index>.png; the folder has its final name only when it is complete."""
    if folder.exists():
        found = sum(1 for _ in folder.glob("*/*.png"))
        if found != len(images):
            raise cli.Failure(f"{folder}: {found} images instead of {len(images)}: remove it and run again")
        print(f"{folder}: {found} images are there already")
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES:
        (partial / name).mkdir(parents=True)
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))
    for i, image in enumerate(tqdm(padded, desc=str(folder), unit="img", mininterval=1)):
        Image.fromarray(image).save(partial / CLASSES[labels[i]] / f"{i:05d}.png")
    partial.rename(folder)


def download(folder):
    """Download the idx files with torchvision below `folder`; returns where they are."""
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(folder, download=True)
    except Exception as error:  # no torchvision, no network or a wrong checksum
        raise cli.Failure(
            f"no Fashion-MNIST here: {DEBIAN_FOLDER} is missing (Debian package dataset-fashion-mnist) "
            f"and torchvision's download failed: {' '.join(str(error).split())}"
        ) from None
    return Path(folder, "FashionMNIST", "raw")


def main(argv=None):
    parser = cli.Parser(description="Fashion-MNIST as a folder of 32x32 grey PNGs")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets train/<class>/*.png and val/...")
    parser.add_argument("--source", type=Path, help="folder of the .gz files; default: Debian's, or download")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else download(folder))
        for split, stem in SPLITS.items():
            write_split(*read_split(source, stem), args.output / split)


if __name__ == "__main__":
    cli.run(main)
