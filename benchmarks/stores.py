"""Stores of random embeddings, made by the product's own writer and no encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from virnuc_dask.inputs.records import Block, Headers, InputDigest, Origin
from virnuc_dask.settings import FORMAT, Identity, Status, Translation
from virnuc_dask.store.create import Ingest
from virnuc_dask.store.store import Store

RESIDUES = 30
_BLOCK = 65_536


def row_name(row: int) -> str:
    """Identifier of a row."""
    return f"tr|A{row:08d}|A{row:08d}_9VIRU"


def random_store(
    path: Path,
    rows: int,
    dimension: int,
    *,
    rows_per_read: int = 0,
    rows_per_chunk: int = 8192,
    filled: bool = True,
) -> Store:
    """Make a store, in place of what is there.

    Parameters
    ----------
    path : Path
    rows, dimension : int
        Vectors are float16, of a normal distribution around a common mean.
    rows_per_read : int
        As many rows at most are of one read, half as many on average; 0: proteins.
    rows_per_chunk : int
    filled : bool
        False leaves all rows pending.
    """
    shutil.rmtree(path, ignore_errors=True)
    random = np.random.default_rng(0)
    how = Translation() if rows_per_read else None
    digest = InputDigest()
    with Ingest(path, translated=how is not None) as ingest:
        reads = 0
        for first in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - first)
            origin = _origin(random, reads, count, rows_per_read) if rows_per_read else None
            reads += len(origin.read_ids) if origin else 0
            block = Block(
                list(map(row_name, range(first, first + count))),
                np.full(count, RESIDUES, np.int32),
                np.full(RESIDUES * count, ord("A"), np.uint8),
                origin,
                Headers(
                    ["RNA-dependent RNA polymerase OS=Some virus"] * count,
                    np.zeros(count, np.int32),
                ),
            )
            digest.update(block)
            ingest.append(block)
        identity = Identity(
            FORMAT,
            *(digest.hexdigest(), rows, "0" * 64, 33, "mean", "float16", "float16"),
            *("", 1022, "truncate"),
            rows_per_chunk=rows_per_chunk,
            per_residue=False,
            translation=str(how) if how else None,
        )
        ingest.commit(identity, dimension, {"model": "random", "inputs": ["random.faa"]}, {})
    store = Store(path)
    mean = random.standard_normal(dimension, np.float32)
    for chunk in range(store.chunk_count if filled else 0):
        span = store.rows(chunk)
        shape = (span.stop - span.start, dimension)
        vectors = mean + random.standard_normal(shape, np.float32)
        status = np.full(shape[0], Status.EMBEDDED, np.uint8)
        store.write_chunk(chunk, status, vectors.astype(np.float16))
    return store


def _origin(random: np.random.Generator, first: int, rows: int, most: int) -> Origin:
    counts = random.integers(1, most + 1, rows)
    counts = counts[: np.searchsorted(counts.cumsum(), rows) + 1]
    read = first + np.repeat(np.arange(len(counts)), counts)[:rows]
    ones = np.ones(rows)
    return Origin(
        [f"read{number}" for number in range(first, first + len(counts))],
        read=read,
        start=ones.astype(np.int64),
        window=ones.astype(np.int32),
        frame=ones.astype(np.int8),
    )
