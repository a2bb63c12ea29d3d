"""What the page does: checked wishes become pictures that fill in group by group.

Knows weights, what may be asked for, and the one thread in which all is made. Does not know gradio.
"""

import queue
import re
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.edit import edit_tokens, whole_order
from engine.settings import resolve_settings
from models.lpd import LPD
from models.vqgan import VQModel
from orders.measure import steps_of_cells
from util import dist, pictures
from util.images import UnreadableImage, center_crop, read_image, to_uint8, to_unit
from util.regions import cells_under, paste

LIMITS = {"images": (1, 16), "guidance": (0, 20), "temperature": (0, 4), "seed": (0, 2**31 - 1)}
TIMING_SECONDS = 3  # the comparison is repeated, up to five times, until so long has passed
SHOWN_SIDE = 384  # pixels of a picture on the page, about


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for: a class by its label, and how to draw it."""

    label: int
    images: int
    steps: int
    order: str
    guidance: float
    temperature: float
    seed: int


@dataclass(frozen=True)
class Studio:
    """Weights on a device, and a name for each of their classes."""

    model: LPD
    tokenizer: VQModel
    names: tuple[str, ...]
    device: torch.device

    @property
    def side(self):
        """Pixels of a picture, each way."""
        return self.model.config.grid_size * self.tokenizer.config.stride

    @property
    def limits(self):
        """The least and the most of each number of a Wish."""
        return {**LIMITS, "label": (0, len(self.names) - 1), "steps": (2, self.model.config.num_tokens)}

    @property
    def choices(self):
        """(name without a leading number, label) of each class."""
        return [(re.sub(r"^\d+_", "", name), label) for label, name in enumerate(self.names)]

    def check(self, wish):
        """Refuse a Wish out of limits.

        Raises:
            ValueError: naming what was asked for, its value and both limits.
        """
        for name, (least, most) in self.limits.items():
            value = getattr(wish, name)
            if value is None or not least <= value <= most:  # `not <=` refuses nan too
                raise ValueError(f"{name} is {value}, not in {least}..{most}")

    def picture(self, path):
        """An uploaded image file, centre-cropped to the weights' size: uint8 [S, S, 3].

        Raises:
            ValueError: no image, or too large; the message does not tell where the file lies.
        """
        try:
            return center_crop(read_image(path, size=self.side), self.side)
        except UnreadableImage as error:
            raise ValueError(str(error).replace(str(path), Path(path).name)) from None

    def sheet(self, images):
        """Pictures [n, S, S, 3] in about a square, as large as the page shows them: uint8 [H, W, 3]."""
        columns = int(np.ceil(np.sqrt(len(images))))
        return pictures.grid(images, columns, scale=max(1, SHOWN_SIDE // (columns * self.side)), gap=0)


def generate(studio, wish, show, *, compare):
    """Generate images of a class; with `compare` say how long one token at a time takes.

    Args:
        show: called with what is there so far, by name: `order` and `picture`, uint8 [H, W, 3]; `words`;
            at last `made`, uint8 [n, S, S, 3]. Called with nothing it only asks whether to go on.
    """
    studio.check(wish)
    cells = np.ones(studio.model.config.num_tokens, bool)
    made, words = _draw(studio, wish, show, cells)
    show(made=made, words=words)
    if compare:
        show(words=f"{words}\n\nNow timed, {wish.steps} steps against one token at a time ...")
        show(words=f"{words}\n\n{_compared(studio, wish, show)}")


def edit(studio, wish, show, *, picture, mask, own_pixels):
    """Generate the marked part of a picture as a class.

    Args:
        show: as of `generate`.
        picture: uint8 [S, S, 3] or None. mask: bool [H, W] of it at any size, or None.
        own_pixels: put the picture's pixels back outside the cells generated.
    Raises:
        ValueError: no picture, or nothing marked.
    """
    if picture is None:
        raise ValueError("there is no picture yet: upload one, or take one that was generated")
    if mask is None or not mask.any():
        raise ValueError("nothing is marked: paint over what is to change")
    studio.check(wish)
    cells = cells_under(mask, studio.model.config.grid_size)
    made, words = _draw(studio, wish, show, cells, picture)
    if own_pixels:
        made = paste(picture, made, np.tile(cells, (len(made), 1)), studio.side // 16)
    show(made=made, words=words, picture=studio.sheet(made))


def _settings(studio, wish, cells, steps):
    return resolve_settings(
        studio.model.config.grid_size, generation_steps=min(steps, int(cells.sum())), order=wish.order,
        known=np.tile(~cells, (wish.images, 1)), num_images=wish.images,
        cfg=wish.guidance, temperature=wish.temperature, seed=wish.seed,
    )  # fmt: skip


def _tokens(studio, wish, settings, orders, picture, on_group):
    """Tokens int64 [n, L]; a whole image is one of which nothing is kept."""
    tokens = torch.zeros(1, orders.shape[1], dtype=torch.int64, device=studio.device)
    if picture is not None:
        tokens = studio.tokenizer.encode(to_unit(picture[None]).to(studio.device))
    keep, labels = torch.from_numpy(settings.known), torch.full((wish.images,), wish.label)
    tokens = tokens.expand(*keep.shape)
    return edit_tokens(
        studio.model, tokens, keep.to(studio.device), labels, orders, settings.group_sizes,
        on_group=on_group, **settings.decoding(),
    )  # fmt: skip


@torch.inference_mode()
def _draw(studio, wish, show, cells, picture=None):
    """Images of which some cells, bool [L], are generated, uint8 [n, S, S, 3], and what to say of them."""
    settings = _settings(studio, wish, cells, wish.steps)
    orders = settings.orders(range(wish.images))
    whole = whole_order(torch.from_numpy(settings.known), orders).numpy()
    sizes, kept = settings.group_sizes, int((~cells).sum())
    show(order=_order_map(whole, (kept, *sizes) if kept else sizes, settings), words="")
    begun, groups, images = time.perf_counter(), 0, None

    def on_group(tokens, slots):
        nonlocal groups, images
        groups += 1
        images = to_uint8(studio.tokenizer.decode(tokens)).cpu().numpy()
        seconds = time.perf_counter() - begun
        show(
            picture=studio.sheet(pictures.filled(images, whole, slots)),
            words=f"step {groups} of {len(sizes)}: {slots - kept} of {whole.shape[1] - kept} tokens, "
            f"{seconds:.2f} s, showing included",
        )

    _tokens(studio, wish, settings, orders, picture, on_group)
    seconds = time.perf_counter() - begun
    counted = f"{len(images)} image{'s' * (len(images) > 1)}"
    return images, f"{counted} in {len(sizes)} steps, {seconds:.2f} s, showing included"


@torch.inference_mode()
def _compared(studio, wish, show):
    """The same images timed on this machine without showing, in the steps asked for and token by token, in
    turns; of several times the least counts, which other work on the machine lengthened least."""
    num_tokens = studio.model.config.num_tokens
    ways = [_settings(studio, wish, np.ones(num_tokens, bool), steps) for steps in (wish.steps, num_tokens)]
    seconds, begun = [], time.perf_counter()
    while not seconds or (len(seconds) < 5 and time.perf_counter() - begun < TIMING_SECONDS):
        seconds.append([_timed(studio, wish, settings, show) for settings in ways])
    fast, slow = np.min(seconds, axis=0)
    return (
        f"Measured here, nothing shown meanwhile, best of {len(seconds)}: {wish.steps} steps {fast:.3f} s, "
        f"one token at a time ({num_tokens} steps) {slow:.3f} s: **{slow / fast:.1f} times as long**."
    )


def _timed(studio, wish, settings, show):
    """Seconds of tokens and pixels; the orders are made before."""
    orders = settings.orders(range(wish.images))
    begun = time.perf_counter()
    studio.tokenizer.decode(_tokens(studio, wish, settings, orders, None, lambda *_: show()))
    dist.synchronize(studio.device)
    return time.perf_counter() - begun


def _order_map(whole, sizes, settings):
    """The step of each cell of the first image, from 1 (0 is kept), drawn: uint8 [H, W, 3]."""
    steps = steps_of_cells(whole[:1], sizes)[0] + (len(sizes) == len(settings.group_sizes))
    title = f"step of each cell, {settings.order} order"
    with tempfile.TemporaryDirectory(prefix="lpd-order-") as folder:
        pictures.save_order_map(Path(folder) / "order.png", steps.reshape(settings.grid_size, -1), title)
        return np.asarray(Image.open(Path(folder) / "order.png").convert("RGB"))


class Abandoned(Exception):
    """Nobody waits for a picture any more."""


class Worker:
    """One thread that makes one picture at a time, whoever asks."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="studio")

    def stream(self, make, *args, **kwargs):
        """Yield what `make(*args, show, **kwargs)` shows, a dict each, as it does; its errors are raised
        here. When the generator is closed, `make` ends where it shows next."""
        shown, abandoned = queue.SimpleQueue(), threading.Event()

        def show(**parts):
            if abandoned.is_set():
                raise Abandoned
            if parts:
                shown.put(parts)

        making = self._thread.submit(make, *args, show, **kwargs)
        making.add_done_callback(lambda _: shown.put(None))
        try:
            while (parts := shown.get()) is not None:
                yield parts
            making.result()
        finally:
            abandoned.set()
            making.cancel()
