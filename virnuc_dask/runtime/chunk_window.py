"""Submit chunks to a cluster, follow them, and do what `chunk_policy` says about failed ones."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from dask import delayed
from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from virnuc_dask.encoder.models import Estimate
from virnuc_dask.errors import (
    DeviceLostError,
    NotAStoreError,
    StoreError,
    StoreReplacedError,
    UnfitWorkerError,
    UsageError,
    VirnucError,
)
from virnuc_dask.runtime import events, failures
from virnuc_dask.runtime.chunk_policy import Attempt, ChunkQueue, Holder, Verdict, judge_late
from virnuc_dask.runtime.chunk_report import ChunkReport
from virnuc_dask.runtime.dask_cluster import SCHEDULER_LOST
from virnuc_dask.runtime.deadlines import LOOK_EVERY_S, NOBODY_LOOKED_S, RunningDeadlines
from virnuc_dask.runtime.events import Listener
from virnuc_dask.runtime.known_workers import KEYS, KnownWorkers
from virnuc_dask.runtime.requirements import Requirements
from virnuc_dask.runtime.workers import TOPIC, run_chunk
from virnuc_dask.settings import RunConfig, Status
from virnuc_dask.store.store import Store

# Part of the grace after a signal that is reserved for closing the cluster, in seconds.
_CLOSING_S = 5.0
# Fields that `ChunkReport` and `ChunkDone` share.
_TOTALS = ("read_s", "wait_s", "compute_s", "write_s")
_TOOK = (*_TOTALS, "fill", "memory", "gpu", "pid")
# Dask's reason for cancelling a future.
_CONNECTION_LOST = "scheduler-connection-lost"
# Actions that the scheduler reports about workers, and that workers report about chunks.
_WORKERS = ("add-worker", "remove-worker")
_CHUNKS = ("started", "progress", "done")


@dataclass(slots=True, kw_only=True)
class _Submitted(Attempt):
    future: Future


class ChunkWindow:
    """The chunks of a run and their state. One thread uses it, and one queue brings its events."""

    _workers: KnownWorkers

    def __init__(
        self,
        store: Store,
        requirements: Requirements,
        config: RunConfig,
        emit: Listener,
        costs: dict[int, int],
    ) -> None:
        self.store, self.config, self.emit = store, config, emit
        self.costs, self.spec, self.device = costs, requirements.spec, requirements.device
        self.reports: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.counted: set[int] = set()
        self.queue = ChunkQueue(config)
        self.workers_lost = 0
        self.seconds = 0.0
        self.signal: int | None = None
        self.stopped: str | None = None
        self.deadlines = RunningDeadlines(
            config,
            Estimate.of(
                requirements.spec, requirements.device, sum(costs.values()) / store.records
            ),
        )
        self._looked = 0.0
        self._submitted = 0
        self._running: dict[str, _Submitted] = {}
        # Completed futures, and events about workers and chunks, in the order of arrival.
        self._inbox: SimpleQueue[Future | dict[str, Any]] = SimpleQueue()
        self.worker_s, self.memory = 0.0, 0
        self.took = dict.fromkeys(_TOTALS, 0.0)
        self._prefix = f"{KEYS}{uuid4().hex[:8]}-"
        # Bound here and not passed as an argument, because Dask searches arguments for other tasks.
        self._task = delayed(partial(run_chunk, requirements), pure=False)

    def drive(self, client: Client, missing: list[int]) -> None:
        """Have chunks computed until none is left, or until the grace after a signal is over.

        Raises
        ------
        VirnucError
            The scheduler is lost, or no worker is left that can compute chunks.
        """
        self.queue.add(missing)
        self._workers = KnownWorkers(client, self.config, self.emit)
        for topic in ("all", TOPIC):
            client.subscribe_topic(topic, self._on_event)
        began = self._looked = time.monotonic()
        try:
            deadline: float | None = None
            while self._running or (self.queue and self._continues()):
                if self._continues():
                    self._submit(client)
                else:
                    self._take_back_unbegun(client)  # started chunks may finish
                    if self.signal is not None and deadline is None:
                        grace = max(0.0, self.config.grace - _CLOSING_S)
                        deadline = time.monotonic() + grace
                        self.emit(events.Stopping(self.signal, len(self._running), grace))
                    if deadline is not None and time.monotonic() > deadline:
                        break
                self._look_for_overdue(client)
                self._take(client, LOOK_EVERY_S)
        except CommClosedError as error:
            raise VirnucError(SCHEDULER_LOST) from error
        finally:
            self.seconds = time.monotonic() - began
            self._workers.count_time()
            self.worker_s = self._workers.worker_s
            if client.status == "running":
                for topic in ("all", TOPIC):
                    client.unsubscribe_topic(topic)
                client.cancel([attempt.future for attempt in self._running.values()], force=True)
            self._running.clear()

    def _take(self, client: Client, seconds: float) -> None:
        """Handle all events; if there are none, wait up to this many seconds for one."""
        workers_changed = False
        with suppress(Empty):
            while True:
                item = self._inbox.get(timeout=seconds)
                seconds = 0.0
                if isinstance(item, Future):
                    self._ended(client, item)
                elif item["action"] in _CHUNKS:
                    self._heard(item)
                else:
                    self._worker_event(client, item)
                    workers_changed = True
        if workers_changed:
            self._workers.count()
            self._wake(client)

    def _take_back_unbegun(self, client: Client) -> None:
        """Cancel the chunks that no worker has started, because there are not enough threads."""
        self._take(client, 0.0)
        unheard = [key for key, attempt in self._running.items() if not attempt.worker]
        idle = self._workers.threads - (len(self._running) - len(unheard))
        # Idle threads may have started the first of them a moment ago.
        for key in unheard[max(0, idle) :]:
            self.queue.add([self._take_back(client, key)])

    def _continues(self) -> bool:
        return self.signal is None and self.stopped is None

    def _submit(self, client: Client) -> None:
        while (room := self._workers.window - len(self._running)) > 0:
            # At most one chunk per thread in a graph, because Dask chooses the order within it.
            most = min(room, max(1, self._workers.threads))
            if not (chunks := self.queue.take(most, time.monotonic())):
                break
            self._compute(client, chunks)

    def _compute(self, client: Client, chunks: list[int]) -> None:
        """Submit chunks in one call, because a call costs more than a task."""
        deadlines = self.deadlines.now()
        of_children = [deadlines if chunk in self.queue.suspects else None for chunk in chunks]
        tasks = [
            self._task(chunk, with_children, dask_key_name=self._next_key(chunk))
            for chunk, with_children in zip(chunks, of_children, strict=True)
        ]
        others = self._workers.candidates()
        only: dict[str, Any] = {"workers": list(others), "allow_other_workers": True}
        # With the default `fifo_timeout` of 60 s, new chunks would overtake those that queue.
        futures = client.compute(
            tasks, optimize_graph=False, traverse=False, fifo_timeout=0, **(only if others else {})
        )
        now = time.monotonic()
        for chunk, with_children, future in zip(chunks, of_children, futures, strict=True):
            self._running[str(future.key)] = _Submitted(
                chunk=chunk, since=now, others=others, with_children=with_children, future=future
            )
            future.add_done_callback(self._inbox.put)

    def _next_key(self, chunk: int) -> str:
        self._submitted += 1
        return f"{self._prefix}{chunk}-{self._submitted}"

    # --- chunks ---

    def _heard(self, message: dict[str, Any]) -> None:
        """Handle the message of a worker that started, continues or finished a chunk."""
        worker, action = message["worker"], message["action"]
        # The worker of a suspect chunk may lack the model, because child processes load it.
        self._workers.heard(worker, has_model=action == "started")
        attempt = self._running.get(message["key"])
        if attempt is None:
            return  # cancelled
        attempt.worker, attempt.since = worker, time.monotonic()
        if action == "done":
            self._done(ChunkReport(**message["report"]), worker)
            self._running.pop(message["key"]).future.release()

    def _done(self, report: ChunkReport, worker: str) -> None:
        self.queue.done(report.chunk)
        residues = self.costs[report.chunk]
        quarantined = 0
        if report.computed:
            self.counts.update(report.counts)
            self.counted.add(report.chunk)
            self.memory = max(self.memory, report.memory)
            for name in _TOTALS:
                self.took[name] += getattr(report, name)
            self.reports.update(chunks=1, rows=report.rows, residues=residues)
            quarantined = sum(n for s, n in report.counts.items() if Status[s.upper()].quarantined)
            if report.chunk not in self.queue.suspects:
                # Without the time of waiting for other chunks, which may have failed slowly.
                self.deadlines.took(residues, report.read_s + report.compute_s + report.write_s)
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

    def _ended(self, client: Client, future: Future) -> None:
        """Handle the end of an attempt. An attempt that is still running here gave no report."""
        if str(future.key) not in self._running:
            return  # done, or cancelled and submitted again
        chunk = self._running[str(future.key)].chunk
        try:
            if future.status == "finished":
                raise VirnucError("the task ended without a report")
            future.result()
        except StoreReplacedError:
            raise
        except NotAStoreError as error:
            raise StoreError(
                f"a worker does not find the store: {error}. Finished chunks are in the store; when"
                " it is available again, `resume` goes on"
            ) from error
        except UsageError:
            raise  # any other worker or attempt would fail too
        except FutureCancelledError as error:
            if error.reason == _CONNECTION_LOST or client.status != "running":
                raise VirnucError(SCHEDULER_LOST) from error
            # Others cancelled it, for example with `client.restart()`.
            self.queue.retries += 1
            self.queue.add([chunk])
        except KilledWorker:
            # Dask gives up a task after some deaths. We do not: a death alone condemns no row.
            if self.queue.suspect(chunk):
                self.emit(events.ChunkSuspected(chunk, self.queue.deaths[chunk]))
        except UnfitWorkerError as error:
            self._workers.set_aside(error)
            self.queue.refused(chunk, time.monotonic())
        except DeviceLostError as error:
            self._workers.replace(error.worker, for_good=True)
            if not self._died(chunk):
                self._failed(chunk, error)
        except Exception as error:
            if client.status != "running":
                # The result is lost with the client; the chunk is not the cause.
                raise VirnucError(SCHEDULER_LOST) from error
            # Whatever the error is, the chunk is missing, and only that matters.
            self._failed(chunk, error)
        # Not earlier: if an error is raised above, `drive` cancels what is still in here.
        del self._running[str(future.key)]
        future.release()

    def _failed(self, chunk: int, error: Exception) -> None:
        attempt, is_final = self.queue.failed(chunk, error, time.monotonic())
        self.emit(events.ChunkFailed(chunk, attempt, self.queue.errors[chunk], is_final))
        if failures.is_hopeless(error) and self.stopped is None:
            self.stopped = self.store.location.explain(error)
            self.emit(events.CannotGoOn(self.stopped, len(self._running) - 1))

    # --- workers ---

    def _on_event(self, event: tuple[float, Any]) -> None:
        """Queue an event. Dask calls this in the client's thread."""
        _, message = event
        if not isinstance(message, dict):
            return
        action, key = message.get("action"), str(message.get("key"))
        # Only chunks of this run, because the scheduler may have others.
        if action in _WORKERS or (action in _CHUNKS and key.startswith(self._prefix)):
            self._inbox.put(message)

    def _worker_event(self, client: Client, message: dict[str, Any]) -> None:
        worker, gone = message["worker"], message["action"] == "remove-worker"
        if gone:
            self._workers.gone(worker)
            keys = self._running.keys() & map(str, message.get("processing-tasks", ()))
            if not message.get("expected", False):
                self._lost(client, worker, keys)
            for key, attempt in self._running.items():
                if key in keys or attempt.worker == worker:
                    attempt.worker, attempt.since = "", time.monotonic()

    def _lost(self, client: Client, worker: str, keys: set[str]) -> None:
        chunks = sorted(self._running[key].chunk for key in keys)
        self.workers_lost += 1
        self.queue.retries += len(chunks)
        self.emit(events.WorkerLost(worker, tuple(chunks)))
        for key in [key for key in self._running if key in keys]:
            if self._died(self._running[key].chunk):
                self._take_back(client, key)

    def _died(self, chunk: int) -> bool:
        """Count a worker that died with a chunk; return whether it is tried next, as a suspect."""
        if is_suspect := self.queue.died(chunk):
            self.emit(events.ChunkSuspected(chunk, self.queue.deaths[chunk]))
        return is_suspect

    def _wake(self, client: Client) -> None:
        """Submit chunks again whose preferred workers are all gone or hang.

        If there was no worker when the last of them left, Dask never assigns the task again, even
        though other workers may compute it.
        """
        candidates = self._workers.candidates() or self._workers.present
        for key, attempt in list(self._running.items()):
            if attempt.others and not attempt.worker and attempt.others.isdisjoint(candidates):
                self.queue.add_first(self._take_back(client, key))

    # --- deadlines ---

    def _look_for_overdue(self, client: Client) -> None:
        now = time.monotonic()
        if (passed := now - self._looked) < LOOK_EVERY_S:
            return
        self._looked, deadlines = now, self.deadlines.now()
        self._workers.ask_again()
        if passed > NOBODY_LOOKED_S:
            for attempt in self._running.values():
                attempt.since += passed
        late = [
            key
            for key, attempt in self._running.items()
            if now - attempt.since > attempt.allowed_s(self.costs[attempt.chunk], deadlines)
        ]
        waits = any(not self._running[key].worker for key in late)
        try:
            queues = self._workers.processing() if waits else {}
        except TimeoutError:
            return  # the scheduler stands still, so it is not the workers' fault
        holders = {str(key): worker for worker, keys in queues.items() for key in keys}
        for key in late:
            attempt = self._running[key]
            worker = attempt.worker or holders.get(key, "")
            holder = self._holder(worker, queues[worker]) if worker in queues else None
            residues = self.costs[attempt.chunk]
            verdict, seconds = judge_late(attempt, holder, residues, deadlines, now)
            if verdict is Verdict.OVERDUE:
                self._overdue(client, key, worker, seconds)
            elif verdict is Verdict.BEGIN_AGAIN:
                attempt.since = now
            elif verdict is Verdict.MOVE:
                if self._workers.is_useless(worker):
                    self._workers.replace(worker)
                self.queue.add([self._take_back(client, key)])

    def _holder(self, worker: str, queue: list[Any]) -> Holder:
        return Holder(
            is_busy=any(attempt.worker == worker for attempt in self._running.values()),
            is_useless=self._workers.is_useless(worker),
            has_tasks_of_others=not all(str(key).startswith(self._prefix) for key in queue),
            is_ready=self._workers.is_ready(worker),
            heard=self._workers.last_heard(worker),
        )

    def _overdue(self, client: Client, key: str, worker: str, seconds: float) -> None:
        chunk = self._take_back(client, key)
        self.queue.retries += 1
        replaced = self._workers.replace(worker)
        self.emit(events.ChunkOverdue(chunk, worker, seconds, replaced))
        if not self._died(chunk):
            self.queue.add([chunk])

    def _take_back(self, client: Client, key: str) -> int:
        """Cancel an attempt and return its chunk."""
        attempt = self._running.pop(key)
        client.cancel([attempt.future], force=True)
        return attempt.chunk

    @property
    def busy(self) -> float | None:
        """Share of the workers' time in which they computed chunks that succeeded."""
        return self.took["compute_s"] / self.worker_s if self.worker_s else None
