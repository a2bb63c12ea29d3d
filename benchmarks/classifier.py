"""A small CNN that measures whether generated images look like the class that was asked for.

    python benchmarks/classifier.py train --data_path DATA --output output/classifier.safetensors
    python benchmarks/classifier.py check --weights output/classifier.safetensors --images FOLDER

`train` fits it on DATA/train/<class>/* and measures it on DATA/val; `check` classifies FOLDER/<class>/* and
reports the share recognised as the class of its folder. Grey images of one size.
"""

from util import cli  # isort: skip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.measure import record
from models.weights import load_state, read_weights, save_weights
from util.files import write_json
from util.folders import list_images
from util.images import UnreadableImage, load_image

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ClassifierConfig:
    """Grey images of `img_size` pixels (a multiple of 8); `width` channels first, 4 `width` last."""

    class_names: tuple[str, ...]
    img_size: int = 32
    width: int = 32


class Classifier(nn.Module):
    """Grey images [B, 1, S, S] with values in [0, 1] -> logits [B, classes]."""

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
        )
        self.head = nn.Linear(4 * width, len(config.class_names))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.features(2 * x - 1)  # [B, 4 width, S/8, S/8]
        return self.head(x.amax(dim=(2, 3)))  # [B, classes]


def read_folder(flag, path, img_size, class_names=None):
    """Read PATH/<class>/* as grey images, centre-cropped: uint8 [N, 1, S, S], labels [N], class names.

    `class_names` gives the numbering (default: the sorted folder names). Raises UsageError naming a folder or
    image that does not fit.
    """
    folder = list_images(cli.existing_folder(flag, path))
    class_names = class_names or folder.class_names
    if unknown := [name for name in folder.class_names if name not in class_names]:
        raise cli.UsageError(f"{flag}: {path}/{unknown[0]} is not in the classes {', '.join(class_names)}")
    number = np.array([class_names.index(name) for name in folder.class_names])
    images = np.empty((len(folder), 1, img_size, img_size), np.uint8)
    try:
        for i in tqdm(range(len(folder)), desc=f"reading {path}", mininterval=1, leave=False):
            images[i, 0] = load_image(folder.file(i), img_size).mean(axis=2)
    except UnreadableImage as error:
        raise cli.UsageError(error) from None
    return torch.from_numpy(images), torch.from_numpy(number[folder.labels]), class_names


def to_input(images):
    """uint8 [B, 1, S, S] -> float32 in [0, 1], channels last."""
    return images.float().div(255).to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model, images, batch_size=500):
    """The predicted class of each of uint8 images [N, 1, S, S]: int64 [N]."""
    model.eval()
    return torch.cat([model(to_input(batch)).argmax(1) for batch in images.split(batch_size)])


def fit(model, images, labels, *, epochs, seed=0):
    """Train in place: AdamW, one-cycle rate, random mirroring, label smoothing of 0.05."""
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(128, len(images))
    steps = len(images) // batch_size  # an incomplete last batch is left out
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
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
    """Predicted and true classes [N] -> n, the share recognised, the same per class (None without images),
    and the confusion matrix: `confusion[i][j]` counts images of class i predicted as j."""
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
    confusion.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    per_class = {}
    for name, row, hits in zip(class_names, confusion, confusion.diagonal().tolist(), strict=True):
        n = int(row.sum())
        per_class[name] = {"n": n, "recognised": hits / n if n else None}
    recognised = (predictions == labels).float().mean().item()
    return {"n": len(labels), "recognised": recognised, "per_class": per_class,
            "confusion": confusion.tolist()}


def report(result):
    """Print the share of each class and of all."""
    for name, share in result["per_class"].items():
        if share["n"]:
            print(f"{name:>16} {share['n']:6d} {100 * share['recognised']:6.1f} %")
    print(f"recognised: {100 * result['recognised']:.2f} % of {result['n']} images")


def check_free(flag, path, overwrite):
    """Refuse to overwrite `path` unless asked, before anything slow starts."""
    if path.exists() and not overwrite:
        raise cli.UsageError(f"{flag}: {path} exists; --overwrite replaces it")
    cli.writable_folder(flag, path.parent)


def load_classifier(path):
    """The trained model and what its file records. Raises ValueError if it holds something else."""
    state, info = read_weights(cli.existing_file("--weights", path))
    if "class_names" not in info.get("config", {}):
        raise ValueError(f"--weights: {path} holds no classifier")
    model = Classifier(ClassifierConfig(**info["config"]))
    load_state(model, state, path)
    return model, info


def train(args):
    """Fit on the training folder, measure on the held-out one."""
    check_free("--output", args.output, args.overwrite)
    if args.report:
        check_free("--report", args.report, args.overwrite)
    if args.img_size % 8:
        raise cli.UsageError(f"--img_size {args.img_size} is not a multiple of 8")
    with cli.checking():
        size, path = args.img_size, args.data_path
        images, labels, names = read_folder("--data_path", path / "train", size)
        held_out, held_out_labels, _ = read_folder("--data_path", path / "val", size, names)
    torch.manual_seed(args.seed)
    model = Classifier(ClassifierConfig(names, size))
    fit(model, images, labels, epochs=args.epochs, seed=args.seed)
    result = scores(predict(model, held_out), held_out_labels, names)
    save_weights(args.output, model, accuracy=result["recognised"], epochs=args.epochs)
    report(result)
    if args.report:
        facts = record(CPU, accuracy=result["recognised"], train_images=len(images))
        write_json(args.report, {**facts, **result})


def check(args):
    """The share of a folder of images that is recognised."""
    if args.output:
        check_free("--output", args.output, args.overwrite)
    with cli.checking():
        model, info = load_classifier(args.weights)
        config = model.config
        images, labels, names = read_folder("--images", args.images, config.img_size, config.class_names)
    result = scores(predict(model, images), labels, names)
    report(result)
    print(f"(on real held-out images this classifier reaches {100 * info['accuracy']:.2f} %)")
    if args.output:
        write_json(args.output, record(CPU, classifier_accuracy=info["accuracy"], **result))


def main(argv=None):
    parser = cli.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="train|check")
    command = commands.add_parser("train", help="fit the classifier on real images")
    command.set_defaults(run=train)
    command.add_argument("--data_path", type=Path, required=True, help="has train/<class>/ and val/<class>/")
    command.add_argument("--output", type=Path, required=True, help="the weights, .safetensors")
    command.add_argument("--report", type=Path, help="JSON of the accuracy")
    command.add_argument("--img_size", type=cli.number(int, 8), default=32)
    command.add_argument("--epochs", type=cli.number(int, 1), default=4)
    command.add_argument("--seed", type=cli.number(int, 0), default=0)
    command.add_argument("--overwrite", action="store_true", help="replace existing files")
    command = commands.add_parser("check", help="classify a folder of generated images")
    command.set_defaults(run=check)
    command.add_argument("--weights", type=Path, required=True, help="written by train")
    command.add_argument("--images", type=Path, required=True, help="folder with one sub-folder per class")
    command.add_argument("--output", type=Path, help="JSON of the result")
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
