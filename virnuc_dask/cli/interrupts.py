"""Ctrl-C at any time, from program start to exit: one line, exit code 130, no traceback."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SAID = "interrupted; nothing is lost: run the same command again"


def leave_at_interrupt() -> None:
    """Make Ctrl-C end this process at once, unless it is ignored, as for a background job.

    An exception is not enough: during imports some modules replace or swallow it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        # Registered first, so called last: no Python handler runs in the rest of the shutdown.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt in this block, so that the work can clean up."""
    if signal.getsignal(signal.SIGINT) is not _leave:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, _frame: object) -> None:
    # If the write blocks because nobody reads it, a second Ctrl-C ends the process.
    signal.signal(number, signal.SIG_DFL)
    try:
        os.write(2, f"{SAID}\n".encode())
    finally:
        os._exit(128 + number)
