"""SIGKILL before every system call by which a store changes: nothing is ever half there.

Real processes, killed by the kernel on strace's word.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks
from killed_writes import (
    SETTINGS,
    TRACE,
    VALUES_PER_CHUNK,
    Bench,
    Call,
    assert_nothing_is_half_there,
    calls,
    calls_of_a_chunk,
    changing,
    check_deaths_in_a_chunk,
    embedding,
)
from nursery import Nursery

import virnuc_dask


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


def test_a_call_that_strace_tells_of_two_threads_is_of_the_first(tmp_path: Path) -> None:
    """As strace 6.1 wrote it once: the second thread had only waited, and was killed as well."""
    call = f'openat(AT_FDCWD</>, "{tmp_path}/zarr.json.partial", O_WRONLY|O_CREAT'
    lines = [
        "10 --- SIGCONT ---",
        f"11 {call}) = 3",
        f"12 {call} <unfinished ...>",
        f"11 {call} <unfinished ...>",
        "12 <... openat resumed>) = ?",
        "11 +++ killed by SIGKILL +++",
    ]
    log = tmp_path / "strace.log"
    log.write_text("\n".join(lines))
    assert len(calls(log, tmp_path)) == 2
    lines[-1] = "11 <... openat resumed>) = 4"  # it did call
    log.write_text("\n".join(lines))
    assert len(calls(log, tmp_path)) == 3


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
        assert os.listdir(path.parent) == ["out.zarr"], call
        assert content(path) == content(bench.empty.path)
    # Nearly all died in the middle; some before their directory was locked and got its name, some
    # before there was one, and some when the store had just got its name.
    assert outcomes["ingest"] >= len(aims) - 6
    assert 1 <= outcomes["new"] <= 2
    assert 1 <= outcomes["zarr"] <= 2


def test_an_ingest_killed_anywhere_leaves_a_whole_store_or_none(
    nursery: Nursery, bench: Bench
) -> None:
    every = calls_of_an_ingest(nursery, bench)
    # Before it has its first directory, and before that is locked and named; and its last calls.
    first_and_last = [*every[:3], *every[-2:]]
    check_deaths_in_an_ingest(
        nursery, bench, random.Random(2).sample(every[3:-2], 24) + first_and_last
    )


@pytest.mark.soak
def test_an_ingest_killed_everywhere_leaves_a_whole_store_or_none(
    nursery: Nursery, bench: Bench
) -> None:
    check_deaths_in_an_ingest(nursery, bench, calls_of_an_ingest(nursery, bench))
