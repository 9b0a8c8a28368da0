"""How many residues of a sequence are encoded, whatever its length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.settings import LongPolicy

# Residues that neighbouring windows of a long sequence share at least, as a share of a window.
WINDOW_OVERLAP = 0.25


def segment_counts(
    lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy
) -> NDArray[np.int64]:
    """Segments of each row."""
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
    """Residues of each row that are encoded, shape (n,), as often as windows see them."""
    windows = segment_counts(lengths, max_residues, policy)
    windows *= np.minimum(lengths, max_residues)
    return windows


def encoded_lengths(
    lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy
) -> NDArray[np.int64]:
    """Residues of each row that are encoded, shape (n,): its first ones, all of them, or none."""
    encoded = lengths.astype(np.int64)
    if policy != "window":
        encoded[lengths > max_residues] = max_residues if policy == "truncate" else 0
    return encoded
