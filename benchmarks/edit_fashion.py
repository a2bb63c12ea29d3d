"""Editing in figures: half of each of 1,000 real test images is generated anew, in several orders and steps.

    python benchmarks/edit_fashion.py --data_path data/fashion_mnist/val \\
        --classifier output/classifier.safetensors --output_file benchmarks/results/edit_fashion_mnist

For the lower half and for a random half of the cells, each image's own class asked for: the share that the
classifier of benchmarks/classifier.py recognises, and the mean absolute error in the generated half, in grey
levels of 255, to the image and to what the tokenizer makes of it. Beside them the images themselves, their
reconstructions, and the images with that half black. Writes NAME.json and NAME.csv after every setting; the
same command again goes on. Knows no more of editing than a program does.
"""

import csv
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # a program outside the repo's root

from benchmarks.classifier import load_classifier, predict, read_folder  # noqa: E402
from engine.checkpoint import load_lpd, load_tokenizer  # noqa: E402
from engine.chunks import check_same  # noqa: E402
from engine.edit import edit_tokens  # noqa: E402
from engine.settings import resolve_settings  # noqa: E402
from orders.lpd_order import random_orders  # noqa: E402
from util import cli  # noqa: E402
from util.files import atomic, read_json, write_json  # noqa: E402
from util.images import to_uint8, to_unit  # noqa: E402

WEIGHTS = REPO / "assets/fashion_mnist"
KEPT = {  # the half that is kept, bool [n, L]
    "lower half": lambda n, grid: np.tile(np.arange(grid**2) < grid**2 // 2, (n, 1)),
    "random half": lambda n, grid: random_orders(n, grid, seed=1).argsort(axis=1) < grid**2 // 2,
}


def first_of_each_class(images, labels, per_class):
    """The first `per_class` of each class, in class order."""
    rows = torch.cat([(labels == c).nonzero()[:per_class, 0] for c in range(int(labels.max()) + 1)])
    return images[rows], labels[rows]


def in_batches(function, *tensors, batch_size=100):
    """A function of tensors, batch by batch."""
    batches = zip(*(x.split(batch_size) for x in tensors), strict=True)
    with torch.inference_mode():
        return torch.cat([function(*batch) for batch in batches])


class Judge:
    """Tells of uint8 images [n, 1, S, S] how many are recognised, and their errors where `generated`."""

    def __init__(self, classifier, labels, images, reconstructions):
        self.classifier, self.labels = classifier, labels
        self.targets = {"error_to_image": images, "error_to_reconstruction": reconstructions}

    def __call__(self, images, generated):
        """`generated` bool [n, 1, S, S] -> a row of the result."""
        recognised = (predict(self.classifier, images) == self.labels).float().mean().item()
        errors = {
            name: round((images.float() - target).abs()[generated].mean().item(), 2)
            for name, target in self.targets.items()
        }
        return {"recognised": round(recognised, 4), **errors}


def write(path, about, rows):
    """NAME.json and NAME.csv."""
    write_json(path.with_suffix(".json"), {**about, "results": rows})
    with atomic(path.with_suffix(".csv")) as partial, partial.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


def about(args, n, accuracy):
    """What decides the figures; the same again resumes."""
    return {
        "command": shlex.join(["python", "benchmarks/edit_fashion.py", *sys.argv[1:]]),
        "images": n,
        "cfg": args.cfg,
        "seed": args.seed,
        "classifier_on_all_test_images": accuracy,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv=None):
    """Command line: see `--help`."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="real images, a folder of each class")
    parser.add_argument("--classifier", required=True, help="weights of benchmarks/classifier.py")
    parser.add_argument("--output_file", type=Path, required=True, help="name of the results, without suffix")
    parser.add_argument("--per_class", type=cli.number(int, 1), default=100)
    parser.add_argument("--steps", type=cli.number(int, 2), nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--orders", nargs="+", default=["lpd", "random", "raster"])
    parser.add_argument("--cfg", type=cli.number(float, 0), default=4.0)
    cli.add_seed_flag(parser)
    args = parser.parse_args(argv)
    cli.writable_folder("--output_file", args.output_file.parent)
    with cli.checking():
        classifier, info = load_classifier(args.classifier)
        config = classifier.config
        images, labels, names = read_folder(
            "--data_path", args.data_path, config.img_size, config.class_names
        )
        tokenizer = load_tokenizer(WEIGHTS / "tokenizer.safetensors")
        model, _ = load_lpd(WEIGHTS / "lpd.safetensors")
    images, labels = first_of_each_class(images, labels, args.per_class)
    measure(args, model, tokenizer, classifier, images, labels, about(args, len(labels), info["accuracy"]))


def measure(args, model, tokenizer, classifier, images, labels, about):
    """Every setting that the results do not have yet."""
    n, grid, stride = len(labels), model.config.grid_size, tokenizer.config.stride

    def decode(tokens):
        return to_uint8(tokenizer.decode(tokens)).float().mean(dim=3).round().byte()[:, None]

    tokens = in_batches(
        lambda x: tokenizer.encode(to_unit(x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))), images
    )
    reconstructions = in_batches(decode, tokens)
    judge = Judge(classifier, labels, images, reconstructions)
    path = args.output_file.with_suffix(".json")
    saved = read_json(path) if path.exists() else {"results": []}
    if saved["results"]:
        check_same(path, saved, {k: about[k] for k in ("images", "cfg", "seed")}, "--output_file")
    rows = saved["results"]
    done = {(row["half"], row["images"], row.get("steps")) for row in rows}

    def add(**row):
        rows.append(row)
        write(args.output_file, about, rows)
        print(row, flush=True)

    for half, kept in KEPT.items():
        keep = torch.from_numpy(kept(n, grid))
        generated = ~keep.view(n, 1, grid, grid).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        for name, given in (
            ("real", images), ("reconstructed", reconstructions), ("half black", images * ~generated)
        ):  # fmt: skip
            if (half, name, None) not in done:
                add(half=half, images=name, **judge(given, generated))
        for steps in args.steps:
            for order in args.orders:
                if (half, order, steps) in done:
                    continue
                start = time.perf_counter()
                settings = resolve_settings(
                    grid,
                    generation_steps=steps,
                    order=order,
                    known=keep.numpy(),
                    cfg=args.cfg,
                    seed=args.seed,
                )
                edited = in_batches(
                    lambda ids, settings=settings, keep=keep: edit_tokens(
                        model, tokens[ids], keep[ids], labels[ids], settings.orders(ids.numpy()),
                        settings.group_sizes, image_ids=ids, **settings.decoding(),
                    ),
                    torch.arange(n),
                )  # fmt: skip
                seconds = round(time.perf_counter() - start, 1)
                add(
                    half=half, images=order, steps=steps, **judge(in_batches(decode, edited), generated),
                    seconds=seconds,
                )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
