"""Whether workers are fit for a run: the same versions, weights and store, and the device."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from distributed import Client

from virnuc_dask import __version__
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.dask_cluster import SCHEDULER_LOST, ask_scheduler
from virnuc_dask.settings import Identity, ModelSpec
from virnuc_dask.store.store import Store

# After the first answer, other workers get this many seconds plus twice the time it took.
_STRAGGLERS_S = 30.0
# Requirements that this process meets.
_met: set[Requirements] = set()


@dataclass(frozen=True, slots=True)
class Requirements:
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
    is_local : bool
        Whether workers meet the requirements without a check, since this process starts them.
    """

    path: str
    store_id: str
    identity: Identity
    spec: ModelSpec
    device: str
    versions: tuple[tuple[str, str], ...]
    is_local: bool

    @classmethod
    def here(cls, store: Store, spec: ModelSpec, device: str, *, is_local: bool) -> Requirements:
        """Return the requirements of a run, with the package versions of this process."""
        path = store.location.address
        return cls(path, store.id, store.identity, spec, device, _versions(), is_local)


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


def shortcomings(requirements: Requirements) -> tuple[str, ...]:
    """List the requirements that this process does not meet.

    If it meets all, it has loaded the model. With other versions nothing else is looked at.

    Raises
    ------
    OSError, MemoryError
        An error that may pass.
    """
    if requirements.is_local or requirements in _met:
        return ()
    here = dict(_versions())
    lacks = [
        f"{name} {here[name]}, this run {ours}"
        for name, ours in requirements.versions
        if here[name] != ours
    ]
    if lacks:
        return tuple(lacks)  # another Zarr may fail on the store in any way
    try:
        store = Store(requirements.path)
        if store.id != requirements.store_id:
            lacks.append(f"{requirements.path}: another store")
        else:
            store.location.probe()  # which writes
    except (VirnucError, OSError) as error:
        if failures.is_transient(error):
            raise
        text = str(error)
        if isinstance(error, OSError) and not isinstance(error, VirnucError):
            # Without the name, which is that of an open folder.
            text = f"{requirements.path}: cannot be used: {error.strerror or error}"
        lacks.append(text)
    try:
        from virnuc_dask.runtime.embed import get_encoder

        get_encoder(requirements.spec, requirements.device)
    except VirnucError as error:
        lacks.append(str(error))
    except Exception as error:
        if failures.is_transient(error):
            raise
        # Whatever the cause, such as a missing driver or a broken torch, there is no encoder.
        lacks.append(
            f"cannot load the model on {requirements.device}: {type(error).__name__}: {error}"
        )
    if not lacks:
        _met.add(requirements)
    return tuple(lacks)


async def _shortcomings(requirements: Requirements) -> tuple[str, ...]:
    # In a thread, because reading weights takes long and must not block the worker's event loop.
    return await asyncio.to_thread(shortcomings, requirements)


def preflight(
    client: Client, requirements: Requirements, start_s: float, is_stopped: Callable[[], bool]
) -> list[str]:
    """Check all workers at the same time, before any of them gets a chunk.

    A worker that does not answer, or has an error that may pass, is checked again before its first
    chunk. So is a worker that joins later.

    Parameters
    ----------
    client : distributed.Client
    requirements : Requirements
    start_s : float
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
        Thread(target=_ask, args=(client, worker, requirements, answers), daemon=True).start()
    began = time.monotonic()
    until = began + start_s
    results: dict[str, tuple[str, ...]] = {}
    short: list[MemoryError] = []
    waiting = set(asked)
    while waiting and not is_stopped() and time.monotonic() < until:
        try:
            worker, answer = answers.get(timeout=0.5)
        except Empty:
            if client.status != "running":
                raise VirnucError(SCHEDULER_LOST) from None
            with suppress(TimeoutError):  # a worker that has left does not answer
                waiting &= set(ask_scheduler(client, client.scheduler.ncores))
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
        raise VirnucError(f"no worker has enough memory now: {short[0]}; `resume` goes on")
    if waiting and not results and not is_stopped():
        raise VirnucError(f"no worker answered within {start_s:.0f} s")
    return list(results)


def _ask(
    client: Client, worker: str, requirements: Requirements, answers: SimpleQueue[tuple[str, Any]]
) -> None:
    """Put what a worker lacks, or its memory error; None if it may be asked again.

    It may if it did not answer, or answered with an error that may pass.
    """
    answer: Any = None
    try:
        answer = client.run(_shortcomings, requirements, workers=[worker], on_error="return")[
            worker
        ]
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
