"""The picture of editing in the README: main_edit.py on real test images, with the shipped weights.

    python benchmarks/edit_picture.py --data_path data/fashion_mnist/val --output_file assets/editing.png

A row for each way to edit, all from the first image of a class and from seed 0: nothing is picked among
results. Knows the program's flags and files, nothing of what it does.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # a program outside the repo's root

import main_edit  # noqa: E402
from util import cli, pictures  # noqa: E402

WEIGHTS = REPO / "assets/fashion_mnist"
ROWS = {  # what it shows: the image's folder, the class asked for, what is generated
    "inpainting": ("2_pullover", "pullover", ["--box", "0", "16", "32", "32"]),
    "outpainting": ("9_ankle-boot", "ankle-boot", ["--outpaint", "4", "4", "12", "12"]),
    "another class": ("0_t-shirt", "dress", ["--box", "0", "12", "32", "32"]),
    "variations": ("8_bag", "bag", ["--variations", "0.7"]),
}


def row(data_path, folder, name, part, num):
    """The picture as the model gets it, what is kept, and the results: uint8 [2 + num, 32, 32, 3]."""
    image = min((Path(data_path) / folder).iterdir())
    with tempfile.TemporaryDirectory() as made:
        main_edit.main([
            "--image", str(image), "--class", name, *part, "--num", str(num), "--cfg", "4",
            "--generation_steps", "8", "--pretrained_ckpt", str(WEIGHTS / "lpd.safetensors"),
            "--vqgan_path", str(WEIGHTS / "tokenizer.safetensors"), "--output_dir", f"{made}/out",
        ])  # fmt: skip
        files = ("original.png", "kept.png", *(f"images/{i:05d}.png" for i in range(num)))
        return np.stack([np.asarray(Image.open(f"{made}/out/{file}")) for file in files])


def main(argv=None):
    """Command line: see `--help`."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="real images, a folder of each class")
    parser.add_argument("--output_file", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--num", type=cli.number(int, 1, 99), default=8, help="results of each row")
    args = parser.parse_args(argv)
    cli.existing_folder("--data_path", args.data_path)
    cli.writable_folder("--output_file", args.output_file.parent)
    rows = [row(args.data_path, *what, args.num) for what in ROWS.values()]
    title = "original, what is kept of it (of the first, in the last row), results"
    sheet = pictures.labelled_rows(np.concatenate(rows), list(ROWS), scale=2, title=title)
    pictures.save_png(args.output_file, sheet)


if __name__ == "__main__":
    cli.run(main)
