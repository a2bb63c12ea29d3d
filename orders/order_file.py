"""Order files: `.npy` uint16 [n, L] with its settings in `.meta.json` beside it, or the published `.json`.

Knows the two formats and what a valid order is; does not know how orders are made. Nothing is half-written
under a final name, and nothing read is believed before it is checked.
"""

import glob
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

SUFFIXES = (".npy", ".json")
ROWS_PER_CHECK = 4096
ROW_CHARACTERS = (
    64  # of JSON for a position, at most: a longer row is not taken into memory as Python numbers
)


def load_orders(path: str | os.PathLike, num_tokens: int, num_orders: int | None = None) -> np.ndarray:
    """All orders of a `.npy` or published `.json` file, uint16 [n, num_tokens], each checked: a permutation.

    Raises ValueError, naming the file, the row and the numbers, for anything else, or for fewer than
    `num_orders`; OSError where the file cannot be read. What an `.npy` header claims is checked before memory
    is taken for it.
    """
    path = Path(path)
    check_suffix(path)
    orders = _read_json(path, num_tokens) if path.suffix == ".json" else _read_npy(path, num_tokens)
    if num_orders is not None and len(orders) < num_orders:
        raise ValueError(f"{path} has {len(orders)} orders, but {num_orders} are needed")
    for start in range(0, len(orders), ROWS_PER_CHECK):
        _check_permutations(path, orders[start : start + ROWS_PER_CHECK], start)
    return orders.astype(np.uint16, copy=False)


def save_orders(path: str | os.PathLike, orders: np.ndarray, meta: Mapping) -> None:
    """Write `orders` [n, L] to a `.npy` and `meta` to `meta_path(path)`; or to a `.json` as a list of lists.

    An existing file is replaced in one step; a failure leaves it as it was, and no temporary file behind.
    """
    path = Path(path)
    check_suffix(path)
    if path.suffix == ".json":
        _write_atomically(path, lambda file: _write_json(file, orders))
        return
    text = json.dumps(dict(meta)) + "\n"
    _write_atomically(meta_path(path), lambda file: file.write(text.encode()))
    _write_atomically(path, lambda file: np.save(file, orders.astype(np.uint16, copy=False)))


def meta_path(path: str | os.PathLike) -> Path:
    """Where the settings of an `.npy` order file are: its name with `.meta.json` for `.npy`.

    Not `.json`, which is the published format's name for the orders themselves.
    """
    return Path(path).with_suffix(".meta.json")


def check_suffix(path: Path) -> None:
    """ValueError unless `path` ends in `.npy` or `.json`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")


def _check_permutations(path: Path, orders: np.ndarray, first_row: int) -> None:
    wrong = (np.sort(orders, axis=1) != np.arange(orders.shape[1])).any(axis=1)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    positions, counts = np.unique(orders[row], return_counts=True)
    last = orders.shape[1] - 1
    outside = positions[(positions < 0) | (positions > last)]
    repeated = positions[counts > 1]
    what = f"it holds {outside[0]}" if len(outside) else f"position {repeated[0]} is there more than once"
    raise ValueError(f"{path}, row {first_row + row}: not a permutation of 0..{last}: {what}")


def _read_npy(path: Path, num_tokens: int) -> np.ndarray:
    with open(path, "rb") as file:
        try:
            if np.lib.format.read_magic(file) != (1, 0):  # others can claim gigabytes for the header itself
                raise ValueError("no .npy of version 1.0")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # NumPy parses the header as Python, which fails in many ways
            raise ValueError(f"{path} is not an .npy file: {str(error).splitlines()[0]}") from error
        present = os.fstat(file.fileno()).st_size - file.tell()
    if dtype.kind not in "iu":
        raise ValueError(f"{path} holds {dtype}, not integers")
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{path} has shape {shape}, not [orders, {num_tokens}]")
    if shape[1] != num_tokens:
        raise ValueError(f"{path} has orders of {shape[1]} positions, but an image has {num_tokens} tokens")
    claimed = shape[0] * shape[1] * dtype.itemsize
    if claimed != present:
        raise ValueError(f"{path} claims {claimed} bytes of orders, but holds {present}")
    return np.load(path, allow_pickle=False)


def _read_json(path: Path, num_tokens: int) -> np.ndarray:
    """A list of lists, read row by row: as Python lists, a file of 60,000 x 1024 would take over 2 GB."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    rows: list[np.ndarray] = []
    decode, most = json.JSONDecoder().raw_decode, ROW_CHARACTERS * (num_tokens + 16)
    at = _after(path, text, 0, "[", len(rows))
    while at < len(text) and text[at] != "]":
        if rows:
            at = _after(path, text, at, ",", len(rows))
        try:
            row, length = decode(text[at : at + most])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, row {len(rows)}: not JSON: {error}") from error
        rows.append(_checked_row(path, row, len(rows), num_tokens))
        at = _skip_space(text, at + length)
    at = _after(path, text, at, "]", len(rows))
    if at != len(text):
        raise ValueError(f"{path} goes on after the list of orders, at character {at}")
    return np.array(rows, np.uint16).reshape(len(rows), num_tokens)


def _checked_row(path: Path, row: object, number: int, num_tokens: int) -> np.ndarray:
    where = f"{path}, row {number}:"
    if not isinstance(row, list):
        raise ValueError(f"{where} a list of positions was expected, not {type(row).__name__}")
    if len(row) != num_tokens:
        raise ValueError(f"{where} {len(row)} positions, but an image has {num_tokens} tokens")
    if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= num_tokens:
        wrong = next(p for p in row if type(p) is not int or not 0 <= p < num_tokens)
        raise ValueError(f"{where} not a permutation of 0..{num_tokens - 1}: it holds {wrong!r:.40}")
    return np.array(row, np.uint16)


def _after(path: Path, text: str, at: int, expected: str, row: int) -> int:
    at = _skip_space(text, at)
    if text[at : at + 1] != expected:
        found = repr(text[at]) if at < len(text) else "the end"
        raise ValueError(f"{path}, row {row}: {expected!r} was expected at character {at}, not {found}")
    return _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _write_json(file: IO[bytes], orders: np.ndarray) -> None:
    for number, row in enumerate(orders):
        file.write(b"[" if number == 0 else b", ")
        file.write(json.dumps(row.tolist()).encode())
    file.write(b"]" if len(orders) else b"[]")


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
