"""Classify failures: the run must stop, the chunk is tried again, or the input is the cause."""

from __future__ import annotations

import errno
from typing import TypeGuard

# Errors that every other chunk would meet too.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENXIO}


def is_hopeless(error: BaseException) -> TypeGuard[OSError]:
    """Whether no chunk can be written: a full or read-only disk, no permission, or no bucket."""
    return isinstance(error, OSError) and error.errno in _HOPELESS


def is_transient(error: BaseException) -> bool:
    """Whether waiting may help: memory, I/O, connections, timeouts (the last are `OSError`)."""
    return isinstance(error, OSError | MemoryError) and not is_hopeless(error)


def is_sticky(error: BaseException) -> bool:
    """Whether the process can no longer compute: after a CUDA error all later calls fail too.

    The same holds once cuBLAS has run out of memory, even after memory is free again.
    """
    texts = ("CUDA error", "Triton Error [CUDA]")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_of_the_input(error: BaseException) -> bool:
    """Whether single rows may be the cause of an encoder's error.

    Errors of the machine are not: I/O, memory, or a CUDA error that stops the whole process.
    """
    return not isinstance(error, OSError | MemoryError) and not is_sticky(error)
