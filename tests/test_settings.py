"""How settings of generation are resolved: defaults, order files, orders by image number."""

import json

import numpy as np
import pytest
import torch

from engine.settings import GenerationSettings, default_repulsion, default_steps, resolve_settings
from orders.lpd_order import random_orders
from orders.schedule import cosine_group_sizes


@pytest.mark.parametrize("num_tokens, steps", [(256, 20), (1024, 48)])
def test_default_steps_are_the_published_ones(num_tokens, steps):
    assert default_steps(num_tokens) == steps


@pytest.mark.parametrize("grid_size", [1, 2, 3, 4, 8, 12, 24, 48, 64])
def test_default_steps_make_a_schedule_on_every_grid(grid_size):
    settings = resolve_settings(grid_size)
    assert sum(settings.group_sizes) == grid_size**2


@pytest.mark.parametrize("grid_size, threshold", [(16, 2), (32, 4), (4, 1)])
def test_default_repulsion_is_the_published_one_and_at_least_one(grid_size, threshold):
    assert default_repulsion(grid_size) == threshold


@pytest.mark.parametrize("grid_size, steps, repulsion", [(16, 20, 2), (32, 48, 4)])
def test_defaults_of_a_grid_are_the_published_setting(grid_size, steps, repulsion):
    settings = resolve_settings(grid_size)
    assert settings.group_sizes == cosine_group_sizes(grid_size**2, steps)
    assert (settings.repulsion_threshold, settings.proximity_threshold) == (repulsion, 1)
    assert (settings.order, settings.cfg, settings.cfg_schedule) == ("lpd", 1, "linear")


def test_what_was_given_is_not_replaced_by_a_default():
    settings = resolve_settings(4, generation_steps=5, repulsion_threshold=0.0, cfg=3.0)
    assert settings.group_sizes == cosine_group_sizes(16, 5)
    assert (settings.repulsion_threshold, settings.cfg) == (0.0, 3.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"group_sizes": (1, 14)}, "sum to 15, .* 16 tokens"),
        ({"group_sizes": (2, 14)}, "start with 1, not 2"),
        ({"group_sizes": (1, 0, 15)}, "1 or more"),
        ({"group_sizes": (1, 15), "generation_steps": 3}, "--group_sizes has 2 .*--generation_steps is 3"),
        ({"generation_steps": 17}, "17 steps for 16 tokens"),
        ({"generation_steps": 1}, "1 steps for 16 tokens"),
    ],
    ids=["sum", "start", "empty group", "contradiction", "too many steps", "too few steps"],
)
def test_schedules_that_cannot_be_are_refused_with_the_numbers(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_settings(4, **given)


# order files


@pytest.fixture(params=[".npy", ".json"])
def order_file(tmp_path, request):
    """A file of five random orders of a 4x4 grid, and the orders."""
    orders, path = random_orders(5, 4), tmp_path / f"orders{request.param}"
    if path.suffix == ".npy":
        np.save(path, orders)
    else:
        path.write_text(json.dumps(orders.tolist()))
    return path, orders


def test_image_i_has_row_i_of_the_order_file(order_file):
    path, orders = order_file
    settings = resolve_settings(4, lpd_order_file=path, num_images=5)
    assert np.array_equal(settings.orders([4, 0, 2]).numpy(), orders[[4, 0, 2]])


def test_an_order_file_with_too_few_orders_is_refused_with_both_numbers(order_file):
    path, _ = order_file
    with pytest.raises(ValueError, match=f"{path.name} has 5 orders, but 6 are needed"):
        resolve_settings(4, lpd_order_file=path, num_images=6)


def test_an_order_file_of_another_grid_is_refused_with_both_numbers(order_file):
    path, _ = order_file
    with pytest.raises(ValueError, match=f"{path.name}.* 16 positions.* 64 tokens"):
        resolve_settings(8, lpd_order_file=path)


# orders by image number


@pytest.mark.parametrize("kind", ["lpd", "random", "raster", "halton"])
def test_the_order_of_an_image_does_not_depend_on_the_batch(kind):
    settings = resolve_settings(8, order=kind, seed=4)
    together = settings.orders([0, 7, 3, 40_000])
    for i, image_id in enumerate([0, 7, 3, 40_000]):
        assert torch.equal(settings.orders([image_id])[0], together[i])


@pytest.mark.parametrize("kind", ["lpd", "random", "halton"])
def test_the_order_of_an_image_depends_on_the_seed_and_its_number(kind):
    a, b = (resolve_settings(8, order=kind, seed=seed).orders([0, 1]) for seed in (0, 1))
    assert (a[0] != a[1]).any() and (a != b).any(dim=1).all()


def test_orders_can_index_tokens():
    orders = resolve_settings(4).orders(np.arange(3))
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(3, 16))


# what is handed on


def test_settings_as_json_are_plain_and_leave_the_orders_out(order_file):
    values = resolve_settings(4, lpd_order_file=order_file[0], generation_steps=6, seed=9).as_json()
    assert json.loads(json.dumps(values)) == values
    assert (values["steps"], values["seed"], len(values["group_sizes"])) == (6, 9, 6)
    assert "file_orders" not in values


def test_decoding_hands_on_every_setting_of_the_draws():
    given = {"cfg": 2.0, "cfg_schedule": "constant", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7}
    assert GenerationSettings(4, (1, 15), **given).decoding() == given
