"""scripts/gpu_day.py: its commands are valid, and pieces leave a report and a line, or an error."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import call_main, draw
from PIL import Image
from processes import REPO

from scripts import gpu_day
from util.files import read_json

PIECES = gpu_day.all_pieces()
TIMED = {name: command for name, (command, _, _) in PIECES.items() if "benchmarks/" in command}


def test_the_list_has_every_piece_under_ten_minutes():
    lines = call_main(gpu_day.main, "--list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(PIECES)
    assert all(minutes < 10 for _, minutes, _ in PIECES.values())


def test_training_is_timed_with_the_micro_batches_of_the_training_scripts():
    for script in (REPO / "scripts/train").glob("*.sh"):
        micro_batch = re.search(r"^train_lpd \d+ (\d+) ", script.read_text(), re.M)[1]
        assert f"--batch_size {micro_batch} " in TIMED[f"train_{script.stem}_plain"]


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", TIMED)
def test_commands_are_valid(tmp_path, name, tiny):
    args = gpu_day.parse_args(["--tiny"] if tiny else [])
    words, _ = gpu_day.command_of(args, TIMED[name], tmp_path / "result.json", tmp_path)
    at = next(i for i, word in enumerate(words) if word.startswith("benchmarks/"))
    parsed = importlib.import_module(f"benchmarks.{Path(words[at]).stem}").parse_args(words[at + 1 :])
    assert str(parsed.output_file) == str(tmp_path / "result.json")
    assert parsed.model == ("lpd_tiny" if tiny else shlex.split(TIMED[name])[words[2:].index("--model") + 1])


def test_a_piece_that_fails_is_named_and_leaves_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "all_pieces", lambda: {"tests": ("bash /no/such/pytest", 1, "")})
    outcome = call_main(gpu_day.main, "--output_dir", tmp_path)
    assert outcome.status == 1 and "error: tests: exit status 127" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_tests.log"]
    assert call_main(gpu_day.main, "dance").status == 2


@pytest.mark.long
def test_rehearsal_of_one_piece_of_each_kind(tmp_path):
    """The programs themselves, as on the GPU but for their sizes."""
    for split in ("train", "val"):
        for i in range(20):
            path = tmp_path / "images" / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(draw(i % 2, i, 32))[:, :, 0]).resize((32, 32)).save(path)
    names = ["tests", "generate_lpd_l_256_fused", "train_lpd_l_256_all_gpus"]
    names += ["evaluate_lpd_l_256", "fashion_mnist_16x16"]
    flags = ["--tiny", "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out"]
    words = ["bash", REPO / "scripts/gpu_day.sh", *flags, *names]
    result = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout.count("| cpu |")) == (0, len(names)), result.stderr
    assert all(read_json(tmp_path / f"out/gpu_{name}.json")["torch"] for name in names)
