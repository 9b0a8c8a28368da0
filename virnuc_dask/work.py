"""Chunks on their way through a cluster: submitted, reported, tried again, given up."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from dask import delayed
from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from virnuc_dask import events, retry
from virnuc_dask.config import RunConfig, Status
from virnuc_dask.embed import ChunkReport, embed_chunk
from virnuc_dask.errors import (
    DeviceLostError,
    NotAStoreError,
    StoreError,
    UnfitWorkerError,
    UsageError,
    VirnucError,
)
from virnuc_dask.events import Listener
from virnuc_dask.isolate import embed_chunk_apart
from virnuc_dask.retry import Patience
from virnuc_dask.store import Store
from virnuc_dask.workers import (
    SCHEDULER_LOST,
    TOPIC,
    Needs,
    describe_unfit,
    embed_on_worker,
    holders,
    replace_process,
)

# Of the grace after a signal, this much is kept for closing the cluster.
_CLOSING_S = 5.0
# What a report and an event about it have in common.
_TOOK = ("read_s", "wait_s", "compute_s", "write_s", "fill", "memory", "gpu", "pid")
# How often one looks for chunks that take too long.
_LOOK_EVERY_S = 0.2
# A worker has threads beyond these for others: of one run, more do not help a device.
_CHUNKS_PER_WORKER = 3


@dataclass(slots=True)
class _Attempt:
    """A chunk that was handed to the scheduler at a time, or begun by a worker since then.

    While some workers are bad, it is for the others.
    """

    chunk: int
    future: Future
    since: float
    worker: str = ""
    others: frozenset[str] = frozenset()


class Work:
    """Chunks on their way through a cluster; all of it in one thread, fed by one queue."""

    def __init__(
        self,
        store: Store,
        needs: Needs,
        config: RunConfig,
        emit: Listener,
        costs: dict[int, int],
    ) -> None:
        self.store, self.needs, self.config, self.emit = store, needs, config, emit
        self.costs = costs
        self.reports: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.counted: set[int] = set()
        self.errors: dict[int, str] = {}
        self.workers_lost = 0
        self.retries = 0
        self.seconds = 0.0
        self.signal: int | None = None
        self.stopped: str | None = None
        self._attempts: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self._suspects: set[int] = set()
        self._pace = retry.Pace(config)
        self._looked = 0.0
        # Workers that have the model.
        self._ready: set[str] = set()
        # Workers that hang, or whose device is lost, until they are gone.
        self._useless: set[str] = set()
        # Those that lack something, until they are gone.
        self._unfit: dict[str, tuple[str, ...]] = {}
        self._submitted = 0
        self._todo: deque[int] = deque()
        # Chunks that failed, with the time at which they are tried again. Nobody waits for them.
        self._later: list[tuple[float, int]] = []
        self._running: dict[str, _Attempt] = {}
        # Completed futures and the scheduler's events about workers, in the order they come.
        self._inbox: SimpleQueue[Future | dict[str, Any]] = SimpleQueue()
        self._window = 1
        # Of how many workers, since when; and their seconds so far, all and computing.
        self._workers, self._since = 0, 0.0
        self._worker_s = self._busy_s = 0.0
        self._id = uuid4().hex[:8]

    def drive(self, client: Client, missing: list[int]) -> None:
        """Have chunks computed until none is left, or a signal and its grace have passed."""
        self._todo.extend(missing)
        self._count_workers(client)
        for topic in ("all", TOPIC):
            client.subscribe_topic(topic, self._on_event)
        began = time.monotonic()
        try:
            deadline: float | None = None
            while self._running or (self._has_more() and self._goes_on()):
                if self._goes_on():
                    self._submit(client)
                elif self.signal is None:
                    pass  # what runs may finish
                elif deadline is None:
                    grace = max(0.0, self.config.grace - _CLOSING_S)
                    deadline = time.monotonic() + grace
                    self.emit(events.Stopping(self.signal, len(self._running), grace))
                elif time.monotonic() > deadline:
                    break
                self._look_for_overdue(client)
                try:
                    item = self._inbox.get(timeout=_LOOK_EVERY_S)
                except Empty:
                    continue
                if isinstance(item, dict):
                    self._worker_event(client, item)
                else:
                    self._completed(client, item)
        except CommClosedError as error:
            raise VirnucError(SCHEDULER_LOST) from error
        finally:
            self.seconds = time.monotonic() - began
            self._count_time(0)
            if client.status == "running":
                for topic in ("all", TOPIC):
                    client.unsubscribe_topic(topic)
                client.cancel([attempt.future for attempt in self._running.values()], force=True)
            self._running.clear()

    def _has_more(self) -> bool:
        return bool(self._todo or self._later)

    def _goes_on(self) -> bool:
        return self.signal is None and self.stopped is None

    def _submit(self, client: Client) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            self._todo.append(heappop(self._later)[1])
        while self._todo and len(self._running) < self._window:
            chunk = self._todo.popleft()
            self._submitted += 1
            key = f"embed-{self._id}-{chunk}-{self._submitted}"
            embed: Callable[..., ChunkReport] = embed_chunk
            more: tuple[Patience, ...] = ()
            if chunk in self._suspects:
                embed, more = embed_chunk_apart, (self._pace.patience(),)
            task = delayed(embed_on_worker, pure=False)(
                self.needs, key, embed, chunk, *more, dask_key_name=key
            )
            bad = self._useless | set(self._unfit)
            others = frozenset(client.nthreads()) - bad if bad else frozenset()
            future = client.compute(
                task, workers=list(others) or None, allow_other_workers=bool(others)
            )
            self._running[key] = _Attempt(chunk, future, time.monotonic(), others=others)
            future.add_done_callback(self._inbox.put)

    def _completed(self, client: Client, future: Future) -> None:
        if str(future.key) not in self._running:
            return  # taken back, and submitted anew
        attempt = self._running[str(future.key)]
        chunk = attempt.chunk
        try:
            report = future.result()
        except NotAStoreError as error:
            raise StoreError(
                f"a worker does not find the store: {error}. Finished chunks are as safe as it is;"
                " once it is there again, the same command resumes"
            ) from error
        except UsageError:
            raise  # no other worker and no other attempt will do better
        except FutureCancelledError as error:
            raise VirnucError(SCHEDULER_LOST) from error
        except KilledWorker:
            # Dask itself gives up a task after some deaths. We do not: a death condemns no row.
            self._suspect(chunk)
        except UnfitWorkerError as error:
            self._set_aside(client, error)
            heappush(self._later, (time.monotonic() + max(1.0, self.config.backoff), chunk))
        except DeviceLostError as error:
            self._replace(client, error.worker)
            self._deaths[chunk] += 1
            if not self._suspect_if_due(chunk):
                self._failed(chunk, error)
        except Exception as error:
            if client.status != "running":
                # The result cannot be had any more; no chunk is to blame.
                raise VirnucError(SCHEDULER_LOST) from error
            # Whatever it was, the chunk is not there, which is all that counts.
            self._failed(chunk, error)
        else:
            if report.computed and chunk not in self._suspects:
                # Not what it waited for other chunks, of which one may have been about to fail.
                seconds = report.read_s + report.compute_s + report.write_s
                self._pace.took(self.costs[chunk], seconds)
            self._done(report, attempt.worker)
        # Only now: what is still in here when an error leaves is cancelled on the way.
        del self._running[str(future.key)]
        future.release()

    def _done(self, report: ChunkReport, worker: str) -> None:
        self.errors.pop(report.chunk, None)
        residues = self.costs[report.chunk]
        quarantined = 0
        if report.computed:
            self.counts.update(report.counts)
            self.counted.add(report.chunk)
            self._busy_s += report.compute_s
            self.reports.update(chunks=1, rows=report.rows, residues=residues)
            quarantined = sum(n for s, n in report.counts.items() if Status[s.upper()].quarantined)
        took = {name: getattr(report, name) for name in _TOOK}
        self.emit(
            events.ChunkDone(
                report.chunk,
                report.rows,
                residues,
                quarantined,
                report.computed,
                worker,
                **took,
            )
        )

    def _failed(self, chunk: int, error: Exception) -> None:
        self._attempts[chunk] += 1
        attempt = self._attempts[chunk]
        final = retry.is_hopeless(error) or attempt >= retry.attempts(error, self.config)
        self.errors[chunk] = f"{type(error).__name__}: {error}"
        if not final:
            heappush(self._later, (time.monotonic() + retry.delay(attempt, self.config), chunk))
            self.retries += 1
        self.emit(events.ChunkFailed(chunk, attempt, self.errors[chunk], final))
        if retry.is_hopeless(error) and self.stopped is None:
            self.stopped = self.store.place.explain(error)
            self.emit(events.CannotGoOn(self.stopped, len(self._running) - 1))

    # --- workers ---

    def _on_event(self, event: tuple[float, Any]) -> None:
        """Called in the client's own thread."""
        _, message = event
        actions = ("add-worker", "remove-worker", "started")
        if isinstance(message, dict) and message.get("action") in actions:
            self._inbox.put(message)

    def _worker_event(self, client: Client, message: dict[str, Any]) -> None:
        if message["action"] == "started":
            self._ready.add(message["worker"])
            if attempt := self._running.get(message.get("key", "")):
                attempt.worker, attempt.since = message["worker"], time.monotonic()
                if attempt.worker in self._useless:  # it does something after all
                    self._useless.remove(attempt.worker)
                    self._count_workers(client)
            return
        if message["action"] == "remove-worker":
            self._ready.discard(message["worker"])
            self._useless.discard(message["worker"])
            self._unfit.pop(message["worker"], None)
        if message["action"] == "remove-worker" and not message.get("expected", False):
            keys = self._running.keys() & map(str, message.get("processing-tasks", ()))
            chunks = sorted(self._running[key].chunk for key in keys)
            self.workers_lost += 1
            self.retries += len(chunks)
            self.emit(events.WorkerLost(str(message["worker"]), tuple(chunks)))
            self._deaths.update(chunks)
            for key, attempt in list(self._running.items()):
                if self._suspect_if_due(attempt.chunk):
                    self._take_back(client, key)
                elif key in keys or attempt.worker == message["worker"]:
                    attempt.worker, attempt.since = "", time.monotonic()
        if message["action"] == "add-worker":
            self._wake(client)
        self._count_workers(client)

    def _wake(self, client: Client) -> None:
        """Submit anew what was for workers that are all gone.

        If there was no worker at all when the last of them went, Dask never looks at the task
        again, although others may have it.
        """
        there = client.nthreads()
        for key, attempt in list(self._running.items()):
            if attempt.others and not attempt.worker and attempt.others.isdisjoint(there):
                self._take_back(client, key)
                self._todo.appendleft(attempt.chunk)

    def _look_for_overdue(self, client: Client) -> None:
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked, patience = time.monotonic(), self._pace.patience()
        late: list[str] = []
        for key, attempt in self._running.items():
            allowed = patience.allowed(self.costs[attempt.chunk])
            if not attempt.worker and self.config.in_flight:
                allowed *= self.config.in_flight  # others may be computed before it
            # The child processes of a suspect have deadlines of their own; that a worker does not
            # answer at all, the scheduler notices.
            if self._looked - attempt.since > allowed and attempt.chunk not in self._suspects:
                late.append(key)
        has = holders(client) if any(not self._running[key].worker for key in late) else {}
        for key in late:
            attempt = self._running[key]
            chunk, worker = attempt.chunk, attempt.worker or has.get(key)
            if worker is None:  # there is no worker to begin with it
                attempt.since = self._looked
                continue
            seconds = self._looked - attempt.since
            if worker not in self._ready and seconds <= patience.start:
                continue
            self._take_back(client, key)
            self._deaths[chunk] += 1
            self.retries += 1
            replaced = self._replace(client, worker)
            self.emit(events.ChunkOverdue(chunk, worker, seconds, replaced))
            if not self._suspect_if_due(chunk):
                self._todo.append(chunk)

    def _take_back(self, client: Client, key: str) -> None:
        client.cancel([self._running.pop(key).future], force=True)

    def _replace(self, client: Client, worker: str) -> bool:
        """End a worker's process, if there is a nanny to start another; else use it no more."""
        found = client.scheduler_info(n_workers=-1)["workers"].get(worker)
        if found is None:
            return True  # gone by itself
        if worker not in self._useless:
            self._useless.add(worker)
            if found["nanny"]:
                replace_process(client, worker)
            self._count_workers(client)
        return found["nanny"] is not None

    def _set_aside(self, client: Client, error: UnfitWorkerError) -> None:
        """Leave a worker alone that lacks something, as long as there is another."""
        workers = set(client.nthreads())
        if error.worker in workers - set(self._unfit):
            self._unfit[error.worker] = error.lacks
            self.emit(events.WorkerUnfit(error.worker, error.lacks))
            self._count_workers(client)
        if workers and workers <= set(self._unfit):
            raise VirnucError(
                "no worker is left that can do this run; the same command goes on\n"
                + describe_unfit(self._unfit)
            )

    def _suspect_if_due(self, chunk: int) -> bool:
        due = self._deaths[chunk] >= self.config.suspect_after and chunk not in self._suspects
        if due:
            self._suspect(chunk)
        return due

    def _suspect(self, chunk: int) -> None:
        if chunk not in self._suspects:
            self._suspects.add(chunk)
            self.emit(events.ChunkSuspected(chunk, self._deaths[chunk]))
        self._todo.appendleft(chunk)

    def _count_workers(self, client: Client) -> None:
        bad = self._useless | set(self._unfit)
        threads = [n for worker, n in client.nthreads().items() if worker not in bad]
        # One chunk for each thread: what queues on a worker dies with it and gets the blame.
        window = sum(min(n, _CHUNKS_PER_WORKER) for n in threads)
        self._window = self.config.in_flight or max(1, window)
        self._count_time(len(threads))
        self.emit(events.WorkersChanged(len(threads), sum(threads)))

    def _count_time(self, workers: int) -> None:
        now = time.monotonic()
        self._worker_s += self._workers * (now - self._since)
        self._workers, self._since = workers, now

    @property
    def busy(self) -> float | None:
        """Share of the workers' time in which they computed, of chunks that were done."""
        return self._busy_s / self._worker_s if self._worker_s else None
