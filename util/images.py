"""Images in and out of files and tensors.

Knows folders of images, ADM's centre crop and the two forms of pixels: uint8 [H, W, 3] and float [-1, 1].
Does not know tokens or models.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.signals import leave_to_parent

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Whatever the name says, PIL goes by the contents, and hands PostScript to a program that runs it.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**27  # of an image file, and of it resized: 134 million, 0.4 GB as bytes


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class ImageFolder:
    """An ImageNet-style folder: one sub-folder per class, labels in sorted order of their names.

    Attributes:
        root: the folder. class_names: names of the sub-folders. names: relative paths, sorted.
        labels: int64 array, a label for each name.
    """

    root: Path
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self):
        return len(self.names)


def list_images(root):
    """Read the names and labels of an ImageNet-style folder.

    Raises:
        ValueError: no sub-folders, or no images in them.
    """
    root = Path(root)
    class_names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not class_names:
        raise ValueError(f"{root} has no class sub-folders (an ImageNet-style folder is {root}/CLASS/IMAGE)")
    names, labels = [], []
    for label, class_name in enumerate(class_names):
        files = sorted(
            p.relative_to(root).as_posix()
            for p in (root / class_name).rglob("*")
            if p.suffix.lower() in EXTENSIONS and p.is_file()
        )
        names += files
        labels += [label] * len(files)
    if not names:
        raise ValueError(f"{root} has {len(class_names)} class sub-folders but no images in them")
    return ImageFolder(root, tuple(class_names), tuple(names), np.array(labels, dtype=np.int64))


def split_folder(path, split):
    """PATH/train or PATH/val where there is such a folder, else PATH itself."""
    return Path(path) / split if (Path(path) / split).is_dir() else Path(path)


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


def read_image(path, mode="RGB", *, size=1):
    """An image file as a PIL image of that mode, whose short side will be `size`.

    Raises:
        UnreadableImage: no image of FORMATS, cut short, or of more than MOST_PIXELS as it is or, where it is
            so narrow that it grows, resized.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(image, size)
            return image.convert(mode)
    except Exception as error:  # damaged bytes fail in many ways: struct.error, IndexError, zlib.error
        raise UnreadableImage(f"{path}: {str(error) or type(error).__name__}") from None


def load_image(path, size):
    """An image file, centre-cropped: uint8 [size, size, 3]. Raises UnreadableImage as `read_image` does."""
    return center_crop(read_image(path, size=size), size)


def _check_pixels(image, size):
    short, long = sorted(image.size)
    resized = size * max(size, size * long // max(1, short))
    for what, pixels in (("has", short * long), (f"would have, its short side {size},", resized)):
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"{image.size[0]}x{image.size[1]}: {what} {pixels} pixels, the limit is {MOST_PIXELS}"
            )


def to_unit(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels):
    """float [B, 3, H, W], clamped to [-1, 1] -> uint8 [B, H, W, 3], rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class ImageDataset(torch.utils.data.Dataset):
    """Images of a folder, by (index, view), as (index, uint8 [size, size, 3]) or (index, error text).

    View 1 is the mirrored image.
    """

    def __init__(self, folder, size):
        self.folder, self.size = folder, size

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index_and_view):
        index, view = index_and_view
        try:
            pixels = load_image(self.folder.root / self.folder.names[index], self.size)
        except UnreadableImage as error:
            return index, str(error)
        return index, pixels[:, ::-1] if view else pixels


def image_loader(folder, size, batches, num_workers):
    """A DataLoader over an iterable of (indices, views) pairs, read as they are needed; each item is the list
    of what `ImageDataset` gives for them. Draws nothing from torch's global generator: dropout is seeded."""
    pairs = (list(zip(indices, views, strict=True)) for indices, views in batches)
    return torch.utils.data.DataLoader(
        ImageDataset(folder, size), batch_sampler=pairs, num_workers=num_workers, collate_fn=list,
        generator=torch.Generator(), worker_init_fn=leave_to_parent,
    )  # fmt: skip


def in_order(indices, batch_size):
    """Batches of indices, in their order and not mirrored, for `image_loader`."""
    indices = np.asarray(indices)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size].tolist()
        yield batch, [0] * len(batch)


def readable_pixels(items):
    """A loader's item -> indices [B], uint8 [B, size, size, 3].

    Raises:
        UnreadableImage: one of them could not be read.
    """
    for _, image in items:
        if isinstance(image, str):
            raise UnreadableImage(image)
    return [index for index, _ in items], np.stack([image for _, image in items])
