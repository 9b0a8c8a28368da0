"""The workers of a cluster, as a run sees them: which of them may have its chunks."""

from __future__ import annotations

import time

from distributed import Client

from virnuc_dask.errors import UnfitWorkerError, VirnucError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.events import Listener
from virnuc_dask.runtime.workers import describe_unfit, replace_process
from virnuc_dask.settings import RunConfig

# A worker has threads beyond these for others: of one run, more do not help a device.
_CHUNKS_PER_WORKER = 3
# Keys of chunks, of any run, begin so.
KEYS = "virnuc-embed-"


class Roster:
    """Who works, who has the model, who hangs, who lacks something, and how long they have worked.

    Attributes
    ----------
    window : int
        Chunks to have under way at once.
    threads : int
        Of the workers that are of use.
    worker_s : float
        Seconds that workers were there, all together, up to the last `count`.
    """

    def __init__(self, client: Client, config: RunConfig, emit: Listener) -> None:
        self._client, self._config, self._emit = client, config, emit
        # When each came or was last at a chunk, and those that have the model.
        self._heard: dict[str, float] = {}
        self._ready: set[str] = set()
        # Those that hang, or whose device is lost, until they are gone; and whether for good.
        self._useless: dict[str, bool] = {}
        # Those that lack something, until they are gone.
        self._unfit: dict[str, tuple[str, ...]] = {}
        self._workers, self._since = 0, time.monotonic()
        self.window, self.threads, self.worker_s = 1, 0, 0.0
        self.count()

    def count(self) -> None:
        """Take note of who is there."""
        bad = {*self._useless, *self._unfit}
        there = self._client.nthreads()
        for worker in there:
            self._heard.setdefault(worker, time.monotonic())
        threads = [n for worker, n in there.items() if worker not in bad]
        # One chunk for each thread: what queues on a worker dies with it and gets the blame.
        window = sum(min(n, _CHUNKS_PER_WORKER) for n in threads)
        self.window = self._config.in_flight or max(1, window)
        self.threads = sum(threads)
        self.count_time(len(threads))
        self._emit(events.WorkersChanged(len(threads), self.threads))

    def count_time(self, workers: int = 0) -> None:
        """Take note that from now on so many work."""
        now = time.monotonic()
        self.worker_s += self._workers * (now - self._since)
        self._workers, self._since = workers, now

    def heard(self, worker: str, *, has_model: bool) -> None:
        """Take note that a worker is at a chunk, so that it is of use."""
        self._heard[worker] = time.monotonic()
        if has_model:
            self._ready.add(worker)
        if self._useless.get(worker) is False:  # it does something after all
            del self._useless[worker]
            self.count()

    def gone(self, worker: str) -> None:
        """Forget a worker; another may come under its address."""
        self._heard.pop(worker, None)
        self._ready.discard(worker)
        self._useless.pop(worker, None)
        self._unfit.pop(worker, None)

    def is_ready(self, worker: str) -> bool:
        """Whether it has the model in memory."""
        return worker in self._ready

    def is_useless(self, worker: str) -> bool:
        """Whether it is known to hang."""
        return worker in self._useless

    def last_heard(self, worker: str) -> float:
        """When it came or was last at a chunk, by the monotonic clock."""
        return self._heard.get(worker, 0.0)

    def candidates(self) -> frozenset[str]:
        """Workers that chunks are for; none if they are for any.

        If there are only those that hang, it is them: they may wake up.
        """
        bad = {*self._useless, *self._unfit}
        if not bad:
            return frozenset()
        there = frozenset(self._client.nthreads())
        return there - bad or there - set(self._unfit)

    def replace(self, worker: str, *, for_good: bool = False) -> bool:
        """End a worker's process, if there is a nanny to start another; else use it no more.

        Nor if others have tasks or data there, which would be lost.

        Parameters
        ----------
        worker : str
        for_good : bool
            It will be of no use again, whatever it says.

        Returns
        -------
        bool
            Whether another takes its place.
        """
        found = self._client.scheduler_info(n_workers=-1)["workers"].get(worker)
        if found is None:
            return True  # gone by itself
        ends = found["nanny"] is not None and not self._serves_others(worker)
        if ends:
            replace_process(self._client, worker)
        if worker not in self._useless:
            self._useless[worker] = ends or for_good
            self.count()
        return ends

    def _serves_others(self, worker: str) -> bool:
        # Of all workers: Dask raises if it is asked of one that is gone by now.
        there = self._client.processing(), self._client.has_what()
        keys = [key for held in there for key in held.get(worker, ())]
        return not all(str(key).startswith(KEYS) for key in keys)

    def set_aside(self, error: UnfitWorkerError) -> None:
        """Leave a worker alone that lacks something, as long as there is another.

        Raises
        ------
        VirnucError
            There is none.
        """
        workers = set(self._client.nthreads())
        if error.worker in workers - set(self._unfit):
            self._unfit[error.worker] = error.lacks
            self._emit(events.WorkerUnfit(error.worker, error.lacks))
            self.count()
        if workers and workers <= set(self._unfit):
            raise VirnucError(
                "no worker is left that can do this run; the same command goes on\n"
                + describe_unfit(self._unfit)
            )
