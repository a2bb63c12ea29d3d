"""Folders of images: classes, what is left out, and which images are held out of training."""

import os

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import ALONE, SIZE

from util.folders import held_out, list_images, split_folder, summary, without_unreadable
from util.images import Reading


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folder_lists_sorted_names_and_labels_by_sorted_class(tmp_path):
    """Classes without images, and what systems hide in folders, are left out and named."""
    touch(tmp_path, "c/2.png", "c/10.JPG", "a/deep/x.webp", "a/y.png", "c/a.txt", "b/readme.md", "loose.png")
    touch(tmp_path, ".x/z.png", "__MACOSX/a/._y.png", "a/._y.png", "a/.thumbnails/y.png")
    folder = list_images(tmp_path)
    assert folder.class_names == ("a", "c")
    assert folder.names == ("a/deep/x.webp", "a/y.png", "c/10.JPG", "c/2.png")
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert folder.left_out == (
        ".x, __MACOSX, a/._y.png and 1 more (hidden)", "b (no images)", "b/readme.md (.md)", "c/a.txt (.txt)",
        "loose.png (in no class folder)",
    )
    lines = summary("DATA", folder.class_names, folder, left_out=folder.left_out[1:3]).splitlines()
    assert lines[:2] == ["DATA: 4 training images, 0 held out; 2 classes", "  a 2, c 2"]
    assert lines[2:] == ["  left out: b (no images), b/readme.md (.md)"]


# (files, or "link -> target") -> training classes and images, images held out, what is left out
USED = {
    "validation": ("train/a/1.png validation/a/2.png", ["a"], 1, ["a/2.png"], []),
    "capitals": ("Train/a/1.png Val/a/2.png", ["a"], 1, ["a/2.png"], []),
    "words": ("img_train/a/1.png img_val/a/2.png", ["a"], 1, ["a/2.png"], []),
    "class of val unknown": ("train/a/1.png val/b/2.png", ["a"], 1, None, ["val/b (no such class)"]),
    "flat val": ("train/a/1.png val/2.png val/3.png", ["a"], 1, None, ["val/2.png, val/3.png (in no class"]),
    "test": ("train/a/1.png test/a/2.png x.csv", ["a"], 1, None, ["test/a/2.png (beside", "x.csv (.csv)"]),
    "Kaggle": ("training_set/a/1.png test_set/a/2.png", ["a"], 1, None, ["test_set/a/2.png (beside"]),
    "sets": ("trainset/a/1.png val_images/a/2.png", ["a"], 1, ["a/2.png"], []),
    "few views": ("a/l/1.png a/r/1.png b/l/1.png b/r/1.png", ["a", "b"], 4, None, []),
    "tiny imagenet": ("train/a/images/1.png val/images/2.png", ["a"], 1, None, ["val/images (no such"]),
    "linked folder": ("a/1.png b/2.png b/3.png a/more->../b", ["a", "b"], 5, None, []),
    "link upwards": ("a/1.png a/up->..", ["a"], 1, None, ["a/up (a link to a folder above it)"]),
    "broken link": ("a/1.png a/2.png->gone", ["a"], 1, None, ["a/2.png (broken link or not a file)"]),
    "endings": ("a/1.PGM a/2.jfif a/3.heic a/4", ["a"], 2, None, ["a/3.heic (.heic)", "a/4 (no ending)"]),
    "system folders": ("a/1.png a/@eaDir/2.png lost+found/a.png", ["a"], 1, None, ["a/@eaDir, lost+found"]),
    "a class of trains": ("train/1.png bus/1.png", ["bus", "train"], 2, None, []),
    "a folder of tests": ("test/1.png", ["test"], 1, None, []),
}


def make(root, files):
    for name, _, target in (file.partition("->") for file in files.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target) if target else (root / name).touch()


@pytest.mark.parametrize("case", USED)
def test_what_lies_in_a_folder_is_used_or_named_with_the_reason(case, tmp_path):
    files, class_names, count, val_names, left_out = USED[case]
    make(tmp_path, files)
    train, val = split_folder(tmp_path, 0)
    assert (list(train.class_names), len(train), val and list(val.names)) == (class_names, count, val_names)
    assert len(train.left_out) == len(left_out)
    assert all(text.startswith(start) for text, start in zip(train.left_out, left_out, strict=True))


REFUSED = {
    "": "no class sub-folders with images",
    "1.png a/2.txt": "no class sub-folders with images, .*: one is enough; a .no images.; a/2.txt",
    "I/Data/train/a/1.png I/Data/val/1.png I/s.csv": "train, val in .*/I/Data: give that folder",
    "mnist/train/a/1.png mnist/val/a/1.png cifar/a/1.png": "train, val in .*/mnist: give that folder",
    "imagenet/train/a/1.png imagenet/train/b/1.png": "train in .*/imagenet: give that folder",
    "imagenet/a/1.png imagenet/b/1.png": "one class, its images in several folders: give .*/imagenet or",
    "train/1.png val/1.png": "no class sub-folders with images, .*/train/CLASS/IMAGE",
    "val/a/1.png test/a/1.png": "test, val and no train",
    "train/a/1.png val/a/1.png valid/a/1.png": "train, val, valid: one of each kind",
    "photo/a/1.png photo/b/1.png photo/c/1.png art/a/1.png art/b/1.png art/c/1.png":
        "the same folders in art, photo: give one",
    "00000/img0.png 00001/img1.png dataset.json": "dataset.json, in which StyleGAN's tool keeps the classes",
    "train/steam/1.png bus/1.png": "bus beside folders in train: give .*/train or",
}


@pytest.mark.parametrize("files", REFUSED)
def test_folder_that_may_be_meant_in_two_ways_is_refused_by_name(files, tmp_path):
    make(tmp_path, files)
    with pytest.raises(ValueError, match=f"{tmp_path} holds {REFUSED[files]}"):
        split_folder(tmp_path)
    if "train" in files:
        with pytest.raises(ValueError, match=f"{tmp_path} holds "):
            list_images(tmp_path)


def test_folder_is_listed_once_by_the_first_process(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png a/2.png b/3.png")
    sent, scans, scan = [], [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scan(path))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: len(sent))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda made, **_: sent.append(made[0]))
    first = split_folder(tmp_path, 0)[0]
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda made, **_: made.insert(0, *sent))
    assert split_folder(tmp_path, 0)[0].names == first.names and len(scans) == 3


NAMES = sorted(f"{name}/{i}.png" for name in "ab" for i in range(1000))


def test_whether_an_image_is_held_out_depends_on_its_name_alone():
    """About the fraction asked for: 30 images are three standard deviations. A smaller fraction is a part."""
    labels = np.arange(2).repeat(1000)
    mask = held_out(NAMES, labels, 0.05)
    assert abs(mask.sum() - 100) < 30 and mask[:1000].any() and mask[1000:].any()
    assert np.array_equal(held_out(NAMES[::-1], labels[::-1], 0.05), mask[::-1])
    assert np.array_equal(held_out([name.replace(".png", ".webp") for name in NAMES], labels, 0.05), mask)
    assert (held_out(NAMES, labels, 0.1) | ~mask).all() and not held_out(NAMES, labels, 0).any()
    each = held_out(NAMES, np.arange(2000) // 2, 0.9)  # 1000 classes of two
    assert each.any() and not each.reshape(-1, 2).all(axis=1).any()  # that each keep one


def test_folder_is_split_by_names_unless_it_is_read_as_published(tmp_path):
    touch(tmp_path, *NAMES)
    train, val = split_folder(tmp_path)
    mask = held_out(NAMES, np.arange(2).repeat(1000), 0.05)
    assert val.names == tuple(np.array(NAMES)[mask]) and len(train) + len(val) == 2000
    assert (train.class_names, set(val.labels)) == (val.class_names, {0, 1})
    for given in ({"val_fraction": 0}, {"reading": Reading(published=True)}):
        train, val = split_folder(tmp_path, **given)
        assert len(train) == 2000 and val is None
    assert len(split_folder(tmp_path, 0.5, Reading(published=True))[1]) > 900


def test_val_folder_is_held_out_with_the_classes_of_train(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/2.png", "val/d/1.png")
    train, val = split_folder(tmp_path)
    assert len(train) == 3 and (val.names, val.labels.tolist()) == (("b/2.png",), [1])
    assert val.class_names == train.class_names and train.left_out == ("val/d (no such class)",)


def test_unreadable_images_are_named_counted_and_left_out(tmp_path, capsys):
    helpers.write_images(tmp_path, 2)
    (tmp_path / "01_noise/1.png").write_bytes(b"no picture")
    folder = without_unreadable(list_images(tmp_path), SIZE, ALONE, num_workers=0)
    assert (len(folder), folder.labels.tolist()) == (5, [0, 0, 1, 2, 2])
    assert "01_noise/1.png" not in folder.names
    printed = capsys.readouterr().err
    assert "01_noise/1.png: cannot identify" in printed and "1 unreadable images left out" in printed


def test_of_many_classes_the_smallest_and_the_largest_are_shown(tmp_path):
    touch(tmp_path, *(f"{k:02d}/{i}.png" for k in range(30) for i in range(1 + (k == 7) + 2 * (k == 9))))
    folder = list_images(tmp_path)
    assert "from 1 (00) to 3 (09) in each" in summary("DATA", folder.class_names, folder)


@pytest.fixture
def damaged(tmp_path):
    """An image folder of 9 images without val/, one of them not an image."""
    helpers.write_images(tmp_path / "data", 3)
    (tmp_path / "data/01_noise/1.png").write_bytes(b"no picture")
    return tmp_path / "data"


@pytest.mark.parametrize("program", ["stats", "tokenizer", "lpd"])
def test_programs_leave_unreadable_images_out_on_request(damaged, tmp_path, program):
    data, out = {"data_path": damaged, "img_size": SIZE, "val_fraction": 0}, tmp_path / "out"
    stats = {"features": "efficientnet_lite0", "output_file": out / "s.npz"}
    flags = {
        "stats": lambda: [*helpers.words_of({**data, **stats}), *helpers.ON_CPU],
        "tokenizer": lambda: helpers.tokenizer_flags(out, **data, batch_size=4),
        "lpd": lambda: helpers.train_flags(
            out, **data, cached_path=None, vqgan_path=helpers.tokenizer(), epochs=1
        ),
    }[program]()
    refused = helpers.call(program, *flags)
    assert refused.status == 1 and "error: " in refused.err and "01_noise/1.png" in refused.err
    outcome = processes.finished(helpers.call(program, *flags, "--skip_unreadable"))
    assert "1 unreadable images left out" in outcome.err
    assert "8 training images, 0 held out; 3 classes" in outcome.out
