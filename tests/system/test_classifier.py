"""The classifier that scores generated images, on a toy folder of dark and light images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import classifier
from util.cli import UsageError


def write_images(folder, n, seed):
    """`n` noisy images of 8x8 pixels of each of two classes."""
    rng = np.random.default_rng(seed)
    for name, low in (("dark", 0), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(low, low + 56, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_scores_by_hand():
    result = classifier.scores(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), ("a", "b", "c"))
    assert result["n"] == 4 and result["recognised"] == 0.5
    assert result["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert result["per_class"]["a"] == {"n": 2, "recognised": 0.5}
    assert result["per_class"]["c"] == {"n": 0, "recognised": None}


def test_classifier_recognises_a_folder_and_notices_swapped_classes(tmp_path):
    write_images(tmp_path / "data/train", 40, seed=0)
    write_images(tmp_path / "data/val", 10, seed=1)
    weights = tmp_path / "classifier.safetensors"
    classifier.main(
        ["train", "--data_path", str(tmp_path / "data"), "--output", str(weights), "--img_size", "8"]
        + ["--epochs", "15", "--report", str(tmp_path / "report.json")]
    )
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == 1.0

    generated = tmp_path / "generated"
    write_images(generated, 5, seed=2)
    for i in range(5):  # dark images in the folder of light ones
        (generated / "dark" / f"{i}.png").replace(generated / "light" / f"{i}.png")
    command = ["check", "--weights", str(weights), "--images", str(generated)]
    classifier.main([*command, "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["n"], result["recognised"], result["confusion"]) == (5, 0.0, [[0, 0], [5, 0]])


@pytest.mark.parametrize(
    "args, message",
    [
        (["check", "--weights", "none.safetensors", "--images", "."], "--weights: no such file"),
        (["train", "--data_path", "nowhere", "--output", "w.safetensors"], "--data_path: no such folder"),
        (["train", "--data_path", ".", "--output", "w.safetensors", "--img_size", "12"], "a multiple of 8"),
        (["train", "--data_path", ".", "--output", "taken.safetensors"], "exists; --overwrite"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").touch()
    with pytest.raises(UsageError, match=message):
        classifier.main(args)
    assert [p.name for p in tmp_path.iterdir()] == ["taken.safetensors"]
