"""Tasks whose system calls are traced, killed or met by errors, and what they leave of a chunk."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Maker, chunk_bytes, tree
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks
from nursery import Nursery

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
    for at, line in enumerate(lines):
        if match := re.match(r"(\d*) *(\w+)\((.*)", line):
            thread, name, arguments = match.groups()
            if arguments.endswith("<unfinished ...>") and is_told_again(lines, at, thread):
                continue
            numbers[thread, name] += 1
            number = numbers[thread, name]
            is_first = number > most[name]
            most[name] = max(most[name], number)
            if str(place) in arguments or "/proc/self/fd/" in arguments:
                found.append(Call(name, number, thread == main, arguments, is_first))
    return found


def is_told_again(lines: list[str], at: int, thread: str) -> bool:
    """Whether a line is the one before it, of a thread that only waited when both were killed.

    Strace 6.1 sometimes writes such a line.
    """
    call = lines[at].removeprefix(thread)
    goes_on = any(later.startswith(f"{thread} <...") for later in lines[at:])
    return lines[at - 1].endswith(call) and not goes_on


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


def make_bench(folder: Path, make_store: Maker, patch: pytest.MonkeyPatch) -> Bench:
    patch.setattr("virnuc_dask.store.create._RESIDUE_VALUES_PER_CHUNK", VALUES_PER_CHUNK)
    source = folder / "some.faa"
    source.write_text("".join(f">p{n}\n{sequence}\n" for n, sequence in enumerate(PEPTIDES)))
    empty = make_store(source, "empty.zarr", embed=False, **SETTINGS)
    whole = make_store(source, "whole.zarr", **SETTINGS)
    assert len(whole.keys(0)) == 2 + 2
    return Bench(folder, empty, whole)


def embedding(store: Store, *chunks: int) -> str:
    return f"list(embed_chunks({str(store.path)!r}, {chunks}))"


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
