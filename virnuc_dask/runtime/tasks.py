"""Create a store without a run, and fill it by tasks in the user's own Dask graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from dask import delayed
from dask.delayed import Delayed

from virnuc_dask.runtime.dask_cluster import WORKERS_ELSEWHERE
from virnuc_dask.runtime.events import Listener, silence
from virnuc_dask.runtime.prepare import Inputs, check_device, model_of, prepare
from virnuc_dask.runtime.requirements import Requirements
from virnuc_dask.runtime.workers import embed_task
from virnuc_dask.settings import Settings, precision_on
from virnuc_dask.store.store import Store


def create_store(
    inputs: Inputs,
    store: str | Path,
    *,
    model: str,
    device: str = "cpu",
    workers: int = WORKERS_ELSEWHERE,
    listener: Listener | None = None,
    **settings: Any,
) -> None:
    """Read sequences into a store without embedding them. `tasks`, `resume` and `run` embed them.

    Parameters
    ----------
    inputs, store, listener, **settings
        As for `run`. An existing store must have the same input and settings.
    model : str
        A fair-esm name, the path of weights, or ``demo`` (random weights). There is no default.
    device : str
        Torch device that will compute, such as ``cuda``. The precision ``auto`` and the chunk size
        depend on it.
    workers : int
        Approximate number of processes that will compute; each should have several chunks.

    Raises
    ------
    InputError
        The input cannot be read. No store is left behind.
    UsageError
        A setting does not exist, or the device does not support it.
    IdentityMismatchError
        The store was made with other settings.
    NotAStoreError
        Something else is at the path.
    StoreError
        The disk is full or not writable, or the existing store is damaged.
    ModelError
        The model cannot be read.
    """
    checked = Settings.of(model=model, **settings)
    prepare(inputs, store, checked, listener or silence, device, lambda: workers)


def tasks(store: str | Path, *, model: str | None = None, device: str = "cpu") -> list[Delayed]:
    """Return a `dask.delayed` task for each missing chunk of a store.

    The tasks may be part of any graph. Any Dask scheduler may compute them, in any order, more
    than once, or at the same time as a run. A task reads its sequences from the store, embeds them,
    and writes the chunk; it skips a chunk that is already there. The store is complete once all
    tasks are computed. All settings that change rows come from the store.

    Parameters
    ----------
    store : path
        A store made by `create_store` or `run`. Workers must see it at the same path.
    model : str, optional
        Path or name of the weights, if they have moved since the store was made; tasks refuse
        weights with another digest.
    device : str
        Torch device that computes, such as ``cuda``.

    Returns
    -------
    list of dask.delayed.Delayed
        In the order of the rows. The result of each is a small `ChunkReport`; the embeddings stay
        in the store.

    Raises
    ------
    NotAStoreError, StoreError
        There is no store, or it is damaged.
    UsageError
        The device does not support the store's precision.

    Notes
    -----
    A `run` does more than these tasks. Most settings of `RunConfig` have no effect here:

    - ``attempts``, ``backoff``: a task raises an error at once. Dask tries again if you tell it
      to, as with ``client.compute(tasks, retries=2)``.
    - ``deadline_factor``, ``deadline_floor``, ``deadline_first``: a hanging task has no deadline.
    - ``suspect_after``: a row that kills its worker is not found. Dask gives up its task, and
      perhaps other tasks on the worker, with `distributed.KilledWorker`; `resume` finds the row.
    - ``in_flight``: all tasks are submitted at once. With 18,000 tasks on two workers the first
      was done after half a minute, and each task took 15 KB of memory in the client and the
      scheduler. For many more, compute a slice of the list at a time.
    - ``shard``: the list contains the chunks that are missing now, so slices of lists from
      different times may leave out a chunk. For processes that do not communicate, use `run`.
    - ``grace``, ``verify``: call `verify` first.

    Workers are not checked in advance. They and the scheduler need this package. A worker raises
    `UnfitWorkerError` if it has other versions of this package, torch, zarr or fair-esm, or lacks
    the store, the weights or the device. After a CUDA error all tasks of that process fail.

    A process holds one model in memory. If a graph has tasks for several models, layers or
    poolings, a process may load each of them more than once.
    """
    check_device(device)
    opened = Store(store)
    precision_on(device, opened.identity.precision)
    requirements = Requirements.here(opened, model_of(opened, model), device, is_local=False)
    # `requirements` is bound, not an argument: Dask searches a task's arguments for other tasks.
    task = delayed(partial(embed_task, requirements), pure=False)
    # A new key each time: Dask may keep the result of an old key after its chunk was removed.
    call = uuid4().hex[:8]
    missing = np.flatnonzero(~opened.present()).tolist()
    return [task(chunk, dask_key_name=f"embed-chunk-{call}-{chunk}") for chunk in missing]
