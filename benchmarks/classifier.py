"""A small CNN that tells which class an image shows: do generated images look like what was asked?

    python benchmarks/classifier.py train --data_path DATA --output output/classifier.safetensors
    python benchmarks/classifier.py check --weights output/classifier.safetensors --images FOLDER

`train` fits it on DATA/train/<class>/* and measures it on DATA/val; `check` classifies FOLDER/<class>/* and
says what share is recognised as the class of its folder. Knows grey images of one size and class names;
nothing of tokens, of models that generate, or of how the images came about.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class UserError(Exception):
    """A mistake of the user's, told in one line."""


class Classifier(nn.Module):
    """Grey images [B, 1, S, S] with values in [0, 1] -> logits [B, num_classes]. S is a multiple of 8."""

    def __init__(self, num_classes, width=32):
        super().__init__()

        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(1, width), nn.MaxPool2d(2),
            *conv(width, 2 * width), *conv(2 * width, 2 * width), nn.MaxPool2d(2),
            *conv(2 * width, 4 * width), *conv(4 * width, 4 * width), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = self.features(2 * x - 1)  # [B, 4 width, S/8, S/8]
        return self.head(x.amax(dim=(2, 3)))  # [B, num_classes]


def read_folder(folder, class_names=None, image_size=None):
    """Read every image of `folder`/<class>/ as grey: uint8 [N, 1, S, S], labels [N], class names.

    `class_names` fixes the numbering (the default is the sorted names of the sub-folders), `image_size` the
    size (the default is that of the first image). UserError names what does not fit.
    """
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    class_names = class_names or found
    if unknown := [name for name in found if name not in class_names]:
        raise UserError(f"{folder}: folder {unknown[0]} is not one of the classes {', '.join(class_names)}")
    files = [
        (path, class_names.index(name))
        for name in found
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise UserError(f"{folder}: no images in sub-folders named after their classes")
    images = []
    for path, _ in tqdm(files, desc=f"reading {folder}", unit="img", mininterval=1, leave=False):
        try:
            image = np.asarray(Image.open(path).convert("L"))
        except (UnidentifiedImageError, OSError) as e:
            raise UserError(f"{path}: {e}") from e
        image_size = image_size or len(image)
        if image.shape != (image_size, image_size):
            width, height = image.shape[::-1]
            raise UserError(f"{path}: {width}x{height} pixels, not {image_size}x{image_size}")
        images.append(image)
    labels = torch.tensor([label for _, label in files])
    return torch.from_numpy(np.stack(images))[:, None], labels, class_names


def to_input(images):
    """uint8 [B, 1, S, S] -> what the network wants."""
    return images.float().div(255).to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model, images, batch_size=500):
    """The class [N] that the model sees in each of the uint8 `images` [N, 1, S, S]."""
    model.eval()
    return torch.cat([model(to_input(batch)).argmax(1) for batch in images.split(batch_size)])


def fit(model, images, labels, *, epochs, batch_size=128, peak_lr=4e-3, seed=0):
    """Train in place: AdamW, one-cycle rate, random mirroring, label smoothing of 0.05."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // batch_size  # an epoch leaves out what does not fill a batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
        for rows in tqdm(order.split(batch_size), desc=f"epoch {epoch + 1}/{epochs}", mininterval=2):
            batch = images[rows]
            mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
            batch = torch.where(mirrored, batch.flip(3), batch)
            loss = F.cross_entropy(model(to_input(batch)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def scores(predictions, labels, class_names):
    """Predicted and true classes [N] -> n, the share recognised, the same per class, and the confusion.

    `confusion[i][j]` counts the images of class i seen as j. Classes without images have no share (None).
    """
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
    confusion.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    per_class = {}
    for i, name in enumerate(class_names):
        n, hits = int(confusion[i].sum()), int(confusion[i, i])
        per_class[name] = {"n": n, "recognised": hits / n if n else None}
    return {
        "n": len(labels),
        "recognised": float((predictions == labels).float().mean()),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def show(result):
    """Print what `scores` returns as a table: one row per class, the columns say as what it was seen."""
    names = list(result["per_class"])
    width = max(map(len, names))
    print(f"{'class':{width}}      n  recognised  seen as {' '.join(f'{i:4d}' for i in range(len(names)))}")
    for row, (name, share) in zip(result["confusion"], result["per_class"].items(), strict=True):
        percent = "-" if share["recognised"] is None else f"{100 * share['recognised']:.1f} %"
        print(f"{name:{width}}  {share['n']:5d}  {percent:>10}          {' '.join(f'{n:4d}' for n in row)}")
    print(f"recognised: {100 * result['recognised']:.2f} % of {result['n']} images")


def check_free(flag, path, overwrite):
    """Refuse to overwrite `path` unless asked, and make its folder, before anything slow starts."""
    if path.exists() and not overwrite:
        raise UserError(f"{flag} {path} exists: give --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: its folder is not writable")


def replace_with(path, write):
    """Let `write(temporary path)` make the file, then give it its name: never half a file under `path`."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def write_json(path, result):
    """Store a result; a matrix has one row per line."""
    text = json.dumps({**result, "confusion": "ROWS"}, indent=2)
    rows = ",\n".join(f"    {row}" for row in result["confusion"])
    replace_with(path, lambda partial: partial.write_text(text.replace('"ROWS"', f"[\n{rows}\n  ]") + "\n"))


def save(model, path, **about):
    """Store the weights, with what must be known to use them, as safetensors."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"classifier": json.dumps(about)}
    replace_with(path, lambda partial: save_file(state, partial, metadata))


def load(path):
    """The model that `save` stored, and what was stored about it. UserError if it is no such file."""
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {})["classifier"])
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError) as e:
        raise UserError(f"--weights {path}: not the weights of a classifier: {e}") from e
    model = Classifier(len(about["class_names"])).to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    return model, about


def train(args):
    """The command `train`: fit on the real training folder, measure on the real held-out folder."""
    check_free("--output", args.output, args.overwrite)
    if args.report:
        check_free("--report", args.report, args.overwrite)
    images, labels, class_names = read_folder(args.data_path / "train")
    size = images.shape[-1]
    if size % 8:
        raise UserError(f"--data_path {args.data_path}: images of {size} pixels; this needs a multiple of 8")
    val_images, val_labels, _ = read_folder(args.data_path / "val", class_names, size)
    torch.manual_seed(args.seed)
    model = Classifier(len(class_names)).to(memory_format=torch.channels_last)
    start = time.perf_counter()
    fit(model, images, labels, epochs=args.epochs, seed=args.seed)
    seconds = time.perf_counter() - start
    result = scores(predict(model, val_images), val_labels, class_names)
    if not math.isfinite(sum(p.sum().item() for p in model.parameters())):
        raise RuntimeError("training diverged: the weights are not finite")
    accuracy = result["recognised"]
    save(model, args.output, class_names=class_names, image_size=size, accuracy=accuracy, epochs=args.epochs)
    show(result)
    print(f"accuracy on the real images of {args.data_path / 'val'}: {100 * accuracy:.2f} % ({seconds:.0f} s)")
    if args.report:
        about = {
            "command": shlex.join(["python", "benchmarks/classifier.py", *sys.argv[1:]]),
            "accuracy": accuracy,
            "train_images": len(images),
            "train_seconds": round(seconds, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json(args.report, {**about, **result})


def check(args):
    """The command `check`: what share of a folder of images is recognised."""
    if args.output:
        check_free("--output", args.output, args.overwrite)
    model, about = load(args.weights)
    images, labels, class_names = read_folder(args.images, about["class_names"], about["image_size"])
    result = scores(predict(model, images), labels, class_names)
    show(result)
    print(f"(on real held-out images this classifier reaches {100 * about['accuracy']:.2f} %)")
    if args.output:
        about = {"images": str(args.images), "classifier_accuracy": about["accuracy"]}
        write_json(args.output, {**about, **result})


def main(argv=None):
    """Command line: see `--help`. Exit status 1, with one line on stderr, when it fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train|check")

    command = commands.add_parser("train", help="fit the classifier on real images")
    command.set_defaults(run=train)
    command.add_argument("--data_path", type=Path, required=True, help="has train/<class>/ and val/<class>/")
    command.add_argument("--output", type=Path, required=True, help="the weights, .safetensors")
    command.add_argument("--report", type=Path, help="JSON of the accuracy and how it came about")
    command.add_argument("--epochs", type=int, default=4)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--overwrite", action="store_true", help="replace existing files")

    command = commands.add_parser("check", help="classify a folder of generated images")
    command.set_defaults(run=check)
    command.add_argument("--weights", type=Path, required=True, help="what train wrote")
    command.add_argument("--images", type=Path, required=True, help="folder of one sub-folder per class")
    command.add_argument("--output", type=Path, help="JSON of the result")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
