"""What a failure means: nothing can go on, try again later, or it is the input's own."""

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

# What every other chunk would meet too.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENXIO}
# How often one looks for what takes too long. If nobody looked for much longer, as when all was
# stopped or the machine slept, that time says nothing about those who were looked at.
LOOK_EVERY_S = 0.2
NOBODY_LOOKED_S = 1.0
# Chunks after which it is known how long one takes, and those that count.
_ENOUGH, _RECENT = 3, 99
# Until then: seconds that anything may take, and times the estimate, which a device that emulates a
# precision or is shared with others may miss by far.
_UNKNOWN_S, _DOUBT = 600.0, 100.0


def is_hopeless(error: BaseException) -> TypeGuard[OSError]:
    """Whether no chunk can be written any more: a full, read-only or forbidden disk, no bucket."""
    return isinstance(error, OSError) and error.errno in _HOPELESS


def is_transient(error: BaseException) -> bool:
    """Whether waiting may help: memory, I/O, connections, timeouts; the latter are `OSError`."""
    return isinstance(error, OSError | MemoryError) and not is_hopeless(error)


def is_sticky(error: BaseException) -> bool:
    """Whether the process is of no use any more: after a CUDA error all that follow fail too.

    So it is after cuBLAS has once found no memory left, also when there is some again.
    """
    texts = ("CUDA error", "Triton Error [CUDA]")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_of_the_input(error: BaseException) -> bool:
    """Whether an error of the encoder may be due to single rows.

    Not what the machine does: I/O, memory, or a CUDA error, after which a process is of no use.
    """
    return not isinstance(error, OSError | MemoryError) and not is_sticky(error)


def attempts(error: BaseException, config: RunConfig) -> float:
    """How often a chunk that raises this is tried in one run."""
    if isinstance(error, DeviceLostError):
        return inf  # as a death, which makes it suspect in the end
    return config.attempts if is_transient(error) else min(2, config.attempts)


def delay(attempt: int, config: RunConfig) -> float:
    """Seconds to wait after an attempt, counted from 1: twice as long each time, give or take half.

    The spread keeps chunks that failed together from coming back together.
    """
    return config.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one waits before somebody counts as hanging.

    Attributes
    ----------
    start : float
        Seconds to load the model.
    least : float
        Seconds to encode anything.
    per_residue : float
        Seconds to encode a residue, where that is more.
    """

    start: float = inf
    least: float = inf
    per_residue: float = 0.0

    def allowed(self, residues: int) -> float:
        """Seconds to encode so many residues."""
        return max(self.least, self.per_residue * residues)


FOREVER = Patience()


class Pace:
    """How long an attempt may take, from how long others took: a running median per residue.

    As long as none is known, it follows from an estimate.
    """

    def __init__(self, config: RunConfig, estimate: Estimate) -> None:
        self._config, self._estimate = config, estimate
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def took(self, residues: int, seconds: float) -> None:
        """Take note of an attempt that succeeded."""
        self._recent.append(seconds / max(1, residues))

    def patience(self) -> Patience:
        """What is to be waited for from now on."""
        least, first = self._config.deadline_floor, self._config.deadline_first
        start = max(least, _UNKNOWN_S + self._estimate.load_s if first is None else first)
        if len(self._recent) >= _ENOUGH:
            return Patience(start, least, self._config.deadline_factor * median(self._recent))
        if first is not None:
            return Patience(start, start)
        return Patience(start, max(least, _UNKNOWN_S), _DOUBT / self._estimate.residues_per_s)
