"""Chunks on their way through a cluster: submitted, reported, tried again, given up."""

from __future__ import annotations

import time
from collections import Counter, deque
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from dask import delayed
from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from virnuc_dask import events, retry
from virnuc_dask.config import ModelSpec, RunConfig, Status
from virnuc_dask.embed import ChunkReport, embed_chunk
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.events import Listener
from virnuc_dask.isolate import embed_chunk_apart
from virnuc_dask.store import Store

# Of the grace after a signal, this much is kept for closing the cluster.
_CLOSING_S = 5.0


class Work:
    """Chunks on their way through a cluster; all of it in one thread, fed by one queue."""

    def __init__(
        self,
        store: Store,
        spec: ModelSpec,
        config: RunConfig,
        emit: Listener,
        costs: dict[int, int],
    ) -> None:
        self.store, self.spec, self.config, self.emit = store, spec, config, emit
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
        self._submitted = 0
        self._todo: deque[int] = deque()
        # Chunks that failed, with the time at which they are tried again. Nobody waits for them.
        self._later: list[tuple[float, int]] = []
        self._running: dict[str, tuple[int, Future]] = {}
        # Completed futures and the scheduler's events about workers, in the order they come.
        self._inbox: SimpleQueue[Future | dict[str, Any]] = SimpleQueue()
        self._window = 1
        self._id = uuid4().hex[:8]

    def drive(self, client: Client, missing: list[int]) -> None:
        """Have chunks computed until none is left, or a signal and its grace have passed."""
        self._todo.extend(missing)
        self._count_workers(client)
        client.subscribe_topic("all", self._on_event)
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
                try:
                    item = self._inbox.get(timeout=0.2)
                except Empty:
                    continue
                if isinstance(item, dict):
                    self._worker_event(client, item)
                else:
                    self._completed(item)
        finally:
            self.seconds = time.monotonic() - began
            if client.status == "running":
                client.unsubscribe_topic("all")
                client.cancel([future for _, future in self._running.values()], force=True)
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
            embed = embed_chunk_apart if chunk in self._suspects else embed_chunk
            task = delayed(embed, pure=False)(
                str(self.store.path.resolve()),
                chunk,
                self.store.identity,
                self.spec,
                self.config.device,
                dask_key_name=key,
            )
            future = client.compute(task)
            self._running[key] = (chunk, future)
            future.add_done_callback(self._inbox.put)

    def _completed(self, future: Future) -> None:
        if str(future.key) not in self._running:
            return  # taken back, and submitted anew
        chunk, _ = self._running[str(future.key)]
        try:
            report = future.result()
        except UsageError:
            raise  # no other worker and no other attempt will do better
        except FutureCancelledError as error:
            raise VirnucError(
                "the scheduler was lost. Finished chunks are safe; the same command resumes"
            ) from error
        except KilledWorker:
            # Dask itself gives up a task after some deaths. We do not: a death condemns no row.
            self._suspect(chunk)
        except Exception as error:
            # Whatever it was, the chunk is not there, which is all that counts.
            self._failed(chunk, error)
        else:
            self._done(report)
        # Only now: what is still in here when an error leaves is cancelled on the way.
        del self._running[str(future.key)]
        future.release()

    def _done(self, report: ChunkReport) -> None:
        self.errors.pop(report.chunk, None)
        residues = self.costs[report.chunk]
        quarantined = 0
        if report.computed:
            self.counts.update(report.counts)
            self.counted.add(report.chunk)
            self.reports.update(chunks=1, rows=report.rows, residues=residues)
            quarantined = sum(n for s, n in report.counts.items() if Status[s.upper()].quarantined)
        self.emit(
            events.ChunkDone(
                report.chunk,
                report.rows,
                residues,
                quarantined,
                report.computed,
                report.read_s,
                report.compute_s,
                report.write_s,
                report.pid,
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
            self.stopped = retry.explain(error, self.store.path)
            self.emit(events.CannotGoOn(self.stopped, len(self._running) - 1))

    # --- workers ---

    def _on_event(self, event: tuple[float, Any]) -> None:
        """Called in the client's own thread."""
        _, message = event
        if isinstance(message, dict) and message.get("action") in ("add-worker", "remove-worker"):
            self._inbox.put(message)

    def _worker_event(self, client: Client, message: dict[str, Any]) -> None:
        if message["action"] == "remove-worker" and not message.get("expected", False):
            keys = map(str, message.get("processing-tasks", ()))
            chunks = sorted(self._running[key][0] for key in keys if key in self._running)
            self.workers_lost += 1
            self.retries += len(chunks)
            self.emit(events.WorkerLost(str(message["worker"]), tuple(chunks)))
            self._deaths.update(chunks)
            for key, (chunk, future) in list(self._running.items()):
                suspect = self._deaths[chunk] >= self.config.suspect_after
                if suspect and chunk not in self._suspects:
                    del self._running[key]
                    client.cancel([future], force=True)
                    self._suspect(chunk)
        self._count_workers(client)

    def _suspect(self, chunk: int) -> None:
        if chunk not in self._suspects:
            self._suspects.add(chunk)
            self.emit(events.ChunkSuspected(chunk, self._deaths[chunk]))
        self._todo.appendleft(chunk)

    def _count_workers(self, client: Client) -> None:
        threads = client.nthreads().values()
        # One chunk for each thread: what queues on a worker dies with it and gets the blame.
        self._window = self.config.in_flight or max(1, sum(threads))
        self.emit(events.WorkersChanged(len(threads), sum(threads)))
