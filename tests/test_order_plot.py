"""The picture of an order file."""

import numpy as np
import pytest

from orders import plot
from orders.lpd_order import lpd_orders, raster_orders
from orders.order_file import save_orders
from orders.schedule import cosine_group_sizes

SIZES = cosine_group_sizes(64, 8)


@pytest.fixture()
def order_file(tmp_path):
    path = tmp_path / "orders.npy"
    save_orders(path, lpd_orders(20, SIZES, 8), {"group_sizes": SIZES})
    return path


def run(*arguments) -> int:
    return plot.main([str(argument) for argument in arguments])


def test_a_picture_is_drawn_beside_the_file(order_file):
    assert run(order_file) == 0
    assert order_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_published_json_takes_its_group_sizes_from_the_flags(tmp_path):
    path = tmp_path / "published.json"
    save_orders(path, lpd_orders(3, SIZES, 8), {})
    assert run(path, "--img_size", 128, "--generation_steps", 8) == 0


def test_the_mean_step_of_raster_orders_is_the_schedule():
    expected = np.repeat(1 + np.arange(len(SIZES)), SIZES)
    np.testing.assert_array_equal(plot.mean_steps(raster_orders(5, 8), SIZES), expected)


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["missing.json"], 2, "--generation_steps or --group_sizes is needed"),
        (["missing.npy", "--generation_steps", 8], 1, "missing.npy"),
        (["orders.npy", "--index", 20], 2, "--index 20: orders.npy has 20 orders"),
        (["orders.npy", "--generation_steps", 8], 1, "orders of 64 positions, but an image has 256 tokens"),
        (["orders.npy", "--output_file", "orders.npy"], 2, "--output_file orders.npy exists"),
    ],
)
def test_a_wrong_use_is_one_line(order_file, monkeypatch, capsys, flags, status, message):
    monkeypatch.chdir(order_file.parent)
    assert run(*flags) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
