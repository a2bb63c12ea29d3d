"""A small CNN that tells which class an image shows: do generated images look like what was asked?

    python benchmarks/classifier.py train --data_path DATA --output output/classifier.safetensors
    python benchmarks/classifier.py check --weights output/classifier.safetensors --images FOLDER

`train` fits it on DATA/train/<class>/* and measures it on DATA/val; `check` classifies FOLDER/<class>/* and
says what share is recognised as the class of its folder. Knows grey images of one size and class names;
nothing of tokens, of models that generate, or of how the images came about.
"""

import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a program outside the repo's root

from engine.checkpoint import load_state, read_weights, save_weights
from util import cli
from util.files import atomic
from util.images import UnreadableImage, list_images, load_image


@dataclass(frozen=True)
class ClassifierConfig:
    """Grey images of `img_size` pixels (a multiple of 8); `width` channels, in the end 4 `width`."""

    class_names: tuple[str, ...]
    img_size: int = 32
    width: int = 32


class Classifier(nn.Module):
    """Grey images [B, 1, S, S] with values in [0, 1] -> logits [B, number of classes]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width

        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(1, width), nn.MaxPool2d(2),
            *conv(width, 2 * width), *conv(2 * width, 2 * width), nn.MaxPool2d(2),
            *conv(2 * width, 4 * width), *conv(4 * width, 4 * width), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, len(config.class_names))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.features(2 * x - 1)  # [B, 4 width, S/8, S/8]
        return self.head(x.amax(dim=(2, 3)))  # [B, number of classes]


def read_folder(flag, path, img_size, class_names=None):
    """Read all images below `path`/<class>/ as grey, cropped as everywhere in LPD.

    Returns: uint8 [N, 1, S, S], labels [N], class names. `class_names` gives the numbering; by default it is
    the sorted folder names. Raises UsageError naming a folder or image that does not fit.
    """
    folder = list_images(cli.existing_folder(flag, path))
    class_names = class_names or folder.class_names
    if unknown := [name for name in folder.class_names if name not in class_names]:
        raise cli.UsageError(f"{flag}: {path}/{unknown[0]} is none of the classes {', '.join(class_names)}")
    number = np.array([class_names.index(name) for name in folder.class_names])
    images = np.empty((len(folder), 1, img_size, img_size), np.uint8)
    try:
        for i, name in enumerate(tqdm(folder.names, desc=f"reading {path}", mininterval=1, leave=False)):
            images[i, 0] = load_image(folder.root / name, img_size).mean(axis=2)
    except UnreadableImage as error:
        raise cli.UsageError(error) from None
    return torch.from_numpy(images), torch.from_numpy(number[folder.labels]), class_names


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
    batch_size = min(batch_size, len(images))
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
        "recognised": int((predictions == labels).sum()) / len(labels),
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
    """Refuse to overwrite `path` unless asked, before anything slow starts."""
    if path.exists() and not overwrite:
        raise cli.UsageError(f"{flag}: {path} exists; --overwrite replaces it")
    cli.writable_folder(flag, path.parent)


def write_result(path, result):
    """Store a result as JSON; its confusion matrix has one row per line."""
    text = json.dumps({**result, "confusion": "ROWS"}, indent=2)
    rows = ",\n".join(f"    {row}" for row in result["confusion"])
    with atomic(path) as partial:
        partial.write_text(text.replace('"ROWS"', f"[\n{rows}\n  ]") + "\n")


def load_classifier(path):
    """The model that `train` stored, and what was stored about it. ValueError where it is no such file."""
    state, info = read_weights(cli.existing_file("--weights", path))
    if "class_names" not in info.get("config", {}):
        raise ValueError(f"--weights: {path} holds no classifier")
    model = Classifier(ClassifierConfig(**info["config"]))
    load_state(model, state, path)
    return model, info


def train(args):
    """The command `train`: fit on the real training folder, measure on the real held-out folder."""
    check_free("--output", args.output, args.overwrite)
    if args.report:
        check_free("--report", args.report, args.overwrite)
    if args.img_size % 8:
        raise cli.UsageError(f"--img_size {args.img_size} is no multiple of 8")
    with cli.checking():
        size, path = args.img_size, args.data_path
        images, labels, names = read_folder("--data_path", path / "train", size)
        held_out, held_out_labels, _ = read_folder("--data_path", path / "val", size, names)
    torch.manual_seed(args.seed)
    model = Classifier(ClassifierConfig(names, size))
    start = time.perf_counter()
    fit(model, images, labels, epochs=args.epochs, seed=args.seed)
    seconds = time.perf_counter() - start
    result = scores(predict(model, held_out), held_out_labels, names)
    accuracy = result["recognised"]
    save_weights(args.output, model, accuracy=accuracy, epochs=args.epochs)
    show(result)
    print(f"accuracy on the real images of {path}/val: {100 * accuracy:.2f} % ({seconds:.0f} s)")
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
        write_result(args.report, {**about, **result})


def check(args):
    """The command `check`: what share of a folder of images is recognised."""
    if args.output:
        check_free("--output", args.output, args.overwrite)
    with cli.checking():
        model, info = load_classifier(args.weights)
        config = model.config
        images, labels, names = read_folder("--images", args.images, config.img_size, config.class_names)
    result = scores(predict(model, images), labels, names)
    show(result)
    print(f"(on real held-out images this classifier reaches {100 * info['accuracy']:.2f} %)")
    if args.output:
        about = {"images": str(args.images), "classifier_accuracy": info["accuracy"]}
        write_result(args.output, {**about, **result})


def main(argv=None):
    """Command line: see `--help`."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train|check")

    command = commands.add_parser("train", help="fit the classifier on real images")
    command.set_defaults(run=train)
    command.add_argument("--data_path", type=Path, required=True, help="has train/<class>/ and val/<class>/")
    command.add_argument("--output", type=Path, required=True, help="the weights, .safetensors")
    command.add_argument("--report", type=Path, help="JSON of the accuracy and how it came about")
    command.add_argument("--img_size", type=cli.number(int, 8), default=32)
    command.add_argument("--epochs", type=cli.number(int, 1), default=4)
    command.add_argument("--seed", type=cli.number(int, 0), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace existing files")

    command = commands.add_parser("check", help="classify a folder of generated images")
    command.set_defaults(run=check)
    command.add_argument("--weights", type=Path, required=True, help="what train wrote")
    command.add_argument("--images", type=Path, required=True, help="folder of one sub-folder per class")
    command.add_argument("--output", type=Path, help="JSON of the result")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")

    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
