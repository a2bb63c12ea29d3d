"""Files that are whole or not there.

Knows temporary names, renames, and digests of files. Does not know what is written.
"""

import glob
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

MOST_JSON = 2**28


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_leftovers(path):
    """Remove what killed processes left of their attempts to write `path`."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = partial.name.split(".")[-2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            partial.unlink(missing_ok=True)


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`; renamed to it when the block ends well, removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())  # some writers make files that only their owner may read
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # so that a full disk is told with the file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The value of a JSON file of at most MOST_JSON bytes: as Python objects it takes many times its size.

    Raises:
        ValueError: naming the file.
    """
    size = Path(path).stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"{path}: {size} bytes of JSON, at most {MOST_JSON} are read")
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # bytes that are no text, too
        raise ValueError(f"{path}: no readable JSON ({error})") from None


def value_digest(value):
    """16 hex digits that name a value of plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path):
    """16 hex digits of a file's contents."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
