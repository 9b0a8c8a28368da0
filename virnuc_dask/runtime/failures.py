"""Classify failures: the run must stop, the chunk is tried again, or the input is the cause."""

from __future__ import annotations

import errno
import random
from math import inf
from typing import TypeGuard

from virnuc_dask.errors import DeviceLostError
from virnuc_dask.settings import RunConfig

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


def attempts(error: BaseException, config: RunConfig) -> float:
    """Most attempts in one run at a chunk that raises this error; see `RunConfig.attempts`."""
    if isinstance(error, DeviceLostError):
        return inf  # handled as a worker death, which makes the chunk a suspect in the end
    return config.attempts if is_transient(error) else min(2, config.attempts)


def delay(attempt: int, config: RunConfig) -> float:
    """Seconds to wait after an attempt, counted from 1; they double each time, and vary by 50 %.

    The variation spreads the next attempts of chunks that failed at the same time.
    """
    return config.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret
