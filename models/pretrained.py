"""Weights and what is said of them become a model; `from_pretrained` and `save_pretrained`.

Knows `.safetensors`, folders of `config.json` and `model.safetensors`, and such folders on the hub; nothing a
file claims is believed before it is held against its weights. Does not know `.pth`, training state, or what
the models compute. engine/checkpoint.py builds its models here too: weights are checked alike whichever way
they come.
"""

import dataclasses
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHT_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}
LAYERS = ("depth", "num_res_blocks", "multipliers")  # of configs: so many modules are made, each with weights
MOST_SIZE = 2**24  # that a config may give anything; what it gives all together is held against the weights
MOST_CONFIG = 2**24  # bytes of a config.json: as Python objects they take many times as much


class Pretrained:
    """`from_pretrained` and `save_pretrained` of a module that is made from a config, a `config_class`."""

    @classmethod
    def from_pretrained(cls, name, revision=None):
        """A model in eval mode from a folder of `config.json` and `model.safetensors`.

        Args:
            name: a local folder, or `owner/repo` on the hub (`hf://` may stand before it), whose cache,
                token and offline mode are as huggingface_hub has them.
            revision: branch, tag or commit on the hub; default: its main branch.
        Raises:
            ValueError: a file is damaged, of another kind of model, or its weights are not finite.
            OSError: there is no such folder, or no such file in it.
        """
        path = _folder(name, revision) / WEIGHTS
        state, info = read_safetensors(path)
        if "config" not in info:
            raise ValueError(f"{path} does not say its config, and there is no {CONFIG} beside it that does")
        return build(cls, read_config(cls.config_class, info["config"], state, path), state, path)

    def save_pretrained(self, folder, **info):
        """Write `config.json`, with the model's config and any JSON-able `info`, and `model.safetensors`.

        Files of these names are replaced, each in one step.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with _whole(folder / WEIGHTS) as partial:
            save_file(state, partial, metadata={"format": "pt"})
        with _whole(folder / CONFIG) as partial:
            text = json.dumps({**info, "config": dataclasses.asdict(self.config)}, indent=2)
            partial.write_text(text + "\n")


def _folder(name, revision):
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # takes a fifth of a second, which a local folder need not

    repo = str(name).removeprefix("hf://")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the cache, the network or the server: they have no common kind
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{name}: no folder, and not to be had from the hub ({reason})") from error


@contextmanager
def _whole(path):
    """Yields a temporary path beside `path`, which is renamed to it when the block ends well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors makes files that only their owner may read
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def telling_line(error):
    """The telling line of a library's error, whose first may be advice to read the file unsafely."""
    lines = str(error).splitlines() or [type(error).__name__]
    line = next((line for line in lines if "nsupported" in line), lines[0]).split(" Please")[0].strip()
    return line[:200]  # it may quote the file


def read_safetensors(path):
    """Weights of a `.safetensors` file, and what its header, or else a CONFIG beside WEIGHTS, says of them.

    Returns:
        (state dict, info dict); info is empty where nothing is said.
    Raises:
        ValueError: cut short, no such file, or what it says is damaged.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("lpd")
            info = json.loads(said) if said is not None else {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # SafetensorError, and what nested JSON or a tensor of no known type does
        raise ValueError(f"{path}: cut short or no safetensors file ({telling_line(error)})") from None
    check_weights(state, info, path)
    config = path.with_name(CONFIG)
    if said is None and path.name == WEIGHTS and config.exists():
        return check_weights(state, _read_config_file(config), config)
    return state, info


def _read_config_file(path):
    size = path.stat().st_size
    if size > MOST_CONFIG:
        raise ValueError(f"{path}: {size} bytes of JSON, at most {MOST_CONFIG} are read")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # bytes that are no text, too
        raise ValueError(f"{path}: no readable JSON ({telling_line(error)})") from None


def check_weights(state, info, path):
    """The state dict and the info dict that a file holds, if they are such.

    Raises:
        ValueError: naming the file.
    """
    if not isinstance(state, dict) or not all(map(_is_weight, state.items())):
        raise ValueError(f"{path}: holds no weights under 'model'")
    if not _is_info(info):
        raise ValueError(f"{path}: what it says of its weights is damaged ({str(info):.60})")
    return state, info


def _is_weight(item):
    name, value = item
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and value.dtype in WEIGHT_TYPES


def _is_info(info):
    names = info.get("class_names", []) if isinstance(info, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def read_config(kind, values, state, path):
    """A config dataclass of that kind from what a file says.

    Raises:
        ValueError: fields of another kind of config, values of another type or out of range, or more layers
            than there are weights.
    """
    try:
        for field in dataclasses.fields(kind):
            _check_size(field, values.get(field.name, field.default), len(state))
        return kind(**values)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its config is none of {kind.__name__} ({error})") from None


def _check_size(field, value, num_weights):
    """Refuse another type than the default's, and sizes that nothing in the file stands for."""
    values = value if isinstance(field.default, tuple) and isinstance(value, (list, tuple)) else [value]
    whole = not isinstance(field.default, float)
    for number in values:
        if type(number) not in ((int,) if whole else (int, float)) or not 0 <= number <= MOST_SIZE:
            raise ValueError(f"{field.name} is {str(value):.60}")
    if field.name in LAYERS and max(len(values), *values) > num_weights:
        raise ValueError(f"{field.name} is {str(value):.60}, there are {num_weights} weights")


def build(kind, config, state, path):
    """A model in eval mode with weights from a file. It takes memory only when its sizes are those of the
    weights.

    Raises:
        ValueError: the config makes no such model, or `load_state` refuses the weights.
    """
    try:
        with torch.device("meta"):  # also: no time for random weights that are overwritten at once
            model = kind(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config makes no {kind.__name__} ({telling_line(error)})") from None
    _check_shapes(model, state, path)
    model = model.to_empty(device="cpu")
    load_state(model, state, path)
    return model.eval()


def load_state(model, state, path):
    """`load_state_dict(strict=True)` whose error is one line naming the file.

    Raises:
        ValueError: keys or shapes differ, or a weight is not finite.
    """
    _check_shapes(model, state, path)
    for name, tensor in model.state_dict().items():
        if not state[name].to(tensor.dtype).isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    model.load_state_dict(state)


def _check_shapes(model, state, path):
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
