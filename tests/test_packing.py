"""Cutting rows into segments and segments into batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virnuc_dask.packing import WINDOW_OVERLAP, cut_batches, cut_segments, residue_weights

lengths_of_rows = st.lists(st.integers(0, 400), max_size=30).map(lambda n: np.array(n, np.int32))


@given(lengths_of_rows, st.integers(1, 100))
def test_windows_cover_every_residue_evenly(lengths: np.ndarray, size: int) -> None:
    segments = cut_segments(lengths, size, "window")
    offsets = np.cumsum(lengths) - lengths
    for row, length in enumerate(lengths):
        mine = np.flatnonzero(segments.row == row)
        starts, sizes = segments.start[mine] - offsets[row], segments.length[mine]
        assert (segments.windows[mine] == len(mine)).all()
        if length <= size:
            assert starts.tolist() == ([0] if length else [])
            assert sizes.tolist() == ([length] if length else [])
            continue
        assert (sizes == size).all()
        assert starts[0] == 0
        assert starts[-1] == length - size
        steps = np.diff(starts)
        assert steps.max() - steps.min() <= 1
        # Neighbours share the overlap at least; a window of 3 residues or fewer has none to share.
        assert steps.max() <= max(1, size - int(size * WINDOW_OVERLAP))


@given(lengths_of_rows, st.integers(1, 100), st.sampled_from(["truncate", "skip"]))
def test_truncating_and_skipping_give_one_segment_or_none(
    lengths: np.ndarray, size: int, policy: str
) -> None:
    segments = cut_segments(lengths, size, policy)
    taken = lengths > 0 if policy == "truncate" else (lengths > 0) & (lengths <= size)
    assert segments.row.tolist() == np.flatnonzero(taken).tolist()
    assert segments.length.tolist() == np.minimum(lengths[taken], size).tolist()
    assert segments.start.tolist() == (np.cumsum(lengths) - lengths)[taken].tolist()


@given(st.integers(1, 500), st.integers(1, 60))
def test_the_weights_of_a_row_count_each_residue_once(length: int, size: int) -> None:
    segments = cut_segments(np.array([7, length, 3], np.int32), size, "window")
    total = np.zeros(length)
    for number in np.flatnonzero(segments.row == 1):
        start = segments.start[number] - 7
        total[start : start + segments.length[number]] += residue_weights(segments, number)
    assert total == pytest.approx(np.full(length, 1 / length), rel=1e-5)


@given(
    st.lists(st.integers(1, 1022), max_size=300).map(lambda n: np.array(n, np.int64)),
    st.integers(1, 5000),
)
def test_batches_take_each_segment_once_in_order_of_length(
    lengths: np.ndarray, budget: int
) -> None:
    batches = list(cut_batches(lengths, budget))
    order = np.concatenate([batch.segments for batch in batches]) if batches else np.array([])
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order.astype(int)]) >= 0).all()
    for batch in batches:
        found = [length for count, length in batch.runs for _ in range(count)]
        assert found == lengths[batch.segments].tolist()
        tokens = lengths[batch.segments] + 2
        assert tokens.sum() <= budget + tokens.max()


@given(st.lists(st.integers(33, 100), min_size=50, max_size=400))
def test_no_batch_is_much_smaller_than_the_others(lengths: list[int]) -> None:
    sizes = [
        int(sum(count * (length + 2) for count, length in batch.runs))
        for batch in cut_batches(np.array(lengths, np.int64), 1024)
    ]
    assert max(sizes) - min(sizes) <= 2 * 102
