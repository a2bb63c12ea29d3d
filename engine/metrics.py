"""Features of images, and the metrics made of them: FID and Inception Score by torch-fidelity's formulas.

Knows uint8 images, the Inception network's weights and reference statistics. Does not know where images come
from.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from engine.checkpoint import load_checkpoint

FEATURES = 2048  # of Inception's last pooling
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def find_inception(path=None):
    """The Inception weights: the given file, else $LPD_INCEPTION, else torch's cache.

    Raises:
        ValueError: not found; the message says how to get them.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(path or os.environ.get("LPD_INCEPTION") or cached)
    if not path.is_file():
        raise ValueError(
            f"no Inception weights at {path}: give --inception FILE or set LPD_INCEPTION; with a network, "
            "python -c \"import torch_fidelity.utils as u; u.create_feature_extractor('inception-v3-compat', "
            "['2048'], cuda=False)\" fetches them into torch's cache"
        )
    return path


class InceptionFeatures:
    """torch-fidelity's Inception: uint8 images [B, H, W, 3] -> features [B, 2048] and logits [B, 1008].

    Raises:
        ValueError: the file holds something else, or code.
    """

    def __init__(self, path, device):
        load_checkpoint(path)  # torch-fidelity would run code in the file: this refuses one that holds any
        try:
            self.extractor = create_feature_extractor(
                "inception-v3-compat", [str(FEATURES), "logits_unbiased"], cuda=False, verbose=False,
                feature_extractor_weights_path=str(path),
            ).to(device)  # fmt: skip
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path}: no Inception weights ({reason}...)") from None
        self.device = device

    @torch.inference_mode()
    def __call__(self, images):
        features, logits = self.extractor(images.to(self.device).permute(0, 3, 1, 2).contiguous())
        return features.cpu(), logits.cpu()


def load_statistics(path):
    """Reference statistics, `.npz` with `mu` [2048] and `sigma` [2048, 2048], as float64.

    Raises:
        ValueError: damaged, keys missing, other shapes, or numbers that are none.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = (np.asarray(arrays[k], dtype=np.float64) for k in ("mu", "sigma"))
    except Exception as error:  # zip, npy and key errors alike
        raise ValueError(f"{path}: no statistics with mu and sigma ({error})") from None
    if mu.shape != (FEATURES,) or sigma.shape != (FEATURES, FEATURES):
        raise ValueError(
            f"{path}: mu is {list(mu.shape)}, sigma {list(sigma.shape)}; Inception has {FEATURES} features"
        )
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f"{path}: mu or sigma is not finite")
    return {"mu": mu, "sigma": sigma}


def compute_metrics(features, logits, reference=None, *, splits=10):
    """Inception Score and, against a reference, FID.

    Args:
        features: float [n, 2048]. logits: float [n, 1008]. reference: from `load_statistics`, or None.
    Returns:
        dict of floats.
    """
    isc = isc_features_to_metric(logits, splits=min(splits, len(logits)), shuffle=True, rng_seed=2020)
    metrics = {"is": isc["inception_score_mean"], "is_std": isc["inception_score_std"]}
    if reference is not None:
        statistics = fid_features_to_statistics(features.double())
        metrics["fid"] = fid_statistics_to_metric(statistics, reference, False)["frechet_inception_distance"]
    return {name: float(value) for name, value in metrics.items()}
