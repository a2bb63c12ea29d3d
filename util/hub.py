"""Files named `hf://owner/repo[@revision][/file]`, through huggingface_hub.

Knows how such a name becomes a local path, and which files may be named: weights and orders, never code.
Cache, token, revisions and offline mode are as that library has them (HF_HUB_CACHE, HF_TOKEN,
HF_HUB_OFFLINE). Does not know what is in the files.
"""

import glob
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # as in models/pretrained.py
WEIGHT_FILES, ORDER_FILES = (".safetensors", ".pth", ".pt"), (".npy", ".json")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `revision` None is its main branch."""

    name: str
    repo: str
    revision: str | None
    file: str


def is_name(text):
    """Whether this is a name on the hub, not a path."""
    return str(text).startswith("hf://")


def parse(name, suffixes):
    """The `HubFile` of a name; nothing is fetched. A name of weights without a file means WEIGHTS.

    Raises:
        ValueError: no such name, of no model repository, or of a file with none of these suffixes.
    """
    from huggingface_hub import parse_hf_uri  # takes a fifth of a second, which a path need not

    uri = parse_hf_uri(name)
    if uri.type != "model":
        raise ValueError(f"{name} is a {uri.type}, files are taken from model repositories")
    file = PurePosixPath(uri.path_in_repo or (WEIGHTS if suffixes is WEIGHT_FILES else ""))
    if file.suffix not in suffixes or ".." in file.parts:
        raise ValueError(f"{name} names no file that is taken: {', '.join(suffixes)}")
    return HubFile(name, uri.id, uri.revision, str(file))


def local_path(wanted):
    """Where a `HubFile` lies in the library's cache, fetched if need be; WEIGHTS with the CONFIG beside them.

    Raises:
        OSError: it is not in the cache and cannot be fetched, or not in the repository.
    """
    from huggingface_hub import snapshot_download

    file = PurePosixPath(wanted.file)
    files = [file, file.with_name(CONFIG)] if file.name == WEIGHTS else [file]
    patterns = [glob.escape(str(file)) for file in files]
    try:
        folder = snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns)
    except Exception as error:  # of the cache, the network or the server: the library's have no common kind
        raise FileNotFoundError(f"{wanted.name}: {' '.join(str(error).split())[:400]}") from error
    path = Path(folder, wanted.file)
    if not path.is_file():
        raise FileNotFoundError(f"{wanted.name}: no {wanted.file} in {folder}")
    return path
