"""What analysis found, kept beside the embeddings: scores, clusters and maps.

A result is an array of its own in the store, such as ``score_virus``, with a value or two for each
row, chunked as the rows are. It follows the rules of embeddings: a chunk that has its file is done,
durably, and the same command again computes only what is missing. Results are no part of the
store's identity; a run neither reads nor removes them. Embeddings that are computed again are the
same, so results stay right.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.store import ATTRIBUTE, MIN_CHUNK_BYTES, Store, listed

Kind = Literal["score", "cluster", "map"]
RESULT = re.compile(rf"({'|'.join(get_args(Kind))})_\w{{1,64}}", re.ASCII)
MAP_DIMENSIONS = 2

_LONG_NAMES: dict[Kind, str] = {
    "score": "probability of the first class, from 0 to 1",
    "cluster": "number of the cluster, -1 without an embedding",
    "map": "coordinates in the plane",
}


@dataclass(frozen=True, slots=True)
class Result:
    """An array of results, opened.

    Attributes
    ----------
    store : Store
    name : str
        Kind and name: ``score_virus``.
    array : zarr.Array
        float32, NaN where there is no value; a cluster's are int32, and -1. Shape (records,), of a
        map (records, 2).
    about : dict
        What it was computed by, as JSON values.
    """

    store: Store
    name: str
    array: Any
    about: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """Score, cluster or map."""
        return cast(Kind, self.name.partition("_")[0])

    def present(self) -> NDArray[np.bool_]:
        """Which chunks are done, shape (chunk_count,); one listing."""
        return self._listed(MIN_CHUNK_BYTES)

    def touched(self) -> NDArray[np.bool_]:
        """Which chunks have any file, be it damaged."""
        return self._listed(0)

    def _listed(self, least: int) -> NDArray[np.bool_]:
        files = self.store.place.listing(self.name)
        return listed(files, self.chunk_file, self.store.chunk_count, least)

    @property
    def chunk_file(self) -> re.Pattern[str]:
        """Names that chunks have."""
        return re.compile(r"c\.(0|[1-9]\d*)" + r"\.0" * (self.array.ndim - 1))

    def empty(self, chunk: int) -> NDArray[Any]:
        """Values of a chunk of which nothing is known."""
        rows = self.store.rows(chunk)
        shape = (rows.stop - rows.start, *self.array.shape[1:])
        return np.full(shape, self.array.fill_value, self.array.dtype)

    def read(self, rows: slice) -> NDArray[Any]:
        """Values of some rows.

        Raises
        ------
        StoreError
            They are damaged.
        """
        try:
            return np.asarray(self.array[rows])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self.store.path}: `{self.name}` is damaged ({error}); `verify --repair` removes"
                " what is, and the command that made it computes it again"
            ) from error

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Write a chunk; when it has its name it is done, durably."""
        rows = self.store.rows(chunk)
        if values.shape != (rows.stop - rows.start, *self.array.shape[1:]):
            raise ValueError(f"chunk {chunk} of {self.name} does not take {values.shape}")
        try:
            self.array[rows] = values
        except (ValueError, RuntimeError):
            # Zarr reads a short last chunk before it overwrites it.
            self.remove_chunk(chunk)
            self.array[rows] = values

    def remove_chunk(self, chunk: int) -> None:
        """Remove a chunk, so that it is computed again."""
        self.store.place.remove(f"{self.name}/c.{chunk}" + ".0" * (self.array.ndim - 1))


def result_names(store: Store) -> list[str]:
    """Results that a store holds, in the order of their names."""
    return sorted(
        name
        for name, size in store.place.listing().items()
        if size is None and RESULT.fullmatch(name) and store.place.size(f"{name}/zarr.json")
    )


def result_name(kind: Kind, name: str) -> str:
    """The array's name.

    Raises
    ------
    UsageError
        The name is not one.
    """
    full = f"{kind}_{name}"
    if not RESULT.fullmatch(full):
        raise UsageError(f"{name!r}: a result's name is of letters, digits and _, at most 64")
    return full


def open_result(store: Store, name: str) -> Result:
    """Open one of a store's results.

    Raises
    ------
    UsageError
        There is none of this name.
    StoreError
        Its metadata is damaged, or not that of a result of this store.
    """
    if name not in (names := result_names(store)):
        raise UsageError(f"{store.path} has no `{name}`; it has {', '.join(names) or 'no results'}")
    array = store.open_array(name)
    about = array.attrs.get(ATTRIBUTE)
    rows = (store.records, store.identity.rows_per_chunk)
    if not isinstance(about, dict) or (array.shape[0], array.chunks[0]) != rows:
        raise StoreError(f"{store.path}: `{name}` is not a result of this program")
    return Result(store, name, array, about)


def keep_result(
    store: Store, kind: Kind, name: str, about: dict[str, Any], *, force: bool = False
) -> Result:
    """Open a result to go on with it, or make a new one.

    Parameters
    ----------
    store : Store
    kind : {'score', 'cluster', 'map'}
    name : str
        Letters, digits and underscores.
    about : dict
        What it is computed by, as JSON values: all that its values depend on beside the embeddings.
    force : bool
        Replace one that was computed by something else.

    Returns
    -------
    Result

    Raises
    ------
    UsageError
        The name is not one, or there is another result of this name.
    StoreReplacedError
    """
    full = result_name(kind, name)
    about = json.loads(json.dumps(about))
    store.check_place()
    if full in result_names(store):
        there = open_result(store, full)
        if there.about == about:
            return there
        if not force:
            names = sorted({*about, *there.about})
            changed = [name for name in names if about.get(name) != there.about.get(name)]
            raise UsageError(
                f"{store.path}: `{full}` is there and was computed otherwise"
                f" ({', '.join(changed)}); give another name, or --force, which replaces it"
            )
        _remove(store, full)
    elif store.place.has_array(full):  # begun, or removed half
        _remove(store, full)
    is_map = kind == "map"
    zarr.create_array(
        store.zarr_store,
        name=full,
        shape=(store.records, MAP_DIMENSIONS) if is_map else (store.records,),
        chunks=(store.identity.rows_per_chunk, *([MAP_DIMENSIONS] if is_map else [])),
        dtype="int32" if kind == "cluster" else "float32",
        fill_value=-1 if kind == "cluster" else float("nan"),
        dimension_names=("sequence", "axis") if is_map else ("sequence",),
        attributes={"long_name": _LONG_NAMES[kind], ATTRIBUTE: about},
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
    )
    return open_result(store, full)


def _remove(store: Store, name: str) -> None:
    """Remove a result, its metadata last: what a kill leaves is still of the old one."""
    for entry in store.place.listing(name):
        if entry != "zarr.json":
            store.place.remove(f"{name}/{entry}")
    store.place.remove(name)
