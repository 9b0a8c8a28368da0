"""What a failure means, and what becomes of the rows it meets."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Maker, chunk_bytes
from distributed.comm import CommClosedError
from models import random_network, random_sequences, save_network

import virnuc_dask
from virnuc_dask import IncompleteRunError, RunConfig
from virnuc_dask.encoder.encoder import Encoder, load_encoder
from virnuc_dask.encoder.memory import is_out_of_memory
from virnuc_dask.encoder.models import Estimate
from virnuc_dask.encoder.network import Network
from virnuc_dask.errors import UsageError
from virnuc_dask.runtime import chunk_policy, embed, events, failures
from virnuc_dask.runtime.deadlines import Deadlines, RunningDeadlines
from virnuc_dask.runtime.embed import embed_rows
from virnuc_dask.runtime.isolate import Halving
from virnuc_dask.settings import Identity, Status

IDENTITY = Identity(
    1, "", 0, "", 0, "mean", "float32", "float32", "", 100, "window", 32, per_residue=True
)


@pytest.mark.parametrize(
    ("error", "hopeless", "tries"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, 2),
        (OSError(errno.EROFS, "Read-only file system"), True, 2),
        (PermissionError(errno.EACCES, "Permission denied"), True, 2),
        (OSError(errno.EIO, "Input/output error"), False, 7),
        (ConnectionResetError(), False, 7),
        (TimeoutError(), False, 7),
        (MemoryError(), False, 7),
        (CommClosedError("in <TCP>"), False, 7),
        (ValueError("a bug"), False, 2),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, 2),
    ],
)
def test_errors_are_told_apart(error: Exception, hopeless: bool, tries: int) -> None:
    assert failures.is_hopeless(error) == hopeless
    assert chunk_policy.most_attempts(error, RunConfig(attempts=7)) == tries
    assert chunk_policy.most_attempts(error, RunConfig(attempts=1)) == 1


# As torch 2.11, cuBLAS and Triton 3.6 say it. The first of cuBLAS was met on an H200 whose memory
# another process had, and all that the process tried later met it too.
@pytest.mark.parametrize(
    ("text", "memory", "sticky"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True, False),
        ("Triton Error [CUDA]: out of memory", True, True),
        ("CUDA error: out of memory", True, True),
        (
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
            False,
            True,
        ),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("Triton Error [CUDA]: device-side assert triggered", False, True),
        ("mat1 and mat2 shapes cannot be multiplied", False, False),
    ],
)
def test_errors_of_a_gpu_are_told_apart(text: str, memory: bool, sticky: bool) -> None:
    error = RuntimeError(text)
    assert is_out_of_memory(error) == memory
    assert failures.is_sticky(error) == sticky
    assert failures.is_of_the_input(error) != sticky or memory


def test_delays_double_and_spread() -> None:
    config = RunConfig(backoff=2.0)
    for attempt, middle in ((1, 2.0), (2, 4.0), (3, 8.0)):
        delays = [chunk_policy.delay(attempt, config) for _ in range(200)]
        assert middle / 2 <= min(delays) < middle < max(delays) <= middle * 1.5


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0),
        ("backoff", -0.1),
        ("suspect_after", 0),
        ("deadline_factor", 0.5),
        ("deadline_floor", -1),
        ("deadline_first", float("nan")),
        ("grace", -1),
        ("in_flight", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least"):
        RunConfig(**{name: value})


# --- rows that kill ---

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


# --- rows that raise ---


def packed(sequences: list[str]) -> tuple[Any, Any]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    return lengths, np.frombuffer("".join(sequences).encode(), np.uint8)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_network(random_network(2, 64, 4), tmp_path / "model.pt")


@pytest.fixture
def tryptophan() -> int:
    return int(random_network(1, 8, 2).alphabet.get_idx("W"))


# W stands for whatever makes an encoder raise; 130 residues are two windows.
CLEAN = [s.replace("W", "A") for s in random_sequences([30, 5, 130, 60, 30, 1, 77, 12])]
POISONED = [*CLEAN[:3], "MWT", *CLEAN[3:6], "", CLEAN[6][:50] + "W" + CLEAN[7] * 9, CLEAN[7]]
GUILTY = [3, 8]


def test_rows_that_raise_are_quarantined_and_no_others(
    model: str, tryptophan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Network._forward
    raised = 0

    def poisonous(self: Network, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal raised
        if (tokens == tryptophan).any():
            raised += 1
            raise RuntimeError("no kernel for this")
        return forward(self, tokens, *rest)

    expected = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert (expected.status[GUILTY] < Status.INVALID_RESIDUES).all()
    monkeypatch.setattr(Network, "_forward", poisonous)
    found = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert raised >= 4
    assert np.flatnonzero(found.status == Status.ENCODER_ERROR).tolist() == GUILTY
    others = np.setdiff1d(np.arange(len(POISONED)), GUILTY)
    assert np.array_equal(found.status[others], expected.status[others])
    assert np.array_equal(found.embedding[others], expected.embedding[others], equal_nan=True)
    assert np.isnan(found.embedding[GUILTY]).all()
    assert found.residues is not None
    assert expected.residues is not None
    guilty = np.isin(np.repeat(np.arange(len(POISONED)), packed(POISONED)[0]), GUILTY)
    assert np.array_equal(found.residues[~guilty], expected.residues[~guilty])
    assert np.isnan(found.residues[guilty]).all()


@pytest.mark.parametrize(
    "error", [RuntimeError("no such operator"), RuntimeError("CUDA error: device-side assert")]
)
def test_an_encoder_that_raises_for_anything_blames_no_row(
    error: Exception, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def broken(*_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr(Network, "_forward", broken)
    with pytest.raises(RuntimeError, match=str(error)):
        embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert calls <= 2


def test_a_row_that_is_no_number_is_computed_again_in_float32(
    model: str, tryptophan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_loaded", {})
    encoder = load_encoder(model, precision="bfloat16")
    identity = replace(IDENTITY, precision="bfloat16")
    usual = embed_rows(encoder, *packed(POISONED), identity)
    exact = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    overflow_where(encoder, tryptophan, monkeypatch)
    found = embed_rows(encoder, *packed(POISONED), identity)
    assert np.array_equal(found.status, usual.status)
    others = np.setdiff1d(np.arange(len(POISONED)), GUILTY)
    assert np.array_equal(found.embedding[others], usual.embedding[others], equal_nan=True)
    assert np.array_equal(found.embedding[GUILTY], exact.embedding[GUILTY])
    assert not np.array_equal(usual.embedding[GUILTY], exact.embedding[GUILTY])
    assert found.residues is not None
    assert np.isfinite(found.residues).all()
    # The float32 twin is kept beside the model, and another model replaces both.
    assert [spec.precision for spec, _ in embed._loaded] == ["float32"]
    embed.get_encoder(encoder.spec)
    assert [spec.precision for spec, _ in embed._loaded] == ["bfloat16"]
    embed.get_encoder(replace(encoder.spec, precision="float32"))
    assert len(embed._loaded) == 2


def overflow_where(encoder: Encoder, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for float16, which only a GPU has: sequences with a token overflow."""
    represent = encoder._network.represent

    def overflowing(residues: Any, starts: Any, runs: Any) -> torch.Tensor:
        hidden = represent(residues, starts, runs)
        first = 0
        lengths = [length for count, length in runs for _ in range(count)]
        for start, length in zip(starts, lengths, strict=True):
            if ord("W") in residues[start : start + length]:
                hidden[first : first + length + 2] = torch.inf
            first += length + 2
        return hidden

    monkeypatch.setattr(encoder._network, "represent", overflowing)


# --- chunks that raise ---


@pytest.mark.slow
def test_a_transient_error_is_waited_out_while_the_others_go_on(
    make_store: Maker, client: Any
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store = make_store(VIRAL_PROTEINS, embed=False)
    obstacle = store.path / "embedding" / "c.3.0"
    obstacle.mkdir()
    seen: list[events.Event] = []
    times: list[float] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        times.append(time.monotonic())
        if isinstance(event, events.ChunkFailed):
            obstacle.rmdir()

    config = RunConfig(backoff=4.0)
    summary = virnuc_dask.resume(store.path, client=client, config=config, listener=listen)
    kinds = [type(event).__name__ for event in seen]
    assert kinds.count("ChunkFailed") == 1
    failed = kinds.index("ChunkFailed")
    done = [n for n, event in enumerate(seen) if isinstance(event, events.ChunkDone)]
    last = seen[done[-1]]
    assert isinstance(last, events.ChunkDone)
    assert last.chunk == 3
    assert times[done[-1]] - times[failed] >= 2.0  # half of the backoff at least
    assert times[done[-2]] - times[failed] < times[done[-1]] - times[failed]
    assert (summary.exit_code, summary.retries, len(done)) == (0, 1, 10)
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)


def test_an_error_that_stays_is_tried_three_times(make_store: Maker, client: Any) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    (store.path / "embedding" / "c.3.0").mkdir()
    seen: list[events.Event] = []
    config = RunConfig(backoff=0.01)
    with pytest.raises(IncompleteRunError) as raised:
        virnuc_dask.resume(store.path, client=client, config=config, listener=seen.append)
    summary = raised.value.summary
    failures = [event for event in seen if isinstance(event, events.ChunkFailed)]
    assert [(event.chunk, event.attempt, event.final) for event in failures] == [
        (3, 1, False),
        (3, 2, False),
        (3, 3, True),
    ]
    assert (summary.exit_code, list(summary.missing)) == (4, [3])
