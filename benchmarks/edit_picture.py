"""The editing picture of the README: main_edit.py on real test images, with the shipped weights.

    python benchmarks/edit_picture.py --data_path data/fashion_mnist/val --output_file assets/editing.png

One row per way to edit, always the first image of a class and seed 0: nothing is picked by hand.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import main_edit
from util import cli, pictures

WEIGHTS = Path(__file__).resolve().parents[1] / "assets/fashion_mnist"
ROWS = {  # title: folder of the image, class to generate, region to generate
    "inpainting": ("2_pullover", "pullover", ["--box", "0", "16", "32", "32"]),
    "outpainting": ("9_ankle-boot", "ankle-boot", ["--outpaint", "4", "4", "12", "12"]),
    "another class": ("0_t-shirt", "dress", ["--box", "0", "12", "32", "32"]),
    "variations": ("8_bag", "bag", ["--variations", "0.7"]),
}


def edited(image, class_name, region, num):
    """The picture as the model sees it, what is kept, and the results: uint8 [2 + num, 32, 32, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        main_edit.main([
            "--image", str(image), "--class", class_name, *region, "--num", str(num), "--cfg", "4",
            "--generation_steps", "8", "--pretrained_ckpt", str(WEIGHTS / "lpd.safetensors"),
            "--vqgan_path", str(WEIGHTS / "tokenizer.safetensors"), "--output_dir", f"{folder}/out",
        ])
        files = ("original.png", "kept.png", *(f"images/{i:05d}.png" for i in range(num)))
        return np.stack([np.asarray(Image.open(f"{folder}/out/{file}")) for file in files])


def main(argv=None):
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", type=Path, required=True, help="real images, one folder per class")
    parser.add_argument("--output_file", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--num", type=cli.number(int, 1, 99), default=8, help="results per row")
    args = parser.parse_args(argv)
    cli.existing_folder("--data_path", args.data_path)
    cli.writable_folder("--output_file", args.output_file.parent)
    rows = [
        edited(min((args.data_path / folder).iterdir()), name, region, args.num)
        for folder, name, region in ROWS.values()
    ]
    title = "original, what is kept of it (of the first result in the last row), results"
    sheet = pictures.labelled_rows(np.concatenate(rows), list(ROWS), scale=2, title=title)
    pictures.save_png(args.output_file, sheet)


if __name__ == "__main__":
    cli.run(main)
