"""Metrics of features: FID, Inception Score, KID, precision and recall, by torch-fidelity's formulas.

Another metric is a function and a line in METRICS; to be asked for, it is a flag of `MetricSettings` too.
torch-fidelity is imported where it is used: it takes as long to import as torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.features import FeatureSettings, flat
from util.cli import setting
from util.files import array_names, atomic, read_arrays

FACTS = ("n", "extractor", "extractor_digest", "img_size", "preparation")  # what our statistics files record
REMEDY = "main_stats.py makes them of images: --data_path FOLDER, or --reference_batch FILE.npz with arr_0"


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


def statistics_of(features):
    """The statistics of features float32 [n, F], as `RunningStatistics.finish`."""
    running = RunningStatistics(features.shape[1])
    for part in features.split(5000):
        running.add(part)
    return running.finish()


def save_statistics(path, statistics):
    """Write statistics, extractor name -> dict of mu, sigma, perhaps FACTS and features [n, F], as `.npz`."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **flat(statistics))


def load_statistics(path, extractor="", *, features=True):
    """Reference statistics, whoever made them: dict of mu float64 [F], sigma float64 [F, F] and, if recorded,
    FACTS and, if asked for, features float32 [n, F]. Of a file that holds those of several extractors, the
    named one's. ValueError if damaged, incomplete, or non-finite."""
    try:
        prefix = f"{extractor}/" if f"{extractor}/mu" in array_names(path) else ""
        required, optional = ("mu", "sigma"), (*FACTS, *["features"] * features)
        arrays = read_arrays(path, *([prefix + key for key in keys] for keys in (required, optional)))
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
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


@dataclass(frozen=True)
class Metric:
    """How numbers of some kinds are computed: of an extractor's output for the images and, if named, of one
    for the reference; `statistics` are a dict of mu and sigma. With a flag it is computed if asked for."""

    kinds: tuple[str, ...]
    compute: Callable  # returns a float, or one for each kind
    images: str
    reference: str = ""
    flag: str = ""


METRICS = (
    Metric(("score", "score_std"), inception_score, "logits"),
    Metric(("frechet_distance",), frechet_distance, "statistics", "statistics"),
    Metric(("kernel_distance", "kernel_distance_std"), kernel_distance, "features", "features", "kid"),
    Metric(("precision", "recall"), precision_recall, "features", "features", "prc"),
)


@dataclass(frozen=True)
class MetricSettings(FeatureSettings):
    """What images are measured with."""

    fid_stats: str | None = setting(
        None, "reference statistics, .npz with mu and sigma", kind=str, metavar="FILE"
    )
    kid: bool = setting(False, "kernel distance; needs the reference's features")
    prc: bool = setting(False, "precision and recall; needs the reference's features")

    @property
    def asked(self):
        """The flags of METRICS that are set."""
        return tuple(metric.flag for metric in METRICS if metric.flag and getattr(self, metric.flag))


def compute_metrics(extractor, outputs, reference=None, asked=()):
    """The metrics for which an extractor's outputs and the reference have what they need, a dict of floats by
    `metric_name`.

    `outputs` are of all images, in order: features float32 [n, F], perhaps logits float32 [n, C]. `reference`
    is a dict as of `load_statistics`, `asked` the flags that are set.
    """
    ours, theirs, values = dict(outputs), {}, {}
    if reference is not None:
        ours["statistics"] = statistics_of(outputs["features"])
        theirs["statistics"] = reference
        if "features" in reference:
            theirs["features"] = torch.as_tensor(reference["features"])
    for metric in METRICS:
        wanted = not metric.flag or metric.flag in asked
        if wanted and metric.images in ours and metric.reference in ("", *theirs):
            inputs = [ours[metric.images], *([theirs[metric.reference]] if metric.reference else [])]
            found = np.ravel(metric.compute(*inputs)).tolist()
            values |= {extractor.metric_name(kind): x for kind, x in zip(metric.kinds, found, strict=True)}
    return values
