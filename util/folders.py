"""Folders of images: their classes and names, what is left out, and which images are held out of training."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from util.distributed import gather_objects, warn
from util.images import EXTENSIONS, Reading, image_loader, in_order

VAL_FRACTION = 0.05  # held out where there is no val folder and nothing else is said


@dataclass(frozen=True)
class ImageFolder:
    """An ImageNet-style folder: one sub-folder per class, labels in sorted order of their names.

    `names` are relative paths, sorted; `labels` int64 [N], one for each name. `left_out` says which
    sub-folders are no classes, and why.
    """

    root: Path
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    reading: Reading = Reading()
    left_out: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self):
        return len(self.names)

    def subset(self, chosen):
        """The folder with only the images of `chosen`, bool [N]."""
        names = tuple(name for name, keep in zip(self.names, chosen, strict=True) if keep)
        return replace(self, names=names, labels=self.labels[chosen])


def _hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def _images_below(root, class_name):
    """Sorted names, relative to `root`, of the images of a class, at any depth."""
    names = (path.relative_to(root) for path in (root / class_name).rglob("*") if path.is_file())
    return sorted(
        name.as_posix() for name in names
        if name.suffix.lower() in EXTENSIONS and not any(map(_hidden, name.parts))
    )


def list_images(root, reading=Reading(), class_names=None):
    """The `ImageFolder` at ROOT/CLASS/IMAGE; hidden folders and classes without images are left out.

    With `class_names`, labels are places in that list, and other classes are left out.

    Raises:
        ValueError: no sub-folders, or no images in them.
    """
    root = Path(root)
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = [name for name in found if not _hidden(name)]
    if not classes:
        raise ValueError(f"{root} has no class sub-folders: images must lie in {root}/CLASS/, one is enough")
    images = {name: _images_below(root, name) for name in classes}
    if not any(images.values()):
        raise ValueError(f"{root} has {len(classes)} class sub-folders but no images in them")
    known = tuple(name for name in classes if images[name]) if class_names is None else tuple(class_names)
    left_out = [f"{name} (no class)" for name in found if _hidden(name)]
    left_out += [f"{name} (no images)" for name in classes if not images[name]]
    left_out += [f"{name} (no such class)" for name in classes if images[name] and name not in known]
    listed = [(name, label) for label, class_name in enumerate(known) for name in images.get(class_name, ())]
    labels = np.array([label for _, label in listed], dtype=np.int64)
    return ImageFolder(root, known, tuple(name for name, _ in listed), labels, reading, tuple(left_out))


# Held-out images.


def held_out(names, fraction):
    """Which images are held out of training, bool [N]: about `fraction` of them, by a hash of the name.

    Whether an image is held out depends on its class folder and file name (without the suffix) alone.
    """
    stems = (PurePath(name).with_suffix("").as_posix() for name in names)
    hashes = [int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big") for stem in stems]
    return np.array(hashes, dtype=np.uint64) < fraction * 2**32


def val_fraction_of(stated, published):
    """The fraction to hold out: as stated, else VAL_FRACTION, or nothing of data read as published."""
    return (0.0 if published else VAL_FRACTION) if stated is None else stated


def _has_classes(path):
    return path.is_dir() and any(p.is_dir() and not _hidden(p.name) for p in path.iterdir())


def split_folder(path, val_fraction=None, reading=Reading()):
    """The training images of a folder and those held out, two `ImageFolder`s with the same classes.

    These are PATH/train and PATH/val where both have class folders. Otherwise `held_out` splits PATH/train or
    PATH; `val_fraction` is as in `val_fraction_of`. The second is None if nothing is held out.

    Raises:
        ValueError: no classes, no images, or all of them held out.
    """
    path = Path(path)
    split = _has_classes(path / "train")
    train = list_images(path / "train" if split else path, reading)
    if split and _has_classes(path / "val"):
        val = list_images(path / "val", reading, train.class_names)
        left_out = tuple(f"val/{name}" for name in val.left_out)
        train = replace(train, left_out=train.left_out + left_out)
    else:
        mask = held_out(train.names, val_fraction_of(val_fraction, reading.published))
        train, val = train.subset(~mask), train.subset(mask)
    if not len(train):
        raise ValueError(f"{path}: all {len(val)} images are held out: lower --val_fraction")
    return train, val if len(val) else None


# What is in a folder.


def class_counts(class_names, labels, most=20):
    """A line with the number of images of each class; of more than `most` classes only the extremes."""
    counts = np.bincount(labels, minlength=len(class_names))
    if len(class_names) <= most:
        return ", ".join(f"{name} {count}" for name, count in zip(class_names, counts, strict=True))
    few, many = counts.argmin(), counts.argmax()
    return f"from {counts[few]} ({class_names[few]}) to {counts[many]} ({class_names[many]}) in each"


def listing(head, class_names, labels, left_out=()):
    """Lines for the start of a program: `head`, the classes with their counts, and what was left out."""
    lines = [f"{head}; {len(class_names)} classes", f"  {class_counts(class_names, labels)}"]
    return "\n".join(lines + [f"  left out: {', '.join(left_out)}"] * bool(left_out))


def summary(place, class_names, train, val=None, left_out=()):
    """A `listing` that says how many images there are to train on and held out; both have `labels`."""
    held = val.labels if val else train.labels[:0]
    head = f"{place}: {len(train.labels)} training images, {len(held)} held out"
    return listing(head, class_names, np.concatenate([train.labels, held]), left_out)


def without_unreadable(folder, size, world, num_workers):
    """The folder without its unreadable images, which are named on stderr and counted. Each process reads its
    share of the images, and all get the same folder."""
    own = range(len(folder))[world.rank :: world.size]
    loader = image_loader(folder, size, in_order(own, 64), num_workers)
    with tqdm(total=len(own), unit="img", desc="unreadable?", disable=not world.is_main) as progress:
        errors = []
        for items in loader:
            errors += [(i, reason) for i, reason in items if isinstance(reason, str)]
            progress.update(len(items))
    errors = sorted(error for part in gather_objects(errors) for error in part)
    for _, reason in errors:
        warn(f"unreadable: {reason}")
    warn(f"{folder.root}: {len(errors)} unreadable images left out")
    good = np.ones(len(folder), bool)
    good[[i for i, _ in errors]] = False
    return folder.subset(good)
