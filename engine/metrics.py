"""Metrics of features: FID, Inception Score, KID, precision and recall, by torch-fidelity's formulas.

The Frechet distance is called `fid` for Inception features only; otherwise its name says what it is made of.
torch-fidelity is imported where it is used: it takes as long to import as torch.
"""

import numpy as np
import torch

from util.files import atomic, read_arrays

FACTS = ("n", "extractor", "extractor_digest", "img_size", "preparation")  # what our statistics files record
REMEDY = "main_stats.py makes them of images: --data_path FOLDER, or --reference_batch FILE.npz with arr_0"
INCEPTION_NAMES = {
    "frechet_distance": "fid", "score": "is", "score_std": "is_std", "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
}


class RunningStatistics:
    """Mean and covariance of features [n, F] that come in parts; sums in float64, 34 MB for 2048 features."""

    def __init__(self, num_features):
        self.n = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features):
        features = features.cpu().double()
        self.n += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    def merge(self, other):
        self.n += other.n
        self.sum += other.sum
        self.products += other.products

    def finish(self):
        """dict of mu float64 [F], sigma float64 [F, F] (divided by n - 1) and n. ValueError if n < 2."""
        if self.n < 2:
            raise ValueError(f"{self.n} images: statistics need at least 2")
        mu = self.sum / self.n
        sigma = (self.products - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy(), "n": self.n}


def save_statistics(path, statistics, *, features=None, **facts):
    """Write statistics as `.npz`: mu, sigma, n, the other FACTS and, if given, the features [n, F]."""
    arrays = {**statistics, **facts} | ({"features": features} if features is not None else {})
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_statistics(path, *, features=True):
    """Reference statistics, whoever made them: dict of mu float64 [F], sigma float64 [F, F] and, if recorded,
    FACTS and, if asked for, features float32 [n, F]. ValueError if damaged, incomplete, or non-finite."""
    try:
        arrays = read_arrays(path, ("mu", "sigma"), (*FACTS, *["features"] * features))
        found = {key: arrays[key].astype(np.float64) for key in ("mu", "sigma")}
        found |= {key: arrays[key].item() for key in FACTS if key in arrays}
        if "features" in arrays:
            found["features"] = arrays["features"].astype(np.float32)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: no statistics with mu and sigma ({reason}); {REMEDY}") from None
    shapes = {key: list(found[key].shape) for key in ("mu", "sigma", "features") if key in found}
    size = shapes["mu"]
    if len(size) != 1 or shapes["sigma"] != 2 * size or shapes.get("features", [0, *size])[1:] != size:
        raise ValueError(f"{path}: shapes do not fit each other: {shapes}")
    if not all(np.isfinite(found[key]).all() for key in shapes):
        raise ValueError(f"{path}: non-finite statistics")
    return found


def frechet_distance(statistics, reference):
    """The Frechet distance of two Gaussians, each a dict of mu and sigma in float64."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return float(fid_statistics_to_metric(statistics, reference, False)["frechet_inception_distance"])


def inception_score(logits, *, splits=10):
    """Mean and standard deviation over splits (at most one per image), logits float [n, C] in image order."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    result = isc_features_to_metric(logits, splits=min(splits, len(logits)), shuffle=True, rng_seed=2020)
    return float(result["inception_score_mean"]), float(result["inception_score_std"])


def kernel_distance(features, reference, *, subsets=100, subset_size=1000):
    """KID: mean and standard deviation of the polynomial MMD over subsets; both float [n, F]. With few images
    the subsets are smaller, which changes the spread, not the estimated value."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(subset_size, len(features), len(reference))
    result = kid_features_to_metric(
        features, reference, kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return float(result["kernel_inception_distance_mean"]), float(result["kernel_inception_distance_std"])


def precision_recall(features, reference, *, neighbours=3):
    """Improved precision and recall of generated features against real ones, both float [n, F]."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    result = prc_features_to_metric(
        features, reference, prc_neighborhood=neighbours, prc_batch_size=2500, save_cpu_ram=True,
        verbose=False,
    )
    return float(result["precision"]), float(result["recall"])


def metric_name(kind, extractor_name):
    """The reported name of a metric: the known names belong to Inception features, others add their own."""
    return INCEPTION_NAMES.get(kind, kind) if extractor_name == "inception" else f"{kind}_{extractor_name}"


def compute_metrics(features, logits, extractor_name, reference=None, *, kid=False, prc=False):
    """All metrics of generated images, a dict of floats by `metric_name`, from features float32 [n, F] and
    logits float32 [n, C] in image order. `kid` and `prc` need the reference's features."""
    values = {}
    values["score"], values["score_std"] = inception_score(logits)
    if reference is not None:
        running = RunningStatistics(features.shape[1])
        for part in features.split(5000):
            running.add(part)
        values["frechet_distance"] = frechet_distance(running.finish(), reference)
    real = torch.from_numpy(reference["features"]) if kid or prc else None
    if kid:
        values["kernel_distance"], values["kernel_distance_std"] = kernel_distance(features, real)
    if prc:
        values["precision"], values["recall"] = precision_recall(features, real)
    return {metric_name(kind, extractor_name): value for kind, value in values.items()}
