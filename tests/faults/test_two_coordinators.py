"""Two coordinators on one store, at once or one after the other's long pause: no harm is done."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from conftest import chunk_bytes, tree
from harness import Run, assert_ledger, finished_chunks, holding_after
from nursery import wait_for

import virnuc_dask
from virnuc_dask.store.store import Store

IDENTITY = ("--model=demo", "--repr-layer", 0, "--rows-per-chunk", 16)
SEED = 20_261


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, peptides: Path, client: Any) -> Store:
    """The same input and settings, and one run alone."""
    path = tmp_path_factory.mktemp("reference") / "out.zarr"
    virnuc_dask.run(peptides, path, model="demo", client=client, repr_layer=0, rows_per_chunk=16)
    return Store(path)


def assert_whole_and_alone(path: Path, reference: Store) -> None:
    """The store is as one run makes it, and nothing is left beside it."""
    assert os.listdir(path.parent) == [path.name]
    assert_ledger(Store(path), reference)
    before = tree(path)
    again = virnuc_dask.resume(path, cluster="none is needed")
    assert (again.exit_code, again.computed_chunks) == (0, 0)
    assert tree(path) == before


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3_600)])]
)
def test_two_runs_that_start_together_make_one_store(
    rounds: int,
    peptides: Path,
    reference: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(SEED)
    motif = faults.motif_of(peptides)
    twice = 0
    for number in range(rounds):
        path, table = tmp_path / str(number) / "out.zarr", tmp_path / f"{number}.json"
        runs = []
        # Neither is done before the other has begun.
        with faults.holding(monkeypatch, table, motif):
            for _ in range(2):
                time.sleep(random.uniform(0, 0.2))
                runs.append(Run("run", peptides, path, *IDENTITY, "--workers", 1))
        # Both are read at once: a full pipe would stop the second.
        with ThreadPoolExecutor(2) as pool:
            ends = pool.map(Run.finish, runs)
            try:
                wait_for(lambda runs=runs: all(run.of("run_started") for run in runs))
            finally:
                faults.release(table)
            assert list(ends) == [0, 0], (SEED, number)
        seen = [{event["chunk"] for event in run.of("chunk_done")} for run in runs]
        computed = [run.computed() for run in runs]
        assert all(seen), (SEED, number)
        for run, chunks in zip(runs, computed, strict=True):
            # What was there when a run began is not its business, and all else is, once.
            began = run.of("run_started")[0]["present_chunks"]
            assert len(run.of("chunk_done")) + began == reference.chunk_count
            assert len(set(chunks)) == len(chunks)
        assert set().union(*computed) == set().union(*seen) == set(range(reference.chunk_count))
        twice += len(set(computed[0]) & set(computed[1]))
        assert_whole_and_alone(path, reference)
    rows = rounds * reference.records
    with capsys.disabled():
        print(
            f"\n{rounds} pairs of coordinators, {twice} chunks computed by both; {rows:,} rows"
            f" checked, 0 lost; seed {SEED}"
        )


def test_a_run_that_was_stopped_while_another_finished_does_no_harm(
    peptides: Path, reference: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / "store" / "out.zarr", tmp_path / "faults.json"
    with holding_after(monkeypatch, table, reference.records // 4):
        first = Run("run", peptides, path, *IDENTITY, "--workers", 2)
    next(event for event in first if len(first.computed()) == reference.chunk_count // 8)
    # Coordinator, scheduler and workers, in the middle of whatever they do.
    os.killpg(first.process.pid, signal.SIGSTOP)
    try:
        already = finished_chunks(Store(path))
        was_done = set(np.flatnonzero(Store(path).present()))
        second = Run("run", peptides, path, *IDENTITY, "--workers", 2)
        assert second.finish() == 0
        assert first.process.poll() is None
        reported = len(first.events)
        whole = finished_chunks(Store(path))
        assert already.items() <= whole.items()
    finally:
        os.killpg(first.process.pid, signal.SIGCONT)
        faults.release(table)
    assert first.finish() == 0
    assert len(first.events) > reported
    done = {event["chunk"] for event in first.of("chunk_done")}
    assert done | set(second.computed()) == set(range(reference.chunk_count))
    # Only a chunk that was under way at the stop may be written again, and gets the same bytes.
    late = {
        event["chunk"]
        for event in first.events[reported:]
        if event["event"] == "chunk_done" and event["computed"]
    }
    late -= was_done  # its report was still on the way
    assert len(late) <= 2 * 2, "more than there are threads"
    after = finished_chunks(Store(path))
    rewritten = {int(name.split(".")[1]) for name in whole if after[name] != whole[name]}
    assert rewritten <= late
    assert chunk_bytes(path) == chunk_bytes(reference.path)
    assert_whole_and_alone(path, reference)
