"""Cuts rows into segments for the encoder, and segments into evenly filled batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.inputs.lengths import segment_counts
from virnuc_dask.settings import LongPolicy


@dataclass(frozen=True)
class Segments:
    """Stretches of residues to encode. Each belongs to one row.

    Attributes
    ----------
    row : ndarray, int64, shape (s,)
        Row of the segment. A row has several segments only if it is cut into windows.
    start : ndarray, int64, shape (s,)
        First residue, as an index into the concatenated residues of all rows.
    length : ndarray, int64, shape (s,)
        Number of residues.
    windows : ndarray, int64, shape (s,)
        Number of windows of the segment's row.
    """

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    windows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def shares(self) -> NDArray[np.float32]:
        """1/k for each residue that k windows of its row cover, from the first start on."""
        bounds = np.concatenate((self.start, self.start + self.length)) - self.start[0]
        steps = np.repeat(np.array([1, -1]), len(self))
        covered = np.cumsum(np.bincount(bounds, steps)[:-1])
        return np.divide(1, covered, np.ones(len(covered), np.float32), where=covered > 0)

    def shares_of(self, number: int) -> NDArray[np.float32]:
        """`shares` of the residues of one segment, shape (length,)."""
        first = self.start[number] - self.start[0]
        return self.shares[first : first + self.length[number]]

    def select(self, chosen: NDArray[np.bool_]) -> Segments:
        """Select segments by a mask, which must keep all windows of a row or none."""
        return Segments(
            self.row[chosen], self.start[chosen], self.length[chosen], self.windows[chosen]
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments that are encoded together, sorted by length.

    Attributes
    ----------
    segments : ndarray, int64, shape (b,)
        Indices of the segments.
    runs : list of (count, length)
        Runs of equal length, in order. The packed tokens of a run are a dense array.
    """

    segments: NDArray[np.int64]
    runs: list[tuple[int, int]]


def cut_segments(lengths: NDArray[np.integer], max_residues: int, policy: LongPolicy) -> Segments:
    """Cut each row into segments that the encoder can take.

    Parameters
    ----------
    lengths : ndarray, int32, shape (n,)
        Residues per row. Rows of length 0 give no segment.
    max_residues : int
        Longest segment.
    policy : {'truncate', 'window', 'skip'}
        What a longer row gives. ``truncate``: its first `max_residues` residues. ``window``:
        windows that cover it, all of `max_residues`, evenly spaced and overlapping by at least a
        quarter. ``skip``: no segment.
    """
    lengths = lengths.astype(np.int64)
    offsets = np.cumsum(lengths) - lengths
    windows = segment_counts(lengths, max_residues, policy)
    row = np.repeat(np.arange(len(lengths), dtype=np.int64), windows)
    count = windows[row]
    # A segment is the k-th window of its row.
    k = np.arange(len(row)) - np.repeat(np.cumsum(windows) - windows, windows)
    spare = np.maximum(lengths[row] - max_residues, 0)
    shift = np.where(count > 1, k * spare // np.maximum(count - 1, 1), 0)
    length = np.minimum(lengths[row], max_residues)
    return Segments(row, offsets[row] + shift, length, count)


def residue_weights(segments: Segments, members: NDArray[np.int64]) -> NDArray[np.float32]:
    """Weight of each residue of some segments in the mean of its row, end to end.

    Each residue of a row counts once: if k windows cover it, each window contributes 1/k.
    """
    lengths = segments.length[members]
    if not (segments.windows[members] > 1).any():
        return np.repeat((1 / lengths).astype(np.float32), lengths)
    row = segments.row[members]
    first, after = (np.searchsorted(segments.row, row, side) for side in ("left", "right"))
    covered = segments.start[after - 1] + lengths - segments.start[first]
    begins = np.cumsum(lengths) - lengths
    offsets = segments.start[members] - segments.start[0] - begins
    residues = np.arange(lengths.sum()) + np.repeat(offsets, lengths)
    weights = segments.shares[residues] / np.repeat(covered, lengths)
    return np.asarray(weights, np.float32)


def residue_tokens(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the residues among the tokens of concatenated sequences: no BOS, no EOS."""
    ends = np.cumsum(lengths + 2)
    is_residue = np.ones(int(ends[-1]), np.bool_)
    is_residue[ends - lengths - 2] = is_residue[ends - 1] = False
    return np.flatnonzero(is_residue)


def cut_batches(lengths: NDArray[np.int64], token_budget: int) -> Iterator[Batch]:
    """Sort segments by length and cut them into batches of nearly equal size.

    Parameters
    ----------
    lengths : ndarray, int64, shape (s,)
        Residues per segment. Each segment has two more tokens, BOS and EOS.
    token_budget : int
        Tokens per batch. A batch exceeds it by less than one segment, which may be longer than
        the budget.
    """
    if len(lengths) == 0:
        return
    order = np.argsort(lengths, kind="stable")
    tokens = np.cumsum(lengths[order] + 2)
    batches = -(-int(tokens[-1]) // token_budget)
    # Even shares, because cutting at the budget would leave a small last batch.
    shares = tokens[-1] * np.arange(1, batches) / batches
    cuts = np.unique(np.searchsorted(tokens, shares, side="left") + 1)
    for members in np.split(order, cuts[cuts < len(order)]):
        values, counts = np.unique(lengths[members], return_counts=True)
        yield Batch(members, [(int(n), int(v)) for n, v in zip(counts, values, strict=True)])
