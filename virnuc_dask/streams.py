"""Standard output and error that stop no run: what cannot be delivered is dropped, and said later.

For the program alone. In Python these streams are the caller's.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class Descriptor(io.FileIO):
    """A file that takes all that is written; after its first error it drops it.

    Attributes
    ----------
    error : OSError, optional
        That error.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or none of what comes after an error."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.error is None:
            try:
                written = super().write(left)
            except OSError as error:
                self.error = error
            else:
                if written is None:  # it does not block, and has no room now
                    select.select([], [self], [])
                left = left[written or 0 :]
        return size


class _Output(io.TextIOWrapper):
    def __init__(self, number: int, before: TextIO | None) -> None:
        self.descriptor = Descriptor(number, "w", closefd=False)
        super().__init__(
            io.BufferedWriter(self.descriptor),
            encoding=before.encoding if before else "utf-8",
            errors=_as_can_be.__name__,
            line_buffering=True,
        )


def protect() -> None:
    """Replace sys.stdout and sys.stderr by streams that raise nothing, whatever they are.

    Those that are closed are opened, or the next file that is opened would be what is printed to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(number, True)
    codecs.register_error(_as_can_be.__name__, _as_can_be)
    sys.stdout, sys.stderr = _Output(1, sys.stdout), _Output(2, sys.stderr)


def lost_output() -> str | None:
    """Why standard output has not taken all that was said.

    Returns
    -------
    str, optional
        None also for a pipe whose reader has seen enough, and where `protect` was not called.
    """
    if not isinstance(sys.stdout, _Output):
        return None
    sys.stdout.flush()
    error = sys.stdout.descriptor.error
    return None if error is None or error.errno == errno.EPIPE else error.strerror


def _as_can_be(error: UnicodeError) -> tuple[str | bytes, int]:
    """Letters that an encoding lacks: a file name's own bytes, and escapes for all others."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)
