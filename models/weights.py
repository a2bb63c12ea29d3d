"""Weights on disk: from a name (file, folder, run, or hub) to a model, and back. Reading never runs code.

    find(name) -> path; read_weights(path, kind) -> state, info; Pretrained.load(name) -> model, info
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shlex
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from util import hub
from util.distributed import say, warn
from util.files import atomic, read_json, reading, write_json

CONFIG, WEIGHTS, CHECKPOINT = "config.json", "model.safetensors", "checkpoint-last.pth"
TOKENIZER = "tokenizer.safetensors"
USUAL = WEIGHTS, CHECKPOINT  # of an export, of a run
WEIGHT_SUFFIXES, ORDER_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin"), (".npy", ".json")
AVERAGE = re.compile(r"(?<![a-z])(ema|emas|swa|averaged?|(?<!exp_)avg)(?![a-z])", re.I)  # ema, model_ema, ...
PATHS, ARRAYS = "PosixPath WindowsPath PurePosixPath PureWindowsPath", "scalar _reconstruct"
HARMLESS = {  # module: what checkpoints have of it and weights do without
    "argparse": "Namespace", "types": "SimpleNamespace", "uuid": "UUID", "pathlib": PATHS,
    "builtins": "int float str list dict frozenset range", "datetime": "datetime date timedelta timezone",
    "numpy": "dtype ndarray bool_ int32 int64 float16 float32 float64", "numpy.core.multiarray": ARRAYS,
    "numpy._core.multiarray": ARRAYS, "omegaconf.base": "ContainerMetadata Metadata", "typing": "Any",
    "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig", "omegaconf.nodes": "AnyNode",
    "pathlib._local": PATHS,
}


class Inert:
    """Stands for an object of a class in HARMLESS, without what the file says it is made of."""

    __init__ = __setstate__ = lambda self, *_: None


def find(name, suffixes=WEIGHT_SUFFIXES, revision=None, usual=USUAL):
    """The local path of a file, of the weights in a folder (the first of the `usual` names, or one file of
    any name), or of `hf://owner/repo[@revision][/file]`, which huggingface_hub fetches unless it is cached.
    Raises ValueError: no such name, a file with another suffix, or several. OSError: it is not there."""
    if hub.is_on_hub(name):
        return _find_on_hub(str(name), suffixes, revision, usual)
    path = Path(name)
    if path.is_dir():
        return path / _pick_file(os.listdir(path), suffixes, usual, path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _pick_file(names, suffixes, usual, place):
    """Of the files in a folder or repository: the first of the usual ones, or the only one with a suffix, but
    for the tokenizer beside it."""
    found = sorted(name for name in names if Path(name).suffix in suffixes)
    picked = [name for name in usual if name in found][:1]
    picked = picked or [name for name in found if name != TOKENIZER] or found
    if not found:
        raise FileNotFoundError(f"{place} has no file that ends in {', '.join(suffixes)}")
    if len(picked) > 1:
        raise ValueError(f"{place} has several files, name one of them: {', '.join(found[:20])}")
    return picked[0]


def find_tokenizer(weights):
    """The one tokenizer beside a file of weights, or where own_images.sh puts it.

    Raises ValueError: none or two; the message names where it was looked for.
    """
    places = [Path(weights).parent / folder / TOKENIZER for folder in ("", "../tokenizer")]
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        those, problem = (found, "both exist") if found else (places, "do not exist")
        raise ValueError(f"--vqgan_path is needed: {' and '.join(map(str, those))} {problem}")
    say(f"--vqgan_path {found[0]}, found beside the weights")
    return found[0]


def _find_on_hub(name, suffixes, revision, usual):
    uri = hub.parse(name, "model")
    file, revision = uri.path_in_repo, revision or uri.revision
    if file and (Path(file).suffix not in suffixes or ".." in Path(file).parts):
        raise ValueError(f"{name} does not name a file that ends in {', '.join(suffixes)}")
    found = _files_on_hub(name, uri, revision)
    file = Path(file or _pick_file(found, suffixes, usual, f"{name}: the repository"))
    files = [str(file), str(file.with_name(TOKENIZER))]
    files += [str(file.with_name(CONFIG))] * (file.name == WEIGHTS)
    if size := found.get(str(file)):
        say(f"fetching {name}: {file}, {size / 1e6:,.1f} MB")
    folder = hub.fetch(name, uri, files, revision)
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{name}: no {file} in {folder}")
    return folder / file


def _files_on_hub(name, uri, revision):
    """Name -> bytes that are still to fetch, of the files in a repository; without a network, of those that
    are cached."""
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(uri.id, revision=revision, dry_run=True)
        return {file.filename: file.file_size * file.will_download for file in files}
    except Exception:
        folder = hub.fetch(name, uri, [], revision)
        return {str(path.relative_to(folder)): 0 for path in folder.rglob("*") if path.is_file()}


def read_weights(path, *kinds):
    """Weights of one of the `kinds` (subclasses of `Pretrained`), and what their file records about them.

    They may lie in dicts of any names, and behind prefixes such as `module.`: the kind's marker says where. A
    moving average goes before what it is of, and a line says so. Without `kinds`, all tensors of the file.

    Returns:
        (state dict, info dict); info is empty for a released file.
    Raises:
        ValueError: truncated, damaged, no such weights, or several; the message names the file.
    """
    path = Path(path)
    with reading(path, "weights"), path.open("rb") as file:
        line = file.readline(80).decode("latin-1").strip()
        if len(line) > 8 and line.isprintable():  # of git-lfs, or a web page
            raise ValueError(f"but a text: {line}")
    if path.suffix == ".safetensors":
        content, info = _read_safetensors(path)
    else:
        content = read_pth(path)
        info = content.get("info", {})
        if isinstance(info, dict) and "train_config" in content:
            info = {"train_config": content["train_config"], **info}
    if not isinstance(info, dict):
        raise ValueError(f"{path}: its record of the weights is damaged ({str(info):.60})")
    tensors = dict(_tensors(content))
    return _pick_weights(tensors, kinds, path) if kinds else tensors, info


def _tensors(value, name=""):
    """(dotted name, tensor) pairs of nested dicts and lists. Names lose the parts that wrappers of modules
    add, such as `_orig_mod`: these begin with an underscore."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            words = [word for word in [name, *str(key).split(".")] if word and not word.startswith("_")]
            yield from _tensors(part, ".".join(words))


def _pick_weights(tensors, kinds, path):
    """The tensors whose names begin as that of a kind's marker does, named without that beginning."""
    found = [n.removesuffix(k.marker) for n in tensors for k in kinds if f".{n}".endswith(f".{k.marker}")]
    if not found:
        wanted = " or ".join(f"{kind.__name__} weights: {kind.marker} is missing" for kind in kinds)
        there = ", ".join(sorted({name.split(".")[0] for name in tensors})[:9]) or "no tensors"
        raise ValueError(f"{path}: no {wanted}; there are {there}")
    averages = [place for place in found if AVERAGE.search(place) and "online" not in place] or found
    place, *others = averages
    if others:
        several = " and ".join(place.rstrip(".") or "those without a prefix" for place in averages)
        raise ValueError(f"{path} has several weights, {several}: save those that are meant in a file")
    if len(found) > 1:
        say(f"{path}: the moving average {place.rstrip('.')} is used")
    elif unread := [n for n in tensors if AVERAGE.search(n.rpartition(".")[0]) and not n.startswith(place)]:
        warn(f"warning: {path}: {unread[0]} is of a moving average in an unknown form; {place}* is used")
    return {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}


def read_pth(path):
    """The dict in a `.pth` file, on the CPU. Objects of classes in HARMLESS are `Inert`, others are refused.
    Raises ValueError: truncated, damaged (torch.load compares no checksums; this does), or with code inside.
    OSError: the file cannot be opened."""
    inert = [(Inert, f"{module}.{name}") for module in HARMLESS for name in HARMLESS[module].split()]
    inert.append((lambda *_: {}, "collections.defaultdict"))  # may hold weights
    with reading(path, "checkpoint"), open(path, "rb") as file, torch.serialization.safe_globals(inert):
        if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"the checksum of {part} is wrong")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            strip = shlex.quote(f"from models.weights import strip; strip({str(path)!r})")
            remedy = f"if you trust its maker, keep its tensors alone with: python -c {strip}"
            raise ValueError(f"{path}: refused, not plain weights ({_reason(error)}); {remedy}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def strip(path):
    """Write the tensors of a `.pth` file alone into PATH.plain.pth. Code in the file runs."""
    content = torch.load(path, "cpu", weights_only=False)
    content = content.state_dict() if isinstance(content, torch.nn.Module) else content
    torch.save(dict(_tensors(content)), f"{path}.plain.pth")


def _read_safetensors(path):
    with reading(path, "safetensors file"), safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get("lpd")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = {} if recorded is None else json.loads(recorded)
    config = path.with_name(CONFIG)
    if recorded is None and path.name == WEIGHTS and config.exists():
        info = read_json(config)
    return state, info


def _reason(error):
    """The informative line of a library's error; torch's first may be advice to read the file unsafely."""
    lines = str(error).splitlines() or [type(error).__name__]
    line = next((line for line in lines if "nsupported" in line or "Unpickler error" in line), lines[0])
    return line.partition("Unpickler error: ")[2].split(" Please")[0].strip()[:200] or line.strip()[:200]


def load_state(model, state, path):
    """`load_state_dict(strict=True)` whose error is one line naming the file. Raises ValueError: keys or
    shapes differ, or a weight is not finite."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        first = (missing or unknown)[0]
        raise ValueError(f"{path}: {len(missing)} weights missing, {len(unknown)} unknown, first {first}")
    for name, weight in own.items():
        if weight.shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, the model {list(weight.shape)}"
            raise ValueError(f"{path}: {name} has shape {shapes}")
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    model.load_state_dict(state)


def _write(path, model, metadata):
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(path) as partial:
        try:
            save_file(state, partial, metadata=metadata)
        except SafetensorError as error:  # in place of the OSError of a full disk
            raise OSError(str(error)) from None


def save_weights(path, model, **info):
    """Write a model's weights as `.safetensors`, with its config and any JSON-able `info` in the header."""
    info["config"] = dataclasses.asdict(model.config)
    _write(path, model, {"lpd": json.dumps(info)})


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
    (or None). `usual_files` are the names that go first in a folder.
    """

    usual_files = USUAL

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
        path = find(name, usual=cls.usual_files)
        state, info = read_weights(path, cls)
        return cls.build(state, info, size, path), info

    @classmethod
    def from_pretrained(cls, name, revision=None):
        """A model in eval mode from a local folder or file, or from `owner/repo` on the hub at a branch, tag
        or commit. Raises as `load` does."""
        if not Path(name).exists():
            name = find(f"hf://{str(name).removeprefix('hf://')}", revision=revision, usual=cls.usual_files)
        return cls.load(name)[0]

    @classmethod
    def build(cls, state, info, size, path):
        """The model in eval mode from what `read_weights` returned; raises as `load` does."""
        try:
            recorded = cls.config_class(**info["config"]) if "config" in info else None
            config = cls.config_of(state, recorded, size)
            with torch.device("meta"):  # no time for random weights
                model = cls(config)
            model = model.to_empty(device="cpu")
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {_reason(error)}") from None
        load_state(model, state, path)
        return model.eval()

    def save_pretrained(self, folder, **info):
        """Write `config.json`, with the model's config and any JSON-able `info`, and `model.safetensors` into
        a folder; files of these names are replaced."""
        folder = Path(folder)
        _write(folder / WEIGHTS, self, {"format": "pt"})
        write_json(folder / CONFIG, {**info, "config": dataclasses.asdict(self.config)})
