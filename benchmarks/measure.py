"""Timing for the benchmarks, this machine's own rates, and the facts that go with every result."""

import json
import platform
import resource
import shlex
import sys
import time
from datetime import date

import torch

from util.device import device_name, peak_memory, synchronize
from util.files import write_json


def seconds_in_turns(functions, device, *, n=5, warm_up=1):
    """Time several functions in turns, so that load from elsewhere hits all of them.

    Args:
        functions: dict of name -> callable without arguments. n: timed calls of each. warm_up: calls before.
    Returns:
        dict of name -> list of n seconds.
    """
    seconds = {name: [] for name in functions}
    for turn in range(-warm_up, n):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bandwidth(device, *, num_bytes=2**29):
    """Bytes a second of reading memory: a sum over `num_bytes` of float32, the best of several."""
    x = torch.ones(num_bytes // 4, device=device)
    calls = 1 if device.type == "cpu" else 10
    times = seconds_in_turns({"": lambda: [x.sum() for _ in range(calls)]}, device, n=7)[""]
    return num_bytes * calls / min(times)


def publish(report, output_file, line):
    """Write a report to a JSON file, or print it if none is given; then print the line that sums it up."""
    if output_file:
        write_json(output_file, report)
    else:
        print(json.dumps(report, indent=1))
    print(f"{report['device']}: {line}")


def record(device, **measured):
    """The measured values after the date, command, device and versions; for a JSON file."""
    return {
        "date": str(date.today()),
        "command": shlex.join(sys.argv),
        "device": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **measured,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_device_memory_gb": round(peak_memory(device) / 2**30, 2),
    }
