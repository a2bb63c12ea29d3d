"""Images in and out: the centre crop by hand, pixels in two forms, folders, files that cannot be read."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from util import images
from util.images import UnreadableImage, center_crop, load_image


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def means_of_boxes(pixels):
    """Means of 2x2 boxes as PIL rounds them, half up, first along the rows: uint8 [H / 2, W / 2, 3]."""
    pixels = pixels.astype(int)
    pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
    return ((pixels[::2] + pixels[1::2] + 1) // 2).astype(np.uint8)


def test_crop_halves_with_a_box_filter_while_the_image_is_twice_as_large():
    pixels = noise(32, 32)
    once, twice = means_of_boxes(pixels), means_of_boxes(means_of_boxes(pixels))
    for size, expected in ((32, pixels), (16, once), (8, twice)):
        assert np.array_equal(center_crop(Image.fromarray(pixels), size), expected)


def test_crop_scales_the_short_side_bicubically_and_takes_the_middle_of_the_long_one():
    tall = noise(15, 6)
    assert np.array_equal(center_crop(Image.fromarray(tall), 6), tall[4:10])  # of 9 spare rows, 4 above
    pixels = noise(12, 24)
    resized = np.array(Image.fromarray(pixels).resize((16, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), resized[:, 4:12])
    for width, height in ((1, 1), (3, 2), (7, 100), (33, 31)):
        assert center_crop(Image.fromarray(noise(height, width)), 10).shape == (10, 10, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_image_of_any_mode_is_read_as_three_channels(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.new("I;16", (9, 9)) if mode == "I;16" else Image.fromarray(noise(9, 9)).convert(mode)
    image.save(path)
    pixels = load_image(path, 6)
    assert pixels.shape == (6, 6, 3) and pixels.dtype == np.uint8


def test_grey_levels_survive_the_way_to_floats_and_back_and_others_are_clamped():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    unit = images.to_unit(levels)
    assert unit.shape == (1, 3, 16, 16) and (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(images.to_uint8(unit).numpy(), levels)
    beyond = torch.tensor([-7.0, 0.0, 1.01]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert images.to_uint8(beyond)[0, 0, :, 0].tolist() == [0, 128, 255]  # 127.5 rounds to the even 128


def test_folder_lists_sorted_names_and_labels_by_sorted_class(tmp_path):
    """The class without images keeps its label; other files and hidden folders are left out."""
    names = ["c/2.png", "c/10.JPG", "a/deep/x.webp", "a/y.png"]
    for name in [*names, "c/a.txt", ".x/z.png", "loose.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b").mkdir()
    folder = images.list_images(tmp_path)
    assert folder.class_names == ("a", "b", "c")
    assert folder.names == ("a/deep/x.webp", "a/y.png", "c/10.JPG", "c/2.png")
    assert folder.labels.tolist() == [0, 0, 2, 2]


def test_folder_without_classes_or_images_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no class sub-folders"):
        images.list_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} has 1 class sub-folders but no images"):
        images.list_images(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "truncated", "postscript", "missing"])
def test_unreadable_image_is_named(tmp_path, damage):
    """PostScript too: PIL would hand it to Ghostscript, which runs it."""
    path = tmp_path / "cat.png"
    Image.fromarray(noise(32, 32)).save(path)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    contents = {"empty": b"", "truncated": path.read_bytes()[:1000], "postscript": postscript}
    path.unlink() if damage == "missing" else path.write_bytes(contents[damage])
    with pytest.raises(UnreadableImage, match="cat.png: (cannot identify|image file is trunc|.*No such)"):
        load_image(path, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # below PIL's error, above ours
@pytest.mark.parametrize(
    "sides,message",
    [
        ((30000, 30000), "900000000 pixels"),
        ((12000, 12000), "12000x12000: has 144000000 pixels"),
        ((1, 6000000), "6000000: would have, its short side 256, 393216000000 pixels"),
    ],
)
def test_image_of_too_many_pixels_is_refused_before_memory_is_taken(tmp_path, sides, message):
    """A PNG of a few bytes that claims so; the narrow one would grow when its short side becomes 256."""
    header = b"IHDR" + struct.pack(">II5B", *sides, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(bytes(10**4))
    bomb += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=f"bomb.png: .*{message}"):
        load_image(tmp_path / "bomb.png", 256)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_loader_mirrors_view_one_and_leaves_an_unreadable_image_to_whoever_needs_it(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(noise(4, 4, seed=i)).save(tmp_path / f"a/{i}.png")
    (tmp_path / "a/3.png").write_bytes(b"")
    batches = [([2, 0], [0, 1]), ([1, 3], [0, 0])]
    first, second = images.image_loader(images.list_images(tmp_path), 4, batches, num_workers=0)
    indices, pixels = images.readable_pixels(first)
    assert indices == [2, 0]
    assert np.array_equal(pixels, np.stack([noise(4, 4, seed=2), noise(4, 4, seed=0)[:, ::-1]]))
    assert [index for index, _ in second] == [1, 3]
    with pytest.raises(UnreadableImage, match="3.png"):
        images.readable_pixels(second)


def test_batches_in_order_contain_each_index_once_unmirrored():
    assert list(images.in_order(range(3, 8), 2)) == [([3, 4], [0, 0]), ([5, 6], [0, 0]), ([7], [0])]
