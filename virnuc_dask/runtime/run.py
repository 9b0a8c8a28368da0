"""Read the input into a store, find the missing chunks, and have workers compute them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any
from weakref import WeakSet

import numpy as np
from distributed import Client, performance_report

from virnuc_dask.encoder.fair_esm import check_fair_esm
from virnuc_dask.errors import LocationError, StoreError, UsageError
from virnuc_dask.files import expanded
from virnuc_dask.inputs.lengths import residues_to_encode
from virnuc_dask.runtime import events
from virnuc_dask.runtime.chunk_window import ChunkWindow
from virnuc_dask.runtime.dask_cluster import (
    WORKERS_ELSEWHERE,
    StoppedWaiting,
    check_cluster,
    check_options,
    check_scheduler,
    connect,
    expected_workers,
    resolve,
)
from virnuc_dask.runtime.display import display, notebook_listener
from virnuc_dask.runtime.events import Listener
from virnuc_dask.runtime.prepare import Inputs, model_of, prepare, warn_of_random_weights
from virnuc_dask.runtime.requirements import Requirements, preflight
from virnuc_dask.runtime.summary import NOT_COMPUTED, IncompleteRunError, RunSummary
from virnuc_dask.settings import (
    AUTO,
    ModelSpec,
    RunConfig,
    Settings,
    Shard,
    Status,
    precision_on,
)
from virnuc_dask.store.status import count_states
from virnuc_dask.store.store import Store, can_create
from virnuc_dask.store.verify import verify

# Seconds beyond the grace that a run may take to end after a signal.
_LATE_S = 5.0
# A second signal within these seconds is the same one, sent twice.
_TWICE_S = 2.0
# Name of the cluster if the caller passes a client.
_ATTACHED = "a client's"
_lent: WeakSet[Client] = WeakSet()


def run(
    inputs: Inputs,
    store: str | Path,
    *,
    model: str,
    client: Client | None = None,
    cluster: str = "local",
    workers: int | None = None,
    config: RunConfig | None = None,
    overwrite: bool = False,
    progress: bool = True,
    listener: Listener | None = None,
    allow_incomplete: bool = False,
    **settings: Any,
) -> RunSummary:
    """Embed sequences into a store. The same call again resumes an unfinished store.

    Parameters
    ----------
    inputs : path or sequence of path
        FASTA or FASTQ, plain or compressed; ``-`` is standard input.
    store : path
        Created if it does not exist. An existing store must have the same input and settings.
    model : str
        A fair-esm name, a path to weights, or ``demo`` (random weights). There is no default.
    client : distributed.Client, optional
        Its workers compute the chunks. They must see the store at the same path. The client stays
        open. A client can serve one run at a time.
    cluster : str
        Used without a client: ``local``, ``local-cuda``, ``auto``, a scheduler's address, or a
        scheduler file.
    workers : int, optional
        Processes of a local cluster; default: one per GPU; without GPUs one per core, but at most
        one more than there are chunks to compute.
    config : RunConfig, optional
        Operational settings.
    overwrite : bool
        Begin afresh: replace a store of this program, once the input is read. Anything else at the
        path is an error, and so is a store that another run on this machine is filling.
    progress : bool
        Show progress: a live bar in a notebook or on a terminal, else lines on standard error.
    listener : callable, optional
        Called with every event (`virnuc_dask.runtime.events`), in this thread.
    allow_incomplete : bool
        Return the summary of an interrupted or incomplete run. By default it is an error.
    **settings
        Fields of `Settings` other than `model`, as ``pooling`` or ``long``; or options of the
        command line, as ``translate="six-frame"`` or ``tile=24``; see `Settings.of`.

    Returns
    -------
    RunSummary

    Raises
    ------
    InputError
        The input cannot be read. No store is created.
    UsageError
        A setting does not exist or the device does not support it, or fair-esm is not installed.
    IdentityMismatchError
        The store has other settings or another input.
    NotAStoreError
        The path holds something that is not a store.
    ModelError
        The model cannot be read.
    StoreError
        The store is damaged.
    IncompleteRunError
        The run was interrupted, or chunks failed. Its `summary` says which.
    """
    started = time.monotonic()
    all_settings = Settings.of(model=model, **settings)
    cluster, config = _settle(client, cluster, workers, config)
    if overwrite and config.shard:
        raise UsageError("overwrite with a shard: each run would replace the store of the others")
    with ExitStack() as stack:
        emit = stack.enter_context(_shown(progress, listener))
        wait = partial(_waiting, emit, cluster)
        if client is None and overwrite:
            # No store is replaced for a cluster that is not there.
            client = stack.enter_context(connect(cluster, workers, config, wait))
        elif client is None and can_create(store):
            check_cluster(cluster, config, wait)  # reading the input may take long
        expected = partial(_expected_workers, client, cluster, workers, config)
        opened, spec = prepare(
            inputs, store, all_settings, emit, config.device, expected, overwrite
        )
        summary = _fill(opened, spec, client, cluster, workers, config, emit, started)
    return _checked(summary, allow_incomplete)


def resume(
    store: str | Path,
    *,
    model: str | None = None,
    client: Client | None = None,
    cluster: str = "local",
    workers: int | None = None,
    config: RunConfig | None = None,
    progress: bool = True,
    listener: Listener | None = None,
    allow_incomplete: bool = False,
) -> RunSummary:
    """Compute the missing chunks of a store. It holds the sequences and the settings.

    Parameters
    ----------
    store : path
    model : str, optional
        Current location of the weights, if they were moved; workers refuse other weights.
    client, cluster, workers, config, progress, listener, allow_incomplete
        As for `run`.

    Returns
    -------
    RunSummary

    Raises
    ------
    IncompleteRunError, UsageError, ModelError, NotAStoreError, StoreError
        As for `run`.
    """
    started = time.monotonic()
    opened = Store(store)
    spec = model_of(opened, model)
    cluster, config = _settle(client, cluster, workers, config)
    warn_of_random_weights(spec, stacklevel=3)
    with _shown(progress, listener) as emit:
        emit(events.ModelChosen(spec, config.device))
        summary = _fill(opened, spec, client, cluster, workers, config, emit, started)
    return _checked(summary, allow_incomplete)


@contextmanager
def _shown(progress: bool, listener: Listener | None) -> Iterator[Listener]:
    """Yield a listener that shows progress, if it is to be shown, and calls the caller's."""
    with ExitStack() as stack:
        shown = None
        if progress:
            shown = notebook_listener() or stack.enter_context(display("auto"))

        def emit(event: events.Event) -> None:
            nonlocal shown
            if listener:
                listener(event)
            if shown:
                try:
                    shown(event)
                except OSError:  # a full disk behind standard error, say, must not end a run
                    shown = None

        yield emit


def _checked(summary: RunSummary, allow_incomplete: bool) -> RunSummary:
    if not (summary.complete or allow_incomplete):
        raise IncompleteRunError(summary)
    return summary


def _settle(
    client: Client | None, cluster: str, workers: int | None, config: RunConfig | None
) -> tuple[str, RunConfig]:
    """Resolve ``auto`` to a cluster and a device, and raise errors before any work starts."""
    check_fair_esm()
    cluster = resolve(cluster) if client is None else _ATTACHED
    config = config or RunConfig()
    if client is None:
        check_options(cluster, workers, config)
    Shard.parse(config.shard, os.environ)
    if config.performance_report is not None:
        with open(expanded(config.performance_report), "a"):
            pass  # fails now, not at the end, if the file cannot be written
    device = "cuda" if cluster == "local-cuda" else "cpu"
    return cluster, replace(config, device=device) if config.device == AUTO else config


def _expected_workers(
    client: Client | None, cluster: str, workers: int | None, config: RunConfig
) -> int:
    """Estimate the number of workers of all runs that share the store."""
    runs = Shard.parse(config.shard, os.environ).count
    if client is None:
        return runs * expected_workers(cluster, workers, config)
    with _borrow(client):
        return runs * (len(client.nthreads()) or WORKERS_ELSEWHERE)


def _fill(
    store: Store,
    model: ModelSpec,
    client: Client | None,
    cluster: str,
    workers: int | None,
    config: RunConfig,
    emit: Listener,
    started: float,
) -> RunSummary:
    """Compute the missing chunks of the store or, if the run has a shard, of the shard."""
    shard = Shard.parse(config.shard, os.environ)

    wait = partial(_waiting, emit, cluster)

    def connection(
        workers: int | None, is_stopped: Callable[[], bool] = lambda: False
    ) -> AbstractContextManager[Client]:
        if client is not None:
            return _borrow(client)
        return connect(cluster, workers, config, wait, is_stopped)

    if config.verify:
        with connection(workers) as connected:
            report = verify(store.path, repair=True, client=connected)
        if report.sequences is not None:
            raise StoreError(f"{store.path}: {report.sequences}")
    present = store.present()
    missing = [chunk for chunk in np.flatnonzero(~present).tolist() if shard.holds(chunk)]
    if missing:
        _check_precision(store, config.device)
    costs = _residues_to_encode(store) if missing else {}
    # The longest chunk first: if it started last, the other workers would be idle at the end.
    missing.sort(key=lambda chunk: -costs[chunk])
    emit(
        events.RunStarted(
            str(store.path),
            store.records,
            store.chunk_count,
            int(present.sum()),
            store.rows_in(np.flatnonzero(present)),
            len(missing),
            store.rows_in(missing),
            sum(costs[chunk] for chunk in missing),
        )
    )
    requirements = Requirements.here(
        store,
        model,
        config.device,
        # Local CPU workers have this process's packages, disk and weights. Other workers may not,
        # and a worker may lack the device.
        is_local=cluster == "local" and config.device == "cpu",
    )
    work = ChunkWindow(store, requirements, config, emit, costs)
    if missing:
        with (
            suppress(StoppedWaiting),
            store.location.in_use(),
            _signals(work),
            connection(
                _enough(workers, len(missing), cluster, config), lambda: work.signal is not None
            ) as connected,
            _watched(connected, config, emit),
        ):
            if not requirements.is_local:
                _check_workers(connected, requirements, work)
            work.drive(connected, missing)
    try:
        summary = _summarise(store, work, shard, time.monotonic() - started)
    except LocationError as error:
        raise StoreError(f"{error}. Finished chunks are safe; `resume` goes on") from error
    emit(summary)
    return summary


def _enough(workers: int | None, chunks: int, cluster: str, config: RunConfig) -> int | None:
    """Workers to start. Each takes memory, so there is only one more than there are chunks."""
    if workers is not None or cluster != "local":
        return workers
    return min(expected_workers(cluster, None, config), chunks + 1)


def _waiting(emit: Listener, cluster: str, reason: str) -> None:
    emit(events.WaitingForWorkers(cluster, reason))


def _check_precision(store: Store, device: str) -> None:
    try:
        precision_on(device, store.identity.precision)
    except UsageError as error:
        raise UsageError(
            f"{store.path} was made for a GPU: {error}. Give it one (--cluster local-cuda, or"
            " --device cuda), or replace the store (run --overwrite)"
        ) from error


@contextmanager
def _borrow(client: Client) -> Iterator[Client]:
    """Use the caller's client. It delivers the scheduler's events to one run only."""
    if client in _lent:
        raise UsageError("another run uses this client; create one client per run")
    _lent.add(client)
    try:
        check_scheduler(client)
        yield client
    finally:
        _lent.remove(client)


@contextmanager
def _watched(client: Client, config: RunConfig, emit: Listener) -> Iterator[None]:
    """Emit the address of Dask's dashboard, and write a performance report if requested."""
    # Lambdas are pickled by value, so the scheduler needs no module of ours.
    if client.run_on_scheduler(
        lambda dask_scheduler: bool(dask_scheduler.http_application.applications)
    ) and (link := _dashboard(client)):
        emit(events.Connected(link))
    if config.performance_report is None:
        yield
        return
    if not client.run_on_scheduler(lambda: find_spec("bokeh") is not None):
        raise UsageError(
            "a performance report needs bokeh on the scheduler's machine: pip install bokeh"
        )
    report = performance_report(filename=expanded(config.performance_report))
    with client.as_current():
        report.__enter__()
    yield
    # Not after an error of the run, because an error of the report would hide it.
    with client.as_current():
        report.__exit__(None, None, None)


def _dashboard(client: Client) -> str | None:
    try:
        return str(client.dashboard_link)
    except KeyError:  # the link may contain environment variables that this process lacks
        return None


def _check_workers(client: Client, requirements: Requirements, work: ChunkWindow) -> None:
    began = time.monotonic()
    fit = preflight(
        client, requirements, work.deadlines.now().start_s, lambda: work.signal is not None
    )
    work.emit(events.WorkersChecked(len(fit), time.monotonic() - began))


def _summarise(store: Store, work: ChunkWindow, shard: Shard, seconds: float) -> RunSummary:
    """Count rows of the whole store, from reports or, for chunks without one, from `status`."""
    store.check_location()
    present = store.present()
    counts = Counter(work.counts)
    unread = [int(c) for c in np.flatnonzero(present) if int(c) not in work.counted]
    counts.update(count_states(store, unread))
    absent = np.flatnonzero(~present).tolist()
    missing = {c: work.queue.errors.get(c, NOT_COMPUTED) for c in absent if shard.holds(c)}
    if pending := store.records - store.rows_in(np.flatnonzero(present)):
        counts[Status.PENDING.meaning] = pending
    return RunSummary(
        store=str(store.path),
        model=work.spec,
        device=work.device,
        records=store.records,
        chunks=store.chunk_count,
        counts=dict(counts),
        computed_chunks=work.reports["chunks"],
        computed_rows=work.reports["rows"],
        computed_residues=work.reports["residues"],
        missing=missing,
        elsewhere=len(absent) - len(missing),
        retries=work.queue.retries,
        workers_lost=work.workers_lost,
        busy=work.busy,
        took=work.took,
        memory=work.memory,
        seconds=work.seconds,
        total_seconds=seconds,
        interrupted=work.signal,
        stopped=work.stopped,
    )


def _residues_to_encode(store: Store) -> dict[int, int]:
    """Number of residues to encode for each chunk."""
    identity = store.identity
    residues = residues_to_encode(store.lengths(), identity.max_residues, identity.long)
    chunks = np.add.reduceat(residues, np.arange(0, store.records, identity.rows_per_chunk))
    return dict(enumerate(chunks.tolist()))


@contextmanager
def _signals(work: ChunkWindow) -> Iterator[None]:
    """On a signal stop the work in order; on a second signal exit immediately.

    A queue may send SIGTERM to a job's processes and to its script, which passes it on, and a
    terminal that is closed sends SIGHUP twice: but for Ctrl-C, two in quick succession are one.

    Also exit if the work has not stopped when the grace is over, because it may wait for something
    that never happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A reentrant queue: a signal handler may use it wherever it interrupts this thread.
    signals: SimpleQueue[int | None] = SimpleQueue()
    began = 0.0

    def watch() -> None:
        number = signals.get()
        if number is None:
            return
        until = time.monotonic() + work.config.grace + _LATE_S
        with suppress(Empty):
            while signals.get(timeout=max(0.0, until - time.monotonic())) is not None:
                pass  # the same signal, sent twice
            return
        # In a thread, for nobody may read what is written.
        late = b"error: stopping takes longer than the grace; `resume` goes on\n"
        said = threading.Thread(target=os.write, args=(2, late), daemon=True)
        said.start()
        said.join(1)
        os._exit(128 + number)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal began
        if work.signal is None:
            began = time.monotonic()
            work.signal = number
            signals.put(number)
        elif number == signal.SIGINT or time.monotonic() - began > _TWICE_S:
            try:
                os.write(2, b"interrupted at once; finished chunks are safe: `resume` goes on\n")
            finally:
                os._exit(128 + number)

    # Ignored signals stay ignored, such as SIGHUP under nohup; handlers set by C code stay too.
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    threading.Thread(target=watch, daemon=True).start()
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.put(None)
