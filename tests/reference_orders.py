"""The locality-aware order in plain Python, one order and one cell at a time, to hold the fast one against.

`reference_order` makes an order, sentence by sentence as the method is described (arXiv 2507.01957);
`replay` goes through an order made by anyone and says of each slot what it could have been.
"""

import math
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Pick(NamedTuple):
    """What was taken at a slot, and what the best was that could be had."""

    group: int
    near: bool  # whether a near cell far enough from the group could be had
    score: float  # of the cell taken
    best_score: float  # of the near cells that could be had, else 0
    separation: float  # Chebyshev distance to the group's earlier cells; infinite for its first
    distance: float  # squared Euclidean distance to the group's earlier cells; infinite for its first
    best_distance: float  # greatest such distance of a free cell


def score(cell: int, generated: set[int], grid_size: int) -> float:
    """Sum of 1 / distance over the generated cells among the 8 neighbours."""
    y, x = divmod(cell, grid_size)
    orthogonal = diagonal = 0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            inside = 0 <= y + dy < grid_size and 0 <= x + dx < grid_size
            if (dy or dx) and inside and (y + dy) * grid_size + x + dx in generated:
                orthogonal += dy == 0 or dx == 0
                diagonal += dy != 0 and dx != 0
    return orthogonal + diagonal / math.sqrt(2)


def chebyshev(a: int, b: int, grid_size: int) -> int:
    return max(abs(a // grid_size - b // grid_size), abs(a % grid_size - b % grid_size))


def squared(a: int, b: int, grid_size: int) -> int:
    """Squared Euclidean distance: a whole number, so that ties are exact."""
    return (a // grid_size - b // grid_size) ** 2 + (a % grid_size - b % grid_size) ** 2


def to_group(distance, cell: int, group: Sequence[int], grid_size: int) -> float:
    """`distance` of a cell to the nearest cell of the group, infinite from an empty one."""
    return min((distance(cell, other, grid_size) for other in group), default=math.inf)


def reference_order(
    group_sizes: Sequence[int],
    grid_size: int,
    proximity_threshold: float,
    repulsion_threshold: float,
    rng: random.Random,
    known: Collection[int] = (),
) -> list[int]:
    """One order, a list of L raster positions. Ties, of score or of distance, are in random order.

    With `known` cells the order lists the others, and all its groups follow the rule of the later ones.
    """
    order = [] if known else [rng.randrange(grid_size**2)]
    for size in group_sizes[len(order) :]:
        generated = {*known, *order}
        free = [cell for cell in range(grid_size**2) if cell not in generated]
        rng.shuffle(free)
        scores = {cell: score(cell, generated, grid_size) for cell in free}
        near = [cell for cell in free if scores[cell] >= proximity_threshold]
        near.sort(key=scores.get, reverse=True)  # stable: ties stay in random order
        group: list[int] = []
        for cell in near:
            if len(group) < size and to_group(chebyshev, cell, group, grid_size) > repulsion_threshold:
                group.append(cell)
        rest = [cell for cell in free if cell not in group]
        rng.shuffle(rest)
        distances = {cell: to_group(squared, cell, group, grid_size) for cell in rest}
        while len(group) < size:
            farthest = max(distances, key=distances.get)  # the first of those that tie
            del distances[farthest]
            group.append(farthest)
            for cell in distances:
                distances[cell] = min(distances[cell], squared(cell, farthest, grid_size))
        order += group
    return order


def replay(
    order: Sequence[int],
    group_sizes: Sequence[int],
    grid_size: int,
    proximity_threshold: float,
    repulsion_threshold: float,
    known: Collection[int] = (),
) -> list[Pick]:
    """What each slot of `order` took and could have taken; the `known` cells were there before."""
    picks = []
    start = 0
    for number, size in enumerate(group_sizes):
        generated = {*known, *order[:start]}
        group: list[int] = []
        for cell in order[start : start + size]:
            free = [c for c in range(grid_size**2) if c not in generated and c not in group]
            apart = [c for c in free if to_group(chebyshev, c, group, grid_size) > repulsion_threshold]
            scores = {c: score(c, generated, grid_size) for c in apart}
            near = [scores[c] for c in apart if scores[c] >= proximity_threshold]
            picks.append(
                Pick(
                    group=number,
                    near=bool(near),
                    score=score(cell, generated, grid_size),
                    best_score=max(near, default=0.0),
                    separation=to_group(chebyshev, cell, group, grid_size),
                    distance=to_group(squared, cell, group, grid_size),
                    best_distance=max(to_group(squared, c, group, grid_size) for c in free),
                )
            )
            group.append(cell)
        start += size
    return picks
