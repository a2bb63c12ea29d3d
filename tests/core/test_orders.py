"""Orders: every step of the method, the same distribution as the plain reference, and the order files."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import processes
import pytest
import scipy  # its parts are imported when they are used
from core.reference_orders import reference_order, replay, score

from orders import lpd_order, plot
from orders.lpd_order import (
    ORDER_KINDS,
    halton_orders,
    lpd_orders,
    make_orders,
    random_orders,
    raster_orders,
    spread_orders,
)
from orders.order_file import load_orders, meta_path, save_orders
from orders.schedule import cosine_group_sizes

# the first slots of image 0 under seed 0
PINNED_LPD = [97, 96, 255, 80, 254, 15, 243, 81, 239, 14, 242, 137]
PINNED_RANDOM = [208, 156, 16, 76, 115, 209]
PINNED_HALTON = [164, 105, 224, 70, 203, 130]
PINNED_SPREAD = [208, 105, 202, 83, 165, 60]


def orders_of(grid_size, steps, repulsion, n=4, **options):
    sizes = cosine_group_sizes(grid_size**2, steps)
    return lpd_orders(n, sizes, grid_size, repulsion_threshold=repulsion, **options)


def some_known(n, count, seed=11):
    """`count` random cells of n grids of 8 x 8: bool [n, 64]."""
    return random_orders(n, 8, seed=seed).argsort(axis=1) < count


# the steps of the method


@pytest.fixture(scope="module")
def picks():
    """(repulsion, Pick) of every slot of some orders, of 256 px and small."""
    records = []
    for grid_size, steps, repulsion, n in ((16, 20, 2, 2), (16, 20, 3, 2), (8, 12, 1, 20), (8, 9, 2, 20)):
        sizes = cosine_group_sizes(grid_size**2, steps)
        for order in orders_of(grid_size, steps, repulsion, n, seed=5).tolist():
            records += [(repulsion, pick) for pick in replay(order, sizes, grid_size, 1.0, repulsion)]
    return records


@pytest.mark.parametrize("kind", ["lpd", "spread", "random", "halton"])
def test_the_first_cell_is_uniform(kind):
    """Chi-square over 64 cells and 12,800 orders; false alarm 1e-6 a kind, were the seed not fixed."""
    first = make_orders(kind, 12800, cosine_group_sizes(64, 8), 8, seed=1)[:, 0]
    assert scipy.stats.chisquare(np.bincount(first, minlength=64)).pvalue > 1e-6


def test_every_pick_is_one_that_the_method_allows(picks):
    assert all(pick.cell in pick.allowed for _, pick in picks)
    assert sum(pick.near for _, pick in picks) > 100 and sum(not pick.near for _, pick in picks) > 100


def test_near_cells_are_farther_apart_than_the_repulsion_threshold(picks):
    assert all(pick.separation > repulsion for repulsion, pick in picks if pick.near)


@pytest.mark.parametrize(
    "known, repulsion, proximity",
    [(0, 1, math.inf), (0, 1.5, 2.0), (1, 0, 1.0), (20, 1, 1.0), (32, 2, 1.0), (50, 1, 1.0)],
)
def test_other_thresholds_and_known_cells_follow_the_method_too(known, repulsion, proximity):
    sizes, known = cosine_group_sizes(64 - known, 6), some_known(10, known)
    options = {"proximity_threshold": proximity, "repulsion_threshold": repulsion}
    orders = lpd_orders(10, sizes, 8, seed=6, known=known, **options)
    for order, cells in zip(orders.tolist(), known, strict=True):
        records = replay(order, sizes, 8, proximity, repulsion, np.flatnonzero(cells).tolist())
        assert all(pick.cell in pick.allowed for pick in records)


def test_ranks_order_all_neighbourhoods_by_score():
    """The middle of 3 x 3 cells, with every choice of generated cells around it."""
    around = [cell for cell in range(9) if cell != 4]
    choices = [{cell for i, cell in enumerate(around) if bits >> i & 1} for bits in range(256)]
    generated = np.array([[cell in chosen for cell in range(9)] for chosen in choices], np.uint8)
    beside, across = lpd_order.count_neighbours(generated, 3)
    ranks = (1 + lpd_order.BESIDE * beside + lpd_order.ACROSS * across)[:, 4]
    scores = [score(4, chosen, 3) for chosen in choices]
    assert scipy.stats.spearmanr(ranks, np.round(scores, 9)).statistic == pytest.approx(1)
    assert len(set(ranks.tolist())) == 25
    for threshold in (0, 0.5, 1, math.sqrt(2), 2, 6.9, math.inf):
        least = lpd_order._rules(3, float(threshold), 1.0).least_near >> lpd_order.SCORE_TIE_BITS
        assert [rank >= least for rank in ranks] == [s >= threshold for s in scores]


# the same distribution as the reference


@pytest.mark.parametrize("grid_size, steps, repulsion, n", [(16, 20, 2, 40), (8, 12, 2, 200), (8, 9, 1, 200)])
def test_step_statistics_agree_with_the_reference(grid_size, steps, repulsion, n):
    """Means per step of score and least distance, over n reference and 2,000 fast orders.

    A z-test for each of at most 40 means, at |z| < 6: false alarm below 40 x 2e-9, about 1e-7.
    """
    sizes = cosine_group_sizes(grid_size**2, steps)
    rng = random.Random(7)
    plain = np.array([reference_order(sizes, grid_size, 1.0, repulsion, rng) for _ in range(n)])
    fast = orders_of(grid_size, steps, repulsion, 2000, seed=7)
    several = np.array(sizes) > 1
    sides = [plot.step_statistics(orders, sizes, grid_size) for orders in (plain, fast)]
    for a, b in zip(*sides, strict=True):
        a, b = a[:, several], b[:, several]
        error = b.std(axis=0) * math.sqrt(1 / len(a) + 1 / len(b))
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 6 * error + 1e-9).all()


@pytest.mark.parametrize("sizes, known", [((1, 3, 5), []), ((1, 3, 4), [0]), ((1, 6, 2), [])])
def test_whole_orders_of_a_tiny_grid_are_as_frequent_as_in_the_reference(sizes, known):
    """3 x 3 cells: chi-square of the first four slots, of which there are up to some hundred.

    5,000 reference against 50,000 fast orders; false alarm 1e-6, were the seeds not fixed.
    """
    rng, cells = random.Random(3), np.isin(np.arange(9), known)
    plain = [tuple(reference_order(sizes, 3, 1.0, 1, rng, known)[:4]) for _ in range(5000)]
    fast = [tuple(row) for row in lpd_orders(50000, sizes, 3, seed=3, known=cells)[:, :4].tolist()]
    kinds = {outcome: i for i, outcome in enumerate(sorted({*plain, *fast}))}
    assert len(kinds) > 5
    table = [np.bincount([kinds[o] for o in side], minlength=len(kinds)) for side in (plain, fast)]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-6


# an order depends on its seed and image id alone


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("count", [0, 20])
def test_an_order_is_the_same_in_any_company(kind, count, monkeypatch):
    sizes, ids = cosine_group_sizes(64 - count, 8), np.array([17, 3, 299])
    options = {"repulsion_threshold": 2, "seed": 9}
    known = some_known(300, count)
    together = make_orders(kind, 300, sizes, 8, known=known, **options)
    alone = make_orders(kind, 3, sizes, 8, image_ids=ids, known=known[ids], **options)
    np.testing.assert_array_equal(alone, together[ids])
    monkeypatch.setattr(lpd_order, "CELLS_PER_CHUNK", 7 * 64)
    np.testing.assert_array_equal(make_orders(kind, 300, sizes, 8, known=known, **options), together)


@pytest.mark.parametrize("kind", ["lpd", "spread", "random", "halton"])
def test_seeds_and_images_have_different_orders(kind):
    sizes = cosine_group_sizes(256, 20)
    one, other = (make_orders(kind, 100, sizes, 16, seed=seed) for seed in (0, 1))
    assert (one != other).any()
    assert len({row.tobytes() for row in one}) > (50 if kind == "halton" else 99)


def test_orders_of_seed_0_stay_the_same():
    """Files and evaluations name orders by seed alone: a change of these changes every result."""
    assert orders_of(16, 20, 2, 1)[0, :12].tolist() == PINNED_LPD
    assert random_orders(1, 16)[0, :6].tolist() == PINNED_RANDOM
    assert halton_orders(1, 16)[0, :6].tolist() == PINNED_HALTON
    assert spread_orders(1, 16)[0, :6].tolist() == PINNED_SPREAD


def test_orders_import_no_torch():
    modules = "import sys, orders.lpd_order, orders.order_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", modules], cwd=processes.REPO).returncode == 0


# other kinds, other grids, known cells


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("grid_size", [1, 2, 5, 40])
def test_every_kind_makes_permutations_of_any_square_grid(kind, grid_size):
    num_tokens = grid_size**2
    sizes = cosine_group_sizes(num_tokens, min(num_tokens, 40))
    orders = make_orders(kind, 2, sizes, grid_size, repulsion_threshold=2)
    assert orders.dtype == np.uint16
    np.testing.assert_array_equal(np.sort(orders, axis=1), raster_orders(2, grid_size))


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_orders_leave_the_known_cells_out(kind):
    known = some_known(20, 23)
    orders = make_orders(kind, 20, cosine_group_sizes(41, 6), 8, known=known)
    whole = make_orders(kind, 20, cosine_group_sizes(64, 6), 8)
    for order, cells, plain in zip(orders, known, whole, strict=True):
        np.testing.assert_array_equal(np.sort(order), np.flatnonzero(~cells))
        assert kind in ("lpd", "spread") or order.tolist() == plain[~cells[plain]].tolist()


@pytest.mark.parametrize("count", [0, 20])
def test_a_spread_order_takes_the_least_crowded_cell(count):
    """Against plain sums over the generated cells and a wide frame. 0.01: the frame ends 60 cells away, where
    2 pi / 60 of the lattice sum is missing, nearly the same for all cells."""
    known, frame = some_known(5, count), 60
    line = np.arange(-frame, 8 + frame)
    cells = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    inside = ((cells >= 0) & (cells < 8)).all(axis=1)
    distance = np.linalg.norm(cells[inside][:, None] - cells, axis=2)  # [64, all]
    weight = np.where(distance > 0, distance, np.inf) ** -3.0
    within, beyond = weight[:, inside], weight[:, ~inside].sum(axis=1)
    orders = make_orders("spread", 5, (1, 63 - count), 8, known=known)
    for order, generated in zip(orders, known.copy(), strict=True):
        for cell in order:
            crowding = within @ generated + 2 * generated.mean() * beyond
            assert not generated[cell] and crowding[cell] < crowding[~generated].min() + 0.01
            generated[cell] = True


def test_halton_orders_are_the_halton_points_shifted_cyclically():
    """The first are (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) of 8 rows and columns."""
    y, x = np.divmod(lpd_order._halton_visit(8)[:4], 8)
    assert (y.tolist(), x.tolist()) == ([4, 2, 6, 1], [2, 5, 0, 3])
    y, x = np.divmod(halton_orders(20, 8).astype(int), 8)
    steps = np.stack([np.diff(y) % 8, np.diff(x) % 8])
    assert (steps == steps[:, :1]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_sizes": (1, 14)}, "sum to 15, but there are 16"),
        ({"grid_size": 129}, "grid size must be from 1 to 128, not 129"),
        ({"proximity_threshold": -1}, "proximity threshold must be 0 or more, not -1"),
        ({"repulsion_threshold": math.nan}, "repulsion threshold must be 0 or more, not nan"),
        ({"image_ids": np.arange(4)}, "must be 3 numbers"),
        ({"known": np.zeros(15, bool)}, r"bool \[16\] or \[3, 16\], not bool \[15\]"),
        ({"known": np.zeros(16)}, r"not float64 \[16\]"),
        ({"known": np.arange(16) == 5}, "sum to 16, but there are 15"),
        ({"known": np.tri(3, 16, dtype=bool)}, "equally many in each image, not 1 to 3"),
        ({"kind": "spiral"}, "lpd, spread, raster, random, halton, not 'spiral'"),
    ],
)
def test_wrong_arguments_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_orders(**{"kind": "lpd", "n": 3, "group_sizes": (1, 15), "grid_size": 4, **arguments})


def test_step_statistics_by_hand():
    """3 x 3 cells: the middle, its left and right neighbours, two opposite corners, the rest."""
    order = np.array([[4, 3, 5, 0, 8, 1, 2, 6, 7]])
    scores, distances = plot.step_statistics(order, (1, 2, 2, 4), 3)
    corner, edge = 1 + 1 / math.sqrt(2), 2 + 2 / math.sqrt(2)
    np.testing.assert_allclose(scores[0], [0, 1, corner, (corner + edge) / 2])
    np.testing.assert_allclose(distances[0], [np.nan, 2, math.sqrt(8), 1])
    assert plot.steps_of_cells(order, (1, 2, 2, 4)).tolist() == [[2, 3, 3, 1, 0, 1, 3, 3, 2]]


# order files


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_file_gives_back_what_was_saved(tmp_path, suffix):
    orders, path = random_orders(7, 4), tmp_path / f"orders{suffix}"
    save_orders(path, orders, {"seed": 0})
    loaded = load_orders(path, 16, 7)
    assert loaded.dtype == np.uint16
    np.testing.assert_array_equal(loaded, orders)
    with pytest.raises(ValueError, match=f"orders{suffix} has 7 orders, but 8 are needed"):
        load_orders(path, 16, 8)


def test_an_npy_file_has_its_settings_beside_it_and_a_json_is_a_list_of_lists(tmp_path):
    orders = random_orders(2, 4)
    save_orders(tmp_path / "orders.npy", orders, {"group_sizes": (1, 15), "seed": 3})
    assert meta_path(tmp_path / "orders.npy") == tmp_path / "orders.meta.json"
    assert json.loads((tmp_path / "orders.meta.json").read_text()) == {"group_sizes": [1, 15], "seed": 3}
    save_orders(tmp_path / "orders.json", orders, {})
    assert json.loads((tmp_path / "orders.json").read_text()) == orders.tolist()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[0,1,2,3],[0,1,2,2]]", "row 1: not a permutation of 0..3: it has 2 in place of 3"),
        ("[[0,1,2,3],[0,1,2,-1]]", "row 1: not a permutation of 0..3: it has -1 in place of 0"),
        ("[[0,1,2,3.5]]", "row 0: not a permutation of 0..3: it has 3.5 in place of 3"),
        ("[[0,1,2,3],[0,1,2]]", "row 1: 3 positions, but an image has 4 tokens"),
        ("[[0,1,null,3]]", "row 0: "),
        ("[[0,1,2,3],", "no readable JSON"),
        ('{"orders": []}', "a list of orders was expected, not dict"),
        ("[]", "has 0 orders, but 1 are needed"),
    ],
)
def test_a_wrong_json_file_is_refused_by_name_and_row(tmp_path, text, message):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=f"wrong.json.*{message}"):
        load_orders(tmp_path / "wrong.json", 4, 1)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([[0, 1, 2, 3], [0, 1, 2, 4]]), "row 1: not a permutation of 0..3: it has 4 in place of 3"),
        (np.arange(9)[None], "row 0: 9 positions, but an image has 4 tokens"),
        (np.arange(4), r"shape \[4\]"),
        (np.array([["a", "b", "c", "d"]]), "row 0: not a permutation"),
        (np.array([[None] * 4]), "no readable .npy file .*allow_pickle=False"),
    ],
)
def test_a_wrong_npy_file_is_refused_by_name_and_row(tmp_path, array, message):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(ValueError, match=f"wrong.npy.*{message}"):
        load_orders(tmp_path / "wrong.npy", 4)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "wrong.npy"
    save_orders(path, random_orders(5, 4), {})
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:50], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="wrong.npy: damaged or no readable .npy file"):
            load_orders(path, 16)
