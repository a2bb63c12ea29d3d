"""Many evaluations side by side: mean and spread over seeds, as a table, a CSV and a plot.

    python scripts/sweep.py --orders lpd raster --steps 4 8 --seeds 0 1 2 -- \\
        main_lpd.py --evaluate --output_dir output/sweep [other flags of main_lpd.py]

The command after `--`, which may begin with python or torchrun, runs once for every combination of the lists.
To resume, run the same again: main_lpd.py returns at once where its result exists.
"""

import itertools
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import main_lpd
from engine.generate import ORDERS
from scripts.cli.job import run_command
from util import cli
from util.files import read_json, write_csv
from util.pictures import save_curves

FLAGS = {  # setting in a result -> flag of main_lpd.py
    "order": "--order", "steps": "--generation_steps", "cfg": "--cfg", "seed": "--seed",
    "num_images": "--num_images",
}
ROW = ("order", "steps", "cfg", "num_images")  # what distinguishes rows of the table
HEADS = {"num_images": "images", "seconds_per_image": "s/image", "fid": "FID", "is": "IS", "kid": "KID"}


def parse_args(argv=None):
    """The lists, the command, and as `given` the flags of main_lpd.py in it."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = cli.Parser(usage="sweep.py [LISTS] -- COMMAND", description="Evaluate combinations of settings")
    parser.add_argument("--orders", choices=ORDERS, nargs="+")
    parser.add_argument("--steps", type=cli.number(int, 1), nargs="+")
    parser.add_argument("--cfg", type=cli.number(float, 0), nargs="+", help="guidance scales")
    parser.add_argument("--seeds", type=cli.number(int, 0), nargs="+")
    parser.add_argument("--final_images", type=cli.number(int, 2), help="evaluate the best on more images")
    args = parser.parse_args(words[:end])
    args.command = words[end + 1 :]
    if args.command and args.command[0].endswith(".py"):
        args.command.insert(0, sys.executable)
    flags = list(itertools.dropwhile(lambda word: not word.endswith("main_lpd.py"), args.command))
    args.given = main_lpd.parse_args(flags[1:])
    return args


def check(args):
    given = args.given
    several = any(len(values or []) > 1 for values in (args.orders, args.steps, args.cfg, args.seeds))
    if not (given.evaluate and given.output_dir):
        raise cli.UsageError("give the command after --: main_lpd.py --evaluate --output_dir DIR ...")
    if given.lpd_order_file and (args.orders or args.steps):
        raise cli.UsageError("--lpd_order_file is for one order and schedule: no --orders, --steps")
    if args.final_images and not (several and given.fid_stats):
        raise cli.UsageError("--final_images needs --fid_stats and several settings: else there is no best")
    if args.final_images and args.final_images <= given.num_images:
        fewer = f"{args.final_images} is not more than --num_images {given.num_images}"
        raise cli.UsageError(f"--final_images {fewer}")


def evaluate(args, *values):
    """Evaluate one setting, with values in the order of FLAGS (None is the model's default), unless it is
    done already; returns the result. A failed evaluation ends the sweep with its exit status."""
    setting = {key: value for key, value in zip(FLAGS, values, strict=True) if value is not None}
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    words = [str(word) for key, value in setting.items() for word in (FLAGS[key], value)]
    status, _ = run_command([*args.command, *words])
    if status:
        sys.exit(status)
    for path in sorted(Path(args.given.output_dir).glob("*.json")):
        result = read_json(path)
        if all(result.get(key) == value for key, value in setting.items()):
            return result
    raise cli.Failure(f"{args.given.output_dir} has no result of this evaluation")


def main_metric(row):
    """The Frechet distance among a row's metrics (FID, or the distance on other features), else the first."""
    metrics = [name for name in row if f"{name}_spread" in row]
    return next((name for name in metrics if name == "fid" or "frechet_distance" in name), metrics[0])


def summarise(results):
    """One row (dict) for each order, steps, guidance scale and number of images: the number of seeds, each
    metric's mean and spread over them (standard deviation with n - 1, None for one seed), and the seconds for
    generating and decoding an image."""
    groups = defaultdict(list)
    for result in results:
        groups[tuple(result[key] for key in ROW)].append(result)
    rows = []
    for key, group in groups.items():
        row = dict(zip(ROW, key, strict=True)) | {"seeds": len(group)}
        for metric in group[0]["metrics"]:
            if "_std" in metric:
                continue  # over the splits of one evaluation, not over seeds
            values = [result["metrics"][metric] for result in group]
            row[metric] = statistics.fmean(values)
            row[f"{metric}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        seconds = [result["seconds"]["generate"] + result["seconds"]["decode"] for result in group]
        row["seconds_per_image"] = statistics.fmean(seconds) / row["num_images"]
        rows.append(row)
    return rows


def best_row(rows):
    """The row with the least mean Frechet distance."""
    return min(rows, key=lambda row: row[main_metric(row)])


def table(rows):
    """The rows as aligned lines of text."""
    keys = [key for key in rows[0] if not key.endswith("_spread")]
    lines = [[HEADS.get(key, key) for key in keys]]
    for row in rows:
        line = []
        for key in keys:
            spread = row.get(f"{key}_spread")
            text = f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key])
            line.append(text if spread is None else f"{text} ± {spread:.2g}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def plot(path, rows):
    """Plot the main metric against the number of steps where it varies, else against the guidance scale; a
    curve per order, spreads as bars."""
    metric = main_metric(rows[0])
    axis, other = ("steps", "cfg") if len({row["steps"] for row in rows}) > 1 else ("cfg", "steps")
    num_images = min(row["num_images"] for row in rows)
    curves = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[axis]):
        if row["num_images"] == num_images:  # the final evaluation is not comparable with the other points
            spread = row[f"{metric}_spread"]  # None: one seed
            point = (row[axis], row[metric]) if spread is None else (row[axis], row[metric], spread)
            curves[f"{row['order']}, {other} {row[other]:g}"].append(point)
    label = f"{HEADS.get(metric, metric.replace('_', ' '))},\n{num_images} images"
    save_curves(path, curves, xlabel="guidance scale" if axis == "cfg" else "steps", ylabel=label)


def main(argv=None):
    args = parse_args(argv)
    check(args)
    given, seeds = args.given, dict.fromkeys(args.seeds or [args.given.seed])
    orders, steps = args.orders or [given.order], args.steps or [given.generation_steps]
    lists = map(dict.fromkeys, (orders, steps, args.cfg or [given.cfg], seeds))
    results = [evaluate(args, *values, given.num_images) for values in itertools.product(*lists)]
    if args.final_images:
        best = best_row(summarise(results))
        chosen = best["order"], best["steps"], best["cfg"]
        results += [evaluate(args, *chosen, seed, args.final_images) for seed in seeds]
    if os.environ.get("NODE_RANK", "0") != "0":
        return  # the first machine reports
    rows = summarise(results)
    write_csv(Path(given.output_dir, "sweep.csv"), rows)
    plot(Path(given.output_dir, "sweep.png"), rows)
    print(table(rows))
    for line in dict.fromkeys(line for result in results for line in result["warnings"]):
        print(f"warning: {line}")


if __name__ == "__main__":
    cli.run(main)
