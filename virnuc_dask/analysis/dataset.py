"""What to do with a store once it is there, or while it fills: open it, look at it, check it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.config import ModelSpec, Status
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.integrity import check_chunk, check_results, check_sequences, leftovers
from virnuc_dask.packing import encoded_lengths
from virnuc_dask.results import open_result, results_of
from virnuc_dask.store import ATTRIBUTE, TASK_ARRAYS, TRANSLATED, Store

_CHUNKS_PER_CHECK = 16
# What is known of a row, in the order in which it is shown.
_COORDINATES = ["sequence_id", "description", "source", "length", "status"]
_COORDINATES += [*TRANSLATED, "residue_slot"]


def open_store(store: str | Path, embedded_only: bool = False) -> Any:
    """Open a store lazily; also while a run is still filling it.

    Nothing but metadata is read, however many rows there are.

    Parameters
    ----------
    store : path
    embedded_only : bool
        Only the rows that have an embedding by now. This reads the state of every row.

    Returns
    -------
    xarray.Dataset
        ``embedding`` (sequence, feature), NaN where a row is quarantined or not done yet: a Dask
        array, chunked as the store is. So are ``residues``, ``offset``, the sequences, and
        ``residue_embedding`` (slot, feature), in a store that has it: see `open_residues`.

        Coordinates say what each row is. ``embedded``: whether it has an embedding.
        ``sequence_id`` and ``description``: the first word of its header and the rest;
        ``source``: its input file. ``length`` in residues. ``status``, whose codes are named by its
        attributes ``flag_values`` and ``flag_meanings``. Of translated rows also ``read``, a number
        into ``read_id``, ``window``, ``frame`` and ``start``; of tiles of proteins ``read``,
        ``read_id`` and ``start``. They are read whenever they are looked at, and no Dask arrays,
        so that masks work: ``data.embedding[data.embedded]``. So are results of analysis, such as
        ``score_NAME`` and ``map_NAME``.

        The attribute ``virnuc_dask``, what the store was made of, is JSON text, which every format
        can keep.

    Raises
    ------
    NotAStoreError, StoreError
    """
    import xarray

    from virnuc_dask.analysis import columns

    # xarray would say of anything at all that it holds no group.
    opened = Store(store)
    source: Any = opened.place.for_xarray
    data = xarray.open_dataset(source, cache=False, engine="zarr", consolidated=False)
    known: dict[str, Any] = {}
    for name in filter(data.coords.__contains__, _COORDINATES):
        variable = data[name].variable
        if name == "status":
            known |= {name: variable, "embedded": columns.embedded(variable, opened.place.location)}
        elif name == "source":
            variable.attrs.pop("files", None)
            known[name] = columns.named(variable, opened.files)
        else:
            known[name] = columns.texts(variable) if variable.dtype.kind == "T" else variable
    arrays = {name: _array(variable.variable) for name, variable in data.data_vars.items()}
    data = data.drop_vars(list(data.coords)).assign(arrays).assign_coords(known)
    data.attrs[ATTRIBUTE] = json.dumps(data.attrs[ATTRIBUTE])
    if embedded_only:
        data = data.isel(sequence=np.flatnonzero(data.embedded))
    return data


def _array(variable: Any) -> Any:
    """A Dask array, or as it is if it is a result, whose document becomes text."""
    if ATTRIBUTE not in variable.attrs:
        return variable.chunk(variable.encoding["preferred_chunks"])
    variable.attrs[ATTRIBUTE] = json.dumps(variable.attrs[ATTRIBUTE])
    return variable


def open_residues(store: str | Path, row: int) -> Any:
    """Representation of each residue of one row, lazily.

    Parameters
    ----------
    store : path
        Made with ``per_residue``.
    row : int

    Returns
    -------
    xarray.DataArray, float16, shape (residues, D)
        Of the residues that were encoded: where `long` is ``truncate``, the first
        `max_residues`. NaN where the row is quarantined or not done yet.

    Raises
    ------
    IndexError
        There is no such row.
    UsageError
        The store keeps no single residues.
    NotAStoreError, StoreError
    """
    opened = Store(store)
    identity = opened.identity
    if not identity.per_residue:
        raise UsageError(f"{store}: made without per_residue, so it keeps no single residues")
    if not 0 <= row < opened.records:
        raise IndexError(f"row {row} of {opened.records}")
    data = open_store(store)
    first, length = int(data.residue_slot[row]), data.length[[row]].values
    count = int(encoded_lengths(length, identity.max_residues, identity.long)[0])
    return data.residue_embedding[first : first + count].rename(slot="residue")


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How far a store is, by chunk presence alone.

    Attributes
    ----------
    path : str
    model : ModelSpec
        Its reference is where the weights were when the store was made.
    device : str
        That the store was made for; empty if it does not say so.
    records, chunks, rows_per_chunk, dimension : int
    present : ndarray, bool, shape (chunks,)
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

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the missing chunks are listed."""
        document = asdict(self) | self.model.comment()
        document["present"] = int(self.present.sum())
        document["missing"] = np.flatnonzero(~self.present).tolist()
        return document


def status(store: str | Path) -> StoreStatus:
    """Look how far a store is. Two directory listings; no chunk is opened."""
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
    """Rows per state, read from `status`; they add up to the records."""
    opened = Store(store)
    done = np.flatnonzero(opened.present())
    counts = count_states(opened, done)
    counts[Status.PENDING.meaning] = opened.records - opened.rows_in(done)
    return {state: number for state, number in counts.items() if number}


def count_states(store: Store, chunks: Iterable[int]) -> Counter[str]:
    """Rows per state in some chunks that are present.

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
    """Every quarantined row as (row, identifier, reason), in order."""
    opened = Store(store)
    for chunk in np.flatnonzero(opened.present()):
        codes = opened.read_status(int(chunk))
        found = np.flatnonzero(codes >= Status.INVALID_RESIDUES)
        if len(found):
            ids = opened.read_ids(int(chunk))
            first = opened.rows(int(chunk)).start
            for row in found:
                yield first + int(row), ids[row], Status(int(codes[row])).meaning


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    checked : int
        Chunks that were read and decoded: all that have a file.
    missing : int
        Chunks that have none: work that is left, and no damage.
    bad : dict of int to str
        Damaged chunks, with what is wrong.
    sequences : str, optional
        What is wrong with the sequence arrays, which no recomputation mends.
    results : dict of str to str
        Damaged chunks of results, such as ``score_virus: chunk 3``, with what is wrong.
    leftovers : list of str
        Files that are no part of the store.
    repaired : bool
        Whether bad chunks and leftovers in the computed arrays were removed.
    """

    checked: int
    missing: int
    bad: dict[int, str] = field(default_factory=dict)
    sequences: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def exit_code(self) -> int:
        """0 if all is well or mended, 4 if something is damaged."""
        is_damaged = self.bad or self.results
        return 4 if self.sequences or (is_damaged and not self.repaired) else 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def verify(
    store: str | Path,
    *,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
    client: Any = None,
) -> VerifyReport:
    """Read and decode everything in a store.

    Parameters
    ----------
    store : path
    repair : bool
        Remove damaged chunks, so that `resume` computes them again, or the command that made them
        if they are of results, and stray files from the directories that tasks write to. Never a
        file of a living writer.
    progress : callable, optional
        Called with the chunks checked and their total.
    client : distributed.Client, optional
        Whose workers read and decode; default: threads of this process.

    Returns
    -------
    VerifyReport
    """
    from dask import compute, delayed

    opened = Store(store)
    # A file that is too small counts as missing, and is damage all the same.
    chunks = [int(chunk) for chunk in np.flatnonzero(opened.touched())]
    sequences = check_sequences(opened)
    bad: dict[int, str] = {}
    run = partial(compute, scheduler="threads") if client is None else partial(_gather, client)
    width = 8 if client is None else 2 * max(4, sum(client.nthreads().values()))
    step = _CHUNKS_PER_CHECK * width
    for start in range(0, len(chunks), step):
        parts = [
            delayed(_check)(
                opened.place.location,
                chunks[first : first + _CHUNKS_PER_CHECK],
                sequences is None,
            )
            for first in range(start, min(start + step, len(chunks)), _CHUNKS_PER_CHECK)
        ]
        for found in run(*parts):
            bad.update(found)
        if progress:
            progress(min(start + step, len(chunks)), len(chunks))
    if client is not None:
        # A worker may have another zarr, or another disk at this path: what is whole stays.
        with ThreadPoolExecutor(8) as pool:
            again = partial(_check, opened.place.location, sequences=sequences is None)
            found_here = list(pool.map(again, ([chunk] for chunk in bad)))
        bad = {chunk: problem for part in found_here for chunk, problem in part.items()}
    damaged = check_results(opened)
    strays = leftovers(opened)
    if repair:
        opened.check_place()
        for name, chunk in damaged:
            if chunk < 0:
                opened.place.remove(name)
            else:
                open_result(opened, name).remove_chunk(chunk)
        results = results_of(opened)
        for chunk in bad:
            for result in results:  # of which no row may be embedded differently later
                result.remove_chunk(chunk)
            opened.remove_chunk(chunk)
        for key in strays:
            if key.rpartition("/")[0] in {*TASK_ARRAYS, *(result.name for result in results)}:
                opened.place.remove(key)
    return VerifyReport(
        len(chunks),
        opened.chunk_count - len(chunks),
        bad,
        sequences,
        {
            f"{name}: {f'chunk {chunk}' if chunk >= 0 else 'metadata'}": problem
            for (name, chunk), problem in damaged.items()
        },
        [f"{opened.path}/{key}" for key in strays],
        repair,
    )


def _gather(client: Any, *parts: Any) -> list[dict[int, str]]:
    return list(client.compute(list(parts), sync=True))


def _check(path: str, chunks: list[int], sequences: bool) -> dict[int, str]:
    store = Store(path)
    problems = {chunk: check_chunk(store, chunk, sequences=sequences) for chunk in chunks}
    return {chunk: problem for chunk, problem in problems.items() if problem is not None}
