"""Processes: torchrun's environment, collectives, and the signals that ask a run to stop.

Everything works alike for a single process without torchrun.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from util.device import choose_device

ALONE_AT_MOST = timedelta(hours=12)  # that the main process works while the others wait
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def init(device_name="auto", timeout=10):
    """Join the processes that torchrun started, if any, and choose the device. Returns the World.

    timeout: minutes that a process waits for the others before it ends with an error.
    """
    global _roll_call, _alone_group
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if not torch.distributed.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that is killed cannot stop its processes
            threading.Thread(target=_follow_launcher, args=[os.getppid()], daemon=True).start()
        # CPU tensors go through gloo even beside a GPU, so that agreeing on a stop never waits for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=timeout))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*address, is_master=False)
        _roll_call = gather_objects(socket.gethostname()), store
        _alone_group = torch.distributed.new_group(backend="gloo", timeout=ALONE_AT_MOST)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def leave(status):
    """End this process with an exit status. A member of a process group ends at once: to take the group apart
    can deadlock (torch 2.6 to 2.14: it waits, holding Python's lock, for threads that need the lock to drop
    tensors), and the interpreter's end can abort the group's threads."""
    if not torch.distributed.is_initialized():
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier():
    """Wait for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def main_alone():
    """Inside it the others wait hours for the main process, not `init`'s timeout; its death they notice."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.barrier(_alone_group)


def all_sum(tensor):
    """Sum a tensor over all processes, in place; returns it."""
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


def gather_to_main(value):
    """The list of every process's value, by rank, on the first process; elsewhere None."""
    if not torch.distributed.is_initialized():
        return [value]
    main = torch.distributed.get_rank() == 0
    values = [None] * torch.distributed.get_world_size() if main else None
    torch.distributed.gather_object(value, values)
    return values


def once(make):
    """What `make()` returns on the first process, on all of them; only there it is called, for hours if need
    be."""
    if not torch.distributed.is_initialized():
        return make()
    made = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(made, group=_alone_group)
    return made[0]


def say(message, file=None):
    """Print a line, once among all processes; bytes of names that are not text as escapes."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(message.encode(errors="backslashreplace").decode(), file=file, flush=True)


def warn(message):
    """Print a line to stderr, once among all processes."""
    say(message, file=sys.stderr)


class Agreement:
    """The largest number that any process passes, known to all one call later, so that no step waits for it.

    Every process must call it equally often. The first call returns 0; a single process gets its own number
    back at once.
    """

    def __init__(self):
        self._pending = None

    def __call__(self, number):
        if not torch.distributed.is_initialized():
            return number
        previous, largest = self._pending, torch.tensor(number)
        work = torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = work, largest
        if previous is None:
            return 0
        previous[0].wait()
        return previous[1].item()


def is_peer_failure(error):
    """Whether an error only says that another process is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


_roll_call = None  # the process group's hosts by rank, and a connection to its store
_alone_group = None  # the same processes, which wait for ALONE_AT_MOST


def describe_loss(error, seconds=10):
    """A line about a peer failure, which takes `seconds`: the processes that are lost, and where they ran.

    Each process that is well reports to the store, which is on the machine of rank 0: if it does not answer,
    all there are lost.
    """
    if _roll_call is None:
        return str(error)
    (hosts, store), rank, well = _roll_call, torch.distributed.get_rank(), []

    def report():
        store.set(f"report/{rank}", "")
        time.sleep(seconds)
        well.extend(r for r in range(len(hosts)) if store.check([f"report/{r}"]))

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    ranks = [r for r, host in enumerate(hosts) if (r not in well if well else host == hosts[0])]
    lost = ", ".join(f"process {r} on {hosts[r]}" for r in ranks) or "another process for a while"
    return f"process {rank} on {hosts[rank]} got no answer from {lost} ({str(error).splitlines()[0]})"


class Stopped(Exception):
    """A run ended early and in good order because a signal asked for it."""

    def __init__(self, number, message):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number  # the exit status a shell reports


class StopRequest:
    """Inside it a stop signal is noted instead of ending the process: `number` is the first one's, or 0.

    A second Ctrl-C interrupts at once. To be entered by the main thread.
    """

    def __enter__(self):
        self.number = 0
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._previous = {each: signal.signal(each, self._note) for each in {*STOP_SIGNALS} - nohup}
        return self

    def _note(self, number, frame):
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    def __exit__(self, kind, error, trace):
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        if self.number and is_peer_failure(error):  # the launcher stops us because a peer failed: stay silent
            signal.raise_signal(self.number)


# Processes that must not outlive another.


def _follow_launcher(pid):
    while os.getppid() == pid:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def start_worker(*_):
    """Begin a worker process, forked, spawned or of a fork server: it leaves stop signals to the process that
    wants it, and ends when that is gone, whatever it is doing.

    Without this a worker whose parent was killed stays forever once the pipe to it is full: the thread that
    writes waits for a reader, of which the worker itself holds an end, and the worker for that thread.
    """
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # not getppid(): a fork server is in between
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def ending_workers():
    """If the code inside fails or is interrupted, worker processes end at once, even while reading."""
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them as lost
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
