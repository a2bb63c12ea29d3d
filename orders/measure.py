"""What an order does step by step: how near a group is to what is generated, how far apart its cells are.

Knows orders and group sizes; does not know which algorithm made them.
Source of the score: Locality-aware Parallel Decoding, arXiv 2507.01957.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


class StepStatistics(NamedTuple):
    """Of each order and step, float64 [n, G]."""

    score: np.ndarray  # mean over the group: sum of 1 / distance over the generated ones of the 8 neighbours
    near_share: np.ndarray  # share of the group whose score reaches the proximity threshold
    least_distance: np.ndarray  # least Euclidean distance of two cells of the group; nan for a group of one


def step_statistics(
    orders: np.ndarray, group_sizes: Sequence[int], grid_size: int, *, proximity_threshold: float = 1.0
) -> StepStatistics:
    """Statistics of `orders` [n, L] decoded in `group_sizes`; generated means: in an earlier group."""
    starts = np.array([0, *accumulate(group_sizes)][:-1])
    scores = slot_scores(orders, group_sizes, grid_size)
    near = (scores >= proximity_threshold).astype(np.float64)
    return StepStatistics(
        score=np.add.reduceat(scores, starts, axis=1) / group_sizes,
        near_share=np.add.reduceat(near, starts, axis=1) / group_sizes,
        least_distance=_least_distances(orders, group_sizes, grid_size),
    )


def steps_of_cells(orders: np.ndarray, group_sizes: Sequence[int]) -> np.ndarray:
    """The step, from 0, at which each raster position is generated: int64 [n, L]."""
    steps = np.empty(orders.shape, np.int64)
    step_of_slot = np.repeat(np.arange(len(group_sizes)), group_sizes)
    np.put_along_axis(steps, orders.astype(np.int64), step_of_slot[None], axis=1)
    return steps


def slot_scores(orders: np.ndarray, group_sizes: Sequence[int], grid_size: int) -> np.ndarray:
    """The proximity score of the cell of each slot when its group begins: float64 [n, L]."""
    n, num_tokens = orders.shape
    steps = steps_of_cells(orders, group_sizes).reshape(n, grid_size, grid_size)
    never = len(group_sizes)
    around = np.pad(steps, ((0, 0), (1, 1), (1, 1)), constant_values=never)
    scores = np.zeros(steps.shape)
    for dy, dx in NEIGHBOURS:
        neighbour = around[:, 1 + dy : 1 + dy + grid_size, 1 + dx : 1 + dx + grid_size]
        scores += (neighbour < steps) / np.hypot(dy, dx)
    return np.take_along_axis(scores.reshape(n, num_tokens), orders.astype(np.int64), axis=1)


def _least_distances(orders: np.ndarray, group_sizes: Sequence[int], grid_size: int) -> np.ndarray:
    least = np.full((len(orders), len(group_sizes)), np.nan)
    start = 0
    for group, size in enumerate(group_sizes):
        y, x = np.divmod(orders[:, start : start + size].astype(np.int64), grid_size)
        if size > 1:
            a, b = np.triu_indices(size, 1)
            least[:, group] = np.hypot(y[:, a] - y[:, b], x[:, a] - x[:, b]).min(axis=1)
        start += size
    return least
