"""Ctrl-C, from the program's first moment to its last: one line, exit code 130, no traceback."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SAID = "interrupted; the same command goes on"


def leave_at_interrupt() -> None:
    """Have Ctrl-C end this process at once, unless it is ignored, as in a shell's background.

    An exception would not do: while modules are imported some turn it into another, or drop it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        # Registered first, and so called last: what is left of Python's end runs no handler.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt instead, for work that leaves something to clean up."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, _frame: object) -> None:
    # Where nobody reads the line, a second one ends the waiting.
    signal.signal(number, signal.SIG_DFL)
    try:
        os.write(2, f"{SAID}\n".encode())
    finally:
        os._exit(128 + number)
