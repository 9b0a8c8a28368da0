"""Open a store lazily as an xarray Dataset, also while a run fills it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from virnuc_dask.errors import UsageError
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.store.store import ATTRIBUTE, TRANSLATED, Store

# Metadata of a row, in display order.
_COORDINATES = ["sequence_id", "description", "source", "length", "status"]
_COORDINATES += [*TRANSLATED, "residue_slot"]


def open_store(store: str | Path, embedded_only: bool = False) -> Any:
    """Open a store lazily, also while a run fills it.

    This reads only metadata, however many rows there are.

    Parameters
    ----------
    store : path
    embedded_only : bool
        Only rows that have an embedding now. This reads the status of every row.

    Returns
    -------
    xarray.Dataset
        ``embedding`` (sequence, feature) is a Dask array with the chunks of the store; it is NaN
        where a row is quarantined or not yet done. ``residues`` and ``offset`` (the sequences) and
        ``residue_embedding`` (slot, feature), if the store has it, are Dask arrays too; see
        `open_residues`.

        Coordinates describe each row. ``embedded``: whether the row has an embedding.
        ``sequence_id`` and ``description``: the first word of the header, and the rest.
        ``source``: the input file. ``length``: in residues. ``status``: codes, with the attributes
        ``flag_values`` and ``flag_meanings``. Translated rows also have ``read`` (a number into
        ``read_id``), ``window``, ``frame`` and ``start``; tiles of proteins have ``read``,
        ``read_id`` and ``start``. Coordinates are read on access and are not Dask arrays, so that
        masks work: ``data.embedding[data.embedded]``. The same is true of analysis results, such
        as ``score_NAME`` and ``map_NAME``.

        The attribute ``virnuc_dask`` describes how the store was made. It is JSON text, which
        every format can store.

    Raises
    ------
    NotAStoreError, StoreError
    """
    import xarray

    from virnuc_dask.analysis import columns

    # This raises a clear error; xarray would only say that the path contains no group.
    opened = Store(store)
    source: Any = opened.location.for_xarray
    data = xarray.open_dataset(source, cache=False, engine="zarr", consolidated=False)
    known: dict[str, Any] = {}
    for name in filter(data.coords.__contains__, _COORDINATES):
        variable = data[name].variable
        if name == "status":
            known |= {
                name: variable,
                "embedded": columns.embedded(variable, opened.location.address),
            }
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
    """A Dask array; a result of analysis stays as it is, with its metadata as JSON text."""
    if ATTRIBUTE not in variable.attrs:
        return variable.chunk(variable.encoding["preferred_chunks"])
    variable.attrs[ATTRIBUTE] = json.dumps(variable.attrs[ATTRIBUTE])
    return variable


def open_residues(store: str | Path, row: int) -> Any:
    """Lazy representation of each residue of one row.

    Parameters
    ----------
    store : path
        A store made with ``per_residue``.
    row : int

    Returns
    -------
    xarray.DataArray, float16, shape (residues, D)
        Only the encoded residues: if `long` is ``truncate``, the first `max_residues`. NaN if the
        row is quarantined or not yet done.

    Raises
    ------
    IndexError
        The row does not exist.
    UsageError
        The store has no residue embeddings.
    NotAStoreError, StoreError
    """
    opened = Store(store)
    identity = opened.identity
    if not identity.per_residue:
        raise UsageError(f"{store} was made without per_residue, so it has no residue embeddings")
    if not 0 <= row < opened.records:
        raise IndexError(f"row {row} of {opened.records}")
    data = open_store(store)
    first, length = int(data.residue_slot[row]), data.length[[row]].values
    count = int(encoded_lengths(length, identity.max_residues, identity.long)[0])
    return data.residue_embedding[first : first + count].rename(slot="residue")
