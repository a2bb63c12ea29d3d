"""Time the order generator: `python benchmarks/bench_orders.py --output_file benchmarks/results/orders_NAME`.

For two of the published files, one of each image size, it measures in one run: wall and processor time of
all orders; the plain reference of the tests on a few; the bytes that picking cells moves, the time it takes,
and the rate at which one plain pass moves bytes here; and the peak memory. Writes NAME.json and NAME.md,
with the machine's load beside the figures. Knows nothing of files: what is timed is making the orders.
"""

import argparse
import json
import os
import platform
import random
import resource
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import numpy as np  # noqa: E402
from reference_orders import reference_order  # noqa: E402

from orders import lpd_order  # noqa: E402
from orders.run_lpd_order import generate_orders  # noqa: E402
from orders.schedule import cosine_group_sizes  # noqa: E402

CASES = {  # grid size, steps, repulsion threshold, reference orders, most seconds
    "256 px, 20 steps, repulsion 2": (16, 20, 2, 40, 10),
    "512 px, 48 steps, repulsion 4": (32, 48, 4, 4, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the order generator.")
    parser.add_argument("--num_runs", type=int, default=60000, help="orders of each case")
    parser.add_argument("--max_workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output_file", type=Path, help="name of the results, without suffix")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the results")
    args = parser.parse_args()
    results = {
        "machine": {"processor": processor_name(), "cpus": os.cpu_count(), "numpy": np.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "note": args.note,
        "orders": args.num_runs,
        "workers": args.max_workers,
        "cases": {name: measured(case, args.num_runs, args.max_workers) for name, case in CASES.items()},
        "peak_memory_gb": peak_memory(args.max_workers),
    }
    text = as_markdown(results)
    print(text)
    if args.output_file:
        args.output_file.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        args.output_file.with_suffix(".md").write_text(text)


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def peak_memory(workers: int) -> float:
    """GB: this process's peak, and the largest worker's for each of them."""
    own, child = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return round((own + (workers if workers > 1 else 0) * child) / 2**20, 2)


def measured(case: tuple, num_orders: int, workers: int) -> dict:
    grid_size, steps, repulsion, num_reference, limit = case
    sizes = cosine_group_sizes(grid_size**2, steps)
    settings = {"kind": "lpd", "group_sizes": sizes, "grid_size": grid_size, "repulsion_threshold": repulsion}
    load = os.getloadavg()[0]
    wall, cpu = time.perf_counter(), processor_seconds()
    kept = np.concatenate(list(generate_orders(num_orders, workers, settings)))  # as a program keeps them
    wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
    assert len(kept) == num_orders
    del kept
    begin, rng = time.process_time(), random.Random(0)
    for _ in range(num_reference):
        reference_order(sizes, grid_size, 1.0, repulsion, rng)
    reference = (time.process_time() - begin) / num_reference
    return {
        "seconds": round(wall, 2),
        "limit_seconds": limit,
        "processor_seconds": round(cpu, 2),
        "processor_microseconds_per_order": round(1e6 * cpu / num_orders),
        "reference_orders": num_reference,
        "reference_processor_microseconds_per_order": round(1e6 * reference),
        "times_less_processor_time_than_reference": round(reference * num_orders / cpu),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        **picking(sizes, grid_size, repulsion),
        "gb_per_second_of_one_pass": round(rate_of_one_pass(grid_size)),
    }


def picking(group_sizes: tuple[int, ...], grid_size: int, repulsion: float) -> dict:
    """The passes over all cells that each pick makes: bytes read and written an order, rate, share of time.

    Counted on single chunks, of which the fastest of 10 counts, from what the two inner functions take and
    return. A near pick: argmax (4 bytes a cell), tables copied (8), and-ed (12). A pick folded into the
    distances: tables copied (4 on these grids), least taken (6); a sampled one: widened (6), tie bits (12),
    argmax (4).
    """
    chunk = lpd_order.CELLS_PER_CHUNK // grid_size**2
    take_near, take_farthest = lpd_order._take_near, lpd_order._take_farthest
    moved = seconds = 0

    def counted_near(near, size, rules):
        nonlocal moved, seconds
        begin = time.perf_counter()
        picks, taken = take_near(near, size, rules)
        seconds += time.perf_counter() - begin
        moved += near.size * 24 * min(size, taken.max() + 1)
        return picks, taken

    def counted_farthest(picks, taken, free, tie, rules):
        nonlocal moved, seconds
        moved += free.size * 10 * len(picks) + free.shape[1] * 22 * (len(picks) - taken).sum()
        begin = time.perf_counter()
        picks = take_farthest(picks, taken, free, tie, rules)
        seconds += time.perf_counter() - begin
        return picks

    lpd_order._take_near, lpd_order._take_farthest = counted_near, counted_farthest
    runs = []
    for _ in range(10):
        moved = seconds = 0
        begin = time.perf_counter()
        lpd_order.lpd_orders(chunk, group_sizes, grid_size, repulsion_threshold=repulsion)
        runs.append((time.perf_counter() - begin, seconds, float(moved)))
    lpd_order._take_near, lpd_order._take_farthest = take_near, take_farthest
    whole, seconds, moved = min(runs)
    return {
        "microseconds_per_order_of_a_chunk_alone": round(1e6 * whole / chunk),
        "megabytes_moved_by_picks_per_order": round(moved / chunk / 1e6, 2),
        "gb_per_second_of_picks": round(moved / seconds / 1e9),
        "share_of_time_in_picks": round(seconds / whole, 2),
    }


def rate_of_one_pass(grid_size: int) -> float:
    """GB/s, read and written, of a plain and of two arrays of a chunk's size on one core: the best of 200."""
    keys = np.ones(lpd_order.CELLS_PER_CHUNK // grid_size**2 * grid_size**2, np.uint32)
    allowed = np.ones_like(keys)
    best = float("inf")
    for _ in range(200):
        begin = time.perf_counter()
        np.bitwise_and(keys, allowed, out=keys)
        best = min(best, time.perf_counter() - begin)
    return keys.size * 12 / best / 1e9


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def as_markdown(results: dict) -> str:
    machine = results["machine"]
    lines = [
        f"# {results['orders']:,} locality-aware orders, {results['date']}",
        "",
        f"{machine['processor']}, {machine['cpus']} CPUs, {results['workers']} processes, "
        f"NumPy {machine['numpy']}. Peak memory {results['peak_memory_gb']} GB. Made, not written to files.",
        results["note"],
        "",
        "| | " + " | ".join(results["cases"]) + " |",
        "|---|" + "---|" * len(results["cases"]),
    ]
    for key in next(iter(results["cases"].values())):
        cells = " | ".join(str(case[key]) for case in results["cases"].values())
        lines.append(f"| {key.replace('_', ' ')} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
