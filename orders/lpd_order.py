"""Generation orders: locality-aware, raster, random and Halton, over thousands of images at once.

An order is a row of L = grid_size**2 raster positions: `order[i, t]` is what image i generates at slot t.
Every random choice comes from a counter-based hash of (seed, image id, group, cell), so that the order of an
image is the same whatever else is in the call, and nothing touches the global random state.

Knows grids, group sizes and numbers; knows no files, no model, no torch.
Source of the locality-aware order: Locality-aware Parallel Decoding, arXiv 2507.01957, section 3.3.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orders.schedule import check_group_sizes

ORDER_KINDS = ("lpd", "raster", "random", "halton")
LARGEST_GRID = 256  # positions are uint16
CELLS_PER_CHUNK = 1 << 16  # so many are worked on at a time: the arrays of one chunk fit in an L2 cache

# A cell with a generated neighbours beside it and b across a corner has the score a + b / sqrt 2. The whole
# number 7 a + 5 b puts the 25 cases in the same order: they could differ only where a ratio of whole numbers
# up to 4 lies between 5 / 7 and 1 / sqrt 2, and none does.
BESIDE, ACROSS = 7, 5
HIGHEST_RANK = 1 + 4 * BESIDE + 4 * ACROSS  # ranks of free cells start with 1; a generated cell has 0
SCORE_TIE_BITS = 32 - (HIGHEST_RANK + 1).bit_length()
EVERY_BIT = np.uint32(2**32 - 1)


def make_orders(
    kind: str,
    n: int,
    group_sizes: Sequence[int],
    grid_size: int,
    *,
    proximity_threshold: float = 1.0,
    repulsion_threshold: float = 1.0,
    seed: int = 0,
    image_ids: np.ndarray | None = None,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Orders of any kind in ORDER_KINDS, uint16 [n, L]; only "lpd" depends on group sizes and thresholds.

    With `known` cells, bool [L] or [n, L], equally many in each image, an order lists the others alone: the
    locality-aware one as if the known were generated already, the rest leave them out. The group sizes must
    fit the cells listed, whatever the kind. Raises ValueError as `lpd_orders` does, and for an unknown kind.
    """
    if kind == "lpd":
        return lpd_orders(
            n,
            group_sizes,
            grid_size,
            proximity_threshold=proximity_threshold,
            repulsion_threshold=repulsion_threshold,
            seed=seed,
            image_ids=image_ids,
            known=known,
        )
    group_sizes, known = _check_known(known, n, group_sizes, grid_size)
    if kind == "raster":
        orders = raster_orders(n, grid_size)
    elif kind == "random":
        orders = random_orders(n, grid_size, seed=seed, image_ids=image_ids)
    elif kind == "halton":
        orders = halton_orders(n, grid_size, seed=seed, image_ids=image_ids)
    else:
        raise ValueError(f"order must be one of {', '.join(ORDER_KINDS)}, not {kind!r}")
    if sum(group_sizes) == orders.shape[1]:
        return orders
    listed = ~np.take_along_axis(known, orders.astype(np.int64), axis=1)
    return orders[listed].reshape(n, sum(group_sizes))


def raster_orders(n: int, grid_size: int) -> np.ndarray:
    """Rows of 0, 1, ..., L - 1: uint16 [n, L]."""
    return np.tile(np.arange(_num_tokens(grid_size), dtype=np.uint16), (n, 1))


def random_orders(
    n: int, grid_size: int, *, seed: int = 0, image_ids: np.ndarray | None = None
) -> np.ndarray:
    """Uniformly random permutations, uint16 [n, L]; row i depends on (seed, image_ids[i]) alone."""
    num_tokens = _num_tokens(grid_size)
    orders = np.empty((n, num_tokens), np.uint16)
    for rows, keys in _chunks(n, num_tokens, seed, image_ids):
        orders[rows] = _random_bits(keys, 0, num_tokens).argsort(axis=1, kind="stable")
    return orders


def halton_orders(
    n: int, grid_size: int, *, seed: int = 0, image_ids: np.ndarray | None = None
) -> np.ndarray:
    """The cells in the order in which the Halton points of bases 2 and 3 first visit them, uint16 [n, L].

    Each image has the points shifted round the edges of the grid by a random number of rows and of
    columns, so that its first cell is uniform; row i depends on (seed, image_ids[i]) alone.
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


def lpd_orders(
    n: int,
    group_sizes: Sequence[int],
    grid_size: int,
    *,
    proximity_threshold: float = 1.0,
    repulsion_threshold: float = 1.0,
    seed: int = 0,
    image_ids: np.ndarray | None = None,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Locality-aware orders, uint16 [n, L]; with k `known` cells, as in `make_orders`, uint16 [n, L - k].

    A group first takes cells near what is already generated (score: sum of 1 / distance over the generated
    ones of the 8 neighbours; near: at least `proximity_threshold`) by falling score, each farther than
    `repulsion_threshold` (Chebyshev, in cells) from those the group has; the rest comes by farthest-point
    sampling. All ties are broken at random.

    `proximity_threshold` >= 0 (infinite: never near); `repulsion_threshold` >= 0 (below 1: no repulsion). Row
    i depends on (seed, image_ids[i]) alone; `image_ids` [n] are 0 or more, by default 0..n-1. Memory is the
    result, a few MB and tables of about 12 grid_size**3 bytes. Raises ValueError for group sizes that do not
    start with 1 or do not sum to L (less the known cells), and for anything else out of range.
    """
    group_sizes, known = _check_known(known, n, group_sizes, grid_size)
    rules = _rules(grid_size, float(proximity_threshold), float(repulsion_threshold))
    orders = np.empty((n, sum(group_sizes)), np.uint16)
    for rows, keys in _chunks(n, grid_size**2, seed, image_ids):
        orders[rows] = _grow(keys, group_sizes, rules, known[rows])
    return orders


class _Rules(NamedTuple):
    """What the algorithm looks up, for one grid and one pair of thresholds.

    The table of a cell tells how each position lies to it: `apart[window[cell]]`, `distance[window[cell]]`.
    The tables of all cells are overlapping windows of one small array, so that they stay in the cache.
    """

    grid_size: int
    least_near: np.uint32  # a near cell's key is this or more
    window: np.ndarray  # int64 [L]
    apart: np.ndarray  # uint32 [windows, L]: all ones where two cells may share a group, else 0
    distance: np.ndarray  # unsigned [windows, L]: squared distance of two cells
    unreached: int  # a squared distance above all on the grid: that of a cell from an empty group


@functools.lru_cache(maxsize=4)
def _rules(grid_size: int, proximity_threshold: float, repulsion_threshold: float) -> _Rules:
    for name, value in (("proximity", proximity_threshold), ("repulsion", repulsion_threshold)):
        if not value >= 0:
            raise ValueError(f"{name} threshold must be 0 or more, not {value}")
    ranks = [
        1 + BESIDE * beside + ACROSS * across
        for beside in range(5)
        for across in range(5)
        if beside + across / math.sqrt(2) >= proximity_threshold
    ]
    least_near = np.uint32(min(ranks, default=HIGHEST_RANK + 1) << SCORE_TIE_BITS)

    column = np.arange(grid_size)
    dy = np.abs(np.arange(1 - grid_size, grid_size))[:, None]  # [2S - 1, 1]
    dx = np.abs(column[:, None, None] - column)  # [S, 1, S]: from each column to each
    apart = np.where(np.maximum(dy, dx) > repulsion_threshold, EVERY_BIT, np.uint32(0))  # [S, 2S - 1, S]
    unreached = 2 * (grid_size - 1) ** 2 + 1
    distance = (dy**2 + dx**2).astype(np.min_scalar_type(unreached))
    y, x = np.divmod(np.arange(grid_size**2), grid_size)
    window = x * len(dy) + grid_size - 1 - y  # the rows of its column's plane from -y to grid_size - 1 - y
    return _Rules(grid_size, least_near, window, _windows(apart), _windows(distance), unreached)


def _windows(planes: np.ndarray) -> np.ndarray:
    """All runs of S rows in `planes` [S, 2S - 1, S], as a view [windows, L]."""
    num_tokens = len(planes) ** 2
    return np.lib.stride_tricks.sliding_window_view(planes.reshape(-1), num_tokens)[:: len(planes)]


def _grow(keys: np.ndarray, group_sizes: tuple[int, ...], rules: _Rules, known: np.ndarray) -> np.ndarray:
    """Orders, uint16, of the images whose hash keys are uint64 [n]: all grow together, group by group, from
    the `known` cells, bool [n, L].

    The first group needs no rule of its own: where nothing is generated all cells tie, by score and by
    distance.
    """
    num_tokens, side = rules.grid_size**2, rules.grid_size + 2
    y, x = np.divmod(np.arange(num_tokens), rules.grid_size)
    padded = (y + 1) * side + x + 1  # one empty cell all round, so that every cell has 8 neighbours
    occupied = np.zeros((len(keys), side * side), np.uint8)
    occupied[:, padded] = known
    order = np.empty((len(keys), sum(group_sizes)), np.uint16)
    room = np.empty((2, len(keys), num_tokens), np.uint64)
    start = 0
    for group, size in enumerate(group_sizes):
        bits = _random_bits(keys, group * num_tokens, num_tokens, room)  # low half: scores; high: distances
        ranks = _ranks(occupied, rules.grid_size)
        near = ranks.astype(np.uint32)
        near <<= SCORE_TIE_BITS
        near |= bits.astype(np.uint32) >> np.uint32(32 - SCORE_TIE_BITS)
        picks, taken = _take_near(near, size, rules)
        rows = np.argsort(taken, kind="stable")
        rows = rows[: np.searchsorted(taken[rows], size)]
        if len(rows):
            tie = (bits[rows] >> np.uint64(32)).astype(np.uint32)
            picks[:, rows] = _take_farthest(picks[:, rows], taken[rows], ranks[rows] > 0, tie, rules)
        occupied[np.arange(len(keys)), padded[picks]] = 1
        order[:, start : start + size] = picks.T
        start += size
    return order


def _ranks(occupied: np.ndarray, grid_size: int) -> np.ndarray:
    """The rank by score of every free cell, 1 to HIGHEST_RANK, and 0 for generated ones: uint8 [n, L].

    `occupied` uint8 [n, (S + 2) ** 2] is 1 where generated. All grids are worked on as one line, on which the
    neighbours of a cell are a fixed step away; what the line joins across edges is left out in the end.
    """
    side = grid_size + 2
    line = occupied.reshape(-1)
    above, middle, below = (line[row * side : len(line) - (2 - row) * side] for row in range(3))
    vertical = above + below
    ranks = np.empty_like(line)
    inner = ranks[side + 1 : -side - 1]
    np.multiply(vertical[1:-1] + middle[:-2] + middle[2:], BESIDE, out=inner)
    inner += ACROSS * (vertical[:-2] + vertical[2:])
    inner += 1
    inner *= 1 - middle[1:-1]
    return ranks.reshape(-1, side, side)[:, 1:-1, 1:-1].reshape(len(occupied), -1)


def _take_near(near: np.ndarray, size: int, rules: _Rules) -> tuple[np.ndarray, np.ndarray]:
    """Take up to `size` near cells of each order, highest key first; each bars the cells around it.

    `near` uint32 [n, L] holds the keys, and is changed. Returns the cells, int64 [size, n], and how many of
    each order are valid, int64 [n]: once an order has none left, it stays so.
    """
    picks = np.zeros((size, len(near)), np.int64)
    keys = np.zeros((size, len(near)), np.uint32)
    row_starts = np.arange(len(near)) * near.shape[1]
    for i in range(size):
        if i:
            near &= rules.apart[rules.window[picks[i - 1]]]
        near.argmax(axis=1, out=picks[i])
        near.take(row_starts + picks[i], out=keys[i], mode="clip")
        if keys[i].max() < rules.least_near:
            break
    return picks, (keys >= rules.least_near).sum(axis=0)


def _take_farthest(
    picks: np.ndarray, taken: np.ndarray, free: np.ndarray, tie: np.ndarray, rules: _Rules
) -> np.ndarray:
    """Complete `picks` int64 [size, n], the first `taken` [n] of which are valid, by farthest-point sampling.

    `taken` does not fall, so that the orders which sample their i-th cell come before those which have it.
    """
    tie_bits = 32 - rules.unreached.bit_length()
    tie >>= np.uint32(32 - tie_bits)
    distance = free * rules.distance.dtype.type(rules.unreached)  # [n, L], from the group
    key = np.empty_like(tie)
    sampling = np.searchsorted(taken, np.arange(len(picks)), side="right").tolist()
    for i, m in enumerate(sampling):
        if i:
            np.minimum(distance, rules.distance[rules.window[picks[i - 1]]], out=distance)
        if m:
            np.left_shift(distance[:m], tie_bits, out=key[:m], dtype=np.uint32)
            np.bitwise_or(key[:m], tie[:m], out=key[:m])
            key[:m].argmax(axis=1, out=picks[i, :m])
    return picks


@functools.lru_cache(maxsize=4)
def _halton_visit(grid_size: int) -> np.ndarray:
    """Raster positions int64 [L] as the Halton points, base 2 down and base 3 across, first reach them."""
    num_tokens = grid_size**2
    count = 8 * num_tokens  # mostly enough points to reach every cell
    while True:
        y, x = ((_radical_inverse(count, base) * grid_size).astype(np.int64) for base in (2, 3))
        positions, first = np.unique(y * grid_size + x, return_index=True)
        if len(positions) == num_tokens:
            return positions[first.argsort()]
        count *= 2


def _radical_inverse(count: int, base: int) -> np.ndarray:
    """The first `count` terms, from term 1, of the van der Corput sequence: float64 [count] below 1."""
    index, scale, value = np.arange(1, count + 1), 1.0, np.zeros(count)
    while index.any():
        scale /= base
        value += index % base * scale
        index //= base
    return value


def _num_tokens(grid_size: int) -> int:
    if not 1 <= grid_size <= LARGEST_GRID:
        raise ValueError(f"grid size must be from 1 to {LARGEST_GRID}, not {grid_size}")
    return grid_size**2


def _check_known(
    known: np.ndarray | None, n: int, group_sizes: Sequence[int], grid_size: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """The group sizes of the cells that are not known, and the known ones as bool [n, L]."""
    num_tokens = _num_tokens(grid_size)
    known = np.zeros(num_tokens, bool) if known is None else np.asarray(known)
    if known.dtype != bool or known.shape not in ((num_tokens,), (n, num_tokens)):
        raise ValueError(
            f"known cells must be bool [{num_tokens}] or [{n}, {num_tokens}], "
            f"not {known.dtype} {list(known.shape)}"
        )
    counts = np.unique(known.sum(axis=-1)).tolist() or [0]
    if len(counts) > 1:
        raise ValueError(f"known cells must be equally many in each image, not {counts[0]} to {counts[-1]}")
    group_sizes = check_group_sizes(group_sizes, num_tokens - counts[0])
    return group_sizes, np.broadcast_to(known, (n, num_tokens))


def _chunks(n: int, num_tokens: int, seed: int, image_ids: np.ndarray | None):
    """Yield slices of the n rows and the hash keys, uint64, of their images: CELLS_PER_CHUNK cells each."""
    ids = np.arange(n) if image_ids is None else np.asarray(image_ids)
    if ids.shape != (n,):
        raise ValueError(f"image_ids must be {n} numbers, not of shape {ids.shape}")
    if n and ids.min() < 0:
        raise ValueError(f"image_ids must be 0 or more, not {ids.min()}")
    stream = _random_bits(np.array([seed % 2**64], np.uint64), 0, 1)[0]
    keys = _random_bits(stream + ids.astype(np.uint64) * GOLDEN, 0, 1)[:, 0]
    step = max(1, CELLS_PER_CHUNK // num_tokens)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        yield rows, keys[rows]


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the step of splitmix64 (Steele et al. 2014)


def _random_bits(keys: np.ndarray, first: int, count: int, room: np.ndarray | None = None) -> np.ndarray:
    """`count` draws, from number `first`, of each key's splitmix64 stream: uint64 [len(keys), count].

    `room` uint64 [2, len(keys), count] saves taking and giving back memory, which costs as much as the rest.
    """
    bits, shifted = np.empty((2, len(keys), count), np.uint64) if room is None else room
    np.add(keys[:, None], np.arange(first + 1, first + 1 + count, dtype=np.uint64) * GOLDEN, out=bits)
    return _mixed(bits, shifted)


def _mixed(z: np.ndarray, shifted: np.ndarray) -> np.ndarray:
    """splitmix64's mixing of uint64, in place: every input bit flips each output bit about half the time."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= np.right_shift(z, np.uint64(shift), out=shifted)
        z *= np.uint64(factor)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z
