"""A store that takes another's place gets no row of it, and the other loses none."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import faults
import pytest
from clusters import started_cluster
from clusters import worker as another_worker
from conftest import VIRAL_PROTEINS, tree
from harness import Run, assert_ledger, await_end, await_held, await_idle, holding_after, program
from nursery import wait_for
from s3 import BUCKET, Server

import virnuc_dask
from virnuc_dask.errors import NotAStoreError, StoreReplacedError
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.runtime.embed import embed_chunk, embed_in_process
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import ModelSpec, Settings
from virnuc_dask.store import bucket
from virnuc_dask.store.directory import Held
from virnuc_dask.store.location import location_of
from virnuc_dask.store.store import Store

SAME: dict[str, Any] = {"model": "demo", "rows_per_chunk": 32, "repr_layer": 0}
OTHER: dict[str, Any] = SAME | {"pooling": "max"}


def make(path: Path | str, settings: dict[str, Any], inputs: Path = VIRAL_PROTEINS) -> ModelSpec:
    """A store in which nothing is computed yet."""
    return prepare(inputs, path, Settings(**settings), lambda _event: None)[1]


def fill(path: Path | str, model: ModelSpec) -> None:
    store = Store(path)
    for chunk in range(store.chunk_count):
        embed_chunk(str(path), chunk, store.identity, model)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("reference") / "out.zarr"
    fill(path, make(path, SAME))
    return Store(path)


def in_the_middle(
    monkeypatch: pytest.MonkeyPatch, moment: str, change: Callable[[], object]
) -> dict[str, Any]:
    """Arguments of `embed_chunk` with which the change comes at a moment of its work."""
    if moment == "computed":

        def embed(*arguments: Any) -> Any:
            rows = embed_in_process(*arguments)
            change()
            return rows

        return {"embed": embed}

    write = Store._write

    def slow_write(self: Store, name: str, *arguments: Any) -> None:
        if name == "embedding":
            change()
        write(self, name, *arguments)

    monkeypatch.setattr(Store, "_write", slow_write)
    return {}


# --- in a directory ---


@pytest.mark.parametrize("moment", ["computed", "half written"])
@pytest.mark.parametrize("how", ["same settings", "other settings", "link", "nothing"])
@pytest.mark.sweep
def test_a_chunk_stays_with_the_store_that_its_rows_came_from(
    how: str,
    moment: str,
    tmp_path: Path,
    reference: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, away, new = (tmp_path / name for name in ("out.zarr", "away.zarr", "new.zarr"))
    if how == "link":
        path.symlink_to(away)
    model = make(path, SAME)
    first = Store(path)
    fill(new, make(new, SAME if how == "same settings" else OTHER))
    Store(new).remove_chunk(1)
    before = tree(new)

    def change() -> None:
        if how == "link":
            path.unlink()
            path.symlink_to(new)
        else:
            path.rename(away)
        if "settings" in how:
            new.rename(path)

    taken = in_the_middle(monkeypatch, moment, change)
    assert embed_chunk(str(path), 1, first.identity, model, **taken, store_id=first.id).computed
    monkeypatch.undo()
    assert tree(new if how in ("link", "nothing") else path) == before
    # A task that begins later does not find its store, and says so.
    with pytest.raises(NotAStoreError if how == "nothing" else StoreReplacedError):
        embed_chunk(str(path), 2, first.identity, model, store_id=first.id)
    assert tree(new if how in ("link", "nothing") else path) == before
    with pytest.raises(StoreReplacedError, match="no longer there"):
        first.check_location()
    assert list(Store(away).present().nonzero()[0]) == [1]
    fill(away, model)
    assert_ledger(Store(away), reference)


@pytest.mark.parametrize("moment", ["computed", "half written"])
@pytest.mark.parametrize("settings", [SAME, OTHER, None], ids=["same", "other", "nothing"])
def test_a_store_that_was_removed_does_not_come_back(
    settings: dict[str, Any] | None,
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "out.zarr"
    model = make(path, SAME)
    first = Store(path)
    before: dict[str, Any] = {}

    def change() -> None:
        shutil.rmtree(path)
        if settings:
            make(path, settings)
            before.update(tree(path))

    taken = in_the_middle(monkeypatch, moment, change)
    with pytest.raises(FileNotFoundError) as error:
        embed_chunk(str(path), 1, first.identity, model, **taken, store_id=first.id)
    assert str(error.value.filename).startswith(str(path))  # and no descriptor's number
    assert tree(path) == before
    assert os.listdir(tmp_path) == ["out.zarr"] * bool(settings)


def test_where_a_directory_cannot_be_held_each_write_looks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems without /proc, which is imitated: none can be had here."""
    is_at = Held._is_at
    monkeypatch.setattr(
        Held, "_is_at", lambda self, path: "/proc" not in str(path) and is_at(self, path)
    )
    path = tmp_path / "out.zarr"
    model = make(path, SAME)
    first = Store(path)
    before: dict[str, Any] = {}

    def change() -> None:
        path.rename(tmp_path / "away.zarr")
        make(path, SAME)
        before.update(tree(path))

    taken = in_the_middle(monkeypatch, "computed", change)
    with pytest.raises(StoreReplacedError):
        embed_chunk(str(path), 1, first.identity, model, **taken, store_id=first.id)
    assert tree(path) == before
    embed_chunk(str(path), 1, first.identity, model)
    assert Store(path).is_present(1)


# --- in an object store ---


@pytest.fixture
def url(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place that nothing else uses."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}/{uuid4().hex}/out.zarr"
    bucket._client.cache_clear()


@pytest.mark.parametrize("moment", ["computed", "half written"])
@pytest.mark.parametrize("settings", [SAME, OTHER, None], ids=["same", "other", "nothing"])
@pytest.mark.sweep
def test_objects_too_go_into_no_other_store(
    settings: dict[str, Any] | None, moment: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(url, SAME)
    first = Store(url)
    before: dict[str, Any] = {}

    def change() -> None:
        location_of(url.removesuffix("/out.zarr")).remove("out.zarr")
        if settings:
            make(url, settings)
            before.update(tree(url))

    taken = in_the_middle(monkeypatch, moment, change)
    with pytest.raises(StoreReplacedError, match=url):
        embed_chunk(url, 1, first.identity, model, **taken, store_id=first.id)
    assert tree(url) == before
    with pytest.raises(StoreReplacedError if settings else NotAStoreError):
        embed_chunk(url, 2, first.identity, model, store_id=first.id)
    assert tree(url) == before
    with pytest.raises(StoreReplacedError):
        first.check_location()


# --- with real clusters ---


@pytest.fixture
def some(peptides: Path, tmp_path: Path) -> Path:
    """14 peptides."""
    file = tmp_path / "some.faa"
    file.write_text("".join(peptides.read_text().splitlines(keepends=True)[:28]))
    return file


@pytest.fixture
def slow(some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, each of which takes a second."""
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({"": "slow"}))
    faults.arm(monkeypatch, table)
    return some


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A scheduler's file, whose worker of one thread does a row and is held, and the table."""
    table = tmp_path / "faults.json"
    with ExitStack() as stack:
        with holding_after(monkeypatch, table, 1):
            file = stack.enter_context(started_cluster(tmp_path))
        yield file, table


QUICK = ("--model=demo", "--rows-per-chunk", 1, "--repr-layer", 0)
ONE_BY_ONE: dict[str, Any] = {"model": "demo", "rows_per_chunk": 1, "repr_layer": 0}


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL", "the scheduler's SIGKILL"])
@pytest.mark.slow
def test_what_an_interrupted_run_still_computes_is_written_into_no_other_store(
    end: str, some: Path, held: tuple[Path, Path], tmp_path: Path
) -> None:
    """The worker stands still with a chunk until another store is at the first one's path."""
    path, away = tmp_path / "out.zarr", tmp_path / "away.zarr"
    file, table = held
    with connect(str(file)) as client:
        client.wait_for_workers(1)
        (process,) = client.run(os.getpid).values()
        run = Run("run", some, path, *QUICK, "--cluster", file, "--grace", 0)
        for event in run:
            if event["event"] == "chunk_done":
                break
        await_held(table, 1)
        os.kill(process, signal.SIGSTOP)
        try:
            done = Store(path).present().sum()
            if end == "the scheduler's SIGKILL":
                os.kill(client.run_on_scheduler(os.getpid), signal.SIGKILL)
            else:
                run.process.send_signal(signal.Signals[end])
            assert run.finish() != 0
            path.rename(away)
            make(path, ONE_BY_ONE | {"pooling": "max"}, some)
            before = tree(path)
        finally:
            faults.release(table)
            os.kill(process, signal.SIGCONT)
        if end == "the scheduler's SIGKILL":
            await_end({process}, seconds=120)
        else:
            await_idle(client)
            assert Store(away).present().sum() > done  # the fault has fired: it went on, over there
    assert tree(path) == before
    assert virnuc_dask.verify(path).leftovers == []
    whole = tmp_path / "whole.zarr"
    for store in (whole, path):
        fill(store, make(store, ONE_BY_ONE | {"pooling": "max"}, some))
    assert_ledger(Store(path), Store(whole))


def test_nor_is_what_a_killed_runs_own_worker_computes(
    some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, away, table = (tmp_path / name for name in ("out.zarr", "away.zarr", "faults.json"))
    with holding_after(monkeypatch, table, 1):
        run = Run("run", some, path, *QUICK, "--workers", 1)
    for event in run:
        if event["event"] == "chunk_done":
            break
    process = event["pid"]
    await_held(table, 1)
    os.kill(process, signal.SIGSTOP)  # with the next chunk
    run.process.kill()
    assert run.process.wait() == -signal.SIGKILL  # the worker has its standard output still
    path.rename(away)
    make(path, ONE_BY_ONE | {"pooling": "max"}, some)
    before = tree(path)
    faults.release(table)
    os.kill(process, signal.SIGCONT)
    await_end({process})
    assert tree(path) == before


@pytest.mark.slow
def test_nor_is_it_put_into_another_store_in_a_bucket(
    some: Path, url: str, held: tuple[Path, Path]
) -> None:
    file, table = held
    with connect(str(file)) as client:
        client.wait_for_workers(1)
        (process,) = client.run(os.getpid).values()
        run = Run("run", some, url, *QUICK, "--cluster", file)
        for event in run:
            if event["event"] == "chunk_done":
                break
        await_held(table, 1)
        os.kill(process, signal.SIGSTOP)
        try:
            run.process.kill()
            assert run.finish() == -signal.SIGKILL
            location_of(url.removesuffix("/out.zarr")).remove("out.zarr")
            make(url, ONE_BY_ONE | {"pooling": "max"}, some)
            before = tree(url)
        finally:
            faults.release(table)
            os.kill(process, signal.SIGCONT)
        await_idle(client)
    assert tree(url) == before


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_chunks_that_no_worker_has_begun_with_are_not_begun_after_the_end(
    end: signal.Signals, some: Path, held: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "out.zarr"
    file, table = held

    # In here, so that they travel whole.
    def wanted(dask_scheduler: Any) -> int:
        return sum(bool(task.who_wants) for task in dask_scheduler.tasks.values())

    def unbegun(dask_worker: Any) -> int:
        return len(dask_worker.state.ready)

    with connect(str(file)) as client:
        client.wait_for_workers(1)
        command = ("run", some, path, *QUICK, "--cluster", file)
        run = Run(*command, program=program(in_flight=10))
        for event in run:
            if event["event"] == "chunk_done" and len(run.computed()) == 1:
                await_held(table, 1)  # its only thread is at the next
                run.process.send_signal(end)
            if event["event"] == "stopping":
                break
        wait_for(lambda: client.run_on_scheduler(wanted) <= 1)
        wait_for(lambda: not any(client.run(unbegun).values()))
        faults.release(table)
        assert run.finish() in (-end, 128 + end)
        await_idle(client)
        # What was done, and the one that it was at.
        assert Store(path).present().sum() == 2
        if end == signal.SIGTERM:
            assert run.of("stopping")[0]["running"] == 1


@pytest.mark.slow
def test_a_restart_by_somebody_else_costs_time_and_nothing_else(slow: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "out.zarr", tmp_path / "whole.zarr"
    with started_cluster(tmp_path) as file, another_worker(file), connect(str(file)) as client:
        client.wait_for_workers(2)
        before = set(client.run(os.getpid).values())
        run = Run("run", slow, path, *QUICK, "--cluster", file)
        for event in run:
            if event["event"] == "chunk_done" and len(run.computed()) == 1:
                client.restart()
        assert run.process.wait(timeout=60) == 0
        assert before.isdisjoint(client.run(os.getpid).values())  # it was one
    os.environ.pop(faults.VARIABLE)
    # Of those that were being computed some were written, and their reports were lost.
    assert {event["chunk"] for event in run.of("chunk_done")} == set(range(14))
    fill(whole, make(whole, ONE_BY_ONE, slow))
    assert_ledger(Store(path), Store(whole))
