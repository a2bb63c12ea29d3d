"""What orders look like, in numbers and in a picture: `python orders/plot.py orders.npy`."""

import math
from pathlib import Path

import numpy as np

from orders.lpd_order import count_neighbours, halton_orders, random_orders
from orders.order_file import load_orders, meta_path
from orders.run_lpd_order import add_schedule_flags, schedule_of
from util import cli
from util.files import atomic, read_json

ORDERS_MEASURED = 1000  # enough for smooth curves


def steps_of_cells(orders, group_sizes):
    """The step, from 0, at which each raster position is generated: int64 [n, L]."""
    steps = np.empty(orders.shape, np.int64)
    step_of_slot = np.repeat(np.arange(len(group_sizes)), group_sizes)
    np.put_along_axis(steps, orders.astype(np.int64), step_of_slot[None], axis=1)
    return steps


def step_statistics(orders, group_sizes, grid_size):
    """(mean score, least distance) of the cells that each order takes at each step, float64 [n, G] both.

    The score of a cell is the sum of 1 / distance over those of its 8 neighbours that earlier groups have. A
    distance within the group is Euclidean, nan for a group of one.
    """
    scores, distances = np.full((2, len(orders), len(group_sizes)), np.nan)
    generated = np.zeros(orders.shape, np.uint8)
    start = 0
    for group, size in enumerate(group_sizes):
        cells = orders[:, start : start + size].astype(np.int64)
        beside, across = count_neighbours(generated, grid_size)
        scores[:, group] = np.take_along_axis(beside + across / math.sqrt(2), cells, axis=1).mean(axis=1)
        if size > 1:
            y, x = np.divmod(cells, grid_size)
            a, b = np.triu_indices(size, 1)  # all pairs of the group
            distances[:, group] = np.hypot(y[:, a] - y[:, b], x[:, a] - x[:, b]).min(axis=1)
        np.put_along_axis(generated, cells, 1, axis=1)
        start += size
    return scores, distances


def draw(orders, group_sizes, index, name):
    """A matplotlib figure of `orders` uint16 [n, L]: the step of each cell, in order `index` and on average,
    and, against random and Halton orders, the mean score and the least distance of each step."""
    from matplotlib.figure import Figure

    grid_size = math.isqrt(orders.shape[1])
    figure = Figure(figsize=(18, 4.4), constrained_layout=True)
    panels = figure.subplots(1, 4)
    size = f"{len(orders):,} orders, {grid_size} x {grid_size} cells, {len(group_sizes)} steps"
    figure.suptitle(f"{name}: {size}")
    steps = 1 + steps_of_cells(orders, group_sizes).reshape(-1, grid_size, grid_size)
    _draw_grid(panels[0], steps[index], f"Step of each cell, order {index}", numbers=grid_size <= 16)
    _draw_grid(panels[1], steps.mean(axis=0), "Mean step of each cell", numbers=False)
    n = min(len(orders), ORDERS_MEASURED)
    for label, colour, rows in (
        ("random", "#d55e00", random_orders(n, grid_size)),
        ("Halton", "#7f7f7f", halton_orders(n, grid_size)),
        (name, "#0072b2", orders[:n]),
    ):
        score, distance = step_statistics(rows, group_sizes, grid_size)
        _draw_curve(panels[2], score, label, colour)
        _draw_curve(panels[3], distance, label, colour)
    panels[2].set(title="Mean score of the cells taken", ylabel="sum of 1 / distance", ylim=0)
    panels[3].set(title="Mean least distance within a group", ylabel="cells", ylim=0)
    panels[2].legend(frameon=False)
    return figure


def _draw_grid(panel, values, title, *, numbers):
    image = panel.imshow(values, cmap="viridis")
    panel.figure.colorbar(image, ax=panel, shrink=0.8)
    panel.set(title=title, xticks=[], yticks=[])
    if numbers:
        middle = (values.min() + values.max()) / 2
        for (y, x), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            panel.text(x, y, value, ha="center", va="center", fontsize=7, color=colour)


def _draw_curve(panel, values, label, colour):
    """The mean over the orders of `values` [n, G], for the steps that have one."""
    known = ~np.isnan(values).any(axis=0)
    panel.plot(1 + np.flatnonzero(known), values[:, known].mean(axis=0), color=colour, label=label)
    panel.set(xlabel="step")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.spines[["top", "right"]].set_visible(False)


def _group_sizes(args):
    """From the flags, else from the settings beside the file."""
    if args.generation_steps or args.group_sizes:
        return schedule_of(args)[1]
    settings = meta_path(args.file)
    try:
        return tuple(read_json(settings)["group_sizes"])
    except (OSError, KeyError, TypeError):
        message = f"--generation_steps or --group_sizes is needed: {settings} has no group sizes"
        raise cli.UsageError(message) from None


def main(argv=None):
    parser = cli.Parser(description="Draw an order file.")
    add = parser.add_argument
    add("file", type=Path, help=".npy or .json order file")
    add("--index", type=cli.number(int, 0), default=0, help="the order whose steps are drawn")
    add_schedule_flags(parser, "the file's")
    add("--output_file", type=Path, help="the picture; default: the file's name with .png")
    add("--overwrite", action="store_true", help="replace an existing picture")
    args = parser.parse_args(argv)
    output = args.output_file or args.file.with_suffix(".png")
    if output.exists() and not args.overwrite:
        raise cli.UsageError(f"--output_file {output} exists: give another name or --overwrite")
    with cli.checking():
        group_sizes = _group_sizes(args)
        orders = load_orders(args.file, sum(group_sizes), args.index + 1)
    figure = draw(orders, group_sizes, args.index, args.file.stem)
    with atomic(output) as partial:
        figure.savefig(partial, format=output.suffix[1:] or "png", dpi=80)
    print(output)


if __name__ == "__main__":
    cli.run(main)
