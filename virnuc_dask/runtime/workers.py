"""Code that runs on workers: the task of a chunk, and the end of a worker's process.

The coordinator imports this too, so only the functions for workers import what needs torch.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from threading import Thread
from typing import Any

from distributed import Client, Nanny, get_worker

from virnuc_dask.errors import DeviceLostError, UnfitWorkerError
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.chunk_report import ChunkReport
from virnuc_dask.runtime.deadlines import Deadlines
from virnuc_dask.runtime.requirements import Requirements, shortcomings

# Dask topic of the workers' messages, see `run_chunk`.
TOPIC = "virnuc-dask"


def embed_task(requirements: Requirements, chunk: int) -> ChunkReport:
    """Compute a chunk as a task of a user's own graph, on a worker or in any other process.

    Raises
    ------
    UnfitWorkerError
        The process lacks something that another may have.
    """
    if lacks := shortcomings(requirements):
        raise UnfitWorkerError(_where(), lacks)
    from virnuc_dask.runtime.embed import embed_chunk

    path, identity = requirements.path, requirements.identity
    return embed_chunk(
        path,
        chunk,
        identity,
        requirements.spec,
        requirements.device,
        store_id=requirements.store_id,
    )


def _where() -> str:
    try:
        return str(get_worker().address)
    except ValueError:
        return f"process {os.getpid()} of {socket.gethostname()}"


def run_chunk(
    requirements: Requirements,
    chunk: int,
    deadlines: Deadlines | None = None,
    embed: Callable[..., ChunkReport] | None = None,
) -> None:
    """Compute a chunk as a task of a run.

    The task sends its progress to the coordinator through the scheduler, as events: ``started``
    when the model is loaded and the chunk starts, ``progress`` repeatedly for a suspect chunk, and
    ``done`` with the report. The report is not the task's result, because a result must be fetched
    from the worker, which may be gone or hang.

    Parameters
    ----------
    requirements : Requirements
        Checked before the first chunk of the process.
    chunk : int
    deadlines : Deadlines, optional
        Deadlines of the child processes that compute a suspect chunk.
    embed : callable, optional
        Function that computes a chunk that is not suspect. Default: `embed_chunk`.

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

    if lacks := shortcomings(requirements):
        raise UnfitWorkerError(worker.address, lacks)
    from virnuc_dask.runtime.embed import embed_chunk, get_encoder
    from virnuc_dask.runtime.isolate import embed_chunk_in_children

    arguments = (
        requirements.path,
        chunk,
        requirements.identity,
        requirements.spec,
        requirements.device,
    )
    try:
        if deadlines is None:
            get_encoder(requirements.spec, requirements.device)
            tell("started")
            report = (embed or embed_chunk)(*arguments, store_id=requirements.store_id)
        else:
            on = partial(tell, "progress")
            report = embed_chunk_in_children(
                *arguments,
                deadlines,
                on,
                requirements.store_id,
                scratch=worker.local_directory,  # which Dask removes, however the worker ends
            )
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
