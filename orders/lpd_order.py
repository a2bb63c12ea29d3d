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

ORTHOGONAL = 5  # weight of an orthogonal neighbour in a neighbour code; up to 4 diagonal ones have weight 1
OCCUPIED = 25  # added to the neighbour code of a generated cell
SCORE_TIE_BITS = 27  # a cell has one of 25 proximity scores, or none: 5 bits, and the rest breaks ties
LEAST_NEAR = np.uint32(1 << SCORE_TIE_BITS)
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
) -> np.ndarray:
    """Orders of any kind in ORDER_KINDS, uint16 [n, L]; only "lpd" depends on group sizes and thresholds.

    The group sizes must fit the grid whatever the kind. Raises ValueError as `lpd_orders` does, and for an
    unknown kind.
    """
    check_group_sizes(group_sizes, _num_tokens(grid_size))
    if kind == "lpd":
        return lpd_orders(
            n,
            group_sizes,
            grid_size,
            proximity_threshold=proximity_threshold,
            repulsion_threshold=repulsion_threshold,
            seed=seed,
            image_ids=image_ids,
        )
    if kind == "raster":
        return raster_orders(n, grid_size)
    if kind == "random":
        return random_orders(n, grid_size, seed=seed, image_ids=image_ids)
    if kind == "halton":
        return halton_orders(n, grid_size, seed=seed, image_ids=image_ids)
    raise ValueError(f"order must be one of {', '.join(ORDER_KINDS)}, not {kind!r}")


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
) -> np.ndarray:
    """Locality-aware orders, uint16 [n, L].

    A group first takes cells near what is already generated (score: sum of 1 / distance over the generated
    ones of the 8 neighbours; near: at least `proximity_threshold`) by falling score, each farther than
    `repulsion_threshold` (Chebyshev, in cells) from those the group has; the rest comes by farthest-point
    sampling. All ties are broken at random.

    `proximity_threshold` >= 0 (infinite: never near); `repulsion_threshold` >= 0 (below 1: no repulsion). Row
    i depends on (seed, image_ids[i]) alone; `image_ids` [n] are 0 or more, by default 0..n-1. Memory is the
    result, a few MB and tables of about 12 grid_size**3 bytes. Raises ValueError for group sizes that do not
    start with 1 or do not sum to L, and for anything else out of range.
    """
    num_tokens = _num_tokens(grid_size)
    group_sizes = check_group_sizes(group_sizes, num_tokens)
    rules = _rules(grid_size, float(proximity_threshold), float(repulsion_threshold))
    orders = np.empty((n, num_tokens), np.uint16)
    for rows, keys in _chunks(n, num_tokens, seed, image_ids):
        orders[rows] = _grow(keys, group_sizes, rules)
    return orders


class _Rules(NamedTuple):
    """What the algorithm looks up, for one grid and one pair of thresholds.

    The table of a cell tells how each position lies to it: `apart[window[cell]]`, `distance[window[cell]]`.
    The tables of all cells are overlapping windows of one small array, so that they stay in the cache.
    """

    grid_size: int
    nearness: np.ndarray  # uint32 [50]: neighbour code -> rank of its score above the tie bits; 0 if not near
    window: np.ndarray  # int64 [L]
    apart: np.ndarray  # uint32 [windows, L]: all ones where two cells may share a group, else 0
    distance: np.ndarray  # unsigned [windows, L]: squared distance of two cells
    unreached: int  # a squared distance above all on the grid: that of a cell from an empty group


@functools.lru_cache(maxsize=4)
def _rules(grid_size: int, proximity_threshold: float, repulsion_threshold: float) -> _Rules:
    for name, value in (("proximity", proximity_threshold), ("repulsion", repulsion_threshold)):
        if not value >= 0:
            raise ValueError(f"{name} threshold must be 0 or more, not {value}")
    score = np.array([code // ORTHOGONAL + code % ORTHOGONAL * math.sqrt(0.5) for code in range(OCCUPIED)])
    rank = 1 + score.argsort().argsort()  # no two codes have the same score: sqrt 2 is irrational
    nearness = np.zeros(2 * OCCUPIED, np.uint32)
    nearness[:OCCUPIED] = np.where(score >= proximity_threshold, rank << SCORE_TIE_BITS, 0)

    column = np.arange(grid_size)
    dy = np.abs(np.arange(1 - grid_size, grid_size))[:, None]  # [2S - 1, 1]
    dx = np.abs(column[:, None, None] - column)  # [S, 1, S]: from each column to each
    apart = np.where(np.maximum(dy, dx) > repulsion_threshold, EVERY_BIT, np.uint32(0))  # [S, 2S - 1, S]
    unreached = 2 * (grid_size - 1) ** 2 + 1
    distance = (dy**2 + dx**2).astype(np.min_scalar_type(unreached))
    y, x = np.divmod(np.arange(grid_size**2), grid_size)
    window = x * len(dy) + grid_size - 1 - y  # the rows of its column's plane from -y to grid_size - 1 - y
    return _Rules(grid_size, nearness, window, _windows(apart), _windows(distance), unreached)


def _windows(planes: np.ndarray) -> np.ndarray:
    """All runs of S rows in `planes` [S, 2S - 1, S], as a view [windows, L]."""
    num_tokens = len(planes) ** 2
    return np.lib.stride_tricks.sliding_window_view(planes.reshape(-1), num_tokens)[:: len(planes)]


def _grow(keys: np.ndarray, group_sizes: tuple[int, ...], rules: _Rules) -> np.ndarray:
    """Orders uint16 [n, L] of the images whose hash keys are uint64 [n]: all grow together, group by group.

    The first group needs no rule of its own: where nothing is generated all cells tie, by score and by
    distance.
    """
    num_tokens, side = rules.grid_size**2, rules.grid_size + 2
    y, x = np.divmod(np.arange(num_tokens), rules.grid_size)
    padded = (y + 1) * side + x + 1  # one empty cell all round, so that every cell has 8 neighbours
    occupied = np.zeros((len(keys), side * side), np.uint8)
    order = np.empty((len(keys), num_tokens), np.uint16)
    start = 0
    for group, size in enumerate(group_sizes):
        bits = _random_bits(keys, group * num_tokens, num_tokens)  # low half: scores, high half: distances
        codes = _neighbour_codes(occupied, rules.grid_size)
        near = np.take(rules.nearness, codes, mode="clip")  # [n, L]
        near |= bits.astype(np.uint32) >> np.uint32(32 - SCORE_TIE_BITS)
        picks, taken = _take_near(near, size, rules)
        rows = np.argsort(taken, kind="stable")
        rows = rows[: np.searchsorted(taken[rows], size)]
        if len(rows):
            tie = (bits[rows] >> np.uint64(32)).astype(np.uint32)
            free = codes[rows] < OCCUPIED
            picks[:, rows] = _take_farthest(picks[:, rows], taken[rows], free, tie, rules)
        occupied[np.arange(len(keys)), padded[picks]] = 1
        order[:, start : start + size] = picks.T
        start += size
    return order


def _neighbour_codes(occupied: np.ndarray, grid_size: int) -> np.ndarray:
    """ORTHOGONAL x orthogonal + diagonal generated neighbours, + OCCUPIED if generated: uint8 [n, L]."""
    side = grid_size + 2
    flat = occupied.reshape(-1)
    codes = np.zeros_like(flat)
    inner = slice(side + 1, len(flat) - side - 1)

    def moved(dy, dx):
        offset = dy * side + dx
        return flat[inner.start + offset : inner.stop + offset]

    codes[inner] = moved(0, -1) + moved(0, 1) + moved(-1, 0) + moved(1, 0)
    codes[inner] *= ORTHOGONAL
    codes[inner] += moved(-1, -1) + moved(-1, 1) + moved(1, -1) + moved(1, 1) + OCCUPIED * moved(0, 0)
    return codes.reshape(-1, side, side)[:, 1:-1, 1:-1].reshape(len(occupied), -1)


def _take_near(near: np.ndarray, size: int, rules: _Rules) -> tuple[np.ndarray, np.ndarray]:
    """Take up to `size` near cells of each order, highest key first; each bars the cells around it.

    `near` uint32 [n, L] holds the keys, near from LEAST_NEAR up, and is changed. Returns the cells, int64
    [size, n], and how many of each order are valid, int64 [n]: once an order has none left, it stays so.
    """
    picks = np.zeros((size, len(near)), np.int64)
    keys = np.zeros((size, len(near)), np.uint32)
    row_starts = np.arange(len(near)) * near.shape[1]
    for i in range(size):
        if i:
            near &= rules.apart[rules.window[picks[i - 1]]]
        near.argmax(axis=1, out=picks[i])
        near.take(row_starts + picks[i], out=keys[i], mode="clip")
        if keys[i].max() < LEAST_NEAR:
            break
    return picks, (keys >= LEAST_NEAR).sum(axis=0)


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


def _chunks(n: int, num_tokens: int, seed: int, image_ids: np.ndarray | None):
    """Yield slices of the n rows and the hash keys, uint64, of their images: CELLS_PER_CHUNK cells each."""
    ids = np.arange(n) if image_ids is None else np.asarray(image_ids)
    if ids.shape != (n,):
        raise ValueError(f"image_ids must be {n} numbers, not of shape {ids.shape}")
    if n and ids.min() < 0:
        raise ValueError(f"image_ids must be 0 or more, not {ids.min()}")
    stream = _mixed(np.array([seed % 2**64], np.uint64))
    keys = _mixed(stream + ids.astype(np.uint64) * GOLDEN)
    step = max(1, CELLS_PER_CHUNK // num_tokens)
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        yield rows, keys[rows]


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the step of splitmix64 (Steele et al. 2014)


def _random_bits(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """`count` draws, from number `first`, of each key's splitmix64 stream: uint64 [len(keys), count]."""
    return _mixed(keys[:, None] + np.arange(first + 1, first + 1 + count, dtype=np.uint64) * GOLDEN)


def _mixed(z: np.ndarray) -> np.ndarray:
    """splitmix64's mixing of uint64, in place: every input bit flips each output bit about half the time."""
    shifted = np.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= np.right_shift(z, np.uint64(shift), out=shifted)
        z *= np.uint64(factor)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z
