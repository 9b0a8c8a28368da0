"""Workers, coordinators and schedulers killed again and again, at any moment: nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import faults
import numpy as np
import psutil
import pytest
from conftest import Maker, tree
from harness import (
    Run,
    assert_ledger,
    await_end,
    clear_partial_files_of_the_killed,
    finished_chunks,
    holding_after,
    program,
)
from nursery import wait_for

import virnuc_dask
from virnuc_dask import RunConfig
from virnuc_dask.runtime import events
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.store.store import Store

# Layer 0 is quick, so that most of a run is what can be interrupted: tasks, and their files.
IDENTITY = ("--model=demo", "--repr-layer", 0, "--rows-per-chunk", 16)
LOCAL = ("--workers", 2)
SEED = 20_260


def times(short: int, long: int) -> list[Any]:
    """How many faults: a few by default, many for whoever asks for a soak test."""
    return [short, pytest.param(long, marks=[pytest.mark.soak, pytest.mark.timeout(3_600)])]


class Uninterrupted:
    """The same input and settings, left in peace: what it gives, and how long it takes."""

    def __init__(self, peptides: Path, path: Path) -> None:
        started = time.monotonic()
        run = Run("run", peptides, path, *IDENTITY, *LOCAL)
        await_event(run, lambda event: event["event"] == "chunk_done")
        self.seconds_to_start = time.monotonic() - started
        assert run.finish() == 0
        self.seconds = time.monotonic() - started
        self.store = Store(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, peptides: Path) -> Uninterrupted:
    return Uninterrupted(peptides, tmp_path_factory.mktemp("reference") / "out.zarr")


def assert_nothing_lost(store: Store, reference: Store) -> None:
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, reference)
    before = tree(store.path)
    again = virnuc_dask.resume(store.path, cluster="none is needed")
    assert (again.exit_code, again.computed_chunks) == (0, 0)
    assert tree(store.path) == before


def await_event(run: Run, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Read a run's events until one is wanted, or it is over."""
    next(filter(wanted, run), None)


def followed(run: Run) -> Thread:
    """Read a run's events beside the test, which sleeps until it strikes."""
    reader = Thread(target=run.finish)
    reader.start()
    return reader


# --- workers ---


@pytest.mark.parametrize("suspect_after", [1, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kills", times(3, 100))
@pytest.mark.slow
def test_workers_killed_at_random_lose_nothing_and_blame_nobody(
    kills: int,
    suspect_after: int,
    peptides: Path,
    reference: Uninterrupted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(SEED)
    fired = busy = stores = 0
    while fired < kills:
        path = tmp_path / f"{stores}.zarr"
        started = program(suspect_after=suspect_after)
        run = Run("run", peptides, path, *IDENTITY, *LOCAL, program=started)
        reader = followed(run)
        killed, finished = [], {}
        while reader.is_alive() and fired + len(killed) < kills:
            reader.join(random.uniform(0, 1.5))
            over = len(run.of("chunk_done")) == reference.store.chunk_count
            if not over and (victim := choose_worker(run, killed, random)):
                finished |= {name: tree_of(path, name) for name in reported_files(run)}
                with suppress(psutil.NoSuchProcess):  # the run has just ended
                    victim.kill()
                    killed.append(victim.pid)
        reader.join()
        assert run.process.wait() == 0, (SEED, stores)

        # Every death was seen, but perhaps for those of both workers at the very end.
        lost = run.of("worker_lost")
        assert len(killed) - len(lost) in (0, 1, 2), (SEED, stores)
        blamed = {event["chunk"] for event in run.of("chunk_suspected")}
        assert bool(blamed) == (suspect_after == 1 and any(e["chunks"] for e in lost))
        # A chunk that was written, but not reported, before its worker died is found to be done.
        done = [event["chunk"] for event in run.of("chunk_done")]
        assert sorted(done) == list(range(reference.store.chunk_count))
        assert {name: tree_of(path, name) for name in finished} == finished
        assert_nothing_lost(Store(path), reference.store)
        fired += len(lost)
        busy += sum(bool(event["chunks"]) for event in lost)
        stores += 1
    assert busy >= fired / 2, (SEED, "workers were idle when they were killed")
    report(capsys, f"{fired} workers killed, {busy} of them busy", stores, reference)


def choose_worker(
    run: Run, killed: list[int], random: np.random.Generator
) -> psutil.Process | None:
    """A living worker that has reported a chunk: one that starts is not at work yet."""
    reported = {event["pid"] for event in run.of("chunk_done")}.difference(killed)
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.process.pid).children(recursive=True)
        if living := [child for child in children if child.pid in reported]:
            return living[random.integers(len(living))]
    return None


def reported_files(run: Run) -> list[str]:
    return [
        name
        for event in run.of("chunk_done")
        for name in (f"status/c.{event['chunk']}", f"embedding/c.{event['chunk']}.0")
    ]


def tree_of(path: Path, name: str) -> tuple[int, int, bytes]:
    """As `tree`, for a file of a store that others are writing to."""
    found = (path / name).stat()
    return found.st_ino, found.st_mtime_ns, (path / name).read_bytes()


def report(
    capsys: pytest.CaptureFixture[str], faults: str, stores: int, reference: Uninterrupted
) -> None:
    rows = stores * reference.store.records
    with capsys.disabled():
        print(f"\n{faults}; {stores} stores, {rows:,} rows checked, 0 lost; seed {SEED}")


def test_a_worker_of_our_own_leaves_sigterm_to_the_coordinator(
    peptides: Path, reference: Uninterrupted, tmp_path: Path, client: Any
) -> None:
    """A queue sends it to all processes of a job; the coordinator lets running chunks finish."""
    seen: list[events.Event] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not any(
            isinstance(earlier, events.ChunkDone) for earlier in seen
        ):
            os.kill(event.pid, signal.SIGTERM)
        seen.append(event)

    summary = virnuc_dask.run(
        peptides,
        tmp_path / "out.zarr",
        model="demo",
        client=client,
        config=RunConfig(in_flight=8),
        listener=listen,
        repr_layer=0,
        rows_per_chunk=16,
    )
    (told, *_) = (event.pid for event in seen if isinstance(event, events.ChunkDone))
    assert told in client.run(os.getpid).values()
    assert (summary.exit_code, summary.workers_lost, summary.retries) == (0, 0, 0)
    assert_nothing_lost(Store(tmp_path / "out.zarr"), reference.store)


def assert_computed_elsewhere(seen: list[events.Event], summary: virnuc_dask.RunSummary) -> None:
    (lost,) = (event for event in seen if isinstance(event, events.WorkerLost))
    assert lost.chunks, "the worker was idle when it was told to end"
    done = [event.chunk for event in seen if isinstance(event, events.ChunkDone)]
    assert sorted(done) == list(range(summary.chunks))
    assert set(lost.chunks) <= set(done)
    assert (summary.exit_code, summary.workers_lost) == (0, 1)


# What Python loads first. A file is named after each process that is to become a worker.
STARTS = """
import os, sys, time
from contextlib import suppress
from pathlib import Path

if any("spawn_main" in argument for argument in sys.orig_argv):
    here = Path(__file__).parent
    (here / f"{{os.getpid()}}.pid").touch()
    {}
"""


def starting(folder: Path, peptides: Path, path: Path, begin: str) -> Run:
    """A run whose workers begin with a statement, before there is anything of Dask in them."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STARTS.format(begin))
    found = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    what = ("run", peptides, path, *IDENTITY, *LOCAL)
    return Run(*what, env=os.environ | {"PYTHONPATH": found}, stderr=subprocess.PIPE)


def started_workers(folder: Path) -> list[int]:
    """Processes that were to become workers; they may have ended."""
    return [int(file.stem) for file in folder.glob("*.pid")]


@pytest.mark.slow
def test_a_worker_killed_while_it_starts_is_started_again(
    peptides: Path, reference: Uninterrupted, tmp_path: Path
) -> None:
    path, folder = tmp_path / "out.zarr", tmp_path / "starts"
    one = 'with suppress(FileExistsError): (here / "one").mkdir(); os.kill(os.getpid(), 9)'
    run = starting(folder, peptides, path, one)
    assert run.finish() == 0
    assert (folder / "one").exists()
    assert len(started_workers(folder)) > 2
    assert_nothing_lost(Store(path), reference.store)


@pytest.mark.slow
def test_an_interrupt_while_workers_start_is_answered_by_the_coordinator_alone(
    peptides: Path, reference: Uninterrupted, tmp_path: Path
) -> None:
    path, folder = tmp_path / "out.zarr", tmp_path / "starts"
    wait = 'while not (here / "released").exists(): time.sleep(0.02)'
    run = starting(folder, peptides, path, wait)
    wait_for(lambda: started_workers(folder))
    assert blocks_interrupts(started_workers(folder)[0])
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C goes
    (folder / "released").touch()
    assert run.finish() == 128 + signal.SIGINT
    assert run.process.stderr is not None
    assert "Traceback" not in run.process.stderr.read()
    assert run.of("run_summary")[0]["interrupted"] == signal.SIGINT
    assert Run("resume", path, *LOCAL).finish() == 0
    assert_nothing_lost(Store(path), reference.store)


def blocks_interrupts(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = status.partition("SigBlk:")[2].split()[0]
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)


@pytest.mark.slow
def test_workers_that_are_always_killed_before_they_ever_ran_are_a_clear_error(
    peptides: Path, reference: Uninterrupted, tmp_path: Path
) -> None:
    path, folder = tmp_path / "out.zarr", tmp_path / "starts"
    run = starting(folder, peptides, path, "os.kill(os.getpid(), 9)")
    assert run.finish() == 4
    assert len(started_workers(folder)) >= 3
    assert run.process.stderr is not None
    assert "the workers did not start, 3 times" in (said := run.process.stderr.read())
    assert "Traceback" not in said
    assert Run("resume", path, *LOCAL).finish() == 0
    assert_nothing_lost(Store(path), reference.store)


# --- coordinators ---


@pytest.mark.parametrize("kills", times(4, 100))
@pytest.mark.slow
def test_coordinators_killed_at_random_leave_no_process_and_lose_nothing(
    kills: int,
    peptides: Path,
    reference: Uninterrupted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(SEED)
    # Spread evenly over a run, of which a third is its start; the first comes early in that.
    moments = (np.arange(kills) + random.random(kills)) / kills * 1.5 - 0.5
    random.shuffle(moments[1:])
    some = peptides.read_text()[:30_000]
    fired = unborn = stores = 0
    while fired < kills:
        path, finished = tmp_path / f"{stores}.zarr", {}
        complete = False
        while not complete:
            before = set(np.flatnonzero(Store(path).present())) if path.exists() else set()
            again = path.exists() and random.random() < 0.5
            what = ("resume", path) if again else ("run", peptides, path, *IDENTITY)
            if fired:
                run = Run(*what, *LOCAL)
            else:  # no store can be born of an input that does not end
                run = Run("run", "-", path, *IDENTITY, *LOCAL, stdin=subprocess.PIPE)
                assert run.process.stdin is not None
                run.process.stdin.write(some)
                run.process.stdin.flush()
            if fired < kills:
                moment = moments[fired]
                has_born = fired > unborn  # so that not all are killed before a store
                if moment > 0 and has_born and not path.exists() and random.random() < 0.5:
                    # Reading takes an instant only, which chance would hardly meet.
                    await_event(run, lambda event: event["event"] == "reading")
                    time.sleep(random.uniform(0, 0.1))
                elif moment > 0:
                    # By chunks and not by the clock, which goes wrong on a busy machine.
                    enough = moment * reference.store.chunk_count
                    await_event(run, lambda _, run=run, n=enough: len(run.computed()) >= n)
                    time.sleep(random.uniform(0, 0.1))
                else:
                    time.sleep((moment + 0.5) * 2 * reference.seconds_to_start)
                kill_coordinator(run)
            run.finish()
            complete = run.process.returncode == 0
            if not complete:
                assert run.process.returncode == -signal.SIGKILL, (SEED, fired)
                # It may have said all, and be on its way out.
                assert not run.of("run_summary") or Store(path).present().all()
                fired += 1
                unborn += not path.exists()
            assert not before & set(run.computed()), (SEED, "what was done was done again")
            if path.exists():  # then it is whole
                now = finished_chunks(Store(path))
                assert {name: now[name] for name in finished} == finished, (SEED, fired)
                finished = now
        assert_nothing_lost(Store(path), reference.store)
        stores += 1
        # What the killed were still reading into is gone.
        assert sorted(os.listdir(tmp_path)) == sorted(f"{n}.zarr" for n in range(stores))
    assert 0 < unborn < fired
    report(capsys, f"{fired} coordinators killed, {unborn} before a store", stores, reference)


def kill_coordinator(run: Run) -> None:
    """Kill a coordinator, if it still runs, and see its workers end by themselves."""
    # Stopped first, so that it starts no further process while its descendants are counted.
    run.process.send_signal(signal.SIGSTOP)
    if run.process.poll() is not None:
        return
    descendants = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.wait()
    if descendants:
        await_end({process.pid for process in descendants})


# --- schedulers and workers that run already ---


@contextmanager
def attachable(folder: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A scheduler, its file, and two workers, each by a command of its own."""
    file = folder / "scheduler.json"

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        whole = [sys.executable, "-m", "dask", *map(str, arguments), "--scheduler-file", str(file)]
        return subprocess.Popen(whole, stderr=subprocess.DEVNULL, start_new_session=True)

    listen = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0")
    processes = [start("scheduler", *listen), *(start("worker", "--nthreads", 2) for _ in range(2))]
    try:
        while not file.exists() or not file.read_text():
            assert processes[0].poll() is None
            time.sleep(0.05)
        yield file, processes[0]
    finally:
        # Not SIGTERM: Dask's worker may wait for ever if it comes while it starts (2026.7.1).
        for process in processes:
            with suppress(ProcessLookupError):  # a command that is done, its worker too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("kills", times(1, 20))
@pytest.mark.slow
def test_schedulers_killed_at_random_are_clear_errors_and_lose_nothing(
    kills: int,
    peptides: Path,
    reference: Uninterrupted,
    tmp_path: Path,
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(SEED)
    fired = stores = 0
    while fired < kills:
        path, finished = tmp_path / f"{stores}.zarr", {}
        complete = False
        while not complete and fired < kills:
            with attachable(tmp_path) as (file, scheduler):
                what = ("run", peptides, path, *IDENTITY, "--cluster", file)
                run = Run(*what, stderr=subprocess.PIPE)
                # Or its end, if the last scheduler was killed when all chunks were there.
                await_event(run, lambda event: event["event"] == "workers_changed")
                reader = followed(run)
                reader.join(random.uniform(0, reference.seconds / 2))
                scheduler.kill()
                assert scheduler.wait() == -signal.SIGKILL
                reader.join()
            complete = run.process.returncode == 0
            if not complete:
                assert run.process.stderr is not None
                assert (run.process.returncode, run.process.stderr.read()) == (
                    4,
                    "error: the scheduler was lost. Finished chunks are safe; `resume` goes on\n",
                ), (SEED, fired, run.events[-10:])
                fired += 1
            now = finished_chunks(Store(path))
            assert {name: now[name] for name in finished} == finished, (SEED, fired)
            finished = now
        assert virnuc_dask.resume(path, client=client).exit_code == 0
        assert finished.items() <= finished_chunks(Store(path)).items(), (SEED, fired)
        assert_nothing_lost(Store(path), reference.store)
        stores += 1
    report(capsys, f"{fired} schedulers killed", stores, reference)


def test_a_dask_worker_command_that_is_told_to_end_leaves_its_chunks_to_another(
    peptides: Path, make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = tmp_path / "some.faa"
    some.write_text("".join(peptides.read_text().splitlines(keepends=True)[:24]))
    alone = make_store(some, "alone.zarr", rows_per_chunk=1)
    # Workers do a row and are held, so that this one has begun another when its time comes.
    table = tmp_path / "faults.json"
    seen: list[events.Event] = []
    told: list[psutil.Process] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.ChunkDone) and not told:
            told.append(psutil.Process(event.pid).parent())
            told[0].terminate()
        if isinstance(event, events.WorkerLost):
            faults.release(table)

    with ExitStack() as stack:
        with holding_after(monkeypatch, table, 1):
            file, _ = stack.enter_context(attachable(tmp_path))
        with connect(str(file)) as client:
            client.wait_for_workers(2)
        summary = virnuc_dask.run(
            some,
            tmp_path / "out.zarr",
            model="demo",
            cluster=str(file),
            config=RunConfig(in_flight=8),
            listener=listen,
            repr_layer=0,
            rows_per_chunk=1,
        )
        # What it had begun it goes on with, beside the worker that has it now.
        assert told[0].wait(timeout=60) is not None
    assert_computed_elsewhere(seen, summary)
    assert_nothing_lost(Store(tmp_path / "out.zarr"), alone)
