"""The main line: read the input into a store, find the missing chunks, have them computed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any
from uuid import uuid4

import numpy as np
from dask import delayed
from distributed import Client, Future
from distributed.client import FutureCancelledError

from virnuc_dask import events
from virnuc_dask.cluster import connect
from virnuc_dask.config import ModelSpec, RunConfig, Settings, Status
from virnuc_dask.dataset import count_states, verify
from virnuc_dask.embed import ChunkReport, embed_chunk
from virnuc_dask.errors import StoreError, UsageError, VirnucError
from virnuc_dask.events import Listener, RunSummary
from virnuc_dask.packing import cut_segments
from virnuc_dask.prepare import Inputs, prepare
from virnuc_dask.store import Store

# Of the grace after a signal, this much is kept for closing the cluster.
_CLOSING_S = 5.0


def run(
    inputs: Inputs,
    store: str | Path,
    *,
    model: str = "demo",
    client: Client | None = None,
    cluster: str = "local",
    workers: int | None = None,
    config: RunConfig | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> RunSummary:
    """Embed sequences into a store; called again, go on where it was left.

    Call it under ``if __name__ == "__main__":`` in a script: Dask starts its workers as new
    processes, which import the script.

    Parameters
    ----------
    inputs : path or sequence of path
        FASTA or FASTQ, plain or compressed; ``-`` is standard input.
    store : path
        Made if nothing is there. A store that is there must come from the same input and settings.
    model : str
        ``demo`` (random weights), a fair-esm name, or the path of weights.
    client : distributed.Client, optional
        Whose workers to use. They must see the store at the same path. Left open.
    cluster : str
        Without a client: ``local``, a scheduler's address, or a scheduler file.
    workers : int, optional
        Processes of a local cluster; default: one for each core.
    config : RunConfig, optional
        Operational settings.
    listener : callable, optional
        Called with every event, in this thread.
    **settings
        Fields of `Settings` other than `model`: ``pooling``, ``repr_layer``, ``precision``,
        ``dtype``, ``max_residues``, ``long``, ``rows_per_chunk``, ``strict``.

    Returns
    -------
    RunSummary

    Raises
    ------
    InputError
        The input cannot be read. No store is left behind.
    UsageError
        A setting that does not exist, or that the device does not have.
    IdentityMismatchError
        The store was made with other settings.
    NotAStoreError
        Something else is at the path.
    ModelError
        The model cannot be read.
    StoreError
        The store is damaged.
    """
    started = time.monotonic()
    emit = listener or _silence
    config = config or RunConfig()
    chosen = Settings(model=model, **settings)
    opened, spec = prepare(inputs, store, chosen, emit, config.device)
    return _fill(opened, spec, client, cluster, workers, config, emit, started)


def resume(
    store: str | Path,
    *,
    model: str | None = None,
    client: Client | None = None,
    cluster: str = "local",
    workers: int | None = None,
    config: RunConfig | None = None,
    listener: Listener | None = None,
) -> RunSummary:
    """Compute what a store lacks. The store holds the sequences and the settings.

    Parameters
    ----------
    store : path
    model : str, optional
        Where the weights are now, if not where they were; workers refuse other weights.
    client, cluster, workers, config, listener
        As for `run`.

    Returns
    -------
    RunSummary
    """
    started = time.monotonic()
    opened = Store(store)
    identity = opened.identity
    spec = ModelSpec(
        model or str(opened.provenance["model"]),
        identity.weights_sha256,
        opened.dimension,
        identity.repr_layer,
        identity.pooling,
        identity.precision,
    )
    return _fill(opened, spec, client, cluster, workers, config, listener or _silence, started)


def _fill(
    store: Store,
    spec: ModelSpec,
    client: Client | None,
    cluster: str,
    workers: int | None,
    config: RunConfig | None,
    emit: Listener,
    started: float,
) -> RunSummary:
    """Compute the missing chunks of a store."""
    config = config or RunConfig()
    if config.verify:
        report = verify(store.path, repair=True)
        if report.sequences is not None:
            raise StoreError(f"{store.path}: {report.sequences}")
    present = store.present()
    missing = [int(chunk) for chunk in np.flatnonzero(~present)]
    costs = _residues_to_encode(store) if missing else {}
    # The longest first: one that starts last would leave the other workers idle at the end.
    missing.sort(key=lambda chunk: -costs[chunk])
    emit(
        events.RunStarted(
            str(store.path),
            store.records,
            store.chunk_count,
            int(present.sum()),
            store.rows_in(np.flatnonzero(present)),
            sum(costs[chunk] for chunk in missing),
            spec.reference,
            spec.dimension,
        )
    )
    work = _Work(store, spec, config, emit, costs)
    if missing:
        connection: AbstractContextManager[Client] = (
            nullcontext(client) if client is not None else connect(cluster, workers)
        )
        with _signals(work), connection as connected:
            work.drive(connected, missing)
    summary = _summarise(store, work, time.monotonic() - started)
    emit(summary)
    return summary


class _Work:
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
        self._attempts: Counter[int] = Counter()
        self._todo: deque[int] = deque()
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
            while self._running or (self._todo and self.signal is None):
                if self.signal is None:
                    self._submit(client)
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

    def _submit(self, client: Client) -> None:
        while self._todo and len(self._running) < self._window:
            chunk = self._todo.popleft()
            self._attempts[chunk] += 1
            key = f"embed-{self._id}-{chunk}-{self._attempts[chunk]}"
            task = delayed(embed_chunk, pure=False)(
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
        chunk, _ = self._running[str(future.key)]
        try:
            report = future.result()
        except UsageError:
            raise  # no other worker and no other attempt will do better
        except FutureCancelledError as error:
            raise VirnucError(
                "the scheduler was lost. Finished chunks are safe; the same command resumes"
            ) from error
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
        final = self._attempts[chunk] >= self.config.attempts
        self.errors[chunk] = f"{type(error).__name__}: {error}"
        if not final:
            self._todo.append(chunk)
            self.retries += 1
        self.emit(events.ChunkFailed(chunk, self._attempts[chunk], self.errors[chunk], final))

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
        self._count_workers(client)

    def _count_workers(self, client: Client) -> None:
        threads = client.nthreads().values()
        # One chunk for each thread: what queues on a worker dies with it and gets the blame.
        self._window = self.config.in_flight or max(1, sum(threads))
        self.emit(events.WorkersChanged(len(threads), sum(threads)))


def _summarise(store: Store, work: _Work, seconds: float) -> RunSummary:
    """Counts of the whole store: from the reports, and from `status` where there is none."""
    present = store.present()
    counts = Counter(work.counts)
    unread = [int(c) for c in np.flatnonzero(present) if int(c) not in work.counted]
    counts.update(count_states(store, unread))
    missing = {int(c): work.errors.get(int(c), "not computed") for c in np.flatnonzero(~present)}
    if pending := store.records - store.rows_in(np.flatnonzero(present)):
        counts[Status.PENDING.meaning] = pending
    return RunSummary(
        str(store.path),
        store.records,
        store.chunk_count,
        dict(counts),
        work.reports["chunks"],
        work.reports["rows"],
        work.reports["residues"],
        missing,
        work.retries,
        work.workers_lost,
        work.seconds,
        seconds,
        work.signal,
    )


def _residues_to_encode(store: Store) -> dict[int, int]:
    """What each chunk costs, in residues that go through the encoder."""
    identity = store.identity
    segments = cut_segments(store.lengths(), identity.max_residues, identity.long)
    chunk = segments.row // identity.rows_per_chunk
    residues = np.bincount(chunk, segments.length, minlength=store.chunk_count)
    return dict(enumerate(residues.astype(int).tolist()))


@contextmanager
def _signals(work: _Work) -> Iterator[None]:
    """SIGINT and SIGTERM stop the work in good order; a second one leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if work.signal is not None:
            os._exit(128 + number)
        work.signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence(_event: events.Event) -> None:
    pass
