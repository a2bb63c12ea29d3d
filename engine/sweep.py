"""Results of several evaluations side by side: mean and spread over seeds, a table, a CSV, a plot.

Knows what `engine.evaluate` returns. Does not run anything.
"""

import csv
import statistics
from collections import defaultdict

from util.files import atomic
from util.pictures import save_curves

SETTINGS = ("order", "steps", "cfg", "num_images")
COLUMNS = {"fid": "FID", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}


def setting_key(result):
    """What distinguishes the settings of a sweep: order, steps and guidance scale."""
    return result["order"], result["steps"], result["cfg"]


def is_frechet(metric):
    """Whether a metric is a Frechet distance (FID, or one on other features)."""
    return metric == "fid" or metric.startswith("frechet_distance")


def summarise(results):
    """One dict per setting: the settings, number of seeds, each metric's mean and spread over them, seconds.

    The spread is the standard deviation (of n - 1), None for one seed. The seconds are of generating and
    decoding an image.
    """
    groups = defaultdict(list)
    for result in results:
        groups[(*setting_key(result), result["num_images"])].append(result)
    rows = []
    for key, group in groups.items():
        row = dict(zip(SETTINGS, key, strict=True)) | {"seeds": len(group)}
        for metric in group[0]["metrics"]:
            if "_std" in metric:
                continue  # of the splits of one evaluation, not over seeds
            values = [result["metrics"][metric] for result in group]
            row[metric] = statistics.fmean(values)
            row[f"{metric}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        seconds = [sum(result["seconds"][p] for p in ("generate", "decode")) for result in group]
        row["seconds_per_image"] = statistics.fmean(seconds) / row["num_images"]
        rows.append(row)
    return rows


def best_setting(results):
    """The key of the setting with the least mean Frechet distance.

    Raises:
        ValueError: there is no Frechet distance, for want of reference statistics.
    """
    rows = summarise(results)
    metric = next((name for name in rows[0] if is_frechet(name) and not name.endswith("_spread")), None)
    if metric is None:
        raise ValueError("--final_images needs --fid_stats: without them there is no best setting")
    return setting_key(min(rows, key=lambda row: row[metric]))


def table(rows):
    """The rows of `summarise` as lines of text."""
    metrics = [k for k in rows[0] if f"{k}_spread" in rows[0]]
    heads = ["order", "steps", "cfg", "images", "seeds", *(COLUMNS.get(m, m) for m in metrics), "s/image"]
    lines = [heads]
    for row in rows:
        values = [
            f"{row[m]:.4g}" + (f" ± {row[f'{m}_spread']:.2g}" if row[f"{m}_spread"] is not None else "")
            for m in metrics
        ]
        first = [
            row["order"],
            str(row["steps"]),
            f"{row['cfg']:g}",
            str(row["num_images"]),
            str(row["seeds"]),
        ]
        lines.append([*first, *values, f"{row['seconds_per_image']:.4f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def write_csv(path, rows):
    """Write the rows of `summarise`, atomically."""
    with atomic(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot_sweep(path, rows):
    """Plot the Frechet distance (else the first metric) against steps or guidance scale, a curve per order.

    Against steps where several step counts were evaluated, else against the guidance scale. Bars are spreads.
    """
    metrics = [k for k in rows[0] if f"{k}_spread" in rows[0]]
    metric = next((name for name in metrics if is_frechet(name)), metrics[0])
    axis, other = ("steps", "cfg") if len({row["steps"] for row in rows}) > 1 else ("cfg", "steps")
    least = min(row["num_images"] for row in rows)
    curves = defaultdict(list)
    for row in sorted(rows, key=lambda row: row[axis]):
        if row["num_images"] == least:  # the final evaluation of a sweep compares with no other point
            spread = row[f"{metric}_spread"] or 0.0
            curves[f"{row['order']}, {other} {row[other]:g}"].append((row[axis], row[metric], spread))
    named = {name: tuple(zip(*points, strict=True)) for name, points in curves.items()}
    label = COLUMNS.get(metric, metric.replace("_", " "))
    save_curves(
        path, named, xlabel="guidance scale" if axis == "cfg" else "steps", ylabel=f"{label},\n{least} images"
    )
