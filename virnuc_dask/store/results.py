"""Results of analyses, stored beside the embeddings: scores, clusters and maps.

A result is an array in the store, such as ``score_virus``. It has one or two values per row, and
the same chunks as the rows. The rules are those of embeddings: a chunk is done, durably, once its
file exists, and the same command computes only missing chunks. Results are not part of the store's
identity; a run neither reads nor removes them. When `verify --repair` removes a chunk of
embeddings, it also removes that chunk of all results: a row that timed out may get an embedding
later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from virnuc_dask.errors import ResultReplacedError, StoreError, UsageError
from virnuc_dask.store.store import ATTRIBUTE, MIN_CHUNK_BYTES, Store, listed

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
    """An opened result array.

    Attributes
    ----------
    store : Store
    name : str
        Kind and name: ``score_virus``.
    id : str
        Random identifier; a replacement has another one.
    array : zarr.Array
        Scores and maps: float32, NaN where there is no value. Clusters: int32, -1 where there is no
        value. The shape is (records,), for maps (records, 2).
    about : dict
        How it was computed, as JSON values.
    details : dict
        What else is worth knowing, as JSON values. No value depends on it.
    """

    store: Store
    name: str
    id: str
    array: Any
    about: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """Kind of the result: score, cluster or map."""
        return cast(Kind, self.name.partition("_")[0])

    def present(self) -> NDArray[np.bool_]:
        """Which chunks are done, shape (chunk_count,); takes one listing."""
        return self._listed(MIN_CHUNK_BYTES)

    def touched(self) -> NDArray[np.bool_]:
        """Which chunks have a file, even a damaged one, shape (chunk_count,)."""
        return self._listed(0)

    def _listed(self, least: int) -> NDArray[np.bool_]:
        files = self.store.location.listing(self.name)
        return listed(files, self.chunk_file, self.store.chunk_count, least)

    @property
    def chunk_file(self) -> re.Pattern[str]:
        """Pattern of the names of chunk files."""
        return re.compile(r"c\.(0|[1-9]\d*)" + r"\.0" * (self.array.ndim - 1))

    def empty(self, chunk: int) -> NDArray[Any]:
        """Fill values in the shape of a chunk."""
        rows = self.store.rows(chunk)
        shape = (rows.stop - rows.start, *self.array.shape[1:])
        return np.full(shape, self.array.fill_value, self.array.dtype)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Read the values of rows.

        Raises
        ------
        StoreError
            The values are damaged.
        """
        try:
            return np.asarray(self.array.oindex[rows])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self.store.path}: `{self.name}` is damaged ({error}); `verify --repair` removes"
                " the damaged chunks, and the command that made it computes them again"
            ) from error

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Write a chunk; it is done, durably, once its file has its final name.

        Raises
        ------
        ResultReplacedError
            Another command has replaced this result in the meantime.
        """
        self.check()
        self._write(chunk, values)
        try:
            self.check()
        except ResultReplacedError:
            self.remove_chunk(chunk)  # it was written into the other result
            raise

    def check(self) -> None:
        """Check that the array of this name is still this result.

        Raises
        ------
        ResultReplacedError
            It was replaced or removed.
        """
        now = _look(self.store, self.name)
        if not isinstance(now, Result) or now.id != self.id:
            raise ResultReplacedError(str(self.store.path), self.name)

    def _write(self, chunk: int, values: NDArray[Any]) -> None:
        rows = self.store.rows(chunk)
        if values.shape != (rows.stop - rows.start, *self.array.shape[1:]):
            raise ValueError(f"chunk {chunk} of {self.name} cannot have the shape {values.shape}")
        try:
            self.array[rows] = values
        except (ValueError, RuntimeError):
            # Zarr reads a short last chunk before it overwrites it; a damaged one raises an error.
            self.remove_chunk(chunk)
            self.array[rows] = values

    def remove_chunk(self, chunk: int) -> None:
        """Remove a chunk, so that it is computed again."""
        self.store.location.remove(f"{self.name}/c.{chunk}" + ".0" * (self.array.ndim - 1))


def results_of(store: Store) -> list[Result]:
    """Open all results of a store, sorted by name.

    Raises
    ------
    StoreError
        The metadata of a result is damaged; `damaged_results` says which.
    """
    return [open_result(store, name) for name in result_names(store)]


def result_names(store: Store) -> list[str]:
    """Sorted names of a store's results, including damaged ones.

    Arrays that other programs put into the store do not count.
    """
    return sorted(
        name
        for name, size in store.location.listing().items()
        if size is None and RESULT.fullmatch(name) and not isinstance(_look(store, name), _Foreign)
    )


def damaged_results(store: Store) -> dict[str, str]:
    """Problem of each result with damaged metadata, by name."""
    looks = {name: _look(store, name) for name in result_names(store)}
    return {name: look for name, look in looks.items() if isinstance(look, str)}


def result_name(kind: Kind, name: str) -> str:
    """Name of a result's array.

    Raises
    ------
    UsageError
        The name is invalid.
    """
    full = f"{kind}_{name}"
    if not RESULT.fullmatch(full):
        raise UsageError(f"{name!r}: a result's name has 1 to 64 letters, digits and underscores")
    return full


def open_result(store: Store, name: str) -> Result:
    """Open a result of a store.

    Raises
    ------
    UsageError
        There is no result of this name.
    StoreError
        Its metadata is damaged.
    """
    result = _look(store, name) if RESULT.fullmatch(name) else _Foreign()
    if isinstance(result, _Foreign):
        names = ", ".join(result_names(store)) or "no results"
        raise UsageError(f"{store.path} has no `{name}`; it has {names}")
    if isinstance(result, str):
        raise StoreError(f"{result}; `verify --repair` or `--replace` removes it")
    return result


def keep_result(
    store: Store,
    kind: Kind,
    name: str,
    about: dict[str, Any],
    *,
    details: Callable[[], dict[str, Any]] | None = None,
    replace: bool | str = False,
) -> Result:
    """Open an unfinished or finished result to fill it, or create a new one.

    Parameters
    ----------
    store : Store
    kind : {'score', 'cluster', 'map'}
    name : str
        Letters, digits and underscores.
    about : dict
        How it is computed, as JSON values: all that its values depend on besides the embeddings.
    details : callable, optional
        Called for a new result. Returns JSON values on which no value of the result depends.
    replace : bool or str
        Replace a result that was computed in another way, or that has damaged metadata. A str
        replaces only the result with this id.

    Returns
    -------
    Result

    Raises
    ------
    UsageError
        The name is invalid, or taken by a result that was computed in another way, or by an array
        of another program.
    StoreError
        The metadata of the existing result is damaged.
    StoreReplacedError
        The store is no longer at its location.
    """
    full = result_name(kind, name)
    about = json.loads(json.dumps(about))
    store.check_location()
    there = _look(store, full)
    if isinstance(there, Result):
        if there.about == about:
            return there
        if replace is not True and replace != there.id:
            raise UsageError(
                f"{store.path}: `{full}` was made {_otherwise(about, there.about)}; --replace makes"
                " it anew, or give another --name"
            )
    elif isinstance(there, str) and not replace:
        raise StoreError(f"{there}; `verify --repair` or `--replace` removes it")
    elif isinstance(there, _Foreign) and store.location.size(f"{full}/zarr.json"):
        raise UsageError(f"{store.path}: `{full}` exists, but is not a result of this program")
    if store.location.has_array(full):  # perhaps only half created, or half removed
        store.location.remove(full)
    is_map = kind == "map"
    zarr.create_array(
        store.zarr_store,
        name=full,
        shape=(store.records, MAP_DIMENSIONS) if is_map else (store.records,),
        chunks=(store.identity.rows_per_chunk, *([MAP_DIMENSIONS] if is_map else [])),
        dtype="int32" if kind == "cluster" else "float32",
        fill_value=-1 if kind == "cluster" else float("nan"),
        dimension_names=("sequence", "axis") if is_map else ("sequence",),
        attributes={
            "long_name": _LONG_NAMES[kind],
            ATTRIBUTE: {"id": uuid4().hex, "by": about, "details": details() if details else {}},
        },
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
    )
    return open_result(store, full)


def _otherwise(about: dict[str, Any], there: dict[str, Any]) -> str:
    names = sorted({*about, *there})
    changed = [name for name in names if about.get(name) != there.get(name)]
    if "classifier" in changed:
        return "by another classifier"
    return f"with other settings ({', '.join(changed)})"


class _Foreign:
    """An array of another program, or no array."""


def _look(store: Store, name: str) -> Result | str | _Foreign:
    """Open a result; a str is the problem of its metadata."""
    if not store.location.size(f"{name}/zarr.json"):
        return _Foreign()
    try:
        array = store.open_array(name)
    except StoreError as error:
        return str(error)
    document = array.attrs.get(ATTRIBUTE)
    if document is None:
        return _Foreign()
    rows = (store.records, store.identity.rows_per_chunk)
    if (array.shape[0], array.chunks[0]) != rows or not (
        isinstance(document, dict)
        and isinstance(document.get("id"), str)
        and isinstance(document.get("by"), dict)
    ):
        return f"{store.path}: the metadata of `{name}` does not match this store"
    details = document.get("details")
    return Result(
        store,
        name,
        document["id"],
        array,
        document["by"],
        details if isinstance(details, dict) else {},
    )
