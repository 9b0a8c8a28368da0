"""How long a chunk may take: from an estimate at first, then from the running median."""

from __future__ import annotations

import pytest

from virnuc_dask import RunConfig
from virnuc_dask.encoder.models import Estimate
from virnuc_dask.runtime.deadlines import Deadlines, RunningDeadlines


def test_a_deadline_follows_the_running_median() -> None:
    config = RunConfig(deadline_factor=10, deadline_floor=2, deadline_first=500)
    running = RunningDeadlines(config, Estimate(100.0, 5.0))
    for seconds in (1.0, 3.0):
        running.took(1_000, seconds)
        assert running.now().allowed_s(1_000) == 500
    running.took(1_000, 1_000.0)  # one that hung does not count for much
    assert running.now().start_s == 500
    assert running.now().allowed_s(1_000) == pytest.approx(30)
    assert running.now().allowed_s(10_000) == pytest.approx(300)
    assert running.now().allowed_s(0) == 2
    for _ in range(200):
        running.took(1_000, 0.5)
    assert running.now().allowed_s(1_000) == pytest.approx(5)


def test_before_a_median_is_known_deadlines_follow_from_the_estimate() -> None:
    estimate = Estimate(residues_per_s=100.0, load_s=50.0)
    running = RunningDeadlines(RunConfig(deadline_factor=10, deadline_floor=2), estimate)
    # Never less than ten minutes, and a hundred times what a chunk is thought to take.
    assert running.now() == Deadlines(650.0, 600.0, 1.0)
    assert running.now().allowed_s(10_000) == 10_000
    for _ in range(3):
        running.took(1_000, 1.0)
    assert running.now() == Deadlines(650.0, 2, 0.01)
    patient = RunningDeadlines(RunConfig(deadline_floor=900), estimate).now()
    assert (patient.start_s, patient.floor_s) == (900, 900)
