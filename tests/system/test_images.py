"""Images in and out: the centre crop by hand, pixels in two forms, folders, files that cannot be read."""

import errno
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import CLASSES
from PIL import ExifTags, Image

from util import images
from util.folders import list_images
from util.images import Reading, UnreadableImage, center_crop, load_image, read_image


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


@pytest.fixture
def viewed(tmp_path):
    """Saves an image as a file and reads it back: int [H, W, 3]."""

    def save_and_read(image, name="x.png", reading=Reading(), **options):
        image.save(tmp_path / name, **options)
        return np.asarray(read_image(tmp_path / name, reading=reading)).astype(int)

    return save_and_read


def see_through(mode):
    """A red pixel, half a red pixel and a hidden red pixel, in a mode with transparency."""
    image = Image.new("RGBA", (3, 1), "red")
    image.putalpha(Image.fromarray(np.array([[255, 128, 0]], np.uint8)))
    return image.convert(mode)


def test_transparent_image_is_laid_on_the_background(viewed):
    red, pink, white = [255, 0, 0], [255, 127, 127], [255, 255, 255]
    for name, options in (("x.png", {}), ("x.webp", {"lossless": True, "exact": True}), ("x.tif", {})):
        assert viewed(see_through("RGBA"), name, **options).tolist() == [[red, pink, white]], name
    assert viewed(see_through("LA"))[0, :, 0].tolist() == [76, 165, 255]  # red is grey 76
    blue = Reading(background=(0, 0, 255))
    assert viewed(see_through("RGBA"), reading=blue).tolist() == [[red, [128, 0, 127], [0, 0, 255]]]
    published = viewed(see_through("RGBA"), reading=Reading(published=True))
    assert published.tolist() == [[red, red, red]]


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_palette_with_a_transparent_colour_is_laid_on_the_background(viewed, name):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert viewed(image, name, transparency=1).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_colour_named_transparent_is_laid_on_the_background(viewed):
    """The tRNS chunk of an RGB or grey PNG."""
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert viewed(colours, transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]
    assert viewed(colours.convert("L"), transparency=5)[0, :, 0].tolist() == [2, 255]


LEVELS, SEEN = np.array([[0, 257, 32768, 65535]], np.uint16), [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_grey_keeps_its_range(viewed, name):
    assert viewed(Image.fromarray(LEVELS), name)[0].tolist() == SEEN


def test_sixteen_bit_pgm_keeps_its_range(tmp_path):
    """Written by hand: Pillow 10.1 cannot."""
    (tmp_path / "x.pgm").write_bytes(b"P5 4 1 65535\n" + LEVELS.astype(">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "x.pgm"))[0].tolist() == SEEN


def test_rotation_of_exif_is_applied_but_not_by_the_published_reading(viewed):
    pixels, exif = noise(4, 6), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = viewed(Image.fromarray(pixels), exif=exif)
    assert np.array_equal(upright, np.rot90(pixels, -1))
    stored = viewed(Image.fromarray(pixels), reading=Reading(published=True), exif=exif)
    assert np.array_equal(stored, pixels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_hide_the_picture(viewed):
    pixels = viewed(Image.fromarray(noise(8, 8)), "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert pixels.shape == (8, 8, 3)


def test_first_frame_of_an_animation_is_read(viewed):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("lime", "red")]
    assert viewed(frames[0], "x.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [0, 255, 0]


def test_inks_become_colours_with_and_without_a_profile(viewed):
    """As JPEG the inks are stored inverted. A damaged profile is not used."""
    inks = np.tile(np.array([[[255, 0, 0, 0]], [[0, 0, 0, 0]]], np.uint8).repeat(8, axis=0), (1, 8, 1))
    inks, plain = Image.fromarray(inks, "CMYK"), [[0, 255, 255], [255, 255, 255]]
    for name, options in (("x.tif", {}), ("x.tif", {"icc_profile": b"damaged"}), ("x.jpg", {"quality": 100})):
        assert np.abs(viewed(inks, name, **options)[[0, 15], 0] - plain).max() <= 4
    managed = viewed(inks, "x.tif", icc_profile=cyan_is_black())
    assert np.abs(managed[[0, 15], 0] - [[0] * 3, [255] * 3]).max() <= 4


def cyan_is_black():
    """The ICC profile of a printer whose paper is white and whose cyan, with any other ink, is black."""
    corners = b"".join(bytes([0 if inks >= 8 else 255, 128, 128]) for inks in range(16))  # in Lab, cyan first
    ramp, identity = bytes(range(256)), struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + corners + 3 * ramp
    header = struct.pack(
        ">I4x4s4s4s4s12x4s28x3i48x", 144 + len(table), b"\2\x40\0\0", b"prtr", b"CMYK", b"Lab ", b"acsp",
        63190, 65536, 54061,
    )
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_image_without_transparency_is_read_as_published(viewed, mode):
    image = Image.fromarray(noise(9, 9)).convert(mode)
    assert np.array_equal(viewed(image), viewed(image, reading=Reading(published=True)))


def test_grey_levels_survive_the_way_to_floats_and_back_and_others_are_clamped():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    unit = images.to_unit(levels)
    assert unit.shape == (1, 3, 16, 16) and (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(images.to_uint8(unit).numpy(), levels)
    beyond = torch.tensor([-7.0, 0.0, 1.01]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert images.to_uint8(beyond)[0, 0, :, 0].tolist() == [0, 128, 255]  # 127.5 rounds to the even 128


@pytest.mark.parametrize(
    "dtype,unit", [(np.float32, 1 / 255), (np.float32, 1), (np.float32, 257), (np.int32, 1), (np.int32, 257)]
)
def test_tiff_of_floats_or_32_bits_is_scaled_by_the_least_range_that_holds_it(viewed, dtype, unit):
    levels = np.array([[0, 1, 128, 255]])
    image = Image.fromarray((levels * unit).astype(dtype))
    assert viewed(image, "x.tif")[0, :, 0].tolist() == [0, 1, 128, 255]
    for unknown in (levels * 65537, levels - 1):
        with pytest.raises(UnreadableImage, match="x.tif: grey levels from .* of an unknown range"):
            viewed(Image.fromarray(unknown.astype(dtype)), "x.tif")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ENOENT, None])
@pytest.mark.parametrize("times", [1, 3])
def test_trouble_of_the_machine_is_tried_again_and_never_taken_for_a_damaged_picture(
    number, times, tmp_path, monkeypatch
):
    """None: Python itself is out of memory."""
    tries, read = [], Path.read_bytes

    def failing(path):
        tries.append(path.name)
        if path.name == "1.png" and path.parent.name == CLASSES[0] and tries.count("1.png") <= times:
            raise OSError(number, os.strerror(number)) if number else MemoryError
        return read(path)

    monkeypatch.setattr(images, "PAUSES", (0, 0))
    monkeypatch.setattr(Path, "read_bytes", failing)
    flags = helpers.cache_flags(tmp_path / "cache", skip_unreadable=True)
    outcome = helpers.call("cache", *flags)
    if times == 1:
        assert helpers.contents(tmp_path / "cache") == helpers.contents(helpers.token_cache())
    else:
        assert outcome.status == 1 and "Traceback" not in outcome.err and "left out" not in outcome.err
        last, words = outcome.err.splitlines()[-1], os.strerror(number or errno.ENOMEM)
        assert last.startswith("error: ") and words in last and f"{CLASSES[0]}/1.png" in last


@pytest.mark.parametrize("damage", ["empty", "truncated", "postscript"])
def test_unreadable_image_is_named(tmp_path, damage):
    """PostScript too: PIL would hand it to Ghostscript, which runs it."""
    path = tmp_path / "cat.png"
    Image.fromarray(noise(32, 32)).save(path)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    contents = {"empty": b"", "truncated": path.read_bytes()[:1000], "postscript": postscript}
    path.write_bytes(contents[damage])
    with pytest.raises(UnreadableImage, match="cat.png: (cannot identify image file|image file is trunc)"):
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
    first, second = images.image_loader(list_images(tmp_path), 4, batches, num_workers=0)
    indices, pixels = images.readable_pixels(first)
    assert indices == [2, 0]
    assert np.array_equal(pixels, np.stack([noise(4, 4, seed=2), noise(4, 4, seed=0)[:, ::-1]]))
    assert [index for index, _ in second] == [1, 3]
    with pytest.raises(UnreadableImage, match="3.png"):
        images.readable_pixels(second)


def test_batches_in_order_contain_each_index_once_unmirrored():
    assert list(images.in_order(range(3, 8), 2)) == [([3, 4], [0, 0]), ([5, 6], [0, 0]), ([7], [0])]
