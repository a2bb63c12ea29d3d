"""Files that are whole or not there.

Knows temporary names, renames, digests of files, and who may write. Does not know what is written.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import socket
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


class FolderInUse(ValueError):
    """Another program writes into this folder; the message names both."""


@contextmanager
def sole_writer(folder):
    """Inside it no other program that asks so may write into `folder`, which is made where it is not.

    The kernel holds the lock and gives it back however this process ends. Machines that share the folder
    share the lock too, where its file system has POSIX locks: NFS does, Lustre with the mount option `flock`;
    where it has none, or keeps them to each machine (`localflock`), only one's own machine is guarded, or
    none.

    Raises:
        FolderInUse: another one does; the message names it.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FolderInUse(f"{folder} is in use by {file.read().strip() or 'another program'}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


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
