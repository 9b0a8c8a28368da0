"""The workers of a cluster as a run sees them, and which of them may get its chunks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distributed import Client

from virnuc_dask.errors import UnfitWorkerError, VirnucError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.dask_cluster import ask_scheduler
from virnuc_dask.runtime.events import Listener
from virnuc_dask.runtime.local import THREADS_PER_GPU
from virnuc_dask.runtime.requirements import describe_unfit
from virnuc_dask.runtime.workers import replace_process
from virnuc_dask.settings import RunConfig

# More do not make a device faster; further threads of a worker are for others.
_MOST_CHUNKS_PER_WORKER = THREADS_PER_GPU
# Prefix of the keys of chunks of all runs.
KEYS = "virnuc-embed-"


class KnownWorkers:
    """The workers: which have the model, hang or lack something, and the time they were present.

    Attributes
    ----------
    present : frozenset of str
        Addresses of all workers.
    window : int
        Most chunks to submit at a time.
    threads : int
        Threads of the usable workers.
    worker_s : float
        Seconds that usable workers were present, summed over workers, up to the last `count`.
    """

    def __init__(self, client: Client, config: RunConfig, emit: Listener) -> None:
        self._client, self._config, self._emit = client, config, emit
        # When each worker joined or last reported about a chunk, and the workers with the model.
        self._heard: dict[str, float] = {}
        self._ready: set[str] = set()
        # Workers that hang or lost their device, until they leave; True if a report does not help.
        self._useless: dict[str, bool] = {}
        # Workers that lack something, until they leave.
        self._unfit: dict[str, tuple[str, ...]] = {}
        # What the scheduler did not answer: the count, and workers to replace, as `replace` has it.
        self._is_stale = False
        self._to_replace: dict[str, bool] = {}
        self._workers, self._since = 0, time.monotonic()
        self.present: frozenset[str] = frozenset()
        self.window, self.threads, self.worker_s = 1, 0, 0.0
        self.count()

    def count(self) -> None:
        """Update the counts from the workers that are present."""
        try:
            there: Mapping[str, int] = ask_scheduler(self._client, self._client.scheduler.ncores)
        except TimeoutError:
            self._is_stale = True
            return
        self._is_stale = False
        bad = {*self._useless, *self._unfit}
        self.present = frozenset(there)
        for worker in self.present:
            self._heard.setdefault(worker, time.monotonic())
        threads = [n for worker, n in there.items() if worker not in bad]
        # One chunk per thread: a chunk that queues on a worker is blamed when the worker dies.
        window = sum(min(n, _MOST_CHUNKS_PER_WORKER) for n in threads)
        self.window = self._config.in_flight or max(1, window)
        self.threads = sum(threads)
        self.count_time(len(threads))
        self._emit(events.WorkersChanged(len(threads), self.threads))

    def ask_again(self) -> None:
        """Ask what the scheduler did not answer; call this now and then."""
        if self._is_stale:
            self.count()
        while self._to_replace and not self._is_stale:
            worker, for_good = self._to_replace.popitem()
            self.replace(worker, for_good=for_good)

    def count_time(self, workers: int = 0) -> None:
        """Add the time up to now, and set the number of workers from now on."""
        now = time.monotonic()
        self.worker_s += self._workers * (now - self._since)
        self._workers, self._since = workers, now

    def heard(self, worker: str, *, has_model: bool) -> None:
        """Record that a worker reported about a chunk, so it is usable."""
        self._heard[worker] = time.monotonic()
        if has_model:
            self._ready.add(worker)
        if self._useless.get(worker) is False:  # it works again
            del self._useless[worker]
            self.count()

    def gone(self, worker: str) -> None:
        """Forget a worker, because another may join with its address."""
        self._heard.pop(worker, None)
        self._ready.discard(worker)
        self._useless.pop(worker, None)
        self._unfit.pop(worker, None)
        self._to_replace.pop(worker, None)
        self.present -= {worker}

    def is_ready(self, worker: str) -> bool:
        """Whether a worker has the model in memory."""
        return worker in self._ready

    def is_useless(self, worker: str) -> bool:
        """Whether a worker is known to hang or to have lost its device."""
        return worker in self._useless

    def last_heard(self, worker: str) -> float:
        """Time on the monotonic clock when a worker joined or last reported about a chunk."""
        return self._heard.get(worker, 0.0)

    def candidates(self) -> frozenset[str]:
        """Return the workers that should compute chunks; empty if any worker may.

        If no worker is usable, return those that hang, because they may recover.
        """
        bad = {*self._useless, *self._unfit}
        if not bad:
            return frozenset()
        return self.present - bad or self.present - set(self._unfit)

    def replace(self, worker: str, *, for_good: bool = False) -> bool:
        """End a worker's process if its nanny can start another; else stop using the worker.

        The process is also kept if it holds tasks or data of others, which would be lost.

        Parameters
        ----------
        worker : str
        for_good : bool
            The worker stays useless even if it reports again.

        Returns
        -------
        bool
            Whether another process replaces it.
        """
        try:
            answer = ask_scheduler(self._client, self._client.scheduler.identity, n_workers=-1)
            info = answer["workers"].get(worker)
            if info is None:
                return True  # it has left already
            ends = info["nanny"] is not None and not self._serves_others(worker)
        except TimeoutError:
            ends, self._to_replace[worker], self._is_stale = False, for_good, True
        if ends:
            replace_process(self._client, worker)
        if worker not in self._useless:
            self._useless[worker] = ends or for_good
            self.count()
        return ends

    def _serves_others(self, worker: str) -> bool:
        # Ask about all workers, because Dask raises if one that has left is named.
        held = (
            self.processing(),
            ask_scheduler(self._client, self._client.scheduler.has_what, workers=None),
        )
        keys = [key for each in held for key in each.get(worker, ())]
        return not all(str(key).startswith(KEYS) for key in keys)

    def processing(self) -> Mapping[str, Any]:
        """Keys of the tasks that each worker has, of all users of the scheduler.

        Raises
        ------
        TimeoutError
            The scheduler does not answer.
        """
        answer: Mapping[str, Any] = ask_scheduler(
            self._client, self._client.scheduler.processing, workers=None
        )
        return answer

    def set_aside(self, error: UnfitWorkerError) -> None:
        """Give no chunks to a worker that lacks something, as long as another is usable.

        Raises
        ------
        VirnucError
            No other worker is usable.
        """
        self.count()
        if error.worker in self.present - set(self._unfit):
            self._unfit[error.worker] = error.lacks
            self._emit(events.WorkerUnfit(error.worker, error.lacks))
            self.count()
        if self.present and self.present <= set(self._unfit):
            raise VirnucError(
                "no worker is left that can do this run; `resume` goes on\n"
                + describe_unfit(self._unfit)
            )
