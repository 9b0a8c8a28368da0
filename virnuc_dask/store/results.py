"""What analysis found, kept beside the embeddings: scores, clusters and maps.

A result is an array of its own in the store, such as ``score_virus``, with a value or two for each
row, chunked as the rows are. It follows the rules of embeddings: a chunk that has its file is done,
durably, and the same command again computes only what is missing. Results are no part of the
store's identity; a run neither reads nor removes them. What `verify --repair` removes of the
embeddings it removes of all results too: a row that ran out of time may have an embedding later.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
    """An array of results, opened.

    Attributes
    ----------
    store : Store
    name : str
        Kind and name: ``score_virus``.
    id : str
        Random; a result that replaces this one has another.
    array : zarr.Array
        float32, NaN where there is no value; a cluster's are int32, and -1. Shape (records,), of a
        map (records, 2).
    about : dict
        What it was computed by, as JSON values.
    """

    store: Store
    name: str
    id: str
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
        files = self.store.location.listing(self.name)
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

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Values of some rows.

        Raises
        ------
        StoreError
            They are damaged.
        """
        try:
            return np.asarray(self.array.oindex[rows])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self.store.path}: `{self.name}` is damaged ({error}); `verify --repair` removes"
                " what is, and the command that made it computes it again"
            ) from error

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Write a chunk; when it has its name it is done, durably.

        Raises
        ------
        ResultReplacedError
            Another command has replaced this result meanwhile.
        """
        self.check()
        self._write(chunk, values)
        try:
            self.check()
        except ResultReplacedError:
            self.remove_chunk(chunk)  # of another result
            raise

    def check(self) -> None:
        """Make sure that this result is still the one of its name.

        Raises
        ------
        ResultReplacedError
        """
        now = _look(self.store, self.name)
        if not isinstance(now, Result) or now.id != self.id:
            raise ResultReplacedError(str(self.store.path), self.name)

    def _write(self, chunk: int, values: NDArray[Any]) -> None:
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
        self.store.location.remove(f"{self.name}/c.{chunk}" + ".0" * (self.array.ndim - 1))


def results_of(store: Store) -> list[Result]:
    """Results that a store holds, in the order of their names.

    Raises
    ------
    StoreError
        The metadata of one is damaged; `damaged_results` says of which.
    """
    return [open_result(store, name) for name in result_names(store)]


def result_names(store: Store) -> list[str]:
    """Names of the results that a store holds, damaged ones too, in their order.

    An array that somebody else has put there, by whatever name, is none.
    """
    return sorted(
        name
        for name, size in store.location.listing().items()
        if size is None and RESULT.fullmatch(name) and not isinstance(_look(store, name), _Foreign)
    )


def damaged_results(store: Store) -> dict[str, str]:
    """Results whose metadata is damaged, and what is wrong with it."""
    looks = {name: _look(store, name) for name in result_names(store)}
    return {name: look for name, look in looks.items() if isinstance(look, str)}


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
        Its metadata is damaged.
    """
    found = _look(store, name) if RESULT.fullmatch(name) else _Foreign()
    if isinstance(found, _Foreign):
        names = ", ".join(result_names(store)) or "no results"
        raise UsageError(f"{store.path} has no `{name}`; it has {names}")
    if isinstance(found, str):
        raise StoreError(f"{found}; `verify --repair` removes it, as `--replace` does")
    return found


def keep_result(
    store: Store,
    kind: Kind,
    name: str,
    about: dict[str, Any],
    *,
    replace: bool | str = False,
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
    replace : bool or str
        Replace one that was computed by something else, or whose metadata is damaged; a text: only
        the one with this id.

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
        raise StoreError(f"{there}; `verify --repair` removes it, as `--replace` does")
    elif isinstance(there, _Foreign) and store.location.size(f"{full}/zarr.json"):
        raise UsageError(f"{store.path}: `{full}` is there, and is no result of this program")
    if store.location.has_array(full):  # also one that was begun, or removed half
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
        attributes={"long_name": _LONG_NAMES[kind], ATTRIBUTE: {"id": uuid4().hex, "by": about}},
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
    """An array that is not ours, or none."""


def _look(store: Store, name: str) -> Result | str | _Foreign:
    """A result; what is wrong with its metadata; or that it is none of ours."""
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
        return f"{store.path}: the metadata of `{name}` is not that of a result of this store"
    return Result(store, name, document["id"], array, document["by"])
