"""What to do with a store once it is there, or while it fills: open it, look at it, check it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from virnuc_dask.errors import UsageError
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.store.store import ATTRIBUTE, TRANSLATED, Store

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
