"""A map: each row of a store as a point in the plane, by PCA or UMAP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.fits import Space, check_seed, find_fit, note_of, packed, unpacked
from virnuc_dask.analysis.passes import (
    ChunkCounter,
    Progress,
    as_float32,
    blocks,
    check_finite,
    fill,
    open_pool,
    thread_count,
)
from virnuc_dask.analysis.rows import random_rows, read_vectors
from virnuc_dask.errors import UsageError
from virnuc_dask.store.results import MAP_DIMENSIONS, keep_result
from virnuc_dask.store.store import Store

Method = Literal["pca", "umap"]
METHODS: tuple[str, ...] = get_args(Method)
UMAP_SAMPLE = 10_000
_NEIGHBOURS = 15
_MIN_DIST = 0.1
_LEAST_ROWS = 2
# A call sums so many rows; sums do not depend on the number of threads.
_ROWS_PER_SUM = 65_536
# Matrices of products that are in memory at once, here or on a client's workers.
_PRODUCT_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Map:
    """What `make_map` has done.

    Attributes
    ----------
    store : str
    name : str
        Of the array in the store, float32, shape (records, 2): ``map_pca``.
    method : {'pca', 'umap'}
    fitted_rows : int
        Rows that the map was fitted to.
    explained_variance_ratio : tuple of float, optional
        Of a PCA, the part of all variance that each axis has.
    computed_chunks : int
        Chunks that were computed now; the others were there.
    note : str, optional
        A reason to fit it again.
    comment : str, optional
        A word of warning about random weights.
    """

    store: str
    name: str
    method: Method
    fitted_rows: int
    explained_variance_ratio: tuple[float, ...] | None
    computed_chunks: int
    note: str | None = None
    comment: str | None = None


def make_map(
    store: str | Path,
    name: str | None = None,
    *,
    method: Method = "pca",
    sample: int | None = None,
    random_state: int = 0,
    replace: bool = False,
    refit: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Map:
    """Give each embedded row of a store a place in the plane, kept in the store as ``map_NAME``.

    The store may still be filling. The same call again computes only what is missing, in the same
    map: what was fitted is kept with it. Memory does not grow with the rows.

    PCA is exact, of all rows that are embedded when it is fitted: one pass sums the rows and their
    products in float64, and the axes are the first two eigenvectors of the covariance. The entry of
    the largest size in each is positive, as in scikit-learn [1]_. An incremental PCA would be an
    approximation, and takes many times as long, as it decomposes a matrix for each batch.

    UMAP [2]_ is fitted to a random sample of rows, minus their mean and divided by their lengths,
    so that distance is the cosine of `nearest`. Other rows are placed among the sample's. Its model
    cannot be kept without pickle: the numbers of the sample's rows are kept, and later calls fit
    them again, which gives the same model on the same kind of machine. It is fitted, and places
    all rows, in one thread of this process: on a large store that takes much longer than PCA.

    Parameters
    ----------
    store : path
    name : str, optional
        Letters, digits and underscores. Default: the method.
    method : {'pca', 'umap'}
        UMAP needs the extra ``umap``.
    sample : int, optional
        Rows that UMAP is fitted to. Default: 10,000.
    random_state : int
        Of UMAP and its sample. PCA is not random.
    replace : bool
        Replace a map of this name that was made with other settings.
    refit : bool
        Fit again, to the rows that are there now, and replace the map.
    workers : int, optional
        Threads. Default: one for each core, at most 16.
    progress : callable, optional
        Called with the chunks read so far and how many will be, for each pass.
    client : distributed.Client, optional
        Whose workers compute a PCA. UMAP ignores it, as it does `workers` once the rows of its
        sample are read.

    Returns
    -------
    Map

    Raises
    ------
    UsageError
        The settings make no sense, there is another map of this name, there are too few rows, or
        umap-learn is not installed.
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    NotAStoreError

    References
    ----------
    .. [1] Halko et al., SIAM Review 53, 217 (2011); signs: `sklearn.utils.extmath.svd_flip`.
    .. [2] McInnes, Healy and Melville, arXiv:1802.03426 (2018).
    """
    settings = _settings(method, sample, random_state)
    name = method if name is None else name
    threads = thread_count(workers)
    opened = Store(store)
    about, other = find_fit(opened, "map", name, settings, replace=replace, refit=refit)
    if method == "umap":
        client = None
    transform: Any = None
    if about is None and method == "pca":
        about = settings | _fit_pca(opened, threads, client, progress)
    elif about is None:
        about, transform = _fit_umap(opened, settings, threads)
    result = keep_result(opened, "map", name, about, replace=other)
    done = 0
    if (opened.present() & ~result.present()).any():
        if method == "pca":
            transform = _projection(opened, about)
        elif transform is None:
            transform = _umap(opened, about, threads)
        # Numba's threads may not be entered by several.
        done = fill(
            result,
            transform,
            workers=1 if method == "umap" else threads,
            client=client,
            progress=progress,
        )
    ratio = about.get("explained_variance_ratio")
    return Map(
        str(opened.path),
        result.name,
        method,
        int(about["rows"]),
        tuple(ratio) if ratio else None,
        done,
        note_of(opened, about, result.name),
        opened.model.comment().get("comment"),
    )


def _settings(method: str, size: int | None, random_state: int) -> dict[str, Any]:
    if method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    check_seed(random_state)
    if method == "pca":
        if size is not None:
            raise UsageError("sample is for UMAP; a PCA is of all rows")
        return {"method": method}
    size = UMAP_SAMPLE if size is None else size
    if size <= _NEIGHBOURS:
        raise UsageError(f"sample must be more than {_NEIGHBOURS} rows, not {size}")
    try:
        version = import_module("umap").__version__
    except ImportError as error:
        raise UsageError(
            f"UMAP needs umap-learn ({error}): pip install 'virnuc_dask[umap]'"
        ) from error
    return {
        "method": method,
        "sample": size,
        "random_state": random_state,
        "n_neighbors": _NEIGHBOURS,
        "min_dist": _MIN_DIST,
        "version": version,
    }


# --- PCA -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Projection:
    mean: NDArray[np.float32]
    axes: NDArray[np.float32]

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coordinates, shape (n, 2)."""
        return np.asarray((rows - self.mean) @ self.axes.T, np.float32)


def _projection(store: Store, about: dict[str, Any]) -> _Projection:
    mean = unpacked(store, about, "mean", store.dimension)[0]
    return _Projection(mean, unpacked(store, about, "axes", store.dimension)[:MAP_DIMENSIONS])


def _fit_pca(store: Store, threads: int, client: Any, progress: Progress | None) -> dict[str, Any]:
    """Mean, axes and their part of the variance, of all rows that are there."""
    from scipy.linalg import eigh

    present = np.flatnonzero(store.present()).tolist()
    size = store.dimension
    total, products, rows = np.zeros(size), np.zeros((size, size), order="F"), 0
    most = max(1, _PRODUCT_BYTES // products.nbytes)
    with open_pool(store, min(threads, most), client) as opened:
        pool = replace(opened, width=min(opened.width, most))
        calls = ((group,) for group in _groups(store, present))
        counter = ChunkCounter(progress, len(present))
        for part, of_part, count in pool.run(_products, calls, counter):
            total += part
            products += of_part
            rows += count
        check_finite(store, total)
        if rows < _LEAST_ROWS:
            raise UsageError(f"{store.path} has {rows} embedded rows, too few for a map")
        # In place: the sums are as large as anything here.
        mean = total / float(rows)
        products /= rows
        products -= np.outer(mean, mean)
        variance = max(float(np.trace(products)), np.finfo(float).tiny)
        last = [size - MAP_DIMENSIONS, size - 1]
        values, axes = eigh(products, lower=True, subset_by_index=last, overwrite_a=True)
    axes = axes.T[::-1]
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.sign(axes[np.arange(MAP_DIMENSIONS), largest])[:, None]
    ratio = np.clip(values[::-1] / variance, 0, 1)
    return {
        "rows": rows,
        "chunks": len(present),
        "mean": packed(mean),
        "axes": packed(axes),
        "explained_variance_ratio": [float(part) for part in ratio],
    }


def _groups(store: Store, chunks: list[int]) -> Iterator[list[int]]:
    step = max(1, _ROWS_PER_SUM // store.identity.rows_per_chunk)
    return (chunks[first : first + step] for first in range(0, len(chunks), step))


def _products(
    store: Store, chunks: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Sum of rows, shape (D,), lower triangle of the sum of their products, (D, D), and rows."""
    from scipy.linalg.blas import dsyrk

    size = store.dimension
    total, products, count = np.zeros(size), np.zeros((size, size), order="F"), 0
    for rows, values in blocks(store, chunks):
        block = as_float32(values).astype(np.float64)
        total += block.sum(axis=0)
        products = dsyrk(1, block.T, 1, products, lower=True, overwrite_c=True)
        count += len(rows)
    return total, products, count


# --- UMAP ----------------------------------------------------------------------------------------


class _Umap:
    """Places of rows: those of the sample where these were fitted, others among them."""

    def __init__(self, model: Any, space: Space, rows: NDArray[np.float32]) -> None:
        self._model, self._space = model, space
        self._known = dict(zip(map(_digest, rows), model.embedding_, strict=True))

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.empty((len(rows), MAP_DIMENSIONS), np.float32)
        known = [self._known.get(_digest(row)) for row in rows]
        is_new = np.array([place is None for place in known])
        for number in np.flatnonzero(~is_new):
            found[number] = known[number]
        if is_new.any():
            found[is_new] = self._model.transform(self._space(rows[is_new]))
        return found


def _digest(row: NDArray[np.float32]) -> bytes:
    return sha256(row.tobytes()).digest()


def _fit_umap(store: Store, settings: dict[str, Any], threads: int) -> tuple[dict[str, Any], _Umap]:
    """What is kept of a fit, the rows of its sample; and the fit."""
    present = store.present()
    rows, _ = random_rows(store, present, settings["sample"], settings["random_state"])
    about = settings | {
        "rows": len(rows),
        "chunks": int(present.sum()),
        "sampled_rows": rows.tolist(),
    }
    return about, _umap(store, about, threads)


def _umap(store: Store, about: dict[str, Any], threads: int) -> _Umap:
    from umap import UMAP

    rows = np.array(about["sampled_rows"], np.int64)
    vectors = np.unique(read_vectors(store, rows, threads), axis=0)
    if len(vectors) <= _NEIGHBOURS:
        raise UsageError(
            f"{store.path} has {len(vectors)} different embedded rows; UMAP needs more than"
            f" {_NEIGHBOURS}"
        )
    space = Space(vectors.mean(axis=0, dtype=np.float64).astype(np.float32), is_unit=True)
    model = UMAP(
        n_neighbors=_NEIGHBOURS,
        min_dist=_MIN_DIST,
        random_state=about["random_state"],
        n_jobs=1,  # several would not give the same again
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(space(vectors))
    return _Umap(model, space, vectors)
