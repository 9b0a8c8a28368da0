"""Cutting rows into segments and segments into batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virnuc_dask.encoder.packing import cut_batches, cut_segments, residue_weights
from virnuc_dask.inputs.lengths import WINDOW_OVERLAP, residues_to_encode
from virnuc_dask.settings import LongPolicy

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
@pytest.mark.slow
def test_the_weights_of_a_row_count_each_residue_once(length: int, size: int) -> None:
    segments = cut_segments(np.array([7, length, 3], np.int32), size, "window")
    total = np.zeros(length)
    for number in np.flatnonzero(segments.row == 1):
        start = segments.start[number] - 7
        total[start : start + segments.length[number]] += residue_weights(
            segments, np.array([number])
        )
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
@pytest.mark.slow
def test_no_batch_is_much_smaller_than_the_others(lengths: list[int]) -> None:
    sizes = [
        int(sum(count * (length + 2) for count, length in batch.runs))
        for batch in cut_batches(np.array(lengths, np.int64), 1024)
    ]
    assert max(sizes) - min(sizes) <= 2 * 102


def test_the_smallest_sizes_work() -> None:
    segments = cut_segments(np.array([0, 3, 1, 0], np.int32), 1, "window")
    assert segments.row.tolist() == [1, 1, 1, 2]
    assert segments.start.tolist() == [0, 1, 2, 3]
    assert segments.length.tolist() == [1, 1, 1, 1]
    assert segments.windows.tolist() == [3, 3, 3, 1]
    weights = [residue_weights(segments, np.array([number])).tolist() for number in range(4)]
    assert weights == [[pytest.approx(1 / 3)]] * 3 + [[1.0]]
    assert [b.runs for b in cut_batches(segments.length, 1)] == [[(1, 1)]] * 4


@pytest.mark.parametrize("policy", ["truncate", "window", "skip"])
def test_no_rows_and_empty_rows_give_no_segment_and_no_batch(policy: LongPolicy) -> None:
    for lengths in ([], [0], [0, 0, 0]):
        segments = cut_segments(np.array(lengths, np.int32), 10, policy)
        assert len(segments) == 0
        assert list(cut_batches(segments.length, 100)) == []


@pytest.mark.parametrize("policy", ["truncate", "window", "skip"])
def test_a_limit_beyond_32_bits_cuts_nothing(policy: LongPolicy) -> None:
    segments = cut_segments(np.array([5, 7], np.int32), 2**40, policy)
    assert segments.length.tolist() == [5, 7]
    assert segments.start.tolist() == [0, 5]


def test_offsets_beyond_32_bits_are_right() -> None:
    segments = cut_segments(np.array([2**31 - 1, 2**31 - 1, 4], np.int32), 10, "truncate")
    assert segments.start.tolist() == [0, 2**31 - 1, 2**32 - 2]


@pytest.mark.parametrize(
    ("length", "size", "starts"),
    [
        (100, 100, [0]),
        (101, 100, [0, 1]),
        (175, 100, [0, 75]),
        (176, 100, [0, 38, 76]),
        (9, 4, [0, 2, 5]),
    ],
)
def test_there_are_no_more_windows_than_the_overlap_asks_for(
    length: int, size: int, starts: list[int]
) -> None:
    assert cut_segments(np.array([length], np.int32), size, "window").start.tolist() == starts


@given(lengths_of_rows, st.integers(1, 100), st.sampled_from(["truncate", "window", "skip"]))
def test_the_weights_of_every_row_sum_to_one(
    lengths: np.ndarray, size: int, policy: LongPolicy
) -> None:
    segments = cut_segments(lengths, size, policy)
    total = np.zeros(len(lengths))
    for number in range(len(segments)):
        weights = residue_weights(segments, np.array([number]))
        assert len(weights) == segments.length[number]
        assert (weights > 0).all()
        total[segments.row[number]] += weights.sum(dtype=np.float64)
    taken = np.isin(np.arange(len(lengths)), segments.row)
    assert total == pytest.approx(taken.astype(float), rel=1e-5)


@given(lengths_of_rows, st.integers(1, 60), st.data())
@pytest.mark.slow
def test_selected_rows_keep_their_windows_and_weights(
    lengths: np.ndarray, size: int, data: st.DataObject
) -> None:
    segments = cut_segments(lengths, size, "window")
    rows = data.draw(st.sets(st.integers(0, max(0, len(lengths) - 1))))
    chosen = np.isin(segments.row, sorted(rows))
    selected = segments.select(chosen)
    assert len(selected) == chosen.sum()
    for number, before in enumerate(np.flatnonzero(chosen)):
        assert (
            residue_weights(selected, np.array([number]))
            == residue_weights(segments, np.array([before]))
        ).all()


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=300).map(lambda n: np.array(n, np.int64)),
    st.integers(1, 3000),
)
def test_each_batch_is_its_share_give_or_take_one_segment(lengths: np.ndarray, budget: int) -> None:
    sizes = [
        sum(count * (length + 2) for count, length in batch.runs)
        for batch in cut_batches(lengths, budget)
    ]
    longest = int(lengths.max()) + 2
    share = sum(sizes) / -(-sum(sizes) // budget)
    assert all(share - longest < size < share + longest for size in sizes)


def test_segments_longer_than_the_budget_go_alone() -> None:
    assert [b.runs for b in cut_batches(np.array([500, 900, 500]), 100)] == [
        [(1, 500)],
        [(1, 500)],
        [(1, 900)],
    ]


@pytest.mark.parametrize("policy", ["truncate", "window", "skip"])
def test_what_goes_through_the_encoder_is_what_the_segments_have(policy: LongPolicy) -> None:
    lengths = np.random.default_rng(3).integers(0, 400, 500).astype(np.int32)
    segments = cut_segments(lengths, 70, policy)
    expected = np.bincount(segments.row, segments.length, minlength=len(lengths))
    assert np.array_equal(residues_to_encode(lengths, 70, policy), expected)
