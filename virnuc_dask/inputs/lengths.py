"""What is encoded of a sequence, whatever its length, and the state that follows from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.inputs.records import invalid_rows
from virnuc_dask.settings import LongPolicy, Status

_STATE_OF_LONG: dict[LongPolicy, Status] = {
    "truncate": Status.TRUNCATED,
    "window": Status.WINDOWED,
    "skip": Status.TOO_LONG,
}
# Minimum overlap of neighbouring windows of a long sequence, as a fraction of a window.
WINDOW_OVERLAP = 0.25


def segment_counts(
    lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy
) -> NDArray[np.int64]:
    """Number of segments of each row, shape (n,)."""
    is_long = lengths > max_residues
    windows = (lengths > 0).astype(np.int64)
    if policy == "skip":
        windows[is_long] = 0
    elif policy == "window":
        overlap = int(max_residues * WINDOW_OVERLAP)
        step = max(1, max_residues - overlap)
        windows[is_long] = -(-(lengths[is_long].astype(np.int64) - overlap) // step)
    return windows


def residues_to_encode(
    lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy
) -> NDArray[np.int64]:
    """Residues to encode in each row, shape (n,). Each counts once per window that covers it."""
    windows = segment_counts(lengths, max_residues, policy)
    windows *= np.minimum(lengths, max_residues)
    return windows


def encoded_lengths(
    lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy
) -> NDArray[np.int64]:
    """Residues of each row that are encoded, shape (n,): the first ones, all, or none."""
    encoded = lengths.astype(np.int64)
    if policy != "window":
        encoded[lengths > max_residues] = max_residues if policy == "truncate" else 0
    return encoded


def states_before_encoding(
    lengths: NDArray[np.int32], residues: NDArray[np.uint8], max_residues: int, policy: LongPolicy
) -> NDArray[np.uint8]:
    """State of each row that follows from its sequence alone, shape (n,).

    A row with a letter that is not a residue is quarantined, even if truncation would remove it.

    Parameters
    ----------
    lengths : ndarray, int32, shape (n,)
    residues : ndarray, uint8, shape (sum of lengths,)
        ASCII.
    max_residues : int
    policy : {'truncate', 'window', 'skip'}
    """
    status = np.full(len(lengths), Status.EMBEDDED, np.uint8)
    status[lengths > max_residues] = _STATE_OF_LONG[policy]
    status[lengths == 0] = Status.EMPTY
    status[invalid_rows(residues, lengths)] = Status.INVALID_RESIDUES
    return status
