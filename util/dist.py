"""Processes and devices. The one place that chooses a device.

Knows torchrun's environment, process groups and device names. Does not know what is computed. Everything
works alike for one process without torchrun.
"""

import os
import signal
import sys
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
        # With a GPU too, numbers in the memory of the host go by gloo: nothing waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
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


class Agreement:
    """Tells all processes what one of them says, a call later: what is under way meanwhile is not held up.

    Each process calls it equally often with a whole number; it returns the largest of the call before, the
    same on all (0 in the first call). A single process is told its own number at once.
    """

    def __init__(self):
        self._pending = None

    def __call__(self, number):
        if not torch.distributed.is_initialized():
            return number
        before, largest = self._pending, torch.tensor(number)
        work = torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = work, largest
        if before is None:
            return 0
        before[0].wait()
        return before[1].item()


def gather_objects(value):
    """The list of every process's value, by rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def tell(message):
    """Print a line to stderr, once among all processes."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)


def is_echo(error):
    """Whether an error only says that another process is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def first_to_fail(error):
    """Whether this process is the one, among those of torchrun, to tell of a failure; each asks once.

    Who only hears that another is gone gives that one, and torchrun, which then ends this process, ten
    seconds to speak first.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    if is_echo(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = torch.distributed.TCPStore(address, port, timeout=timedelta(seconds=5))
        first = store.add("lpd/failures", 1) == 1
    except RuntimeError:  # with the first machine its store is gone: better told twice than not at all
        return True
    if not first:
        time.sleep(1)  # torchrun ends the others with this process: the first must have spoken
    return first


class Later:
    """A number on a device, fetched without waiting for it; `get()` waits for what is not there yet. The
    tensor must not be written to meanwhile."""

    def __init__(self, tensor):
        self._value, self._event = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self):
        if self._event:
            self._event.synchronize()
        return self._value.item()


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


class GraphCapture:
    """Turns functions without arguments into replays of themselves; all graphs share one memory pool.

    On a CUDA GPU `capture(function)` runs the function twice to warm up, once more to record a CUDA graph,
    and returns a callable that replays the graph and returns the very tensor of the recording. The next
    replay of any graph of this pool may overwrite it: clone it before. The function must not wait for the
    device, and every tensor that it reads must stay where it is. Elsewhere it returns the function.
    """

    def __init__(self, device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, function):
        if self.pool is None:
            return function
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries choose kernels and take their workspaces
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # NCCL's own thread asks for events meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode=mode):
                output = function()

        def replay():
            graph.replay()
            return output

        return replay


def device_name(device):
    """The name of a device: a CUDA GPU's model, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device):
    """Most bytes of the device's own memory taken so far by this process's tensors; 0 where unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
