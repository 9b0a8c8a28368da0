"""Clusters of similar rows by k-means, with one chunk per thread in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import (
    ChunkCounter,
    Pool,
    Progress,
    as_float32,
    blocks,
    check_finite,
    fill,
    open_pool,
    thread_count,
)
from virnuc_dask.analysis.rows import random_rows, read_vectors, taken
from virnuc_dask.analysis.stored_fits import Space, check_seed, find_fit, note_of, packed, unpacked
from virnuc_dask.analysis.tables import none_below_zero, write_rows
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import METRICS, Metric
from virnuc_dask.store.results import keep_result
from virnuc_dask.store.store import Store

_SAMPLE_ROWS = 10_000
_SAMPLE_PER_CLUSTER = 20
_STARTS = 10
_MOST_PASSES = 20
# Stop when a pass reduces the mean squared distance by less than this fraction.
_TOLERANCE = 1e-3
_SILHOUETTE_ROWS = 4_000
_TYPES = {
    "cluster": "int64",
    "size": "int64",
    "medoid": "string",
    "row": "int64",
    "similarity": "float32",
    "distance": "float32",
    "silhouette": "float32",
    "length": "int32",
    "description": "string",
}
# Limit of the centres, which are in the metadata of the store that every reader reads.
_MOST_VALUES = 2**21


@dataclass(frozen=True, slots=True)
class Clusters:
    """Result of `make_clusters`, one value per cluster.

    Clusters are ordered by size, the largest first, when the centres are fitted.

    Attributes
    ----------
    store : str
    name : str
        Name of the array in the store, such as ``cluster_kmeans``: int32, shape (records,), -1
        for rows without an embedding.
    metric : {'cosine', 'euclidean'}
    sizes : ndarray, int64, shape (k,)
        Rows in each cluster.
    medoid_rows : ndarray, int64, shape (k,)
        The row nearest to the centre; the first of equally near rows. -1 for an empty cluster.
    medoid_ids, medoid_descriptions : list of str
    medoid_lengths : ndarray, int32, shape (k,)
        Residues.
    medoid_scores : ndarray, float32, shape (k,)
        Cosine, or distance, between medoid and centre.
    silhouettes : ndarray, float32, shape (k,)
        Mean silhouette coefficient of each cluster, from -1 to 1, in a sample of 4,000 random
        rows; NaN for clusters without a sampled row.
    silhouette : float
        Mean over all sampled rows; NaN if they are all in one cluster.
    fitted_rows : int
        Rows that the centres were fitted to.
    computed_chunks : int
        Chunks that this call labelled; the others had labels before.
    note : str, optional
        Reasons for doubt: rows that are not embedded yet, or that a new fit would cover.
    comment : str, optional
        Warning about random weights.
    """

    store: str
    name: str
    metric: Metric
    sizes: NDArray[np.int64]
    medoid_rows: NDArray[np.int64]
    medoid_ids: list[str]
    medoid_descriptions: list[str]
    medoid_lengths: NDArray[np.int32]
    medoid_scores: NDArray[np.float32]
    silhouettes: NDArray[np.float32]
    silhouette: float
    fitted_rows: int
    computed_chunks: int
    note: str | None = None
    comment: str | None = None


def make_clusters(
    store: str | Path,
    name: str = "kmeans",
    *,
    n_clusters: int = 8,
    metric: Metric = "cosine",
    random_state: int = 0,
    replace: bool = False,
    refit: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Clusters:
    """Cluster similar rows by k-means; store each row's cluster as ``cluster_NAME``.

    A run may still fill the store. The same call again labels only new rows, with the same
    centres, which are stored with the result. Memory does not grow with the number of rows.

    scikit-learn's `MiniBatchKMeans` [1]_ finds the initial centres, as the best of ten starts, in a
    random sample of 10,000 rows, or 20 per cluster if that is more. Then Lloyd's iterations [2]_
    run over all rows. Each pass over the chunks moves each centre to the mean of its rows. The
    passes stop when one reduces the mean squared distance by less than a thousandth, or after 20.
    All threads or workers share a pass. The result does not depend on the order of rows in
    the store; with batches of neighbouring chunks it would.

    For the cosine, the mean of the sample is subtracted from all rows, and rows are scaled to
    length 1, as in `nearest`; then distances are euclidean.

    Parameters
    ----------
    store : path
    name : str
        Letters, digits and underscores.
    n_clusters : int
    metric : {'cosine', 'euclidean'}
    random_state : int
    replace : bool
        Replace clusters of this name that were made with other settings.
    refit : bool
        Fit again to all rows embedded now, and replace the clusters.
    workers : int, optional
        Threads. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks read so far and their total, for each pass.
    client : distributed.Client, optional
        Compute on the workers of this client. Default: threads of this process.

    Returns
    -------
    Clusters

    Raises
    ------
    UsageError
        A setting is not valid, other clusters have this name, or there are too few rows.
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    NotAStoreError

    References
    ----------
    .. [1] Sculley, Web-scale k-means clustering, WWW 2010; starts: Arthur and Vassilvitskii,
       k-means++, SODA 2007.
    .. [2] Lloyd, IEEE Transactions on Information Theory 28, 129 (1982).
    """
    threads = thread_count(workers)
    if metric not in METRICS:
        raise UsageError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    if n_clusters < 2:
        raise UsageError(f"n_clusters must be at least 2, not {n_clusters}")
    check_seed(random_state)
    opened = Store(store)
    most = _MOST_VALUES // opened.dimension
    if n_clusters > most:
        raise UsageError(
            f"{opened.path}: n_clusters must be at most {most:,} for {opened.dimension} features"
        )
    settings = {"n_clusters": n_clusters, "metric": metric, "random_state": random_state}
    about, other = find_fit(opened, "cluster", name, settings, replace=replace, refit=refit)
    if about is None:
        about = settings | _fit(opened, settings, threads, client, progress)
    labeller = _labeller(opened, about)
    result = keep_result(opened, "cluster", name, about, replace=other)
    done = fill(result, labeller, workers=threads, client=client, progress=progress)
    labelled = opened.present() & result.present()
    with open_pool(opened, threads, client) as pool:
        sizes, medoids = _medoids(labeller, np.flatnonzero(labelled).tolist(), pool, progress)
    rows, _ = random_rows(opened, labelled, _SILHOUETTE_ROWS, random_state)
    silhouettes, silhouette = _silhouettes(labeller, read_vectors(opened, rows, threads))
    is_described = "description" in opened.names
    return Clusters(
        str(opened.path),
        result.name,
        metric,
        sizes,
        medoids,
        taken(opened, "sequence_id", medoids).tolist(),
        taken(opened, "description", medoids).tolist() if is_described else [""] * n_clusters,
        taken(opened, "length", medoids),
        _scores(labeller, opened, medoids, threads),
        silhouettes,
        silhouette,
        int(about["rows"]),
        done,
        note_of(opened, about, result.name),
        opened.model.comment().get("comment"),
    )


def write_clusters(
    found: Clusters, out: str | Path | IO[str], *, guard: bool = True, force: bool = False
) -> int:
    """Write clusters as a table, one per line, in the order of their numbers.

    The columns are ``cluster``, ``size`` in rows, ``medoid`` (identifier), ``row``,
    ``similarity`` or ``distance`` between medoid and centre, ``silhouette``, and the medoid's
    ``length`` in residues and ``description``. An empty cluster has no medoid.

    Parameters
    ----------
    found : Clusters
    out, guard, force
        As in `write_rows`.

    Returns
    -------
    int
        Number of clusters.
    """
    about = {"store": found.store, "array": found.name, "metric": found.metric}
    columns = {
        "cluster": list(range(len(found.sizes))),
        "size": found.sizes.tolist(),
        "medoid": found.medoid_ids,
        "row": none_below_zero(found.medoid_rows.tolist()),
        # Scalars stay float32, so that they print as the shortest exact text.
        "similarity" if found.metric == "cosine" else "distance": list(found.medoid_scores),
        "silhouette": list(found.silhouettes),
        "length": none_below_zero(found.medoid_lengths.tolist()),
        "description": found.medoid_descriptions,
    }
    if found.comment:
        about["comment"] = found.comment
    types = {name: _TYPES[name] for name in columns}
    return write_rows([columns], types, out, about=about, guard=guard, force=force)


# --- centres -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Labeller:
    """Assigns each row to its nearest centre.

    Attributes
    ----------
    space : Space
    centres : ndarray, float32, shape (k, D)
    """

    space: Space
    centres: NDArray[np.float32]

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.intp]:
        """Labels, shape (n,)."""
        return self.look(self.space(rows))[0]

    def look(self, points: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Labels and squared distances, shape (n,) each, of points in the space."""
        nearness = points @ self.centres.T
        nearness -= np.vecdot(self.centres, self.centres) / 2
        labels = nearness.argmax(axis=1)
        best = np.take_along_axis(nearness, labels[:, None], axis=1)[:, 0]
        return labels, np.maximum(np.vecdot(points, points) - 2 * best, 0)


def _labeller(store: Store, about: dict[str, Any]) -> _Labeller:
    size = store.dimension
    origin = unpacked(store, about, "origin", size)[0]
    centres = unpacked(store, about, "centres", size)
    return _Labeller(Space(origin, about["metric"] == "cosine"), centres)


def _fit(
    store: Store,
    settings: dict[str, Any],
    threads: int,
    client: Any,
    progress: Progress | None,
) -> dict[str, Any]:
    """Fit centres to all embedded rows; return them as they are stored."""
    present = store.present()
    labeller = _start(store, present, settings, threads)
    chunks = np.flatnonzero(present).tolist()
    before, passes = np.inf, 0
    with open_pool(store, threads, client) as pool:
        while passes < _MOST_PASSES:
            sums, sizes, squares = _sum_all(labeller, chunks, pool, progress)
            passes += 1
            centres = labeller.centres.copy()  # a centre without rows stays where it is
            centres[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
            labeller = _Labeller(labeller.space, centres)
            if squares >= before * (1 - _TOLERANCE):
                break
            before = squares
        # The last move may have changed the order of the sizes.
        sizes = _sum_all(labeller, chunks, pool, progress)[1]
    order = np.argsort(-sizes, kind="stable")
    labeller = _Labeller(labeller.space, labeller.centres[order])
    return {
        "rows": int(sizes.sum()),
        "chunks": len(chunks),
        "passes": passes,
        "origin": packed(labeller.space.origin),
        "centres": packed(labeller.centres),
    }


def _start(
    store: Store, present: NDArray[np.bool_], settings: dict[str, Any], threads: int
) -> _Labeller:
    """Initial centres, from a sample."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    count = settings["n_clusters"]
    size = max(_SAMPLE_ROWS, _SAMPLE_PER_CLUSTER * count)
    rows, _ = random_rows(store, present, size, settings["random_state"])
    vectors = read_vectors(store, rows, threads)
    different = len(np.unique(vectors, axis=0))
    if different < count:
        raise UsageError(
            f"{store.path} has {different} different embedded rows, too few for {count} clusters"
        )
    is_cosine = settings["metric"] == "cosine"
    space = Space(vectors.mean(axis=0, dtype=np.float64).astype(np.float32), is_cosine)
    model = MiniBatchKMeans(count, n_init=_STARTS, random_state=settings["random_state"])
    with threadpool_limits(1):  # the sums of several threads would differ in the last bits
        model.fit(space(vectors))
    return _Labeller(space, model.cluster_centers_.astype(np.float32))


# --- passes over the chunks ----------------------------------------------------------------------


def _sum_all(
    labeller: _Labeller, chunks: list[int], pool: Pool, progress: Progress | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    """Sums of the rows of each cluster, shape (k, D), how many, (k,), and squares of distances."""
    sums, sizes = np.zeros(labeller.centres.shape), np.zeros(len(labeller.centres), np.int64)
    squares = 0.0
    calls = _calls(labeller, chunks, pool)
    for part, count, square in pool.run(_sum, calls, ChunkCounter(progress, len(chunks))):
        sums += part
        sizes += count
        squares += square
    check_finite(pool.store, sums)
    return sums, sizes, squares


def _sum(
    store: Store, chunks: list[int], labeller: _Labeller
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    sums, sizes = np.zeros(labeller.centres.shape), np.zeros(len(labeller.centres), np.int64)
    total = 0.0
    for _, values in blocks(store, chunks):
        points = labeller.space(as_float32(values))
        labels, squares = labeller.look(points)
        order = np.argsort(labels, kind="stable")
        found, firsts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        sums[found] += np.add.reduceat(points[order], firsts, axis=0)
        sizes[found] += counts
        total += float(squares.sum(dtype=np.float64))
    return sums, sizes, total


def _medoids(
    labeller: _Labeller, chunks: list[int], pool: Pool, progress: Progress | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in each cluster, and the one nearest to its centre, -1 in an empty one."""
    count = len(labeller.centres)
    sizes, rows = np.zeros(count, np.int64), np.full(count, -1)
    best = np.full(count, np.inf, np.float32)
    calls = _calls(labeller, chunks, pool)
    for of_part, row, square in pool.run(_nearest, calls, ChunkCounter(progress, len(chunks))):
        sizes += of_part
        is_nearer = square < best
        rows[is_nearer], best[is_nearer] = row[is_nearer], square[is_nearer]
    return sizes, rows


def _nearest(
    store: Store, chunks: list[int], labeller: _Labeller
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    count = len(labeller.centres)
    sizes, rows = np.zeros(count, np.int64), np.full(count, -1)
    best = np.full(count, np.inf, np.float32)
    for numbers, values in blocks(store, chunks):
        block = as_float32(values)
        check_finite(store, block)
        labels, squares = labeller.look(labeller.space(block))
        sizes += np.bincount(labels, minlength=count)
        order = np.lexsort((squares, labels))
        found, firsts = np.unique(labels[order], return_index=True)
        first = order[firsts]
        is_nearer = squares[first] < best[found]
        found, first = found[is_nearer], first[is_nearer]
        rows[found], best[found] = numbers[first], squares[first]
    return sizes, rows, best


def _calls(labeller: _Labeller, chunks: list[int], pool: Pool) -> Iterator[tuple[Any, ...]]:
    shared = pool.shared(labeller)
    return ((group, shared) for group in pool.grouped(chunks))


# --- quality ------------------------------------------------------------------------------------


def _scores(
    labeller: _Labeller, store: Store, medoids: NDArray[np.int64], threads: int
) -> NDArray[np.float32]:
    """Cosine or distance between each medoid and its centre; NaN without a medoid."""
    scores = np.full(len(medoids), np.nan, np.float32)
    is_there = medoids >= 0
    points = labeller.space(read_vectors(store, medoids[is_there], threads)).astype(np.float64)
    centres = labeller.centres[is_there].astype(np.float64)
    if labeller.space.is_unit:
        lengths = np.sqrt(np.vecdot(points, points) * np.vecdot(centres, centres))
        scores[is_there] = np.vecdot(points, centres) / np.where(lengths > 0, lengths, 1)
    else:
        scores[is_there] = np.linalg.norm(points - centres, axis=1)
    return scores


def _silhouettes(
    labeller: _Labeller, vectors: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float]:
    """Mean silhouette of the rows in each cluster, shape (k,), and of all rows."""
    from sklearn.metrics import silhouette_samples

    means = np.full(len(labeller.centres), np.nan, np.float32)
    points = labeller.space(vectors)
    labels = labeller.look(points)[0]
    found = np.unique(labels)
    if not 2 <= len(found) < len(labels):
        return means, float("nan")
    values = silhouette_samples(points, labels)
    for label in found:
        means[label] = values[labels == label].mean()
    return means, float(values.mean())
