"""SIGKILL before every system call by which a store changes: nothing is ever half there.

Real processes, killed by the kernel on strace's word.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Maker, chunk_bytes, tree
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks
from nursery import Nursery

import virnuc_dask
from virnuc_dask.store.store import Store

SETTINGS = {"rows_per_chunk": 4, "repr_layer": 0, "per_residue": True}
VALUES_PER_CHUNK = 16 * 64
# Chunk 0 has two chunks of 16 slots, chunk 1 holds nothing but NaN, chunk 2 is short.
PEPTIDES = (
    *("MKTAYIAKQRQISFVKSHFSRQ", "MKV", "", "MKTAYI"),
    *("M1", "MK*V", "M2V", "MKT3"),
    *("MKTAYIAKQR", "MJJ"),
)

# --- system calls ---

CHANGING = "openat,mkdir,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,unlink"
TRACE = ("-e", f"trace={CHANGING},read")


@dataclass(frozen=True)
class Call:
    """A system call: the `number`th of its name in its thread, counted from 1.

    It may be the first of all threads' to have that number, or not.
    """

    name: str
    number: int
    in_main_thread: bool
    arguments: str = field(compare=False)
    is_first: bool = field(compare=False)

    def inject(self, what: str) -> tuple[str, ...]:
        """Options for strace, which counts in every thread that it follows."""
        follow = () if self.in_main_thread else ("-f",)
        return *follow, *TRACE, "-e", f"inject={self.name}:{what}:when={self.number}"


def calls(log: Path, place: Path) -> list[Call]:
    """Calls about a directory or anything in it, in order; a store's is reached by descriptor."""
    lines = log.read_text().splitlines()
    main = lines[0].partition("---")[0].strip()  # without -f there is no thread's number
    numbers: Counter[tuple[str, str]] = Counter()
    most: Counter[str] = Counter()
    found = []
    for line in lines:
        if match := re.match(r"(\d*) *(\w+)\((.*)", line):
            thread, name, arguments = match.groups()
            numbers[thread, name] += 1
            number = numbers[thread, name]
            is_first = number > most[name]
            most[name] = max(most[name], number)
            if str(place) in arguments or "/proc/self/fd/" in arguments:
                found.append(Call(name, number, thread == main, arguments, is_first))
    return found


def changing(found: list[Call]) -> list[Call]:
    """Calls before which there is another state of the disk than before the one before."""
    return [c for c in found if c.name not in ("openat", "read") or "O_CREAT" in c.arguments]


# --- one chunk ---


@dataclass(frozen=True)
class Bench:
    """Everything a sweep needs: an empty store to copy, and what it should become."""

    folder: Path
    empty: Store
    whole: Store

    def fresh(self) -> Store:
        """Another empty store."""
        path = self.folder / "fresh.zarr"
        shutil.rmtree(path, ignore_errors=True)
        return Store(shutil.copytree(self.empty.path, path))

    @property
    def log(self) -> Path:
        return self.folder / "strace.log"


def embedding(store: Store, *chunks: int) -> str:
    return f"list(embed_chunks({str(store.path)!r}, {chunks}))"


@pytest.fixture
def bench(tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("virnuc_dask.store.create._RESIDUE_VALUES_PER_CHUNK", VALUES_PER_CHUNK)
    source = tmp_path / "some.faa"
    source.write_text("".join(f">p{n}\n{sequence}\n" for n, sequence in enumerate(PEPTIDES)))
    empty = make_store(source, "empty.zarr", embed=False, **SETTINGS)
    whole = make_store(source, "whole.zarr", **SETTINGS)
    assert len(whole.keys(0)) == 2 + 2
    return Bench(tmp_path, empty, whole)


def calls_of_a_chunk(nursery: Nursery, bench: Bench, chunk: int) -> list[Call]:
    """All that a task does to the store, in order."""
    store = bench.fresh()
    assert nursery.trace(embedding(store, chunk), bench.log, "-f", *TRACE) == 0
    return calls(bench.log, store.path)


def assert_nothing_is_half_there(store: Store, whole: Store, chunk: int) -> None:
    """Of what a task had written of a chunk when it ended, in whatever way."""
    expected = chunk_bytes(whole.path)
    there = [(store.path / key).exists() for key in store.keys(chunk)]
    assert there == sorted(there, reverse=True), "not in the order whose last is the commit"
    for key in store.keys(chunk):
        file = store.path / key
        assert not file.exists() or file.read_bytes() == expected[key], f"{key} is half there"
    assert store.is_present(chunk) == store.present()[chunk] == all(there)


def finish(nursery: Nursery, store: Store, whole: Store) -> None:
    """Whatever happened: all chunks asked for again make the store that nothing happened to."""
    before = finished_chunks(store)
    assert nursery.run(embedding(store, *range(store.chunk_count))) == 0
    assert store.present().all(), "a chunk that was written is not there"
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, whole)
    after = tree(store.path)
    assert {name: after[name] for name in before} == before
    assert nursery.run(embedding(store, *range(store.chunk_count))) == 0
    assert tree(store.path) == after


def check_deaths_in_a_chunk(nursery: Nursery, bench: Bench, chunk: int) -> None:
    for call in changing(calls_of_a_chunk(nursery, bench, chunk)):
        store = bench.fresh()
        assert nursery.trace(embedding(store, chunk), bench.log, *call.inject("signal=9")) == -9
        assert calls(bench.log, store.path)[-1] == call, "killed elsewhere"
        assert_nothing_is_half_there(store, bench.whole, chunk)
        finish(nursery, store, bench.whole)


def test_a_file_is_written_by_five_calls(nursery: Nursery, bench: Bench) -> None:
    """What the sweep below is about: if this changes, it must be looked at again."""
    expected = ["openat", "write", "fsync", "rename", "fsync"]
    found = [call.name for call in changing(calls_of_a_chunk(nursery, bench, 0))]
    while found[0] == "mkdir":  # of the store itself, as zarr opens it, which is there
        del found[0]
    assert found == expected * len(bench.whole.keys(0))


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.slow
def test_a_task_killed_before_any_of_its_calls_leaves_whole_files_only(
    chunk: int, nursery: Nursery, bench: Bench
) -> None:
    check_deaths_in_a_chunk(nursery, bench, chunk)


def test_a_resume_finishes_what_the_death_of_every_chunk_has_left(
    nursery: Nursery, bench: Bench, client: Any
) -> None:
    dice = random.Random(1)
    aims = [
        dice.choice(changing(calls_of_a_chunk(nursery, bench, chunk)))
        for chunk in range(bench.whole.chunk_count)
    ]
    store = bench.fresh()
    for chunk, call in enumerate(aims):
        assert nursery.trace(embedding(store, chunk), bench.log, *call.inject("signal=9")) == -9
        assert_nothing_is_half_there(store, bench.whole, chunk)
    assert not store.present().all()
    before = finished_chunks(store)
    summary = virnuc_dask.resume(store.path, client=client)
    assert summary.exit_code == 3  # complete; the peptides with digits are quarantined
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, bench.whole)
    after = tree(store.path)
    assert {name: after[name] for name in before} == before
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
    assert tree(store.path) == after


# --- a new store ---


def making(bench: Bench, path: Path) -> str:
    made = f"make({str(bench.folder / 'some.faa')!r}, {str(path)!r}, {SETTINGS})"
    return f"create._RESIDUE_VALUES_PER_CHUNK = {VALUES_PER_CHUNK}; {made}"


def content(path: Path) -> dict[str, bytes]:
    """Files of a store, without its date of birth and its own name."""
    return {
        name: re.sub(rb'"(created|id)": ".*?"', b"", found)
        for name, (_, _, found) in tree(path).items()
    }


def calls_of_an_ingest(nursery: Nursery, bench: Bench) -> list[Call]:
    path = bench.folder / "new" / "out.zarr"
    assert nursery.trace(making(bench, path), bench.log, "-f", *TRACE) == 0
    assert content(path) == content(bench.empty.path)
    found = changing(calls(bench.log, path.parent))
    # With two threads to follow, the one that comes first to a number is killed, wherever it is.
    return [call for call in found if call.in_main_thread or call.is_first]


def check_deaths_in_an_ingest(nursery: Nursery, bench: Bench, aims: list[Call]) -> None:
    path = bench.folder / "new" / "out.zarr"
    outcomes = Counter[str]()
    for call in aims:
        shutil.rmtree(path.parent, ignore_errors=True)
        assert nursery.trace(making(bench, path), bench.log, *call.inject("signal=9")) == -9
        assert calls(bench.log, path.parent)[-1] == call, "killed elsewhere"
        left = os.listdir(path.parent) if path.parent.exists() else []
        outcomes.update(name.rpartition(".")[2] for name in left)
        if path.exists():
            assert left == ["out.zarr"]
            assert content(path) == content(bench.empty.path)
        assert nursery.run(making(bench, path)) == 0
        assert os.listdir(path.parent) == ["out.zarr"]
        assert content(path) == content(bench.empty.path)
    # Nearly all died in the middle, and one when the store had just got its name.
    assert outcomes["ingest"] > len(aims) - 5
    assert outcomes["zarr"] == 1


def test_an_ingest_killed_anywhere_leaves_a_whole_store_or_none(
    nursery: Nursery, bench: Bench
) -> None:
    every = calls_of_an_ingest(nursery, bench)
    first_and_last = [*every[:2], *every[-2:]]
    check_deaths_in_an_ingest(
        nursery, bench, random.Random(2).sample(every[2:-2], 24) + first_and_last
    )


@pytest.mark.soak
def test_an_ingest_killed_everywhere_leaves_a_whole_store_or_none(
    nursery: Nursery, bench: Bench
) -> None:
    check_deaths_in_an_ingest(nursery, bench, calls_of_an_ingest(nursery, bench))
