"""Signals that ask a run to end in good order.

Knows which these are, how they are noted and what exit status tells of them. Does not know what a run does
before it ends.
"""

import signal

from util import dist

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """A run ended before its time, in good order, because a signal asked for it."""

    def __init__(self, number, message):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number  # as a shell tells it


class StopRequest:
    """Inside it a signal that asks for an end is noted: `number` is the first one's, or 0. A second Ctrl-C
    interrupts at once. To be entered by the main thread."""

    def __enter__(self):
        self.number = 0
        self._before = {each: signal.signal(each, self._note) for each in ASKING}
        return self

    def _note(self, number, frame):
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    def __exit__(self, kind, error, trace):
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if self.number and dist.is_echo(error):  # asked to end because another process is gone: in silence
            signal.raise_signal(self.number)


def leave_to_parent(*_):
    """Ignore these signals in a process that ends when its parent is done with it."""
    for each in ASKING:
        signal.signal(each, signal.SIG_IGN)
