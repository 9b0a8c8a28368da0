"""Fits of maps and clusters, kept with the result so that they stay the same.

A store may fill after a map was made. Its later rows must come into the same map, not into another
one. So a fit is kept as numbers in the attributes of its result, and used again.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.store.results import Kind, damaged_results, open_result, result_name, result_names
from virnuc_dask.store.store import Store

MOST_SEED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Space:
    """Where distances are taken.

    Attributes
    ----------
    origin : ndarray, float32, shape (D,)
        Is subtracted from each row.
    is_unit : bool
        Rows are divided by their length then. The square of a distance is 2 minus twice the cosine.
    """

    origin: NDArray[np.float32]
    is_unit: bool

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows in this space, shape (n, D)."""
        rows = rows - self.origin
        if self.is_unit:
            lengths = np.sqrt(np.vecdot(rows, rows))
            rows /= np.where(lengths > 0, lengths, 1)[:, None]
        return rows


def find_fit(
    store: Store, kind: Kind, name: str, settings: dict[str, Any], *, replace: bool, refit: bool
) -> tuple[dict[str, Any] | None, bool | str]:
    """What a result of this name was fitted as, if it is there and to be gone on with.

    Returns
    -------
    about : dict, optional
        None if there is to be a new fit.
    replace : bool or str
        What `keep_result` may replace by it: nothing, or the result that was there.

    Raises
    ------
    UsageError
        The name is not one, or there is a result of this name with other settings.
    StoreError
        Its metadata is damaged.
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
            " --replace makes it anew, or give another --name"
        )
    return (None, there.id) if changed or refit else (about, False)


def note_of(store: Store, about: dict[str, Any], name: str) -> str | None:
    """What there is to say of a fit that has not seen all rows."""
    chunks = int(store.present().sum())
    if about.get("chunks") == chunks:
        return None
    return (
        f"{name} was fitted when the store had {about.get('chunks')} of the {chunks} chunks that it"
        " has now; --refit fits it again"
    )


def packed(values: NDArray[np.floating[Any]]) -> str:
    """Numbers as text: float32, little-endian, base64."""
    return b64encode(values.astype("<f4").tobytes()).decode()


def unpacked(store: Store, about: dict[str, Any], key: str, columns: int) -> NDArray[np.float32]:
    """Numbers of a fit, shape (n, columns).

    Raises
    ------
    StoreError
        They are damaged.
    """
    try:
        values = np.frombuffer(b64decode(about[key], validate=True), "<f4").reshape(-1, columns)
        if not np.isfinite(values).all():
            raise ValueError("not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{store.path}: `{key}` of a result is damaged ({error}); --refit makes it anew"
        ) from error
    return values.astype(np.float32)


def check_seed(random_state: int) -> None:
    """Make sure that it seeds NumPy's and scikit-learn's generators.

    Raises
    ------
    UsageError
    """
    if not 0 <= random_state <= MOST_SEED:
        raise UsageError(f"random_state must be from 0 to {MOST_SEED}, not {random_state}")
