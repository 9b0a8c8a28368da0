"""Metadata of the rows as xarray variables that are read on access.

They are not Dask arrays, because xarray refuses a Dask array as a mask. So
``data.embedding[data.embedded]`` reads one byte per row, and the embeddings stay lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xarray import Variable
from xarray.backends import BackendArray
from xarray.core import indexing

from virnuc_dask.store.store import Store, is_embedded


class _Column(BackendArray):
    """Values of another lazy variable, transformed when they are read.

    Parameters
    ----------
    variable : Variable
    dtype : dtype
        Data type of the transformed values.
    change : callable
        Function from stored to shown values.
    """

    def __init__(
        self, variable: Variable, dtype: Any, change: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        self._variable, self._change = variable, change
        self.shape, self.dtype = variable.shape, np.dtype(dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        return self._change(np.asarray(self._variable[key].values))


class _Embedded(_Column):
    """Whether rows have an embedding: from their status, if their chunk is done.

    A run writes the status of a chunk before its embeddings.
    """

    def __init__(self, status: Variable, location: str) -> None:
        super().__init__(status, np.bool_, is_embedded)
        self._location = location

    def _read(self, key: tuple[Any, ...]) -> NDArray[np.bool_]:
        store = Store(self._location)
        # Read this before the status: a chunk that is done stays done.
        present = store.present()
        rows = np.arange(store.records)[key]
        is_done = present[rows // store.identity.rows_per_chunk]
        return np.asarray(super()._read(key) & is_done)


def _lazily(
    variable: Variable, dtype: Any, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> Variable:
    data = indexing.LazilyIndexedArray(_Column(variable, dtype, change))
    return Variable(variable.dims, data, variable.attrs)


def texts(variable: Variable) -> Variable:
    """Python strings, which every library accepts, instead of NumPy's StringDType."""
    return _lazily(variable, object, _as_objects)


def named(variable: Variable, names: Sequence[str]) -> Variable:
    """Names, looked up by the stored numbers."""
    # One more name, empty, for numbers out of range.
    return _lazily(variable, object, partial(_look_up, np.array([*names, ""], object)))


def embedded(status: Variable, location: str) -> Variable:
    """Whether rows of the store at a location have an embedding."""
    data = indexing.LazilyIndexedArray(_Embedded(status, location))
    return Variable(status.dims, data, {"long_name": "whether the row has an embedding"})


def _as_objects(values: NDArray[Any]) -> NDArray[np.object_]:
    return values.astype(object)


def _look_up(names: NDArray[np.object_], numbers: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
    return np.asarray(names[np.minimum(numbers, len(names) - 1)])
