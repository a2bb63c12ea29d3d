"""How images are to be decoded, checked and resolved before anything slow starts.

Knows schedules, orders and the settings of `generate_tokens`. Does not know models or flags.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from orders.lpd_order import make_orders
from orders.order_file import load_orders
from orders.schedule import check_group_sizes, cosine_group_sizes


def default_steps(num_tokens):
    """20 steps for 256 tokens and 48 for 1024, as published; the power law through the two elsewhere."""
    return min(num_tokens, max(2, round(20 * (num_tokens / 256) ** 0.6315)))


def default_repulsion(grid_size):
    """2 on 16x16 and 4 on 32x32, as published; in proportion elsewhere."""
    return max(1.0, grid_size / 8)


@dataclass(frozen=True)
class GenerationSettings:
    """All that decides an image beside the weights, its label and its number.

    Attributes:
        grid_size: side of the token grid. group_sizes: tokens of each step.
        order: lpd, random, raster or halton. file_orders: uint16 [n, L] in place of made ones.
        known: bool [n, L], cells of image 0..n-1 that are not generated; the group sizes are of the others.
        proximity_threshold, repulsion_threshold: of made lpd orders.
        cfg, cfg_schedule, temperature, top_k, top_p, seed: as of `generate_tokens`.
    """

    grid_size: int
    group_sizes: tuple[int, ...]
    order: str = "lpd"
    file_orders: np.ndarray | None = field(default=None, repr=False, compare=False)
    known: np.ndarray | None = field(default=None, repr=False, compare=False)
    proximity_threshold: float = 1.0
    repulsion_threshold: float = 1.0
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def orders(self, image_ids):
        """Orders of images, int64 [n, L] less the known cells, which with (seed, image id) decide them."""
        ids = np.asarray(image_ids)
        if self.file_orders is not None:
            return torch.from_numpy(self.file_orders[ids].astype(np.int64))
        orders = make_orders(
            self.order, len(ids), self.group_sizes, self.grid_size, seed=self.seed, image_ids=ids,
            proximity_threshold=self.proximity_threshold, repulsion_threshold=self.repulsion_threshold,
            known=None if self.known is None else self.known[ids],
        )  # fmt: skip
        return torch.from_numpy(orders.astype(np.int64))

    def decoding(self):
        """The keyword arguments of `generate_tokens`."""
        names = ("cfg", "cfg_schedule", "temperature", "top_k", "top_p", "seed")
        return {name: getattr(self, name) for name in names}

    def as_json(self):
        """A dict of plain values."""
        values = {k: v for k, v in self.__dict__.items() if k not in ("file_orders", "known")}
        return {**values, "group_sizes": list(self.group_sizes), "steps": len(self.group_sizes)}


def resolve_settings(
    grid_size, *, generation_steps=None, group_sizes=None, lpd_order_file=None, num_images=1,
    repulsion_threshold=None, known=None, **settings,
):  # fmt: skip
    """`GenerationSettings` from what a user gave; what is None gets its default for the grid.

    Raises:
        ValueError: group sizes that do not fit the cells to generate, or an order file that does not fit, has
            fewer than `num_images` orders, or is given together with `known` cells.
        OSError: the order file cannot be read.
    """
    num_tokens = grid_size**2
    if known is not None:
        if lpd_order_file:
            raise ValueError("--lpd_order_file: orders of whole images are not for editing")
        num_tokens -= int(known[0].sum())
    if group_sizes is not None and generation_steps is not None and len(group_sizes) != generation_steps:
        raise ValueError(
            f"--group_sizes has {len(group_sizes)} steps, --generation_steps is {generation_steps}"
        )
    if group_sizes is None:
        group_sizes = cosine_group_sizes(num_tokens, generation_steps or default_steps(num_tokens))
    if repulsion_threshold is None:
        repulsion_threshold = default_repulsion(grid_size)
    return GenerationSettings(
        grid_size=grid_size,
        group_sizes=check_group_sizes(group_sizes, num_tokens),
        file_orders=load_orders(lpd_order_file, num_tokens, num_images) if lpd_order_file else None,
        known=known,
        repulsion_threshold=repulsion_threshold,
        **settings,
    )
