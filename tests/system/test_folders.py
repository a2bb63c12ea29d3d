"""Folders of images: classes, what is left out, and which images are held out of training."""

import helpers
import numpy as np
import processes
import pytest
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
    assert folder.left_out == (".x (no class)", "__MACOSX (no class)", "b (no images)")
    assert summary("DATA", folder.class_names, folder, left_out=folder.left_out).splitlines() == [
        "DATA: 4 training images, 0 held out; 2 classes", "  a 2, c 2",
        "  left out: .x (no class), __MACOSX (no class), b (no images)",
    ]


def test_folder_without_classes_or_images_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no class sub-folders"):
        list_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} has 1 class sub-folders but no images"):
        list_images(tmp_path)


NAMES = sorted(f"{name}/{i}.png" for name in "ab" for i in range(1000))


def test_whether_an_image_is_held_out_depends_on_its_name_alone():
    """About the fraction asked for: 30 images are three standard deviations. A smaller fraction is a part."""
    mask = held_out(NAMES, 0.05)
    assert abs(mask.sum() - 100) < 30 and mask[:1000].any() and mask[1000:].any()
    assert np.array_equal(held_out(NAMES[::-1], 0.05), mask[::-1])
    assert np.array_equal(held_out([name.replace(".png", ".webp") for name in NAMES], 0.05), mask)
    assert (held_out(NAMES, 0.1) | ~mask).all() and not held_out(NAMES, 0).any()


def test_folder_is_split_by_names_unless_it_is_read_as_published(tmp_path):
    touch(tmp_path, *NAMES)
    train, val = split_folder(tmp_path)
    assert val.names == tuple(np.array(NAMES)[held_out(NAMES, 0.05)]) and len(train) + len(val) == 2000
    assert (train.class_names, set(val.labels)) == (val.class_names, {0, 1})
    for given in ({"val_fraction": 0}, {"reading": Reading(published=True)}):
        train, val = split_folder(tmp_path, **given)
        assert len(train) == 2000 and val is None
    assert len(split_folder(tmp_path, 0.5, Reading(published=True))[1]) > 900
    with pytest.raises(ValueError, match="all 2000 images are held out"):
        split_folder(tmp_path, 1)


def test_val_folder_is_held_out_with_the_classes_of_train(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/2.png", "val/d/1.png")
    train, val = split_folder(tmp_path)
    assert len(train) == 3 and (val.names, val.labels.tolist()) == (("b/2.png",), [1])
    assert val.class_names == train.class_names and train.left_out == ("val/d (no such class)",)


def test_folder_named_train_or_val_without_classes_in_it_is_no_split(tmp_path):
    """A class of trains; ImageNet's validation images as one flat folder."""
    touch(tmp_path, "vehicles/train/1.png", "vehicles/bus/1.png", "flat/train/a/1.png", "flat/val/1.png")
    train, _ = split_folder(tmp_path / "vehicles", 0)
    assert train.class_names == ("bus", "train")
    train, val = split_folder(tmp_path / "flat", 0)
    assert train.root == tmp_path / "flat/train" and val is None


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
    """An image folder of 9 images without val/, one of them no image."""
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
