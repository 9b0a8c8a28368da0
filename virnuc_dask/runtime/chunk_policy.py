"""When a chunk is tried, tried again, suspected or given up, and when an attempt hangs.

Pure: times are arguments, and nothing here knows Dask, a store or a clock. `chunk_window` asks it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from virnuc_dask.errors import DeviceLostError
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.deadlines import Deadlines
from virnuc_dask.settings import RunConfig

# Seconds, at least, until a chunk that an unfit worker got is tried again.
_UNFIT_S = 1.0


class Failure(NamedTuple):
    """An attempt that raised: its number, counted from 1, and whether the chunk is given up."""

    attempt: int
    is_final: bool


def most_attempts(error: BaseException, config: RunConfig) -> float:
    """Most attempts in one run at a chunk that raises this error; see `RunConfig.attempts`."""
    if isinstance(error, DeviceLostError):
        return inf  # handled as a worker death, which makes the chunk a suspect in the end
    return config.attempts if failures.is_transient(error) else min(2, config.attempts)


def delay(attempt: int, config: RunConfig) -> float:
    """Seconds to wait after an attempt, counted from 1; they double each time, and vary by 50 %.

    The variation spreads the next attempts of chunks that failed at the same time.
    """
    return config.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret


class ChunkQueue:
    """The chunks that wait to be submitted, and what earlier attempts at them have told.

    Attributes
    ----------
    errors : dict of int to str
        Error of the last attempt at each chunk that failed and is not done.
    deaths : Counter of int
        Workers that died or hung while they computed each chunk.
    suspects : set of int
        Chunks that are computed in child processes, because one of their rows may kill.
    retries : int
        Attempts that had to be repeated.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._todo: deque[int] = deque()
        # Failed chunks, with the time of their next attempt. Other chunks do not wait for them.
        self._later: list[tuple[float, int]] = []
        self._attempts: Counter[int] = Counter()
        self.errors: dict[int, str] = {}
        self.deaths: Counter[int] = Counter()
        self.suspects: set[int] = set()
        self.retries = 0

    def __bool__(self) -> bool:
        return bool(self._todo or self._later)

    def add(self, chunks: Iterable[int]) -> None:
        """Append chunks."""
        self._todo.extend(chunks)

    def add_first(self, chunk: int) -> None:
        """Have a chunk submitted before all others."""
        self._todo.appendleft(chunk)

    def take(self, most: int, now: float) -> list[int]:
        """Remove up to this many chunks that are due, and return them."""
        while self._later and self._later[0][0] <= now:
            self._todo.append(heappop(self._later)[1])
        return [self._todo.popleft() for _ in range(min(most, len(self._todo)))]

    def done(self, chunk: int) -> None:
        """Forget a chunk's error."""
        self.errors.pop(chunk, None)

    def failed(self, chunk: int, error: Exception, now: float) -> Failure:
        """Have a chunk that raised tried again later, unless that is hopeless or too often."""
        self._attempts[chunk] += 1
        attempt = self._attempts[chunk]
        is_final = failures.is_hopeless(error) or attempt >= most_attempts(error, self._config)
        self.errors[chunk] = f"{type(error).__name__}: {error}"
        if not is_final:
            heappush(self._later, (now + delay(attempt, self._config), chunk))
            self.retries += 1
        return Failure(attempt, is_final)

    def refused(self, chunk: int, now: float) -> None:
        """Have a chunk tried again later that got to an unfit worker, which is no failure."""
        heappush(self._later, (now + max(_UNFIT_S, self._config.backoff), chunk))

    def died(self, chunk: int) -> bool:
        """Count a worker that died or hung with a chunk.

        Returns
        -------
        bool
            Whether that makes the chunk a suspect; it is then the next to be submitted.
        """
        self.deaths[chunk] += 1
        is_due = self.deaths[chunk] >= self._config.suspect_after
        return is_due and chunk not in self.suspects and self.suspect(chunk)

    def suspect(self, chunk: int) -> bool:
        """Make a chunk a suspect, submitted next; return whether it was none before."""
        is_new = chunk not in self.suspects
        self.suspects.add(chunk)
        self.add_first(chunk)
        return is_new


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A submitted chunk.

    Attributes
    ----------
    chunk : int
    since : float
        Time of its submission, or of the worker's last message.
    others : frozenset of str
        Workers that should compute it; empty: any.
    with_children : Deadlines, optional
        Deadlines of the child processes of a suspect chunk.
    worker : str
        Empty until a worker starts the chunk.
    """

    chunk: int
    since: float
    others: frozenset[str] = frozenset()
    with_children: Deadlines | None = None
    worker: str = ""

    def allowed_s(self, residues: int, deadlines: Deadlines) -> float:
        """Seconds without a message after which it is late."""
        if self.worker and self.with_children:
            # Child processes have their own deadlines. The worker sends a message when a child
            # starts and when it finishes a part, for which it may load the model twice.
            deadlines = self.with_children
            return 2 * deadlines.start_s + deadlines.allowed_s(residues)
        return deadlines.allowed_s(residues)


@dataclass(frozen=True, slots=True)
class Holder:
    """The worker to which the scheduler assigned a chunk that it has not started.

    Attributes
    ----------
    is_busy : bool
        It computes another chunk of the run.
    is_useless : bool
        It is known to hang or to have lost its device.
    has_tasks_of_others : bool
        Tasks of other users of the scheduler queue on it.
    is_ready : bool
        It has the model in memory.
    heard : float
        When it joined or last sent a message.
    """

    is_busy: bool = False
    is_useless: bool = False
    has_tasks_of_others: bool = False
    is_ready: bool = False
    heard: float = 0.0


class Verdict(Enum):
    """What to do about an attempt that is late."""

    WAIT = auto()
    # No worker can start it yet, so its time begins now.
    BEGIN_AGAIN = auto()
    # Another worker should compute it. The chunk is not a suspect.
    MOVE = auto()
    # It hangs: its worker is replaced, and the chunk may be the cause.
    OVERDUE = auto()


def judge_late(
    attempt: Attempt, holder: Holder | None, residues: int, deadlines: Deadlines, now: float
) -> tuple[Verdict, float]:
    """Say what to do about an attempt that took longer than `Attempt.allowed_s`.

    Parameters
    ----------
    attempt : Attempt
    holder : Holder, optional
        Worker that has the chunk in its queue, if it has not started and there is one.
    residues : int
        Residues to encode.
    deadlines : Deadlines
    now : float

    Returns
    -------
    verdict : Verdict
    seconds : float
        How long nothing was heard.
    """
    silent_s = now - attempt.since
    if attempt.worker:
        return Verdict.OVERDUE, silent_s
    if holder is None:
        return Verdict.BEGIN_AGAIN, silent_s
    if holder.is_busy:  # it waits for another chunk, which has its own deadline
        return Verdict.WAIT, silent_s
    if holder.is_useless or holder.has_tasks_of_others:
        return Verdict.MOVE, silent_s
    silent_s = now - max(attempt.since, holder.heard)
    allowed_s = attempt.allowed_s(residues, deadlines) if holder.is_ready else deadlines.start_s
    return Verdict.OVERDUE if silent_s > allowed_s else Verdict.WAIT, silent_s
