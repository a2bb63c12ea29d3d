"""Weights on disk: from a name (file, folder, run, or hub) to a model, and back. Reading never runs code.

    find(name) -> path; read_weights(path) -> state, info; Pretrained.load(name) -> model, info
"""

import argparse
import dataclasses
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from util.files import atomic, is_machine_trouble, naming, read_json, write_json

CONFIG, WEIGHTS, CHECKPOINT = "config.json", "model.safetensors", "checkpoint-last.pth"
WEIGHT_SUFFIXES, ORDER_SUFFIXES = (".safetensors", ".pth", ".pt"), (".npy", ".json")


def find(name, suffixes=WEIGHT_SUFFIXES, revision=None):
    """The local path of a file, of the weights in a folder (an export or a run), or of
    `hf://owner/repo[@revision][/file]`, which huggingface_hub fetches unless it is cached.

    Raises:
        ValueError: no such name, or a file with another suffix. OSError: it is not there.
    """
    if str(name).startswith("hf://"):
        return _find_on_hub(str(name), suffixes, revision)
    path = Path(name)
    if path.is_dir():
        path = path / (WEIGHTS if (path / WEIGHTS).is_file() else CHECKPOINT)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _find_on_hub(name, suffixes, revision):
    from huggingface_hub import parse_hf_uri, snapshot_download  # a fifth of a second that paths need not pay

    uri = parse_hf_uri(name)
    if uri.type != "model":
        raise ValueError(f"{name} is a {uri.type}, files are read from model repositories")
    file = Path(uri.path_in_repo or (WEIGHTS if suffixes is WEIGHT_SUFFIXES else ""))
    if file.suffix not in suffixes or ".." in file.parts:
        raise ValueError(f"{name} names no file of the kind {', '.join(suffixes)}")
    files = [str(file)] + [str(file.with_name(CONFIG))] * (file.name == WEIGHTS)
    try:
        folder = snapshot_download(uri.id, revision=revision or uri.revision, allow_patterns=files)
    except Exception as error:  # of the cache, the network or the server: there is no common type
        raise FileNotFoundError(f"{name}: {' '.join(str(error).split())[:400]}") from error
    if not (Path(folder) / file).is_file():
        raise FileNotFoundError(f"{name}: no {file} in {folder}")
    return Path(folder) / file


def read_weights(path):
    """Weights of a `.safetensors`, `.pth` or `.pt` file, and what the file records about them.

    A training checkpoint gives its moving average if it has one.

    Returns:
        (state dict, info dict); info is empty for a released file.
    Raises:
        ValueError: truncated, damaged, or no plain weights; the message names the file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, info = _read_safetensors(path)
    else:
        checkpoint = read_pth(path)
        state = checkpoint.get("ema") or checkpoint.get("model", checkpoint)
        info = checkpoint.get("info", {})
        if isinstance(info, dict) and "train_config" in checkpoint:
            info = {"train_config": checkpoint["train_config"], **info}
    if not isinstance(state, dict) or not all(isinstance(w, torch.Tensor) for w in state.values()):
        raise ValueError(f"{path}: holds no weights under 'model'")
    if not isinstance(info, dict):
        raise ValueError(f"{path}: its record of the weights is damaged ({str(info):.60})")
    return state, info


def read_pth(path):
    """The dict in a `.pth` file, on the CPU. Of classes only `argparse.Namespace` is allowed, which released
    checkpoints contain.

    Raises:
        ValueError: truncated, damaged (torch.load compares no checksums; this does), or with code inside.
        OSError: the file cannot be opened.
    """
    try:
        with naming(path), open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"the checksum of {part} is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, not plain weights ({_reason(error)})") from None
    except Exception as error:  # damaged bytes fail in many ways: IndexError, struct.error, even OSError
        if is_machine_trouble(error):
            raise
        raise ValueError(f"{path}: damaged or no checkpoint ({_reason(error)})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def _read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            recorded = (file.metadata() or {}).get("lpd")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = {} if recorded is None else json.loads(recorded)
    except FileNotFoundError:
        raise
    except Exception as error:  # SafetensorError, and whatever a damaged header leads to
        raise ValueError(f"{path}: damaged or no safetensors file ({_reason(error)})") from None
    config = path.with_name(CONFIG)
    if recorded is None and path.name == WEIGHTS and config.exists():
        info = read_json(config)
    return state, info


def _reason(error):
    """The informative line of a library's error; torch's first may be advice to read the file unsafely."""
    lines = str(error).splitlines() or [type(error).__name__]
    line = next((line for line in lines if "nsupported" in line), lines[0])
    return line.split(" Please")[0].strip()[:200]


def load_state(model, state, path):
    """`load_state_dict(strict=True)` whose error is one line naming the file.

    Raises:
        ValueError: keys or shapes differ, or a weight is not finite.
    """
    _check_names_and_shapes(model, state, path)
    for name, weight in state.items():
        if not weight.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    model.load_state_dict(state)


def _check_names_and_shapes(model, state, path):
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        first = (missing or unknown)[0]
        raise ValueError(f"{path}: {len(missing)} weights missing, {len(unknown)} unknown, first {first}")
    for name, weight in own.items():
        if weight.shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, the model {list(weight.shape)}"
            raise ValueError(f"{path}: {name} has shape {shapes}")


def _plain_state(model):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def save_weights(path, model, **info):
    """Write a model's weights as `.safetensors`, with its config and any JSON-able `info` in the header."""
    info["config"] = dataclasses.asdict(model.config)
    with atomic(path) as partial:
        save_file(_plain_state(model), partial, metadata={"lpd": json.dumps(info)})


def state_digest(model):
    """16 hex digits that identify a model's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Pretrained:
    """Loading and saving for a module that is built from a config.

    A subclass has `config_class`; `marker`, the name of a weight that only its files have; and the static
    method `config_of(state, recorded, size)`: its config, given the recorded one (or None) and a size's name
    (or None).
    """

    @classmethod
    def load(cls, name, size=None):
        """A model in eval mode from weights that `find` knows.

        Args:
            size: name of the model's size; released files do not record it.
        Returns:
            (model, info): info is what the file records: class_names, tokenizer_digest, ...
        Raises:
            ValueError: damaged, weights of another model or size, or not finite. OSError: not there.
        """
        path = find(name)
        state, info = read_weights(path)
        return cls.build(state, info, size, path), info

    @classmethod
    def from_pretrained(cls, name, revision=None):
        """A model in eval mode from a local folder or file, or from `owner/repo` on the hub at a branch, tag
        or commit. Raises as `load` does."""
        path = name
        if not Path(name).exists():
            try:
                path = find(f"hf://{str(name).removeprefix('hf://')}", revision=revision)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(f"{name}: no such folder, and not on the hub ({error})") from error
        return cls.load(path)[0]

    @classmethod
    def build(cls, state, info, size, path):
        """The model in eval mode from what `read_weights` returned; raises as `load` does."""
        if cls.marker not in state:
            raise ValueError(f"{path}: no {cls.__name__} weights: {cls.marker} is missing")
        try:
            recorded = cls.config_class(**info["config"]) if "config" in info else None
            config = cls.config_of(state, recorded, size)
            with torch.device("meta"):  # no time for random weights, no memory for a wrong config
                model = cls(config)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {_reason(error)}") from None
        _check_names_and_shapes(model, state, path)
        model = model.to_empty(device="cpu")
        load_state(model, state, path)
        return model.eval()

    def save_pretrained(self, folder, **info):
        """Write `config.json`, with the model's config and any JSON-able `info`, and `model.safetensors` into
        a folder; files of these names are replaced."""
        folder = Path(folder)
        with atomic(folder / WEIGHTS) as partial:
            save_file(_plain_state(self), partial, metadata={"format": "pt"})
        write_json(folder / CONFIG, {**info, "config": dataclasses.asdict(self.config)})
