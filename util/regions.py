"""Parts of a picture: masks and borders in pixels, the cells of the token grid under them, pasting.

Knows pixels, grids and ADM's centre crop. Does not know tokens, models or flags.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


def cells_under(mask, grid_size):
    """The cells of the centre-cropped picture with at least one marked pixel in or partly in them.

    Args:
        mask: bool [H, W], of a picture of any size before `center_crop`.
    Returns:
        bool [L].
    """
    short = min(mask.shape)

    def spans(side):
        """First pixel and the one behind the last, of each row or column of cells."""
        parts = 2 * grid_size  # of a pixel: in them all edges are whole numbers
        edges = (side - short) * grid_size + 2 * short * np.arange(grid_size + 1)
        return list(zip(edges[:-1] // parts, -(-edges[1:] // parts), strict=True))

    rows, columns = spans(mask.shape[0]), spans(mask.shape[1])
    return np.array([mask[top:bottom, left:right].any() for top, bottom in rows for left, right in columns])


def with_border(image, borders, size):
    """A picture made smaller, with room around it.

    Args:
        image: PIL image; its centre is cut to the shape of the place that is left.
        borders: pixels of room on the left, top, right and bottom. size: of the whole.
    Returns:
        uint8 [size, size, 3], the edge of the picture drawn out into the room; bool [size, size], the room.
    """
    left, top, right, bottom = borders
    inner = (size - left - right, size - top - bottom)
    pixels = np.asarray(ImageOps.fit(image, inner, method=Image.Resampling.BICUBIC))
    room = np.ones((size, size), bool)
    room[top : size - bottom, left : size - right] = False
    return np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge"), room


def as_pixels(cells, size):
    """Cells, bool [n, L], as pixels, bool [n, size, size]."""
    n, num_tokens = cells.shape
    grid_size = int(num_tokens**0.5)
    squares = cells.reshape(n, grid_size, grid_size)
    return squares.repeat(size // grid_size, axis=1).repeat(size // grid_size, axis=2)


def paste(original, edited, cells, width):
    """Edited pictures with the original's pixels back outside some cells.

    Args:
        original: uint8 [S, S, 3]. edited: uint8 [n, S, S, 3]. cells: bool [n, L], where edited pixels stay.
        width: pixels beside these cells over which the two blend; 0 is a hard edge.
    Returns:
        uint8 [n, S, S, 3].
    """
    region = torch.from_numpy(as_pixels(cells, original.shape[0])).float()[:, None]
    grown = [F.max_pool2d(region, 2 * k + 1, stride=1, padding=k) for k in range(width + 1)]
    share = torch.stack(grown).mean(dim=0)[:, 0, ..., None].numpy()  # 1 in the cells, then falling to 0
    return (share * edited + (1 - share) * original).round().astype(np.uint8)
