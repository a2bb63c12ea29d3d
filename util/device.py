"""Devices: which one to use, moving tensors, timing, and CUDA graphs. Device names are chosen only here."""

import errno
import os
import time

import torch

COPIES = ("SLURM_STEP_NUM_TASKS", "NNODES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun, run.py and mpirun


def choose_device(name="auto", local_rank=0):
    """A torch device by name; auto takes a GPU if there is one. Raises ValueError: no such name, or copies of
    this process would do the same work. OSError: this machine lacks the device (ENODEV)."""
    refuse_copies()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    here = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind not in here:
        raise ValueError(f"--device: {name!r} is not one of auto, cpu, cuda, mps")
    if not here[kind]():
        raise OSError(errno.ENODEV, "no such GPU is available here", f"--device {name}")
    if name == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            raise OSError(errno.ENODEV, f"only {count} GPUs are here", f"local rank {local_rank}")
        name = f"cuda:{local_rank}"
    if kind == "cuda":
        torch.cuda.set_device(name)
    return torch.device(name)


def refuse_copies():
    """Refuse to be one of several processes that a launcher started alike: each would do all the work."""
    one_of_its_kind = "RANK" in os.environ or "SLURM_PTY_PORT" in os.environ  # torchrun's; of `srun --pty`
    for name in () if one_of_its_kind else COPIES:
        if int(copies := os.environ.get(name, 1)) > 1:
            raise ValueError(
                f"{name} is {copies}: that many copies of this program would do the same work; start one, "
                "or one torchrun on each machine, as scripts/common.sh does"
            )


def is_cuda(device):
    """Whether the device is a CUDA GPU."""
    return device.type == "cuda"


def to_device(tensor, device):
    """The tensor on a device, without waiting for a CUDA GPU to take it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device):
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device):
    """A CUDA GPU's model, else the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(model, device, *, bf16):
    """A line for the start of a program: a model's class and parameters, the device, the precision."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    precision = "bfloat16" if bf16 else "float32"
    return f"{type(model).__name__}: {parameters:,} parameters; {device_name(device)}{threads}; {precision}"


def free_memory(device):
    """Free bytes of the device's own memory; 0 if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def peak_memory(device):
    """Most bytes of the device's own memory that this process's tensors took so far; 0 if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class _ClockEvent:
    """The interface of `torch.cuda.Event` by the clock."""

    def __init__(self, device):
        self.device = device

    def record(self):
        synchronize(self.device)
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


def timing_event(device):
    """An event with `record()` and `elapsed_time(end)` in milliseconds. On a CUDA GPU nothing waits: call the
    event's `synchronize` before reading times."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _ClockEvent(device)


class AsyncCopy:
    """A tensor on a device, copied to the host in the background; `get()` waits for it if need be. The tensor
    must not be written to meanwhile."""

    def __init__(self, tensor):
        self._value, self._event = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self):
        if self._event:
            self._event.synchronize()
        return self._value


def matmul_rate(device, dtype, *, size=None):
    """Operations a second (two per multiply-add) of a square matrix product, the best of several.

    `size` defaults to 2,048 on a CPU and 8,192 on a GPU, where both reach their rate; in bfloat16 to 512 on a
    CPU, which may have no instructions for it and take minutes for more.
    """
    on_cpu = 2048 if dtype == torch.float32 else 512
    size = size or (on_cpu if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    calls = 1 if device.type == "cpu" else 10  # so that a GPU's launch does not count
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 * calls / min(seconds)


class GraphCapture:
    """Turns functions without arguments into replays of themselves; all graphs share one memory pool.

    On a CUDA GPU `capture(function)` warms the function up, records it as a CUDA graph, and returns a
    callable that replays the graph and returns the recorded output tensor. The next replay from this pool may
    overwrite that tensor: clone it first. The function must not wait for the device, and the tensors it reads
    must keep their addresses. On other devices the function itself is returned.
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
                for _ in range(2):  # libraries choose kernels and allocate workspaces
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": NCCL's own thread queries events meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = function()

        def replay():
            graph.replay()
            return output

        return replay
