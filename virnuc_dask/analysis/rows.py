"""Rows of a store by number: embeddings, metadata, means and random samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import ChunkCounter, Pool, as_float32, blocks, check_finite
from virnuc_dask.errors import StoreError
from virnuc_dask.settings import Status
from virnuc_dask.store.store import Store, is_embedded

TEXTS = ("sequence_id", "description")
_CHUNKS_OF_A_SAMPLE = 512
_NO_ROWS = np.zeros(0, np.int64)
_MEANINGS = np.full(256, "", object)
for _state in Status:
    _MEANINGS[_state] = _state.meaning


def embedded_rows(store: Store, chunks: Iterable[int] | None = None) -> NDArray[np.int64]:
    """Numbers of the embedded rows in all or some present chunks; this reads one byte per row."""
    if chunks is None:
        chunks = np.flatnonzero(store.present()).tolist()

    def rows(chunk: int) -> NDArray[np.int64]:
        with store.reading(f"status of chunk {chunk}"):
            status = store.read_status(chunk)
        return np.flatnonzero(is_embedded(status)) + np.int64(store.rows(chunk).start)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(rows, chunks))
    return np.concatenate([_NO_ROWS, *parts])


def pending_rows(store: Store) -> int:
    """Number of rows that are not embedded yet; takes one listing."""
    return store.records - store.rows_in(np.flatnonzero(store.present()))


def pending_note(store: Store, pending: int | None = None) -> str | None:
    """Note that a result lacks the rows that are not embedded yet; None if there are none.

    Parameters
    ----------
    store : Store
    pending : int, optional
        Their number, if it is known. Default: `pending_rows`.
    """
    pending = pending_rows(store) if pending is None else pending
    if not pending:
        return None
    return f"{store.path}: {pending:,} of {store.records:,} rows are not embedded yet"


def random_rows(
    store: Store, present: NDArray[np.bool_], count: int, random_state: int
) -> tuple[NDArray[np.int64], bool]:
    """Numbers of embedded rows in order: all, or a random sample without replacement.

    If more than 512 chunks are present, 512 of them are drawn first, so that a small sample does
    not read all of a large store. All rows have the same probability.

    Parameters
    ----------
    store : Store
    present : ndarray, bool, shape (chunk_count,)
        Chunks to draw from.
    count : int
        Most rows to draw; all rows if there are fewer.
    random_state : int

    Returns
    -------
    rows : ndarray, int64, shape (n,)
    is_sample : bool
        Whether there may be more rows, which were not drawn.
    """
    random = np.random.default_rng(random_state)
    chunks = np.flatnonzero(present)
    is_sample = len(chunks) > _CHUNKS_OF_A_SAMPLE
    if is_sample:
        chunks = np.sort(random.choice(chunks, _CHUNKS_OF_A_SAMPLE, replace=False))
    rows = embedded_rows(store, chunks.tolist())
    if len(rows) > count:
        is_sample = True
        rows = np.sort(random.choice(rows, count, replace=False))
    return rows, is_sample


def read_vectors(store: Store, rows: NDArray[np.int64], threads: int) -> NDArray[np.float32]:
    """Embeddings of some rows, shape (n, D).

    Raises
    ------
    StoreError
        A chunk is damaged, or an embedding is not finite.
    """
    vectors = np.empty((len(rows), store.dimension), np.float32)

    def read(chunk: int, where: NDArray[np.int64]) -> None:
        with store.reading(f"chunk {chunk}"):
            embedding = store.read_chunk(chunk)[1]
        vectors[where] = embedding[rows[where] - store.rows(chunk).start]

    with ThreadPoolExecutor(threads) as pool:
        # Consuming the results raises the error of a damaged chunk.
        deque(pool.map(lambda part: read(*part), by_chunk(store, rows)), maxlen=0)
    check_finite(store, vectors)
    return vectors


def mean_row(
    store: Store,
    chunks: list[int],
    pool: Pool,
    count: ChunkCounter,
    rows: NDArray[np.int64] = _NO_ROWS,
) -> tuple[NDArray[np.float32], int, NDArray[np.float32]]:
    """Mean of the embedded rows of some chunks, and some of these rows, in one pass.

    Parameters
    ----------
    store : Store
    chunks : list of int
    pool : Pool
    count : ChunkCounter
    rows : ndarray, int64, shape (n,)
        Embedded rows of these chunks to return.

    Returns
    -------
    mean : ndarray, float32, shape (D,)
        Zeros without rows.
    number : int
        Number of rows in the mean.
    vectors : ndarray, float32, shape (n, D)
        Embeddings of `rows`.

    Raises
    ------
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    """
    total, number = np.zeros(store.dimension), 0
    vectors = np.full((len(rows), store.dimension), np.nan, np.float32)
    shared = pool.shared(rows)
    calls = ((group, shared) for group in pool.grouped(chunks))
    for part, added, where, values in pool.run(_sum_and_take, calls, count):
        total += part
        number += added
        vectors[where] = values
    check_finite(store, total)
    check_finite(store, vectors)
    return (total / max(number, 1)).astype(np.float32), number, vectors


def _sum_and_take(
    store: Store, chunks: list[int], selected: NDArray[np.int64]
) -> tuple[NDArray[np.float64], int, NDArray[np.int64], NDArray[np.float32]]:
    """Sum and number of embedded rows; positions in `selected`, and vectors at them."""
    total, number = np.zeros(store.dimension), 0
    positions, vectors = [_NO_ROWS], [np.zeros((0, store.dimension), np.float32)]
    for rows, values in blocks(store, chunks):
        block = as_float32(values)
        total += block.sum(axis=0, dtype=np.float64)
        number += len(rows)
        is_here = np.flatnonzero(np.isin(selected, rows))
        positions.append(is_here)
        vectors.append(block[np.searchsorted(rows, selected[is_here])])
    return total, number, np.concatenate(positions), np.concatenate(vectors)


def sequence_digest(residues: NDArray[np.uint8]) -> bytes:
    """Digest of the encoded residues of a row, 16 bytes; equal sequences have equal digests."""
    return blake2b(residues.tobytes(), digest_size=16).digest()


def sequence_digests(store: Store, chunk: int, which: Iterable[int]) -> list[bytes]:
    """Digests of the sequences of some rows of a chunk.

    Only encoded residues count: truncated rows that differ in the rest are one sequence.

    Parameters
    ----------
    store : Store
    chunk : int
    which : iterable of int
        Positions of the rows in the chunk.
    """
    lengths, residues = store.read_rows(chunk)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    encoded = store.encoded(lengths)
    return [sequence_digest(residues[starts[row] : starts[row] + encoded[row]]) for row in which]


def by_chunk(store: Store, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each chunk with some of the rows, and the positions of these in `rows`."""
    if not len(rows):
        return
    chunks = rows // store.identity.rows_per_chunk
    order = np.argsort(chunks, kind="stable")
    numbers, firsts = np.unique(chunks[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True)


def taken(store: Store, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Values of an array at some rows, in their shape; empty text or -1 for row -1."""
    unique, where = np.unique(rows, return_inverse=True)
    is_none = unique < 0
    with store.reading(f"`{name}`"):
        values = np.asarray(store.array(name).oindex[unique[~is_none]])
    text = name in TEXTS
    every = np.empty(len(unique), object if text else values.dtype)
    if is_none.any():  # unsigned types cannot hold -1
        every[is_none] = "" if text else -1
    every[~is_none] = values.tolist() if text else values
    return every[where.reshape(rows.shape)]


def known_names(store: Store, rows: slice | NDArray[np.int64]) -> list[tuple[str, ...]]:
    """Names by which users may mean each of some rows, the most specific first.

    These are its own identifier and, if it was translated or tiled, that of its read or protein,
    which stands for all its rows.
    """
    with store.reading("`sequence_id`"):
        ids = store.array("sequence_id").oindex[rows].tolist()
    if "read_id" not in store.names:
        return [(name,) for name in ids]
    with store.reading("`read_id`"):
        reads = np.asarray(store.array("read").oindex[rows])
        numbers, which = np.unique(reads, return_inverse=True)
        read_ids = store.array("read_id").oindex[numbers][which].tolist()
    return list(zip(ids, read_ids, strict=True))


def meanings(codes: NDArray[np.uint8]) -> NDArray[np.object_]:
    """Names of states, in the shape of their codes; empty for a code that is not known."""
    return _MEANINGS[codes]


def states(store: Store, rows: NDArray[np.int64]) -> NDArray[np.object_]:
    """Names of the states of some rows, in their shape; empty for row -1."""
    codes = taken(store, "status", np.maximum(rows, 0))
    return np.where(rows < 0, "", meanings(codes))


def file_names(store: Store) -> list[str]:
    """Names of a store's inputs without their folders; equal names get numbers."""
    files = store.files or list(map(str, store.provenance.get("inputs", [])))
    names = [Path(file).name or file for file in files]
    return [
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def source_numbers(
    store: Store, rows: NDArray[np.int64] | slice = slice(None)
) -> NDArray[np.int64]:
    """Number of the input of some rows, an index into `file_names`.

    Raises
    ------
    StoreError
        The numbers are damaged.
    """
    with store.reading("`source`"):
        numbers = np.asarray(store.array("source").oindex[rows], np.int64)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(store.files):
        raise StoreError(f"{store.path}: `source` is damaged; `verify` finds it")
    return numbers
