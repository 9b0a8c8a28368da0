"""What becomes of a chunk that fails, dies or hangs: tables, by a clock that is only a number."""

from __future__ import annotations

import errno
from math import inf
from typing import Any

import pytest

from virnuc_dask import RunConfig
from virnuc_dask.errors import DeviceLostError
from virnuc_dask.runtime.chunk_policy import Attempt, ChunkQueue, Holder, Verdict, delay, judge_late
from virnuc_dask.runtime.deadlines import Deadlines

EIO = OSError(errno.EIO, "Input/output error")
FULL = OSError(errno.ENOSPC, "No space left on device")
BUG = ValueError("a bug")
LOST = DeviceLostError("tcp://a", "CUDA error")

# Attempts are delayed by 10, 20, 40 … seconds, half of this at least and half more at most.
CONFIG = RunConfig(attempts=4, backoff=10)


@pytest.mark.parametrize(
    ("errors", "final"),
    [
        ([EIO, EIO, EIO, EIO], [False, False, False, True]),
        ([BUG, BUG], [False, True]),
        ([FULL], [True]),
        ([EIO, EIO, BUG], [False, False, True]),  # an attempt too many for such an error
        ([EIO, FULL], [False, True]),
        ([LOST] * 9, [False] * 9),  # ends by deaths, not by attempts
    ],
)
def test_a_chunk_that_fails_is_tried_again_later_and_then_given_up(
    errors: list[Exception], final: list[bool]
) -> None:
    queue, now = ChunkQueue(CONFIG), 100.0
    queue.add([7])
    for attempt, (error, is_final) in enumerate(zip(errors, final, strict=True), 1):
        assert queue.take(5, now) == [7]
        assert queue.failed(7, error, now) == (attempt, is_final)
        assert queue.errors == {7: f"{type(error).__name__}: {error}"}
        delay = CONFIG.backoff * 2 ** (attempt - 1)
        assert bool(queue) != is_final
        assert not queue.take(5, now + delay * 0.49)
        now += delay * 1.5
    assert queue.retries == final.count(False)
    assert queue.take(5, inf) == ([] if final[-1] else [7])
    queue.done(7)
    assert not queue.errors


def test_others_do_not_wait_for_a_chunk_that_failed() -> None:
    queue = ChunkQueue(CONFIG)
    queue.add(range(4))
    assert queue.take(2, 0.0) == [0, 1]
    queue.failed(0, EIO, 0.0)  # due after 5 to 15 s
    queue.refused(1, 100.0)  # by an unfit worker; due at 110
    assert queue.take(9, 4.9) == [2, 3]
    assert queue
    assert queue.take(9, 15.0) == [0]
    assert queue.take(9, 109.9) == []
    assert queue.take(9, 110.0) == [1]
    assert not queue
    assert queue.errors == {0: "OSError: [Errno 5] Input/output error"}
    assert queue.retries == 1


def test_a_chunk_that_an_unfit_worker_got_is_not_tried_again_at_once() -> None:
    queue = ChunkQueue(RunConfig(backoff=0))
    queue.refused(1, 50.0)
    assert not queue.take(1, 50.9)
    assert queue.take(1, 51.0) == [1]


@pytest.mark.parametrize(
    ("suspect_after", "became"),
    [(1, [True, False, False]), (2, [False, True, False]), (3, [False, False, True])],
)
def test_deaths_make_a_suspect_once_and_first(suspect_after: int, became: list[bool]) -> None:
    queue = ChunkQueue(RunConfig(suspect_after=suspect_after))
    queue.add([0, 1])
    for is_suspect in became:
        assert queue.died(5) == is_suspect
    assert queue.suspects == {5}
    assert queue.deaths == {5: 3}
    assert queue.take(3, 0.0) == [5, 0, 1]
    assert not queue.died(0) or suspect_after == 1
    assert queue.retries == 0  # a death may cost several chunks, so the caller counts


def test_a_task_that_dask_gives_up_is_a_suspect_whatever_its_deaths() -> None:
    queue = ChunkQueue(RunConfig(suspect_after=100))
    queue.add([0])
    assert queue.suspect(3)
    assert queue.take(1, 0.0) == [3]
    assert not queue.suspect(3)  # its task was given up once more
    assert queue.take(2, 0.0) == [3, 0]
    assert not queue.died(3)
    assert not queue


# --- attempts that are late ---

# Ten seconds to load the model, four for any chunk, one per residue: 20 for one of 20.
DEADLINES = Deadlines(start_s=10, floor_s=4, per_residue_s=1)
CHILDREN = Deadlines(start_s=100, floor_s=30, per_residue_s=2)


@pytest.mark.parametrize(
    ("attempt", "residues", "allowed_s"),
    [
        ({}, 20, 20),
        ({}, 2, 4),
        ({"worker": "a"}, 20, 20),
        ({"with_children": CHILDREN}, 20, 20),  # nobody has begun it
        ({"with_children": CHILDREN, "worker": "a"}, 20, 240),  # two models, and the part
        ({"with_children": CHILDREN, "worker": "a"}, 3, 230),
    ],
)
def test_how_long_an_attempt_may_be_silent(
    attempt: dict[str, Any], residues: int, allowed_s: float
) -> None:
    assert Attempt(chunk=0, since=0, **attempt).allowed_s(residues, DEADLINES) == allowed_s


BEGUN = {"worker": "a"}


@pytest.mark.parametrize(
    ("attempt", "holder", "now", "verdict", "silent_s"),
    [
        # It was begun: it is overdue, whatever else its worker does.
        (BEGUN, None, 25, Verdict.OVERDUE, 25),
        (BEGUN, {"is_busy": True, "has_tasks_of_others": True}, 25, Verdict.OVERDUE, 25),
        # It was given to nobody, because there is no worker: its time begins.
        ({}, None, 25, Verdict.BEGIN_AGAIN, 25),
        # It waits for another chunk of its worker, even if that one hangs.
        ({}, {"is_busy": True}, 1_000, Verdict.WAIT, 1_000),
        ({}, {"is_busy": True, "is_useless": True}, 1_000, Verdict.WAIT, 1_000),
        # Its worker is known to hang, or computes for others: no fault of this chunk.
        ({}, {"is_useless": True}, 25, Verdict.MOVE, 25),
        ({}, {"has_tasks_of_others": True}, 25, Verdict.MOVE, 25),
        # Its worker has the model and does not begin: 20 s from its last message.
        ({}, {"is_ready": True, "heard": 4}, 23, Verdict.WAIT, 19),
        ({}, {"is_ready": True, "heard": 4}, 25, Verdict.OVERDUE, 21),
        ({}, {"is_ready": True, "heard": -9}, 21, Verdict.OVERDUE, 21),
        # Its worker loads the model: 10 s from when it joined.
        ({}, {"heard": 16}, 25, Verdict.WAIT, 9),
        ({}, {"heard": 14}, 25, Verdict.OVERDUE, 11),
    ],
)
def test_what_is_done_about_a_late_attempt(
    attempt: dict[str, Any],
    holder: dict[str, Any] | None,
    now: float,
    verdict: Verdict,
    silent_s: float,
) -> None:
    found = judge_late(
        Attempt(chunk=0, since=0, **attempt),
        None if holder is None else Holder(**holder),
        20,
        DEADLINES,
        now,
    )
    assert found == (verdict, silent_s)


def test_delays_double_and_spread() -> None:
    config = RunConfig(backoff=2.0)
    for attempt, middle in ((1, 2.0), (2, 4.0), (3, 8.0)):
        delays = [delay(attempt, config) for _ in range(200)]
        assert middle / 2 <= min(delays) < middle < max(delays) <= middle * 1.5
