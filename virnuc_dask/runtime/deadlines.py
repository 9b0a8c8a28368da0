"""How long a chunk may take before it counts as hanging.

The usual limits are `settings.RunConfig.deadline_factor` and `deadline_floor`. The constants here
are for the time before there is a median.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf
from statistics import median

from virnuc_dask.encoder.models import Estimate
from virnuc_dask.settings import RunConfig

# Seconds between two checks for attempts that take too long. If a check comes much later, such as
# after the process was stopped or the machine slept, that time does not count as time taken.
LOOK_EVERY_S = 0.2
NOBODY_LOOKED_S = 1.0
# Chunks that are needed for a median, and the most recent chunks that it is taken over.
_ENOUGH, _RECENT = 3, 99
# Deadline before there is a median: seconds for any attempt, and a factor on the estimate. The
# factor is large: a device that is shared or emulates a precision may be far slower.
_UNKNOWN_S, _DOUBT = 600.0, 100.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Times after which an attempt at a chunk counts as hanging.

    Attributes
    ----------
    start_s : float
        Seconds to load the model.
    floor_s : float
        Seconds for any attempt, whatever its size.
    per_residue_s : float
        Seconds per residue; applies where the product exceeds `floor_s`.
    """

    start_s: float = inf
    floor_s: float = inf
    per_residue_s: float = 0.0

    def allowed_s(self, residues: int) -> float:
        """Seconds that encoding this many residues may take."""
        return max(self.floor_s, self.per_residue_s * residues)


NO_DEADLINES = Deadlines()


class RunningDeadlines:
    """Deadlines from a running median of the time per residue of earlier attempts.

    Until there are enough attempts, they follow from an estimate.
    """

    def __init__(self, config: RunConfig, estimate: Estimate) -> None:
        self._config, self._estimate = config, estimate
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def took(self, residues: int, seconds: float) -> None:
        """Record an attempt that succeeded."""
        self._recent.append(seconds / max(1, residues))

    def now(self) -> Deadlines:
        """Deadlines from now on."""
        floor, first = self._config.deadline_floor, self._config.deadline_first
        start = max(floor, _UNKNOWN_S + self._estimate.load_s if first is None else first)
        if len(self._recent) >= _ENOUGH:
            return Deadlines(start, floor, self._config.deadline_factor * median(self._recent))
        if first is not None:
            return Deadlines(start, start)
        return Deadlines(start, max(floor, _UNKNOWN_S), _DOUBT / self._estimate.residues_per_s)
