"""Order files: `.npy` uint16 [n, L] with its settings beside it, or the published `.json` (list of lists)."""

import json
from pathlib import Path

import numpy as np

from util.files import atomic, read_json, reading, write_json

SUFFIXES = (".npy", ".json")


def load_orders(path, num_tokens, num_orders=None):
    """All orders of a `.npy` or `.json` file, uint16 [n, num_tokens].

    Raises ValueError, naming the file and the row, unless each is a permutation of 0..num_tokens - 1 and
    there are at least `num_orders`; OSError if the file cannot be opened.
    """
    path = Path(path)
    check_suffix(path)
    rows = read_json(path) if path.suffix == ".json" else _read_npy(path)
    if not isinstance(rows, (list, np.ndarray)):
        raise ValueError(f"{path}: a list of orders was expected, not {type(rows).__name__}")
    if num_orders is not None and len(rows) < num_orders:
        raise ValueError(f"{path} has {len(rows)} orders, but {num_orders} are needed")
    orders = np.empty((len(rows), num_tokens), np.uint16)
    for number, row in enumerate(rows):
        try:
            orders[number] = _checked(row, num_tokens)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
    return orders


def save_orders(path, orders, meta):
    """Write `orders` [n, L] atomically: to a `.json`, or to a `.npy` with the dict `meta` in `meta_path`."""
    check_suffix(path)
    with atomic(path) as partial, partial.open("wb") as file:
        if Path(path).suffix == ".json":
            file.write(f"[{', '.join(json.dumps(row.tolist()) for row in orders)}]".encode())
        else:
            np.save(file, orders.astype(np.uint16, copy=False))
            write_json(meta_path(path), meta)


def meta_path(path):
    """Where the settings of an `.npy` order file are: `.json` alone is the name of published orders."""
    return Path(path).with_suffix(".meta.json")


def check_suffix(path):
    """ValueError unless `path` ends in `.npy` or `.json`."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")


def _read_npy(path):
    with reading(path, ".npy file"), path.open("rb") as file:
        orders = np.lib.format.read_array(file, allow_pickle=False)
    if orders.ndim != 2:
        raise ValueError(f"{path} has shape {list(orders.shape)}, not [orders, positions]")
    return orders


def _checked(row, num_tokens):
    """A row of a file as an array [num_tokens]; ValueError unless it is a permutation."""
    order = np.array(row)
    if order.shape != (num_tokens,):
        raise ValueError(f"{order.size} positions, but an image has {num_tokens} tokens")
    wrong = np.flatnonzero(np.sort(order) != np.arange(num_tokens))
    if len(wrong):
        found = np.sort(order)[wrong[0]]
        raise ValueError(f"not a permutation of 0..{num_tokens - 1}: it has {found} in place of {wrong[0]}")
    return order
