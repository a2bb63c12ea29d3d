"""Metrics made of features: FID, Inception Score, KID, precision and recall, by torch-fidelity's formulas.

Knows features and reference statistics. Does not know images, nor where features come from. The Frechet
distance is called `fid` for Inception features only; else its name says what it is made of.
"""

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from util.files import atomic
from util.npz import array_names, read_arrays

# What a statistics file says of itself, if it is ours.
FACTS = ("n", "extractor", "extractor_digest", "img_size", "preparation")


class RunningStatistics:
    """Mean and covariance of features [n, F] that come in parts; sums in float64, 34 MB for 2048 features."""

    def __init__(self, num_features):
        self.n = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features):
        """Take in float [n, F]."""
        features = features.double().cpu()
        self.n += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    def merge(self, other):
        """Take in what another process has summed."""
        self.n += other.n
        self.sum += other.sum
        self.products += other.products

    def finish(self):
        """dict of mu float64 [F], sigma float64 [F, F] (divided by n - 1) and n.

        Raises:
            ValueError: fewer than two images.
        """
        if self.n < 2:
            raise ValueError(f"{self.n} images: statistics need at least 2")
        mu = self.sum / self.n
        sigma = (self.products - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy(), "n": self.n}


def save_statistics(path, statistics, *, features=None, **facts):
    """Write statistics as `.npz`: mu, sigma, n, the other FACTS as strings or numbers, maybe the features."""
    arrays = {**statistics, **facts} | ({"features": features} if features is not None else {})
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path):
    """Reference statistics, `.npz` with `mu` [F] and `sigma` [F, F] (ours or MAR-style), as float64.

    Returns:
        dict of mu, sigma and, where the file has them, the facts of `FACTS` and features float32 [n, F].
    Raises:
        ValueError: damaged, keys missing, shapes that do not fit each other, or numbers that are none.
    """
    try:
        arrays = read_arrays(path, {"mu", "sigma", "features", *FACTS} & {"mu", "sigma", *array_names(path)})
        found = {"mu": arrays["mu"].astype(np.float64), "sigma": arrays["sigma"].astype(np.float64)}
        found |= {k: arrays[k].item() for k in FACTS if k in arrays}
        if "features" in arrays:
            found["features"] = arrays["features"].astype(np.float32)
    except (ValueError, TypeError) as error:  # a TypeError: arrays of other things than numbers
        raise ValueError(f"{path}: no statistics with mu and sigma ({error})") from None
    size = len(found["mu"]) if found["mu"].ndim == 1 else -1
    if found["sigma"].shape != (size, size):
        raise ValueError(f"{path}: mu is {list(found['mu'].shape)}, sigma {list(found['sigma'].shape)}")
    if not (np.isfinite(found["mu"]).all() and np.isfinite(found["sigma"]).all()):
        raise ValueError(f"{path}: mu or sigma is not finite")
    if "features" in found and (found["features"].ndim != 2 or found["features"].shape[1] != size):
        raise ValueError(f"{path}: mu is [{size}], features {list(found['features'].shape)}")
    return found


def frechet_distance(statistics, reference):
    """The Frechet distance of two Gaussians, each a dict of mu and sigma in float64."""
    result = fid_statistics_to_metric(statistics, reference, False)
    return float(result["frechet_inception_distance"])


def inception_score(logits, *, splits=10):
    """Mean and standard deviation over splits (at most one per image), logits float [n, C] in image order."""
    result = isc_features_to_metric(logits, splits=min(splits, len(logits)), shuffle=True, rng_seed=2020)
    return float(result["inception_score_mean"]), float(result["inception_score_std"])


def kernel_distance(features, reference, *, subsets=100, subset_size=1000):
    """KID: mean and standard deviation of the polynomial MMD over subsets; both float [n, F].

    Subsets are smaller where there are fewer images: that changes the spread, not what is estimated.
    """
    size = min(subset_size, len(features), len(reference))
    result = kid_features_to_metric(
        features, reference, kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return float(result["kernel_inception_distance_mean"]), float(result["kernel_inception_distance_std"])


def precision_recall(features, reference, *, neighbours=3):
    """Improved precision and recall of generated features against real ones, both float [n, F]."""
    result = prc_features_to_metric(
        features, reference, prc_neighborhood=neighbours, prc_batch_size=2500, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    return float(result["precision"]), float(result["recall"])


NAMES = {
    "frechet_distance": "fid", "score": "is", "score_std": "is_std", "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
}  # fmt: skip


def metric_name(kind, extractor_name):
    """What a metric is called: the known names belong to Inception's features, others name their own."""
    return NAMES.get(kind, kind) if extractor_name == "inception" else f"{kind}_{extractor_name}"


def compute_metrics(features, logits, extractor_name, reference=None, *, kid=False, prc=False):
    """All metrics of generated images.

    Args:
        features: float32 [n, F] and logits: float32 [n, C], in image order.
        reference: from `load_statistics`, or None; `kid` and `prc` need its features.
    Returns:
        dict of floats by the names of `metric_name`.
    """
    values = {}
    values["score"], values["score_std"] = inception_score(logits)
    if reference is not None:
        running = RunningStatistics(features.shape[1])
        for part in features.split(5000):
            running.add(part)
        values["frechet_distance"] = frechet_distance(running.finish(), reference)
    if kid or prc:
        real = torch.from_numpy(reference["features"])
    if kid:
        values["kernel_distance"], values["kernel_distance_std"] = kernel_distance(features, real)
    if prc:
        values["precision"], values["recall"] = precision_recall(features, real)
    return {metric_name(kind, extractor_name): value for kind, value in values.items()}
