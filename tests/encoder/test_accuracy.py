"""Accuracy on real weights, where there are any; and whether the measure measures."""

from __future__ import annotations

import os

import numpy as np
import pytest
from models import relative_error, upstream_mean, upstream_network

from benchmarks.accuracy import Deviation, frames, proteins
from virnuc_dask.encoder.encoder import load_encoder

REAL = "VIRNUC_DASK_REAL_WEIGHTS"
real_weights = pytest.mark.skipif(
    REAL not in os.environ,
    reason=f"ACCURACY ON REAL WEIGHTS IS NOT TESTED: {REAL} names no ESM-2 weights",
)


def test_equal_rows_deviate_by_nothing() -> None:
    rows = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)
    found = Deviation.of(rows, rows)
    assert (found.largest, found.neighbours, found.worst) == (0, 1, 1)
    assert min(found.lowest, found.median, found.centred) == pytest.approx(1)


def test_one_row_that_is_off_shows_in_each_figure_that_is_of_rows() -> None:
    rows = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32) + 10
    other = rows.copy()
    other[7] = rows[8]
    found = Deviation.of(other, rows)
    assert found.largest == np.abs(rows[7] - rows[8]).max()
    assert found.lowest < 0.995
    assert found.centred < 0.6  # what the common part of all rows hides
    assert found.median == pytest.approx(1)
    assert found.worst < 1
    assert found.worst < found.neighbours < 1


def test_the_sequences_are_real_and_of_both_kinds() -> None:
    long, short = proteins(300), frames(300)
    assert len(long) > 150
    assert len(short) == 300
    assert 100 < np.median([len(s) for s in long]) <= 500
    assert 20 <= np.median([len(s) for s in short]) <= 50
    assert not any("*" in sequence for sequence in (*long, *short))


@real_weights
def test_float32_is_fair_esms_on_real_weights() -> None:
    network = upstream_network(os.environ[REAL])
    for sequences in (proteins(20), frames(20)):
        found = load_encoder(os.environ[REAL]).encode(sequences)
        assert relative_error(found, upstream_mean(network, sequences)) < 1e-5


@real_weights
@pytest.mark.parametrize("pooling", ["mean", "bos", "max"])
def test_bfloat16_is_accurate_on_real_weights(pooling: str) -> None:
    options = {"model": os.environ[REAL], "pooling": pooling}
    for sequences in (proteins(40), frames(40)):
        exact = load_encoder(**options).encode(sequences)
        found = load_encoder(**options, precision="bfloat16").encode(sequences)
        assert Deviation.of(found, exact).lowest > 0.999
