"""Fits of maps and clusters, stored with the result.

A run may add rows to a store after a map was made. The new rows must go into the same map. So the
numbers of a fit are stored in the attributes of its result and used again.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.rows import pending_note
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.store.results import Kind, damaged_results, open_result, result_name, result_names
from virnuc_dask.store.store import Store

MOST_SEED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Space:
    """The space in which distances are computed.

    Attributes
    ----------
    origin : ndarray, float32, shape (D,)
        Subtracted from each row.
    is_unit : bool
        Then scale rows to length 1. The squared distance is then 2 minus twice the cosine.
    """

    origin: NDArray[np.float32]
    is_unit: bool

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transform rows into this space, shape (n, D)."""
        rows = rows - self.origin
        if self.is_unit:
            lengths = np.sqrt(np.vecdot(rows, rows))
            rows /= np.where(lengths > 0, lengths, 1)[:, None]
        return rows


def find_fit(
    store: Store, kind: Kind, name: str, settings: dict[str, Any], *, replace: bool, refit: bool
) -> tuple[dict[str, Any] | None, bool | str]:
    """Find the fit of an existing result, if this call continues it.

    Returns
    -------
    about : dict, optional
        The stored fit; None if a new fit is needed.
    replace : bool or str
        Argument of `keep_result`: False replaces nothing; True or an id replaces that result.

    Raises
    ------
    UsageError
        The name is not valid, or a result of this name has other settings.
    StoreError
        The metadata of the result is damaged.
    """
    full = result_name(kind, name)
    if full not in result_names(store):
        return None, False
    if (replace or refit) and full in damaged_results(store):
        return None, True
    there = open_result(store, full)
    about = there.about
    changed = [key for key, value in settings.items() if about.get(key) != value]
    if changed and not replace:
        raise UsageError(
            f"{store.path}: `{full}` was made with other settings ({', '.join(changed)});"
            " give --replace to make it again, or another --name"
        )
    return (None, there.id) if changed or refit else (about, False)


def note_of(store: Store, about: dict[str, Any], name: str) -> str | None:
    """Note that rows are not embedded yet, or embedded since the fit; else None."""
    notes = [pending_note(store)]
    chunks = int(store.present().sum())
    if about.get("chunks") != chunks:
        notes.append(
            f"{name} was fitted when the store had {about.get('chunks')} of the {chunks} chunks"
            " that it has now; --refit fits again to all rows"
        )
    return "; ".join(filter(None, notes)) or None


def packed(values: NDArray[np.floating[Any]]) -> str:
    """Numbers as text: float32, little-endian, base64."""
    return b64encode(values.astype("<f4").tobytes()).decode()


def unpacked(store: Store, about: dict[str, Any], key: str, columns: int) -> NDArray[np.float32]:
    """Numbers of a fit as an array, float32, shape (n, columns).

    Raises
    ------
    StoreError
        The numbers are damaged.
    """
    try:
        values = np.frombuffer(b64decode(about[key], validate=True), "<f4").reshape(-1, columns)
        if not np.isfinite(values).all():
            raise ValueError("not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{store.path}: `{key}` of a result is damaged ({error}); --refit makes it again"
        ) from error
    return values.astype(np.float32)


def check_seed(random_state: int) -> None:
    """Check that a number can seed the generators of NumPy and scikit-learn.

    Raises
    ------
    UsageError
        It cannot.
    """
    if not 0 <= random_state <= MOST_SEED:
        raise UsageError(f"random_state must be from 0 to {MOST_SEED}, not {random_state}")
