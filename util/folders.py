"""Folders of images: their classes and names, what is left out, and which images are held out of training.

Everything that lies in a folder is either used or named with the reason.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from util.distributed import gather_objects, once, warn
from util.images import EXTENSIONS, Reading, image_loader, in_order

VAL_FRACTION = 0.05  # held out where there is no val folder and nothing else is said
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}
# What parts of a data set are called: the last word of a folder's name, as in Val or ILSVRC2012_img_train.
PARTS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PARTS |= {name: name for name in ("train", "val", "test")}


@dataclass(frozen=True)
class ImageFolder:
    """An ImageNet-style folder: one sub-folder per class, labels in sorted order of their names.

    `names` are relative paths, sorted; `labels` int64 [N], one for each name. `left_out` says what else lies
    there, and why it is not used.
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


# What lies in a folder, whatever it means.


@dataclass(frozen=True)
class Listing:
    """What lies below `root`. `images`: folder -> names of the images directly in it; `unusable`: (path,
    reason) of all else. Paths are relative, with slashes; "" is the root."""

    root: Path
    images: dict[str, list[str]]
    unusable: list[tuple[str, str]]

    def inside(self):
        """Folder -> the names of those in it that hold images, at any depth."""
        found = {"": set()}
        for folder, names in self.images.items():
            while names and folder:
                folder, _, name = folder.rpartition("/")
                found.setdefault(folder, set()).add(name)
        return found

    def below(self, folder):
        """The images of one of the folders, as a Listing of its own."""
        inner = {path[len(folder) + 1 :]: names for path, names in self.images.items()
                 if f"{path}/".startswith(f"{folder}/")}
        return Listing(self.root / folder, inner, [])

    def apart(self):
        """(path, reason) of what lies directly in the root and not in a class."""
        empty = {folder.split("/")[0] for folder in self.images} - self.inside()[""] - {""}
        return [(n, "no images") for n in empty] + [(n, "in no class folder") for n in self.images[""]]


def list_files(root, endings=EXTENSIONS):
    """The `Listing` of a folder, made in one pass by one of the processes. Links are followed."""
    images, unusable, waiting = {}, [], [("", ())]
    while waiting:
        folder, above = waiting.pop()
        place = os.path.realpath(root / folder)
        if place in above:
            unusable.append((folder, "leads back to a folder above"))
            continue
        images[folder] = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}".lstrip("/")
                if reason := _why_unusable(entry, endings):
                    unusable.append((path, reason))
                elif entry.is_dir():
                    waiting.append((path, (*above, place)))
                else:
                    images[folder].append(entry.name)
    return Listing(root, images, unusable)


def _why_unusable(entry, endings):
    if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
        return "hidden"
    if entry.is_dir():
        return ""
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "no file"
    ending = PurePath(entry.name).suffix.lower()
    return "" if ending in endings else ending or "no ending"


# What it means: the parts of a data set, and classes.


def _parts(inside, folder=""):
    """train, val, test -> the folders called so in a folder, if that is a data set: if there are two kinds of
    them, or one holds folders. Else empty."""
    parts = {}
    for name in sorted(inside.get(folder, ())):
        words = re.findall("[a-z]+", name.lower())
        if words and words[-1] in PARTS:
            parts.setdefault(PARTS[words[-1]], []).append(name)
    nested = any(f"{folder}/{name}".lstrip("/") in inside for names in parts.values() for name in names)
    return parts if nested or len(parts) > 1 else {}


def _train_and_val(listing):
    """The names of the folders to train on and to hold out; empty for what is not there.

    Raises:
        ValueError: parts of a data set without one to train on, or it is unclear what is a part.
    """
    root, inside = listing.root, listing.inside()
    if not (parts := _parts(inside)):
        return "", ""
    if "train" not in parts:
        found = ", ".join(sorted(inside[""]))
        raise ValueError(f"{root} holds {found} and no train: give the folder that is meant")
    train, val = parts["train"], parts.get("val", [""])
    for names in (train, val):
        if len(names) > 1:
            raise ValueError(f"{root} holds {' and '.join(names)}: only one of them can be used")
    others = sorted(inside[""] - {*train})
    if others and len(parts) == 1:
        raise ValueError(
            f"{root} holds {others[0]} beside {train[0]}, which has folders: give {root / train[0]} if these "
            f"are the classes; if {train[0]} is a class, put its images directly into it"
        )
    return train[0], val[0]


def _in_classes(listing, reading, class_names=None):
    """The `ImageFolder` of a listing, and (path, reason) of the images that are not in it."""
    by_class = {}
    for folder, names in listing.images.items():
        by_class.setdefault(folder.split("/")[0], []).extend(f"{folder}/{name}" for name in names)
    found = sorted(name for name, images in by_class.items() if name and images)
    if class_names is None:
        _check_classes(listing)
        class_names = tuple(found)
    images = [sorted(by_class.get(name, ())) for name in class_names]
    labels = np.repeat(np.arange(len(images)), [len(names) for names in images])
    names = tuple(name for names in images for name in names)
    unused = [(name, "no such class") for name in found if name not in class_names]
    return ImageFolder(listing.root, class_names, names, labels, reading), listing.apart() + unused


def _check_classes(listing):
    """Refuse a listing without classes, or with folders that are none."""
    root, inside = listing.root, listing.inside()
    if count := len({folder.split("/")[0] for folder in listing.images} - {""}):
        if not inside[""]:
            raise ValueError(f"{root} has {count} class sub-folders but no images in them")
    else:
        raise ValueError(f"{root} has no class sub-folders: images must lie in {root}/CLASS/, one is enough")
    for folder in sorted(inside):
        if parts := _parts(inside, folder):
            names, meant = ", ".join(sum(parts.values(), [])), root / folder if folder else "one of them"
            raise ValueError(f"{root / folder} holds {names}, which are no classes: give {meant}")
    folders = [folder for folder, names in listing.images.items() if names and folder]
    around = os.path.commonpath(folders)
    if around and around not in folders:
        raise ValueError(
            f"{root} has one class, with its images in {len(folders)} folders in {root / around}: give that "
            "if these are the classes; if not, put the images of the class into one folder"
        )


def _told(unused):
    """(path, reason) pairs as a tuple of texts, one for each reason."""
    by_reason = {}
    for path, reason in sorted(unused):
        by_reason.setdefault(reason, []).append(path)
    more = {reason: f" and {len(paths) - 3} more" * (len(paths) > 3) for reason, paths in by_reason.items()}
    return tuple(f"{', '.join(paths[:3])}{more[reason]} ({reason})" for reason, paths in by_reason.items())


def list_images(root, reading=Reading(), endings=EXTENSIONS):
    """The `ImageFolder` at ROOT/CLASS/IMAGE; hidden folders and classes without images are left out.

    Raises:
        ValueError: no sub-folders, no images in them, or folders that are no classes.
    """
    listing = once(lambda: list_files(Path(root), endings))
    folder, unused = _in_classes(listing, reading)
    return replace(folder, left_out=_told(listing.unusable + unused))


def split_folder(path, val_fraction=None, reading=Reading()):
    """The training images of a folder and those held out, two `ImageFolder`s with the same classes.

    These are PATH/train and PATH/val (or as PARTS spells them). Where val has no images of train's classes,
    `held_out` splits PATH/train, or PATH; `val_fraction` is as in `val_fraction_of`. The second is None if
    nothing is held out.

    Raises:
        ValueError: no classes, no images, or folders that may be meant in two ways.
    """
    listing = once(lambda: list_files(Path(path), EXTENSIONS))
    first, second = _train_and_val(listing)
    train, unused = _in_classes(listing.below(first) if first else listing, reading)
    val = ()
    if first:
        beside = listing.inside()[""] - {first, second}
        unused = [(f"{first}/{path}", reason) for path, reason in unused] + listing.apart()
        unused += [(name, f"beside {first}") for name in beside]
    if second:
        val, more = _in_classes(listing.below(second), reading, train.class_names)
        unused += [(f"{second}/{path}", reason) for path, reason in more]
    train = replace(train, left_out=_told(listing.unusable + unused))
    if not val:
        mask = held_out(train.names, train.labels, val_fraction_of(val_fraction, reading.published))
        train, val = train.subset(~mask), train.subset(mask)
    return train, val or None


# Held-out images.


def held_out(names, labels, fraction):
    """Which images are held out of training, bool [N]: about `fraction` of them, by a hash of the name.

    Whether an image is held out depends on its class folder and file name (without the suffix) alone, but for
    the last image of a class, which is trained on.
    """
    stems = (PurePath(name).with_suffix("").as_posix() for name in names)
    digests = (hashlib.sha256(os.fsencode(stem)).digest() for stem in stems)
    hashes = np.array([int.from_bytes(digest[:4], "big") for digest in digests], dtype=np.uint64)
    largest = np.zeros(max(labels) + 1, dtype=np.uint64)
    np.maximum.at(largest, labels, hashes)
    return (hashes < fraction * 2**32) & (hashes < largest[labels])


def val_fraction_of(stated, published):
    """The fraction to hold out: as stated, else VAL_FRACTION, or nothing of data read as published."""
    return (0.0 if published else VAL_FRACTION) if stated is None else stated


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
