"""What is known of each row, as xarray variables that are read when somebody looks.

They are no Dask arrays, for xarray refuses a mask that is one: ``data.embedding[data.embedded]``
reads a byte for each row, and stays lazy in all else.
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
    """Values of another lazy variable, changed when they are read.

    Parameters
    ----------
    variable : Variable
    dtype : dtype
        Of the changed values.
    change : callable
        From values as stored to values as shown.
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
    """Whether rows have an embedding: by their state, once their chunk is done.

    A chunk's states are written before its embeddings are.
    """

    def __init__(self, status: Variable, location: str) -> None:
        super().__init__(status, np.bool_, is_embedded)
        self._location = location

    def _read(self, key: tuple[Any, ...]) -> NDArray[np.bool_]:
        store = Store(self._location)
        # Before the states are read: what is done stays so.
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
    """Plain Python strings, which every library takes, of NumPy's new ones."""
    return _lazily(variable, object, _as_objects)


def named(variable: Variable, names: Sequence[str]) -> Variable:
    """Names instead of numbers."""
    # One more, for a number that is none.
    return _lazily(variable, object, partial(_look_up, np.array([*names, ""], object)))


def embedded(status: Variable, location: str) -> Variable:
    """Whether a row of the store at a location has an embedding."""
    data = indexing.LazilyIndexedArray(_Embedded(status, location))
    return Variable(status.dims, data, {"long_name": "whether the row has an embedding"})


def _as_objects(values: NDArray[Any]) -> NDArray[np.object_]:
    return values.astype(object)


def _look_up(names: NDArray[np.object_], numbers: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
    return np.asarray(names[np.minimum(numbers, len(names) - 1)])
