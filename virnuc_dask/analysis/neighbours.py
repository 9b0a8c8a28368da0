"""Exact search for the most similar rows of a store, one block of rows at a time."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnuc_dask import caches
from virnuc_dask.analysis.approximate import Index, open_index
from virnuc_dask.analysis.chunk_passes import (
    ChunkCounter,
    Pool,
    Progress,
    as_float32,
    blocks,
    check_finite,
    open_pool,
    thread_count,
)
from virnuc_dask.analysis.compatibility import check_same_embeddings, note_on_lengths
from virnuc_dask.analysis.rows import (
    by_chunk,
    embedded_rows,
    known_names,
    mean_row,
    pending_note,
    random_rows,
    read_vectors,
    states,
    taken,
)
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import METRICS, Metric, Status
from virnuc_dask.store.store import ATTRIBUTE, SEQUENCES_PER_CHUNK, Store, is_embedded
from virnuc_dask.text import counted, printable

# One pass over all rows serves this many queries.
_QUERIES_AT_ONCE = 4096
_PAIRS_AT_ONCE = 1024
_EPSILON = float(np.finfo(np.float32).eps)
_NAMED = 10
_ALIKE = 3

# Increase this number when the same rows get another mean or other quantiles.
_CENTRE = 2
_RANDOM_ROWS = 512
_QUANTILES = (0.5, 0.99)


def nearest(
    store: str | Path,
    query: str | Sequence[str] | NDArray[np.floating[Any]] | None = None,
    *,
    k: int = 10,
    metric: Metric = "cosine",
    centre: bool = True,
    query_store: str | Path | None = None,
    index: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Any:
    """Find the k nearest rows of a store for each query; exact without an index.

    Only embedded rows are searched; a run may still fill the store. A row is not its own neighbour,
    but a copy of its sequence is. Memory holds one chunk per thread and the result, k rows per
    query; it does not grow with the number of rows. One pass over all rows serves 4,096 queries.

    The first centred search reads the embeddings twice, because similarities need the mean. The
    user's cache directory keeps the mean for the next search of the same chunks; the store does
    not, because only its runs write to it. Norms are not kept: they cost 3 % of the time of the
    products, and would take 4 bytes per row.

    Whether a similarity is high depends on the model and on the store. So an exact centred search
    also returns how similar the pairs of a random sample are, of 512 rows at most.

    Parameters
    ----------
    store : path
        The store to search.
    query : str, sequence of str, or ndarray, float, shape (n, D), optional
        Identifiers of rows of `query_store`, or of `store` without one; if an identifier occurs
        several times, all its rows are queries. For translated reads and tiles, an identifier may
        also be the ``read_id`` of a read or protein; all its rows are queries. Or vectors. An
        xarray.DataArray of either is accepted. Default: all embedded rows of `query_store`.
    k : int
        Neighbours per query.
    metric : {'cosine', 'euclidean'}
    centre : bool
        Subtract the mean of the store's embedded rows from all vectors first. Without this, even
        unrelated proteins have a cosine of 0.9. Distances do not change.
    query_store : path, optional
        Another store with the same weights, layer, pooling and precision.
    index : path, optional
        Index of the store from `build_index`, for a fast approximate search. It supports only the
        centred cosine, with the mean of the rows when it was made. Chunks that are not in the index
        are not searched; a note says so.
    workers : int, optional
        Threads, each with one BLAS thread. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks read so far and their total.
    client : distributed.Client, optional
        Search on the workers of this client. Default: threads of this process.

    Returns
    -------
    xarray.Dataset
        Dimensions ``query`` and ``neighbour``, nearest first; of equally near rows, lower row
        numbers first. Variables: ``row`` (int64), ``sequence_id`` and ``description`` (str; the
        latter if the store has it), ``length`` (int32, residues), ``status`` (str) and
        ``similarity`` (float32, from -1 to 1) or, for euclidean, ``distance`` (float32). Missing
        neighbours have row and length -1, empty texts and NaN. Coordinates: ``query_row`` (int64)
        and ``query_id``; -1 and empty for vectors. Attributes, if present: ``note`` and ``comment``
        are reasons to doubt the result; ``random_median`` and ``random_99`` are the median and the
        99th percentile of the similarities in a random sample of `store`; ``searched_rows`` is
        the number of its finished rows.

    Raises
    ------
    UsageError
        An identifier is unknown, or its row has no embedding; the stores are not comparable; `k`,
        `metric` or the shape of the vectors is not valid.
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    NotAStoreError
    """
    searched = Store(store)
    source = searched if query_store is None else Store(query_store)
    check_search(searched, source, k, metric)
    # Queries that are given are all embedded.
    read = [searched, source] if query is None else [searched]
    notes = [*dict.fromkeys(map(pending_note, read)), note_on_lengths(searched, source)]
    threads = thread_count(workers)
    rows, vectors = _queries(source, getattr(query, "values", query), query_store is not None)
    if index is None:
        found = list(
            search(
                searched,
                source,
                rows,
                vectors,
                k=k,
                metric=metric,
                centre=centre,
                threads=threads,
                progress=progress,
                client=client,
            )
        )
        random = found[0].random
    else:
        random = None
        if metric != "cosine" or not centre:
            raise UsageError("an index works only with the cosine metric and centring")
        opened = open_index(index)
        if opened.store != searched.id:
            raise UsageError(f"{index} is an index of another store than {searched.path}")
        notes.append(_note_on_chunks(searched, opened))
        found = list(_look_up(searched, source, rows, vectors, k, opened, threads))
    scores = np.concatenate([each.scores for each in found])
    neighbours = np.concatenate([each.rows for each in found])
    data = _dataset(searched, source, rows, neighbours, scores, metric, centre)
    data = data.assign_attrs(approximate=int(index is not None))
    if random:
        data = data.assign_attrs(
            random_median=random[0],
            random_99=random[1],
            searched_rows=searched.rows_in(np.flatnonzero(searched.present())),
        )
    note = "; ".join(note for note in notes if note)
    return data.assign_attrs(note=note) if note else data


def _note_on_chunks(searched: Store, index: Index) -> str | None:
    present = np.flatnonzero(searched.present())
    lacking = len(np.setdiff1d(present, index.chunks))
    if not lacking:
        return None
    return (
        f"the index lacks {lacking:,} of {counted(len(present), 'chunk')}; `virnuc-dask index` adds"
        " them"
    )


def _look_up(
    searched: Store,
    source: Store,
    rows: NDArray[np.int64],
    vectors: NDArray[np.float32] | None,
    k: int,
    index: Index,
    threads: int,
) -> Iterator[Found]:
    """Like `search`, with an index."""
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        part = rows[start : start + _QUERIES_AT_ONCE]
        if vectors is None:
            of_part = read_vectors(source, part, threads)
        else:
            of_part = vectors[start : start + _QUERIES_AT_ONCE]
        own = part if source.id == searched.id else np.full(len(part), -1)
        yield Found(*index.search(of_part, own, k, threads))


class Found(NamedTuple):
    """Neighbours of some queries.

    Attributes
    ----------
    scores : ndarray, float32, shape (queries, k)
        The cosine, or the distance times -1, best first; NaN if missing.
    rows : ndarray, int64, shape (queries, k)
        Rows of the searched store; -1 if missing.
    random : tuple of float, optional
        Median and 99th percentile of the centred cosine of two random rows of the searched store.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    random: tuple[float, float] | None = None


def search(
    searched: Store,
    source: Store,
    rows: NDArray[np.int64],
    vectors: NDArray[np.float32] | None = None,
    *,
    k: int,
    metric: Metric,
    centre: bool,
    threads: int,
    among: NDArray[np.bool_] | None = None,
    groups: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Iterator[Found]:
    """Find the nearest rows for 4,096 queries at a time.

    Parameters
    ----------
    searched, source : Store
        The store to search, and the store of the queries.
    rows : ndarray, int64, shape (n,)
        Rows of the queries in `source`.
    vectors : ndarray, float32, shape (n, D), optional
        The queries, if they are not rows.
    k, metric, centre, progress, client
        As in `nearest`. The mean is that of all embedded rows of `searched`.
    threads : int
    among : ndarray, bool, shape (records,), optional
        Rows of `searched` that may be neighbours. Default: all.
    groups : ndarray, int64, shape (records,), optional
        Group number of each row. Rows of the same group do not count as neighbours of each other.
        Only if `source` is `searched`. Default: each row is its own group.
    progress : callable, optional
    client : distributed.Client, optional

    Yields
    ------
    Found
    """
    present = searched.present()
    is_centred = centre and metric == "cosine"
    origin, random = np.zeros(searched.dimension, np.float32), None
    # Before the mean, so that a mean of changed chunks is never kept as that of others.
    key = _centre_key(searched, present) if is_centred else []
    known = _kept_centre(searched, key) if is_centred else _Centre(origin)
    chunks = np.flatnonzero(present if among is None else present & _any(searched, among)).tolist()
    batches = range(0, len(rows), _QUERIES_AT_ONCE)
    total = len(chunks) * len(batches) + (int(present.sum()) if known is None else 0)
    count = ChunkCounter(progress, total)
    of_first = None
    with open_pool(searched, threads, client) as pool:
        if known is None:
            # This reads all rows, so it can also return the first queries of the same store.
            is_own = vectors is None and source is searched
            first = rows[: _QUERIES_AT_ONCE if is_own else 0]
            known, read = _centre(searched, present, key, pool, count, first)
            of_first = read if is_own else None
        origin, random = known
        for start in batches:
            part = rows[start : start + _QUERIES_AT_ONCE]
            if vectors is not None:
                of_part = vectors[start : start + _QUERIES_AT_ONCE]
            elif start == 0 and of_first is not None:
                of_part = of_first
            else:
                of_part = read_vectors(source, part, threads)
            # Only in the same store can a query meet its own row.
            own = part if source.id == searched.id else np.full(len(part), -1)
            if groups is not None:
                own = groups[part]
            if metric == "euclidean":
                origin = of_part.mean(axis=0)  # a near origin keeps rounding errors small
            most = min(k, searched.records)
            task = _Task(of_part, own, origin, most, metric, among, groups)
            scores, neighbours = _padded(_search_all(task, chunks, pool, count), len(part), k)
            yield Found(scores, neighbours, random)


def _any(store: Store, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Chunks that contain any of the rows, bool, shape (chunk_count,)."""
    firsts = np.arange(0, store.records, store.identity.rows_per_chunk)
    return np.asarray(np.logical_or.reduceat(rows, firsts))


def check_search(searched: Store, source: Store, k: int, metric: str) -> None:
    """Refuse a search that is not valid.

    Raises
    ------
    UsageError
        `k` or `metric` is not valid, or the stores differ in weights, layer, pooling or precision.
    """
    if k < 1:
        raise UsageError(f"k must be at least 1, not {k}")
    if metric not in METRICS:
        raise UsageError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    check_same_embeddings(searched, source)


# --- queries -------------------------------------------------------------------------------------


def _queries(
    source: Store, query: Any, has_query_store: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """Row of each query, -1 for a vector; and the vectors, if given."""
    vectors = None
    if isinstance(query, np.ndarray) and query.dtype.kind == "f":
        if has_query_store:
            raise UsageError("give either vectors or a query store, not both")
        if query.shape[1:] != (source.dimension,) or not np.isfinite(query).all():
            raise UsageError(f"the vectors need shape (n, {source.dimension}) and finite values")
        rows, vectors = np.full(len(query), -1), query.astype(np.float32)
    elif query is None and has_query_store:
        rows = embedded_rows(source)
    else:
        ids = [] if query is None else [query] if isinstance(query, str) else query
        rows = _rows_of(source, list(dict.fromkeys(ids)))
    if not len(rows):
        if query is None and has_query_store:
            raise UsageError(f"{source.path} has no embedded row yet")
        raise UsageError(
            "no query: give rows with --query, or a store with --query-store; the same store again"
            " makes each of its rows a query"
        )
    if vectors is None and query is not None:
        _check_embedded(source, rows)
    return rows, vectors


def _rows_of(store: Store, ids: list[str]) -> NDArray[np.int64]:
    """All rows with the identifiers, or of reads with them, in the order of the identifiers."""
    found: dict[str, list[int]] = {name: [] for name in ids}
    for row, names in enumerate(_names(store)):
        for name in names:
            if name in found:
                found[name].append(row)
    if unknown := [name for name in ids if not found[name]]:
        alike = _alike(store, unknown)
        hint = f"; did you mean {', '.join(map(printable, alike))}?" if alike else ""
        _refuse(store, "no record has the identifier", unknown, hint)
    return np.array([row for name in ids for row in found[name]], np.int64)


def _names(store: Store) -> Iterator[tuple[str, ...]]:
    """Names of each row."""
    for first in range(0, store.records, SEQUENCES_PER_CHUNK):
        yield from known_names(store, slice(first, first + SEQUENCES_PER_CHUNK))


def _alike(store: Store, unknown: list[str]) -> list[str]:
    """A few identifiers that contain an unknown one, such as an accession."""
    every = (name for name, *_ in _names(store))
    alike = (name for name in every if any(each and each in name for each in unknown))
    return list(islice(alike, _ALIKE))


def _check_embedded(store: Store, rows: NDArray[np.int64]) -> None:
    states = np.full(len(rows), Status.PENDING, np.uint8)
    for chunk, where in by_chunk(store, rows):
        if store.is_present(chunk):
            with store.reading(f"status of chunk {chunk}"):
                states[where] = store.read_status(chunk)[rows[where] - store.rows(chunk).start]
    if is_embedded(states).all():
        return  # names are only for a refusal, and slow to read
    names = taken(store, "sequence_id", rows)
    pending = states == Status.PENDING
    _refuse(store, "not computed yet; `virnuc-dask resume` computes it:", names[pending])
    for code in np.unique(states[states >= Status.INVALID_RESIDUES]):
        meaning = Status(int(code)).meaning
        _refuse(store, f"quarantined ({meaning}) and without an embedding:", names[states == code])


def _refuse(
    store: Store, problem: str, names: Sequence[str] | NDArray[Any], hint: str = ""
) -> None:
    if len(names):
        listed = ", ".join(printable(str(name)) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        raise UsageError(f"{store.path}: {problem} {listed}{more}{hint}")


# --- the pass over all chunks --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Task:
    """Queries and settings of a search.

    Attributes
    ----------
    vectors : ndarray, float32, shape (n, D)
    own : ndarray, int64, shape (n,)
        Row of each query in the searched store, or -1; its group if there are groups.
    origin : ndarray, float32, shape (D,)
        Subtracted from all vectors.
    k : int
    metric : {'cosine', 'euclidean'}
    among : ndarray, bool, shape (records,), optional
        Rows that may be neighbours.
    groups : ndarray, int64, shape (records,), optional
        Group of each row.
    """

    vectors: NDArray[np.float32]
    own: NDArray[np.int64]
    origin: NDArray[np.float32]
    k: int
    metric: Metric
    among: NDArray[np.bool_] | None = None
    groups: NDArray[np.int64] | None = None


class _Hits(NamedTuple):
    """Possible neighbours, shape (hits,) each.

    Attributes
    ----------
    query : ndarray, int64
    score : ndarray, float32
        The cosine, or the distance times -1.
    row : ndarray, int64
    """

    query: NDArray[np.int64]
    score: NDArray[np.float32]
    row: NDArray[np.int64]


_NO_HITS = _Hits(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _search_all(task: _Task, chunks: list[int], pool: Pool, count: ChunkCounter) -> _Hits:
    """The k best hits of each query, ordered by query, best first."""
    best, floor = _NO_HITS, _floor(_NO_HITS, task)
    shared = pool.shared(task)
    # Running threads see the floor rise; workers of a cluster have that of their call's submission.
    # A lower one only gives more candidates.
    calls = ((group, shared, floor) for group in pool.grouped(chunks))
    for hits in pool.run(_search, calls, count):
        best = _best(task.k, best, hits)
        floor[:] = _floor(best, task)
    return best


def _search(store: Store, chunks: list[int], task: _Task, floor: NDArray[np.float32]) -> _Hits:
    """The k best hits in some chunks, and none below the floor, shape (n,)."""
    queries = task.vectors - task.origin
    squared = np.vecdot(queries, queries)
    if task.metric == "cosine":
        queries *= _inverse(squared)[:, None]
    best, of_all = _NO_HITS, floor
    for rows, values in _blocks(store, chunks, task.among):
        floor = np.maximum(floor, of_all)
        block = as_float32(values)
        if task.origin.any():
            block -= task.origin
        # In float32 for all rows: the cosine, or half of the query's squared length minus half of
        # the squared distance.
        scores, squares = queries @ block.T, np.vecdot(block, block)
        check_finite(store, squares)
        if task.metric == "cosine":
            scores *= _inverse(squares)
            size, least = 1, floor
        else:
            scores -= squares / 2
            size, least = squares.max() + squared.max(), (squared - floor**2) / 2
        # A query must not match itself, or any row of its group.
        unlike = rows if task.groups is None else task.groups[rows]
        if task.groups is not None:
            scores[task.own[:, None] == unlike] = -np.inf
        # Twice the largest rounding error of a sum of D products.
        margin = 2 * float(size) * (len(task.origin) + 8) * _EPSILON
        number, column = np.divmod(_candidates(scores, least - margin, task.k, margin), len(rows))
        is_other = unlike[column] != task.own[number]
        number, column = number[is_other], column[is_other]
        exact = _exact(task, number, values, column)
        above = exact >= floor[number]
        if above.any():
            hits = _Hits(number[above], exact[above], rows[column[above]])
            best = _best(task.k, best, hits)
            floor = np.maximum(floor, _floor(best, task))
    return best


def _blocks(
    store: Store, chunks: list[int], among: NDArray[np.bool_] | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    for rows, values in blocks(store, chunks):
        if among is None:
            yield rows, values
        elif (is_among := among[rows]).any():
            yield rows[is_among], values[is_among]


def _candidates(
    scores: NDArray[Any], least: NDArray[Any], k: int, margin: float
) -> NDArray[np.int64]:
    """Flat indices of scores that may be among the best; few after the first blocks."""
    is_candidate = scores >= least[:, None]
    # Take one more than k, because the query itself may be among them.
    crowded = np.flatnonzero(np.count_nonzero(is_candidate, axis=1) > k + 1)
    if len(crowded):
        some = scores[crowded]
        last = np.partition(some, -k - 1, axis=1)[:, -k - 1]
        is_candidate[crowded] &= some >= (last - margin)[:, None]
    return np.flatnonzero(is_candidate)


def _exact(
    task: _Task, number: NDArray[np.int64], values: NDArray[Any], column: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores of pairs of queries and rows, computed in float64.

    So they do not depend on a row's position in its block, as a matrix product does.
    """
    scores = np.empty(len(number), np.float32)
    for first in range(0, len(number), _PAIRS_AT_ONCE):
        part = slice(first, first + _PAIRS_AT_ONCE)
        query = task.vectors[number[part]].astype(np.float64)
        row = as_float32(values[column[part]]).astype(np.float64)
        if task.metric == "cosine":
            query -= task.origin
            row -= task.origin
            squares = np.vecdot(query, query) * np.vecdot(row, row)
            scores[part] = np.clip(np.vecdot(query, row) * _inverse(squares), -1, 1)
        else:
            row -= query
            scores[part] = -np.sqrt(np.vecdot(row, row))
    return scores


def _inverse(squares: NDArray[Any]) -> NDArray[Any]:
    """One over the square root; 0 for 0, so that a zero vector is similar to no vector."""
    inverse: NDArray[Any] = np.zeros_like(squares)
    np.divide(1, np.sqrt(squares), out=inverse, where=squares > 0)
    return inverse


def _best(k: int, *several: _Hits) -> _Hits:
    query, score, row = (np.concatenate(parts) for parts in zip(*several, strict=True))
    order = np.lexsort((row, -score, query))
    query = query[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    order = order[rank < k]
    return _Hits(query[rank < k], score[order], row[order])


def _floor(best: _Hits, task: _Task) -> NDArray[np.float32]:
    """The k-th best score of each query, shape (n,); -inf with fewer than k hits."""
    floor = np.full(len(task.vectors), -np.inf, np.float32)
    counts = np.bincount(best.query, minlength=len(floor))
    ends = np.cumsum(counts) - 1
    floor[counts == task.k] = best.score[ends[counts == task.k]]
    return floor


def _padded(best: _Hits, queries: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and rows, shape (queries, k) each; NaN and -1 if missing."""
    scores, rows = np.full((queries, k), np.nan, np.float32), np.full((queries, k), -1)
    rank = np.arange(len(best.query)) - np.searchsorted(best.query, best.query)
    scores[best.query, rank], rows[best.query, rank] = best.score, best.row
    return scores, rows


class _Centre(NamedTuple):
    """Mean of all embedded rows, shape (D,), and `Found.random`."""

    mean: NDArray[np.float32]
    random: tuple[float, float] | None = None


def _centre(
    store: Store,
    present: NDArray[np.bool_],
    key: list[Any],
    pool: Pool,
    count: ChunkCounter,
    rows: NDArray[np.int64],
) -> tuple[_Centre, NDArray[np.float32]]:
    """The centre of a store, which is kept for the next search; and vectors of `rows`."""
    some, _ = random_rows(store, present, _RANDOM_ROWS, 0)
    chunks = np.flatnonzero(present).tolist()
    mean, _, vectors = mean_row(store, chunks, pool, count, np.concatenate([rows, some]))
    random = _sampled_pairs(vectors[len(rows) :] - mean)
    kept = np.concatenate([mean, random or []]).astype("<f4")
    caches.remember("mean", store.id.encode(), key, b64encode(kept.tobytes()).decode())
    return _Centre(mean, random), vectors[: len(rows)]


def _sampled_pairs(centred: NDArray[np.float32]) -> tuple[float, float] | None:
    """Median and 99th percentile of the cosine of all pairs; None without a pair."""
    unit = centred * _inverse(np.vecdot(centred, centred))[:, None]
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    if not len(cosines):
        return None
    median, high = np.quantile(cosines, _QUANTILES)
    return float(np.float32(median)), float(np.float32(high))


def random_pairs(attrs: Mapping[str, Any]) -> str | None:
    """How similar random pairs are, from the attributes of neighbours, for people."""
    if "random_99" not in attrs:
        return None
    rows = attrs["searched_rows"]
    often = f", so about {rows / 100:,.0f} of the {rows:,} rows" if rows >= 200 else ""
    return (
        "in a random sample of rows, half of all pairs have a similarity of at most"
        f" {attrs['random_median']:z.2f}, and one pair in a hundred has more than"
        f" {attrs['random_99']:z.2f}{often}"
    )


def _kept_centre(store: Store, key: list[Any]) -> _Centre | None:
    """The cached centre from an earlier search of the same chunks, if any."""
    kept = caches.recall("mean", store.id.encode(), key)
    with suppress(TypeError, ValueError):  # the file may contain anything
        numbers = np.frombuffer(b64decode(kept, validate=True), "<f4").astype(np.float32)
        mean, random = np.split(numbers, [store.dimension])
        if len(mean) == store.dimension and len(random) in (0, 2) and np.isfinite(numbers).all():
            return _Centre(mean, (float(random[0]), float(random[1])) if len(random) else None)
    return None


def _centre_key(store: Store, present: NDArray[np.bool_]) -> list[Any]:
    """All that the centre depends on: the present chunks, and which of their rows are embedded."""

    def read(chunk: int) -> bytes:
        with store.reading(f"status of chunk {chunk}"):
            return store.read_status(chunk).tobytes()

    digest = sha256(np.packbits(present).tobytes())
    with ThreadPoolExecutor(8) as pool:
        for status in pool.map(read, np.flatnonzero(present).tolist()):
            digest.update(status)
    return [_CENTRE, len(present), digest.hexdigest()]


# --- the result ----------------------------------------------------------------------------------


def _dataset(
    searched: Store,
    source: Store,
    rows: NDArray[np.int64],
    neighbours: NDArray[np.int64],
    scores: NDArray[np.float32],
    metric: Metric,
    centre: bool,
) -> Any:
    import xarray

    dims = ("query", "neighbour")
    ids = "sequence_id"
    if source is searched:  # read at once: text takes longer to decode than numbers
        named = taken(searched, ids, np.column_stack([rows, neighbours]))
        query_ids, texts = named[:, 0], {ids: named[:, 1:]}
    else:
        query_ids, texts = taken(source, ids, rows), {ids: taken(searched, ids, neighbours)}
    if "description" in searched.names:
        texts["description"] = taken(searched, "description", neighbours)
    name, values = ("similarity", scores) if metric == "cosine" else ("distance", -scores)
    return xarray.Dataset(
        {
            "row": (dims, neighbours),
            **{text: (dims, of_rows) for text, of_rows in texts.items()},
            "length": (dims, taken(searched, "length", neighbours), {"units": "residues"}),
            "status": (dims, states(searched, neighbours)),
            name: (dims, values),
        },
        {
            "query_row": ("query", rows),
            "query_id": ("query", query_ids),
        },
        {
            "metric": metric,
            "centred": int(centre),
            "store": str(searched.path),
            "query_store": str(source.path),
            **searched.model.comment(),
            ATTRIBUTE: json.dumps(searched.about()),
        },
    )
