"""A store without a run: made, and then filled by tasks in anybody's own graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from dask import delayed
from dask.delayed import Delayed

from virnuc_dask.runtime.clusters import WORKERS_ELSEWHERE
from virnuc_dask.runtime.events import Listener, silence
from virnuc_dask.runtime.prepare import Inputs, check_device, model_of, prepare
from virnuc_dask.runtime.workers import Needs, embed_task
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
    """Read sequences into a store, and embed none of them. `tasks`, `resume` and `run` do.

    Parameters
    ----------
    inputs, store, listener, **settings
        As for `run`. A store that is there must come from the same input and settings.
    model : str
        A fair-esm name, the path of weights, or ``demo`` (random weights). There is no default.
    device : str
        Torch device that will compute, such as ``cuda``; the precision ``auto`` depends on it, and
        the size of chunks.
    workers : int
        Processes that will compute, about: each is to have several chunks.

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
    StoreError
        The disk is full or forbidden, or the store that is there is damaged.
    ModelError
        The model cannot be read.
    """
    chosen = Settings(model=model, **settings)
    prepare(inputs, store, chosen, listener or silence, device, lambda: workers)


def tasks(store: str | Path, *, model: str | None = None, device: str = "cpu") -> list[Delayed]:
    """A `dask.delayed` task for each chunk that a store lacks.

    They may be parts of any graph, and be computed by any of Dask's schedulers, in any order, also
    twice or beside a run. A task reads its sequences from the store, embeds them, and writes the
    chunk; a chunk that is there by then is left alone. Once all are computed the store is complete,
    and there are no more tasks. Settings that rows depend on are those of the store.

    Parameters
    ----------
    store : path
        Of a store that `create_store` or `run` has made. Workers must see it at the same path.
    model : str, optional
        Where the weights are now, if not where they were; tasks refuse other weights.
    device : str
        Torch device that computes, such as ``cuda``.

    Returns
    -------
    list of dask.delayed.Delayed
        In the order of the rows. Each becomes a `ChunkReport`, which is small; the embeddings stay
        in the store.

    Raises
    ------
    NotAStoreError, StoreError
        There is no store, or it is damaged.
    UsageError
        The device does not have the store's precision.

    Notes
    -----
    A `run` does more than such tasks can. Most of its settings in `RunConfig` mean nothing here:

    - ``attempts``, ``backoff``: a task that meets an error raises it at once. Dask tries again if
      it is told to, as by ``client.compute(tasks, retries=2)``.
    - ``deadline_factor``, ``deadline_floor``, ``deadline_first``: a task that hangs is waited for.
    - ``suspect_after``: a row that kills its worker is not found. Dask gives its task up, with
      `distributed.KilledWorker`, and maybe others that were on the worker; `resume` finds the row.
    - ``in_flight``: all tasks are handed over at once. Of 18,000 on two workers the first was done
      after half a minute, and each took 15 KB of the client and the scheduler. For many more,
      compute a slice of the list at a time.
    - ``shard``: the list is of what is missing now, so slices of lists that were made at different
      times may leave out a chunk. For processes that know nothing of each other take `run`.
    - ``grace``, ``verify``: use `verify` before.

    Workers are not asked beforehand whether they are fit. They and the scheduler need this package.
    A worker that has other versions of it, torch, zarr or fair-esm, or lacks the store, the weights
    or the device, raises `UnfitWorkerError`. After a CUDA error all tasks of that process fail.

    A process holds one model in memory. If stores of other models, layers or poolings have tasks in
    the same graph, each may have to load its own again.
    """
    check_device(device)
    opened = Store(store)
    precision_on(device, opened.identity.precision)
    needs = Needs.here(opened, model_of(opened, model), device, is_met=False)
    # Bound, not an argument: Dask searches each task's arguments for other tasks.
    task = delayed(partial(embed_task, needs), pure=False)
    # Never the key of a task that was computed before: its chunk may have been removed since.
    call = uuid4().hex[:8]
    missing = np.flatnonzero(~opened.present()).tolist()
    return [task(chunk, dask_key_name=f"embed-chunk-{call}-{chunk}") for chunk in missing]
