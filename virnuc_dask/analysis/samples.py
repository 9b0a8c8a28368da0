"""Random rows of a store for a classifier: features, and groups that a split must not cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import ChunkCounter, Pool, as_float32, check_finite
from virnuc_dask.analysis.rows import sequence_digest
from virnuc_dask.store.store import Store, is_embedded

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_OTHER = len(AMINO_ACIDS)
_LETTERS = np.full(256, _OTHER, np.uint8)
_LETTERS[np.frombuffer(AMINO_ACIDS.encode(), np.uint8)] = np.arange(_OTHER)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some embedded rows of a store, in order.

    Attributes
    ----------
    embedded : int
        Number of embedded rows in the store.
    embedding : ndarray, float32, shape (n, D)
    composition : ndarray, float32, shape (n, 21)
        Fractions of the 20 amino acids, in the order of `AMINO_ACIDS`, and the natural logarithm
        of the length.
    length : ndarray, int64, shape (n,)
        Encoded residues.
    sequence : list of bytes
        Digest of the encoded residues; rows with equal digests must have equal embeddings.
    read : ndarray, int64, shape (n,)
        Number of the row's read, or of its protein if the row is a tile; -1 if rows are whole
        proteins.
    """

    embedded: int
    embedding: NDArray[np.float32]
    composition: NDArray[np.float32]
    length: NDArray[np.int64]
    sequence: list[bytes]
    read: NDArray[np.int64]

    def without(self, sequences: Iterable[bytes]) -> Sample:
        """The sample without the rows of some sequences."""
        excluded = set(sequences)
        if not excluded:
            return self
        kept = [row for row, name in enumerate(self.sequence) if name not in excluded]
        return Sample(
            embedded=self.embedded,
            embedding=self.embedding[kept],
            composition=self.composition[kept],
            length=self.length[kept],
            sequence=[self.sequence[row] for row in kept],
            read=self.read[kept],
        )


def count_embedded(store: Store, pool: Pool) -> NDArray[np.int64]:
    """Number of embedded rows per chunk, shape (chunk_count,); this reads one byte per row."""
    chunks = np.flatnonzero(store.present()).tolist()
    counts = np.zeros(store.chunk_count, np.int64)
    calls = ((group,) for group in pool.grouped(chunks))
    parts = pool.run(_count, calls, ChunkCounter(None, 0))
    counts[chunks] = [number for numbers in parts for number in numbers]
    return counts


def draw(
    store: Store,
    counts: NDArray[np.int64],
    max_rows: int,
    seed: list[int],
    pool: Pool,
    count: ChunkCounter,
) -> Sample:
    """Read all embedded rows of a store, or `max_rows` of them at random, all equally likely.

    Parameters
    ----------
    store : Store
    counts : ndarray, int64, shape (chunk_count,)
        From `count_embedded`.
    max_rows : int
    seed : list of int
    pool : Pool
    count : ChunkCounter
        Counts each chunk, including chunks without a drawn row.

    Returns
    -------
    Sample

    Raises
    ------
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    """
    total = int(counts.sum())
    if total <= max_rows:
        drawn = np.arange(total)
    else:
        drawn = np.sort(np.random.default_rng(seed).choice(total, max_rows, replace=False))
    ends = np.cumsum(counts)
    bounds = np.searchsorted(drawn, np.append(0, ends))
    embedding = np.empty((len(drawn), store.dimension), np.float32)
    composition = np.empty((len(drawn), _OTHER + 1), np.float32)
    length, read = np.empty(len(drawn), np.int64), np.empty(len(drawn), np.int64)
    sequence: list[bytes] = []

    def calls() -> Any:
        for group in pool.grouped(np.flatnonzero(counts).tolist()):
            # Positions among the embedded rows of each chunk.
            which = [
                drawn[bounds[chunk] : bounds[chunk + 1]] - (ends[chunk] - counts[chunk])
                for chunk in group
            ]
            yield group, which

    for parts in pool.run(_read, calls(), count):
        for part in parts:
            here = slice(len(sequence), len(sequence) + len(part.sequence))
            embedding[here], composition[here] = part.embedding, part.composition
            length[here], read[here] = part.length, part.read
            sequence += part.sequence
    return Sample(total, embedding, composition, length, sequence, read)


def _count(store: Store, chunks: list[int]) -> list[int]:
    counts = []
    for chunk in chunks:
        with store.reading(f"status of chunk {chunk}"):
            counts.append(int(np.count_nonzero(is_embedded(store.read_status(chunk)))))
    return counts


def _read(store: Store, chunks: list[int], which: list[NDArray[np.int64]]) -> list[Sample]:
    pairs = zip(chunks, which, strict=True)
    return [_read_chunk(store, chunk, some) for chunk, some in pairs if len(some)]


def _read_chunk(store: Store, chunk: int, which: NDArray[np.int64]) -> Sample:
    with store.reading(f"chunk {chunk}"):
        status, values = store.read_chunk(chunk)
    rows = np.flatnonzero(is_embedded(status))[which]
    embedding = as_float32(values[rows])
    check_finite(store, embedding)
    lengths, residues = store.read_rows(chunk)
    encoded = store.encoded(lengths)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    composition = np.empty((len(rows), _OTHER + 1), np.float32)
    sequence = []
    for number, row in enumerate(rows.tolist()):
        part = residues[starts[row] : starts[row] + encoded[row]]
        sequence.append(sequence_digest(part))
        shares = np.bincount(_LETTERS[part], minlength=_OTHER + 1)[:_OTHER] / len(part)
        composition[number, :_OTHER] = shares
    composition[:, _OTHER] = np.log(encoded[rows])
    read = np.full(len(rows), -1, np.int64)
    if "read" in store.names:
        with store.reading("`read`"):
            read = np.asarray(store.array("read")[store.rows(chunk)])[rows]
    return Sample(len(rows), embedding, composition, encoded[rows], sequence, read)


def groups_of(sample: Sample) -> NDArray[np.int64]:
    """Group of each row of a sample; see `joined`."""
    return joined(sample.sequence, sample.read)


def joined(sequences: list[bytes], reads: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group of each row, shape (n,): rows with the same sequence or read are in one group.

    A row links the rows with its sequence to the rows of its read. The number of a group is its
    first row.

    Parameters
    ----------
    sequences : list of bytes
        Digest of the residues of each row.
    reads : ndarray, int64, shape (n,)
        Number of each row's read, or of its protein for tiles; -1 if rows are whole proteins.
    """
    parent = list(range(len(sequences)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[bytes | int, int] = {}
    for row, keys in enumerate(zip(sequences, reads.tolist(), strict=True)):
        for key in keys:
            if key != -1:
                low, high = sorted((root(row), root(first.setdefault(key, row))))
                parent[high] = low
    return np.array([root(row) for row in range(len(parent))], np.int64)
