"""Editing measured: half of each of 1,000 real test images is generated again, in several orders and steps.

    python benchmarks/edit_fashion.py --data_path data/fashion_mnist/val \\
        --classifier output/classifier.safetensors --output_file benchmarks/results/edit_fashion_mnist

For the lower half and for a random half of the cells, with each image's own class: the share that the
classifier recognises, and the mean absolute error in the generated half, in grey levels of 255, to the image
and to its reconstruction. For comparison the images, their reconstructions, and the images with that half
black. NAME.json and NAME.csv are written after every setting; the same command resumes.
"""

import csv
from pathlib import Path

import numpy as np
import torch

from benchmarks.classifier import CPU, load_classifier, predict, read_folder
from benchmarks.measure import record
from engine.generate import Sampling, edit_tokens, load_pair, resolve_settings
from orders.lpd_order import random_orders
from util import cli
from util.files import atomic, read_json, refuse_changes, write_json
from util.images import to_uint8, to_unit

WEIGHTS = Path(__file__).resolve().parents[1] / "assets/fashion_mnist"
KEPT = {  # the half that is kept, bool [n, L]
    "lower half": lambda n, grid: np.tile(np.arange(grid**2) < grid**2 // 2, (n, 1)),
    "random half": lambda n, grid: random_orders(n, grid, seed=1).argsort(axis=1) < grid**2 // 2,
}


def parse_args(argv):
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="real images, one folder per class")
    parser.add_argument("--classifier", required=True, help="weights of benchmarks/classifier.py")
    parser.add_argument("--output_file", type=Path, required=True, help="name of the results, without suffix")
    parser.add_argument("--per_class", type=cli.number(int, 1), default=100)
    parser.add_argument("--steps", type=cli.number(int, 2), nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--orders", nargs="+", default=["lpd", "random", "raster"])
    parser.add_argument("--cfg", type=cli.number(float, 0), default=4.0)
    cli.add_seed_flag(parser)
    return parser.parse_args(argv)


@torch.inference_mode()
def in_batches(function, *tensors):
    """A function of tensors, 100 rows at a time."""
    return torch.cat([function(*batch) for batch in zip(*(x.split(100) for x in tensors), strict=True)])


class Results:
    """The rows measured so far, on disk."""

    def __init__(self, path, facts):
        self.path, self.facts, self.rows = path, facts, []
        if path.with_suffix(".json").exists():
            saved = read_json(path.with_suffix(".json"))
            compared = {key: facts[key] for key in ("images", "cfg", "seed")}
            refuse_changes(path, saved, compared, "give another --output_file")
            self.rows = saved["results"]
        self.done = {(row["half"], row["images"], row.get("steps")) for row in self.rows}

    def add(self, **row):
        self.rows.append(row)
        print(row, flush=True)
        write_json(self.path.with_suffix(".json"), {**self.facts, "results": self.rows})
        with atomic(self.path.with_suffix(".csv")) as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in self.rows for key in row)))
            table.writeheader()
            table.writerows(self.rows)


def main(argv=None):
    args = parse_args(argv)
    cli.writable_folder("--output_file", args.output_file.parent)
    with cli.checking():
        classifier, info = load_classifier(args.classifier)
        size, names = classifier.config.img_size, classifier.config.class_names
        images, labels, _ = read_folder("--data_path", args.data_path, size, names)
        model, tokenizer, _ = load_pair(WEIGHTS / "lpd.safetensors", WEIGHTS / "tokenizer.safetensors")
        rows = torch.cat([(labels == c).nonzero()[: args.per_class, 0] for c in range(len(names))])
        facts = record(CPU, images=len(rows), cfg=args.cfg, seed=args.seed,
                       classifier_on_all_test_images=info["accuracy"])
        results = Results(args.output_file, facts)
    measure(args, model, tokenizer, classifier, (images[rows], labels[rows]), results)


def measure(args, model, tokenizer, classifier, data, results):
    """Add every setting that the results do not have yet; `data` is (images, labels)."""
    images, labels = data
    n, grid, stride = len(labels), model.config.grid_size, tokenizer.config.stride

    def encode(x):
        return tokenizer.encode(to_unit(x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)))

    def decode(tokens):
        return to_uint8(tokenizer.decode(tokens)).float().mean(dim=3).round().byte()[:, None]

    tokens = in_batches(encode, images)
    reconstructions = in_batches(decode, tokens)

    def score(made, generated):
        """Share recognised, and the errors where `generated`, bool [n, 1, S, S]."""
        recognised = (predict(classifier, made) == labels).float().mean().item()
        targets = {"error_to_image": images, "error_to_reconstruction": reconstructions}
        errors = {name: (made.float() - target).abs()[generated].mean() for name, target in targets.items()}
        return {"recognised": round(recognised, 4), **{k: round(v.item(), 2) for k, v in errors.items()}}

    for half, kept in KEPT.items():
        keep = torch.from_numpy(kept(n, grid))
        generated = ~keep.view(n, 1, grid, grid).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        given = {"real": images, "reconstructed": reconstructions, "half black": images * ~generated}
        for name in given:
            if (half, name, None) not in results.done:
                results.add(half=half, images=name, **score(given[name], generated))
        for steps, order in ((steps, order) for steps in args.steps for order in args.orders):
            if (half, order, steps) in results.done:
                continue
            settings = resolve_settings(
                grid, generation_steps=steps, order=order, known=keep.numpy(), num_images=n,
                sampling=Sampling(cfg=args.cfg), seed=args.seed,
            )

            def edit(ids, settings=settings, keep=keep):
                return edit_tokens(
                    model, tokens[ids], keep[ids], labels[ids], settings.orders(ids.numpy()),
                    settings.group_sizes, settings.sampling, seed=args.seed, image_ids=ids,
                )

            made = in_batches(decode, in_batches(edit, torch.arange(n)))
            results.add(half=half, images=order, steps=steps, **score(made, generated))


if __name__ == "__main__":
    cli.run(main)
