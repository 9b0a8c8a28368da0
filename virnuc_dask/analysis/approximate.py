"""An approximate index of a store's rows, by faiss, for searches that cannot wait."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.passes import (
    ChunkCounter,
    Progress,
    as_float32,
    blocks,
    check_finite,
    open_pool,
    sum_rows,
    thread_count,
)
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync_tree
from virnuc_dask.store import Store

# Rows to learn from for each list, as faiss asks for at least 39.
_ROWS_PER_LIST = 64
_LISTS_PER_ROOT = 4
_SHARE_SEARCHED = 1 / 32
_FEWEST_SEARCHED = 16
_FILE, _ABOUT = "rows.faiss", "about.json"


@dataclass(frozen=True, slots=True)
class Index:
    """An index, opened.

    Attributes
    ----------
    faiss : faiss.Index
        Of the rows minus the mean, each of length 1; their products are cosines.
    store : str
        The id of the store that it is of.
    mean : ndarray, float32, shape (D,)
    chunks : list of int
        Whose rows it holds.
    """

    faiss: Any
    store: str
    mean: NDArray[np.float32]
    chunks: list[int]

    def search(
        self, vectors: NDArray[np.float32], own: NDArray[np.int64], k: int, threads: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines, NaN where there is none, and rows, -1 there; shape (n, k) each.

        Parameters
        ----------
        vectors : ndarray, float32, shape (n, D)
        own : ndarray, int64, shape (n,)
            Row of each query, or -1; it is no neighbour of itself.
        k : int
        threads : int
        """
        _faiss().omp_set_num_threads(threads)
        scores, rows = self.faiss.search(_directions(vectors, self.mean), k + 1)
        # The row itself goes, or else the last.
        is_own = rows == own[:, None]
        is_own[~is_own.any(axis=1), -1] = True
        shape = (len(rows), k)
        scores, rows = scores[~is_own].reshape(shape), rows[~is_own].reshape(shape)
        scores = np.clip(scores, -1, 1)
        scores[rows < 0] = np.nan
        return scores, rows


def build_index(
    store: str | Path,
    out: str | Path | None = None,
    *,
    random_state: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Build an approximate index of a store's rows, or add to one the chunks that it lacks.

    The rows are in lists around 4·√n centres, which are learnt from a sample, and one byte for each
    feature is kept (faiss's ``IVF,SQ8``): a search looks into the lists nearest to the query. The
    index is of cosines after the mean of the rows is subtracted. It is in memory while it is built
    and searched: D bytes for each row.

    Parameters
    ----------
    store : path
        May still be filling; the same call later adds what has come.
    out : path, optional
        A directory. Default: the store's path with ``.faiss`` behind it.
    random_state : int
        Of the sample.
    workers : int, optional
        Threads. Default: one for each core, at most 16.
    progress : callable, optional
        Called with the chunks added so far and how many will be.
    force : bool
        Replace an index of another store.

    Returns
    -------
    Path
        The index.

    Raises
    ------
    UsageError
        faiss is not installed, `out` is something else or another store's, or no row is embedded.
    StoreError
        A chunk is damaged.
    """
    faiss = _faiss()
    path = index_path(store, out)
    opened, threads = Store(store), thread_count(workers)
    present = np.flatnonzero(opened.present()).tolist()
    index = None
    if path.exists():
        index = open_index(path)
        if index.store != opened.id:
            if not force:
                raise UsageError(f"{path} is of another store; --force replaces it")
            index = None
    if not present:
        raise UsageError(f"{store} has no embedded row yet")
    faiss.omp_set_num_threads(threads)
    if index is None:
        index = _trained(opened, present, random_state, threads)
    due = sorted({*present} - {*index.chunks})
    if not due:
        return path
    count = ChunkCounter(progress, len(due))
    with open_pool(opened, threads, None) as pool:
        calls = (([chunk], index.mean) for chunk in due)
        for rows, directions in pool.run(_rows_of, calls, count):
            index.faiss.add_with_ids(directions, rows)
    whole = Index(index.faiss, index.store, index.mean, sorted([*index.chunks, *due]))
    _write(whole, path)
    return path


def index_path(store: str | Path, out: str | Path | None) -> Path:
    """Where an index is, or is put.

    Raises
    ------
    UsageError
        The store is at a URL, and nothing else is said.
    """
    if out is None and "://" in str(store):
        raise UsageError(f"{store} is at a URL: say where on this machine the index is to be")
    return Path(expanded(f"{str(store).rstrip('/')}.faiss" if out is None else out))


def open_index(path: str | Path) -> Index:
    """Open an index.

    Raises
    ------
    UsageError
        faiss is not installed, or there is no index.
    """
    faiss = _faiss()
    folder = Path(expanded(path))
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        mean = np.array(about["mean"], np.float32)
        index = faiss.read_index(str(folder / _FILE))
        if mean.shape != (index.d,):
            raise ValueError(f"its mean is not of {index.d} features")
        return Index(index, str(about["store"]), mean, [int(chunk) for chunk in about["chunks"]])
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} is no index: {error}; `virnuc-dask index` makes one") from error


def _trained(store: Store, present: list[int], random_state: int, threads: int) -> Index:
    faiss = _faiss()
    with open_pool(store, threads, None) as pool:
        calls = ((group,) for group in pool.grouped(present))
        total, rows = np.zeros(store.dimension), 0
        for part, number in pool.run(sum_rows, calls, ChunkCounter(None, 0)):
            total += part
            rows += number
    if not rows:
        raise UsageError(f"{store.path} has no embedded row yet")
    check_finite(store, total)
    mean = (total / rows).astype(np.float32)
    lists = max(1, min(math.isqrt(rows) * _LISTS_PER_ROOT, rows // _ROWS_PER_LIST))
    wanted = lists * _ROWS_PER_LIST
    order = np.random.default_rng(random_state).permutation(present).tolist()
    sample, taken = [], 0
    while order and taken < wanted:
        sample.append(_rows_of(store, [order.pop()], mean)[1])
        taken += len(sample[-1])
    index = faiss.index_factory(store.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(np.concatenate(sample))
    index.nprobe = max(_FEWEST_SEARCHED, round(lists * _SHARE_SEARCHED))
    return Index(index, store.id, mean, [])


def _rows_of(
    store: Store, chunks: list[int], mean: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows, directions = [np.zeros(0, np.int64)], [np.zeros((0, store.dimension), np.float32)]
    for numbers, values in blocks(store, chunks):
        block = as_float32(values)
        check_finite(store, block)
        rows.append(numbers)
        directions.append(_directions(block, mean))
    return np.concatenate(rows), np.concatenate(directions)


def _directions(vectors: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = vectors - mean
    lengths = np.sqrt(np.vecdot(centred, centred))
    centred /= np.where(lengths > 0, lengths, 1)[:, None]
    return centred


def _write(index: Index, path: Path) -> None:
    """Write an index; a directory is replaced once the new one is whole."""
    about = asdict(index) | {"mean": index.mean.tolist()}
    del about["faiss"]
    unfinished, old = (path.with_name(f".{uuid4().hex}") for _ in range(2))
    try:
        unfinished.mkdir()
        (unfinished / _ABOUT).write_text(json.dumps(about))
        _faiss().write_index(index.faiss, str(unfinished / _FILE))
        sync_tree(unfinished)
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
    finally:
        for folder in (unfinished, old):
            shutil.rmtree(folder, ignore_errors=True)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f"an approximate index needs faiss ({error}): pip install 'virnuc_dask[faiss]'"
        ) from error
    return faiss
