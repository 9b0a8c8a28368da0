"""Runs, signals, kills and damage in any order, against a model of what the store must then be."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections import Counter
from enum import Enum, auto
from itertools import count
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import pytest
from conftest import AWKWARD
from harness import Run, assert_ledger, await_end, await_idle
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import virnuc_dask
from virnuc_dask import RunConfig
from virnuc_dask.errors import StoreError
from virnuc_dask.runtime import events
from virnuc_dask.store import status
from virnuc_dask.store.store import MIN_CHUNK_BYTES, Store

SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
CHUNKS = 12
ROWS_PER_CHUNK = 8
# All that a task may write, rows of all kinds, and a short last chunk.
SETTINGS: dict[str, Any] = {
    "model": "demo",
    "per_residue": True,
    "repr_layer": 0,
    "rows_per_chunk": ROWS_PER_CHUNK,
    "max_residues": 60,
}


class File(Enum):
    """What the model takes a file of a chunk for."""

    GONE = auto()
    GOOD = auto()
    DAMAGED = auto()
    SHORT = auto()  # too small for a chunk: to whoever lists, it is not there


class World:
    """What all examples share: the input, its embeddings, the workers, and what was done so far."""

    def __init__(self, peptides: Path, folder: Path, client: Any, kill_coordinators: bool) -> None:
        self.folder, self.client, self.kill_coordinators = folder, client, kill_coordinators
        self.inputs = folder / "input.faa"
        records = CHUNKS * ROWS_PER_CHUNK - 3
        lines = peptides.read_text().splitlines()[: 2 * (records - AWKWARD.count(">"))]
        self.inputs.write_text(AWKWARD + "\n".join(lines) + "\n")
        summary = virnuc_dask.run(self.inputs, folder / "whole.zarr", client=client, **SETTINGS)
        self.exit_code = summary.exit_code
        assert (summary.chunks, summary.complete) == (CHUNKS, True)
        self.reference = Store(folder / "whole.zarr")
        self.files = {chunk: self.reference.keys(chunk) for chunk in range(CHUNKS)}
        self.content = {
            name: (self.reference.path / name).read_bytes()
            for names in self.files.values()
            for name in names
        }
        self.faults: Counter[str] = Counter()
        self.rows_checked = 0


class Filling(RuleBasedStateMachine):
    """One store, from nothing to the end."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.path = world.folder / f"{uuid4().hex}.zarr"
        self.files = dict.fromkeys(world.content, File.GONE)
        self.strays: set[str] = set()
        self.never_touched: set[str] = set()
        self.writers: list[IO[str]] = []
        self.partials_may_be_left = False

    # --- the model ---

    def states(self, chunk: int) -> list[File]:
        return [self.files[name] for name in self.world.files[chunk]]

    def present(self) -> set[int]:
        """Chunks that a listing takes for done."""
        return {c for c in range(CHUNKS) if {*self.states(c)} <= {File.GOOD, File.DAMAGED}}

    def absent(self) -> set[int]:
        """Chunks that have no file at all."""
        return {c for c in range(CHUNKS) if {*self.states(c)} == {File.GONE}}

    def bad(self) -> set[int]:
        """Chunks that have a file, and not all of them whole."""
        good = {c for c in range(CHUNKS) if {*self.states(c)} == {File.GOOD}}
        return set(range(CHUNKS)) - good - self.absent()

    def put(self, chunks: set[int], state: File) -> None:
        self.files.update((name, state) for c in chunks for name in self.world.files[c])

    def are_repaired(self) -> None:
        self.put(self.bad(), File.GONE)
        self.strays = {name for name in self.strays if "/" not in name}
        self.partials_may_be_left = False

    def take_stock(self, chunks: set[int]) -> None:
        """What was under way when its process was killed may be done, begun or not."""
        for chunk in chunks:
            for name in self.world.files[chunk]:
                file = self.path / name
                if file.is_file() and file.read_bytes() == self.world.content[name]:
                    self.files[name] = File.GOOD

    # --- what may happen ---

    @rule(
        from_input=st.booleans(),
        verify=st.booleans(),
        interrupt_after=st.none() | st.integers(0, CHUNKS),
        number=st.sampled_from([signal.SIGINT, signal.SIGTERM]),
        kill_after=st.sets(st.integers(1, CHUNKS), max_size=2),
    )
    def fill(
        self,
        from_input: bool,
        verify: bool,
        interrupt_after: int | None,
        number: signal.Signals,
        kill_after: set[int],
    ) -> None:
        """A run or a resume; a signal comes after some chunks, workers are killed after some."""
        from_input = from_input or not self.path.exists()
        if verify:
            self.are_repaired()
        todo = set(range(CHUNKS)) - self.present()
        # Within what there is to do, or it would seldom come to that.
        kills = {1 + after % len(todo) for after in kill_after} if todo else set()
        if interrupt_after is not None:
            interrupt_after %= len(todo) + 1
        damaged = {c for c in self.present() if self.files[self.world.files[c][0]] is File.DAMAGED}
        done: list[events.ChunkDone] = []
        killed: set[int] = set()
        interrupted = False

        def listen(event: events.Event) -> None:
            nonlocal interrupted
            if isinstance(event, events.ChunkDone):
                done.append(event)
                if len(done) in kills and event.pid not in killed:
                    os.kill(event.pid, signal.SIGKILL)
                    killed.add(event.pid)
            if (
                isinstance(event, events.ChunkDone | events.WorkersChanged)
                and len(done) == interrupt_after
                and not interrupted
            ):
                interrupted = True
                os.kill(os.getpid(), number)

        def go() -> virnuc_dask.RunSummary:
            options: dict[str, Any] = {
                "client": self.world.client,
                "config": RunConfig(verify=verify),
                "listener": listen,
                "progress": False,
                "allow_incomplete": True,
            }
            if from_input:
                return virnuc_dask.run(self.world.inputs, self.path, **options, **SETTINGS)
            return virnuc_dask.resume(self.path, **options)

        if damaged:
            # Its rows cannot be counted, which the end of a run must not pass over.
            with pytest.raises(StoreError, match="status of chunk"):
                go()
        else:
            summary = go()
            # A chunk that is taken back while a worker begins it is written, but not reported.
            assert summary.complete == (len(done) == len(todo)) or (interrupted and killed)
            assert summary.complete or len(done) < len(todo)
            assert summary.exit_code == (self.world.exit_code if summary.complete else 128 + number)
            assert sum(summary.counts.values()) == self.world.reference.records
            assert summary.workers_lost <= len(killed)
        chunks = [event.chunk for event in done]
        assert len(set(chunks)) == len(chunks)
        assert set(chunks) <= todo
        assert set(chunks) == todo or interrupted
        # Written and not reported when its worker died: found done by the next.
        assert all(event.computed for event in done) or killed
        self.put(set(chunks), File.GOOD)
        if killed:
            await_end(killed)
            # A signal takes back the chunk of a worker that died. Another worker may have begun it
            # a moment before, and then still writes it after the run has ended.
            await_idle(self.world.client)
            self.take_stock(todo - set(chunks))
            self.partials_may_be_left = True
        self.world.faults["workers killed"] += len(killed)
        self.world.faults["interruptions"] += interrupted

    @precondition(
        lambda self: (
            self.world.kill_coordinators and self.path.exists() and len(self.present()) < CHUNKS
        )
    )
    @rule(after=st.integers(0, CHUNKS), attached=st.booleans())
    def kill_coordinator(self, after: int, attached: bool) -> None:
        """SIGKILL for a resume on workers of its own, which die too, or on those of others."""
        todo = set(range(CHUNKS)) - self.present()
        after %= len(todo)
        address = self.world.client.scheduler.address
        cluster = ("--cluster", address) if attached else ("--workers", 1)
        run = Run("resume", self.path, *cluster)
        workers: set[int] = set()
        for event in run:
            if event["event"] == "chunk_done":
                workers.add(event["pid"])
            if len(run.of("chunk_done")) == after and run.of("workers_changed"):
                run.process.kill()
                break
        code = run.finish()
        if code != -signal.SIGKILL:
            damaged = {self.files[self.world.files[c][0]] for c in self.present() - todo}
            assert code == (4 if File.DAMAGED in damaged else self.world.exit_code)
        elif attached:
            await_idle(self.world.client)
        elif workers:
            await_end(workers)
        done = {event["chunk"] for event in run.of("chunk_done")}
        assert done <= todo
        self.take_stock(todo)
        assert done <= self.present() - self.bad()
        self.partials_may_be_left |= code == -signal.SIGKILL
        self.world.faults["coordinators killed"] += code == -signal.SIGKILL

    @precondition(lambda self: File.GOOD in self.files.values())
    @rule(
        which=st.integers(0, 3 * CHUNKS),
        how=st.sampled_from(["flip", "cut", "zero", "delete"]),
        where=st.integers(0, 2**20),
    )
    def damage(self, which: int, how: str, where: int) -> None:
        good = [name for name, state in self.files.items() if state is File.GOOD]
        name = good[which % len(good)]
        file = self.path / name
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[where // 8 % len(content)] ^= 1 << where % 8
        elif how == "cut":
            del content[where % len(content) :]
        elif how == "zero":
            content = bytearray(len(content))
        if how == "delete":
            file.unlink()
            self.files[name] = File.GONE
        else:
            file.write_bytes(content)
            self.files[name] = File.DAMAGED if len(content) >= MIN_CHUNK_BYTES else File.SHORT
        self.world.faults["files damaged"] += 1

    @precondition(lambda self: self.path.exists())
    @rule(
        name=st.sampled_from(
            [
                "embedding/c.0.0~{host}~1~{unique}.partial",
                "embedding/locked~{host}~1~{unique}.partial",
                "residue_embedding/c.{unique}.0",
                "status/c.00",
                "notes-{unique}.txt",
            ]
        )
    )
    def add_stray(self, name: str) -> None:
        name = name.format(host=socket.gethostname(), unique=uuid4().hex)
        (self.path / name).write_bytes(b"not a chunk, though long enough")
        if "locked" in name:
            self.writers.append((self.path / name).open())
            fcntl.flock(self.writers[-1], fcntl.LOCK_EX)
        (self.never_touched if "locked" in name else self.strays).add(name)
        self.world.faults["strays"] += 1

    @precondition(lambda self: self.path.exists())
    @rule()
    def repair(self) -> None:
        report = virnuc_dask.verify(self.path, repair=True)
        assert set(report.bad) == self.bad()
        self.are_repaired()

    # --- what must hold ---

    @invariant()
    def store_is_as_the_model_says(self) -> None:
        if not self.path.exists():
            return
        found = status.status(self.path).present
        assert {int(chunk) for chunk in found.nonzero()[0]} == self.present()
        report = virnuc_dask.verify(self.path)
        assert set(report.bad) == self.bad()
        assert report.missing == len(self.absent())
        assert report.checked == CHUNKS - len(self.absent())
        assert report.sequences is None
        leftovers = {str(Path(file).relative_to(self.path)) for file in report.leftovers}
        assert self.strays <= leftovers
        more = leftovers - self.strays
        assert not more or self.partials_may_be_left
        assert all(name.endswith(".partial") for name in more)
        assert all((self.path / name).exists() for name in self.never_touched)
        for name, state in self.files.items():
            assert (self.path / name).exists() == (state is not File.GONE)
            if state is File.GOOD:
                assert (self.path / name).read_bytes() == self.world.content[name]
        good = self.present() - self.bad()
        self.world.rows_checked += self.world.reference.rows_in(good)

    def teardown(self) -> None:
        """Repaired and resumed, whatever happened to it, the store is as if nothing had."""
        self.fill(True, True, None, signal.SIGINT, set())
        for name in self.strays | self.never_touched:
            (self.path / name).unlink()
        for writer in self.writers:
            writer.close()
        assert_ledger(Store(self.path), self.world.reference)
        self.world.rows_checked += self.world.reference.records


@pytest.mark.parametrize(
    ("minutes", "examples", "steps"),
    [
        (0, 5, 8),
        pytest.param(
            SOAK_MINUTES,
            10,
            20,
            marks=[pytest.mark.soak, pytest.mark.timeout(60 * SOAK_MINUTES + 1_200)],
        ),
    ],
)
@pytest.mark.slow
def test_whatever_happens_to_a_store_in_whatever_order_it_ends_whole(
    minutes: float,
    examples: int,
    steps: int,
    peptides: Path,
    tmp_path: Path,
    client: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(peptides, tmp_path, client, kill_coordinators=minutes > 0)
    until = time.monotonic() + 60 * minutes
    # Each example is real processes and real kills: shrinking one would take hours.
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    for number in count(1):
        run_state_machine_as_test(seed(number)(lambda: Filling(world)), settings=chosen)
        if time.monotonic() >= until:
            break
    client.wait_for_workers(2, timeout=60)
    wanted = {"workers killed", "interruptions", "files damaged", "strays"}
    assert wanted | ({"coordinators killed"} if minutes else set()) <= set(+world.faults)
    with capsys.disabled():
        print(
            f"\n{', '.join(f'{n:,} {what}' for what, n in sorted(world.faults.items()))};"
            f" {world.rows_checked:,} rows checked, 0 lost; seeds 1 to {number}"
        )
