"""The promise: kill it anywhere, type it again, and lose nothing. Real processes, real SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import faults
import numpy as np
import psutil
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from conftest import VIRAL_PROTEINS, command, tree
from harness import (
    Run,
    assert_ledger,
    await_end,
    await_held,
    clear_partial_files_of_the_killed,
    finished_chunks,
    holding_after,
    program,
)
from xopen import xopen

import virnuc_dask
from virnuc_dask.store.status import row_states
from virnuc_dask.store.store import Store

RECORDS = 1_000
# With single residues, so that a task writes all that it ever does.
IDENTITY = ("--model=demo", "--repr-layer", 1, "--rows-per-chunk", 10, "--per-residue")
SETTINGS = (*IDENTITY, "--workers", 2)
# After them workers are held, where a run must not be over before a test has struck: 20 chunks.
ROWS = 200
# A run to which a second signal is the first one sent twice, however late it comes.
DEAF = [
    sys.executable,
    "-c",
    "import virnuc_dask.runtime.run as run; run._TWICE_S = 60\n"
    "from virnuc_dask.__main__ import main; main()",
]


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory, peptides: Path) -> Path:
    """1,000 real sequences: viral proteins, and open reading frames of phage lambda."""
    path = tmp_path_factory.mktemp("input") / "proteins.faa"
    with path.open("w") as out:
        for source, most in ((VIRAL_PROTEINS, 60), (peptides, RECORDS - 60)):
            with xopen(source) as text:
                records = list(islice(SimpleFastaParser(text), most))
            assert len(records) == most
            out.writelines(f">{title}\n{sequence}\n" for title, sequence in records)
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, proteins: Path) -> Store:
    """The same input and settings, left in peace."""
    path = tmp_path_factory.mktemp("uninterrupted") / "out.zarr"
    alone = (*SETTINGS, "--workers", 1, "-q")
    subprocess.run(command("run", proteins, path, *alone), check=True, timeout=240)
    return Store(path)


def test_coordinator_then_worker_killed_and_nothing_is_lost(
    proteins: Path, uninterrupted: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tables = tmp_path / "out.zarr", [tmp_path / "1" / "faults", tmp_path / "2" / "faults"]
    for table in tables:
        table.parent.mkdir()

    # The coordinator is killed after about a tenth of the chunks.
    with holding_after(monkeypatch, tables[0], ROWS):
        first = Run("run", proteins, path, *SETTINGS)
    workers: set[int] = set()
    for event in first:
        if event["event"] == "chunk_done":
            workers.add(event["pid"])
        if len(first.computed()) == uninterrupted.chunk_count // 10:
            break
    first.process.send_signal(signal.SIGKILL)
    assert first.finish() == -signal.SIGKILL
    assert not first.of("run_summary")
    await_end(workers)
    store = Store(path)
    present = np.flatnonzero(store.present())
    assert 0 < len(present) < store.chunk_count // 2
    before = finished_chunks(store)

    # The same command goes on, and loses a worker that has chunks to do: it is stopped first, so
    # that it cannot be through with them.
    with holding_after(monkeypatch, tables[1], ROWS):
        second = Run("run", proteins, path, *SETTINGS)
    victim, others = None, 0
    for event in second:
        if event["event"] != "chunk_done":
            continue
        if victim is None:
            victim = event["pid"]
            os.kill(victim, signal.SIGSTOP)
            faults.release(tables[1])
        elif event["pid"] != victim:
            others += 1
            if others == 5:
                os.kill(victim, signal.SIGKILL)
    assert second.process.wait(timeout=120) == 0
    lost = second.of("worker_lost")
    assert len(lost) == 1
    assert lost[0]["chunks"]
    # Not always computed: it may have written one whose report nobody has fetched.
    done = [event["chunk"] for event in second.of("chunk_done")]
    assert set(lost[0]["chunks"]) <= set(done)

    # Nothing that was done was done again, by count and by file.
    assert second.of("run_started")[0]["present_chunks"] == len(present)
    assert sorted([*present, *done]) == list(range(store.chunk_count))
    assert {name: tree(path)[name] for name in before} == before
    summary = second.of("run_summary")[0]
    assert summary["counts"] == row_states(uninterrupted.path)
    assert summary["workers_lost"] == 1
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, uninterrupted)

    # A third run does nothing, and needs no cluster for it.
    whole = tree(path)
    third = Run("run", proteins, path, *SETTINGS)
    assert third.finish() == 0
    assert third.of("run_summary")[0]["computed_chunks"] == 0
    assert not third.of("workers_changed")
    assert tree(path) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_lets_running_chunks_finish_and_the_next_run_goes_on(
    number: signal.Signals,
    proteins: Path,
    uninterrupted: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, table = tmp_path / "out.zarr", tmp_path / "faults.json"
    with holding_after(monkeypatch, table, ROWS):
        first = Run("run", proteins, path, *SETTINGS, program=DEAF)
    for event in first:
        if event["event"] == "run_started":
            await_held(table, ROWS)
            # To the whole group, as a terminal's Ctrl-C goes, and a queue's SIGTERM.
            os.killpg(first.process.pid, number)
            if number == signal.SIGTERM:  # by its script, too
                first.process.send_signal(number)
        if event["event"] == "stopping":
            faults.release(table)
    assert first.finish() == 128 + number
    assert first.of("stopping")[0]["running"] >= 1
    summary = first.of("run_summary")[0]
    assert summary["interrupted"] == number
    assert summary["workers_lost"] == 0
    store = Store(path)
    # Whatever was running has been written and reported: no work was thrown away.
    assert sorted(first.computed()) == np.flatnonzero(store.present()).tolist()
    assert len(first.computed()) > 1
    assert len(summary["missing"]) == store.chunk_count - len(first.computed())

    second = Run("resume", path, "--workers", 1)
    assert second.finish() == 0
    assert sorted([*first.computed(), *second.computed()]) == list(range(store.chunk_count))
    assert_ledger(store, uninterrupted)


def test_a_second_signal_leaves_at_once(
    proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "faults.json"
    arguments = ("run", proteins, tmp_path / "out.zarr", *SETTINGS, "--grace", 3_600)
    with holding_after(monkeypatch, table, ROWS):
        run = Run(*arguments, stderr=subprocess.PIPE)
    workers: set[int] = set()
    for event in run:
        if event["event"] == "chunk_done" and not workers:
            workers.add(event["pid"])
            await_held(table, ROWS)
            run.process.send_signal(signal.SIGTERM)
        if event["event"] == "stopping":
            assert event["running"] >= 1  # an hour of work, for all the user knows
            run.process.send_signal(signal.SIGINT)
            break
    assert run.finish() == 128 + signal.SIGINT
    assert run.process.stderr is not None
    assert "interrupted at once; finished chunks are safe" in run.process.stderr.read()
    assert run.of("stopping")
    assert not run.of("run_summary")
    await_end(workers)


@pytest.mark.slow
def test_a_coordinator_that_stood_still_blames_nobody(
    proteins: Path, uninterrupted: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was stopped in its terminal, or whose machine slept; its workers went on."""
    path, table = tmp_path / "out.zarr", tmp_path / "faults.json"
    # So long that a busy machine makes no worker late.
    deadlines = ("--deadline-floor", 13, "--deadline-first", 120)
    with holding_after(monkeypatch, table, ROWS):
        run = Run("run", proteins, path, *SETTINGS, *deadlines)
    stopped = 0
    for event in run:
        if event["event"] == "chunk_done" and len(run.computed()) == 10:
            stopped += 1
            run.process.send_signal(signal.SIGSTOP)
            faults.release(table)
            time.sleep(15)  # longer than a chunk may take
            run.process.send_signal(signal.SIGCONT)
    assert run.finish() == 0
    assert stopped == 1
    for what in ("chunk_overdue", "worker_lost", "chunk_suspected"):
        assert not run.of(what)
    assert sorted(run.computed()) == list(range(uninterrupted.chunk_count))
    assert_ledger(Store(path), uninterrupted)


@pytest.mark.slow
def test_a_chunk_longer_than_the_grace_is_given_up_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / "out.zarr", tmp_path / "faults.json"
    settings = ("--model=demo", "--rows-per-chunk", 900, "--workers", 1)
    table.write_text('{"": "hang"}')
    with monkeypatch.context() as patch:
        faults.arm(patch, table)
        inputs = [VIRAL_PROTEINS] * 3
        first = Run("run", *inputs, path, *settings, "--grace", 2, program=program(patient=True))
    for event in first:
        if event["event"] == "workers_changed":
            faults.await_met(table, "")  # the one chunk is under way, and will not end
            first.process.send_signal(signal.SIGTERM)
            break
    assert first.finish() == 128 + signal.SIGTERM
    assert first.of("stopping")[0]["running"] == 1
    assert first.of("run_summary")[0]["counts"] == {"pending": 900}
    assert not Store(path).touched()[0]
    second = Run("resume", path)
    assert second.finish() == 0
    assert virnuc_dask.verify(path).checked == 1


def test_a_lost_scheduler_is_a_clear_error_and_the_next_run_goes_on(
    proteins: Path, uninterrupted: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = tmp_path / "scheduler.json", tmp_path / "out.zarr"
    dask = [sys.executable, "-m", "dask"]
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)],
        stderr=subprocess.DEVNULL,
    )
    with holding_after(monkeypatch, tmp_path / "faults.json", ROWS):
        worker = subprocess.Popen(
            [*dask, "worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "2"],
            stderr=subprocess.DEVNULL,
        )
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        first = Run("run", proteins, path, *IDENTITY, "--cluster", file, stderr=subprocess.PIPE)
        for event in first:
            if event["event"] == "chunk_done":
                scheduler.kill()
                break
        assert first.finish() == 4
        assert scheduler.wait() == -signal.SIGKILL
    finally:
        scheduler.kill()
        # Told to end while their scheduler is gone, they may wait for ever.
        family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        worker.wait()
        await_end({process.pid for process in family})
    assert first.process.stderr is not None
    assert first.process.stderr.read() == (
        "error: the scheduler was lost. Finished chunks are safe; `resume` goes on\n"
    )
    present = Store(path).present()
    assert 0 < present.sum() < len(present)
    second = Run("run", proteins, path, *SETTINGS)
    assert second.finish() == 0
    assert sorted([*np.flatnonzero(present), *second.computed()]) == list(range(len(present)))
    clear_partial_files_of_the_killed(Store(path))
    assert_ledger(Store(path), uninterrupted)


def test_status_draws_the_map_while_a_run_is_going(
    proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / "out.zarr", tmp_path / "faults.json"
    with holding_after(monkeypatch, table, ROWS):
        run = Run("run", proteins, path, *SETTINGS)
    for event in run:
        if len(run.computed()) == 3 and event["event"] == "chunk_done":
            # On a busy machine it could be over before the other command has started.
            os.killpg(run.process.pid, signal.SIGSTOP)
            look = command("status", path)
            done = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=False)
            os.killpg(run.process.pid, signal.SIGCONT)
            break
    assert done.returncode == 4
    assert "a run is filling it; if it ends early: " in done.stdout
    first_line, second_line = done.stdout.splitlines()[:2]
    assert "░" in first_line
    assert set(first_line) & {"█", "▒"}
    assert "of 100 chunks" in second_line
    faults.release(table)
    run.process.terminate()
    run.finish()
