"""Arrays in `.npz` files: mapped or read, and written part by part.

Knows zip and npy layouts. Does not know what the arrays are. No pickles are read, and no size that a file
claims is believed: memory is taken for what the file has, or for what it may inflate to within limits.
"""

import os
import zipfile
from contextlib import contextmanager

import numpy as np

from util.files import atomic

LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name
SMALL = 2**26  # bytes that any array may inflate to
PART = 2**24  # bytes read at a time
MOST_INFLATION = 100  # times its compressed bytes that a larger one may; deflate's own limit is 1,032


def open_array(path, key):
    """An array of an `.npz`: memory-mapped where it is stored as it is (numpy.savez), else loaded.

    Raises:
        ValueError: no such array, damaged, or one that claims more bytes than the file has.
    """
    with _refusing(path, key), zipfile.ZipFile(path) as archive:
        entry = _checked_entry(archive, key)
        with archive.open(entry) as file:
            shape, fortran, dtype = _checked_header(file, entry.file_size)
            header = file.tell()
            if entry.compress_type != zipfile.ZIP_STORED:
                return _read_array(file, shape, fortran, dtype)
        order = "F" if fortran else "C"
        start = _data_start(archive, entry) + header
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def read_arrays(path, keys):
    """dict of arrays of an `.npz`, read into memory.

    Raises:
        ValueError: as `open_array`.
    """
    arrays = {}
    with _refusing(path, " or ".join(keys)), zipfile.ZipFile(path) as archive:
        for key in keys:
            entry = _checked_entry(archive, key)
            with archive.open(entry) as file:
                arrays[key] = _read_array(file, *_checked_header(file, entry.file_size))
    return arrays


def array_names(path):
    """The keys of an `.npz`.

    Raises:
        ValueError: no `.npz`.
    """
    with _refusing(path, "at all"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npy_header(file):
    """(shape, whether in Fortran order, dtype) of an open `.npy`, of version 1: others can claim gigabytes
    for the header itself, and no array without named fields needs them.

    Raises:
        ValueError: no such header, or one of objects.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("no .npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {list(shape)}")
    return shape, fortran, dtype


def claimed_bytes(shape, dtype):
    """Bytes of an array, as an int that cannot overflow."""
    return int(np.prod(shape, dtype=object)) * dtype.itemsize


class _Missing(Exception):
    """An array that is not there."""


@contextmanager
def _refusing(path, key):
    """Inside it whatever damaged bytes lead to becomes a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _Missing as error:
        raise ValueError(f"{path}: no array {error}") from None
    except Exception as error:  # zip and npy headers fail in many ways; numpy reads one as Python
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: no readable array {key} ({reason})") from None


def _checked_entry(archive, key):
    """The zip entry of an array, whose sizes are possible."""
    if f"{key}.npy" not in archive.NameToInfo:
        raise _Missing(key)
    entry = archive.getinfo(f"{key}.npy")
    if _data_start(archive, entry) + entry.compress_size > os.fstat(archive.fp.fileno()).st_size:
        raise ValueError(f"{key} ends behind the end of the file")
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise ValueError(f"{key} claims {entry.file_size} bytes, it has {entry.compress_size}")
    if entry.file_size > max(SMALL, MOST_INFLATION * entry.compress_size):
        raise ValueError(f"{entry.compress_size} bytes claim to inflate to {entry.file_size}")
    return entry


def _checked_header(file, size):
    """As `npy_header`, of an array that must fill the `size` bytes of its file."""
    shape, fortran, dtype = npy_header(file)
    claimed = file.tell() + claimed_bytes(shape, dtype)
    if claimed != size:
        raise ValueError(f"it claims {claimed} bytes, it has {size}")
    return shape, fortran, dtype


def _read_array(file, shape, fortran, dtype):
    content = bytearray(claimed_bytes(shape, dtype))
    for start in range(0, len(content), PART):
        part = memoryview(content)[start : start + PART]
        if file.readinto(part) != len(part):
            raise EOFError("cut short")
    return np.ndarray(shape, dtype, content, order="F" if fortran else "C")


def _data_start(archive, entry):
    """Where a zip entry's bytes begin: behind its local header, whose extra field may differ in length."""
    archive.fp.seek(entry.header_offset + LOCAL_HEADER - 4)
    name, extra = (int.from_bytes(archive.fp.read(2), "little") for _ in range(2))
    return entry.header_offset + LOCAL_HEADER + name + extra


def save_images(path, parts, num_images, image_shape, labels):
    """Write images as ADM does: `.npz` with arr_0 uint8 [n, H, W, 3] and arr_1 int64 [n], part by part.

    Args:
        parts: iterable of uint8 [m, H, W, 3], `num_images` in all.
    """
    with atomic(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *image_shape)}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype=np.uint8).tobytes())
                written += len(part)
            if written != num_images:
                raise ValueError(f"{written} images written, {num_images} promised")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64), allow_pickle=False)
