"""The locality-aware order in plain Python, one order and one cell at a time.

`reference_order` makes an order, sentence by sentence as the method is described (arXiv 2507.01957); `replay`
goes through an order made by anyone and lists, for each slot, the cells that the method allows there.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pick:
    """The cell of a slot, and the cells that were allowed there."""

    cell: int
    allowed: set
    near: bool  # taken by the rule of near cells
    separation: float  # Chebyshev distance to the group's earlier cells; infinite for its first


def score(cell, generated, grid_size):
    """Sum of 1 / distance over the generated cells among the 8 neighbours."""
    y, x = divmod(cell, grid_size)
    beside = across = 0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            inside = 0 <= y + dy < grid_size and 0 <= x + dx < grid_size
            if (dy or dx) and inside and (y + dy) * grid_size + x + dx in generated:
                beside += dy == 0 or dx == 0
                across += dy != 0 and dx != 0
    return beside + across / math.sqrt(2)


def chebyshev(a, b, grid_size):
    return max(abs(a // grid_size - b // grid_size), abs(a % grid_size - b % grid_size))


def squared(a, b, grid_size):
    """Squared Euclidean distance: an integer, so that ties are exact."""
    return (a // grid_size - b // grid_size) ** 2 + (a % grid_size - b % grid_size) ** 2


def to_group(distance, cell, group, grid_size):
    """`distance` of a cell to the nearest cell of the group, infinite from an empty one."""
    return min((distance(cell, other, grid_size) for other in group), default=math.inf)


def reference_order(group_sizes, grid_size, proximity_threshold, repulsion_threshold, rng, known=()):
    """One order, a list of the raster positions that are not `known`. `rng` is a random.Random."""
    order = []
    for size in group_sizes:
        generated = {*known, *order}
        free = [cell for cell in range(grid_size**2) if cell not in generated]
        rng.shuffle(free)
        scores = {cell: score(cell, generated, grid_size) for cell in free}
        free.sort(key=scores.get, reverse=True)  # stable: ties stay in random order
        near = [cell for cell in free if scores[cell] >= proximity_threshold]
        group = []
        for cell in near:
            if len(group) < size and to_group(chebyshev, cell, group, grid_size) > repulsion_threshold:
                group.append(cell)
        skipped = [cell for cell in near if cell not in group]
        candidates = [cell for cell in free if cell not in near] + skipped
        fill(group, candidates, size, grid_size, rng)
        order += group
    return order


def fill(group, candidates, size, grid_size, rng):
    """Complete the list `group` to `size` cells by farthest-point sampling among the candidates."""
    if len(candidates) <= size - len(group):
        group += candidates
        return
    if not group:
        group.append(candidates.pop(rng.randrange(len(candidates))))
    distances = {cell: to_group(squared, cell, group, grid_size) for cell in candidates}
    while len(group) < size:
        farthest = max(distances, key=distances.get)  # of equal distances the first candidate
        del distances[farthest]
        group.append(farthest)
        for cell in distances:
            distances[cell] = min(distances[cell], squared(cell, farthest, grid_size))


def replay(order, group_sizes, grid_size, proximity_threshold, repulsion_threshold, known=()):
    """A Pick for each slot of `order`; the `known` cells were there before."""
    picks = []
    start = 0
    for size in group_sizes:
        generated = {*known, *order[:start]}
        free = [cell for cell in range(grid_size**2) if cell not in generated]
        scores = {cell: score(cell, generated, grid_size) for cell in free}
        place = {cell: (scores[cell] < proximity_threshold, scores[cell]) for cell in free}  # in the list
        group = []
        for cell in order[start : start + size]:
            rest = [c for c in free if c not in group]
            separation = {c: to_group(chebyshev, c, group, grid_size) for c in rest}
            near = [
                c for c in rest if scores[c] >= proximity_threshold and separation[c] > repulsion_threshold
            ]
            if near:
                allowed = best(near, scores.get)
            elif len(free) <= size:  # the list is taken whole
                allowed = best(rest, place.get)
            elif not group:
                allowed = set(rest)
            else:
                distance = {c: to_group(squared, c, group, grid_size) for c in rest}
                allowed = best(best(rest, distance.get), place.get)
            picks.append(Pick(cell, allowed, bool(near), separation[cell]))
            group.append(cell)
        start += size
    return picks


def best(cells, key):
    """The cells of the greatest key."""
    greatest = max(map(key, cells))
    return {cell for cell in cells if key(cell) == greatest}
