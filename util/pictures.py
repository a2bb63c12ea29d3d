"""Pictures for people, from uint8 images [n, H, W, 3] and numbers: grids, GIFs, plots."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.files import atomic
from util.images import as_pixels

GREY = 128  # cells that are not generated yet
SHOWN = 96  # pixels of a small image in a grid
FILM_WIDTH, LATEST = 1300, (255, 120, 0)  # pixels of a film, about; the colour of its latest step


def save_png(path, pixels):
    """Write one uint8 [H, W, 3] image."""
    with atomic(path) as partial:
        Image.fromarray(np.asarray(pixels)).save(partial, format="PNG")


def grid(images, columns, *, scale=None, gap=2):
    """Images [n, H, W, 3] in rows of `columns`, on white, each pixel `scale` times as large; by default small
    images are enlarged to about SHOWN pixels."""
    scale = scale or max(1, round(SHOWN / np.shape(images)[1]))
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def only_cells(images, cells):
    """Images [n, H, W, 3] with everything but `cells`, bool [n, L], grey."""
    seen = as_pixels(cells, np.shape(images)[1])
    return np.where(seen[..., None], images, GREY).astype(np.uint8)


def filled(images, orders, slots):
    """Images [n, H, W, 3] with only the first `slots` cells of `orders` [n, L] visible, the others grey."""
    cells = np.zeros(orders.shape, dtype=bool)
    np.put_along_axis(cells, orders[:, :slots], True, axis=1)
    return only_cells(images, cells)


def labelled_rows(images, row_labels, *, scale=None, title=None):
    """A sheet of images [rows * columns, H, W, 3] with a label to the left of each row."""
    rows = len(row_labels)
    sheet = grid(images, len(images) // rows, scale=scale)
    font = ImageFont.load_default(max(11, min(20, sheet.shape[0] // rows // 3)))
    margin = 12 + int(max(font.getlength(text) for text in row_labels))
    head = 2 * font.size if title else 0
    canvas = Image.new("RGB", (margin + sheet.shape[1], head + sheet.shape[0]), "white")
    canvas.paste(Image.fromarray(sheet), (margin, head))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels):
        draw.text((6, head + (row + 0.5) * sheet.shape[0] / rows), text, "black", font, anchor="lm")
    if title:
        draw.text((margin, font.size), title, "black", font, anchor="lm")
    return np.asarray(canvas)


def side_by_side(sheets, *, gap=24):
    """Sheets of similar height, left to right on white."""
    height = max(sheet.shape[0] for sheet in sheets)
    padded = [np.pad(s, ((0, height - s.shape[0]), (0, gap), (0, 0)), constant_values=255) for s in sheets]
    return np.concatenate(padded, axis=1)


def film_frame(done, images, steps, names):
    """A frame of the film of a decoding, of which `done` steps are over: images [n, H, W, 3] in a row under
    their names, grey where nothing is decoded yet, and below each its order, the latest step in orange; as
    many as FILM_WIDTH has room for. `steps`, int [n, g, g], has the step of each cell, from 1. Returns uint8
    [height, width, 3]."""
    from matplotlib import colormaps

    side = np.shape(images)[1]
    room = max(2, FILM_WIDTH // max(SHOWN, side))
    images, steps, names = images[:room], steps[:room], names[:room]
    maps = 255 * colormaps["viridis"](steps / steps.max())[..., :3]
    maps[steps == done] = LATEST
    maps[steps > done] = GREY
    maps = maps.astype(np.uint8).repeat(side // steps.shape[1], axis=1).repeat(side // steps.shape[1], axis=2)
    shown = only_cells(images, (steps <= done).reshape(len(steps), -1))
    sheet = grid(np.concatenate([shown, maps]), len(images))
    font = ImageFont.load_default(14)
    canvas = Image.new("RGB", (sheet.shape[1], sheet.shape[0] + 3 * font.size), "white")
    canvas.paste(Image.fromarray(sheet), (0, 3 * font.size))
    draw, tokens = ImageDraw.Draw(canvas), (steps[0] <= done).sum()
    draw.text((4, 2), f"step {done} of {steps.max()}, {tokens} of {steps[0].size} tokens", "black", font)
    for column, name in enumerate(names):
        draw.text((4 + column * sheet.shape[1] / len(names), 1.5 * font.size), name, "black", font)
    return np.asarray(canvas)


def save_film(path, frames):
    """Write frames (uint8 [H, W, 3] each) as a looping GIF of 3 seconds; the last one stays for 2 more."""
    frames = [Image.fromarray(np.asarray(frame)).quantize(128) for frame in frames]
    durations = [max(60, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    with atomic(path) as partial:
        frames[0].save(
            partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def save_curves(path, curves, *, xlabel, ylabel):
    """Plot curves, a dict of name -> points (x, y) or (x, y, length of the error bar)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    axes = Figure(figsize=(6, 3.5)).subplots()
    for name, points in curves.items():
        axes.errorbar(*zip(*points, strict=True), label=name, linewidth=1, capsize=2)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if all(isinstance(x, int) for points in curves.values() for x, *_ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as partial:
        axes.figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")


def order_map(steps_of_cells, title):
    """A drawing of a token grid, int [g, g], each cell with the number of its step: uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = len(steps_of_cells)
    axes = Figure(figsize=(4.5, 4.5), dpi=110, layout="constrained").subplots()
    axes.imshow(steps_of_cells, cmap="viridis")
    for row, column in np.ndindex(steps_of_cells.shape):
        colour = "white" if steps_of_cells[row, column] < steps_of_cells.max() / 2 else "black"
        text = str(int(steps_of_cells[row, column]))
        axes.text(column, row, text, ha="center", va="center", fontsize=min(12, 90 / side), color=colour)
    axes.set(xticks=[], yticks=[], title=title)
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
