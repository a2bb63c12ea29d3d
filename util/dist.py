"""Processes and devices. The one place that chooses a device.

Knows torchrun's environment, process groups and device names. Does not know what is computed. Everything
works alike for one process without torchrun.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def choose_device(name="auto", local_rank=0):
    """A torch device by its name; auto takes a GPU where there is one.

    Raises:
        ValueError: the named device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA GPU is available here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: no such GPU is available here")
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device: {name!r} is none of auto, cpu, cuda, mps")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are here")
        return torch.device("cuda", local_rank)
    return torch.device(name)


def init(device_name="auto"):
    """Join the processes that torchrun started (or be the only one) and choose the device."""
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def finish():
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier():
    """Wait for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def all_sum(tensor):
    """The sum of a tensor over all processes, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """The list of every process's value, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def to_device(tensor, device):
    """The tensor on a device; the processor does not wait for a CUDA GPU to take it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_nvidia(device):
    """Whether the device is a CUDA GPU: only there some ways to compute exist, or pay."""
    return device.type == "cuda"


def free_memory(device):
    """Free bytes of the device's own memory; 0 where unknown or where it has none of its own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def synchronize(device):
    """Wait until the device has done its work (for timing)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class _ClockEvent:
    """As `torch.cuda.Event`, for devices that are waited for."""

    def __init__(self, device):
        self.device = device

    def record(self):
        synchronize(self.device)
        self.time = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.time - self.time)


def timing_event(device):
    """An event with `record()` and `elapsed_time(later)` in milliseconds. A CUDA GPU is not waited for:
    `synchronize` before times are asked for."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _ClockEvent(device)


def device_name(device):
    """The name of a device: a CUDA GPU's model, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device):
    """Most bytes of the device's own memory taken so far by this process's tensors; 0 where unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
