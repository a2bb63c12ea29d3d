"""Draw an order file: `python orders/plot.py orders.npy`.

Four panels: the step of each cell in one order; its mean over the file; and, step by step, the mean proximity
score of the cells taken and their least distance, against random and Halton orders in the same group sizes.
Knows how to draw and where group sizes come from; the numbers are `measure.py`'s.
"""

import argparse
import json
import math
import sys
from pathlib import Path

if not __package__:  # run as a program: imports start from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt  # noqa: E402

from orders.lpd_order import halton_orders, random_orders  # noqa: E402
from orders.measure import step_statistics, steps_of_cells  # noqa: E402
from orders.order_file import load_orders, meta_path  # noqa: E402
from orders.run_lpd_order import Parser, UsageError, resolved_group_sizes  # noqa: E402

ORDERS_MEASURED = 1000  # enough for smooth curves
ORDERS_PER_CHUNK = 4096
FILE_COLOUR, RANDOM_COLOUR, HALTON_COLOUR = "#0072b2", "#d55e00", "#7f7f7f"


def flags() -> argparse.ArgumentParser:
    parser = Parser(description="Draw an order file.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help=".npy or .json order file")
    add("--index", type=int, default=0, help="the order whose steps are drawn")
    add("--img_size", type=int, default=256, help="side of the image, where the file tells no group sizes")
    add("--vqgan_stride", type=int, default=16, help="pixels a token stands for, each way")
    add("--generation_steps", type=int, help="steps of the cosine schedule; default: the file's settings")
    add("--group_sizes", type=int, nargs="+", help="tokens of each step; default: the file's settings")
    add("--output_file", type=Path, help="the picture; by default the file's name with .png")
    add("--overwrite", action="store_true", help="replace an existing picture")
    return parser


def group_sizes_of(args: argparse.Namespace) -> tuple[int, ...]:
    """The group sizes of the flags, else of the settings beside the file; UsageError where there are none."""
    num_tokens = (args.img_size // max(1, args.vqgan_stride)) ** 2
    if args.generation_steps or args.group_sizes:
        return resolved_group_sizes(args.generation_steps, args.group_sizes, num_tokens)
    settings = meta_path(args.file)
    if not settings.is_file():
        raise UsageError(f"--generation_steps or --group_sizes is needed: there is no {settings}")
    try:
        return tuple(int(size) for size in json.loads(settings.read_text())["group_sizes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{settings} tells no group sizes: give --group_sizes") from error


def mean_steps(orders: np.ndarray, group_sizes: tuple[int, ...]) -> np.ndarray:
    """The mean step, from 1, at which each raster position is generated: float64 [L]."""
    total = np.zeros(orders.shape[1])
    for start in range(0, len(orders), ORDERS_PER_CHUNK):
        total += steps_of_cells(orders[start : start + ORDERS_PER_CHUNK], group_sizes).sum(axis=0)
    return 1 + total / len(orders)


def draw(orders: np.ndarray, group_sizes: tuple[int, ...], index: int, name: str) -> plt.Figure:
    """The four panels, for `orders` uint16 [n, L] that are called `name`."""
    grid_size = math.isqrt(orders.shape[1])
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.4), constrained_layout=True)
    what = f"{len(orders):,} orders, {grid_size} x {grid_size} cells, {len(group_sizes)} steps"
    figure.suptitle(f"{name}: {what}")
    steps = 1 + steps_of_cells(orders[index : index + 1], group_sizes).reshape(grid_size, grid_size)
    _draw_grid(panels[0], steps, f"Step of each cell, order {index}", numbers=grid_size <= 16)
    mean = mean_steps(orders, group_sizes).reshape(grid_size, grid_size)
    _draw_grid(panels[1], mean, "Mean step of each cell", numbers=False)
    n = min(len(orders), ORDERS_MEASURED)
    for label, colour, rows in (
        ("random", RANDOM_COLOUR, random_orders(n, grid_size)),
        ("Halton", HALTON_COLOUR, halton_orders(n, grid_size)),
        (name, FILE_COLOUR, orders[:n]),
    ):
        found = step_statistics(rows, group_sizes, grid_size)
        _draw_curve(panels[2], found.score, label, colour)
        _draw_curve(panels[3], found.least_distance, label, colour)
    panels[2].set(title="Mean score of the cells taken", ylabel="sum of 1 / distance", ylim=0)
    panels[3].set(title="Mean least distance within a group", ylabel="cells", ylim=0)
    panels[2].legend(frameon=False)
    return figure


def _draw_grid(panel: plt.Axes, values: np.ndarray, title: str, *, numbers: bool) -> None:
    image = panel.imshow(values, cmap="viridis")
    panel.figure.colorbar(image, ax=panel, shrink=0.8)
    panel.set(title=title, xticks=[], yticks=[])
    if numbers:
        middle = (values.min() + values.max()) / 2
        for (y, x), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            panel.text(x, y, value, ha="center", va="center", fontsize=7, color=colour)


def _draw_curve(panel: plt.Axes, values: np.ndarray, label: str, colour: str) -> None:
    """Mean over the orders of `values` [n, G], where there are any: a group of one has no least distance."""
    known = ~np.isnan(values).any(axis=0)
    panel.plot(1 + np.flatnonzero(known), values[:, known].mean(axis=0), color=colour, label=label)
    panel.set(xlabel="step")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    try:
        args = flags().parse_args(argv)
        output = args.output_file or args.file.with_suffix(".png")
        if output.exists() and not args.overwrite:
            raise UsageError(f"--output_file {output} exists: give another name or --overwrite")
        group_sizes = group_sizes_of(args)
        orders = load_orders(args.file, sum(group_sizes), 1)
        if not 0 <= args.index < len(orders):
            raise UsageError(f"--index {args.index}: {args.file} has {len(orders)} orders")
        draw(orders, group_sizes, args.index, args.file.stem).savefig(output, dpi=80)
        print(output)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
