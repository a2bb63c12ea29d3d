"""How a member of a process group ends: at once, so that none of the group's threads can hold or abort it."""

import signal

import processes

# The first of two members is a child of the second.
ENDING = """
import atexit, os, signal, sys
from util import cli, distributed
class Last:
    def __del__(self):
        os.write(2, b"the interpreter ends")
last = Last()
atexit.register(print, " atexit", end="")
child = os.fork()
if child:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"; {status}; ", end="")
    os.environ["MASTER_PORT"] = sys.argv[1]
def main():
    distributed.init("cpu")
    print("buffered", end="")
    if child:
        raise distributed.Stopped(signal.SIGTERM, "so")
cli.run(main)
"""


def test_member_flushes_but_leaves_the_interpreter_out():
    with processes.group(1) as (first,), processes.group(1) as (second,):
        outcome = processes.python("-c", ENDING, second["MASTER_PORT"], **first)
    printed = "buffered atexit; 0; buffered atexit"
    assert outcome == processes.Outcome(128 + signal.SIGTERM, printed, "stopped: SIGTERM: so\n")
