"""The orders: each step of the method, the same distribution as the plain reference, and the order files."""

import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference_orders import reference_order, replay, score
from scipy import stats

from orders import lpd_order, measure, order_file
from orders.lpd_order import ORDER_KINDS, halton_orders, lpd_orders, make_orders, random_orders, raster_orders
from orders.order_file import load_orders, meta_path, save_orders
from orders.schedule import cosine_group_sizes

REPOSITORY = Path(__file__).resolve().parents[1]

# grid, steps, repulsion: the published files, and a small grid
SETTINGS = [(16, 20, 2), (16, 20, 3), (16, 32, 2), (32, 48, 4), (8, 12, 1)]

# the first slots of image 0 under seed 0
PINNED_LPD = [128, 129, 15, 112, 14, 253, 244, 113, 31, 254, 243, 6]
PINNED_RANDOM = [208, 156, 16, 76, 115, 209]
PINNED_HALTON = [164, 105, 224, 70, 203, 130]


def orders_of(grid_size, steps, repulsion, n=4, **options):
    sizes = cosine_group_sizes(grid_size**2, steps)
    return lpd_orders(n, sizes, grid_size, repulsion_threshold=repulsion, **options)


@pytest.fixture(scope="module")
def picks():
    """Every slot of a few orders of the 256 px files and of small ones, with what could have been taken."""
    records = []
    for grid_size, steps, repulsion, n in ((16, 20, 2, 3), (16, 20, 3, 3), (8, 12, 1, 40), (8, 9, 2, 40)):
        sizes = cosine_group_sizes(grid_size**2, steps)
        for order in orders_of(grid_size, steps, repulsion, n, seed=5).tolist():
            records += [(repulsion, pick) for pick in replay(order, sizes, grid_size, 1.0, repulsion)]
    return records


# the four steps of the method


@pytest.mark.parametrize("grid_size, steps, repulsion", SETTINGS)
def test_orders_are_permutations(grid_size, steps, repulsion):
    orders = orders_of(grid_size, steps, repulsion, 20)
    assert orders.dtype == np.uint16
    np.testing.assert_array_equal(np.sort(orders, axis=1), raster_orders(20, grid_size))


@pytest.mark.parametrize("kind", ["lpd", "random", "halton"])
def test_the_first_cell_is_uniform(kind):
    """Chi-square over 64 cells and 12,800 orders; false alarm 1e-6 a kind, were the seed not fixed."""
    first = make_orders(kind, 12800, cosine_group_sizes(64, 8), 8, seed=1)[:, 0]
    assert stats.chisquare(np.bincount(first, minlength=64)).pvalue > 1e-6


def test_near_cells_are_taken_by_falling_score(picks):
    assert all(pick.score == pick.best_score for _, pick in picks if pick.near)


def test_near_cells_are_farther_apart_than_the_repulsion_threshold(picks):
    assert all(pick.separation > repulsion for repulsion, pick in picks if pick.near)


def test_where_no_near_cell_is_left_the_farthest_is_taken(picks):
    assert all(pick.distance == pick.best_distance for _, pick in picks if not pick.near)


def test_groups_are_filled_by_both_rules(picks):
    """Else the two tests above would hold of nothing."""
    assert {pick.near for _, pick in picks if pick.group} == {True, False}


@pytest.mark.parametrize("repulsion, farther", [(0, 0), (1.5, 1), (2, 2)])
def test_repulsion_below_one_does_nothing_and_counts_whole_cells(repulsion, farther):
    np.testing.assert_array_equal(orders_of(8, 12, repulsion), orders_of(8, 12, farther))


def test_an_infinite_proximity_threshold_leaves_farthest_points_only():
    order = orders_of(8, 12, 1, 1, proximity_threshold=math.inf)[0].tolist()
    records = replay(order, cosine_group_sizes(64, 12), 8, math.inf, 1)
    assert all(pick.distance == pick.best_distance for pick in records)


def test_ranks_order_all_neighbourhoods_by_score():
    """The middle of 3 x 3 cells, with every choice of generated cells around it."""
    around = [cell for cell in range(9) if cell != 4]
    choices = [{cell for i, cell in enumerate(around) if bits >> i & 1} for bits in range(256)]
    occupied = np.zeros((256, 5, 5), np.uint8)
    for grid, chosen in zip(occupied, choices, strict=True):
        grid[1:-1, 1:-1].flat[list(chosen)] = 1
    ranks = lpd_order._ranks(occupied.reshape(256, 25), 3)[:, 4]
    scores = [score(4, chosen, 3) for chosen in choices]
    assert stats.spearmanr(ranks, np.round(scores, 9)).statistic == pytest.approx(1)
    assert len(set(ranks.tolist())) == 25
    for threshold in (0, 0.5, 1, math.sqrt(2), 2, 6.9, math.inf):
        near = lpd_order._rules(3, float(threshold), 1.0).least_near >> lpd_order.SCORE_TIE_BITS
        assert [rank >= near for rank in ranks] == [s >= threshold for s in scores]


def test_generated_cells_have_no_rank():
    occupied = np.ones((1, 25), np.uint8)
    assert not lpd_order._ranks(occupied, 3).any()


# the same distribution as the reference


@pytest.mark.parametrize(
    "grid_size, steps, repulsion, n", [(16, 20, 2, 250), (16, 20, 3, 250), (8, 12, 2, 800), (8, 9, 1, 800)]
)
def test_step_statistics_agree_with_the_reference(grid_size, steps, repulsion, n):
    """Means per step of score, near share and least distance, over n reference and 4,000 fast orders.

    A z-test for each of at most 60 pairs of means, at |z| < 6: false alarm below 60 x 2e-9, about 1e-7.
    """
    sizes = cosine_group_sizes(grid_size**2, steps)
    rng = random.Random(7)
    plain = np.array([reference_order(sizes, grid_size, 1.0, repulsion, rng) for _ in range(n)])
    fast = orders_of(grid_size, steps, repulsion, 4000, seed=7)
    sides = [measure.step_statistics(orders, sizes, grid_size) for orders in (plain, fast)]
    for name, a, b in zip(sides[0]._fields, *sides, strict=True):
        groups = np.array(sizes) > 1 if name == "least_distance" else slice(None)
        a, b = a[:, groups], b[:, groups]
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 6 * error + 1e-9).all(), name


def test_whole_orders_of_a_tiny_grid_are_as_frequent_as_in_the_reference():
    """3 x 3 cells in groups of 1, 3, 5: chi-square of the first two groups, of which there are a few hundred.

    15,000 reference against 150,000 fast orders; false alarm 1e-6, were the seeds not fixed.
    """
    rng = random.Random(3)
    plain = [tuple(reference_order((1, 3, 5), 3, 1.0, 1, rng)[:4]) for _ in range(15000)]
    fast = [tuple(row) for row in lpd_orders(150000, (1, 3, 5), 3, seed=3)[:, :4].tolist()]
    kinds = {outcome: i for i, outcome in enumerate(sorted({*plain, *fast}))}
    assert len(kinds) > 50
    table = [
        np.bincount([kinds[outcome] for outcome in side], minlength=len(kinds)) for side in (plain, fast)
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-6


def test_each_group_draws_random_bits_of_its_own(monkeypatch):
    drawn = []
    bits = lpd_order._random_bits

    def recorded(keys, first, count, room):
        drawn.extend(range(first, first + count))
        return bits(keys, first, count, room)

    rules = lpd_order._rules(8, 1.0, 2.0)
    monkeypatch.setattr(lpd_order, "_random_bits", recorded)
    lpd_order._grow(np.zeros(1, np.uint64), cosine_group_sizes(64, 12), rules, np.zeros((1, 64), bool))
    assert len(drawn) == len(set(drawn)) == 12 * 64


def test_ties_of_distance_are_broken_evenly():
    """From the middle of 3 x 3 cells the farthest are the four corners; chi-square, false alarm 1e-6."""
    orders = lpd_orders(40000, (1, 2, 6), 3, proximity_threshold=math.inf, repulsion_threshold=0, seed=2)
    # the second group starts anywhere; where it starts in the middle its other cell is one of the corners
    second = orders[orders[:, 1] == 4][:, 2]
    assert set(second.tolist()) <= {0, 2, 6, 8}
    # a corner that was the first cell is taken; the first cell is uniform, so that the corners stay alike
    assert stats.chisquare(np.bincount(second, minlength=9)[[0, 2, 6, 8]]).pvalue > 1e-6


# an order depends on its seed and image id alone


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_an_order_is_the_same_in_any_company(kind):
    sizes = cosine_group_sizes(64, 8)
    ids = np.array([17, 3, 499])
    alone = make_orders(kind, 3, sizes, 8, repulsion_threshold=2, seed=9, image_ids=ids)
    together = make_orders(kind, 500, sizes, 8, repulsion_threshold=2, seed=9)
    np.testing.assert_array_equal(alone, together[ids])


def test_the_chunk_size_does_not_change_the_orders(monkeypatch):
    whole = orders_of(8, 12, 2, 50)
    monkeypatch.setattr(lpd_order, "CELLS_PER_CHUNK", 7 * 64)
    np.testing.assert_array_equal(orders_of(8, 12, 2, 50), whole)


@pytest.mark.parametrize("kind", ["lpd", "random", "halton"])
def test_another_seed_gives_other_orders(kind):
    one, other = (make_orders(kind, 8, cosine_group_sizes(256, 20), 16, seed=seed) for seed in (0, 1))
    assert (one != other).any()


def test_images_of_one_seed_have_different_orders():
    assert len({row.tobytes() for row in orders_of(16, 20, 2, 1000)}) == 1000


def test_the_hash_is_splitmix64():
    """The known first outputs of seed 1234567."""
    draws = lpd_order._random_bits(np.array([1234567], np.uint64), 0, 3)[0].tolist()
    assert draws == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_orders_of_seed_0_stay_what_they_are():
    """Files and evaluations name orders by seed alone: a change of these changes every result."""
    assert orders_of(16, 20, 2, 1)[0, :12].tolist() == PINNED_LPD
    assert random_orders(1, 16)[0, :6].tolist() == PINNED_RANDOM
    assert halton_orders(1, 16)[0, :6].tolist() == PINNED_HALTON


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()
    make_orders("lpd", 5, cosine_group_sizes(64, 8), 8)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_torch_is_not_needed():
    code = "import sys, orders.lpd_order, orders.order_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# from known cells on


def some_known(n, count, grid_size=8, seed=11):
    """`count` random cells of each image: bool [n, L]."""
    return random_orders(n, grid_size, seed=seed).argsort(axis=1) < count


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_an_order_lists_each_unknown_cell_once(kind):
    known = some_known(20, 23)
    orders = make_orders(kind, 20, cosine_group_sizes(41, 6), 8, repulsion_threshold=2, known=known)
    assert orders.dtype == np.uint16
    for order, cells in zip(orders, known, strict=True):
        np.testing.assert_array_equal(np.sort(order), np.flatnonzero(~cells))


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_with_nothing_known_orders_are_the_plain_ones(kind):
    sizes = cosine_group_sizes(64, 8)
    plain = make_orders(kind, 20, sizes, 8, seed=4)
    np.testing.assert_array_equal(make_orders(kind, 20, sizes, 8, seed=4, known=np.zeros(64, bool)), plain)


@pytest.mark.parametrize("kind", ["raster", "random", "halton"])
def test_kinds_without_rules_leave_the_known_cells_out(kind):
    known = some_known(5, 30)
    orders = make_orders(kind, 5, cosine_group_sizes(34, 4), 8, seed=2, known=known)
    whole = make_orders(kind, 5, cosine_group_sizes(64, 8), 8, seed=2)
    for order, cells, plain in zip(orders, known, whole, strict=True):
        assert order.tolist() == [cell for cell in plain.tolist() if not cells[cell]]


def test_cells_known_in_all_images_may_be_named_once():
    known = some_known(1, 20)
    sizes = cosine_group_sizes(44, 6)
    once = make_orders("lpd", 9, sizes, 8, known=known[0])
    np.testing.assert_array_equal(make_orders("lpd", 9, sizes, 8, known=np.tile(known, (9, 1))), once)


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_an_order_from_known_cells_is_the_same_in_any_company(kind, monkeypatch):
    known, sizes, ids = some_known(300, 20), cosine_group_sizes(44, 6), np.array([17, 3, 299])
    together = make_orders(kind, 300, sizes, 8, known=known)
    np.testing.assert_array_equal(
        make_orders(kind, 3, sizes, 8, image_ids=ids, known=known[ids]), together[ids]
    )
    monkeypatch.setattr(lpd_order, "CELLS_PER_CHUNK", 7 * 64)
    np.testing.assert_array_equal(make_orders(kind, 300, sizes, 8, known=known), together)


@pytest.mark.parametrize("count, repulsion", [(1, 1), (20, 1), (32, 2), (50, 1)])
def test_every_group_follows_the_rules_from_the_known_cells_on(count, repulsion):
    """The first one too: a cell it takes is near wherever the reference finds a near one."""
    sizes, known = cosine_group_sizes(64 - count, 5), some_known(30, count)
    orders = lpd_orders(30, sizes, 8, repulsion_threshold=repulsion, seed=6, known=known)
    for order, cells in zip(orders.tolist(), known, strict=True):
        for pick in replay(order, sizes, 8, 1.0, repulsion, set(np.flatnonzero(cells).tolist())):
            assert pick.score == pick.best_score if pick.near else pick.distance == pick.best_distance
            assert not pick.near or pick.separation > repulsion


def test_whole_orders_from_known_cells_are_as_frequent_as_in_the_reference():
    """3 x 3 cells of which a corner is known, in groups of 1, 3, 4: chi-square of the first two groups.

    15,000 reference against 150,000 fast orders; false alarm 1e-6, were the seeds not fixed.
    """
    rng, known = random.Random(3), np.arange(9) == 0
    plain = [tuple(reference_order((1, 3, 4), 3, 1.0, 1, rng, {0})[:4]) for _ in range(15000)]
    fast = [tuple(row) for row in lpd_orders(150000, (1, 3, 4), 3, seed=3, known=known)[:, :4].tolist()]
    kinds = {outcome: i for i, outcome in enumerate(sorted({*plain, *fast}))}
    assert len(kinds) > 10
    table = [
        np.bincount([kinds[outcome] for outcome in side], minlength=len(kinds)) for side in (plain, fast)
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-6


# other kinds and other grids


@pytest.mark.parametrize("kind", ORDER_KINDS)
@pytest.mark.parametrize("grid_size", [1, 2, 5, 64])
def test_every_kind_makes_permutations_of_any_square_grid(kind, grid_size):
    num_tokens = grid_size**2
    sizes = cosine_group_sizes(num_tokens, min(num_tokens, 40))
    orders = make_orders(kind, 2, sizes, grid_size, repulsion_threshold=2)
    np.testing.assert_array_equal(np.sort(orders, axis=1), raster_orders(2, grid_size))


def test_raster_orders_are_in_raster_order():
    assert raster_orders(2, 2).tolist() == [[0, 1, 2, 3]] * 2


def test_halton_orders_are_one_sequence_shifted_round_the_grid():
    y, x = np.divmod(halton_orders(20, 8).astype(int), 8)
    steps = np.stack([np.diff(y) % 8, np.diff(x) % 8])
    assert (steps == steps[:, :1]).all()


def test_halton_orders_begin_with_the_halton_points():
    """(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) of 8 rows and columns."""
    y, x = np.divmod(lpd_order._halton_visit(8)[:4], 8)
    assert (y.tolist(), x.tolist()) == ([4, 2, 6, 1], [2, 5, 0, 3])


def test_no_orders_are_an_empty_array():
    assert orders_of(8, 12, 2, 0).shape == (0, 64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_sizes": (1, 14)}, "sum to 15, but there are 16"),
        ({"grid_size": 0}, "grid size must be from 1 to 256, not 0"),
        ({"grid_size": 257, "group_sizes": (1, 66048)}, "grid size must be from 1 to 256, not 257"),
        ({"proximity_threshold": -1}, "proximity threshold must be 0 or more, not -1"),
        ({"repulsion_threshold": math.nan}, "repulsion threshold must be 0 or more, not nan"),
        ({"image_ids": np.arange(4)}, "must be 3 numbers"),
        ({"image_ids": np.array([0, -1, 2])}, "0 or more, not -1"),
        ({"known": np.zeros(15, bool)}, r"bool \[16\] or \[3, 16\], not bool \[15\]"),
        ({"known": np.zeros((2, 16), bool)}, r"not bool \[2, 16\]"),
        ({"known": np.zeros(16)}, r"not float64 \[16\]"),
        ({"known": np.arange(16) == 5}, "sum to 16, but there are 15"),
        ({"known": np.tri(3, 16, dtype=bool)}, "equally many in each image, not 1 to 3"),
        ({"kind": "spiral"}, "lpd, raster, random, halton, not 'spiral'"),
    ],
)
def test_wrong_arguments_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_orders(**{"kind": "lpd", "n": 3, "group_sizes": (1, 15), "grid_size": 4, **arguments})


# what is measured of an order


def test_step_statistics_by_hand():
    """3 x 3 cells: the middle, its left and right neighbours, two opposite corners, the rest."""
    found = measure.step_statistics(np.array([[4, 3, 5, 0, 8, 1, 2, 6, 7]]), (1, 2, 2, 4), 3)
    corner, edge = 1 + 1 / math.sqrt(2), 2 + 2 / math.sqrt(2)
    np.testing.assert_allclose(found.score[0], [0, 1, corner, (corner + edge) / 2])
    np.testing.assert_allclose(found.near_share[0], [0, 1, 1, 1])
    np.testing.assert_allclose(found.least_distance[0], [np.nan, 2, math.sqrt(8), 1])


# order files


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_file_gives_back_what_was_saved(tmp_path, suffix):
    orders = random_orders(7, 4)
    save_orders(tmp_path / f"orders{suffix}", orders, {"seed": 0})
    loaded = load_orders(tmp_path / f"orders{suffix}", 16, 7)
    assert loaded.dtype == np.uint16
    np.testing.assert_array_equal(loaded, orders)


def test_the_settings_lie_beside_an_npy_file(tmp_path):
    save_orders(tmp_path / "orders.npy", random_orders(2, 4), {"group_sizes": (1, 15), "seed": 3})
    assert json.loads((tmp_path / "orders.meta.json").read_text()) == {"group_sizes": [1, 15], "seed": 3}
    assert meta_path(tmp_path / "orders.npy") == tmp_path / "orders.meta.json"


def test_a_published_json_is_a_list_of_lists(tmp_path):
    orders = random_orders(3, 4)
    save_orders(tmp_path / "orders.json", orders, {})
    assert json.loads((tmp_path / "orders.json").read_text()) == orders.tolist()


@pytest.mark.parametrize("text", ["[[0,1,2,3],[3,2,1,0]]", " [ [0, 1,2,3 ] ,\n[3,2,1,0]\n]\n"])
def test_json_is_read_whatever_its_spaces(tmp_path, text):
    (tmp_path / "orders.json").write_text(text)
    assert load_orders(tmp_path / "orders.json", 4).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[0,1,2,3],[0,1,2,2]]", "row 1: not a permutation of 0..3: position 2 is there more than once"),
        ("[[0,1,2,3],[0,1,2,4]]", "row 1: not a permutation of 0..3: it holds 4"),
        ("[[0,1,2,3],[0,1,2,-1]]", "row 1: not a permutation of 0..3: it holds -1"),
        ("[[0,1,2,3],[0,1,2,3.5]]", "row 1: not a permutation of 0..3: it holds 3.5"),
        ("[[0,true,2,3]]", "row 0: not a permutation of 0..3: it holds True"),
        ("[[0,1,2,3],[0,1,2]]", "row 1: 3 positions, but an image has 4 tokens"),
        ("[[0,1,2,3],[]]", "row 1: 0 positions, but an image has 4 tokens"),
        ("[[0,1,2,3],7]", "row 1: a list of positions was expected, not int"),
        ("[[0,1,2,3],", "row 1: not JSON"),
        ("[[0,1,2,3]", "row 1: ']' was expected at character 10, not the end"),
        ("[[0,1,2,3] [0,1,2,3]]", "row 1: ',' was expected at character 11"),
        ("[[0,1,2,3]] 5", "goes on after the list of orders"),
        ("[" * 100000, "row 0: not JSON"),
        ('{"orders": []}', "row 0: '\\[' was expected at character 0"),
        ("", "row 0: '\\[' was expected at character 0, not the end"),
        ("[]", "has 0 orders, but 1 are needed"),
    ],
)
def test_a_wrong_json_file_is_refused_by_name_row_and_numbers(tmp_path, text, message):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=f"wrong.json.*{message}"):
        load_orders(tmp_path / "wrong.json", 4, 1)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([[0, 1, 2, 3], [0, 1, 2, 2]]), "row 1: not a permutation of 0..3: position 2"),
        (np.array([[0, 1, 2, 65539]]), "row 0: not a permutation of 0..3: it holds 65539"),
        (np.array([[0, 1, 2]]), "orders of 3 positions, but an image has 4 tokens"),
        (np.array([0, 1, 2, 3]), r"shape \(4,\)"),
        (np.zeros((1, 4)), "holds float64, not integers"),
        (np.array([[None] * 4]), "holds object, not integers"),
        (np.zeros((0, 4), np.uint16), "has 0 orders, but 1 are needed"),
    ],
)
def test_a_wrong_npy_file_is_refused_by_name_row_and_numbers(tmp_path, array, message):
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(ValueError, match=f"wrong.npy.*{message}"):
        load_orders(tmp_path / "wrong.npy", 4, 1)


def npy_claiming(shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}"
    padded = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + content


@pytest.mark.parametrize(
    "content, message",
    [
        (npy_claiming("(10**9, 4), }"), "not an .npy file"),
        (npy_claiming("(99999999999999, 4), }"), "claims"),
        (npy_claiming("(2, 4), }", b"12"), "but holds 2"),
        (npy_claiming("(-1, 4), }"), "shape"),
        (npy_claiming("(('"), "not an .npy file"),
        (b"\x93NUMPY\x09\x00", "not an .npy file"),
        (b"no", "not an .npy file"),
    ],
)
def test_a_corrupt_npy_file_is_refused_before_its_size_is_believed(tmp_path, content, message):
    (tmp_path / "wrong.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"wrong.npy.*{message}"):
        load_orders(tmp_path / "wrong.npy", 4)


def test_too_few_orders_are_refused_with_both_numbers(tmp_path):
    save_orders(tmp_path / "few.npy", random_orders(7, 4), {})
    with pytest.raises(ValueError, match="few.npy has 7 orders, but 8 are needed"):
        load_orders(tmp_path / "few.npy", 16, 8)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="orders.txt must end in .npy or .json"):
        load_orders(tmp_path / "orders.txt", 16)


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"orders{suffix}"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(order_file.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_orders(path, random_orders(2, 4), {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"
