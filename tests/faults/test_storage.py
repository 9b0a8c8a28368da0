"""Disks that are full, broken, forbidden or gone: a clear word, nothing lost, and the ledger."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker, chunk_bytes, command, tree
from harness import (
    Run,
    assert_ledger,
    clear_partial_files_of_the_killed,
    finished_chunks,
    holding_after,
)
from killed_writes import (
    Bench,
    assert_nothing_is_half_there,
    calls_of_a_chunk,
    embedding,
    finish,
)
from nursery import Nursery

import virnuc_dask
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.runtime import events, failures
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings
from virnuc_dask.store import verify
from virnuc_dask.store.store import Store

# Small files and few rows, so that a run is under way for long enough to be met by a fault.
IDENTITY = ("--model=demo", "--repr-layer", 1, "--rows-per-chunk", 2, "--per-residue")
SETTINGS = (*IDENTITY, "--workers", 2, "--backoff", 0.1)

# --- calls that fail ---


def check_errors(nursery: Nursery, bench: Bench, call: str, number: int, most: int) -> None:
    """Calls of a name fail, each once in a task of its own; the next task meets no error."""
    every = [aim for aim in calls_of_a_chunk(nursery, bench, 0) if aim.name == call]
    assert len(every) >= len(bench.whole.keys(0))
    for aim in random.Random(number).sample(every, min(most, len(every))):
        store = bench.fresh()
        what = aim.inject(f"error={errno.errorcode[number]}")
        assert nursery.trace(embedding(store, 0), bench.log, *what) == number
        assert bench.log.read_text().count("(INJECTED)") == 1
        assert_nothing_is_half_there(store, bench.whole, 0)
        assert verify.verify(store.path).leftovers == []
        finish(nursery, store, bench.whole)


@pytest.mark.parametrize(
    ("call", "number", "hopeless"),
    [
        ("openat", errno.EMFILE, False),
        ("read", errno.EIO, False),
        ("write", errno.EIO, False),
        ("write", errno.ENOSPC, True),
        ("fsync", errno.EIO, False),
        ("fsync", errno.EDQUOT, True),
        ("rename", errno.EIO, False),
    ],
)
@pytest.mark.sweep
def test_a_call_that_fails_fails_the_task_and_the_next_one_finishes(
    call: str, number: int, hopeless: bool, nursery: Nursery, bench: Bench
) -> None:
    error = OSError(number, "")
    assert (failures.is_hopeless(error), failures.is_transient(error)) == (hopeless, not hopeless)
    check_errors(nursery, bench, call, number, most=4)


@pytest.mark.soak
@pytest.mark.parametrize("call", ["openat", "read", "write", "fsync", "rename"])
def test_every_call_may_fail(call: str, nursery: Nursery, bench: Bench) -> None:
    check_errors(nursery, bench, call, errno.EIO, most=1_000)


# --- full, or read-only ---


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def assert_whole_in_the_end(store: Store, reference: Store, client: Any) -> None:
    """The ledger: each row in one state and as it should be, nothing stray, nothing done twice."""
    before = tree(store.path)
    present = store.present()
    summary = virnuc_dask.resume(store.path, client=client)
    assert summary.exit_code == 0
    assert summary.computed_chunks == (~present).sum()
    assert sum(summary.counts.values()) == reference.records
    assert chunk_bytes(store.path) == chunk_bytes(reference.path)
    after = tree(store.path)
    for chunk in np.flatnonzero(present):
        for key in store.keys(int(chunk)):
            assert after[key] == before[key]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
    assert tree(store.path) == after
    report = virnuc_dask.verify(store.path)
    assert (report.exit_code, report.leftovers) == (0, [])


@pytest.mark.parametrize("room", [0, 4, 8, 16, 24, 32, 40, 60, 88])
@pytest.mark.sweep
def test_a_full_disk_stops_the_run_at_once_and_costs_nothing(
    room: int, disk: Path, make_store: Maker, client: Any
) -> None:
    reference = make_store(VIRAL_PROTEINS)
    store = make_store(VIRAL_PROTEINS, str(disk / "full.zarr"), embed=False)
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(b"\0" * (free - room * 1024))
    seen: list[events.Event] = []
    with pytest.raises(virnuc_dask.IncompleteRunError, match="No space left") as raised:
        virnuc_dask.resume(store.path, client=client, listener=seen.append)
    summary = raised.value.summary
    assert summary.exit_code == 4
    assert summary.stopped is not None
    assert "No space left on device" in summary.stopped
    assert str(store.path) in summary.stopped
    assert "MB are free" in summary.stopped
    failed = [event for event in seen if isinstance(event, events.ChunkFailed)]
    threads = sum(client.nthreads().values())
    assert 1 <= len(failed) <= threads  # what ran already, and nothing after it
    assert all(event.final for event in failed)
    assert sum(isinstance(event, events.CannotGoOn) for event in seen) == 1
    assert len(summary.missing) == (~store.present()).sum() > 0
    assert virnuc_dask.verify(store.path).leftovers == []
    filler.unlink()
    assert_whole_in_the_end(store, reference, client)


@pytest.mark.slow
def test_a_read_only_disk_stops_the_run_at_once(disk: Path, make_store: Maker, client: Any) -> None:
    reference = make_store(VIRAL_PROTEINS)
    store = make_store(VIRAL_PROTEINS, str(disk / "out.zarr"), embed=False)
    mount("-o", "remount,ro", str(disk))
    before = tree(store.path)
    # Workers of others may have it so, and are asked; those of our own meet it.
    with pytest.raises(UsageError, match=r"2 of 2 workers cannot(.|\n)*Read-only file system"):
        virnuc_dask.resume(store.path, client=client)
    summary = virnuc_dask.resume(store.path, workers=1, allow_incomplete=True)
    assert summary.exit_code == 4
    assert "Read-only file system" in str(summary.stopped)
    assert tree(store.path) == before
    mount("-o", "remount,rw", str(disk))
    assert_whole_in_the_end(store, reference, client)


def fill(disk: Path, room: int) -> Path:
    """Leave so many KiB of a disk free."""
    filler, left = disk / "filler", os.statvfs(disk)
    filler.write_bytes(b"\0" * (left.f_bavail * left.f_bsize - room * 1024))
    return filler


@pytest.mark.parametrize("room", [0, 12, 20, 28, 40, 52, 76, 100])
@pytest.mark.sweep
def test_a_disk_that_fills_while_the_input_is_read_is_left_as_it_was(
    room: int, disk: Path, make_store: Maker
) -> None:
    reference = make_store(VIRAL_PROTEINS, embed=False)
    filler = fill(disk, room)
    chosen = Settings("demo", rows_per_chunk=32, repr_layer=0)
    with pytest.raises(StoreError, match=r"out\.zarr: No space left on device.*MB are free"):
        prepare(VIRAL_PROTEINS, disk / "out.zarr", chosen, lambda _event: None)
    assert os.listdir(disk) == ["filler"]
    filler.unlink()
    made, _ = prepare(VIRAL_PROTEINS, disk / "out.zarr", chosen, lambda _event: None)
    assert os.listdir(disk) == ["out.zarr"]
    assert made.identity == reference.identity
    assert verify.verify(made.path).sequences is None


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_an_exit_code(disk: Path, cli: Cli) -> None:
    filler = fill(disk, 40)
    options = ("--model=demo", "--repr-layer", 1, "--workers", 1, "-q")
    arguments = ("run", VIRAL_PROTEINS, disk / "out.zarr", *options)
    found = cli(*arguments)
    assert found.returncode == 4
    path = disk / "out.zarr"
    assert re.fullmatch(rf"error: {path}: No space left on device.*MB are free\n", found.stderr)
    assert os.listdir(disk) == ["filler"]
    filler.unlink()
    assert cli(*arguments).returncode == 0


# --- forbidden ---


def forbidden(*arguments: object) -> list[str]:
    """A command that the permissions of files mean something to, even if root gives it."""
    if os.geteuid():
        return command(*arguments)
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and setpriv, which would forbid it, is missing")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command(*arguments)]


@pytest.mark.slow
def test_a_store_that_may_not_be_written_stops_the_run_at_once(
    make_store: Maker, client: Any
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store = make_store(VIRAL_PROTEINS)
    for chunk in (1, 4, 5, 6, 8, 9):
        store.remove_chunk(chunk)
    before, done = tree(store.path), finished_chunks(store)
    folders = [store.path, *filter(Path.is_dir, store.path.iterdir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        found = subprocess.run(
            forbidden("resume", store.path, "--workers", 1, "--no-progress"),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert found.returncode == 4
    assert f"stopped: {store.path}: Permission denied ({store.path}/status/c." in found.stdout
    assert "Traceback" not in found.stderr
    assert 1 <= found.stderr.count("attempt 1: PermissionError") <= 2  # one for each thread
    assert "attempt 2" not in found.stderr
    assert tree(store.path) == before
    assert virnuc_dask.resume(store.path, client=client).exit_code == 0
    assert_ledger(store, whole)
    assert {name: tree(store.path)[name] for name in done} == done


@pytest.mark.slow
def test_a_directory_that_may_not_be_written_gets_no_store(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    found = subprocess.run(
        forbidden("run", VIRAL_PROTEINS, folder / "out.zarr", "--model=demo"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    cause = "cannot create a store: Permission denied"
    assert found.stderr.splitlines()[1:] == [f"error: {folder}/out.zarr: {cause}"]
    assert os.listdir(folder) == []


# --- gone ---


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, some_proteins: Path) -> Store:
    """The same input and settings, left in peace."""
    path = tmp_path_factory.mktemp("uninterrupted") / "out.zarr"
    subprocess.run(command("run", some_proteins, path, *SETTINGS, "--workers", 1, "-q"), check=True)
    return Store(path)


@pytest.mark.parametrize(
    "part",
    [
        ".",
        pytest.param("embedding", marks=pytest.mark.soak),
        pytest.param("residue_embedding", marks=pytest.mark.soak),
    ],
)
@pytest.mark.slow
def test_a_store_that_is_moved_away_ends_the_run_and_is_finished_once_it_is_back(
    part: str,
    some_proteins: Path,
    uninterrupted: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, away, table = (tmp_path / name for name in ("out.zarr", "away", "faults.json"))
    with holding_after(monkeypatch, table, uninterrupted.records // 4):
        run = Run("run", some_proteins, path, *SETTINGS, stderr=subprocess.PIPE)
    for _ in run:
        if len(run.computed()) == 3:
            (path / part).rename(away)
            faults.release(table)
            break
    assert run.finish() == 4
    assert len(run.computed()) < uninterrupted.chunk_count // 2  # it was in the middle
    assert run.process.stderr is not None
    message = run.process.stderr.read()
    assert re.fullmatch(r"(error: .*\n)?", message)
    assert str(path) in message + str(run.of("run_summary"))
    assert not (path / part).exists()  # nobody makes a part of a store anew
    away.rename(path / part)
    before = finished_chunks(Store(path))
    again = Run("resume", path, "--workers", 1)
    assert again.finish() == 0
    assert {name: tree(path)[name] for name in before} == before
    clear_partial_files_of_the_killed(Store(path))
    assert_ledger(Store(path), uninterrupted)


@pytest.mark.slow
def test_a_store_that_is_deleted_ends_the_run_and_does_not_come_back(
    some_proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "disk").mkdir()
    path, gone, table = folder / "out.zarr", folder / "gone", tmp_path / "faults.json"
    with holding_after(monkeypatch, table, 25):
        run = Run("run", some_proteins, path, *SETTINGS, stderr=subprocess.PIPE)
    for _ in run:
        if len(run.computed()) == 3:
            path.rename(gone)
            while gone.exists():  # workers are writing to it
                shutil.rmtree(gone, ignore_errors=True)
            faults.release(table)
            break
    assert run.finish() == 4
    assert run.process.stderr is not None
    message = run.process.stderr.read()
    assert re.fullmatch(rf"error: .*{path}.*\n", message)
    assert os.listdir(folder) == []
