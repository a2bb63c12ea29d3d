"""Processes of the tests: how they are started, waited for, and looked at.

Importing torch and the programs takes five seconds of a core. Most processes are therefore forked from a
server that has done so; those whose subject is the interpreter or the launcher itself start from scratch.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, forkserver
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path.stem for path in REPO.glob("main_*.py"))
WAIT = 400  # seconds: no test waits longer for one event, on however busy a machine
GRACE = 60  # seconds for the members of a group of which one has failed
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LPD_INCEPTION", "TORCHELASTIC_ERROR_FILE")
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# A shell starts background commands with Ctrl-C ignored, which the programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread, like the processes that tests start: their results are compared bit for bit with this one's.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def finished(outcome):
    """The outcome, which must be a success."""
    assert outcome.status == 0, f"exit status {outcome.status}\n{outcome.out}\n{outcome.err}"
    return outcome


def wait_for(condition, what, seconds=WAIT):
    """The first true value of `condition()`, which must come."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return value


def environment():
    """The variables that a process gets: one thread, on the CPU."""
    return {name: value for name, value in os.environ.items() if name not in HIDDEN} | QUIET


# Forked processes.


@lru_cache(maxsize=1)
def _server():
    """The multiprocessing context whose processes have imported the programs, and what these import when they
    need it."""
    context = multiprocessing.get_context("forkserver")
    lazily = ["matplotlib.backends.backend_agg", "timm", "torch._dynamo", "torch_fidelity"]
    context.set_forkserver_preload(["processes", *lazily, *PROGRAMS])
    before, path = dict(os.environ), [str(REPO), str(REPO / "tests")]
    os.environ.update({**QUIET, "PYTHONPATH": os.pathsep.join(path)})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become(words, variables, cwd, out, err):
    """Be `python WORDS` in this process, which was just forked; stdout and stderr go to files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # this Python's own, for the workers of the program
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def fork(*words, cwd=None, out=os.devnull, err=os.devnull, **variables):
    """Start `python WORDS`; returns the multiprocessing.Process."""
    words, cwd = [str(word) for word in words], str(cwd or tempfile.gettempdir())
    for path in (out, err):
        open(path, "w").close()  # so that it can be read at once
    process = _server().Process(
        target=_become, args=(words, {**environment(), **variables}, cwd, str(out), str(err))
    )
    process.start()
    return process


def forked(*words, cwd=None, places=({},)):
    """The Outcome of `python WORDS`, as a process for each of `places`, which are variables that it gets. The
    first that fails gives the exit status; the others are ended if they do not end by themselves."""
    with tempfile.TemporaryDirectory(prefix="lpd-processes-") as folder:
        logs = [[Path(folder, f"{rank}.{kind}") for kind in ("out", "err")] for rank in range(len(places))]
        processes = [
            fork(*words, cwd=cwd, out=out, err=err, **place)
            for place, (out, err) in zip(places, logs, strict=True)
        ]
        end, status = time.monotonic() + WAIT, 0
        while waiting := [process for process in processes if process.exitcode is None]:
            connection.wait([process.sentinel for process in waiting], max(0, end - time.monotonic()))
            if time.monotonic() > end:
                for process in waiting:
                    process.kill()
            failed = next((process.exitcode for process in processes if process.exitcode), 0)
            if failed and not status:
                status, end = failed, min(end, time.monotonic() + GRACE)
        out, err = ("".join(path.read_text() for path in kind) for kind in zip(*logs, strict=True))
        return Outcome(status, out, err)


def start(program, *argv, cwd=None):
    """Run main_PROGRAM.py as a process of its own, from another working directory."""
    return forked(REPO / f"main_{program}.py", *argv, cwd=cwd)


@contextmanager
def group(count):
    """The variables of each of `count` processes that form a group, as torchrun sets them. The store through
    which they find one another is this process's: no port is chosen before it is taken."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size, address = str(count), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared = {**address, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def forked_group(count, *words):
    """The Outcome of `python WORDS` as a group of `count` processes."""
    with group(count) as places:
        return forked(*words, places=places)


def torchrun(count, program, *argv):
    """Run main_PROGRAM.py as `count` processes, as torchrun would."""
    return forked_group(count, REPO / f"main_{program}.py", *argv)


# New interpreters.


def python(*words, cwd=None, **variables):
    """Run `python WORDS`."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], env={**environment(), **variables}, capture_output=True,
        text=True, cwd=cwd or tempfile.gettempdir(), timeout=WAIT,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def background(*words, **pipes):
    """Start `python WORDS`; returns the Popen, whose output is discarded unless `pipes` say otherwise."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **pipes}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment(), text=True, **pipes)


def agent(count, *words):
    """Run a program's processes under scripts/cli/agent.py."""
    return python(REPO / "scripts/cli/agent.py", "--nproc_per_node", count, *words)


def free_port():
    """A port that nothing listens to, and that stays free: the kernel chooses none below 20000 by itself, and
    other processes of the tests begin at another number."""
    for port in range(10000 + os.getpid() % 9000, 20000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# Processes that run.


def children(pid):
    """The ids of a process's children and their children."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except FileNotFoundError:
        return []
    own = [int(child) for part in lists for child in part]
    return own + [each for child in own for each in children(child)]


def running(pid):
    """Whether there is a process of that id that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
