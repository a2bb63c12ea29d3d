"""Write a file of generation orders: `python orders/run_lpd_order.py --output_file orders.npy`.

Knows the flags, the processes and the progress; the orders themselves are `lpd_order.py`'s, the formats
`order_file.py`'s. The processes share the work by image ids, so their number does not change the orders.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if not __package__:  # run as a program: imports start from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from orders.lpd_order import LARGEST_GRID, ORDER_KINDS, make_orders  # noqa: E402
from orders.order_file import check_suffix, load_orders, meta_path, save_orders  # noqa: E402
from orders.schedule import check_group_sizes, cosine_group_sizes  # noqa: E402

CELLS_PER_BATCH = 1 << 18  # what a process does at a time, about a quarter of a second
FIRST_ORDERS = 256  # by which a file is known to hold the orders asked for
LEAST = {
    "img_size": 1,
    "vqgan_stride": 1,
    "num_runs": 1,
    "max_workers": 1,
    "seed": 0,
    "proximity_threshold": 0,
    "repulsion_threshold": 0,
}


class UsageError(Exception):
    """A mistake in the flags, said in one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line without the usage."""

    def error(self, message: str):
        raise UsageError(message)


def flags() -> argparse.ArgumentParser:
    parser = Parser(
        description="Write a file of generation orders.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--order", choices=ORDER_KINDS, default="lpd", help="kind of order")
    add("--img_size", type=int, default=256, help="side of the image in pixels")
    add("--vqgan_stride", type=int, default=16, help="pixels a token stands for, each way")
    add("--generation_steps", type=int, help="steps of the cosine schedule; 20 if not given")
    add("--group_sizes", type=int, nargs="+", help="tokens of each step, in place of the cosine schedule")
    add("--proximity_threshold", type=float, default=1.0, help="least score of a near cell")
    add("--repulsion_threshold", type=float, default=1.0, help="near cells of a group are farther apart")
    add("--num_runs", type=int, default=60000, help="number of orders")
    add("--seed", type=int, default=0, help="order i depends on the seed and i alone")
    add("--max_workers", type=int, default=os.cpu_count(), help="processes")
    add("--output_file", type=Path, nargs="+", required=True, help="one or more .npy or .json files")
    add("--overwrite", action="store_true", help="replace existing files")
    return parser


def resolved_settings(args: argparse.Namespace) -> dict:
    """What `generate_orders` takes, from the flags; UsageError for what cannot be."""
    for name, least in LEAST.items():
        if not getattr(args, name) >= least:
            raise UsageError(f"--{name} must be {least} or more, not {getattr(args, name)}")
    grid_size, rest = divmod(args.img_size, args.vqgan_stride)
    if rest or not 1 <= grid_size <= LARGEST_GRID:
        raise UsageError(
            f"--img_size {args.img_size} must be 1 to {LARGEST_GRID} times --vqgan_stride {args.vqgan_stride}"
        )
    settings = {
        "kind": args.order,
        "group_sizes": resolved_group_sizes(args.generation_steps, args.group_sizes, grid_size**2),
        "grid_size": grid_size,
        "proximity_threshold": args.proximity_threshold,
        "repulsion_threshold": args.repulsion_threshold,
        "seed": args.seed,
    }
    try:
        make_orders(n=0, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return settings


def resolved_group_sizes(
    steps: int | None, group_sizes: list[int] | None, num_tokens: int
) -> tuple[int, ...]:
    """The explicit list if there is one, else the cosine schedule of `steps`; UsageError for a wrong one."""
    flag = "--generation_steps" if group_sizes is None else "--group_sizes"
    try:
        if group_sizes is None:
            return cosine_group_sizes(num_tokens, 20 if steps is None else steps)
        if steps is not None and steps != len(group_sizes):
            raise ValueError(f"{len(group_sizes)} groups do not go with --generation_steps {steps}")
        return check_group_sizes(group_sizes, num_tokens)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def check_outputs(paths: list[Path], settings: dict, meta: dict, *, overwrite: bool) -> list[Path]:
    """The files still to be written: those that an earlier, killed run completed are left as they are.

    UsageError for a file that holds something else or has no format by its name; OSError for a folder without
    access.
    """
    for path in paths:
        try:
            check_suffix(path)
        except ValueError as error:
            raise UsageError(f"--output_file {error}") from error
    missing = []
    for path in paths:
        if not path.exists() or (overwrite and path.is_file()):
            missing.append(path)
        elif not is_complete(path, settings, meta):
            raise UsageError(f"--output_file {path} exists: give another name or --overwrite")
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"--output_file {path}: {path.parent} cannot be written")
    return missing


def is_complete(path: Path, settings: dict, meta: dict) -> bool:
    """Whether a file holds the orders of these settings, as far as their number and the first ones tell."""
    if not path.is_file():
        return False
    try:
        found = load_orders(path, settings["grid_size"] ** 2)
        if path.suffix == ".npy" and json.loads(meta_path(path).read_text()) != json.loads(json.dumps(meta)):
            return False
    except (ValueError, OSError):
        return False
    num_orders = meta["num_orders"]
    first = make_orders(n=min(num_orders, FIRST_ORDERS), **settings)
    return len(found) == num_orders and np.array_equal(found[: len(first)], first)


def generate_orders(num_orders: int, workers: int, settings: dict) -> Iterator[np.ndarray]:
    """Yield the orders of image ids 0 to `num_orders` - 1 in batches uint16 [b, L], made by processes.

    `settings` are the arguments of `make_orders` but for `n` and `image_ids`. Not threads: NumPy's calls are
    so short here that two threads, handing the interpreter's lock to and fro, take longer than one. Closing
    the generator drops what has not begun.
    """
    step = max(1, CELLS_PER_BATCH // settings["grid_size"] ** 2)
    batches = [np.arange(first, min(first + step, num_orders)) for first in range(0, num_orders, step)]
    make = functools.partial(_orders_of, settings)
    if min(workers, len(batches)) == 1:
        yield from map(make, batches)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        with _interrupts_held_back():  # a worker that one leaves half started is waited for for ever
            results = pool.map(make, batches)
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM that come inside it are a KeyboardInterrupt at its end."""
    came = []
    before = {s: signal.signal(s, lambda *which: came.append(which)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _orders_of(settings: dict, image_ids: np.ndarray) -> np.ndarray:
    return make_orders(n=len(image_ids), image_ids=image_ids, **settings)


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    try:
        args = flags().parse_args(argv)
        settings = resolved_settings(args)
        meta = {**settings, "num_orders": args.num_runs, "image_size": args.img_size}
        missing = check_outputs(args.output_file, settings, meta, overwrite=args.overwrite)
        if not missing:
            print(f"complete already: {' '.join(map(str, args.output_file))}")
            return 0
        orders = np.empty((args.num_runs, settings["grid_size"] ** 2), np.uint16)
        done = 0
        with tqdm(total=args.num_runs, unit=" orders", mininterval=0.5) as progress:
            for batch in generate_orders(args.num_runs, args.max_workers, settings):
                orders[done : done + len(batch)] = batch
                done += len(batch)
                progress.update(len(batch))
        for path in missing:
            save_orders(path, orders, meta)
            print(f"{path}: {args.num_runs} orders, {len(settings['group_sizes'])} steps of {args.order}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing unfinished was kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    sys.exit(main())
