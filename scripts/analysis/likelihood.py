"""What an order and a schedule cost: bits of held-out images, decoded in groups, paired image by image.

    python scripts/analysis/likelihood.py --pretrained_ckpt FILE --cached_path DIR --output_dir OUT \\
        --orders halton lpd random --steps 4 8 16

Every combination is measured once and kept in OUT; to resume, run the same again. Under torchrun the
processes share the combinations. There is no guidance: it defines no likelihood.
"""

from util import cli  # isort: skip
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.generate import ORDERS, resolve_settings
from engine.likelihood import decided_order
from models.weights import state_digest
from orders.policies import POLICIES
from scripts.analysis import images
from util import distributed
from util.files import atomic, read_arrays, read_json, refuse_changes, value_digest, write_csv, write_json
from util.pictures import save_curves


@dataclass(frozen=True)
class Setting:
    """An order made for `steps` and decoded in `decoded` steps: as many, or one token at a time."""

    order: str  # a kind of order or the path of an order file
    steps: int
    decoded: int
    proximity: float | None = None  # None: the order has no thresholds
    repulsion: float | None = None

    @property
    def rule(self):
        if self.proximity is None:
            return Path(self.order).stem
        return f"{self.order} p{self.proximity:g} r{self.repulsion:g}"

    def file(self, folder):
        return Path(folder, f"{self.rule.replace(' ', '_')}_{self.steps}_{self.decoded}.npz")

    def generation(self, grid_size, num_images, seed):
        """The `GenerationSettings` with the schedule that the order is made for."""
        is_file = self.order not in ORDERS
        return resolve_settings(
            grid_size, seed=seed, num_images=num_images, generation_steps=self.steps,
            order="raster" if is_file else self.order, lpd_order_file=self.order if is_file else None,
            proximity_threshold=self.proximity or 0.0, repulsion_threshold=self.repulsion,
        )

    def sequential(self, num_tokens):
        """The same order, decoded one token at a time; most orders do not depend on the schedule."""
        depends = self.proximity is not None or self.order in POLICIES
        steps = self.steps if depends else num_tokens
        return Setting(self.order, steps, num_tokens, self.proximity, self.repulsion)


def parse_args(argv=None):
    parser = cli.Parser(description="Bits of held-out images by order and number of steps")
    images.add_flags(parser)
    add = parser.add_argument
    add("--output_dir", metavar="DIR")
    add("--orders", nargs="+", default=["halton", "lpd", "random"], metavar="ORDER",
        help=f"{', '.join(ORDERS)}, or order files; the first is what the others are compared with")
    add("--steps", type=cli.number(int, 1), nargs="+", default=[4, 8, 16])
    add("--proximity_threshold", type=cli.number(float, 0), nargs="+", default=[1.0], help="of lpd")
    add("--repulsion_threshold", type=cli.number(float, 0), nargs="+", default=[1.0], help="of lpd")
    add("--batch_size", type=cli.number(int, 1), default=32)
    cli.add_seed_flag(parser)
    return parser.parse_args(argv)


def settings_of(args):
    """The settings of the flags. At a proximity threshold of inf no cell is near: repulsion has no say."""
    found = []
    for order, steps in itertools.product(args.orders, args.steps):
        thresholds = [(None, None)]
        if order == "lpd":
            thresholds = itertools.product(args.proximity_threshold, args.repulsion_threshold)
        for proximity, repulsion in thresholds:
            repulsion = 0.0 if proximity == math.inf else repulsion
            found.append(Setting(order, steps, steps, proximity, repulsion))
    return list(dict.fromkeys(found))


def measure(model, data, setting, args):
    """Bits float32 [n, L] of the images' tokens in generation order, and the orders [n, L].

    The order of image i depends on (seed, i), so the numbers do not depend on the batch, but for rounding.
    """
    tokens, labels = data
    plan = setting.generation(model.config.grid_size, len(tokens), args.seed)
    orders = plan.orders(np.arange(len(tokens)))
    if callable(orders):
        batches = torch.arange(len(tokens)).split(args.batch_size)
        given = {"group_sizes": plan.group_sizes, "seed": args.seed}
        orders = torch.cat([
            decided_order(model, orders, tokens[ids], labels[ids], image_ids=ids, **given) for ids in batches
        ])
    orders = orders.numpy()
    sizes = plan.group_sizes if setting.decoded == setting.steps else (1,) * tokens.shape[1]
    return images.token_bits(model, tokens, labels, orders, sizes, args.batch_size), orders


def measure_all(model, data, settings, args, world):
    """Measure what OUT does not have yet; each process takes its share and writes one file a setting."""
    todo = [setting for setting in settings if not setting.file(args.output_dir).exists()]
    for setting in todo[world.rank :: world.size]:
        bits, orders = measure(model, data, setting, args)
        with atomic(setting.file(args.output_dir)) as partial, partial.open("wb") as file:
            np.savez(file, bits=bits, orders=orders.astype(np.uint16))
        print(f"{setting.rule}, {setting.decoded} steps: {bits.sum(axis=1).mean():.1f} bits", flush=True)
    distributed.barrier()


def summarise(settings, bits, num_tokens):
    """One row (dict) for each setting. `bits` [n] by setting, also for the same orders one token at a time.

    Every difference is paired image by image: to the first order in as many steps, and
    the price against the best sequential order as its two parts, `order` (the same order one token at a
    time, against the best) and `parallelism` (in groups, against one token at a time).
    """
    best = min((s for s in bits if s.decoded == num_tokens), key=lambda s: bits[s].mean())
    reference = {s.steps: s for s in reversed(settings)}  # the first of each number of steps
    rows = []
    for setting in settings:
        own, alone = bits[setting], bits[setting.sequential(num_tokens)]
        row = {"rule": setting.rule, "steps": setting.steps, "images": len(own)}
        row["bits_per_token"] = own.mean().item() / num_tokens
        for name, values in (
            ("bits", own), ("difference", own - bits[reference[setting.steps]]), ("price", own - bits[best]),
            ("order", alone - bits[best]), ("parallelism", own - alone),
        ):
            row[name], row[f"{name}_error"] = images.mean_and_error(values)
        rows.append(row)
    return rows


def print_table(rows):
    names = ("bits", "difference", "price", "order", "parallelism")
    print(f"{'rule':>16} {'steps':>5} " + " ".join(name.rjust(15) for name in names))
    for row in rows:
        cells = (f"{row[name]:+8.2f} ± {row[f'{name}_error']:.2f}".rjust(15) for name in names)
        print(f"{row['rule']:>16} {row['steps']:5d} " + " ".join(cells))


def draw(folder, rows, settings):
    """bits_by_steps.png, bits_by_slot.png and bits_by_position.png in the folder."""
    from matplotlib.figure import Figure

    curves = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        curves.setdefault(row["rule"], []).append((row["steps"], row["price"], row["price_error"]))
    label = f"bits an image above the best\nsequential order, {rows[0]['images']} images"
    save_curves(Path(folder, "bits_by_steps.png"), curves, xlabel="steps", ylabel=label)

    rules, steps = (list(dict.fromkeys(getattr(s, name) for s in settings)) for name in ("rule", "steps"))
    slots = Figure(figsize=(4 * len(steps), 3.2), layout="constrained")
    maps = Figure(figsize=(1.9 * len(steps) + 1, 1.9 * len(rules)), layout="constrained")
    axes = slots.subplots(1, len(steps), squeeze=False, sharey=True)[0]
    panels = maps.subplots(len(rules), len(steps), squeeze=False)
    arrays = [read_arrays(s.file(folder), ["bits", "orders"]).values() for s in settings]  # [n, L] each
    by_slot = [bits.mean(axis=0) for bits, _ in arrays]
    by_position = [np.take_along_axis(b, o.argsort(axis=1), axis=1).mean(axis=0) for b, o in arrays]
    for setting, curve, grid in zip(settings, by_slot, by_position, strict=True):
        column = steps.index(setting.steps)
        axes[column].plot(curve, label=setting.rule, linewidth=1)
        axes[column].set(title=f"{setting.steps} steps", xlabel="slot")
        panel = panels[rules.index(setting.rule), column]
        drawn = panel.imshow(grid.reshape(math.isqrt(len(grid)), -1), vmin=0, vmax=np.max(by_position))
        panel.set(xticks=[], yticks=[], title=f"{setting.rule}, {setting.steps}")
    axes[0].set(ylabel="bits of the token at a slot")
    axes[-1].legend(fontsize=8)
    maps.colorbar(drawn, ax=panels, label="bits at a position", shrink=0.6)
    for figure, name in ((slots, "bits_by_slot.png"), (maps, "bits_by_position.png")):
        with atomic(Path(folder, name)) as partial:
            figure.savefig(partial, format="png", dpi=110)


def record_settings(args, model, tokens):
    """Refuse to mix measurements of other weights, images or seeds in one folder."""
    path = Path(args.output_dir, "settings.json")
    now = {
        "weights": state_digest(model), "images": value_digest(tokens.tolist()), "seed": args.seed,
        "num_images": len(tokens),
    }
    if path.exists():
        refuse_changes(path, read_json(path), now, "give another --output_dir")
    return path, now


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        cli.required(args, "output_dir")
        cli.writable_folder("--output_dir", args.output_dir)
        world = distributed.init(args.device)
        model, *data = images.load(args, world.device)
        num_tokens = model.config.num_tokens
        settings = settings_of(args)
        for setting in settings:
            setting.generation(model.config.grid_size, len(data[0]), args.seed)
        path, facts = record_settings(args, model, data[0])
    with cli.sole_writer("--output_dir", args.output_dir, world):
        if world.is_main:
            write_json(path, facts)
        needed = dict.fromkeys(s for own in settings for s in (own, own.sequential(num_tokens)))
        measure_all(model, data, needed, args, world)
        if world.is_main:
            bits = {s: read_arrays(s.file(args.output_dir), ["bits"])["bits"] for s in needed}
            bits = {s: values.sum(axis=1, dtype=np.float64) for s, values in bits.items()}
            rows = summarise(settings, bits, num_tokens)
            write_json(Path(args.output_dir, "likelihood.json"), rows)
            write_csv(Path(args.output_dir, "likelihood.csv"), rows)
            draw(args.output_dir, rows, settings)
            print_table(rows)


if __name__ == "__main__":
    cli.run(main)
