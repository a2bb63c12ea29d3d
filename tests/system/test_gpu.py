"""What users run first gives on a GPU what it gives on a CPU."""

import helpers
import numpy as np
import pytest
from helpers import call
from processes import REPO, finished

from util.files import read_json
from util.logging import read_metrics

pytestmark = pytest.mark.gpu
DEVICES = ("cuda", "cpu")
FASHION = REPO / "assets/fashion_mnist"
SHIPPED = {
    "pretrained_ckpt": FASHION / "lpd.safetensors", "vqgan_path": FASHION / "tokenizer.safetensors",
    "generation_steps": 8, "cfg": 4,
}


def run(program, folder, device, flags):
    """The folder of a run of main_PROGRAM on a device."""
    finished(call(program, *helpers.words_of({**flags, "output_dir": folder / device, "device": device})))
    return folder / device


@pytest.mark.parametrize("temperature", [0, 1])
def test_samples_are_those_of_the_cpu(tmp_path, temperature):
    """40 images within one grey level; a tie, decided by rounding, may change one of them."""
    flags = {**SHIPPED, "num_per_class": 4, "temperature": temperature}
    folders = [run("sample", tmp_path, device, flags) / "images_8_steps" for device in DEVICES]
    paths = [sorted(folder.rglob("*.png")) for folder in folders]
    ours, expected = (np.stack([helpers.picture(path) for path in part]).astype(int) for part in paths)
    differing = (abs(ours - expected) > 1).any(axis=(1, 2, 3))
    assert len(differing) == 40 and differing.sum() <= 1


def test_losses_of_20_steps_are_those_of_the_cpu(tmp_path):
    flags = {
        "model": "lpd_micro", "use_cached": True, "cached_path": helpers.token_cache(), "epochs": 5,
        "batch_size": 4, "lr": 1e-3, "proj_dropout": 0, "label_drop_prob": 0, "log_every": 1,
    }
    folders = [run("lpd", tmp_path, device, flags) for device in DEVICES]
    ours, expected = ([line["loss"] for line in read_metrics(folder)] for folder in folders)
    assert len(ours) >= 20 and ours == pytest.approx(expected, abs=1e-4)


def test_an_evaluation_of_64_images_ends_with_finite_metrics(tmp_path):
    flags = {**SHIPPED, "evaluate": True, "num_images": 64, "inception": helpers.inception()}
    (result,) = run("lpd", tmp_path, "cuda", flags).glob("*.json")
    metrics = read_json(result)["metrics"]
    assert metrics and all(np.isfinite(value) for value in metrics.values())
