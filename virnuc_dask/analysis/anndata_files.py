"""Export of a store's rows as AnnData, in HDF5 or Zarr, part by part, without anndata.

The layout is that of https://anndata.readthedocs.io/en/stable/fileformat-prose.html.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.formats import (
    Part,
    about,
    hdf5,
    hdf5_dataset,
    is_cluster,
    is_text,
    put,
    rows_per_part,
)
from virnuc_dask.settings import Status
from virnuc_dask.store.store import ATTRIBUTE, SEQUENCES_PER_CHUNK, Store

# Creates an array in a group, from its name, shape and data type.
_Create = Callable[[Any, str, tuple[int, ...], np.dtype[Any]], Any]
_MAPPINGS = ("layers", "obsm", "obsp", "uns", "varm", "varp")
# All names that may occur at the top of an AnnData directory in Zarr format 2 or 3.
_ENTRIES = {
    *_MAPPINGS,
    *("X", "obs", "var", "raw", "zarr.json", ".zattrs", ".zgroup", ".zmetadata"),
}
_TEXT = np.dtypes.StringDType()
_INDEX = "_index"


def write_h5ad(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write AnnData as an HDF5 file; see `export`."""
    with hdf5(path) as (file, check):
        return _write(file, hdf5_dataset, store, parts, check)


def write_zarr(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write AnnData as a new directory in Zarr format 3; see `export`."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    from virnuc_dask.store.zarr_folder import ZarrFolder

    per_chunk = {1: rows_per_part(store), 2: store.identity.rows_per_chunk}

    def create(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        chunks = (max(1, min(shape[0], per_chunk[len(shape)])), *shape[1:]) if shape else ()
        return group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype="string" if is_text(dtype) else dtype,
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            # Keep all chunks of an array in one folder, as the store does.
            chunk_key_encoding={"name": "default", "separator": "."},
        )

    # Data need not be durable before the directory gets its final name.
    folder = ZarrFolder(path)
    try:
        root = zarr.create_group(folder, zarr_format=3)
        return _write(root, create, store, parts, lambda: None)
    finally:
        folder.leave()


def is_annotated(path: Path) -> bool:
    """Whether a directory is AnnData in Zarr and contains nothing else."""
    try:
        if path.is_symlink() or not {entry.name for entry in path.iterdir()} <= _ENTRIES:
            return False
        newer, older = path / "zarr.json", path / ".zattrs"
        attributes = (
            json.loads(newer.read_bytes())["attributes"]
            if newer.exists()
            else json.loads(older.read_bytes())
        )
        return bool(attributes["encoding-type"] == "anndata")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(
    root: Any, create: _Create, store: Store, parts: Iterable[Part], check: Callable[[], None]
) -> int:
    rows = store.records
    _mark(root, "anndata", "0.1.0")
    for name in _MAPPINGS:
        _mark(root.create_group(name), "dict", "0.1.0")
    text = create(root["uns"], ATTRIBUTE, (), _TEXT)
    text[()] = about(store)
    _mark(text, "string")
    features = np.array([f"feature_{number}" for number in range(store.dimension)], _TEXT)
    put(_column(_table(root, "var", []), create, _INDEX, len(features), _TEXT), 0, features)

    names = _Names(store)
    # The categories are the values that occur, which are known only at the end.
    states = np.empty(rows, np.uint8)
    clusters: dict[str, NDArray[np.int32]] = {}
    arrays: dict[str, Any] = {}
    for part in parts:
        of_maps = {f"map_{name}_{axis}" for name in part.maps for axis in (1, 2)}
        columns = {_INDEX: names.unique(part), **part.columns}
        columns = {name: values for name, values in columns.items() if name not in of_maps}
        shown = [name for name in columns if name != _INDEX]
        del columns["status"]
        here = slice(part.first, part.first + len(part.codes))
        states[here] = part.codes
        for name in filter(is_cluster, part.columns):
            clusters.setdefault(name, np.empty(rows, np.int32))[here] = columns.pop(name)
        # scanpy expects these names.
        maps = {f"X_{name}": values for name, values in part.maps.items()}
        if not part.first:
            obs = _table(root, "obs", shown)
            arrays = {n: _column(obs, create, n, rows, v.dtype) for n, v in columns.items()}
            arrays |= {
                n: _column(root["obsm"], create, n, rows, v.dtype, 2) for n, v in maps.items()
            }
            arrays["X"] = _column(root, create, "X", rows, part.embedding.dtype, store.dimension)
        for name, values in {**columns, **maps, "X": part.embedding}.items():
            put(arrays[name], part.first, values)
        check()
    _write_categories(obs, create, "status", states, lambda code: Status(code).meaning)
    for name, numbers in clusters.items():
        _write_categories(obs, create, name, numbers, str)
    return rows


def _write_categories(
    obs: Any, create: _Create, name: str, values: NDArray[Any], text: Callable[[int], str]
) -> None:
    """Write numbers as a categorical column of the values that occur; negative means missing."""
    known = np.unique(values[values >= 0])
    column = obs.create_group(name)
    _mark(column, "categorical")
    column.attrs["ordered"] = False
    names = np.array([text(number) for number in known.tolist()], _TEXT)
    put(_column(column, create, "categories", len(known), _TEXT), 0, names)
    dtype = np.dtype(np.int8 if len(known) <= np.iinfo(np.int8).max else np.int32)
    codes = np.where(values < 0, -1, np.searchsorted(known, values)).astype(dtype)
    put(_column(column, create, "codes", len(codes), dtype), 0, codes)


def _table(root: Any, name: str, columns: list[str]) -> Any:
    table = root.create_group(name)
    _mark(table, "dataframe")
    table.attrs[_INDEX] = _INDEX
    table.attrs["column-order"] = columns
    return table


def _column(
    group: Any, create: _Create, name: str, rows: int, dtype: np.dtype[Any], *others: int
) -> Any:
    array = create(group, name, (rows, *others), dtype)
    _mark(array, "string-array" if is_text(dtype) else "array")
    return array


def _mark(node: Any, kind: str, version: str = "0.2.0") -> None:
    node.attrs["encoding-type"] = kind
    node.attrs["encoding-version"] = version


class _Names:
    """Identifiers as an index without duplicates.

    The first of several equal identifiers stays unchanged. The others get the suffix ``#`` and the
    row number, repeated until the name is free. Only an 8-byte hash of each row is kept. If two
    different names have the same hash, one of them gets a suffix that it does not need.
    """

    def __init__(self, store: Store) -> None:
        self._hashes = np.empty(store.records, np.int64)
        for start in range(0, store.records, SEQUENCES_PER_CHUNK):
            rows = slice(start, min(start + SEQUENCES_PER_CHUNK, store.records))
            self._hashes[rows] = _hashes(store.array("sequence_id")[rows])
        self._hashes.sort()
        repeated = self._hashes[1:][self._hashes[1:] == self._hashes[:-1]]
        self._repeated: NDArray[np.int64] = np.unique(repeated)
        self._is_used = np.zeros(len(self._repeated), np.bool_)

    def unique(self, part: Part) -> NDArray[Any]:
        """Unique names for the rows of a part; call this with the parts in order."""
        names = part.columns["sequence_id"].copy()
        hashes = _hashes(names)
        for number in np.flatnonzero(np.isin(hashes, self._repeated)).tolist():
            which = np.searchsorted(self._repeated, hashes[number])
            if self._is_used[which]:
                names[number] = self._renamed(str(names[number]), part.first + number)
            self._is_used[which] = True
        return names

    def _renamed(self, name: str, row: int) -> str:
        while True:
            name += f"#{row}"
            position = np.searchsorted(self._hashes, hash(name))
            if position == len(self._hashes) or self._hashes[position] != hash(name):
                return name


def _hashes(names: NDArray[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(hash, names.tolist()), np.int64, len(names))
