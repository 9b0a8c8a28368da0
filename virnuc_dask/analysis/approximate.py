"""An approximate index of a store's rows, by faiss, for searches that cannot wait."""

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

from virnuc_dask.analysis.fits import Space
from virnuc_dask.analysis.passes import (
    ChunkCounter,
    Progress,
    as_float32,
    blocks,
    check_finite,
    open_pool,
    thread_count,
)
from virnuc_dask.analysis.rows import embedded_rows, mean_row
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync, write_durably
from virnuc_dask.store.store import Store

# Rows to learn from for each list, as faiss asks for at least 39.
_ROWS_PER_LIST = 64
# Of few rows all, since the range of each feature is learnt from them too.
_FEWEST_TRAINED_ON, _MOST_TRAINED_ON = 2**12, 2**18
# Once there are so many times the rows, there are too few lists.
_GROWTH = 4
_LISTS_PER_ROOT = 4
_SHARE_SEARCHED = 1 / 32
_FEWEST_SEARCHED = 16
# The file of the rows has a new name each time; the other file says which one it is.
_ABOUT = "about.json"
_ROWS = re.compile(r"rows-[0-9a-f]{32}\.faiss")
_OURS = re.compile(r"rows(-[0-9a-f]{32})?\.faiss|about\.json(~.*\.partial)?")


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
    trained : int
        Rows that there were when the lists were learnt.
    """

    faiss: Any
    store: str
    mean: NDArray[np.float32]
    chunks: list[int]
    trained: int

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
        scores, rows = self.faiss.search(Space(self.mean, True)(vectors), k + 1)
        # The row itself goes, or else the last. faiss fills up with -1.
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
    """Build an approximate index of a store's rows, or add to one the chunks that it lacks.

    The rows are in lists around 4·√n centres, which are learnt from a sample, and one byte for each
    feature is kept (faiss's ``IVF,SQ8``): a search looks into the lists nearest to the query. The
    index is of cosines after the mean of the rows is subtracted. It is in memory while it is built
    and searched: D bytes for each row. The sample is of 256·√n rows, from 4,096 to 262,144, in
    float32, of which faiss makes a copy: for D = 1,280 at most 2.7 GB.

    Rows that are added later come into the lists that there are. When there are more than four
    times the rows that the lists were learnt with, the mean and the lists are learnt anew.

    A new index has its place in one step, once it is whole: whenever the call is killed, the index
    that was there is there.

    Parameters
    ----------
    store : path
        May still be filling; the same call later adds what has come.
    out : path, optional
        A directory. Default: the store's path with ``.faiss`` behind it.
    random_state : int
        Of the sample.
    refit : bool
        Learn the mean and the lists anew, from the rows that are there now.
    workers : int, optional
        Threads. Default: one for each core, at most 16.
    progress : callable, optional
        Called with the chunks added so far and how many will be.
    force : bool
        Replace an index that is damaged or of another store. A directory with other files in it is
        not replaced.

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
    index = _index_to_add_to(path, opened, force=force)
    if not present:
        raise UsageError(f"{store} has no embedded row yet")
    faiss.omp_set_num_threads(threads)
    if index is not None and not refit:
        due = sorted({*present} - {*index.chunks})
        if not due:
            return path
        refit = index.faiss.ntotal + len(embedded_rows(opened, due)) > _GROWTH * index.trained
    if index is None or refit:
        index, due = _trained(opened, present, random_state, threads), present
    count = ChunkCounter(progress, len(due))
    with open_pool(opened, threads, None) as pool:
        calls = (([chunk], index.mean) for chunk in due)
        for rows, directions in pool.run(_rows_of, calls, count):
            index.faiss.add_with_ids(directions, rows)
    _write(replace(index, chunks=sorted([*index.chunks, *due])), path)
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
    folder, about = Path(expanded(path)), b""
    while True:
        before = about
        try:
            about = (folder / _ABOUT).read_bytes()
            return _read(folder, about)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            # Another process may just have put a new index there, and removed this one's rows.
            if about == before:
                raise UsageError(
                    f"{path} is no index: {error}; `virnuc-dask index` makes one"
                ) from error


def _read(folder: Path, content: bytes) -> Index:
    about = json.loads(content)
    if not _ROWS.fullmatch(about["file"]):
        raise ValueError(f"{about['file']!r} is no file of an index")
    mean = np.array(about["mean"], np.float32)
    index = _faiss().read_index(str(folder / about["file"]))
    if mean.shape != (index.d,):
        raise ValueError(f"its mean is not of {index.d} features")
    chunks = [int(chunk) for chunk in about["chunks"]]
    return Index(index, str(about["store"]), mean, chunks, int(about["trained"]))


def _index_to_add_to(path: Path, store: Store, *, force: bool) -> Index | None:
    """What is there; None if a new index is to be made."""
    if not path.exists():
        return None
    is_ours = path.is_dir() and all(_OURS.fullmatch(name) for name in os.listdir(path))
    if is_ours and not (path / _ABOUT).exists():
        return None  # empty, or the first call was killed
    try:
        index = open_index(path)
    except UsageError as error:
        if not is_ours:
            raise
        if not force:
            raise UsageError(f"{error}, with --force in place of this one") from error
        return None
    if index.store != store.id:
        if not force:
            raise UsageError(f"{path} is of another store; --force replaces it")
        return None
    return index


def _trained(store: Store, present: list[int], random_state: int, threads: int) -> Index:
    faiss = _faiss()
    with open_pool(store, threads, None) as pool:
        mean, rows, _ = mean_row(store, present, pool, ChunkCounter(None, 0))
    if not rows:
        raise UsageError(f"{store.path} has no embedded row yet")
    lists = max(1, min(math.isqrt(rows) * _LISTS_PER_ROOT, rows // _ROWS_PER_LIST))
    wanted = min(rows, max(lists * _ROWS_PER_LIST, _FEWEST_TRAINED_ON), _MOST_TRAINED_ON)
    sample = np.empty((wanted, store.dimension), np.float32)
    taken = 0
    for chunk in np.random.default_rng(random_state).permutation(present).tolist():
        part = _rows_of(store, [chunk], mean)[1][: wanted - taken]
        sample[taken : taken + len(part)] = part
        taken += len(part)
        if taken == wanted:
            break
    index = faiss.index_factory(store.dimension, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # or it warns where the sample is at its largest
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
    """Put an index in place in one step, and remove the one that was there."""
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
    """Nobody else writes here meanwhile, and so removes what is not yet in place."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f"an approximate index needs faiss ({error}): pip install 'virnuc_dask[faiss]'"
        ) from error
    return faiss
