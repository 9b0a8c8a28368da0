"""Maps: two coordinates for each row of a store, by PCA or UMAP."""

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

from virnuc_dask.analysis.chunk_passes import (
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
from virnuc_dask.analysis.stored_fits import Space, check_seed, find_fit, note_of, packed, unpacked
from virnuc_dask.errors import UsageError
from virnuc_dask.store.results import MAP_DIMENSIONS, keep_result
from virnuc_dask.store.store import Store

Method = Literal["pca", "umap"]
METHODS: tuple[str, ...] = get_args(Method)
UMAP_SAMPLE = 10_000
_NEIGHBOURS = 15
_MIN_DIST = 0.1
_LEAST_ROWS = 2
# Rows per call; it is fixed so that sums do not depend on the number of threads.
_ROWS_PER_SUM = 65_536
# Most bytes of D x D matrices in memory at once, here or on a client's workers.
_PRODUCT_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Map:
    """Result of `make_map`.

    Attributes
    ----------
    store : str
    name : str
        Name of the array in the store, such as ``map_pca``: float32, shape (records, 2).
    method : {'pca', 'umap'}
    fitted_rows : int
        Rows that the map was fitted to.
    explained_variance_ratio : tuple of float, optional
        Fraction of the variance along each axis; only for PCA.
    computed_chunks : int
        Chunks that this call computed; the others existed before.
    note : str, optional
        Reasons for doubt: rows that are not embedded yet, or that a new fit would cover.
    comment : str, optional
        Warning about random weights.
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
    """Project the embedded rows of a store to two dimensions; store them as ``map_NAME``.

    A run may still fill the store. The same call again computes only new rows, with the same fit,
    which is stored with the map. Memory does not grow with the number of rows.

    PCA is exact and uses all rows that are embedded at the time of the fit. One pass sums the rows
    and their products in float64; the axes are the first two eigenvectors of the covariance. In
    each axis, the entry with the largest absolute value is positive, as in scikit-learn [1]_. An
    incremental PCA would be an approximation and take many times as long, because it decomposes a
    matrix for each batch.

    UMAP [2]_ is fitted to a random sample of rows, minus their mean and scaled to length 1, so that
    distances correspond to the cosine of `nearest`. Other rows are projected into the fitted map.
    The model cannot be stored without pickle. So the map stores the row numbers of the sample, and
    later calls fit the same rows again; this gives the same model on the same kind of machine. UMAP
    fits and projects in one thread of this process. On a large store it takes much longer than PCA.

    Parameters
    ----------
    store : path
    name : str, optional
        Letters, digits and underscores. Default: the method.
    method : {'pca', 'umap'}
        UMAP needs the extra ``umap``.
    sample : int, optional
        Number of rows to fit UMAP to. Default: 10,000.
    random_state : int
        Seed of UMAP and its sample. PCA is not random.
    replace : bool
        Replace a map of this name that was made with other settings.
    refit : bool
        Fit again to all rows embedded now, and replace the map.
    workers : int, optional
        Threads. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks read so far and their total, for each pass.
    client : distributed.Client, optional
        Compute a PCA on the workers of this client. UMAP ignores it. UMAP uses `workers` only to
        read its sample.

    Returns
    -------
    Map

    Raises
    ------
    UsageError
        A setting is not valid, another map has this name, there are too few rows, or umap-learn
        is not installed.
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
        # Several threads must not call Numba's threads at once.
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
            raise UsageError("sample is for UMAP only; PCA uses all rows")
        return {"method": method}
    size = UMAP_SAMPLE if size is None else size
    if size <= _NEIGHBOURS:
        raise UsageError(f"sample must be more than {_NEIGHBOURS} rows, not {size}")
    try:
        version = import_module("umap").__version__
    except ImportError as error:
        raise UsageError(f"UMAP needs umap-learn ({error}): pip install umap-learn") from error
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
    """Mean, axes and explained variance ratio of all embedded rows."""
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
        # Compute in place, because these matrices are the largest arrays here.
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
    """Sum of rows, (D,), lower triangle of the sum of their products, (D, D), and row count."""
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
    """Coordinates of rows: those of the fit for sampled rows, projections for others."""

    def __init__(self, model: Any, space: Space, rows: NDArray[np.float32]) -> None:
        self._model, self._space = model, space
        self._known = dict(zip(map(_digest, rows), model.embedding_, strict=True))

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        points = np.empty((len(rows), MAP_DIMENSIONS), np.float32)
        known = [self._known.get(_digest(row)) for row in rows]
        is_new = np.array([point is None for point in known])
        for number in np.flatnonzero(~is_new):
            points[number] = known[number]
        if is_new.any():
            points[is_new] = self._model.transform(self._space(rows[is_new]))
        return points


def _digest(row: NDArray[np.float32]) -> bytes:
    return sha256(row.tobytes()).digest()


def _fit_umap(store: Store, settings: dict[str, Any], threads: int) -> tuple[dict[str, Any], _Umap]:
    """The stored form of a fit, with the row numbers of its sample; and the fit."""
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
        n_jobs=1,  # with several threads results differ between calls
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(space(vectors))
    return _Umap(model, space, vectors)
