"""Fashion-MNIST's four idx files -> an ImageNet-style folder of 32x32 grey PNGs."""

from util import cli  # isort: skip
import gzip
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (  # the numbers keep the sorted folder names in the order of the labels
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)
SPLITS = ("train", "val")
PAD = 2  # 28 -> 32 pixels; the background is black


def load_split(source, split, folder):
    """Images uint8 [N, 28, 28] and labels [N] of a split, read by torchvision from the .gz files in `source`,
    or from its download if that is None; `folder` is a temporary place."""
    try:
        if source:
            raw = folder / "FashionMNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for path in source.glob("*-ubyte.gz"):
                (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        data = FashionMNIST(folder, train=split == "train", download=source is None)
        labels = data.targets.numpy()
        if len(data.data) != len(labels) or labels.max() >= len(CLASSES):
            raise ValueError(f"{len(data.data)} images, {len(labels)} labels up to {labels.max()}")
    except Exception as error:  # damaged files fail in many ways, torchvision's by assertions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise cli.Failure(f"{source or 'download of Fashion-MNIST'}: no {split} split ({reason})") from None
    return data.data.numpy(), labels


def write_split(images, labels, folder):
    """Write `folder`/<class>/<index>.png; the folder has its final name only when it is complete."""
    if folder.exists():
        if (found := len(list(folder.glob("*/*.png")))) != len(images):
            raise cli.Failure(f"{folder}: {found} images instead of {len(images)}: remove it and run again")
        return print(f"{folder}: {found} images are there already")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES:
        (partial / name).mkdir(parents=True)
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))
    for i, image in enumerate(tqdm(padded, desc=str(folder), unit="img", mininterval=1)):
        Image.fromarray(image).save(partial / CLASSES[labels[i]] / f"{i:05d}.png")
    partial.rename(folder)


def main(argv=None):
    parser = cli.Parser(description="Fashion-MNIST as a folder of 32x32 grey PNGs")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets train/<class>/*.png and val/...")
    parser.add_argument("--source", type=Path, help="folder of the .gz files; default: Debian's, or download")
    args = parser.parse_args(argv)
    source = args.source or (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else None)
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            write_split(*load_split(source, split, Path(folder)), args.output / split)


if __name__ == "__main__":
    cli.run(main)
