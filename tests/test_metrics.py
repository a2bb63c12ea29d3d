"""Metrics: by hand, against torch-fidelity called directly, and the statistics files they start from."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from engine.metrics import (
    RunningStatistics,
    compute_metrics,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_statistics,
    metric_name,
    precision_recall,
    save_statistics,
)


def draw(n, size=12, seed=0, shift=0.0):
    """float32 features [n, size]."""
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, size)).astype(np.float32))


def statistics_of(features):
    running = RunningStatistics(features.shape[1])
    running.add(features)
    return running.finish()


# By hand.


def test_frechet_distance_of_diagonal_gaussians():
    """|mu - mu'|^2 + sum (s + s' - 2 sqrt(s s'))."""
    features = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # covariance 4/3, means 0
    other = {"mu": np.array([3.0, 0.0]), "sigma": np.diag([1.0, 12.0])}
    expected = 9 + (4 / 3 + 1 - 2 * math.sqrt(4 / 3)) + (4 / 3 + 12 - 2 * math.sqrt(16))
    assert frechet_distance(statistics_of(features), other) == pytest.approx(expected)


def test_frechet_distance_from_itself_is_zero():
    """1e-6: square roots of rounding errors of 1e-16, some of them, against a trace near 8."""
    statistics = statistics_of(draw(50, 8))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_score_of_sure_images_of_two_classes_is_two_and_of_images_alike_one():
    """exp of the entropy log 2."""
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]]).repeat(5, 1)
    assert inception_score(logits, splits=1)[0] == pytest.approx(2)
    assert inception_score(torch.zeros(10, 2))[0] == pytest.approx(1)


def test_score_of_fewer_images_than_splits_is_a_number():
    assert inception_score(draw(3)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_images_inside_the_real_ones_are_precise_and_those_far_away_not():
    real = draw(60)
    assert precision_recall(real[:30] + 1e-3, real)[0] == 1
    assert precision_recall(real + 100, real) == (0, 0)


# Against torch-fidelity.


def test_frechet_distance_is_torch_fidelitys():
    """1e-6: torch-fidelity takes the mean of float32 features in float32."""
    ours, theirs = draw(80), draw(70, seed=1, shift=0.3)
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (ours, theirs)), False)
    found = frechet_distance(statistics_of(ours), statistics_of(theirs))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


def test_score_is_torch_fidelitys():
    logits = draw(55) * 3
    expected = isc_features_to_metric(logits)
    assert inception_score(logits) == tuple(expected.values())


def test_kernel_distance_is_torch_fidelitys():
    ours, theirs = draw(40), draw(30, seed=1, shift=0.3)
    expected = kid_features_to_metric(ours, theirs, kid_subset_size=30, verbose=False)
    assert kernel_distance(ours, theirs) == tuple(expected.values())


def test_precision_and_recall_are_torch_fidelitys():
    ours, theirs = draw(60), draw(50, seed=1, shift=0.3)
    expected = prc_features_to_metric(ours, theirs, verbose=False)
    found = precision_recall(ours, theirs)
    assert found == (expected["precision"], expected["recall"]) and 0 < min(found) < 1


def test_all_metrics_come_by_name():
    reference = {**statistics_of(draw(50, seed=1)), "features": draw(50, seed=1).numpy()}
    found = compute_metrics(draw(40), draw(40), "inception", reference, kid=True, prc=True)
    assert set(found) == {"fid", "is", "is_std", "kid", "kid_std", "precision", "recall"}
    assert found["fid"] == frechet_distance(statistics_of(draw(40)), reference)


def test_without_a_reference_there_is_no_distance():
    assert set(compute_metrics(draw(4), draw(4), "inception")) == {"is", "is_std"}


@pytest.mark.parametrize("kind", ["frechet_distance", "score", "kernel_distance", "precision", "recall"])
def test_only_inception_gives_metrics_of_known_names(kind):
    known = {"fid", "is", "kid", "precision", "recall"}
    assert metric_name(kind, "inception") in known
    assert metric_name(kind, "other") == f"{kind}_other" and not known & {metric_name(kind, "other")}


# Statistics.


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_running_statistics_are_numpys(parts):
    """1e-12 of features near 5: float64 throughout, though the means are large against the spread."""
    features = draw(50, shift=5)
    running = RunningStatistics(12)
    for part in features.tensor_split(parts):
        running.add(part)
    found, exact = running.finish(), features.double().numpy()
    assert found["n"] == 50
    np.testing.assert_allclose(found["mu"], exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], np.cov(exact, rowvar=False), atol=1e-12)


def test_merged_statistics_are_those_of_all_images():
    """1e-12: only the order of the sums differs."""
    features = draw(50, shift=5)
    a, b = RunningStatistics(12), RunningStatistics(12)
    a.add(features[:13])
    b.add(features[13:])
    a.merge(b)
    found, whole = a.finish(), statistics_of(features)
    np.testing.assert_allclose(found["sigma"], whole["sigma"], atol=1e-12)
    np.testing.assert_allclose(found["mu"], whole["mu"], rtol=1e-12)
    assert found["n"] == 50


def test_statistics_of_one_image_are_refused():
    with pytest.raises(ValueError, match="1 images: statistics need at least 2"):
        statistics_of(draw(1))


def test_written_statistics_come_back(tmp_path):
    statistics, features = statistics_of(draw(9)), draw(9).numpy()
    facts = {"extractor": "inception", "extractor_digest": "ab", "img_size": 256, "preparation": "as it is"}
    save_statistics(tmp_path / "s.npz", statistics, features=features, **facts)
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


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": MU}, "sigma"),
        ({"mu": MU, "sigma": np.eye(5)}, r"mu is \[4\], sigma \[5, 5\]"),
        ({"mu": SIGMA, "sigma": SIGMA}, r"mu is \[4, 4\]"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "not finite"),
        ({"mu": MU, "sigma": SIGMA + np.inf}, "not finite"),
        ({"mu": MU, "sigma": SIGMA, "features": np.zeros((9, 3))}, r"mu is \[4\], features \[9, 3\]"),
        ({"mu": np.array([{}] * 4, object), "sigma": SIGMA}, "no statistics"),
        ({"mu": np.array(["a"] * 4), "sigma": SIGMA}, "no statistics"),
    ],
    ids=["no sigma", "other sizes", "no vector", "nan", "inf", "features", "objects", "text"],
)
def test_statistics_that_are_none_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_statistics(tmp_path / "s.npz")
    assert str(tmp_path / "s.npz") in str(error.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_statistics_cut_short_are_refused(share, tmp_path):
    np.savez(tmp_path / "s.npz", mu=MU, sigma=SIGMA)
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="no statistics with mu and sigma"):
        load_statistics(tmp_path / "s.npz")
