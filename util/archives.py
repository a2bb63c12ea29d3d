"""What is in an archive file, tar, zip or parquet, and how its members are read in place.

Labels are those of WebDataset (KEY.cls or KEY.json beside KEY.jpg), of the dataset.json that StyleGAN and
EDM2 write, and of the columns of data sets on the hub.
"""

import errno
import json
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from util.files import reading
from util.images import EXTENSIONS

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}
PLAIN, ROW, STORED, DEFLATED = -1, -2, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # how a member is kept
ROWS_KEPT = 2**28  # bytes of parquet in the memory of each process


class Entry(NamedTuple):
    """A member: its name, why it is not used, its label or none, where it is (as of a `Member`), and its
    contents if these may say the labels of others."""

    name: str
    reason: str
    label: int | str | None
    start: int
    size: int
    how: int
    content: bytes | None = None


def read_entries(path):
    """The members of an archive, and the names of its classes if it has labels with names: one pass over its
    headers. Raises ValueError: damaged, or labels of no known form; the message names the archive."""
    with reading(path, f"{path.suffix[1:]} archive"):
        entries, names = READERS[path.suffix.lower()](path)
        return _with_labels(path, entries), names


def is_hidden(name):
    """Whether a file or folder of that name is a system's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def other_ending(name, endings=EXTENSIONS):
    """The ending of a name, as the reason why it is none of `endings`; empty if it is one of them."""
    ending = os.path.splitext(name)[1].lower()
    return "" if ending in endings else ending or "no ending"


def _normal(name):
    """A name without "./" and the like; one that leads out of its folder stays as it is."""
    return name if ".." in name.split("/") else posixpath.normpath(name)


def _why_unused(name):
    """The reason not to use a member of that name, or nothing."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return "absolute name or .. in it"
    return "hidden" if any(map(is_hidden, parts)) else other_ending(name)


# Tar and zip.


def _tar_entries(path):
    with open(path, "rb") as file:
        return list(_members(file, 0, path.stat().st_size, "")), ()


def _members(file, start, end, folder):
    """The entries of the tar that lies between two places of an open file; the tars in it are folders."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # a kilobyte each
            name, content = _normal(os.path.join(folder, member.name)), None
            reason = _why_unused(name)
            if not member.isreg() or member.issparse():
                reason = "a link" if member.linkname else "not a plain file"
            if reason == ".tar":
                begin = member.offset_data
                yield from _members(file, begin, begin + member.size, name.removesuffix(".tar"))
            elif not member.isdir():
                if reason in LABEL_FILES:
                    file.seek(member.offset_data)
                    content = file.read(member.size)
                yield Entry(name, reason, None, member.offset_data, member.size, PLAIN, content)
        file.seek(tar.offset)
        last = file.read(min(tarfile.BLOCKSIZE, end - tar.offset))
        if last != bytes(tarfile.BLOCKSIZE):  # tarfile ends there without a word
            raise ValueError(f"truncated or damaged at byte {tar.offset}")


def _zip_entries(path):
    entries = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, content = _normal(info.filename), None
            reason = _why_unused(name)
            if info.flag_bits & 1:
                reason = "encrypted"
            elif info.compress_type not in (STORED, DEFLATED):
                reason = f"compressed by method {info.compress_type}"
            elif stat.S_ISLNK(info.external_attr >> 16):
                reason = "a link"
            elif reason in LABEL_FILES:
                content = archive.read(info)
            if not info.is_dir():
                place = info.header_offset, info.compress_size, info.compress_type
                entries.append(Entry(name, reason, None, *place, content))
    return entries, ()


# Labels.

LABEL_FILES = {".cls", ".json"}


def _key(name):
    """The name of a WebDataset sample: that of its members up to the first dot of the last part."""
    folder, last = os.path.split(name)
    return os.path.join(folder, last.partition(".")[0])


def _with_labels(path, entries):
    """The entries with the labels that KEY.cls, KEY.json and dataset.json say, without these."""
    labels, saying = {}, set()
    for entry in entries:
        if entry.content is not None and (found := _labels_in(entry)):
            labels |= found
            saying.add(entry.name)
    if not labels:
        return entries
    names = {entry.name for entry in entries}
    listed = [name for name in labels if not other_ending(name)]  # those of dataset.json
    if absent := next((name for name in listed if name not in names), None):
        raise ValueError(f"{path}: dataset.json has a label of {absent}, which is not there")
    return [
        entry if entry.reason else _labelled(entry, labels.get(entry.name, labels.get(_key(entry.name))))
        for entry in entries if entry.name not in saying
    ]


def _labels_in(entry):
    """Name or key -> label, as a member says them."""
    if entry.name.endswith(".cls"):
        text = entry.content.decode().strip()
        return {_key(entry.name): int(text) if re.fullmatch(r"-?\d+", text) else text}
    value = json.loads(entry.content)
    if not isinstance(value, dict):
        return {}
    folder, last = os.path.split(entry.name)
    if last == "dataset.json":
        return {os.path.join(folder, name): label for name, label in value.get("labels") or ()}
    return {_key(entry.name): value["label"]} if value.get("label") is not None else {}


def _labelled(entry, label):
    """The entry with its label; a negative one is none. Raises ValueError: neither a number nor a name."""
    if isinstance(label, int) and label < 0:
        return entry._replace(reason=f"label {label}")
    if not isinstance(label, (int, str, type(None))) or label == "":
        raise ValueError(f"{entry.name} has label {label!r:.40}, not a number or a name")
    return entry._replace(label=label)


# Parquet, as on the hub: rows of an image, a struct of bytes and path, and a label.


def _open_parquet(path):
    """A ParquetFile, and the name of its column of images."""
    try:
        import pyarrow.parquet  # which only this form needs
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow: pip install -r requirements-data.txt") from None
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    schema = file.schema_arrow
    images = [field.name for field in schema if re.match("struct<.*bytes: ", str(field.type))]
    if not images or "label" not in schema.names:
        raise ValueError(f"{path}: no images with labels: the columns are {', '.join(schema.names)}")
    return file, images[0]


def _parquet_entries(path):
    file, column = _open_parquet(path)
    described = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
    names = described.get("info", {}).get("features", {}).get("label", {}).get("names") or ()
    entries = []
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, [f"{column}.path", "label"], use_threads=False).to_pydict()
        for row, (image, label) in enumerate(zip(rows[column], rows["label"], strict=True)):
            name = (image or {}).get("path")
            if not name or _why_unused(name):
                name = f"{path.stem}-{len(entries):06d}"
            entries.append(_labelled(Entry(name, "", None, group, row, ROW), label))
    return entries, _unique(names)


def _unique(names):
    """Class names that can be those of folders: without slashes, and no two alike."""
    found = []
    for i, name in enumerate(name.replace("/", "_") for name in names):
        found.append(f"{name} ({i})" if name in found or not name else name)
    return tuple(found)


READERS = {".tar": _tar_entries, ".zip": _zip_entries, ".parquet": _parquet_entries}


# Reading a member. Archives are opened where they are read, in each process.


class Member(NamedTuple):
    """An image in an archive, read as a Path is. Of parquet, `start` is a row group and `size` a row."""

    archive: Path
    name: str
    start: int
    size: int
    how: int

    def __str__(self):
        return f"{self.archive}: {self.name}"

    def read_bytes(self):
        """Its contents. Raises ValueError: damaged; OSError: the machine could not read the archive."""
        try:
            if self.how == ROW:
                return _images_in(self.archive, self.start)[self.size].as_py() or b""
            start = self.start
            if self.how != PLAIN:  # a local header, its name and its extra field are in front
                head = _read_at(self.archive, start, 30)
                start += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            content = _read_at(self.archive, start, self.size)
            return zlib.decompress(content, -zlib.MAX_WBITS) if self.how == DEFLATED else content
        except zlib.error as error:
            raise ValueError(error) from None
        except OSError as error:
            _opened.cache_clear()  # a handle may be stale
            if error.errno is None:  # what pyarrow says of damaged bytes
                raise ValueError(error) from None
            raise


@lru_cache(maxsize=256)
def _opened(path):
    return _open_parquet(path) if path.suffix.lower() == ".parquet" else open(path, "rb", buffering=0)


def _read_at(path, start, size):
    content = os.pread(_opened(path).fileno(), size, start)
    if len(content) != size:
        raise OSError(errno.EIO, "ends too early: it has changed since it was opened", str(path))
    return content


_kept = {}  # (path, row group) -> its images; the latest is last


def _images_in(path, group):
    """The images of a row group as an array of bytes. To read one means to read all, 100 on the hub."""
    images = _kept.pop((path, group), None)
    if images is None:
        file, column = _opened(path)
        rows = file.read_row_group(group, [f"{column}.bytes"], use_threads=False)
        images = rows[column].combine_chunks().field(0)
        while _kept and images.nbytes + sum(part.nbytes for part in _kept.values()) > ROWS_KEPT:
            del _kept[next(iter(_kept))]
    _kept[path, group] = images
    return images
