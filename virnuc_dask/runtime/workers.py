"""Code that runs on workers: the check before a run, the task of a chunk, and replacement."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from distributed import Client, Nanny, get_worker

from virnuc_dask import __version__
from virnuc_dask.errors import DeviceLostError, UnfitWorkerError, UsageError, VirnucError
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.embed import ChunkReport, embed_chunk, get_encoder
from virnuc_dask.runtime.failures import Patience
from virnuc_dask.runtime.isolate import embed_chunk_apart
from virnuc_dask.settings import Identity, ModelSpec
from virnuc_dask.store.store import Store

# Dask topic of the workers' messages, see `embed_on_worker`.
TOPIC = "virnuc-dask"
SCHEDULER_LOST = "the scheduler was lost. Finished chunks are safe; the same command resumes"
# After the first answer, other workers get this many seconds plus twice the time it took.
_STRAGGLERS_S = 30.0
# Requirements that this process meets.
_met: set[Needs] = set()


@dataclass(frozen=True, slots=True)
class Needs:
    """Requirements of a run on its workers.

    Attributes
    ----------
    path : str
        Location of the store. The worker must be able to read and write it.
    store_id : str
        Id of the store at this location.
    identity : Identity
        Identity of the store.
    spec : ModelSpec
        The model. The worker must have weights with the same digest.
    device : str
        Torch device that the worker must have.
    versions : tuple of (str, str)
        Packages and versions that must be the same, so that one version computes all rows.
    is_met : bool
        Whether workers meet the requirements without a check, since this process starts them.
    """

    path: str
    store_id: str
    identity: Identity
    spec: ModelSpec
    device: str
    versions: tuple[tuple[str, str], ...]
    is_met: bool

    @classmethod
    def here(cls, store: Store, spec: ModelSpec, device: str, *, is_met: bool) -> Needs:
        """Return the requirements of a run, with the package versions of this process."""
        path = store.location.address
        return cls(path, store.id, store.identity, spec, device, _versions(), is_met)


def _versions() -> tuple[tuple[str, str], ...]:
    return ("virnuc_dask", __version__), *(
        (name, _installed_version(name)) for name in ("zarr", "torch", "fair-esm")
    )


def _installed_version(package: str) -> str:
    try:
        # Builds for another device, such as 2.13.0+cu130, count as the same version.
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def shortcomings(needs: Needs) -> tuple[str, ...]:
    """List the requirements that this process does not meet.

    If it meets all, it has loaded the model.

    Raises
    ------
    OSError, MemoryError
        An error that may pass.
    """
    if needs.is_met or needs in _met:
        return ()
    here = dict(_versions())
    lacks = [
        f"{name} {here[name]}, this run {ours}"
        for name, ours in needs.versions
        if here[name] != ours
    ]
    try:
        store = Store(needs.path)
        if store.id != needs.store_id:
            lacks.append(f"{needs.path}: another store")
        store.location.probe()
    except (VirnucError, OSError) as error:
        if failures.is_transient(error):
            raise
        plain = isinstance(error, VirnucError)
        lacks.append(str(error) if plain else f"{needs.path}: cannot be used: {error}")
    try:
        get_encoder(needs.spec, needs.device)
    except VirnucError as error:
        lacks.append(str(error))
    except Exception as error:
        if failures.is_transient(error):
            raise
        # Whatever the cause, such as a missing driver or a broken torch, there is no encoder.
        lacks.append(f"cannot load the model on {needs.device}: {type(error).__name__}: {error}")
    if not lacks:
        _met.add(needs)
    return tuple(lacks)


async def _shortcomings(needs: Needs) -> tuple[str, ...]:
    # In a thread, because reading weights takes long and must not block the worker's event loop.
    return await asyncio.to_thread(shortcomings, needs)


def preflight(
    client: Client, needs: Needs, patience: float, is_stopped: Callable[[], bool]
) -> list[str]:
    """Check all workers at the same time, before any of them gets a chunk.

    A worker that does not answer, or has an error that may pass, is checked again before its first
    chunk. So is a worker that joins later.

    Parameters
    ----------
    client : distributed.Client
    needs : Needs
    patience : float
        Seconds to wait for the first answer.
    is_stopped : callable
        Called often; ends the wait if it returns True.

    Returns
    -------
    list of str
        Addresses of the workers that passed.

    Raises
    ------
    UsageError
        Some workers failed. The message lists them and everything that they lack.
    VirnucError
        No worker answers, no worker has enough memory now, or the scheduler is lost.
    """
    answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    asked = list(client.nthreads())
    for worker in asked:
        # Daemon threads, because a worker that hangs never answers.
        Thread(target=_ask, args=(client, worker, needs, answers), daemon=True).start()
    began = time.monotonic()
    until = began + patience
    results: dict[str, tuple[str, ...]] = {}
    short: list[MemoryError] = []
    waiting = set(asked)
    while waiting and not is_stopped() and time.monotonic() < until:
        try:
            worker, answer = answers.get(timeout=0.5)
        except Empty:
            if client.status != "running":
                raise VirnucError(SCHEDULER_LOST) from None
            waiting &= set(client.nthreads())  # a worker that has left does not answer
            continue
        waiting.discard(worker)
        if isinstance(answer, MemoryError):
            short.append(answer)
        elif answer is not None:
            results[worker] = answer
            until = min(until, began + 3 * (time.monotonic() - began) + _STRAGGLERS_S)
    unfit = {worker: lacks for worker, lacks in results.items() if lacks}
    if unfit:
        raise UsageError(
            f"{len(unfit)} of {len(asked)} workers cannot do this run; nothing was computed\n"
            + describe_unfit(unfit)
        )
    if asked and len(short) == len(asked):
        raise VirnucError(f"no worker has enough memory now: {short[0]}; the same command resumes")
    if waiting and not results and not is_stopped():
        raise VirnucError(f"no worker answered within {patience:.0f} s")
    return list(results)


def _ask(client: Client, worker: str, needs: Needs, answers: SimpleQueue[tuple[str, Any]]) -> None:
    """Put what a worker lacks, or its memory error; None if the worker does not answer."""
    answer: Any = None
    try:
        answer = client.run(_shortcomings, needs, workers=[worker], on_error="return")[worker]
    except (OSError, CancelledError) as error:  # the worker has left, or the client is closed
        answer = error
    if isinstance(answer, OSError | CancelledError):
        answer = None
    elif isinstance(answer, Exception) and not isinstance(answer, MemoryError):
        # Most likely the worker has an old version without this check.
        answer = (f"{type(answer).__name__}: {answer}",)
    answers.put((worker, answer))


def describe_unfit(unfit: dict[str, tuple[str, ...]]) -> str:
    """List what each worker lacks, one item per line."""
    return "\n".join(f"  {worker}  {lack}" for worker, lacks in unfit.items() for lack in lacks)


def embed_task(needs: Needs, chunk: int) -> ChunkReport:
    """Compute a chunk as a task of a user's own graph, on a worker or in any other process.

    Raises
    ------
    UnfitWorkerError
        The process lacks something that another may have.
    """
    if lacks := shortcomings(needs):
        raise UnfitWorkerError(_where(), lacks)
    path, identity = needs.path, needs.identity
    return embed_chunk(path, chunk, identity, needs.spec, needs.device, store_id=needs.store_id)


def _where() -> str:
    try:
        return str(get_worker().address)
    except ValueError:
        return f"process {os.getpid()} of {socket.gethostname()}"


def embed_on_worker(
    needs: Needs,
    chunk: int,
    patience: Patience | None = None,
    embed: Callable[..., ChunkReport] = embed_chunk,
) -> None:
    """Compute a chunk as a task of a run.

    The task sends its progress to the coordinator through the scheduler, as events: ``started``
    when the model is loaded and the chunk starts, ``goes on`` repeatedly for a suspect chunk, and
    ``done`` with the report. The report is not the task's result, because a result must be fetched
    from the worker, which may be gone or hang.

    Parameters
    ----------
    needs : Needs
        Checked before the first chunk of the process.
    chunk : int
    patience : Patience, optional
        Deadlines of the child processes that compute a suspect chunk.
    embed : callable
        Function with the arguments of `embed_chunk` that computes a chunk that is not suspect.

    Raises
    ------
    UnfitWorkerError
        The worker lacks something that another may have.
    DeviceLostError
        The worker's process can no longer compute.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def tell(action: str, **more: Any) -> None:
        message = {"action": action, "key": key, "worker": worker.address, **more}
        worker.log_event(TOPIC, message)

    if lacks := shortcomings(needs):
        raise UnfitWorkerError(worker.address, lacks)
    arguments = needs.path, chunk, needs.identity, needs.spec, needs.device
    try:
        if patience is None:
            get_encoder(needs.spec, needs.device)
            tell("started")
            report = embed(*arguments, store_id=needs.store_id)
        else:
            on = partial(tell, "goes on")
            report = embed_chunk_apart(*arguments, patience, on, needs.store_id)
    except RuntimeError as error:
        if failures.is_sticky(error):
            raise DeviceLostError(worker.address, str(error)) from error
        raise
    tell("done", report=asdict(report))


def replace_process(client: Client, worker: str) -> None:
    """Tell a worker's nanny to replace the worker's process. Does not wait for it."""
    # In a thread, because the nanny may hang too and then never answers.
    Thread(target=_replace_process, args=(client, worker), daemon=True).start()


def _replace_process(client: Client, worker: str) -> None:
    with suppress(OSError, CancelledError):  # the client is closed, or the nanny has left
        client.run(_kill_own_worker, workers=[worker], nanny=True, on_error="ignore")


def _kill_own_worker(dask_worker: Nanny) -> None:
    os.kill(dask_worker.pid, signal.SIGKILL)
