"""Weights and training state on disk: ours and the released ones.

Knows `.pth` files, how to read them without running code, and what tells weights of which kind and size they
are. How `.safetensors` are read and weights become a model is in models/pretrained.py. Does not know when to
save.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.lpd import LPD, LPD_CONFIGS, LPDConfig, resize_pos_embed
from models.pretrained import build, check_weights, load_state, read_config, read_safetensors, telling_line
from models.vqgan import VQConfig, VQModel
from util import dist
from util.files import atomic

LAST, PREVIOUS = "checkpoint-last.pth", "checkpoint-previous.pth"
MOST_EXPANDED = 2**30  # bytes of weights without bytes in the file: a tensor may repeat one number
CODES = "quantize.embedding.weight"  # what tells a tokenizer's weights
MOST_PLACES = 2**16 + 1  # of a grid, and the class token


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


def load_checkpoint(path):
    """Read a `.pth` file's dict on the CPU. Nothing in the file is run: `weights_only`, and of classes only
    `argparse.Namespace`, which the released checkpoints hold.

    Raises:
        ValueError: cut short, no checkpoint, or one that holds code.
        OSError: the file cannot be opened.
    """
    _check_zip(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, not plain weights ({telling_line(error)})") from None
    except Exception as error:  # damaged bytes fail in many ways: IndexError, struct.error, even OSError
        raise ValueError(f"{path}: cut short or no checkpoint ({telling_line(error)})") from None
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


def _check_zip(path):
    """Refuse a zip (as torch.save writes) that would inflate, whose parts claim more than the file has, or
    whose bytes are not those that were written.

    Raises:
        ValueError: naming both numbers, or the part whose checksum is wrong.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        there = os.fstat(file.fileno()).st_size
        try:
            if not zipfile.is_zipfile(file):
                return  # the older format; what it claims beyond its end is refused by torch.load
            with zipfile.ZipFile(file) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
                damaged = archive.testzip() if claimed <= there else None  # torch.load compares no checksums
        except Exception as error:  # a damaged list of contents fails in many ways
            raise ValueError(f"{path}: cut short or no checkpoint ({telling_line(error)})") from None
    if claimed > there:
        raise ValueError(f"{path}: its parts claim {claimed} bytes, the file has {there}")
    if damaged:
        raise ValueError(f"{path}: damaged, the checksum of {damaged} is wrong")


def check_parts(path, checkpoint, *names):
    """Refuse a checkpoint without one of these parts.

    Raises:
        ValueError: naming the first.
    """
    for name in names:
        if name not in checkpoint:
            raise ValueError(f"{path}: no checkpoint of this training, {name} is missing")


def check_same_config(path, saved, now):
    """Refuse to resume with other settings than a checkpoint's; both are dicts of plain values.

    Raises:
        ValueError: naming the first setting that changed.
    """
    saved = saved if isinstance(saved, dict) else {}
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
        return read_safetensors(path)
    checkpoint = load_checkpoint(path)
    named = [checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), dict)]
    state = next((weights for weights in named if weights), checkpoint.get("model", checkpoint))
    state, info = check_weights(state, checkpoint.get("info", {}), path)
    claimed, there = sum(t.numel() * t.element_size() for t in state.values()), os.stat(path).st_size
    if claimed > MOST_EXPANDED + 2 * there:
        raise ValueError(f"{path}: weights of {claimed} bytes in a file of {there}")
    return state, {**{key: checkpoint[key] for key in ("train_config",) if key in checkpoint}, **info}


def _size(config):
    return config.embed_dim, config.depth


def load_tokenizer(path):
    """A `VQModel` in eval mode from its weights; without a config in the file it must be VQ-16."""
    state, info = read_weights(path)
    if CODES not in state:
        raise ValueError(f"{path}: no tokenizer weights: {CODES} is missing")
    return _tokenizer(state, info, path)


def _tokenizer(state, info, path):
    config = read_config(VQConfig, info.get("config", {}), state, path)
    return build(VQModel, config, state, path).requires_grad_(False)


def load_either(path, model_name=None):
    """A `VQModel` or an `LPD` in eval mode, whichever the weights are of, and what the file says of them.

    Args, Returns: as of `load_lpd`.
    """
    state, info = read_weights(path)
    if CODES in state:
        return _tokenizer(state, info, path), info
    return build(LPD, lpd_config_of(state, info, path, model_name), state, path), info


def _check_embeddings(state, path):
    """Refuse weights without the three tables whose shapes tell sizes, or with tables of other shapes."""
    for name, ndim in (("class_emb.weight", 2), ("token_emb.weight", 2), ("pos_embed", 3)):
        if name not in state:
            raise ValueError(f"{path}: no LPD weights: {name} is missing")
        if state[name].ndim != ndim or 0 in state[name].shape:
            raise ValueError(f"{path}: no LPD weights: {name} has shape {list(state[name].shape)}")
    one, places, _ = state["pos_embed"].shape
    if one != 1 or math.isqrt(places - 1) ** 2 != places - 1 or not 1 < places <= MOST_PLACES:
        raise ValueError(f"{path}: pos_embed has shape {list(state['pos_embed'].shape)}, not that of a grid")


def lpd_config_of(state, info, path, model_name=None):
    """The config of LPD weights: the file's own, else the named size with what the shapes tell.

    Raises:
        ValueError: the file has no config and no size is named, or the file's size is not the named one.
    """
    _check_embeddings(state, path)
    if "config" in info:
        config = read_config(LPDConfig, info["config"], state, path)
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
    return build(LPD, lpd_config_of(state, info, path, model_name), state, path), info


def start_from(model, path):
    """Put weights from a file into a new model, position embeddings resized to its grid (256 to 512 px)."""
    state, _ = read_weights(path)
    _check_embeddings(state, path)
    if state["pos_embed"].shape[2] == model.config.embed_dim:  # else refused as it is
        state = {**state, "pos_embed": resize_pos_embed(state["pos_embed"], model.config.grid_size)}
    load_state(model, state, path)


def state_digest(model):
    """16 hex digits that name a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
