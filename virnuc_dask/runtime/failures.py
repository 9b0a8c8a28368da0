"""Classify failures: the run must stop, the chunk is tried again, or the input is the cause."""

from __future__ import annotations

import errno
import random
from collections import deque
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import TypeGuard

from virnuc_dask.encoder.models import Estimate
from virnuc_dask.errors import DeviceLostError
from virnuc_dask.settings import RunConfig

# Errors that every other chunk would meet too.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENXIO}
# Seconds between two checks for attempts that take too long. If a check comes much later, such as
# after the process was stopped or the machine slept, that time does not count as time taken.
LOOK_EVERY_S = 0.2
NOBODY_LOOKED_S = 1.0
# Chunks that are needed for a median, and the most recent chunks that it is taken over.
_ENOUGH, _RECENT = 3, 99
# Deadline before there is a median: seconds for any attempt, and a factor on the estimate. The
# factor is large: a device that is shared or emulates a precision may be far slower.
_UNKNOWN_S, _DOUBT = 600.0, 100.0


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
    """Most attempts in one run at a chunk that raises this error."""
    if isinstance(error, DeviceLostError):
        return inf  # handled as a worker death, which makes the chunk a suspect in the end
    return config.attempts if is_transient(error) else min(2, config.attempts)


def delay(attempt: int, config: RunConfig) -> float:
    """Seconds to wait after an attempt, counted from 1; they double each time, and vary by 50 %.

    The variation spreads the next attempts of chunks that failed at the same time.
    """
    return config.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


@dataclass(frozen=True, slots=True)
class Patience:
    """Times after which a worker counts as hanging.

    Attributes
    ----------
    start : float
        Seconds to load the model.
    least : float
        Seconds for any attempt, whatever its size.
    per_residue : float
        Seconds per residue; applies where the product exceeds `least`.
    """

    start: float = inf
    least: float = inf
    per_residue: float = 0.0

    def allowed(self, residues: int) -> float:
        """Seconds that encoding this many residues may take."""
        return max(self.least, self.per_residue * residues)


FOREVER = Patience()


class Pace:
    """Deadline of an attempt, from a running median of the time per residue of earlier attempts.

    Until there are enough attempts, the deadline follows from an estimate.
    """

    def __init__(self, config: RunConfig, estimate: Estimate) -> None:
        self._config, self._estimate = config, estimate
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def took(self, residues: int, seconds: float) -> None:
        """Record an attempt that succeeded."""
        self._recent.append(seconds / max(1, residues))

    def patience(self) -> Patience:
        """Deadlines from now on."""
        least, first = self._config.deadline_floor, self._config.deadline_first
        start = max(least, _UNKNOWN_S + self._estimate.load_s if first is None else first)
        if len(self._recent) >= _ENOUGH:
            return Patience(start, least, self._config.deadline_factor * median(self._recent))
        if first is not None:
            return Patience(start, start)
        return Patience(start, max(least, _UNKNOWN_S), _DOUBT / self._estimate.residues_per_s)
