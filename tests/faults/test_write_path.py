"""SIGKILL before every system call by which a store changes: nothing is ever half there.

Real processes, killed by the kernel on strace's word. They are forked from one that has loaded
everything, so that a death takes a tenth of a second and the sweep can be exhaustive.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Maker, chunk_bytes, tree
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks

import virnuc_dask
from virnuc_dask.store import Store

SETTINGS = {"rows_per_chunk": 4, "repr_layer": 0, "per_residue": True}
VALUES_PER_CHUNK = 16 * 64
# Chunk 0 has two chunks of 16 slots, chunk 1 holds nothing but NaN, chunk 2 is short.
PEPTIDES = (
    *("MKTAYIAKQRQISFVKSHFSRQ", "MKV", "", "MKTAYI"),
    *("M1", "MK*V", "M2V", "MKT3"),
    *("MKTAYIAKQR", "MJJ"),
)

# --- processes to kill ---

SERVER = """
import ctypes, functools, os, signal, sys, tempfile, traceback
import torch, zarr
from virnuc_dask import embed, files, ingest, prepare, store
from virnuc_dask.config import Settings
from virnuc_dask.weights import describe, load_checkpoint

# One thread opens and writes all of zarr's files: a call's number is the same each time.
zarr.config.set({"threading.max_workers": 1})
torch.set_num_threads(1)
MODEL = describe(load_checkpoint("demo"), repr_layer=0)


def embed_chunks(path, chunks):
    identity = store.Store(path).identity
    for chunk in chunks:
        embed.embed_chunk(path, chunk, identity, MODEL)
        yield chunk


def make(source, path, settings):
    prepare.prepare(source, path, Settings(**settings), lambda event: None)


# Once, so that no other files are left to be read.
prepare.version = functools.cache(prepare.version)
with tempfile.TemporaryDirectory() as folder:
    source, path = os.path.join(folder, "a.faa"), os.path.join(folder, "a.zarr")
    with open(source, "w") as file:
        file.write(">a\\nMKV\\n")
    make(source, path, {"repr_layer": 0})
    list(embed_chunks(path, [0]))
exec(sys.argv[1])
print("ready", flush=True)
for job in sys.stdin:
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no longer than the server
        ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # may be traced by anyone
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            exec(job)
            code = 0
        except OSError as error:
            code = error.errno
        except BaseException:
            traceback.print_exc()
            code = 255
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Forks processes that have everything loaded and are stopped right before a job.

    Parameters
    ----------
    mutation : str
        Statements that spoil the code under test, for the tests of the tests.
    """

    def __init__(self, mutation: str = "") -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, mutation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def start(self, job: str) -> int:
        """Fork a process for one job; it waits for SIGCONT."""
        assert self._server.stdin is not None
        self._server.stdin.write(job + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def end(self) -> int:
        """Exit code of the process: 0, the errno of its OSError, or minus the signal."""
        return int(self._answer())

    def run(self, job: str) -> int:
        pid = self.start(job)
        wait_until_stopped(pid)
        os.kill(pid, signal.SIGCONT)
        return self.end()

    def trace(self, job: str, log: Path, *options: str) -> int:
        """Run a job under strace."""
        log.unlink(missing_ok=True)
        pid = self.start(job)
        arguments = ["-y", "-qq", "-o", str(log), "-p", str(pid), *options]
        strace = subprocess.Popen(["strace", *arguments])
        wait_for(lambda: log.exists() and "stopped by SIGSTOP" in log.read_text())
        os.kill(pid, signal.SIGCONT)
        code = self.end()
        assert strace.wait(timeout=60) == 0
        return code


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_until_stopped(pid: int) -> None:
    """Until no thread of a process runs, in user code or in the kernel."""

    def stopped() -> bool:
        threads = Path(f"/proc/{pid}/task").glob("*/stat")
        return {t.read_text().rpartition(")")[2].split()[0] for t in threads} <= {"T", "t"}

    wait_for(stopped)


def skip_without_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: nothing was killed at its system calls")
    probe = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"processes may not be traced here: {probe.stderr.decode().strip()}")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    skip_without_strace()
    with Nursery() as started:
        yield started


@pytest.fixture
def soak(pytestconfig: pytest.Config) -> None:
    if "soak" not in str(pytestconfig.getoption("-m")):
        pytest.skip("takes minutes: asked for by -m soak")


# --- system calls ---

CHANGING = "openat,mkdir,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,unlink"
TRACE = ("-e", f"trace={CHANGING},read")


@dataclass(frozen=True)
class Call:
    """A system call: the `number`th of its name in its thread, counted from 1."""

    name: str
    number: int
    in_main_thread: bool
    arguments: str = field(compare=False)

    def inject(self, what: str) -> tuple[str, ...]:
        """Options for strace, which counts in every thread that it follows."""
        follow = () if self.in_main_thread else ("-f",)
        return *follow, *TRACE, "-e", f"inject={self.name}:{what}:when={self.number}"


def calls(log: Path, place: Path) -> list[Call]:
    """Calls about a directory or anything in it, in order."""
    lines = log.read_text().splitlines()
    main = lines[0].partition("---")[0].strip()  # without -f there is no thread's number
    numbers: Counter[tuple[str, str]] = Counter()
    found = []
    for line in lines:
        if match := re.match(r"(\d*) *(\w+)\((.*)", line):
            thread, name, arguments = match.groups()
            numbers[thread, name] += 1
            if str(place) in arguments:
                found.append(Call(name, numbers[thread, name], thread == main, arguments))
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
    monkeypatch.setattr("virnuc_dask.ingest._RESIDUE_VALUES_PER_CHUNK", VALUES_PER_CHUNK)
    source = tmp_path / "some.faa"
    source.write_text("".join(f">p{n}\n{sequence}\n" for n, sequence in enumerate(PEPTIDES)))
    empty = make_store(source, "empty.zarr", embed=False, **SETTINGS)
    whole = make_store(source, "whole.zarr", **SETTINGS)
    assert len(whole.files(0)) == 2 + 2
    return Bench(tmp_path, empty, whole)


def calls_of_a_chunk(nursery: Nursery, bench: Bench, chunk: int) -> list[Call]:
    """All that a task does to the store, in order."""
    store = bench.fresh()
    assert nursery.trace(embedding(store, chunk), bench.log, "-f", *TRACE) == 0
    return calls(bench.log, store.path)


def assert_nothing_is_half_there(store: Store, whole: Store, chunk: int) -> None:
    """Of what a task had written of a chunk when it ended, in whatever way."""
    expected = chunk_bytes(whole.path)
    there = [file.exists() for file in store.files(chunk)]
    assert there == sorted(there, reverse=True), "not in the order whose last is the commit"
    for file in store.files(chunk):
        name = str(file.relative_to(store.path))
        assert not file.exists() or file.read_bytes() == expected[name], f"{name} is half there"
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
    assert found == expected * len(bench.whole.files(0))


@pytest.mark.parametrize("chunk", [0, 1, 2])
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
    return f"ingest._RESIDUE_VALUES_PER_CHUNK = {VALUES_PER_CHUNK}; {made}"


def content(path: Path) -> dict[str, bytes]:
    """Files of a store, without its date of birth."""
    return {
        name: re.sub(rb'"created": ".*?"', b"", found) for name, (_, _, found) in tree(path).items()
    }


def calls_of_an_ingest(nursery: Nursery, bench: Bench) -> list[Call]:
    path = bench.folder / "new" / "out.zarr"
    assert nursery.trace(making(bench, path), bench.log, "-f", *TRACE) == 0
    assert content(path) == content(bench.empty.path)
    found = changing(calls(bench.log, path.parent))
    # With two threads to follow, the one that comes first to a number is killed.
    first: dict[tuple[str, int], Call] = {}
    for call in found:
        first.setdefault((call.name, call.number), call)
    return [call for call in found if call.in_main_thread or call in first.values()]


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
@pytest.mark.usefixtures("soak")
def test_an_ingest_killed_everywhere_leaves_a_whole_store_or_none(
    nursery: Nursery, bench: Bench
) -> None:
    check_deaths_in_an_ingest(nursery, bench, calls_of_an_ingest(nursery, bench))
