"""Images: folders of classes, ADM's centre crop, pixels as uint8 [H, W, 3] or float in [-1, 1], regions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from util.distributed import ignore_stop_signals

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# PIL goes by a file's contents, not its name, and would run PostScript: only these formats are opened.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**27  # of an image as stored, and as resized: 134 million


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


# Folders.


@dataclass(frozen=True)
class ImageFolder:
    """An ImageNet-style folder: one sub-folder per class, labels in sorted order of their names.

    `names` are relative paths, sorted; `labels` int64 [N], one for each name.
    """

    root: Path
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self):
        return len(self.names)


def list_images(root):
    """The `ImageFolder` at ROOT/CLASS/IMAGE.

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
            p.relative_to(root).as_posix() for p in (root / class_name).rglob("*")
            if p.suffix.lower() in EXTENSIONS and p.is_file()
        )
        names += files
        labels += [label] * len(files)
    if not names:
        raise ValueError(f"{root} has {len(class_names)} class sub-folders but no images in them")
    return ImageFolder(root, tuple(class_names), tuple(names), np.array(labels, dtype=np.int64))


def split_folder(path, split):
    """PATH/train or PATH/val if that folder exists, else PATH itself."""
    return Path(path) / split if (Path(path) / split).is_dir() else Path(path)


# Files to pixels.


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
    """An image file as a PIL image of that mode, to be cropped to that size.

    Raises:
        UnreadableImage: not an image of FORMATS, truncated, or more than MAX_PIXELS as stored or resized.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            short, long = sorted(image.size)
            resized = size * max(size, size * long // max(1, short))
            for what, pixels in (("has", short * long), (f"would have, its short side {size},", resized)):
                if pixels > MAX_PIXELS:
                    sides = "x".join(map(str, image.size))
                    raise ValueError(f"{sides}: {what} {pixels} pixels, the limit is {MAX_PIXELS}")
            return image.convert(mode)
    except Exception as error:  # damaged bytes fail in many ways: struct.error, IndexError, zlib.error
        raise UnreadableImage(f"{path}: {str(error) or type(error).__name__}") from None


def load_image(path, size):
    """An image file, centre-cropped: uint8 [size, size, 3]. Raises UnreadableImage."""
    return center_crop(read_image(path, size=size), size)


def to_unit(images):
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels):
    """float [B, 3, H, W], clamped to [-1, 1] -> uint8 [B, H, W, 3], rounded."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# Loading in worker processes.


class ImageDataset(torch.utils.data.Dataset):
    """Maps (index, view) to (index, uint8 [size, size, 3]) or (index, error text); view 1 is mirrored."""

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
    """A DataLoader over an iterable of (indices, views) pairs; each item is a list of `ImageDataset` items.

    It has a generator of its own, so that it draws nothing from the global one, which seeds dropout.
    """
    pairs = (list(zip(indices, views, strict=True)) for indices, views in batches)
    return torch.utils.data.DataLoader(
        ImageDataset(folder, size), batch_sampler=pairs, num_workers=num_workers, collate_fn=list,
        generator=torch.Generator(), worker_init_fn=ignore_stop_signals,
    )


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
