"""Approximate faiss index of a store's rows, for fast searches."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import (
    ChunkCounter,
    Progress,
    as_float32,
    blocks,
    check_finite,
    open_pool,
    thread_count,
)
from virnuc_dask.analysis.rows import embedded_rows, mean_row
from virnuc_dask.analysis.stored_fits import Space
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync, write_durably
from virnuc_dask.store.store import Store

# Training rows per list; faiss asks for at least 39.
_ROWS_PER_LIST = 64
# If rows are few, all are used, since they also determine the range of each feature.
_FEWEST_TRAINED_ON, _MOST_TRAINED_ON = 2**12, 2**18
# When the rows grow by more than this factor, the lists are too few.
_GROWTH = 4
_LISTS_PER_ROOT = 4
_SHARE_SEARCHED = 1 / 32
_FEWEST_SEARCHED = 16
# The file of the rows gets a new name each time; the other file contains that name.
_ABOUT = "about.json"
_ROWS = re.compile(r"rows-[0-9a-f]{32}\.faiss")
_OURS = re.compile(r"rows(-[0-9a-f]{32})?\.faiss|about\.json(~.*\.partial)?")


@dataclass(frozen=True, slots=True)
class Index:
    """An open index.

    Attributes
    ----------
    faiss : faiss.Index
        Contains the rows minus the mean, scaled to length 1, so that dot products are cosines.
    store : str
        Id of the indexed store.
    mean : ndarray, float32, shape (D,)
        Mean of the rows when the lists were learned.
    chunks : list of int
        Chunks with their rows in the index.
    trained : int
        Number of embedded rows when the lists were learned.
    """

    faiss: Any
    store: str
    mean: NDArray[np.float32]
    chunks: list[int]
    trained: int

    def search(
        self, vectors: NDArray[np.float32], own: NDArray[np.int64], k: int, threads: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows of the k nearest neighbours, shape (n, k) each; NaN and -1 if missing.

        Parameters
        ----------
        vectors : ndarray, float32, shape (n, D)
        own : ndarray, int64, shape (n,)
            Row of each query, or -1. A row is not its own neighbour.
        k : int
        threads : int
        """
        with _openmp_threads(threads):
            scores, rows = self.faiss.search(Space(self.mean, True)(vectors), k + 1)
        # Drop the query itself, or else the last hit. faiss fills missing hits with -1.
        is_own = (rows == own[:, None]) & (rows >= 0)
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
    refit: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Build an approximate index of a store's rows, or add missing chunks to one.

    The index (faiss ``IVF,SQ8``) stores one byte per feature, in lists around 4·√n centres that
    are learned from a sample. A search reads only the lists nearest to the query. Similarities are
    cosines after subtraction of the mean of the rows. The index is in memory during build and
    search: D bytes per row. The sample has 256·√n rows, from 4,096 to 262,144, in float32, and
    faiss copies it: at most 2.7 GB for D = 1,280.

    Rows that are added later go into the existing lists. When the store has more than four times
    the rows that it had when the lists were learned, the mean and the lists are learned again.

    A complete new index replaces the old one in one step. If the call is killed, the old index
    stays.

    Parameters
    ----------
    store : path
        A run may still fill it. The same call later adds the new rows.
    out : path, optional
        A directory. Default: the store's path plus ``.faiss``.
    random_state : int
        Seed of the sample.
    refit : bool
        Learn the mean and the lists again, from all rows embedded now.
    workers : int, optional
        Threads. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks added so far and their total.
    force : bool
        Replace a damaged index, or one of another store. A directory that contains other files is
        not replaced.

    Returns
    -------
    Path
        Directory of the index.

    Raises
    ------
    UsageError
        faiss is not installed, `out` is not an index or is one of another store, or no row is
        embedded.
    StoreError
        A chunk is damaged.
    """
    _faiss()  # or an error, before anything is read
    path = index_path(store, out)
    opened, threads = Store(store), thread_count(workers)
    present = np.flatnonzero(opened.present()).tolist()
    index = _index_to_add_to(path, opened, force=force)
    if not present:
        raise UsageError(f"{store} has no embedded row yet")
    if index is not None and not refit:
        due = sorted({*present} - {*index.chunks})
        if not due:
            return path
        refit = index.faiss.ntotal + len(embedded_rows(opened, due)) > _GROWTH * index.trained
    if index is None or refit:
        index, due = _trained(opened, present, random_state, threads), present
    count = ChunkCounter(progress, len(due))
    with open_pool(opened, threads, None) as pool, _openmp_threads(threads):
        calls = (([chunk], index.mean) for chunk in due)
        for rows, directions in pool.run(_rows_of, calls, count):
            index.faiss.add_with_ids(directions, rows)
    _write(replace(index, chunks=sorted([*index.chunks, *due])), path)
    return path


def index_path(store: str | Path, out: str | Path | None) -> Path:
    """Directory of a store's index.

    Raises
    ------
    UsageError
        The store is at a URL, and `out` is not given.
    """
    if out is None and "://" in str(store):
        raise UsageError(f"{store} is at a URL: give a directory on this machine for the index")
    return Path(expanded(f"{str(store).rstrip('/')}.faiss" if out is None else out))


def open_index(path: str | Path) -> Index:
    """Open an index.

    Raises
    ------
    UsageError
        faiss is not installed, or `path` is not an index.
    """
    folder, about = Path(expanded(path)), b""
    while True:
        before = about
        try:
            about = (folder / _ABOUT).read_bytes()
            return _read(folder, about)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            # Another process may have just replaced the index and removed the old file of rows.
            if about == before:
                raise UsageError(
                    f"{path} is not an index: {error}; `virnuc-dask index` makes one"
                ) from error


def _read(folder: Path, content: bytes) -> Index:
    about = json.loads(content)
    if not _ROWS.fullmatch(about["file"]):
        raise ValueError(f"{about['file']!r} is not a file of an index")
    mean = np.array(about["mean"], np.float32)
    index = _faiss().read_index(str(folder / about["file"]))
    if mean.shape != (index.d,):
        raise ValueError(f"its mean does not have {index.d} features")
    chunks = [int(chunk) for chunk in about["chunks"]]
    return Index(index, str(about["store"]), mean, chunks, int(about["trained"]))


def _index_to_add_to(path: Path, store: Store, *, force: bool) -> Index | None:
    """The existing index; None if a new one is needed."""
    if not path.exists():
        return None
    is_ours = path.is_dir() and all(_OURS.fullmatch(name) for name in os.listdir(path))
    if is_ours and not (path / _ABOUT).exists():
        return None  # it is empty, or the first call was killed
    try:
        index = open_index(path)
    except UsageError as error:
        if not is_ours:
            raise
        if not force:
            raise UsageError(f"{error}, with --force to replace this one") from error
        return None
    if index.store != store.id:
        if not force:
            raise UsageError(f"{path} is an index of another store; --force replaces it")
        return None
    return index


def _trained(store: Store, present: list[int], random_state: int, threads: int) -> Index:
    faiss = _faiss()
    with open_pool(store, threads, None) as pool:
        mean, rows, _ = mean_row(store, present, pool, ChunkCounter(None, 0))
    if not rows:
        raise UsageError(f"{store.path} has no embedded row yet")
    lists = max(1, min(math.isqrt(rows) * _LISTS_PER_ROOT, rows // _ROWS_PER_LIST))
    size = min(rows, max(lists * _ROWS_PER_LIST, _FEWEST_TRAINED_ON), _MOST_TRAINED_ON)
    sample = np.empty((size, store.dimension), np.float32)
    taken = 0
    for chunk in np.random.default_rng(random_state).permutation(present).tolist():
        part = _rows_of(store, [chunk], mean)[1][: size - taken]
        sample[taken : taken + len(part)] = part
        taken += len(part)
        if taken == size:
            break
    index = faiss.index_factory(store.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # else it warns when the sample has its largest size
    with _openmp_threads(threads):
        index.train(sample)
    index.nprobe = max(_FEWEST_SEARCHED, round(lists * _SHARE_SEARCHED))
    return Index(index, store.id, mean, [], rows)


def _rows_of(
    store: Store, chunks: list[int], mean: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows, directions = [np.zeros(0, np.int64)], [np.zeros((0, store.dimension), np.float32)]
    for numbers, values in blocks(store, chunks):
        block = as_float32(values)
        check_finite(store, block)
        rows.append(numbers)
        directions.append(Space(mean, True)(block))
    return np.concatenate(rows), np.concatenate(directions)


def _write(index: Index, path: Path) -> None:
    """Replace the old index by a new one in one step."""
    folder = Path(os.path.realpath(path))
    file = folder / f"rows-{uuid4().hex}.faiss"
    about = asdict(replace(index, faiss=None)) | {"mean": index.mean.tolist(), "file": file.name}
    del about["faiss"]
    if not folder.exists():
        folder.mkdir()
        sync(folder.parent)
    with _locked(folder):
        try:
            _faiss().write_index(index.faiss, str(file))
            sync(file)
            write_durably(folder / _ABOUT, json.dumps(about).encode())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        for name in os.listdir(folder):
            if _OURS.fullmatch(name) and name not in (_ABOUT, file.name):
                (folder / name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other writers, which would remove files that are not yet in use."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f"an approximate index needs faiss ({error}): pip install faiss-cpu"
        ) from error
    return faiss


@contextmanager
def _openmp_threads(number: int) -> Iterator[None]:
    """Let faiss use this many threads. Torch has the same setting, so it is put back."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
