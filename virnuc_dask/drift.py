"""How far stored rows are from what float32 gives for the sequence alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from virnuc_dask.config import ModelSpec, Status
from virnuc_dask.embed import embed_rows, get_encoder
from virnuc_dask.errors import UsageError
from virnuc_dask.store import Store

# Every precision promises this for every row; another sequence's embedding does not reach it.
LOWEST_COSINE = 0.999


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
        Lowest cosine of a stored row and the recomputed one.
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
        return self.cosine >= LOWEST_COSINE

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
    identity = replace(opened.identity, precision="float32", dtype="float32", per_residue=False)
    encoder = get_encoder(
        ModelSpec(
            model or str(opened.provenance["model"]),
            identity.weights_sha256,
            opened.dimension,
            identity.repr_layer,
            identity.pooling,
        )
    )
    worst, largest = (2.0, -1), 0.0
    chosen = _choose(opened, rows, seed)
    for chunk in np.unique(chosen // identity.rows_per_chunk):
        start = opened.rows(int(chunk)).start
        lengths, residues = opened.read_rows(int(chunk))
        stored = opened.read_chunk(int(chunk))[1].astype(np.float32)
        ends = np.cumsum(lengths)
        for row in chosen[chosen // identity.rows_per_chunk == chunk] - start:
            alone = residues[ends[row] - lengths[row] : ends[row]]
            found = embed_rows(encoder, lengths[row : row + 1], alone, identity).embedding[0]
            norms = float(np.linalg.norm(found) * np.linalg.norm(stored[row]))
            worst = min(worst, (float(found @ stored[row]) / norms, int(start + row)))
            largest = max(largest, float(np.abs(found - stored[row]).max()))
    chunk, place = divmod(worst[1], identity.rows_per_chunk)
    name = opened.read_ids(chunk)[place]
    precision = opened.identity.precision
    return Drift(len(chosen), largest, worst[0], worst[1], name, precision)


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
