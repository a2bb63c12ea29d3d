"""The README's picture of the method: who sees whom, and one step of raster and of locality-aware order.

    python scripts/analysis/method.py --output_file output/method.png
"""

from util import cli  # isort: skip
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from models.masks import row_groups, training_mask
from orders.lpd_order import make_orders
from orders.plot import steps_of_cells
from orders.schedule import cosine_group_sizes
from util.files import atomic

GROUP_SIZES = 1, 2, 3  # of the mask
GRID, STEPS, SHOWN = 8, 8, 5  # of the orders: cells a side, steps, the step that is shown
COLOURS = ListedColormap(["#ffffff", "#9ecae1", "#fd8d3c"])  # unseen or left, context, decoded in this step


def draw_cells(panel, values, texts, title):
    """A table of cells: `values` [h, w] are indices of COLOURS, `texts` [h, w] stand in them."""
    panel.pcolormesh(values, cmap=COLOURS, vmin=0, vmax=2, edgecolors="#bbbbbb", linewidth=0.6)
    panel.set_title(title, fontsize=10)
    panel.set(aspect="equal", xticks=[], yticks=[])
    panel.invert_yaxis()
    for (y, x), text in np.ndenumerate(texts):
        panel.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9)


def draw_mask(panel):
    """Which columns each row sees: context in blue, the queries of the same step in orange."""
    seen = training_mask(GROUP_SIZES).int().numpy()
    context, queries = row_groups(GROUP_SIZES)
    seen[:, len(context) :] *= 2
    draw_cells(panel, seen, np.full(seen.shape, ""), "who sees whom: rows see coloured columns")
    names = ["class", *(f"token {step + 1}" for step in context[1:]), *(f"query {s + 1}" for s in queries)]
    places = 0.5 + np.arange(len(names))
    panel.set_xticks(places, names, rotation=90, fontsize=8)
    panel.set_yticks(places, names, fontsize=8)
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)


def draw_order(panel, kind, title):
    sizes = cosine_group_sizes(GRID**2, STEPS)
    steps = 1 + steps_of_cells(make_orders(kind, 1, sizes, GRID), sizes).reshape(GRID, GRID)
    values = np.where(steps > SHOWN, 0, np.where(steps == SHOWN, 2, 1))
    draw_cells(panel, values, np.where(values, steps, ""), title)


def main(argv=None):
    parser = cli.Parser(description="Draw what the method does")
    parser.add_argument("--output_file", default="output/method.png", metavar="FILE", help=".png to write")
    output = cli.new_file("--output_file", parser.parse_args(argv).output_file, ".png", overwrite=True)
    figure = Figure(figsize=(11, 4), layout="constrained")
    mask, raster, local = figure.subplots(1, 3)
    draw_mask(mask)
    draw_order(raster, "raster", f"raster order, step {SHOWN} of {STEPS}")
    draw_order(local, "lpd", f"locality-aware order, step {SHOWN} of {STEPS}")
    with atomic(output) as partial:
        figure.savefig(partial, format="png", dpi=80)
    print(output)


if __name__ == "__main__":
    cli.run(main)
