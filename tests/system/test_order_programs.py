"""orders/run_lpd_order.{py,sh} and orders/plot.py: the files they write, errors, kills and interrupts."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
from helpers import call_main, picture
from processes import REPO, WAIT, children, finished, running, wait_for

from orders import plot, run_lpd_order
from orders.lpd_order import ORDER_KINDS, lpd_orders, make_orders
from orders.order_file import load_orders, meta_path, save_orders
from orders.schedule import cosine_group_sizes
from scripts.analysis import method

PROGRAM = REPO / "orders" / "run_lpd_order.py"
SMALL = ["--img_size", "64", "--vqgan_stride", "8", "--generation_steps", "8", "--num_runs", "9"]
SIZES = cosine_group_sizes(64, 8)


def run(*arguments):
    return call_main(run_lpd_order.main, *arguments)


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_both_formats_have_the_orders_of_the_flags(tmp_path, kind):
    paths = [tmp_path / "orders.npy", tmp_path / "orders.json"]
    flags = ["--order", kind, "--repulsion_threshold", 2, "--seed", 4]
    assert run(*SMALL, *flags, "--output_file", *paths).status == 0
    expected = make_orders(kind, 9, SIZES, 8, repulsion_threshold=2, seed=4)
    for path in paths:
        np.testing.assert_array_equal(load_orders(path, 64), expected)
    assert json.loads(meta_path(paths[0]).read_text()) == {
        "kind": kind, "group_sizes": list(SIZES), "grid_size": 8, "proximity_threshold": 1.0,
        "repulsion_threshold": 2.0, "seed": 4, "num_orders": 9, "image_size": 64,
    }


@pytest.mark.parametrize("given, sizes", [
    (["[1]*64"], (1,) * 64), (["[1,", "3,", "60]"], (1, 3, 60)), (["1", "3", "60"], (1, 3, 60)),
])
def test_group_sizes_are_written_as_for_training(tmp_path, given, sizes):
    flags = ["--img_size", 64, "--vqgan_stride", 8, "--num_runs", 2, "--output_file", tmp_path / "a.npy"]
    assert run(*flags, "--group_sizes", *given).status == 0
    np.testing.assert_array_equal(load_orders(tmp_path / "a.npy", 64), lpd_orders(2, sizes, 8))


def test_the_number_of_workers_and_batches_does_not_change_the_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lpd_order, "CELLS_PER_BATCH", 2 * 64)
    for workers in (1, 3):
        path = tmp_path / f"{workers}.npy"
        assert run(*SMALL, "--max_workers", workers, "--output_file", path).status == 0
        np.testing.assert_array_equal(load_orders(path, 64), lpd_orders(9, SIZES, 8))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_runs", 0], "--num_runs: 0 is not at least 1"),
        (["--img_size", 100], "--img_size 100 must be 1 to 128 times --vqgan_stride 8"),
        (["--generation_steps", 65], "--generation_steps: 65 steps for 64 tokens"),
        (["--group_sizes", 1, 63], "--group_sizes has 2 steps, --generation_steps is 8"),
        (["--group_sizes", *[1] * 7, 2], "--group_sizes: group sizes sum to 9, but there are 64 tokens"),
        (["--group_sizes", "[1]*0"], "--group_sizes: '[1]*0' is not a list of numbers"),
        (["--group_sizes", "[1]*999999999999"], "--group_sizes: '[1]*999999999999' is not a list of numbers"),
        (["--repulsion_threshold", "nan"], "--repulsion_threshold: nan is not at least 0"),
        (["--order", "spiral"], "invalid choice: 'spiral'"),
        (["--output_file", "orders.txt"], "--output_file orders.txt must end in .npy or .json"),
        (["--output_file", "file/orders.npy"], "file is not a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    done = run(*SMALL, "--output_file", "orders.npy", *flags)
    assert done.status == 2 and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_file_is_not_overwritten_unless_asked(tmp_path):
    path = tmp_path / "orders.npy"
    path.write_text("precious")
    done = run(*SMALL, "--output_file", tmp_path / "new.json", path)
    assert done.status == 2 and f"--output_file {path} exists" in done.err
    assert path.read_text() == "precious" and not (tmp_path / "new.json").exists()
    assert run(*SMALL, "--output_file", path, "--overwrite").status == 0
    assert len(load_orders(path, 64)) == 9


def test_the_same_command_again_leaves_complete_files_and_writes_missing_ones(tmp_path):
    """As after a kill between the two files."""
    first, second = tmp_path / "a.npy", tmp_path / "b.json"
    assert run(*SMALL, "--output_file", first, second).status == 0
    before, missing = (first.stat().st_mtime_ns, first.read_bytes()), second.read_bytes()
    second.unlink()
    assert run(*SMALL, "--output_file", first, second).status == 0
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before and second.read_bytes() == missing
    assert "complete already" in run(*SMALL, "--output_file", first, second).out


@pytest.mark.parametrize("name", ["a.npy", "a.json"])
@pytest.mark.parametrize("flags", [["--seed", 1], ["--num_runs", 8], ["--order", "random"]])
def test_a_file_of_other_settings_is_refused(tmp_path, name, flags):
    assert run(*SMALL, "--output_file", tmp_path / name).status == 0
    done = run(*SMALL, *flags, "--output_file", tmp_path / name)
    assert done.status == 2 and f"{name} exists" in done.err


@pytest.fixture
def long_run(tmp_path):
    """The program in the middle of a long run in `tmp_path`, and the process ids of its two workers."""
    flags = ["--num_runs", "1000000", "--max_workers", "2", "--output_file", "orders.npy", "orders.json"]
    shown = tmp_path.with_name(f"{tmp_path.name}.err")
    process = processes.fork(PROGRAM, *flags, cwd=tmp_path, err=shown)
    try:
        orders = re.compile(r"[1-9]\d*/1000000")
        wait_for(lambda: process.exitcode is not None or orders.search(shown.read_text()), "orders")
        yield process, children(process.pid), shown
    finally:
        process.kill()


@pytest.mark.parametrize("number, status", [("SIGINT", 130), ("SIGTERM", -15), ("SIGKILL", -9)])
def test_a_stopped_run_leaves_no_file_and_no_worker(tmp_path, long_run, number, status):
    process, workers, shown = long_run
    assert len(workers) == 2
    os.kill(process.pid, signal.Signals[number])
    process.join(WAIT)
    assert process.exitcode == status and "Traceback" not in shown.read_text()
    wait_for(lambda: not any(map(running, workers)), f"end of {workers}")
    assert not list(tmp_path.iterdir())


def test_the_script_makes_the_published_files(tmp_path, monkeypatch):
    """In a copy of the folder, because the script writes below its own. Its commands run in this process."""
    shutil.copytree(REPO / "orders", tmp_path / "orders", ignore=shutil.ignore_patterns("*generated*"))
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    script = [tmp_path / "orders/run_lpd_order.sh", "--num_runs", "2"]
    printed = subprocess.run(script, check=True, cwd="/", capture_output=True, text=True).stdout
    monkeypatch.chdir(tmp_path)
    for line in printed.splitlines():
        program, *words = line.split()
        assert program == "orders/run_lpd_order.py"
        finished(run(*words))
    made = tmp_path / "orders" / "lpd_orders_generated"
    for name, num_tokens, steps in (
        ("res256_steps20_repulsion2", 256, 20),
        ("res256_steps20_repulsion3", 256, 20),
        ("res256_steps32_repulsion2", 256, 32),
        ("res512_steps48_repulsion4", 1024, 48),
    ):
        published = load_orders(made / f"{name}.json", num_tokens, 2)
        np.testing.assert_array_equal(published, load_orders(made / f"{name}.npy", num_tokens, 2))
        settings = json.loads(meta_path(made / f"{name}.npy").read_text())
        assert settings["group_sizes"] == list(cosine_group_sizes(num_tokens, steps))
        assert name.endswith(f"repulsion{settings['repulsion_threshold']:.0f}")


# orders/plot.py


def test_measuring_orders_imports_no_matplotlib():
    code = "import sys, orders.plot; sys.exit('matplotlib' in sys.modules)"
    assert processes.python("-c", code).status == 0


@pytest.fixture
def order_files(tmp_path, monkeypatch):
    """The working folder, with 20 orders as orders.npy and published.json."""
    monkeypatch.chdir(tmp_path)
    for name in ("orders.npy", "published.json"):
        save_orders(name, lpd_orders(20, SIZES, 8), {"group_sizes": SIZES})


@pytest.mark.parametrize("name, flags", [("orders.npy", []), ("published.json", ["--group_sizes", *SIZES])])
def test_a_picture_is_drawn_beside_the_file(order_files, name, flags):
    assert call_main(plot.main, name, "--img_size", 128, *flags).status == 0
    assert Path(name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["published.json"], "--generation_steps or --group_sizes is needed"),
        (["missing.npy", "--generation_steps", 8], "missing.npy"),
        (["orders.npy", "--index", 20], "orders.npy has 20 orders, but 21 are needed"),
        (["orders.npy", "--generation_steps", 8], "64 positions, but an image has 256 tokens"),
        (["orders.npy", "--output_file", "published.json"], "--output_file published.json exists"),
    ],
)
def test_wrong_usage_of_the_plot_is_one_line(order_files, flags, message):
    done = call_main(plot.main, *flags)
    assert done.status == 2 and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_the_picture_of_the_method_is_drawn(tmp_path):
    finished(call_main(method.main, "--output_file", tmp_path / "method.png"))
    assert picture(tmp_path / "method.png").shape == picture(REPO / "assets/method.png").shape
