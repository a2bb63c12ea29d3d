"""Large arrays in `.npz` files, read and written without taking them into memory.

Knows zip and npy layouts. Does not know what the arrays are. No pickles are read.
"""

import zipfile
from pathlib import Path

import numpy as np

from util.files import atomic

LOCAL_HEADER = 30  # bytes of a zip entry's local header before its name


def open_array(path, key):
    """An array of an `.npz`: memory-mapped where it is stored as it is (numpy.savez), else loaded.

    Raises:
        ValueError: no such array, damaged, or one that claims more bytes than the file has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as file:
                shape, fortran, dtype = _read_header(file)
                header = file.tell()
        claimed = header + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject or fortran or claimed != entry.file_size:
            raise ValueError(f"{key} claims {claimed} bytes, it has {entry.file_size}")
        if entry.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[key]
        start = _data_start(path, entry)
        if start + claimed > Path(path).stat().st_size:
            raise ValueError(f"{key} ends behind the end of the file")
        return np.memmap(path, dtype=dtype, mode="r", offset=start + header, shape=shape)
    except KeyError:
        raise ValueError(f"{path}: no array {key}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path}: no readable array {key} ({error})") from None


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _data_start(path, entry):
    """Where a zip entry's bytes begin: behind its local header, whose extra field may differ in length."""
    with Path(path).open("rb") as file:
        file.seek(entry.header_offset + LOCAL_HEADER - 4)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
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
