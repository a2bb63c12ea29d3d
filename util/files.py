"""Files that are whole or absent: atomic writes, JSON, arrays, digests, and the owner of a run folder."""

import csv
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import zipfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

SHOWN = 80  # characters of a value in a message
UMASK = os.umask(0o077)  # asking for it sets it: once, while there is no other thread
os.umask(UMASK)
_OF_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,  # a damaged file names places in it that cannot be
    None,  # what a library says of a file's contents has no number
)


def is_machine_trouble(error):
    """Whether an error says nothing of what a path names and may be gone elsewhere or later: a failing or
    full disk, a stale handle, no memory."""
    return isinstance(error, OSError) and error.errno not in _OF_PATHS


@contextmanager
def naming(path):
    """Inside it an OSError names the file also if reading or writing it has failed, not opening."""
    try:
        yield
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def reading(path, what):
    """Damaged bytes fail in many ways; all become a ValueError of one line that names the file."""
    try:
        with naming(path):
            yield
    except Exception as error:
        known = isinstance(error, FileNotFoundError) or str(error).startswith(f"{path}: ")
        if known or is_machine_trouble(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged or no readable {what} ({reason[:200]})") from None


@cache
def _leftovers(folder):
    """The temporary files in a folder when this process first writes there."""
    return sorted(folder.glob(".*.tmp"))


def _remove_leftovers(path):
    """Remove the temporary files of killed processes that were writing `path`: those of this machine, and all
    if this process is the folder's sole writer. (macOS has no /proc: no owner is known to be dead there.)"""
    for partial in _leftovers(path.parent):
        if match := re.fullmatch(rf"\.{re.escape(path.name)}\.(\d+)-(.*)\.tmp", partial.name):
            alive = not Path("/proc").exists() or Path("/proc", match[1]).exists()
            if _holds(path) or match[2] == socket.gethostname() and not alive:
                partial.unlink(missing_ok=True)


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; it is renamed to `path` if the block succeeds, else removed.
    Raises FolderInUse: as `check_owner`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{socket.gethostname()}.tmp")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner may read
        check_owner(path)
        partial.replace(path)
    except OSError as error:  # a full disk is reported with the file
        if error.errno is None:  # of NumPy, say: "128 requested and 0 written"
            raise OSError(f"cannot write {path}, on a full disk? ({error})") from None
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


class FolderInUse(ValueError):
    """Another program writes into this folder; the message names both."""


_held = {}  # folder -> the content of its .owner while this process is its sole writer


@contextmanager
def sole_writer(folder):
    """Inside it no other program that asks may write into `folder`, which is created if needed.

    The kernel holds the lock and releases it however this process ends. Machines that share the folder share
    the lock if its file system has POSIX locks (NFS; Lustre mounted with `flock`). A later attempt of a SLURM
    job takes the folder over from an earlier one, whose machine was cut off; see `check_owner`. Raises
    FolderInUse: another program holds it; the message names it.
    """
    folder, me = Path(folder).resolve(), _this_process()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, me):
        _held[folder] = me
        (folder / ".owner").write_text(me)
        try:
            yield
        finally:
            del _held[folder]
            if _owner_of(folder) == me:
                (folder / ".owner").unlink()


def _locked(folder, me):
    """The folder's .lock as an open file that holds the lock until it is closed."""
    path = folder / ".lock"
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        owner = _owner_of(folder)
        if not _is_earlier_attempt(owner, me):
            raise FolderInUse(f"{folder} is in use by {owner or 'another program'}") from None
        path.unlink(missing_ok=True)  # the earlier attempt keeps the lock of a file without a name
        return _locked(folder, me)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return file


def _this_process():
    attempt = ""
    if job := os.environ.get("SLURM_JOB_ID"):
        attempt = f", attempt {os.environ.get('SLURM_RESTART_COUNT', 0)} of SLURM job {job}"
    return f"process {os.getpid()} on {socket.gethostname()}{attempt}"


def _is_earlier_attempt(owner, me):
    theirs, ours = (re.search(r"attempt (\d+) of SLURM job (\d+)", line) for line in (owner, me))
    return bool(theirs and ours) and theirs[2] == ours[2] and int(theirs[1]) < int(ours[1])


def _owner_of(folder):
    with suppress(FileNotFoundError):
        return (folder / ".owner").read_text()
    return ""


def check_owner(path):
    """Refuse to write `path` into a folder that another process has taken over from this, its sole writer.
    Raises FolderInUse: the message names both processes."""
    for folder in _holds(path):
        me, owner = _held[folder], _owner_of(folder)
        if not owner:
            raise FolderInUse(f"{folder / '.owner'} is gone, perhaps with its folder: {me} writes no more")
        if owner != me:
            raise FolderInUse(f"{folder} is taken over by {owner}: {me} writes no more")


def _holds(path):
    """The folders of `sole_writer`, inside which this process is, that contain a path."""
    return [folder for folder in _held if folder in Path(path).resolve().parents]


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def write_csv(path, rows):
    """Write dicts with the same keys as a table, atomically."""
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_json(path):
    """The value of a JSON file. Raises ValueError: not JSON; the message names the file. OSError: it cannot
    be opened."""
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text())


def value_digest(value):
    """16 hex digits that identify a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path):
    """16 hex digits that identify a file's contents."""
    digest = hashlib.sha256()
    with naming(path), Path(path).open("rb") as file:
        while block := file.read(2**20):  # files may be larger than memory
            digest.update(block)
    return digest.hexdigest()[:16]


def refuse_changes(path, saved, now, remedy):
    """Refuse to continue `path` with other settings than it was made with.

    `saved` and `now` are dicts of plain values, possibly nested; only keys of `now` count. Raises ValueError:
    naming the fields that differ, with both values, and the remedy.
    """
    before, after = (dict(_parts(json.loads(json.dumps(value, default=str)))) for value in (saved, now))
    changes = [
        f"{name} {str(before.get(name))[:SHOWN]}, now it is {str(value)[:SHOWN]}"
        for name, value in after.items() if before.get(name) != value
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(f"{path} was made with {'; '.join(changes[:3])}{more}: {remedy}")


def _parts(value, name=""):
    """(dotted name, value) of whatever is in nested dicts, and in the lists that are too long to be shown."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _parts(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and len(str(value)) > SHOWN:
        yield name, f"{len(value)} values"
        for i, part in enumerate(value):
            yield from _parts(part, f"{name}[{i}]")
    else:
        yield name, value


def array_names(path):
    """The names of the arrays in an `.npz`. Raises ValueError, OSError: as `read_arrays`."""
    with reading(path, ".npz"), np.load(path, allow_pickle=False) as archive:
        return set(archive.files)


def read_arrays(path, keys, optional=()):
    """Arrays of an `.npz` as a dict: `keys`, and those of `optional` that it has. Nothing in it is executed.
    Raises ValueError: damaged, or an array is missing; the message names the file. OSError: cannot be opened.
    """
    with reading(path, ".npz"), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in (*keys, *(key for key in optional if key in archive.files))}
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns the bytes of what is not an array
                raise ValueError(f"{key} is not an array")
        return arrays


def map_array(path, key):
    """An array of an `.npz`, memory-mapped if it is stored uncompressed (numpy.savez), else loaded. Raises
    ValueError, OSError: as `read_arrays`."""
    with reading(path, f"array {key}"), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return read_arrays(path, [key])[key]
        with archive.open(entry) as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
        if dtype.hasobject:
            raise ValueError("pickled objects")
        archive.fp.seek(entry.header_offset + 26)  # the lengths of the name and the extra field
        name, extra = (int.from_bytes(archive.fp.read(2), "little") for _ in range(2))
        start = entry.header_offset + 30 + name + extra + header
        return np.memmap(path, dtype, "r", start, shape, order="F" if fortran else "C")
