"""Rows that kill the process that encodes them: found, quarantined, and no other row with them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import numpy as np
import psutil
import pytest
from conftest import Maker, chunk_bytes, command, tree
from harness import Run, assert_ledger, clear_partial_files_of_the_killed
from nursery import wait_for

import virnuc_dask
from virnuc_dask import RunConfig
from virnuc_dask.encoder.weights import describe, load_checkpoint
from virnuc_dask.errors import VirnucError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.deadlines import Deadlines
from virnuc_dask.runtime.embed import embed_rows, get_encoder
from virnuc_dask.runtime.isolate import embed_in_children
from virnuc_dask.settings import ModelSpec, Status
from virnuc_dask.store.store import Store

# What meets a motif fares as the table says; a list is for the first, second, ... time.
ABORTS, KILLS, RAISES, NAN = "WWCWW", "CCWCC", "HWHWH", "WCWCW"
HANGS, MEMORY, CUDA = "CHCHC", "HHCHH", "CWHWC"
KILLS_TWICE, RAISES_ONCE = "HCWCH", "WHHHW"
TABLE = {
    ABORTS: "abort",
    KILLS: "kill",
    RAISES: "raise",
    NAN: "nan",
    HANGS: "hang",
    MEMORY: "memory",
    CUDA: "cuda",
    KILLS_TWICE: ["kill", "kill"],
    RAISES_ONCE: ["raise"],
}


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the motifs do harm, in this process and in its children."""
    table = tmp_path / "faults.json"
    table.write_text(json.dumps(TABLE))
    faults.arm(monkeypatch, table)


def poisoned(peptides: Path, path: Path, guilty: dict[int, str], records: int) -> Path:
    """Real peptides, some with a motif in the middle."""
    lines = [line.strip() for line in peptides.read_text().splitlines()]
    sequences = [line for line in lines if not line.startswith(">")][:records]
    assert len(sequences) == records
    for row, motif in guilty.items():
        sequences[row] = sequences[row][:6] + motif + sequences[row][6:]
    path.write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    return path


# Something in every chunk of four rows, in one of them twice; KILLS_TWICE and RAISES_ONCE do no
# lasting harm. What hangs is alone in its chunk: whoever looks for it waits at each step.
GUILTY = {
    1: RAISES,
    5: ABORTS,
    7: KILLS,
    11: RAISES,
    13: NAN,
    16: MEMORY,
    22: CUDA,
    25: KILLS_TWICE,
    30: RAISES_ONCE,
    32: HANGS,
}
FATE = {
    Status.TIMED_OUT: [32],
    Status.CRASHED_WORKER: [5, 7, 22],
    Status.ENCODER_ERROR: [1, 11],
    Status.NON_FINITE: [13],
    Status.OUT_OF_MEMORY: [16],
}
RECORDS = 33
INNOCENT = RECORDS - sum(map(len, FATE.values()))
SETTINGS = ("--model=demo", "--rows-per-chunk", 4, "--workers", 2, "--per-residue", "--json")
# Enough for any row but the one that hangs, which takes all of it.
DEADLINES = ("--deadline-floor", 8, "--deadline-first", 60, "--backoff", 0.1)


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_poison_in_every_chunk_is_quarantined_and_nothing_else_is_lost(
    peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, armed: None
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", GUILTY, RECORDS)
    path = tmp_path / "out.zarr"
    run = subprocess.run(
        command("run", inputs, path, *SETTINGS, *DEADLINES),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        preexec_fn=limit_memory,
    )
    assert run.returncode == 3, run.stderr
    seen = [json.loads(line) for line in run.stdout.splitlines()]

    # Each fault fired.
    assert sum(event["event"] == "worker_lost" for event in seen) >= 4
    suspected = {event["chunk"] for event in seen if event["event"] == "chunk_suspected"}
    assert suspected >= {1, 5, 6, 8}
    least = dict.fromkeys(TABLE, 2) | {KILLS_TWICE: 3, NAN: 1}
    assert all((tmp_path / f"{motif}.met").stat().st_size >= n for motif, n in least.items())

    expected = {state.meaning: len(rows) for state, rows in FATE.items()}
    assert seen[-1]["counts"] == {"embedded": INNOCENT, **expected}

    # Without the faults, the same rows are the same, by value.
    monkeypatch.delenv(faults.VARIABLE)
    subprocess.run(
        command("run", inputs, tmp_path / "whole.zarr", *SETTINGS, "--workers", 1, "-q"),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=200,
    )
    found = virnuc_dask.open_store(path)
    whole = virnuc_dask.open_store(tmp_path / "whole.zarr")
    status = found.status.values
    for state, rows in FATE.items():
        assert np.flatnonzero(status == state).tolist() == rows
    innocent = status == Status.EMBEDDED
    assert innocent.sum() == INNOCENT
    assert np.array_equal(found.embedding.values[innocent], whole.embedding.values[innocent])
    assert np.isnan(found.embedding.values[~innocent]).all()
    for row in range(RECORDS):
        residues = virnuc_dask.open_residues(path, row).values
        expected_residues = virnuc_dask.open_residues(tmp_path / "whole.zarr", row).values
        if innocent[row]:
            assert np.array_equal(residues, expected_residues)
        else:
            assert residues.shape == expected_residues.shape
            assert np.isnan(residues).all()
    assert virnuc_dask.verify(path).exit_code == 0
    before = tree(path)
    assert virnuc_dask.resume(path).exit_code == 3
    assert tree(path) == before


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of 2 GiB, beyond which the kernel kills; the folder to write a process to."""
    for root, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(root, f"virnuc_dask-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(2**31))
            except OSError:
                group.rmdir()
            else:
                yield group
                group.rmdir()
                return
    pytest.skip("needs leave to make a memory control group, as root has outside most containers")


@pytest.mark.soak
def test_a_row_that_takes_all_memory_of_a_control_group_is_quarantined_alone(
    peptides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_store: Maker,
    little_memory: Path,
) -> None:
    """The kernel's own killing, with no limit that the process could see coming."""
    inputs = poisoned(peptides, tmp_path / "some.faa", {5: MEMORY}, 16)
    whole = make_store(inputs, "whole.zarr", rows_per_chunk=4, repr_layer=None)
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({MEMORY: "memory"}))
    faults.arm(monkeypatch, table)
    path = tmp_path / "out.zarr"

    def join() -> None:
        (little_memory / "cgroup.procs").write_text(str(os.getpid()))

    run = subprocess.run(
        command(
            "run", inputs, path, "--model=demo", "--rows-per-chunk", 4, "--workers", 1, "--json"
        ),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        preexec_fn=join,
    )
    assert run.returncode == 3, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["counts"] == {"embedded": 15, Status.CRASHED_WORKER.meaning: 1}
    assert summary["workers_lost"] == 2  # killed, each time; then in a child, by itself
    assert (tmp_path / f"{MEMORY}.met").stat().st_size >= 3
    found, expected = virnuc_dask.open_store(path), virnuc_dask.open_store(whole.path)
    innocent = found.status.values == Status.EMBEDDED
    assert np.flatnonzero(~innocent).tolist() == [5]
    assert np.allclose(
        found.embedding.values[innocent], expected.embedding.values[innocent], atol=1e-6
    )
    before = tree(path)
    assert virnuc_dask.resume(path).exit_code == 3
    assert tree(path) == before


@pytest.mark.slow
def test_a_worker_whose_device_is_lost_is_replaced(
    peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_store: Maker
) -> None:
    """What CUDA would raise stands for a GPU: its process is of no use, and its rows are."""
    inputs = poisoned(peptides, tmp_path / "some.faa", {5: CUDA}, 16)
    whole = make_store(inputs, "whole.zarr", rows_per_chunk=4)
    store = make_store(inputs, embed=False, rows_per_chunk=4)
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({CUDA: ["cuda"]}))
    faults.arm(monkeypatch, table)
    seen: list[events.Event] = []
    config = RunConfig(backoff=0.1)
    summary = virnuc_dask.resume(store.path, workers=1, config=config, listener=seen.append)
    failed = [event for event in seen if isinstance(event, events.ChunkFailed)]
    assert [(event.chunk, event.final) for event in failed] == [(1, False)]
    assert "CUDA error" in failed[0].error
    assert summary.workers_lost == 1
    # Its other thread may have had a chunk done before, or not.
    (lost,) = (number for number, event in enumerate(seen) if isinstance(event, events.WorkerLost))
    before, after = (
        {event.pid for event in part if isinstance(event, events.ChunkDone)}
        for part in (seen[:lost], seen[lost:])
    )
    assert len(before) <= 1
    assert len(after) == 1
    assert before.isdisjoint(after)
    assert summary.exit_code == 0
    clear_partial_files_of_the_killed(store)  # its other thread may have been at another chunk
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)


@pytest.mark.soak
def test_a_row_that_hangs_is_found_at_a_lesser_precision(
    peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_store: Maker
) -> None:
    """A child may have to load the model in float32 too, and its worker is given time for that."""
    inputs = poisoned(peptides, tmp_path / "some.faa", {5: HANGS}, 16)
    settings: dict[str, Any] = {"rows_per_chunk": 2, "repr_layer": None, "precision": "bfloat16"}
    whole = make_store(inputs, "whole.zarr", **settings)
    store = make_store(inputs, embed=False, **settings)
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({HANGS: "hang"}))
    faults.arm(monkeypatch, table)
    seen: list[events.Event] = []
    config = RunConfig(deadline_floor=4, deadline_first=15, in_flight=1)
    summary = virnuc_dask.resume(store.path, workers=1, config=config, listener=seen.append)
    overdue = [event.chunk for event in seen if isinstance(event, events.ChunkOverdue)]
    assert overdue == [2, 2]  # by its worker's threads; then by child processes, which tell
    assert summary.counts == {"embedded": 15, Status.TIMED_OUT.meaning: 1}
    found, expected = virnuc_dask.open_store(store.path), virnuc_dask.open_store(whole.path)
    innocent = found.status.values == Status.EMBEDDED
    assert np.flatnonzero(~innocent).tolist() == [5]
    assert np.array_equal(found.embedding.values[innocent], expected.embedding.values[innocent])


@pytest.mark.slow
def test_a_worker_killed_while_a_child_tries_rows_leaves_no_file_of_them(
    peptides: Path, tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", {5: KILLS}, 16)  # one chunk, one suspect
    whole = make_store(inputs, "whole.zarr")
    store = make_store(inputs, embed=False)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    table = tmp_path / "faults.json"
    # It kills two workers, so its chunk is given to a child, where it is held.
    table.write_text(json.dumps({KILLS: ["kill", "kill", "hold"]}))
    faults.arm(monkeypatch, table)
    run = Run("resume", store.path, "--workers", 1, "--backoff", 0.1)
    met = tmp_path / f"{KILLS}.met"
    wait_for(lambda: met.exists() and met.stat().st_size == 3)
    (rows,) = scratch.rglob("rows.npz")
    worker = next(
        process.parent()
        for process in psutil.Process(run.process.pid).children(recursive=True)
        if "virnuc_dask.runtime.isolate" in process.cmdline()
    )
    worker.kill()
    assert run.finish() == 0
    assert len(run.of("worker_lost")) == 3
    assert not rows.parent.exists()
    assert not [*scratch.rglob("*.npz")]
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, whole)
    before = tree(store.path)
    assert virnuc_dask.resume(store.path).computed_chunks == 0
    assert tree(store.path) == before


# --- one chunk, in child processes ---


@pytest.fixture
def model() -> ModelSpec:
    return describe(load_checkpoint("demo"))


def rows_of(store: Store) -> tuple[Any, Any]:
    return store.read_rows(0)


@pytest.mark.slow
def test_children_give_what_this_process_gives(
    awkward: Path, tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever lies about in the working directory is nobody's module.
    (tmp_path / "esm.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    store = make_store(awkward, embed=False, per_residue=True, repr_layer=None, max_residues=50)
    spec = describe(load_checkpoint("demo"))
    apart = embed_in_children(spec, "cpu", *rows_of(store), store.identity)
    here = embed_rows(get_encoder(spec), *rows_of(store), store.identity)
    assert np.array_equal(apart.status, here.status)
    assert np.array_equal(apart.embedding, here.embedding, equal_nan=True)
    assert apart.residues is not None
    assert here.residues is not None
    assert np.array_equal(apart.residues, here.residues, equal_nan=True)


@pytest.mark.usefixtures("armed")
@pytest.mark.parametrize("guilty", [{0: KILLS}, {0: ABORTS, 1: KILLS, 2: ABORTS}])
@pytest.mark.sweep
def test_every_row_may_be_guilty(
    guilty: dict[int, str], peptides: Path, tmp_path: Path, make_store: Maker, model: ModelSpec
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", guilty, 3)
    store = make_store(inputs, embed=False, repr_layer=None)
    rows = embed_in_children(model, "cpu", *rows_of(store), store.identity)
    assert np.flatnonzero(rows.status == Status.CRASHED_WORKER).tolist() == list(guilty)
    assert np.isnan(rows.embedding).all(axis=1).sum() == len(guilty)


@pytest.mark.usefixtures("armed")
@pytest.mark.slow
def test_a_row_that_hangs_costs_its_neighbour_nothing(
    peptides: Path, tmp_path: Path, make_store: Maker, model: ModelSpec
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", {0: HANGS}, 2)
    store = make_store(inputs, embed=False, repr_layer=None)
    deadlines = Deadlines(start_s=120, floor_s=3)
    rows = embed_in_children(model, "cpu", *rows_of(store), store.identity, deadlines)
    assert rows.status.tolist() == [Status.TIMED_OUT, Status.EMBEDDED]
    assert np.isfinite(rows.embedding[1]).all()


def test_a_child_that_raises_blames_no_row(awkward: Path, make_store: Maker) -> None:
    store = make_store(awkward, embed=False, repr_layer=None)
    other = ModelSpec("demo", "0" * 64, 64, 2)
    with pytest.raises(VirnucError, match=r"ended with 70: ModelError: .*this worker has weights"):
        embed_in_children(other, "cpu", *rows_of(store), store.identity)


@pytest.mark.slow
def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.json")  # nobody writes to it: the child would wait for ever
    child = subprocess.Popen(
        [sys.executable, "-m", "virnuc_dask.runtime.isolate", str(tmp_path)], stdin=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=5)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) == 1


def test_an_innocent_suspect_is_embedded(make_store: Maker, awkward: Path, client: Any) -> None:
    """Every chunk is suspect from the first death on, and a worker is killed from outside."""
    store = make_store(awkward, embed=False, repr_layer=None, rows_per_chunk=1)
    whole = make_store(awkward, "whole.zarr", repr_layer=None, rows_per_chunk=1)
    seen: list[events.Event] = []
    killed: list[int] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.ChunkDone) and not killed:
            killed.append(event.pid)
            os.kill(event.pid, 9)

    config = RunConfig(suspect_after=1)
    summary = virnuc_dask.resume(store.path, client=client, config=config, listener=listen)
    assert summary.workers_lost == 1
    assert summary.complete
    assert "crashed_worker" not in summary.counts
    assert np.array_equal(
        virnuc_dask.open_store(store.path).embedding.values,
        virnuc_dask.open_store(whole.path).embedding.values,
        equal_nan=True,
    )
