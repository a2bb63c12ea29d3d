"""Time the order generator: `python benchmarks/bench_orders.py --output_file benchmarks/results/NAME.json`.

For the published files of each image size: wall and processor time of all orders, made by several processes
but not written, and the mean score of the last group.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import record
from orders.plot import step_statistics
from orders.run_lpd_order import generate_orders
from orders.schedule import cosine_group_sizes
from util.files import write_json

CASES = {  # grid size, steps, repulsion threshold, most seconds
    "256 px, 20 steps, repulsion 2": (16, 20, 2, 10),
    "512 px, 48 steps, repulsion 4": (32, 48, 4, 60),
}


def processor_seconds():
    """Of this process and of its workers that have ended."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def measured(case, num_orders, workers):
    """The figures of one case, a dict."""
    grid_size, steps, repulsion, limit = case
    sizes = cosine_group_sizes(grid_size**2, steps)
    settings = {"kind": "lpd", "group_sizes": sizes, "grid_size": grid_size, "repulsion_threshold": repulsion}
    load = os.getloadavg()[0]
    wall, cpu = time.perf_counter(), processor_seconds()
    orders = np.concatenate(list(generate_orders(num_orders, workers, settings)))
    wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
    scores, _ = step_statistics(orders[:2000], sizes, grid_size)
    return {
        "seconds": round(wall, 2),
        "limit_seconds": limit,
        "processor_seconds": round(cpu, 2),
        "processor_microseconds_per_order": round(1e6 * cpu / num_orders),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "mean_score_of_last_group": round(float(scores[:, -1].mean()), 3),
    }


def main():
    parser = argparse.ArgumentParser(description="Time the order generator.")
    parser.add_argument("--num_runs", type=int, default=60000, help="orders of each case")
    parser.add_argument("--max_workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output_file", type=Path, help="where the results go, .json")
    args = parser.parse_args()
    cases = {name: measured(case, args.num_runs, args.max_workers) for name, case in CASES.items()}
    results = record(torch.device("cpu"), orders=args.num_runs, workers=args.max_workers, cases=cases)
    for name, case in cases.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in case.items()))
    if args.output_file:
        write_json(args.output_file, results)


if __name__ == "__main__":
    main()
