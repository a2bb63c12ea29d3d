"""Images in and out: the centre crop by hand, pixels in two forms, folders, files that cannot be read."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from util.images import (
    UnreadableImage,
    center_crop,
    image_loader,
    in_order,
    list_images,
    load_image,
    readable_pixels,
    split_folder,
    to_uint8,
    to_unit,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def means_of_boxes(pixels):
    """Means of 2x2 boxes as PIL rounds them, half up, first along the rows: uint8 [H / 2, W / 2, 3]."""
    pixels = pixels.astype(int)
    pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
    return ((pixels[::2] + pixels[1::2] + 1) // 2).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_crop_of_a_picture_of_the_size_is_the_picture():
    pixels = noise(8, 8)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels)


def test_crop_halves_with_a_box_filter_while_twice_as_large():
    pixels = noise(32, 32)
    once, twice = means_of_boxes(pixels), means_of_boxes(means_of_boxes(pixels))
    assert np.array_equal(center_crop(Image.fromarray(pixels), 16), once)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), twice)


def test_crop_takes_the_middle_of_the_long_side():
    wide = noise(6, 14)
    assert np.array_equal(center_crop(Image.fromarray(wide), 6), wide[:, 4:10])
    tall = noise(15, 6)
    assert np.array_equal(center_crop(Image.fromarray(tall), 6), tall[4:10])  # of 9 to spare, 4 above


def test_crop_scales_the_short_side_to_the_size_bicubically():
    pixels = noise(12, 24)
    resized = np.array(Image.fromarray(pixels).resize((16, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), resized[:, 4:12])


@pytest.mark.parametrize("width,height", [(1, 1), (3, 2), (7, 100), (33, 31)])
def test_crop_of_any_picture_has_the_size(width, height):
    assert center_crop(Image.fromarray(noise(height, width)), 10).shape == (10, 10, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_picture_of_any_mode_is_read_as_three_channels(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.new("I;16", (9, 9)) if mode == "I;16" else Image.fromarray(noise(9, 9)).convert(mode)
    image.save(path)
    pixels = load_image(path, 6)
    assert pixels.shape == (6, 6, 3) and pixels.dtype == np.uint8


def test_every_grey_level_survives_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    unit = to_unit(levels)
    assert unit.shape == (1, 3, 16, 16) and (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(to_uint8(unit).numpy(), levels)


def test_pixels_beyond_the_range_are_clamped():
    pixels = torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.01]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]  # 127.5 rounds to the even 128


def test_folder_lists_names_sorted_with_labels_by_sorted_class(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/deep/x.webp", "a/y.png", "b/notes.txt", ".hidden/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loose.png").touch()
    folder = list_images(tmp_path)
    assert folder.class_names == ("a", "b")
    assert folder.names == ("a/deep/x.webp", "a/y.png", "b/10.JPG", "b/2.png")
    assert folder.labels.tolist() == [0, 0, 1, 1]


def test_class_without_images_keeps_its_label(tmp_path):
    (tmp_path / "a").mkdir()
    save(tmp_path / "b/1.png", noise(4, 4))
    assert list_images(tmp_path).labels.tolist() == [1]


def test_folder_without_classes_or_images_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no class sub-folders"):
        list_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} has 1 class sub-folders but no images"):
        list_images(tmp_path)


def test_split_is_taken_where_it_is(tmp_path):
    assert split_folder(tmp_path, "val") == tmp_path
    (tmp_path / "val").mkdir()
    assert split_folder(tmp_path, "val") == tmp_path / "val"


@pytest.mark.parametrize("damage", ["empty", "cut short", "text", "missing"])
def test_unreadable_picture_is_named(tmp_path, damage):
    path = tmp_path / "cat.png"
    save(path, noise(32, 32))
    content = {"empty": b"", "cut short": path.read_bytes()[:1000], "text": b"no picture"}.get(damage)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UnreadableImage, match="cat.png"):
        load_image(path, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # below PIL's error, above ours
@pytest.mark.parametrize(
    "sides,word",
    [
        ((30000, 30000), "900000000 pixels"),
        ((12000, 12000), "12000x12000: has 144000000 pixels"),
        ((1, 6000000), "6000000: would have, its short side 256, 393216000000 pixels"),
        ((2**21, 3), "would have, its short side 256, 45812984320 pixels"),
    ],
)
def test_picture_of_absurd_sides_is_refused_before_memory_is_taken(tmp_path, sides, word):
    """A PNG of a few bytes that claims so; the narrow ones would grow when the short side becomes 256."""
    header = b"IHDR" + struct.pack(">II5B", *sides, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(bytes(10**4))
    bomb += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=f"bomb.png: .*{word}"):
        load_image(tmp_path / "bomb.png", 256)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_picture_that_is_a_program_is_refused(tmp_path):
    """PostScript under a picture's name: PIL would hand it to Ghostscript."""
    (tmp_path / "cat.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UnreadableImage, match="cat.png: cannot identify"):
        load_image(tmp_path / "cat.png", 8)


def test_loader_gives_the_asked_batches_and_mirrors_view_one(tmp_path):
    for i in range(3):
        save(tmp_path / f"a/{i}.png", noise(4, 4, seed=i))
    loader = image_loader(list_images(tmp_path), 4, [([2, 0], [0, 1]), ([1], [0])], num_workers=0)
    first, second = (readable_pixels(items) for items in loader)
    assert first[0] == [2, 0] and second[0] == [1]
    assert np.array_equal(first[1], np.stack([noise(4, 4, seed=2), noise(4, 4, seed=0)[:, ::-1]]))


def test_unreadable_picture_does_not_stop_the_loader_but_whoever_needs_its_pixels(tmp_path):
    save(tmp_path / "a/0.png", noise(4, 4))
    (tmp_path / "a/1.png").write_bytes(b"")
    (items,) = image_loader(list_images(tmp_path), 4, [([0, 1], [0, 0])], num_workers=0)
    assert [i for i, _ in items] == [0, 1]
    with pytest.raises(UnreadableImage, match="1.png"):
        readable_pixels(items)


def test_batches_in_order_hold_each_index_once_and_mirror_none():
    assert list(in_order(range(3, 8), 2)) == [([3, 4], [0, 0]), ([5, 6], [0, 0]), ([7], [0])]
