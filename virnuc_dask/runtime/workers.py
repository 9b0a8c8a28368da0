"""What is asked of workers: whether they are fit for a run, a chunk, and their own end."""

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

# Dask's topic under which workers say what they do, see `embed_on_worker`.
TOPIC = "virnuc-dask"
SCHEDULER_LOST = "the scheduler was lost. Finished chunks are safe; the same command resumes"
# Once one worker has answered, the others get this long, and twice as long as it took.
_STRAGGLERS_S = 30.0
# What this process was found to be fit for.
_met: set[Needs] = set()


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker must have for a run.

    Attributes
    ----------
    path : str
        The store, which the worker must be able to read and write.
    store_id : str
        Which store must be there.
    identity : Identity
        What it must be of.
    spec : ModelSpec
        The model; the worker must find weights of the same digest.
    device : str
        A torch device that it must have.
    versions : tuple of (str, str)
        Packages of which it must have the same, for rows of one store must come from one version.
    is_met : bool
        By workers that were started from here.
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
        """With this process's versions."""
        path = store.location.address
        return cls(path, store.id, store.identity, spec, device, _versions(), is_met)


def _versions() -> tuple[tuple[str, str], ...]:
    return ("virnuc_dask", __version__), *(
        (name, _found(name)) for name in ("zarr", "torch", "fair-esm")
    )


def _found(package: str) -> str:
    try:
        # A build for another device, 2.13.0+cu130, is the same version.
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def shortcomings(needs: Needs) -> tuple[str, ...]:
    """What this process lacks. One that lacks nothing has the model in memory by then.

    Raises
    ------
    OSError, MemoryError
        What waiting may mend.
    """
    if needs.is_met or needs in _met:
        return ()
    here = dict(_versions())
    found = [
        f"{name} {here[name]}, this run {ours}"
        for name, ours in needs.versions
        if here[name] != ours
    ]
    try:
        store = Store(needs.path)
        if store.id != needs.store_id:
            found.append(f"{needs.path}: another store")
        store.location.probe()
    except (VirnucError, OSError) as error:
        if failures.is_transient(error):
            raise
        plain = isinstance(error, VirnucError)
        found.append(str(error) if plain else f"{needs.path}: cannot be used: {error}")
    try:
        get_encoder(needs.spec, needs.device)
    except VirnucError as error:
        found.append(str(error))
    except Exception as error:
        if failures.is_transient(error):
            raise
        # A missing driver, a torch that is broken: whatever it is, there is no encoder.
        found.append(f"cannot load the model on {needs.device}: {type(error).__name__}: {error}")
    if not found:
        _met.add(needs)
    return tuple(found)


async def _shortcomings(needs: Needs) -> tuple[str, ...]:
    # In a thread: weights take long to read, and the worker's loop has to go on.
    return await asyncio.to_thread(shortcomings, needs)


def preflight(
    client: Client, needs: Needs, patience: float, is_stopped: Callable[[], bool]
) -> list[str]:
    """Ask all workers at once whether they are fit, before any of them gets a chunk.

    One that does not answer, or meets an error that may pass, is asked again before its first
    chunk, as one that joins later is.

    Parameters
    ----------
    client : distributed.Client
    needs : Needs
    patience : float
        Seconds until one must have answered.
    is_stopped : callable
        Looked at often; ends the waiting.

    Returns
    -------
    list of str
        Addresses of those that are fit.

    Raises
    ------
    UsageError
        Some are not: all of them, each with all that it lacks.
    VirnucError
        None answers, none has the memory now, or the scheduler is lost.
    """
    answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    asked = list(client.nthreads())
    for worker in asked:
        # Threads that nobody waits for: a worker that hangs does not answer.
        Thread(target=_ask, args=(client, worker, needs, answers), daemon=True).start()
    began = time.monotonic()
    until = began + patience
    found: dict[str, tuple[str, ...]] = {}
    short: list[MemoryError] = []
    waiting = set(asked)
    while waiting and not is_stopped() and time.monotonic() < until:
        try:
            worker, answer = answers.get(timeout=0.5)
        except Empty:
            if client.status != "running":
                raise VirnucError(SCHEDULER_LOST) from None
            waiting &= set(client.nthreads())  # whoever is gone does not answer
            continue
        waiting.discard(worker)
        if isinstance(answer, MemoryError):
            short.append(answer)
        elif answer is not None:
            found[worker] = answer
            until = min(until, began + 3 * (time.monotonic() - began) + _STRAGGLERS_S)
    unfit = {worker: lacks for worker, lacks in found.items() if lacks}
    if unfit:
        raise UsageError(
            f"{len(unfit)} of {len(asked)} workers cannot do this run; nothing was computed\n"
            + describe_unfit(unfit)
        )
    if asked and len(short) == len(asked):
        raise VirnucError(f"no worker has the memory now: {short[0]}; the same command goes on")
    if waiting and not found and not is_stopped():
        raise VirnucError(f"no worker has answered within {patience:.0f} s")
    return list(found)


def _ask(client: Client, worker: str, needs: Needs, answers: SimpleQueue[tuple[str, Any]]) -> None:
    """Put what a worker lacks, or that it has no memory now; None if that cannot be known."""
    answer: Any = None
    try:
        answer = client.run(_shortcomings, needs, workers=[worker], on_error="return")[worker]
    except (OSError, CancelledError) as error:  # the worker is gone meanwhile, or the client
        answer = error
    if isinstance(answer, OSError | CancelledError):
        answer = None
    elif isinstance(answer, Exception) and not isinstance(answer, MemoryError):
        # A package too old to know the question, most likely.
        answer = (f"{type(answer).__name__}: {answer}",)
    answers.put((worker, answer))


def describe_unfit(unfit: dict[str, tuple[str, ...]]) -> str:
    """What each of some workers lacks, a line each."""
    return "\n".join(f"  {worker}  {lack}" for worker, lacks in unfit.items() for lack in lacks)


def embed_task(needs: Needs, chunk: int) -> ChunkReport:
    """The task of a chunk in anybody's graph, on a worker or in any other process.

    Raises
    ------
    UnfitWorkerError
        The process lacks something that others may have.
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
    """The task of a chunk in a run.

    What becomes of it goes to the coordinator by the scheduler, as events: ``started`` once it has
    the model and begins; for a suspect chunk ``goes on``, again and again; and ``done`` with the
    report. A result would have to be fetched, from a worker that may be gone or stand still.

    Parameters
    ----------
    needs : Needs
        Looked at before the process's first chunk.
    chunk : int
    patience : Patience, optional
        For a suspect chunk, which is computed in child processes: how long they may take.
    embed : callable
        What computes any other; it has the arguments of `embed_chunk`.

    Raises
    ------
    UnfitWorkerError
        The worker lacks something that others may have.
    DeviceLostError
        The worker's process is of no use any more.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def tell(action: str, **more: Any) -> None:
        message = {"action": action, "key": key, "worker": worker.address, **more}
        worker.log_event(TOPIC, message)

    if lacks := shortcomings(needs):
        raise UnfitWorkerError(worker.address, lacks)
    chosen = needs.path, chunk, needs.identity, needs.spec, needs.device
    try:
        if patience is None:
            get_encoder(needs.spec, needs.device)
            tell("started")
            report = embed(*chosen, store_id=needs.store_id)
        else:
            on = partial(tell, "goes on")
            report = embed_chunk_apart(*chosen, patience, on, needs.store_id)
    except RuntimeError as error:
        if failures.is_sticky(error):
            raise DeviceLostError(worker.address, str(error)) from error
        raise
    tell("done", report=asdict(report))


def replace_process(client: Client, worker: str) -> None:
    """Have a worker's nanny kill its process, and start another; return at once."""
    # In a thread: a nanny that hangs too would not answer.
    Thread(target=_replace_process, args=(client, worker), daemon=True).start()


def _replace_process(client: Client, worker: str) -> None:
    with suppress(OSError, CancelledError):  # the client or the nanny is gone meanwhile
        client.run(_kill_own_worker, workers=[worker], nanny=True, on_error="ignore")


def _kill_own_worker(dask_worker: Nanny) -> None:
    os.kill(dask_worker.pid, signal.SIGKILL)
