"""Progress of a store, and the status of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import StoreError, VirnucError
from virnuc_dask.settings import ModelSpec, Status
from virnuc_dask.store.store import Store


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Progress of a store, from the presence of its chunks alone.

    Attributes
    ----------
    path : str
    model : ModelSpec
        Its reference names the weights as they were when the store was made.
    device : str
        Device that the store was made for; empty if the store does not record it.
    records, chunks, rows_per_chunk, dimension : int
    present : ndarray, bool, shape (chunks,)
        Which chunks are done.
    rows_done : int
        Rows in present chunks.
    """

    path: str
    model: ModelSpec
    device: str
    records: int
    chunks: int
    rows_per_chunk: int
    dimension: int
    present: NDArray[np.bool_]
    rows_done: int

    @property
    def exit_code(self) -> int:
        """0 if all chunks are present, otherwise 4."""
        return 0 if self.present.all() else VirnucError.exit_code

    def to_json(self) -> dict[str, Any]:
        """The progress as plain JSON values; missing chunks are listed by number."""
        document = asdict(self) | self.model.comment()
        document["present"] = int(self.present.sum())
        document["missing"] = np.flatnonzero(~self.present).tolist()
        return document


def status(store: str | Path) -> StoreStatus:
    """Return the progress of a store. Takes two directory listings; no chunk is opened."""
    opened = Store(store)
    present = opened.present()
    return StoreStatus(
        str(opened.path),
        opened.model,
        opened.device,
        opened.records,
        opened.chunk_count,
        opened.identity.rows_per_chunk,
        opened.dimension,
        present,
        opened.rows_in(np.flatnonzero(present)),
    )


def row_states(store: str | Path) -> dict[str, int]:
    """Count rows per status, read from `status`; the counts add up to the number of records."""
    opened = Store(store)
    done = np.flatnonzero(opened.present())
    counts = count_states(opened, done)
    counts[Status.PENDING.meaning] = opened.records - opened.rows_in(done)
    return {state: number for state, number in counts.items() if number}


def count_states(store: Store, chunks: Iterable[int]) -> Counter[str]:
    """Count rows per status in present chunks.

    Raises
    ------
    StoreError
        A chunk of `status` is damaged.
    """

    def count(chunk: int) -> Counter[str]:
        try:
            codes, numbers = np.unique(store.read_status(int(chunk)), return_counts=True)
            return Counter({Status(c).meaning: int(n) for c, n in zip(codes, numbers, strict=True)})
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{store.path}: status of chunk {chunk} is damaged ({error});"
                " `verify --repair` removes it"
            ) from error

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(count, chunks), Counter())


def quarantined(store: str | Path) -> Iterator[tuple[int, str, str]]:
    """Yield each quarantined row as (row, identifier, reason), in order."""
    opened = Store(store)
    for chunk in np.flatnonzero(opened.present()):
        codes = opened.read_status(int(chunk))
        rows = np.flatnonzero(codes >= Status.INVALID_RESIDUES)
        if len(rows):
            ids = opened.read_ids(int(chunk))
            first = opened.rows(int(chunk)).start
            for row in rows:
                yield first + int(row), ids[row], Status(int(codes[row])).meaning
