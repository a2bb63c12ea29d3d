"""How a member of a process group ends: at once, so that none of the group's threads can hold or abort it."""

import signal

import processes
import pytest

ENDING = """
import atexit, os, signal, sys
from util import cli, distributed
class Last:
    def __del__(self):
        os.write(2, b"the interpreter ends")
last = Last()
atexit.register(print, " atexit", end="")
def main():
    distributed.init("cpu")
    print("buffered", end="")
    {ending}
cli.run(main)
"""


@pytest.mark.parametrize(
    "ending, status, line",
    [
        ("pass", 0, ""),
        ("raise distributed.Stopped(signal.SIGTERM, 'so')", 128 + signal.SIGTERM, "stopped: SIGTERM: so\n"),
    ],
)
def test_member_flushes_but_leaves_the_interpreter_out(ending, status, line):
    with processes.group(1) as (place,):
        outcome = processes.python("-c", ENDING.format(ending=ending), **place)
    assert outcome == processes.Outcome(status, "buffered atexit", line)
