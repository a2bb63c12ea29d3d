"""Fashion-MNIST's four idx files -> an ImageNet-style folder of 32x32 grey PNGs."""

from util import cli  # isort: skip
import gzip
import shutil
import tempfile
from pathlib import Path

from PIL import ImageOps
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
    """A split as torchvision reads it, from the .gz files in `source`, or from its download if that is None;
    `folder` is a temporary place."""
    try:
        if source:
            raw = folder / "FashionMNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for path in source.glob("*-ubyte.gz"):
                (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        data = FashionMNIST(folder, train=split == "train", download=source is None)
        images, labels, most = len(data.data), len(data.targets), int(data.targets.max())
        if images != labels or most >= len(CLASSES):
            raise ValueError(f"{images} images, {labels} labels up to {most}")
    except Exception as error:  # damaged files fail in many ways, torchvision's by assertions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise cli.Failure(f"{source or 'download of Fashion-MNIST'}: no {split} split ({reason})") from None
    return data


def write_split(data, folder):
    """Write `folder`/<class>/<index>.png; the folder has its final name only when it is complete."""
    if folder.exists():
        if (found := len(list(folder.glob("*/*.png")))) != len(data):
            raise cli.Failure(f"{folder}: {found} images instead of {len(data)}: remove it and run again")
        return print(f"{folder}: {found} images are there already")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES:
        (partial / name).mkdir(parents=True)
    for i, (image, label) in enumerate(tqdm(data, desc=str(folder), unit="img", mininterval=1)):
        ImageOps.expand(image, PAD).save(partial / CLASSES[label] / f"{i:05d}.png")
    partial.rename(folder)


def main(argv=None):
    parser = cli.Parser(description="Fashion-MNIST as a folder of 32x32 grey PNGs")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets train/<class>/*.png and val/...")
    parser.add_argument("--source", type=Path, help="folder of the .gz files; default: Debian's, or download")
    args = parser.parse_args(argv)
    source = args.source or (DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else None)
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            write_split(load_split(source, split, Path(folder)), args.output / split)


if __name__ == "__main__":
    cli.run(main)
