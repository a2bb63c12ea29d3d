"""What the page does, without gradio: checked requests become pictures that fill in group by group."""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.decoding import edit_tokens, whole_order
from engine.generate import resolve_settings
from engine.sampling import Sampling
from models.lpd import LPD
from models.vqgan import VQModel
from orders.plot import steps_of_cells
from util import pictures
from util.cli import plain_name
from util.device import synchronize
from util.images import UnreadableImage, cells_under, center_crop, paste, read_image, to_uint8, to_unit

LIMITS = {
    "images": (1, 16), "guidance": (0, 20), "temperature": (0, 4), "top_p": (0.05, 1), "seed": (0, 2**31 - 1),
}
TIMING_SECONDS = 3  # the comparison is repeated until this long has passed, up to five times
SHOWN_SIDE = 384  # pixels of a picture on the page, about


@dataclass(frozen=True)
class Request:
    """What a visitor asks for: a class by its label, and how to generate it."""

    label: int
    images: int
    steps: int
    order: str
    guidance: float
    temperature: float
    top_p: float
    seed: int

    @property
    def sampling(self):
        return Sampling(cfg=self.guidance, temperature=self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class Session:
    """Weights on a device, a name for each of their classes, a line about them, and how to sample them."""

    model: LPD
    tokenizer: VQModel
    names: tuple[str, ...]
    device: torch.device
    about: str = ""
    sampling: Sampling = Sampling(cfg=4.0)

    @property
    def side(self):
        """Pixels of a picture, along one side."""
        return self.model.config.grid_size * self.tokenizer.config.stride

    @property
    def limits(self):
        """The smallest and largest value of each number in a Request."""
        return {**LIMITS, "label": (0, len(self.names) - 1), "steps": (2, self.model.config.num_tokens)}

    @property
    def choices(self):
        """(name without a leading number, label) of each class."""
        return [(plain_name(name), label) for label, name in enumerate(self.names)]

    def check(self, request):
        """Raises ValueError, with the value and both limits, for a Request out of limits."""
        for name, (least, most) in self.limits.items():
            value = getattr(request, name)
            if value is None or not least <= value <= most:  # `not <=` refuses nan too
                raise ValueError(f"{name} is {value}, not in {least}..{most}")

    def picture(self, path):
        """An uploaded image, centre-cropped to the weights' size: uint8 [S, S, 3]. Raises ValueError: no
        image, or too large; the message does not reveal where the file lies."""
        try:
            return center_crop(read_image(Path(path), size=self.side), self.side)
        except UnreadableImage as error:
            raise ValueError(str(error).replace(str(path), Path(path).name)) from None

    def sheet(self, images):
        """Pictures [n, S, S, 3] in a square grid, enlarged for the page: uint8 [H, W, 3]."""
        columns = int(np.ceil(np.sqrt(len(images))))
        return pictures.grid(images, columns, scale=max(1, SHOWN_SIDE // (columns * self.side)), gap=0)


def generate(session, request, show, *, compare):
    """Generate images of a class; with `compare`, also time decoding one token at a time.

    `show` is called with what there is so far, by name: `order` and `picture` (uint8 [H, W, 3]), `words`, and
    at the end `made` (uint8 [n, S, S, 3]) and its `label`. Called without arguments it only raises Cancelled
    if nobody waits.
    """
    session.check(request)
    cells = np.ones(session.model.config.num_tokens, bool)
    made, words = _draw(session, request, show, cells)
    show(made=made, label=request.label, words=words)
    if compare:
        show(words=f"{words}\n\nTiming {request.steps} steps against one token at a time ...")
        show(words=f"{words}\n\n{_compare(session, request, show)}")


def edit(session, request, show, *, picture, mask, own_pixels):
    """Generate the marked part of a picture as a class.

    Args:
        show: as of `generate`. picture: uint8 [S, S, 3] or None. mask: bool [H, W] at any scale, or None.
        own_pixels: restore the picture's pixels outside the generated cells.
    Raises:
        ValueError: no picture, or nothing marked.
    """
    if picture is None:
        raise ValueError("there is no picture yet: upload one, or take one that was generated")
    if mask is None or not mask.any():
        raise ValueError("nothing is marked: paint over what is to change")
    session.check(request)
    cells = cells_under(mask, session.model.config.grid_size)
    made, words = _draw(session, request, show, cells, picture)
    if own_pixels:
        made = paste(picture, made, np.tile(cells, (len(made), 1)), session.side // 16)
    show(made=made, words=words, picture=session.sheet(made))


def _settings(session, request, cells, steps):
    return resolve_settings(
        session.model.config.grid_size, generation_steps=min(steps, int(cells.sum())), order=request.order,
        known=np.tile(~cells, (request.images, 1)), num_images=request.images,
        sampling=request.sampling, seed=request.seed,
    )


def _tokens(session, request, settings, orders, picture, on_group):
    """Tokens int64 [n, L]; a whole image is an edit of which nothing is kept."""
    tokens = torch.zeros(1, settings.known.shape[1], dtype=torch.int64, device=session.device)
    if picture is not None:
        tokens = session.tokenizer.encode(to_unit(picture[None]).to(session.device))
    keep, labels = torch.from_numpy(settings.known), torch.full((request.images,), request.label)
    return edit_tokens(
        session.model, tokens.expand(*keep.shape), keep.to(session.device), labels, orders,
        settings.group_sizes, settings.sampling, seed=settings.seed, on_group=on_group,
    )


@torch.inference_mode()
def _draw(session, request, show, cells, picture=None):
    """Images of which `cells`, bool [L], are generated, uint8 [n, S, S, 3], and a line about them."""
    settings = _settings(session, request, cells, request.steps)
    orders, sizes, kept = settings.orders(range(request.images)), settings.group_sizes, int((~cells).sum())
    show(words="")
    if not callable(orders):
        whole = whole_order(torch.from_numpy(settings.known), orders)
        show(order=_order_map(whole, kept, settings))
    start, groups, images = time.perf_counter(), 0, None

    def on_group(tokens, slots, order):
        nonlocal groups, images, whole
        whole = order.cpu()
        groups += 1
        images = to_uint8(session.tokenizer.decode(tokens)).cpu().numpy()
        seconds = time.perf_counter() - start
        progress = f"step {groups} of {len(sizes)}: {slots - kept} of {len(cells) - kept} tokens"
        show(
            picture=session.sheet(pictures.filled(images, whole.numpy(), slots)),
            words=f"{progress}, {seconds:.2f} s with display",
        )

    _tokens(session, request, settings, orders, picture, on_group)
    if callable(orders):
        show(order=_order_map(whole, kept, settings))
    seconds = time.perf_counter() - start
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    return images, f"{count} in {len(sizes)} steps, {seconds:.2f} s with display"


@torch.inference_mode()
def _compare(session, request, show):
    """Time the same images without display, in the requested steps and token by token, in turns; of several
    runs the shortest counts, which other work on the machine lengthened least."""
    num_tokens = session.model.config.num_tokens
    cells = np.ones(num_tokens, bool)
    variants = [_settings(session, request, cells, steps) for steps in (request.steps, num_tokens)]
    seconds, start = [], time.perf_counter()
    while not seconds or (len(seconds) < 5 and time.perf_counter() - start < TIMING_SECONDS):
        seconds.append([_time(session, request, settings, show) for settings in variants])
    fast, slow = np.min(seconds, axis=0)
    return (
        f"Without display, best of {len(seconds)}: {request.steps} steps {fast:.3f} s, "
        f"one token at a time ({num_tokens} steps) {slow:.3f} s, **{slow / fast:.1f} times as long**."
    )


def _time(session, request, settings, show):
    orders = settings.orders(range(request.images))
    start = time.perf_counter()
    session.tokenizer.decode(_tokens(session, request, settings, orders, None, lambda *_: show()))
    synchronize(session.device)
    return time.perf_counter() - start


def _order_map(whole, kept, settings):
    """The step of each cell of the first image, from 1 (0 is kept), as a drawing: uint8 [H, W, 3]."""
    sizes = (kept, *settings.group_sizes) if kept else settings.group_sizes
    steps = steps_of_cells(whole[:1].numpy(), sizes)[0] + (not kept)
    return pictures.order_map(steps.reshape(settings.grid_size, -1), f"{settings.order} order")


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


class Worker:
    """One thread that makes one picture at a time, whoever asks."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")

    def stream(self, make, *args, **kwargs):
        """Yield what `make(*args, show, **kwargs)` shows, one dict at a time; its errors are raised here.
        When the generator is closed, `make` is cancelled at its next `show`."""
        shown, cancelled = queue.SimpleQueue(), threading.Event()

        def show(**parts):
            if cancelled.is_set():
                raise Cancelled
            if parts:
                shown.put(parts)

        making = self._thread.submit(make, *args, show, **kwargs)
        making.add_done_callback(lambda _: shown.put(None))
        try:
            while (parts := shown.get()) is not None:
                yield parts
            making.result()
        finally:
            cancelled.set()
            making.cancel()
