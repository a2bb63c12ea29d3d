"""Generation orders: locality-aware, spread, raster, random and Halton, vectorised over thousands of images.

`order[i, t]` is the raster position, of L = grid_size**2, that image i generates at slot t. Random choices
come from a hash of (seed, image id, group, cell), so an order does not depend on what else is in the call.
Source of the locality-aware order: Locality-aware Parallel Decoding, arXiv 2507.01957, section 3.3. Cells are
compared by integers: what decides first in the high bits, then what breaks ties. The same rules in plain
Python, one cell at a time, are in tests/core/reference_orders.py.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from orders.schedule import check_group_sizes

ORDER_KINDS = ("lpd", "spread", "raster", "random", "halton")
LARGEST_GRID = 128  # the tables of a grid take up to 8 L**2 bytes
CELLS_PER_CHUNK = 1 << 16  # so that the arrays of one chunk fit in an L2 cache
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the step of splitmix64 (Steele et al. 2014)

# A cell with a generated neighbours beside it and b across a corner has the score a + b / sqrt 2. The integer
# 7 a + 5 b ranks the 25 cases alike, as no ratio of integers up to 4 lies between 5 / 7 and 1 / sqrt 2.
BESIDE, ACROSS = 7, 5
HIGHEST_RANK = 1 + 4 * BESIDE + 4 * ACROSS  # of a free cell, from 1; a generated cell has rank 0
SCORE_TIE_BITS = 32 - (HIGHEST_RANK + 1).bit_length()

# Crowding times L is below 2^(4 + 20 + 14) on the largest grid.
CROWDING_BITS, CROWDING_TIE_BITS = 20, 20
LATTICE_SUM = 9.0336216831  # of 1 / distance^3 over the square lattice: 4 zeta(3/2) beta(3/2)


def make_orders(kind, n, group_sizes, grid_size, *, seed=0, image_ids=None, known=None, **thresholds):
    """Orders of any kind in ORDER_KINDS, uint16 [n, L]; only "lpd" depends on group sizes and thresholds.

    With `known` cells, bool [L] or [n, L], equally many in each image, orders list only the others: "lpd" and
    "spread" as if the known ones were generated already, the other kinds by leaving them out. Raises
    ValueError as `lpd_orders` does, and for an unknown kind.
    """
    options = {"seed": seed, "image_ids": image_ids}
    if kind == "lpd":
        return lpd_orders(n, group_sizes, grid_size, known=known, **options, **thresholds)
    group_sizes, known = _check_known(known, n, group_sizes, grid_size)
    if kind == "spread":
        return spread_orders(n, grid_size, known=known, **options)
    if kind == "raster":
        orders = raster_orders(n, grid_size)
    elif kind == "random":
        orders = random_orders(n, grid_size, **options)
    elif kind == "halton":
        orders = halton_orders(n, grid_size, **options)
    else:
        raise ValueError(f"order must be one of {', '.join(ORDER_KINDS)}, not {kind!r}")
    listed = ~np.take_along_axis(known, orders.astype(np.int64), axis=1)
    return orders[listed].reshape(n, sum(group_sizes))


def raster_orders(n, grid_size):
    """Rows of 0, 1, ..., L - 1: uint16 [n, L]."""
    return np.tile(np.arange(_num_tokens(grid_size), dtype=np.uint16), (n, 1))


def random_orders(n, grid_size, *, seed=0, image_ids=None):
    """Uniformly random permutations, uint16 [n, L]; row i depends on (seed, image_ids[i]) alone."""
    num_tokens = _num_tokens(grid_size)
    orders = np.empty((n, num_tokens), np.uint16)
    for rows, keys in _chunks(n, num_tokens, seed, image_ids):
        orders[rows] = _random_bits(keys, 0, num_tokens).argsort(axis=1, kind="stable")
    return orders


def halton_orders(n, grid_size, *, seed=0, image_ids=None):
    """The cells in the order in which the Halton points of bases 2 and 3 first visit them, uint16 [n, L].

    Each image shifts the points cyclically by a random number of rows and columns, so that its first cell is
    uniform; row i depends on (seed, image_ids[i]) alone.
    """
    num_tokens = _num_tokens(grid_size)
    y, x = np.divmod(_halton_visit(grid_size), grid_size)
    orders = np.empty((n, num_tokens), np.uint16)
    for rows, keys in _chunks(n, num_tokens, seed, image_ids):
        half = np.uint64(32)  # a random number below 2**32, times the grid size, over 2**32
        shift = (_random_bits(keys, 0, 2) >> half) * np.uint64(grid_size) >> half  # [rows, 2]
        down, across = shift.astype(np.int64).T[:, :, None]
        orders[rows] = (y + down) % grid_size * grid_size + (x + across) % grid_size
    return orders


def spread_orders(n, grid_size, *, seed=0, image_ids=None, known=None):
    """Orders that fill the grid evenly, uint16 [n, L]; with k `known` cells, bool [n, L], uint16 [n, L - k].

    The next cell is the least crowded one: crowding is the sum of 1 / distance^3 over the generated cells,
    and over all cells beyond the edge of the grid times twice the share of the grid that is generated: a cell
    at an edge tells less about the others and comes later. Ties are in random order, so the first cell is
    uniform. Row i depends on (seed, image_ids[i]) and its known cells alone.
    """
    num_tokens = _num_tokens(grid_size)
    start = 0 if known is None else int(known[0].sum())
    steps = _crowding_steps(grid_size)
    orders = np.empty((n, num_tokens - start), np.uint16)
    for rows, keys in _chunks(n, num_tokens, seed, image_ids):
        ties = _random_bits(keys, 0, num_tokens) >> np.uint64(64 - CROWDING_TIE_BITS)
        crowding = ties.astype(np.int64)
        if start:
            crowding += known[rows] @ steps
        for slot in range(num_tokens - start):
            cells = crowding.argmin(axis=1)
            crowding += steps[cells]
            orders[rows, slot] = cells
    return orders


@functools.lru_cache(maxsize=4)
def _crowding_steps(grid_size):
    """By how much the crowding of every cell grows when a cell is generated, int64 [L, L], above the tie
    bits.

    In integers, so that sums are exact: 2^CROWDING_BITS / distance^3, times L so that a share of the grid is
    an integer too. The generated cell itself gets more than any crowding.
    """
    num_tokens = grid_size**2
    y, x = np.divmod(np.arange(num_tokens), grid_size)
    squares = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    weights = np.rint(2**CROWDING_BITS * np.maximum(squares, 1) ** -1.5).astype(np.int64)
    np.fill_diagonal(weights, 0)
    beyond = round(2**CROWDING_BITS * LATTICE_SUM) - weights.sum(axis=1)  # [L]
    steps = weights * num_tokens + 2 * beyond << CROWDING_TIE_BITS
    np.fill_diagonal(steps, 1 << 62)
    return steps


def lpd_orders(
    n, group_sizes, grid_size, *,
    proximity_threshold=1.0, repulsion_threshold=1.0, seed=0, image_ids=None, known=None,
):
    """Locality-aware orders, uint16 [n, L]; with k `known` cells, as in `make_orders`, uint16 [n, L - k].

    A group first takes near cells (score: sum of 1 / distance over the generated ones of the 8 neighbours;
    near: at least `proximity_threshold`) by falling score, each farther from those it has (Chebyshev) than
    `repulsion_threshold`. The rest comes from the list of far cells by falling score, then the skipped near
    cells by falling score: by farthest-point sampling, in which equal distances go to the first in the list
    and an empty group starts at random, or, if the group needs all of the list, in its order.

    Equal scores are in random order. Row i depends on (seed, image_ids[i]) alone; `image_ids` [n] are 0..n-1
    by default. Raises ValueError for anything out of range, and for group sizes that do not start with 1 or
    do not sum to L - k.
    """
    group_sizes, known = _check_known(known, n, group_sizes, grid_size)
    rules = _rules(grid_size, float(proximity_threshold), float(repulsion_threshold))
    orders = np.empty((n, sum(group_sizes)), np.uint16)
    for rows, keys in _chunks(n, grid_size**2, seed, image_ids):
        orders[rows] = _grow(keys, group_sizes, rules, known[rows])
    return orders


@dataclass(frozen=True)
class _Rules:
    """Tables of one grid and one pair of thresholds."""

    grid_size: int
    least_near: np.uint32  # the least score key of a near cell
    apart: np.ndarray  # uint32 [L, L]: all ones if two cells may share a group, else 0
    distance: np.ndarray  # unsigned [L, L]: squared distance of two cells
    unreached: int  # larger than any squared distance


@functools.lru_cache(maxsize=4)
def _rules(grid_size, proximity_threshold, repulsion_threshold):
    for name, value in (("proximity", proximity_threshold), ("repulsion", repulsion_threshold)):
        if not value >= 0:
            raise ValueError(f"{name} threshold must be 0 or more, not {value}")
    near_ranks = [
        1 + BESIDE * beside + ACROSS * across
        for beside in range(5)
        for across in range(5)
        if beside + across / math.sqrt(2) >= proximity_threshold
    ]
    least_near = np.uint32(min(near_ranks, default=HIGHEST_RANK + 1) << SCORE_TIE_BITS)

    y, x = np.divmod(np.arange(grid_size**2), grid_size)
    dy, dx = (np.abs(coordinate[:, None] - coordinate) for coordinate in (y, x))  # [L, L]
    apart = np.where(np.maximum(dy, dx) > repulsion_threshold, np.uint32(2**32 - 1), np.uint32(0))
    unreached = 2 * (grid_size - 1) ** 2 + 1
    distance = (dy**2 + dx**2).astype(np.min_scalar_type(unreached))
    return _Rules(grid_size, least_near, apart, distance, unreached)


def _grow(keys, group_sizes, rules, known):
    """Orders uint16 [n, sum(group_sizes)] of the images with hash keys uint64 [n], grown together from the
    `known` cells, bool [n, L]. The first group needs no rule of its own: all cells tie."""
    generated = known.astype(np.uint8)  # [n, L]
    num_tokens = known.shape[1]
    order = np.empty((len(keys), sum(group_sizes)), np.uint16)
    workspace = np.empty((2, len(keys), num_tokens), np.uint64)
    start = 0
    for group, size in enumerate(group_sizes):
        ties = _random_bits(keys, group * num_tokens, num_tokens, workspace).astype(np.uint32)
        beside, across = count_neighbours(generated, rules.grid_size)
        ranks = (1 + BESIDE * beside + ACROSS * across) * (1 - generated)
        score_key = ranks.astype(np.uint32) << np.uint32(SCORE_TIE_BITS)  # the rank, then random bits
        score_key |= ties >> np.uint32(32 - SCORE_TIE_BITS)
        # The list has far cells first, then near ones: the key of a far cell becomes negative, which wraps
        # around to a number above those of the near cells. Within both the order stays.
        list_rank = score_key - rules.least_near
        picks, taken = _take_near(score_key, size, rules)
        rows = np.argsort(taken, kind="stable")
        rows = rows[: np.searchsorted(taken[rows], size)]  # those not full, the emptiest first
        if len(rows):
            whole = start + size == order.shape[1]  # the last group
            candidates = ranks[rows] > 0, list_rank[rows]
            picks[:, rows] = _take_from_list(picks[:, rows], taken[rows], *candidates, whole, rules)
        np.put_along_axis(generated, picks.T, 1, axis=1)
        order[:, start : start + size] = picks.T
        start += size
    return order


def count_neighbours(generated, grid_size):
    """How many generated neighbours each cell has beside it, and how many across a corner, uint8 [n, L] both,
    from `generated` uint8 [n, L]: 1 where a cell is generated, else 0."""
    padded = np.pad(generated.reshape(-1, grid_size, grid_size), ((0, 0), (1, 1), (1, 1)))
    middle = padded[:, 1:-1]
    vertical = padded[:, :-2] + padded[:, 2:]
    beside = vertical[:, :, 1:-1] + middle[:, :, :-2] + middle[:, :, 2:]
    across = vertical[:, :, :-2] + vertical[:, :, 2:]
    return beside.reshape(generated.shape), across.reshape(generated.shape)


def _take_near(score_key, size, rules):
    """Take up to `size` near cells of each order, highest score key first; each bars the cells around it.

    `score_key` uint32 [n, L] is overwritten. Returns the cells, int64 [size, n], and how many of each order
    are valid, int64 [n]: once an order has none left, it stays so.
    """
    picks = np.zeros((size, len(score_key)), np.int64)
    keys = np.zeros((size, len(score_key)), np.uint32)
    rows = np.arange(len(score_key))
    for i in range(size):
        if i:
            score_key &= rules.apart[picks[i - 1]]
        score_key.argmax(axis=1, out=picks[i])
        keys[i] = score_key[rows, picks[i]]
        if keys[i].max() < rules.least_near:
            break
    return picks, (keys >= rules.least_near).sum(axis=0)


def _take_from_list(picks, taken, free, list_rank, whole, rules):
    """Complete `picks` int64 [size, n], the first `taken` [n] of which are valid, from the list of the cells
    left: by farthest-point sampling or, if `whole`, in the order of the list.

    `free` bool [n, L]; `list_rank` uint32 [n, L] is higher for cells earlier in the list, and is overwritten.
    `taken` must be non-decreasing: the orders that still need an i-th cell are then the first ones.
    """
    if not whole:
        empty = np.searchsorted(taken, 1)  # the orders whose group is empty start at random
        random_bits = list_rank[:empty] << np.uint32(32 - SCORE_TIE_BITS)
        picks[0, :empty] = (random_bits * free[:empty]).argmax(axis=1)
        taken = np.maximum(taken, 1)
    rank_bits = 32 - rules.unreached.bit_length()
    list_rank >>= np.uint32(32 - rank_bits)
    distance = free * rules.distance.dtype.type(rules.unreached)  # [n, L], to the group; 0: not free
    key = np.empty_like(list_rank)  # the distance, then the place in the list
    rows = np.arange(len(list_rank))
    needing = np.searchsorted(taken, np.arange(len(picks)), side="right").tolist()
    for i, m in enumerate(needing):  # the first m orders need an i-th cell
        if i and whole:
            distance[rows, picks[i - 1]] = 0
        elif i:
            np.minimum(distance, rules.distance[picks[i - 1]], out=distance)
        if m:
            np.left_shift(distance[:m], rank_bits, out=key[:m], dtype=np.uint32)
            np.bitwise_or(key[:m], list_rank[:m], out=key[:m])
            key[:m].argmax(axis=1, out=picks[i, :m])
    return picks


@functools.lru_cache(maxsize=4)
def _halton_visit(grid_size):
    """Raster positions int64 [L] as the Halton points, base 2 down and base 3 across, first reach them."""
    count = 8 * grid_size**2  # 5 L points reach every cell of all grids up to LARGEST_GRID
    y, x = ((_radical_inverse(count, base) * grid_size).astype(np.int64) for base in (2, 3))
    positions, first = np.unique(y * grid_size + x, return_index=True)
    return positions[first.argsort()]


def _radical_inverse(count, base):
    """The first `count` terms, from term 1, of the van der Corput sequence: float64 [count] below 1."""
    index, scale, value = np.arange(1, count + 1), 1.0, np.zeros(count)
    while index.any():
        scale /= base
        value += index % base * scale
        index //= base
    return value


def _num_tokens(grid_size):
    if not 1 <= grid_size <= LARGEST_GRID:
        raise ValueError(f"grid size must be from 1 to {LARGEST_GRID}, not {grid_size}")
    return grid_size**2


def _check_known(known, n, group_sizes, grid_size):
    """The checked group sizes of the cells that are not known, and the known cells as bool [n, L]."""
    L = _num_tokens(grid_size)
    known = np.zeros(L, bool) if known is None else np.asarray(known)
    if known.dtype != bool or known.shape not in ((L,), (n, L)):
        found = f"{known.dtype} {list(known.shape)}"
        raise ValueError(f"known cells must be bool [{L}] or [{n}, {L}], not {found}")
    counts = np.unique(known.sum(axis=-1)).tolist() or [0]
    if len(counts) > 1:
        raise ValueError(f"known cells must be equally many in each image, not {counts[0]} to {counts[-1]}")
    return check_group_sizes(group_sizes, L - counts[0]), np.broadcast_to(known, (n, L))


def _chunks(n, num_tokens, seed, image_ids):
    """Yield slices of the n rows and the hash keys, uint64, of their images: CELLS_PER_CHUNK cells each."""
    ids = np.arange(n) if image_ids is None else np.asarray(image_ids)
    if ids.shape != (n,):
        raise ValueError(f"image_ids must be {n} numbers, not of shape {ids.shape}")
    stream = _random_bits(np.array([seed % 2**64], np.uint64), 0, 1)[0]
    keys = _random_bits(stream + ids.astype(np.uint64) * GOLDEN, 0, 1)[:, 0]
    step = max(1, CELLS_PER_CHUNK // num_tokens)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        yield rows, keys[rows]


def _random_bits(keys, first, count, workspace=None):
    """`count` draws, from number `first`, of each key's splitmix64 stream: uint64 [len(keys), count].

    `workspace` uint64 [2, len(keys), count] is reused, as allocating it costs as much as the rest.
    """
    bits, shifted = np.empty((2, len(keys), count), np.uint64) if workspace is None else workspace
    np.add(keys[:, None], np.arange(first + 1, first + 1 + count, dtype=np.uint64) * GOLDEN, out=bits)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= np.right_shift(bits, np.uint64(shift), out=shifted)
        bits *= np.uint64(factor)
    bits ^= np.right_shift(bits, np.uint64(31), out=shifted)
    return bits
