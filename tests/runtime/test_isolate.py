"""Rows that kill the process that computes them: which ones, by halving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from virnuc_dask.runtime.isolate import Halving
from virnuc_dask.settings import Status

CRASHED, TIMED_OUT = Status.CRASHED_WORKER, Status.TIMED_OUT


@pytest.mark.parametrize(
    ("rows", "deadly", "expected"),
    [
        (1, {}, 0),
        (2_048, {}, 0),
        (1, {0: CRASHED}, 2),
        (2, {0: CRASHED, 1: TIMED_OUT}, 5),
        (2_048, {1_000: CRASHED}, 13),  # the whole, a half of it, ..., the row alone, twice
        (2_048, {0: TIMED_OUT, 2_047: CRASHED}, 25),
        (5, dict.fromkeys(range(5), CRASHED), 14),
    ],
)
def test_halving_finds_the_rows_that_kill(
    rows: int, deadly: dict[int, Status], expected: int
) -> None:
    halving, survived, deaths = Halving(rows), set[int](), 0
    while halving.left:
        part = range(*halving.left[0])
        killers = [row for row in deadly if row in part]
        if killers:
            halving.died(hung=deadly[killers[0]] is TIMED_OUT)
            deaths += 1
        else:
            survived |= set(range(*halving.survived()))
    assert halving.guilty == deadly
    assert survived == set(range(rows)) - set(deadly)
    assert deaths == expected


def test_a_child_that_is_killed_once_condemns_no_row() -> None:
    halving = Halving(1)
    halving.died(hung=False)
    assert halving.survived() == (0, 1)
    assert not halving.guilty
    assert not halving.left


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_error_that_a_child_cannot_tell_of_is_still_no_death(tmp_path: Path) -> None:
    child = [sys.executable, "-m", "virnuc_dask.runtime.isolate", str(tmp_path / "none")]
    with (
        open("/dev/full", "w") as full,
        # Its parent holds on to the pipe: at its end the child would be gone, whatever it met.
        subprocess.Popen(child, stdin=subprocess.PIPE, stderr=full) as running,
    ):
        assert running.wait() == 70
