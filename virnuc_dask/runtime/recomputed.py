"""Compare stored rows with embeddings recomputed in float32, one sequence at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import UsageError
from virnuc_dask.runtime.embed import embed_rows, get_encoder
from virnuc_dask.settings import Status
from virnuc_dask.store.store import Store

# Lowest cosine that counts as good. With real weights, bfloat16 rows came down to 0.9978.
LOWEST_COSINE, LOWEST_COSINE_OF_BFLOAT16 = 0.999, 0.995


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of comparing a sample of rows.

    Attributes
    ----------
    rows : int
        Rows that were recomputed; fewer than requested if the store has fewer.
    largest : float
        Largest absolute difference of a value.
    cosine : float
        Lowest cosine between a stored and a recomputed row. If the store keeps residue embeddings,
        the cosine of all residue embeddings of a row, as one vector, counts too.
    worst_row : int
        Row with the lowest cosine.
    worst_id : str
        Identifier of that row.
    precision : str
        Precision of the store.
    """

    rows: int
    largest: float
    cosine: float
    worst_row: int
    worst_id: str
    precision: str

    @property
    def good(self) -> bool:
        """Whether all rows agree with the recomputed ones, up to rounding."""
        is_rough = self.precision not in ("float32", "float16")
        return self.cosine >= (LOWEST_COSINE_OF_BFLOAT16 if is_rough else LOWEST_COSINE)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {**asdict(self), "good": self.good}


def compare_recomputed(
    store: str | Path, rows: int, *, seed: int | None = None, model: str | None = None
) -> Comparison:
    """Embed random rows again, each alone and in float32, and compare them with the stored rows.

    This finds errors that no checksum finds: a chunk swapped with another, weights that do not
    match their digest, a machine that computes wrong values.

    Parameters
    ----------
    store : path
    rows : int
        Number of rows to compare.
    seed : int, optional
        Seed of the random choice; default: a new choice on each call.
    model : str, optional
        Path or name of the weights, if they have moved since the store was made.

    Raises
    ------
    UsageError
        The store has no embedded row yet.
    NotAStoreError, StoreError, ModelError
    """
    opened = Store(store)
    identity = replace(opened.identity, precision="float32", dtype="float32")
    encoder = get_encoder(
        replace(opened.model, reference=model or opened.model.reference, precision="float32")
    )
    worst, largest = (2.0, -1), 0.0
    sample = _sample_rows(opened, rows, seed)
    for chunk in np.unique(sample // identity.rows_per_chunk):
        start = opened.rows(int(chunk)).start
        lengths, residues = opened.read_rows(int(chunk))
        pooled = opened.read_chunk(int(chunk))[1]
        stored = opened.read_residue_embeddings(int(chunk)) if identity.per_residue else None
        ends, slots = np.cumsum(lengths), np.cumsum(opened.encoded(lengths))
        for row in sample[sample // identity.rows_per_chunk == chunk] - start:
            sequence = residues[ends[row] - lengths[row] : ends[row]]
            new = embed_rows(encoder, lengths[row : row + 1], sequence, identity)
            pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [(new.embedding, pooled[row])]
            if stored is not None and new.residues is not None:
                pairs.append((new.residues, stored[slots[row] - len(new.residues) : slots[row]]))
            for one, other in pairs:
                cosine, difference = _compare(one.ravel(), other.ravel())
                worst = min(worst, (cosine, int(start + row)))
                largest = max(largest, difference)
    chunk, position = divmod(worst[1], identity.rows_per_chunk)
    name = opened.read_ids(chunk)[position]
    precision = opened.identity.precision
    return Comparison(len(sample), largest, worst[0], worst[1], name, precision)


def _compare(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """Cosine and largest absolute difference."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms), float(np.abs(one - other).max())


def _sample_rows(store: Store, rows: int, seed: int | None) -> Any:
    """Random rows that have an embedding, sorted."""
    embedded = [
        store.rows(int(chunk)).start
        + np.flatnonzero(store.read_status(int(chunk)) < Status.INVALID_RESIDUES)
        for chunk in np.flatnonzero(store.present())
    ]
    candidates = np.concatenate(embedded) if embedded else np.array([], np.int64)
    if not len(candidates):
        raise UsageError(f"{store.path}: no row has an embedding yet")
    count = min(rows, len(candidates))
    return np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
