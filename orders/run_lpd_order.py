"""Write a file of generation orders: `python orders/run_lpd_order.py --output_file orders.npy`."""

import contextlib
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from orders.lpd_order import LARGEST_GRID, ORDER_KINDS, make_orders
from orders.order_file import check_suffix, load_orders, meta_path, save_orders
from orders.schedule import check_group_sizes, cosine_group_sizes
from util import cli
from util.distributed import start_worker
from util.files import read_json

CELLS_PER_BATCH = 1 << 18  # one task of a process, about a tenth of a second
FIRST_ORDERS = 256  # by which a complete file is recognised


def flags():
    parser = cli.Parser(description="Write a file of generation orders.")
    add = parser.add_argument
    add("--order", choices=ORDER_KINDS, default="lpd", help="kind of order")
    add_schedule_flags(parser, "20")
    add("--proximity_threshold", type=cli.number(float, 0), default=1.0, help="least score of a near cell")
    add("--repulsion_threshold", type=cli.number(float, 0), default=1.0, help="near cells are farther apart")
    add("--num_runs", type=cli.number(int, 1), default=60000, help="number of orders")
    add("--seed", type=cli.number(int, 0), default=0, help="order i depends on the seed and i alone")
    add("--max_workers", type=cli.number(int, 1), default=os.cpu_count(), help="processes")
    add("--output_file", type=Path, nargs="+", required=True, help="one or more .npy or .json files")
    add("--overwrite", action="store_true", help="replace existing files")
    return parser


def add_schedule_flags(parser, default):
    """The flags that `schedule_of` reads; `default` describes that of --generation_steps."""
    add = parser.add_argument
    add("--img_size", type=cli.number(int, 1), default=256, help="side of the image in pixels")
    add("--vqgan_stride", type=cli.number(int, 1), default=16, help="side of a token in pixels")
    add("--generation_steps", type=cli.number(int, 1), help=f"of the cosine schedule; default: {default}")
    add("--group_sizes", action=cli.GroupSizes, nargs="+", help="tokens of each step, instead of a number")


def schedule_of(args):
    """(grid size, group sizes) from the flags."""
    grid_size, rest = divmod(args.img_size, args.vqgan_stride)
    if rest or grid_size > LARGEST_GRID:
        raise cli.UsageError(
            f"--img_size {args.img_size} must be 1 to {LARGEST_GRID} times --vqgan_stride {args.vqgan_stride}"
        )
    steps, sizes = args.generation_steps, args.group_sizes
    if sizes and steps not in (None, len(sizes)):
        raise cli.UsageError(f"--group_sizes has {len(sizes)} steps, --generation_steps is {steps}")
    with cli.checking("--group_sizes: " if sizes else "--generation_steps: "):
        sizes = sizes or cosine_group_sizes(grid_size**2, steps or 20)
        return grid_size, check_group_sizes(sizes, grid_size**2)


def is_done(path, settings, meta, overwrite):
    """Whether an earlier run completed this file; UsageError if it has other content or cannot be written."""
    with cli.checking("--output_file "):
        check_suffix(path)
    cli.writable_folder("--output_file", path.parent)
    if overwrite or not path.exists():
        return False
    with contextlib.suppress(ValueError, OSError):
        found = load_orders(path, settings["grid_size"] ** 2)
        first = make_orders(n=min(len(found), FIRST_ORDERS), **settings)
        same_settings = path.suffix == ".json" or read_json(meta_path(path)) == meta
        if same_settings and len(found) == meta["num_orders"] and np.array_equal(found[: len(first)], first):
            return True
    raise cli.UsageError(f"--output_file {path} exists: give another name or --overwrite")


def generate_orders(num_orders, workers, settings):
    """Yield the orders of images 0 to `num_orders` - 1 in batches uint16 [b, L], made by `workers` processes.

    `settings` are the arguments of `make_orders` except `n` and `image_ids`. Threads would be no faster than
    one: NumPy's calls are so short here that they would wait for the interpreter's lock.
    """
    num_batches = num_orders * settings["grid_size"] ** 2 // CELLS_PER_BATCH + 1
    batches = np.array_split(np.arange(num_orders), min(num_batches, num_orders))
    context = multiprocessing.get_context("fork")  # spawned workers would import torch with this program
    pool = ProcessPoolExecutor(min(workers, len(batches)), context, start_worker)
    try:
        yield from pool.map(functools.partial(_orders_of, settings), batches)
    finally:
        pool.shutdown(cancel_futures=True)


def _orders_of(settings, image_ids):
    return make_orders(n=len(image_ids), image_ids=image_ids, **settings)


def main(argv=None):
    args = flags().parse_args(argv)
    grid_size, group_sizes = schedule_of(args)
    settings = {
        "kind": args.order, "group_sizes": list(group_sizes), "grid_size": grid_size,
        "proximity_threshold": args.proximity_threshold, "repulsion_threshold": args.repulsion_threshold,
        "seed": args.seed,
    }
    meta = {**settings, "num_orders": args.num_runs, "image_size": args.img_size}
    paths = [path for path in args.output_file if not is_done(path, settings, meta, args.overwrite)]
    if not paths:
        print(f"complete already: {' '.join(map(str, args.output_file))}")
        return
    batches = []
    with tqdm(total=args.num_runs, unit=" orders", mininterval=0.5) as progress:
        for batch in generate_orders(args.num_runs, args.max_workers, settings):
            batches.append(batch)
            progress.update(len(batch))
    for path in paths:
        save_orders(path, np.concatenate(batches), meta)
        print(f"{path}: {args.num_runs} orders, {len(group_sizes)} steps of {args.order}")


if __name__ == "__main__":
    cli.run(main)
