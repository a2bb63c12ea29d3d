"""Evaluation: the metrics by hand, and main_lpd --evaluate with Inception of random weights.

The released Inception weights are not at hand offline; torch-fidelity's own network, with random weights and
the 566 keys of the released file, takes their place.
"""

import json
import math
from functools import lru_cache

import numpy as np
import programs
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from programs import call, finished, train_flags

from engine.checkpoint import load_lpd, load_tokenizer, state_digest
from engine.evaluate import evaluate
from engine.metrics import INCEPTION_FILE, InceptionFeatures, compute_metrics, find_inception, load_statistics
from engine.settings import resolve_settings
from util.dist import World
from util.logging import read_metrics

ALONE = World(0, 1, torch.device("cpu"))
IMAGES = 6


@lru_cache(maxsize=1)
def inception():
    """A file of random Inception weights in the released layout."""
    path = programs.workspace() / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    for name, weight in network.named_parameters():
        if name.endswith("conv.weight"):  # torch's own init would let the differences of images fade away
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    state = network.state_dict()
    assert len(state) == 566 and state["fc.bias"].shape == (1008,)
    torch.save(state, path)
    return path


@lru_cache(maxsize=1)
def reference():
    """A statistics file: mean 0.5 everywhere, no spread (with which FID is quick and known by hand)."""
    path = programs.workspace() / "reference.npz"
    np.savez(path, mu=np.full(2048, 0.5), sigma=np.zeros((2048, 2048), np.float32))
    return path


def evaluate_flags(**changes):
    flags = {
        "pretrained_ckpt": programs.trained() / "lpd.safetensors", "vqgan_path": programs.tokenizer(),
        "num_images": IMAGES, "eval_bsz": 4, "generation_steps": 4, "inception": inception(), **changes,
    }  # fmt: skip
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    return ["--evaluate", *words, *programs.ON_CPU]


# The metrics.


def statistics_of(features):
    return {"mu": features.mean(0).numpy(), "sigma": np.cov(features.numpy(), rowvar=False)}


def test_frechet_distance_by_hand():
    """Of two Gaussians with diagonal covariances: |mu - mu'|^2 + sum (s + s' - 2 sqrt(s s'))."""
    features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # covariance 4/3, means 0
    other = {"mu": np.array([3.0, 0.0]), "sigma": np.diag([1.0, 12.0])}
    expected = 9 + (4 / 3 + 1 - 2 * math.sqrt(4 / 3)) + (4 / 3 + 12 - 2 * math.sqrt(16))
    assert compute_metrics(features, torch.zeros(4, 3), other)["fid"] == pytest.approx(expected)


def test_frechet_distance_from_itself_is_zero():
    """1e-6: square roots of rounding errors of 1e-16, some of them, against a trace near 8."""
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 8)))
    metrics = compute_metrics(features, torch.zeros(50, 3), statistics_of(features))
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)


def test_inception_score_by_hand():
    """One split of images each surely of its own class out of two: exp of the entropy log 2."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(5, 1)
    assert compute_metrics(torch.zeros(10, 2), logits, splits=1)["is"] == pytest.approx(2)
    assert compute_metrics(torch.zeros(10, 2), torch.zeros(10, 2))["is"] == pytest.approx(1)


def test_without_a_reference_there_is_no_fid():
    assert set(compute_metrics(torch.zeros(4, 2), torch.zeros(4, 3))) == {"is", "is_std"}


def test_features_are_torch_fidelitys_own_of_the_same_bytes():
    images = torch.from_numpy(np.stack([programs.draw(label, 0) for label in range(3)]))  # [3, H, W, 3]
    features, logits = InceptionFeatures(inception(), ALONE.device)(images)
    network = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception())).eval()
    with torch.no_grad():
        expected = network(images.permute(0, 3, 1, 2))
    torch.testing.assert_close((features, logits), expected)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)


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
    with pytest.raises(ValueError, match="--inception FILE or set LPD_INCEPTION"):
        find_inception()


# The images.


def first_pixels(images):
    """A stand-in for Inception that is quick: 2048 features and 3 logits from the pixels."""
    flat = images.flatten(1).float()
    return flat.repeat(1, 3)[:, :2048] / 255, flat[:, :3] / 50


@pytest.fixture(scope="module")
def generation():
    model, _ = load_lpd(programs.trained() / "lpd.safetensors")
    return model, load_tokenizer(programs.tokenizer()), resolve_settings(4, generation_steps=4)


def test_metrics_do_not_depend_on_the_batch_size(generation):
    """Relative 1e-3: one grey level in some pixels, where the decoder's convolutions sum in another order."""
    results = [
        evaluate(*generation, IMAGES, batch, first_pixels, load_statistics(reference()), ALONE)
        for batch in (1, 4, 100)
    ]
    for result in results:
        assert result["num_images"] == IMAGES and result["seconds"] >= 0
        assert result["fid"] == pytest.approx(results[0]["fid"], rel=1e-3)
        assert result["is"] == pytest.approx(results[0]["is"], rel=1e-3)


# The program.


def test_evaluation_prints_and_writes_the_metrics_and_all_that_decides_them(tmp_path):
    outcome = finished(
        call("lpd", *evaluate_flags(fid_stats=reference(), output_dir=tmp_path, cfg=2.0, seed=5, top_k=9))
    )
    result = json.loads(outcome.out)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert result["num_images"] == IMAGES and result["bf16"] is False
    assert result["is"] == pytest.approx(1)  # of 6 images in as many splits
    assert result["fid"] > 0
    expected = {"cfg": 2.0, "seed": 5, "top_k": 9, "steps": 4, "order": "lpd", "cfg_schedule": "linear"}
    assert expected.items() <= result["settings"].items()
    assert sum(result["settings"]["group_sizes"]) == 16
    assert result["weights"] == state_digest(load_lpd(programs.trained() / "lpd.safetensors")[0])
    assert result["tokenizer"] == state_digest(load_tokenizer(programs.tokenizer()))


def test_evaluation_twice_is_the_same_and_another_seed_is_not():
    flags = [evaluate_flags(seed=seed, fid_stats=reference(), num_images=3) for seed in (1, 1, 2)]
    results = [json.loads(finished(call("lpd", *f)).out) for f in flags]
    assert results[0]["fid"] == results[1]["fid"]
    assert results[0]["fid"] != pytest.approx(results[2]["fid"], rel=1e-6)


def test_order_file_decides_the_orders(tmp_path):
    """Orders are checked to be enough before anything slow, and then row i is image i's."""
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(IMAGES)]).astype(np.uint16)
    np.save(tmp_path / "orders.npy", orders)
    common = {"temperature": 0, "fid_stats": reference()}
    flags = evaluate_flags(lpd_order_file=tmp_path / "orders.npy", **common)
    from_file, made = (json.loads(finished(call("lpd", *f)).out) for f in (flags, evaluate_flags(**common)))
    assert from_file["fid"] != pytest.approx(made["fid"], rel=1e-6)
    np.save(tmp_path / "orders.npy", orders[:5])
    outcome = call("lpd", *flags)
    assert outcome.status == 2 and "has 5 orders, but 6 are needed" in outcome.err


def test_evaluation_while_training_is_logged(tmp_path):
    flags = train_flags(
        tmp_path, epochs=0.5, vqgan_path=programs.tokenizer(), num_images=2, generation_steps=4,
        inception=inception(), fid_stats=reference(), eval_freq=1,
    )  # fmt: skip
    finished(call("lpd", *flags, "--online_eval"))
    (line,) = [line for line in read_metrics(tmp_path) if "fid" in line]
    assert line["step"] == 3 and line["fid"] > 0 and line["is"] >= 1
