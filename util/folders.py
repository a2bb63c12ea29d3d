"""Sets of images: their classes and names, what is left out, and which images are held out of training.

Everything that lies in a folder or an archive is either used or named with the reason.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.distributed import gather_objects, once, warn
from util.images import EXTENSIONS, Reading, image_loader, in_order
from util.sources import Archives, Folder, folders_in, open_source

VAL_FRACTION = 0.05  # held out where there is no val folder and nothing else is said
# What parts of a data set are called: the last word of a folder's name, as in Val, ILSVRC2012_img_train or
# training_set, that does not only say what is inside.
PARTS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PARTS |= {name: name for name in ("train", "val", "test")}
CONTENTS = ("", "data", "image", "images", "img")  # without the ending "set"


@dataclass(frozen=True)
class ImageSet:
    """Images of a folder or of archives: one sub-folder per class, labels in sorted order of their names,
    unless the archives number the classes.

    `names` are paths below `part` of the source, sorted; `labels` int64 [N], one for each name. `left_out`
    says what else lies there, and why it is not used.
    """

    root: Path
    source: Folder | Archives
    part: str
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    reading: Reading = Reading()
    left_out: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self):
        return len(self.names)

    def file(self, i):
        """Image i, as `read_image` takes it: a Path or a `Member`, with `read_bytes` and a name as str."""
        return self.source.file(os.path.join(self.part, self.names[i]))

    def subset(self, chosen):
        """The set with only the images of `chosen`, bool [N]."""
        names = tuple(name for name, keep in zip(self.names, chosen, strict=True) if keep)
        return replace(self, names=names, labels=self.labels[chosen])


# What it means: parts of a data set, and classes.


def _parts(inside, folder=""):
    """train, val, test -> the folders called so in a folder, if that is a data set: if there are two kinds of
    them, or one holds folders. Else empty."""
    parts = {}
    for name in sorted(inside.get(folder, ())):
        words = [word.removesuffix("set") for word in re.findall("[a-z]+", name.lower())]
        part = PARTS.get(next((word for word in reversed(words) if word not in CONTENTS), ""))
        if part:
            parts.setdefault(part, []).append(name)
    nested = any(os.path.join(folder, name) in inside for names in parts.values() for name in names)
    return parts if nested or len(parts) > 1 else {}


def _train_and_val(root, found):
    """The names of the folders to train on and to hold out; empty for the whole, and for none. Raises
    ValueError, naming what may be meant, if folders are not classes or may be meant in two ways."""
    inside = folders_in(found)
    parts, places = _parts(inside), {os.path.dirname(path) for path, reason in found if not reason}
    (train, *more), (val, *others) = (parts.get(name, [""]) for name in ("train", "val"))
    beside, classes = inside[""] - {train}, inside.get(train, ())
    below = [folder for folder in {*inside, *places} if folder and folder.startswith(os.path.join(train, ""))]
    lower = min((folder for folder in below if _parts(inside, folder)), default=None)
    around = os.path.commonpath(places.intersection(below) or [""])
    within = {frozenset(inside.get(os.path.join(train, name), ())) for name in classes}
    if lower:
        problem = f"{', '.join(sorted(inside[lower]))} in {root / lower}: give that folder"
    elif parts and not train:
        problem = f"{', '.join(sorted(beside))} and no train: give the folder that is meant"
    elif more or others:
        problem = f"{', '.join(parts['train'] + parts.get('val', []))}: one of each kind can be used"
    elif len(parts) == 1 and beside:
        problem = f"{min(beside)} beside folders in {train}: give {root / train} or put its images together"
    elif not classes:
        needed = f"no class sub-folders with images, {root / train}/CLASS/IMAGE: one is enough"
        problem = "; ".join([needed, *_told(pair for pair in found if pair[1])])
    elif len(classes) == 1 and around not in places:
        problem = f"one class, its images in several folders: give {root / around} or put them together"
    elif len(within) == 1 and len(*within) > len(classes) > 1:
        problem = f"the same folders in {', '.join(sorted(classes))}: give one of these"
    elif "00000" in classes and ("dataset.json", ".json") in found:
        problem = "dataset.json, in which StyleGAN's tool keeps the classes: its folders are none"
    else:
        return train, val
    raise ValueError(f"{root} holds {problem}")


def _meant(root, source, found):
    """`_train_and_val` of a source."""
    train, val = _train_and_val(root, source.outline(found))
    if source.labelled_sets and not train:
        raise ValueError(f"{root} holds {', '.join(source.labelled_sets)}: give the files of one of them")
    return train, val


def _use(root, source, found, reading, parts=("", "")):
    """The `ImageSet`s of the folders that `_train_and_val` chose; the second may be empty."""
    train, val = parts
    images, unused = {train: {}, val: {}}, []
    for path, reason in found:
        part = path.split("/")[0] if train else ""
        name = path[len(part) :].lstrip("/")
        class_name, in_class, _ = name.partition("/")
        if not reason and part not in images:
            reason = f"beside {train}"
        elif not reason and not in_class:
            reason = "in no class folder"
        if reason:
            unused.append((path, reason))
        else:
            images[part].setdefault(class_name, []).append(name)
    class_names = source.class_names or tuple(sorted(images[train]))
    unused += [(f"{val}/{name}", "no such class") for name in images[val] if name not in class_names]
    sets, left_out = [], _told(unused)
    for part in parts:
        by_class = [sorted(images[part].get(name, ())) for name in class_names]
        labels = np.repeat(np.arange(len(class_names)), [len(names) for names in by_class])
        names = tuple(name for names in by_class for name in names)
        sets.append(ImageSet(root / part, source, part, class_names, names, labels, reading, left_out))
    return sets


def _told(unused):
    """(path, reason) pairs as a tuple of texts, one for each reason."""
    by_reason = {}
    for path, reason in sorted(unused):
        by_reason.setdefault(reason, []).append(path)
    more = {reason: f" and {len(paths) - 3} more" * (len(paths) > 3) for reason, paths in by_reason.items()}
    return tuple(f"{', '.join(paths[:3])}{more[reason]} ({reason})" for reason, paths in by_reason.items())


def list_images(path, reading=Reading(), endings=EXTENSIONS):
    """The `ImageSet` at PATH/CLASS/IMAGE; hidden folders and classes without images are left out. Raises
    ValueError: no images in sub-folders, or sub-folders that are not classes."""
    path = Path(path)
    source, found = once(lambda: open_source(path, endings=endings))
    if any(parts := _meant(path, source, found)):
        raise ValueError(f"{path} holds {' and '.join(filter(None, parts))}, not classes: give one of them")
    return _use(path, source, found, reading)[0]


def all_images(path, reading=Reading()):
    """Every image of a source at any depth, sorted by its name, as one `ImageSet` of a class without a name.
    Raises ValueError: there are none."""
    path = Path(path)
    source, found = once(lambda: open_source(path))
    names = tuple(sorted(name for name, reason in found if not reason))
    left_out = _told(pair for pair in found if pair[1])
    if not names:
        raise ValueError("; ".join([f"{path} holds no images", *left_out]))
    return ImageSet(path, source, "", ("",), names, np.zeros(len(names), np.int64), reading, left_out)


def split_folder(path, val_fraction=None, reading=Reading(), *, beside=None):
    """The training images of a source and those held out, two `ImageSet`s with the same classes.

    These are PATH/train and PATH/val, or as PARTS spells them. If no image of val is in a class of train,
    `held_out` splits PATH/train, or PATH; `val_fraction` is as in `val_fraction_of`. The second is None if
    nothing is held out. `beside` is an output, next to which an index may be kept. Raises ValueError: no
    images in classes, or folders that may be meant in two ways; and as `open_source`.
    """
    path = Path(path)
    source, found = once(lambda: open_source(path, beside=beside))
    parts = _meant(path, source, found)
    train, val = _use(path, source, found, reading, parts)
    if not (parts[1] and val):
        mask = held_out(train.names, train.labels, val_fraction_of(val_fraction, reading.published))
        train, val = train.subset(~mask), train.subset(mask)
    return train, val or None


# Held-out images.


def held_out(names, labels, fraction):
    """Which images are held out of training, bool [N]: about `fraction` of them, by a hash of the name.

    Whether an image is held out depends on its class folder and file name (without the suffix) alone, but for
    the last image of a class, which is trained on.
    """
    stems = (os.path.splitext(name)[0] for name in names)
    digests = (hashlib.sha256(os.fsencode(stem)).digest() for stem in stems)
    hashes = np.array([int.from_bytes(digest[:4], "big") for digest in digests], dtype=np.uint64)
    largest = np.zeros(labels.max() + 1, dtype=np.uint64)
    np.maximum.at(largest, labels, hashes)
    return (hashes < fraction * 2**32) & (hashes < largest[labels])


def val_fraction_of(stated, published):
    """The fraction to hold out: as stated, else VAL_FRACTION, or nothing of data read as published."""
    return (0.0 if published else VAL_FRACTION) if stated is None else stated


# What is in a folder.


def listing(head, class_names, labels, left_out=(), most=20):
    """Lines for the start of a program: `head`, the classes with their counts (of more than `most` classes
    only the extremes), and what was left out."""
    counts = np.bincount(labels, minlength=len(class_names))
    each = [f"{name} {count}" for name, count in zip(class_names, counts, strict=True)]
    if len(each) > most:
        few, many = counts.argmin(), counts.argmax()
        each = [f"from {counts[few]} ({class_names[few]}) to {counts[many]} ({class_names[many]}) in each"]
    lines = [f"{head}; {len(class_names)} classes", f"  {', '.join(each)}"]
    return "\n".join(lines + [f"  left out: {', '.join(left_out)}"] * bool(left_out))


def summary(place, class_names, train, val=None, left_out=()):
    """A `listing` that says how many images there are to train on and held out; both have `labels`."""
    held = val.labels if val else train.labels[:0]
    head = f"{place}: {len(train.labels)} training images, {len(held)} held out"
    return listing(head, class_names, np.concatenate([train.labels, held]), left_out)


def without_unreadable(images, size, world, num_workers):
    """The set without its unreadable images, which are named on stderr and counted. Each process reads its
    share of the images, and all get the same set."""
    own = range(len(images))[world.rank :: world.size]
    loader = image_loader(images, size, in_order(own, 64), num_workers)
    with tqdm(total=len(own), unit="img", desc="unreadable?", disable=not world.is_main) as progress:
        errors = []
        for items in loader:
            errors += [(i, reason) for i, reason in items if isinstance(reason, str)]
            progress.update(len(items))
    errors = sorted(error for part in gather_objects(errors) for error in part)
    for _, reason in errors:
        warn(f"unreadable: {reason}")
    warn(f"{images.root}: {len(errors)} unreadable images left out")
    good = np.ones(len(images), bool)
    good[[i for i, _ in errors]] = False
    return images.subset(good)
