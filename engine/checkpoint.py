"""Weights and training state on disk: ours and the released ones.

Knows `.pth` and `.safetensors` files, how to read them without running code, and how to build a model from
what is in them. Does not know when to save.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.lpd import LPD, LPD_CONFIGS, LPDConfig, resize_pos_embed
from models.vqgan import VQConfig, VQModel
from util import dist
from util.files import atomic

LAST, PREVIOUS = "checkpoint-last.pth", "checkpoint-previous.pth"


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values as `.pth`, atomically. The LAST before stays as PREVIOUS."""
    path = Path(path)
    with atomic(path) as partial:
        with partial.open("wb") as file:  # given a path, its name would be in the bytes
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # behind which torch hides a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if path.name == LAST and path.exists():
            with atomic(path.with_name(PREVIOUS)) as previous:
                os.link(path, previous)


def _reason(error):
    """The telling line of an error of torch.load, whose first may be advice to read the file unsafely."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "nsupported" in line), lines[0]).split(" Please")[0].strip()


def load_checkpoint(path):
    """Read a `.pth` file's dict on the CPU. Nothing in the file is run: `weights_only`, and of classes only
    `argparse.Namespace`, which the released checkpoints hold.

    Raises:
        ValueError: cut short, no checkpoint, or one that holds code.
        OSError: the file cannot be opened.
    """
    with open(path, "rb"):
        pass
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, not plain weights ({_reason(error)})") from None
    except Exception as error:  # damaged bytes fail in many ways: IndexError, struct.error, even OSError
        raise ValueError(f"{path}: cut short or no checkpoint ({_reason(error)})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def load_last_checkpoint(path):
    """`load_checkpoint`; of a LAST that is damaged, the one before it, if that is sound.

    Raises:
        ValueError, OSError: as `load_checkpoint`.
    """
    try:
        return load_checkpoint(path)
    except ValueError as error:
        previous = Path(path).with_name(PREVIOUS)
        if Path(path).name != LAST or not previous.exists():
            raise
        checkpoint = load_checkpoint(previous)
        dist.tell(f"warning: {error}; going on from {previous}")
        return checkpoint


def check_same_config(path, saved, now):
    """Refuse to resume with other settings than a checkpoint's; both are dicts of plain values.

    Raises:
        ValueError: naming the first setting that changed.
    """
    for key, value in now.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{path} was trained with {key} {str(saved.get(key))[:80]}, now it is {str(value)[:80]}: "
                "resume with the same settings or give another --output_dir"
            )


def save_weights(path, model, **info):
    """Write a model's weights as `.safetensors`, with its config and any JSON-able `info` in the header."""
    info["config"] = dataclasses.asdict(model.config)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(path) as partial:
        save_file(state, partial, metadata={"lpd": json.dumps(info)})


def read_weights(path):
    """Weights of a `.safetensors` or `.pth`/`.pt` file, and what the file says of them.

    Of a training checkpoint the moving average is taken where there is one.

    Returns:
        (state dict, info dict); info is empty for a released file.
    """
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads((file.metadata() or {}).get("lpd", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: cut short or no safetensors file ({error})") from None
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("ema") or checkpoint.get("model") or checkpoint
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no weights under 'model'")
    return state, checkpoint.get("info", {})


def load_state(model, state, path):
    """`load_state_dict(strict=True)` whose error is one line naming the file.

    Raises:
        ValueError: keys or shapes differ, or a weight is not finite.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        first = (missing or unknown)[0]
        raise ValueError(f"{path}: {len(missing)} weights missing, {len(unknown)} unknown, first {first}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(state[name].shape)}, the model {list(tensor.shape)}"
            )
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    model.load_state_dict(state)


def _config(kind, values, path):
    """A config from what a file says.

    Raises:
        ValueError: fields of another kind of config, or values out of range.
    """
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config is none of {kind.__name__} ({error})") from None


def _size(config):
    return config.embed_dim, config.depth


def load_tokenizer(path):
    """A `VQModel` in eval mode from its weights; without a config in the file it must be VQ-16."""
    state, info = read_weights(path)
    if "quantize.embedding.weight" not in state:
        raise ValueError(f"{path}: no tokenizer weights: quantize.embedding.weight is missing")
    model = VQModel(_config(VQConfig, info.get("config", {}), path))
    load_state(model, state, path)
    return model.eval().requires_grad_(False)


def lpd_config_of(state, info, path, model_name=None):
    """The config of LPD weights: the file's own, else the named size with what the shapes tell.

    Raises:
        ValueError: the file has no config and no size is named, or the file's size is not the named one.
    """
    for name in ("class_emb.weight", "token_emb.weight", "pos_embed"):
        if name not in state:
            raise ValueError(f"{path}: no LPD weights: {name} is missing")
    if "config" in info:
        config = _config(LPDConfig, info["config"], path)
        if model_name is not None and (config.embed_dim, config.depth) != _size(LPD_CONFIGS[model_name]):
            raise ValueError(
                f"{path} has width {config.embed_dim} and depth {config.depth}, --model {model_name} has "
                "{} and {}".format(*_size(LPD_CONFIGS[model_name]))
            )
        return config
    if model_name is None:
        raise ValueError(f"{path} does not say its size: give --model")
    config = dataclasses.replace(
        LPD_CONFIGS[model_name],
        grid_size=int((state["pos_embed"].shape[1] - 1) ** 0.5),
        vocab_size=state["token_emb.weight"].shape[0],
        num_classes=state["class_emb.weight"].shape[0],
    )
    width = state["pos_embed"].shape[2]
    if width != config.embed_dim:
        raise ValueError(f"{path} has width {width}, --model {model_name} has {config.embed_dim}")
    return config


def load_lpd(path, model_name=None):
    """An `LPD` in eval mode from its weights, and what the file says of them.

    Args:
        path: `.safetensors` or `.pth`, ours or released.
        model_name: key of LPD_CONFIGS, for files that do not hold their config.
    Returns:
        (model, info dict)
    """
    state, info = read_weights(path)
    with torch.device("meta"):  # no time for random weights that are overwritten at once
        model = LPD(lpd_config_of(state, info, path, model_name))
    model = model.to_empty(device="cpu")
    load_state(model, state, path)
    return model.eval(), info


def start_from(model, path):
    """Put weights from a file into a new model, position embeddings resized to its grid (256 to 512 px)."""
    state, _ = read_weights(path)
    if "pos_embed" not in state:
        raise ValueError(f"{path}: no LPD weights: pos_embed is missing")
    state = {**state, "pos_embed": resize_pos_embed(state["pos_embed"], model.config.grid_size)}
    load_state(model, state, path)


def state_digest(model):
    """16 hex digits that name a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
