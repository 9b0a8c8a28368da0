"""How far stored rows are from what float32 gives for the sequence alone."""

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

# Beside float32 every row is above. On real weights bfloat16 was seen to come down to 0.9978.
LOWEST_COSINE, LOWEST_COSINE_OF_BFLOAT16 = 0.999, 0.995


@dataclass(frozen=True, slots=True)
class Drift:
    """What a sample of rows showed.

    Attributes
    ----------
    rows : int
        Rows that were computed again; fewer than asked for if the store has no more.
    largest : float
        Largest difference of a value.
    cosine : float
        Lowest cosine of a stored row and the recomputed one; also of all residues of a row, taken
        together, where the store keeps them.
    worst_row : int
        The row that has it.
    worst_id : str
    precision : str
        That the store was computed in.
    """

    rows: int
    largest: float
    cosine: float
    worst_row: int
    worst_id: str
    precision: str

    @property
    def good(self) -> bool:
        """Whether every row is what its sequence gives, up to rounding."""
        is_rough = self.precision not in ("float32", "float16")
        return self.cosine >= (LOWEST_COSINE_OF_BFLOAT16 if is_rough else LOWEST_COSINE)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "good": self.good}


def sample_drift(
    store: str | Path, rows: int, *, seed: int | None = None, model: str | None = None
) -> Drift:
    """Embed random rows again, each alone and in float32, and compare them with the stored ones.

    Finds what no checksum can: a chunk in the place of another, weights that were not those of the
    digest, a machine that computes wrongly.

    Parameters
    ----------
    store : path
    rows : int
        How many.
    seed : int, optional
        Of the choice; default: another one each time.
    model : str, optional
        Where the weights are now, if not where they were.

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
    chosen = _choose(opened, rows, seed)
    for chunk in np.unique(chosen // identity.rows_per_chunk):
        start = opened.rows(int(chunk)).start
        lengths, residues = opened.read_rows(int(chunk))
        pooled = opened.read_chunk(int(chunk))[1]
        each = opened.read_residue_embeddings(int(chunk)) if identity.per_residue else None
        ends, slots = np.cumsum(lengths), np.cumsum(opened.encoded(lengths))
        for row in chosen[chosen // identity.rows_per_chunk == chunk] - start:
            alone = residues[ends[row] - lengths[row] : ends[row]]
            found = embed_rows(encoder, lengths[row : row + 1], alone, identity)
            pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [(found.embedding, pooled[row])]
            if each is not None and found.residues is not None:
                pairs.append((found.residues, each[slots[row] - len(found.residues) : slots[row]]))
            for one, other in pairs:
                cosine, difference = _compare(one.ravel(), other.ravel())
                worst = min(worst, (cosine, int(start + row)))
                largest = max(largest, difference)
    chunk, place = divmod(worst[1], identity.rows_per_chunk)
    name = opened.read_ids(chunk)[place]
    precision = opened.identity.precision
    return Drift(len(chosen), largest, worst[0], worst[1], name, precision)


def _compare(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """Cosine, and largest difference."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms), float(np.abs(one - other).max())


def _choose(store: Store, rows: int, seed: int | None) -> Any:
    """Rows that have an embedding, sorted."""
    embedded = [
        store.rows(int(chunk)).start
        + np.flatnonzero(store.read_status(int(chunk)) < Status.INVALID_RESIDUES)
        for chunk in np.flatnonzero(store.present())
    ]
    everything = np.concatenate(embedded) if embedded else np.array([], np.int64)
    if not len(everything):
        raise UsageError(f"{store.path}: no row has an embedding yet")
    count = min(rows, len(everything))
    return np.sort(np.random.default_rng(seed).choice(everything, count, replace=False))
