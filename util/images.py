"""Images: files to RGB, ADM's centre crop, pixels as uint8 [H, W, 3] or float in [-1, 1], regions."""

import errno
import io
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from util.distributed import start_worker
from util.files import naming

EXTENSIONS = {  # of FORMATS
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
}
# PIL goes by a file's contents, not its name, and would run PostScript: only these formats are opened.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**27  # of an image as stored, and as resized: 134 million
PAUSES = 0.2, 1.0  # seconds until a file that the machine could not read is tried again


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


# Files to pixels.


@dataclass(frozen=True)
class Reading:
    """How image files become RGB: as a viewer shows them, on a background of this colour; or as the published
    code reads them, which drops transparency and ignores the rotation that EXIF asks for."""

    background: tuple[int, int, int] = (255, 255, 255)
    published: bool = False

    def __str__(self):
        return "published" if self.published else "viewer on #{:02x}{:02x}{:02x}".format(*self.background)

    def rgb(self, image):
        """A PIL image of any mode as one of mode RGB."""
        if self.published:
            return image.convert("RGB")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "CMYK" and "icc_profile" in image.info:
            return _managed(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_8_bits(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        below = Image.new("RGBA", image.size, self.background)
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")


def _to_8_bits(image):
    """A grey image of more than 8 bits, its range scaled to 0..255. That is 0..65535; of floats and TIFFs
    of 32 bits, the smallest of 0..1 (floats only), 0..255 and 0..65535 that holds all levels."""
    levels, unknown = np.asarray(image).astype(np.float64), image.format == "TIFF" and image.mode == "I"
    ends = (1, 255, 65535) if image.mode == "F" else (255, 65535) if unknown else (65535,)
    end = next((end for end in ends if levels.min() >= 0 and levels.max() <= end), None)
    if end is None:
        raise ValueError(f"grey levels from {levels.min():g} to {levels.max():g}, of an unknown range")
    return Image.fromarray((levels * 255 / end + 0.5).astype(np.uint8))


def _managed(image):
    """A CMYK image in RGB by its colour profile, or by PIL's formula if the profile is damaged."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")


def read_image(file, *, size=1, reading=Reading()):
    """A Path, or a `Member` of an archive, as a PIL image of mode RGB, to be cropped to that size; of an
    animation, the first frame. Raises UnreadableImage: not an image of FORMATS, truncated, or more than
    MAX_PIXELS as stored or resized. OSError: the machine could not read it, also when asked again after
    PAUSES."""
    for pause in (*PAUSES, None):
        try:
            return _decode(file.read_bytes(), size, reading)
        except (OSError, MemoryError) as error:
            if pause is None:
                number = getattr(error, "errno", errno.ENOMEM)
                raise OSError(number, os.strerror(number), str(file)) from None
            time.sleep(pause)
        except ValueError as error:
            raise UnreadableImage(f"{file}: {error}") from None


def _decode(content, size, reading):
    """The bytes of a file as `read_image` returns it. Raises ValueError, or MemoryError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            short, long = sorted(image.size)
            resized = size * max(size, size * long // max(1, short))
            for what, pixels in (("has", short * long), (f"would have, its short side {size},", resized)):
                if pixels > MAX_PIXELS:
                    sides = "x".join(map(str, image.size))
                    raise ValueError(f"{sides}: {what} {pixels} pixels, the limit is {MAX_PIXELS}")
            return reading.rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes fail in many ways: struct.error, IndexError, zlib.error
        # The message of this one names the bytes that were read.
        reason = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from None


def read_mask(path):
    """A picture as bool [H, W]: True where it is white; transparent parts are not."""
    grey = read_image(Path(path), reading=Reading(background=(0, 0, 0))).convert("L")
    return np.asarray(grey) >= 128


def center_crop(image, size):
    """ADM's preparation of a PIL image: halve with a box filter while the short side is at least twice the
    size, resize bicubically to the short side, crop the centre. Returns uint8 [size, size, 3]."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def load_image(file, size, reading=Reading()):
    """What `read_image` takes, centre-cropped: uint8 [size, size, 3]; if size is None, as it is: uint8
    [H, W, 3]. Raises UnreadableImage."""
    if size is None:
        return np.array(read_image(file, reading=reading))
    return center_crop(read_image(file, size=size, reading=reading), size)


def to_unit(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels):
    """float [B, 3, H, W], clamped to [-1, 1] -> uint8 [B, H, W, 3], rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# Loading in worker processes.


class ImageDataset(torch.utils.data.Dataset):
    """Maps (index, view) to (index, uint8 [size, size, 3]), view 1 mirrored; or to (index, error text) for a
    damaged picture, (index, OSError) for a file that could not be read."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitem__(self, index_and_view):
        index, view = index_and_view
        try:
            pixels = load_image(self.images.file(index), self.size, self.images.reading)
        except UnreadableImage as error:
            return index, str(error)
        except OSError as error:  # raised by a worker it would become several lines
            return index, error
        return index, pixels[:, ::-1] if view else pixels


def image_loader(images, size, batches, num_workers):
    """Lists of `ImageDataset` items, one for each of an iterable of (indices, views) pairs. Raises OSError
    for a file that the machine could not read.

    The DataLoader has a generator of its own, so that it draws nothing from the global one, which seeds
    dropout.
    """
    pairs = (list(zip(indices, views, strict=True)) for indices, views in batches)
    if num_workers:
        with naming("/dev/shm"):
            multiprocessing.Lock()  # a DataLoader without shared memory fails in two ways at once
    loader = torch.utils.data.DataLoader(
        ImageDataset(images, size), batch_sampler=pairs, num_workers=num_workers, collate_fn=list,
        generator=torch.Generator(), worker_init_fn=start_worker,
    )
    for items in loader:
        for _, image in items:
            if isinstance(image, OSError):
                raise image
        yield items


def in_order(indices, batch_size):
    """Batches (indices, views) for `image_loader`: in order, not mirrored."""
    indices = np.asarray(indices)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size].tolist()
        yield batch, [0] * len(batch)


def readable_pixels(items):
    """A loader's item -> indices [B], uint8 [B, size, size, 3]. Raises UnreadableImage for the first bad
    one."""
    for _, image in items:
        if isinstance(image, str):
            raise UnreadableImage(image)
    return [index for index, _ in items], np.stack([image for _, image in items])


# Regions of a picture, in pixels and in cells of the token grid.


def cells_under(mask, grid_size):
    """Cells of the centre-cropped picture that contain a marked pixel, even partly.

    `mask` is bool [H, W], of the picture before `center_crop`. Returns bool [L].
    """
    short = min(mask.shape)

    def spans(side):
        """(first pixel, one past the last) of each row or column of cells, in exact arithmetic."""
        edges = (side - short) * grid_size + 2 * short * np.arange(grid_size + 1)  # in pixels / (2 grid_size)
        return list(zip(edges[:-1] // (2 * grid_size), -(-edges[1:] // (2 * grid_size)), strict=True))

    rows, columns = spans(mask.shape[0]), spans(mask.shape[1])
    return np.array([mask[top:bottom, left:right].any() for top, bottom in rows for left, right in columns])


def with_border(image, borders, size):
    """Shrink a PIL image to leave borders (left, top, right, bottom) in a square of `size` pixels.

    Returns uint8 [size, size, 3], the picture's edge extended into the borders; bool [size, size], the
    borders.
    """
    left, top, right, bottom = borders
    inner = (size - left - right, size - top - bottom)
    if min(inner) < 1:
        raise ValueError(f"a border of {left} {top} {right} {bottom} leaves none of {size}x{size} pixels")
    pixels = np.asarray(ImageOps.fit(image, inner, method=Image.Resampling.BICUBIC))
    border = np.ones((size, size), bool)
    border[top : size - bottom, left : size - right] = False
    return np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge"), border


def only_inside(pixels, borders, colour=128):
    """The square picture [S, S, 3] with its borders (left, top, right, bottom) in a grey."""
    (left, top, right, bottom), side = borders, len(pixels)
    inside = pixels[top : side - bottom, left : side - right]
    return np.pad(inside, ((top, bottom), (left, right), (0, 0)), constant_values=colour)


def as_pixels(cells, size):
    """Cells, bool [n, L], as pixels, bool [n, size, size]."""
    n, num_tokens = cells.shape
    grid_size = int(num_tokens**0.5)
    squares = cells.reshape(n, grid_size, grid_size)
    return squares.repeat(size // grid_size, axis=1).repeat(size // grid_size, axis=2)


def paste(original, edited, cells, width):
    """Restore the original's pixels outside `cells`, blended over `width` pixels beside them (0: a hard
    edge).

    original uint8 [S, S, 3], edited uint8 [n, S, S, 3], cells bool [n, L] -> uint8 [n, S, S, 3].
    """
    region = torch.from_numpy(as_pixels(cells, original.shape[0])).float()[:, None]
    grown = [F.max_pool2d(region, 2 * k + 1, stride=1, padding=k) for k in range(width + 1)]
    share = torch.stack(grown).mean(dim=0)[:, 0, ..., None].numpy()  # 1 in the cells, then falling to 0
    return (share * edited + (1 - share) * original).round().astype(np.uint8)
