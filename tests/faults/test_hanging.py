"""Workers that stand still, and neither die nor answer: their chunks are computed by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import Maker, chunk_bytes, tree
from harness import await_idle, clear_partial_files_of_the_killed

import virnuc_dask
from virnuc_dask import RunConfig
from virnuc_dask.runtime import events
from virnuc_dask.runtime.deadlines import Deadlines, RunningDeadlines
from virnuc_dask.store.store import Store

# Seconds that a chunk may take, where no worker may be late because the machine is busy.
FLOOR = 13
OPTIONS = {
    "scheduler": ["--host", "127.0.0.1", "--port", "0"],
    "worker": ["--no-nanny", "--nthreads", "1"],
}


def start(what: str, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    file = ["--scheduler-file", str(folder / "scheduler.json")]
    return subprocess.Popen(
        [sys.executable, "-m", "dask", what, "--no-dashboard", *OPTIONS[what], *options, *file],
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Any]:
    """A client of a scheduler and two workers that were started by hand and have no nannies."""
    from virnuc_dask.runtime.dask_cluster import connect

    file = tmp_path / "scheduler.json"
    processes = [start(what, tmp_path) for what in ("scheduler", "worker", "worker")]
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        with connect(str(file)) as client:
            client.wait_for_workers(2, timeout=60)
            yield client
    finally:
        for process in reversed(processes):
            process.kill()  # Dask would wait for the tasks that still run
            process.wait()


def test_a_worker_that_stands_still_is_worked_around(
    make_store: Maker, peptides: Path, attached: Any
) -> None:
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    seen: list[events.Event] = []
    stopped: list[int] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        done = [event for event in seen if isinstance(event, events.ChunkDone)]
        if len(done) == 10 and not stopped:
            stopped.append(done[-1].pid)
            os.kill(done[-1].pid, signal.SIGSTOP)

    config = RunConfig(deadline_floor=FLOOR, deadline_first=120)
    summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    overdue = [event for event in seen if isinstance(event, events.ChunkOverdue)]
    assert len(overdue) == 1  # the only chunk that it had; no other was given to it
    assert not overdue[0].replaced  # without a nanny nobody would start another
    assert summary.exit_code == 0
    assert sum(summary.counts.values()) == store.records
    computed = [event.chunk for event in seen if isinstance(event, events.ChunkDone)]
    assert sorted(computed) == list(range(store.chunk_count))
    before = tree(store.path)

    # It wakes up, and what it still writes are the same bytes.
    os.kill(stopped[0], signal.SIGCONT)
    await_idle(attached)
    assert set(tree(store.path)) == set(before)
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)
    assert len(attached.nthreads()) == 2
    assert not any(attached.processing().values())


def assert_nothing_lost(
    store: Store, whole: Store, done: list[events.ChunkDone], killed: Iterable[int]
) -> None:
    assert sorted(event.chunk for event in done) == list(range(store.chunk_count))
    for pid in killed:
        os.waitpid(pid, 0)  # until then they count as alive, and keep their partial files
    clear_partial_files_of_the_killed(store)
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)
    before = tree(store.path)
    assert virnuc_dask.resume(store.path).exit_code == 0
    assert tree(store.path) == before


# Stands for weights of many gigabytes.
LOADS_SLOWLY = """
import time
from pathlib import Path
from virnuc_dask.runtime import embed
from virnuc_dask.encoder.weights import load_checkpoint

def slowly(reference):
    time.sleep(8)
    Path("loaded").touch()
    return load_checkpoint(reference)

embed.load_checkpoint = slowly
"""


@pytest.mark.slow
def test_a_worker_that_loads_a_large_model_does_not_count_as_hanging(
    make_store: Maker, peptides: Path, attached: Any, tmp_path: Path
) -> None:
    """It joins when chunks take no time, as others' do: the model is loaded by then."""
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    (tmp_path / "slow.py").write_text(LOADS_SLOWLY)
    first = set(attached.run(os.getpid).values())
    seen: list[events.Event] = []
    late: list[subprocess.Popen[bytes]] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if sum(isinstance(event, events.ChunkDone) for event in seen) == 10 and not late:
            late.append(start("worker", tmp_path, "--preload", "slow.py"))
            for pid in first:
                os.kill(pid, signal.SIGKILL)

    try:
        config = RunConfig(deadline_floor=4, deadline_first=60)
        summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    finally:
        for process in late:
            process.kill()
            process.wait()
    assert (tmp_path / "loaded").exists()
    assert summary.workers_lost == 2
    # While there was no other worker, until its first chunk.
    done = [event for event in seen if isinstance(event, events.ChunkDone)]
    ready = seen.index(next(event for event in done if event.pid == late[0].pid))
    gone = max(n for n, event in enumerate(seen[:ready]) if isinstance(event, events.WorkerLost))
    assert not [event for event in seen[gone:ready] if isinstance(event, events.ChunkOverdue)]
    assert {event.pid for event in done} - first == {late[0].pid}
    assert summary.exit_code == 0
    assert_nothing_lost(store, whole, done, first)


@pytest.mark.slow
def test_a_row_that_hangs_every_worker_is_waited_for_by_none(
    make_store: Maker,
    peptides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """It hangs both, which are then of no use, and is a suspect: a third worker does it and all."""
    hangs, inputs, table = "WHWHW", tmp_path / "hangs.faa", tmp_path / "faults.json"
    lines = peptides.read_text().splitlines()[:120]
    lines[41] += hangs
    inputs.write_text("\n".join(lines) + "\n")
    whole = make_store(inputs, "whole.zarr", rows_per_chunk=4)
    store = make_store(inputs, embed=False, rows_per_chunk=4)
    table.write_text(json.dumps({hangs: ["hang", "hang"]}))
    faults.arm(monkeypatch, table)
    attached = request.getfixturevalue("attached")
    first = sorted(attached.run(os.getpid).values())
    seen: list[events.Event] = []
    late: list[subprocess.Popen[bytes]] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if sum(isinstance(event, events.ChunkOverdue) for event in seen) == 2 and not late:
            late.append(start("worker", tmp_path))

    usual, met = RunningDeadlines.now, table.with_name(f"{hangs}.met")

    def now(deadlines: RunningDeadlines) -> Deadlines:
        """Nothing may be late but the row, and only while a worker hangs that has no other."""
        overdue = sum(isinstance(event, events.ChunkOverdue) for event in seen)
        done = sum(isinstance(event, events.ChunkDone) for event in seen)
        hung = met.stat().st_size if met.exists() else 0
        is_late = done == store.chunk_count - 1 and overdue < 2 and hung > overdue
        return usual(deadlines) if is_late else replace(usual(deadlines), floor_s=120)

    monkeypatch.setattr(RunningDeadlines, "now", now)
    config = RunConfig(deadline_floor=4, deadline_first=120)
    try:
        summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    finally:
        for process in late:
            process.kill()
            process.wait()
        for pid in first:  # their threads hang, and they would wait for them
            os.kill(pid, signal.SIGKILL)
    overdue = [event for event in seen if isinstance(event, events.ChunkOverdue)]
    assert len(overdue) == 2
    assert len({event.chunk for event in overdue}) == 1
    assert len({event.worker for event in overdue}) == 2
    suspected = [event.chunk for event in seen if isinstance(event, events.ChunkSuspected)]
    assert suspected == [overdue[0].chunk]
    done = [event for event in seen if isinstance(event, events.ChunkDone)]
    assert {event.pid for event in done if event.chunk in suspected} == {late[0].pid}
    assert summary.exit_code == 0
    assert_nothing_lost(store, whole, done, first)


def test_chunks_that_wait_for_the_work_of_others_blame_nobody(
    make_store: Maker, peptides: Path, attached: Any
) -> None:
    """Somebody else's tasks take both workers for longer than a chunk may take."""
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    seen: list[events.Event] = []
    theirs: list[Any] = []
    taken: list[bool] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        done = sum(isinstance(event, events.ChunkDone) for event in seen)
        if done == 10 and not theirs:
            workers = list(attached.nthreads())
            theirs.extend(
                attached.submit(time.sleep, FLOOR + 2, workers=[worker], pure=False, priority=9)
                for worker in workers
            )
        elif theirs and not any(future.done() for future in theirs):
            taken.append(isinstance(event, events.ChunkDone))

    config = RunConfig(deadline_floor=FLOOR, deadline_first=120)
    began = time.monotonic()
    summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    assert time.monotonic() - began > FLOOR + 2
    assert attached.gather(theirs) == [None, None]
    # They have had the workers for themselves: most chunks were done before or after.
    assert sum(taken) < store.chunk_count // 2
    for what in (events.ChunkOverdue, events.ChunkSuspected, events.WorkerLost):
        assert not [event for event in seen if isinstance(event, what)]
    assert summary.exit_code == 0
    done = [event for event in seen if isinstance(event, events.ChunkDone)]
    assert_nothing_lost(store, whole, done, ())


@pytest.mark.slow
def test_chunks_that_waited_for_workers_which_are_all_gone_are_computed_by_the_next(
    make_store: Maker,
    peptides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """One worker hangs, so chunks are for the other; then both die, and for a while there is none.

    Dask would leave those chunks for ever, whatever worker comes.
    """
    # Every chunk takes a second, until the new worker comes.
    slow, inputs, table = "WHWHW", tmp_path / "slow.faa", tmp_path / "faults.json"
    lines = peptides.read_text().splitlines()[:120]
    inputs.write_text(
        "".join(f"{name}\n{s}{slow}\n" for name, s in zip(lines[::2], lines[1::2], strict=True))
    )
    whole = make_store(inputs, "whole.zarr", rows_per_chunk=1)
    store = make_store(inputs, embed=False, rows_per_chunk=1)
    table.write_text(json.dumps({slow: "slow"}))
    faults.arm(monkeypatch, table)
    attached = request.getfixturevalue("attached")
    first = sorted(attached.run(os.getpid).values())
    seen: list[events.Event] = []
    late: list[subprocess.Popen[bytes]] = []
    stopped: list[int] = []
    stuck: list[int] = []

    # A function within one travels whole: the scheduler does not have this module.
    def count_restricted(dask_scheduler: Any, state: str) -> int:
        tasks = dask_scheduler.tasks.values()
        return sum(bool(t.worker_restrictions) and t.state == state for t in tasks)

    def listen(event: events.Event) -> None:
        seen.append(event)
        kinds = [type(event) for event in seen]
        if isinstance(event, events.ChunkDone) and event.pid == first[0] and not stopped:
            time.sleep(0.3)  # it is in the middle of another, and has said so
            stopped.append(event.pid)
            os.kill(first[0], signal.SIGSTOP)
        if events.ChunkOverdue not in kinds or late or not isinstance(event, events.ChunkDone):
            return
        # From then on chunks are for the other one, which has just done one, and has some more.
        if attached.run_on_scheduler(count_restricted, state="processing"):
            for pid in first:
                os.kill(pid, signal.SIGKILL)
            while attached.nthreads():
                time.sleep(0.1)
            stuck.append(attached.run_on_scheduler(count_restricted, state="no-worker"))
            table.write_text("{}")
            late.append(start("worker", tmp_path))

    config = RunConfig(
        deadline_factor=2, deadline_floor=6, deadline_first=20, in_flight=8, suspect_after=9
    )
    try:
        summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    finally:
        for process in late:
            process.kill()
            process.wait()
    assert stuck[0] > 0
    assert summary.workers_lost == 2
    done = [event for event in seen if isinstance(event, events.ChunkDone)]
    assert late[0].pid in {event.pid for event in done}
    assert summary.exit_code == 0
    assert_nothing_lost(store, whole, done, first)
