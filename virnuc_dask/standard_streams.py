"""Standard output and error whose write errors do not stop a run.

Output that cannot be written is dropped, and the program reports the loss at its end. Only the
command line replaces the streams: in Python they belong to the caller.
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
    """A file that accepts all data, and drops data after its first error.

    Attributes
    ----------
    error : OSError, optional
        The first error.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all data; after an error, drop the rest and all later data."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.error is None:
            try:
                written = super().write(left)
            except OSError as error:
                self.error = error
            else:
                if written is None:  # non-blocking, and its buffer is full
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
    """Replace sys.stdout and sys.stderr by streams that never raise an error.

    Closed standard descriptors are opened on the null device. Otherwise the next file that is
    opened would get the descriptor, and receive the printed text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
    codecs.register_error(_as_can_be.__name__, _as_can_be)
    sys.stdout, sys.stderr = _Output(1, sys.stdout), _Output(2, sys.stderr)


def lost_output() -> str | None:
    """Why some of the standard output was lost, or None if none was.

    Returns
    -------
    str, optional
        None also if the reader of a pipe closed it, or if `protect` was not called.
    """
    if not isinstance(sys.stdout, _Output):
        return None
    sys.stdout.flush()
    error = sys.stdout.descriptor.error
    return None if error is None or error.errno == errno.EPIPE else error.strerror


def _as_can_be(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode characters that an encoding lacks: bytes of file names as they are, others escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)
