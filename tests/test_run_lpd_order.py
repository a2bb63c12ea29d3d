"""The order program and its script: the files they write, the errors they tell, what an interrupt leaves."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orders import run_lpd_order
from orders.lpd_order import ORDER_KINDS, make_orders
from orders.order_file import load_orders, meta_path
from orders.schedule import cosine_group_sizes

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAM = REPOSITORY / "orders" / "run_lpd_order.py"
SMALL = ["--img_size", "64", "--vqgan_stride", "8", "--generation_steps", "8", "--num_runs", "9"]
STEPS_2 = ["--generation_steps", 2]


def run(*arguments) -> int:
    return run_lpd_order.main([str(argument) for argument in arguments])


def test_the_program_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, *SMALL, "--output_file", "out/orders.npy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "9/9" in done.stderr and "orders/s" in done.stderr
    assert load_orders(tmp_path / "out" / "orders.npy", 64).shape == (9, 64)


@pytest.mark.parametrize("kind", ORDER_KINDS)
def test_the_file_holds_the_orders_of_its_flags(tmp_path, kind):
    path = tmp_path / "orders.npy"
    assert run(*SMALL, "--order", kind, "--repulsion_threshold", 2, "--seed", 4, "--output_file", path) == 0
    expected = make_orders(kind, 9, cosine_group_sizes(64, 8), 8, repulsion_threshold=2, seed=4)
    np.testing.assert_array_equal(load_orders(path, 64), expected)


def test_both_formats_of_one_run_hold_the_same_orders(tmp_path):
    paths = [tmp_path / "orders.json", tmp_path / "orders.npy"]
    assert run(*SMALL, "--output_file", *paths) == 0
    np.testing.assert_array_equal(load_orders(paths[0], 64), load_orders(paths[1], 64))


def test_the_settings_are_beside_the_file(tmp_path):
    path = tmp_path / "orders.npy"
    assert run(*SMALL, "--group_sizes", *[1] * 8, 56, "--generation_steps", 9, "--output_file", path) == 0
    assert json.loads(meta_path(path).read_text()) == {
        "kind": "lpd",
        "group_sizes": [1] * 8 + [56],
        "grid_size": 8,
        "proximity_threshold": 1.0,
        "repulsion_threshold": 1.0,
        "seed": 0,
        "num_orders": 9,
        "image_size": 64,
    }


def test_the_number_of_workers_and_batches_does_not_change_the_orders(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lpd_order, "CELLS_PER_BATCH", 2 * 64)
    for workers in (1, 3):
        assert run(*SMALL, "--max_workers", workers, "--output_file", tmp_path / f"{workers}.npy") == 0
    orders = [load_orders(tmp_path / f"{workers}.npy", 64) for workers in (1, 3)]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], make_orders("lpd", 9, cosine_group_sizes(64, 8), 8))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_runs", 0], "--num_runs must be 1 or more, not 0"),
        (["--num_runs", "many"], "--num_runs: invalid int value: 'many'"),
        (["--img_size", 100], "--img_size 100 must be 1 to 256 times --vqgan_stride 8"),
        (["--img_size", 8000], "--img_size 8000 must be 1 to 256 times --vqgan_stride 8"),
        (["--vqgan_stride", 0], "--vqgan_stride must be 1 or more, not 0"),
        (["--generation_steps", 65], "--generation_steps: 65 steps for 64 tokens"),
        (["--group_sizes", 1, 62], "--group_sizes: 2 groups do not go with --generation_steps 8"),
        ([*STEPS_2, "--group_sizes", 1, 62], "--group_sizes: group sizes sum to 63, but there are 64 tokens"),
        ([*STEPS_2, "--group_sizes", 2, 62], "--group_sizes: group sizes must start with 1, not 2"),
        (["--proximity_threshold", -1], "--proximity_threshold must be 0 or more, not -1.0"),
        (["--repulsion_threshold", "nan"], "--repulsion_threshold must be 0 or more, not nan"),
        (["--max_workers", 0], "--max_workers must be 1 or more, not 0"),
        (["--seed", -5], "--seed must be 0 or more, not -5"),
        (["--order", "spiral"], "invalid choice: 'spiral'"),
        (["--output_file", "orders.txt"], "--output_file orders.txt must end in .npy or .json"),
        (["--speed", "fast"], "unrecognized arguments: --speed fast"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--output_file", "orders.npy", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_overwritten(tmp_path, capsys):
    path = tmp_path / "orders.npy"
    path.write_text("precious")
    assert run(*SMALL, "--output_file", tmp_path / "new.json", path) == 2
    assert f"--output_file {path} exists" in capsys.readouterr().err
    assert path.read_text() == "precious" and not (tmp_path / "new.json").exists()
    assert run(*SMALL, "--output_file", path, "--overwrite") == 0
    assert len(load_orders(path, 64)) == 9


def test_the_same_command_again_leaves_what_is_complete_and_writes_what_is_not(tmp_path, capsys):
    """As after a kill between the two files."""
    first, second = tmp_path / "a.npy", tmp_path / "b.json"
    assert run(*SMALL, "--output_file", first, second) == 0
    before, missing = (first.stat().st_mtime_ns, first.read_bytes()), second.read_bytes()
    second.unlink()
    assert run(*SMALL, "--output_file", first, second) == 0
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before and second.read_bytes() == missing
    assert run(*SMALL, "--output_file", first, second) == 0
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.npy", "a.json"])
@pytest.mark.parametrize("flags", [["--seed", 1], ["--num_runs", 8], ["--order", "random"]])
def test_orders_of_other_settings_are_not_taken_for_complete(tmp_path, capsys, name, flags):
    assert run(*SMALL, "--output_file", tmp_path / name) == 0
    assert run(*SMALL, *flags, "--output_file", tmp_path / name) == 2
    assert f"{name} exists" in capsys.readouterr().err


@pytest.mark.parametrize("runs, parent", [(9, "file"), (10**15, ".")])
def test_a_failure_is_one_line_and_status_1(tmp_path, monkeypatch, capsys, runs, parent):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert run(*SMALL, "--num_runs", runs, "--output_file", f"{parent}/orders.npy") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, sent):
    flags = ["--num_runs", "1000000", "--max_workers", "2", "--output_file", "orders.npy", "orders.json"]
    process = subprocess.Popen(
        [sys.executable, "-u", PROGRAM, *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    while "orders/s" not in seen:  # the progress line: it has begun
        seen += process.stderr.read(1)
    process.send_signal(sent)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert rest.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_the_script_makes_the_published_files(tmp_path):
    """In a copy of the folder, since the script writes below its own."""
    shutil.copytree(REPOSITORY / "orders", tmp_path / "orders", ignore=shutil.ignore_patterns("*generated*"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    script = tmp_path / "orders" / "run_lpd_order.sh"
    subprocess.run([script, "--num_runs", "2"], check=True, cwd="/", capture_output=True)
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
