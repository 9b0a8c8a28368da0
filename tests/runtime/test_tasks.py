"""A store that is filled by tasks in anybody's own graph, on each of Dask's schedulers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import faults
import numpy as np
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from clusters import started_cluster
from conftest import VIRAL_PROTEINS, Maker, tree
from distributed import Client, KilledWorker, LocalCluster, wait
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks
from models import random_network, save_network
from xopen import xopen

import virnuc_dask
from virnuc_dask.errors import InputError, UnfitWorkerError, UsageError
from virnuc_dask.runtime import requirements
from virnuc_dask.settings import Status
from virnuc_dask.store.directory import Directory
from virnuc_dask.store.store import Store

# Layer 0 is quick, and the same whatever the threads.
SETTINGS: dict[str, Any] = {"model": "demo", "repr_layer": 0, "rows_per_chunk": 32}
CHUNKS = 10


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """With sequences and no embedding."""
    virnuc_dask.create_store(VIRAL_PROTEINS, tmp_path / "out.zarr", **SETTINGS)
    return tmp_path / "out.zarr"


@pytest.fixture
def uninterrupted(make_store: Maker) -> Store:
    return make_store(VIRAL_PROTEINS, "uninterrupted.zarr")


@contextmanager
def local_cluster(_folder: Path) -> Iterator[Client]:
    """Workers as people start them, and the client that `dask.compute` takes by default."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def attached(folder: Path) -> Iterator[Client]:
    """A worker without a nanny, of a scheduler that runs already."""
    with (
        started_cluster(folder, worker_options=("--no-nanny",)) as file,
        Client(scheduler_file=str(file)) as client,
    ):
        client.wait_for_workers(1, timeout=60)
        yield client


@pytest.mark.parametrize(
    "scheduler", ["threads", "synchronous", "processes", local_cluster, attached]
)
@pytest.mark.slow
def test_any_scheduler_completes_a_store(
    scheduler: Any, store: Path, uninterrupted: Store, tmp_path: Path
) -> None:
    tasks = virnuc_dask.tasks(store)
    assert len(tasks) == len({task.key for task in tasks}) == CHUNKS
    # By this name they are known in Dask's pictures and dashboards.
    assert {dask.utils.key_split(task.key) for task in tasks} == {"embed-chunk"}
    with ExitStack() as stack:
        if callable(scheduler):
            stack.enter_context(scheduler(tmp_path))
        else:
            stack.enter_context(dask.config.set(scheduler=scheduler))
        reports = dask.compute(*tasks)
        assert [report.chunk for report in reports] == list(range(CHUNKS))
        assert all(report.computed for report in reports)
        assert sum(report.rows for report in reports) == 300
        in_process = {report.pid for report in reports} == {os.getpid()}
        assert in_process == (scheduler in ("threads", "synchronous"))
        assert_ledger(Store(store), uninterrupted)
        before = tree(store)
        assert virnuc_dask.tasks(store) == []
        again = dask.compute(*tasks)  # what is there is left alone
        assert not any(report.computed for report in again)
    assert virnuc_dask.resume(store).computed_chunks == 0
    assert tree(store) == before


def test_a_store_of_translated_reads_with_residues(tmp_path: Path, client: Any) -> None:
    reads = tmp_path / "reads.fa"
    reads.write_text(">r\n" + "GCT" * 30 + "\n>s\n" + "AAC" * 40 + "\n")
    options = {**SETTINGS, "translation": virnuc_dask.Translation(), "per_residue": True}
    virnuc_dask.create_store(reads, tmp_path / "a.zarr", **options)
    dask.compute(*virnuc_dask.tasks(tmp_path / "a.zarr"), scheduler="threads")
    virnuc_dask.run(reads, tmp_path / "b.zarr", client=client, **options)
    assert_ledger(Store(tmp_path / "a.zarr"), Store(tmp_path / "b.zarr"))


def test_only_what_is_missing_has_a_task(store: Path, uninterrupted: Store) -> None:
    dask.compute(*virnuc_dask.tasks(store)[::2], scheduler="threads")
    done = finished_chunks(Store(store))
    tasks = virnuc_dask.tasks(store)
    assert [report.chunk for report in dask.compute(*tasks)] == [1, 3, 5, 7, 9]
    assert finished_chunks(Store(store)).items() >= done.items()
    (store / "embedding" / "c.3.0").write_bytes(b"damage, of so many bytes")
    assert virnuc_dask.verify(store, repair=True).bad.keys() == {3}
    (task,) = virnuc_dask.tasks(store)
    assert task.compute(scheduler="threads").computed
    assert_ledger(Store(store), uninterrupted)


def test_a_chunk_that_was_removed_is_computed_again_where_the_first_result_is_still_held(
    store: Path, client: Any
) -> None:
    held = client.compute(virnuc_dask.tasks(store))
    assert all(report.computed for report in client.gather(held))
    Store(store).remove_chunk(4)
    (again,) = client.gather(client.compute(virnuc_dask.tasks(store)))
    assert (again.chunk, again.computed) == (4, True)
    assert virnuc_dask.tasks(store) == []


def test_tasks_are_parts_of_larger_graphs(store: Path) -> None:
    @dask.delayed
    def mean(report: virnuc_dask.ChunkReport) -> Any:
        opened = virnuc_dask.open_store(store)
        return opened.embedding[report.chunk * 32 :][: report.rows].mean("sequence").values

    means = dask.compute(*map(mean, virnuc_dask.tasks(store)), scheduler="threads")
    assert np.isfinite(means).all()
    assert np.shape(means) == (CHUNKS, 64)


def make_again(store: Path) -> Path:
    """Another store of the same input, with nothing done, in the place of one."""
    shutil.rmtree(store)
    virnuc_dask.create_store(VIRAL_PROTEINS, store, **SETTINGS)
    return store


def test_tasks_write_into_no_other_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = virnuc_dask.tasks(store)
    before = tree(make_again(store))
    probed: list[Directory] = []
    monkeypatch.setattr(Directory, "probe", lambda self: probed.append(self))
    with pytest.raises(UnfitWorkerError, match=r"process \d+ of .*another store"):
        dask.compute(*tasks, scheduler="threads")
    assert tree(store) == before
    assert not probed  # not even a file that is removed at once


def test_a_worker_that_lacks_something_says_what(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "own.pt"
    save_network(random_network(2, 64, 4), weights)
    path = tmp_path / "out.zarr"
    virnuc_dask.create_store(VIRAL_PROTEINS, path, **(SETTINGS | {"model": str(weights)}))
    tasks = virnuc_dask.tasks(path)
    weights.rename(tmp_path / "moved.pt")
    before = tree(path)
    (address, *_) = client.nthreads()
    with pytest.raises(UnfitWorkerError, match=r"own\.pt") as caught:
        client.compute(tasks[0], workers=[address]).result()
    assert caught.value.worker == address
    with monkeypatch.context() as patch:
        patch.setattr(requirements, "__version__", "0.0.1")
        other = virnuc_dask.tasks(path, model=str(tmp_path / "moved.pt"))[0]
    with pytest.raises(UnfitWorkerError, match=r"virnuc_dask .*, this run 0\.0\.1"):
        other.compute(scheduler="threads")
    assert tree(path) == before
    # Where the weights are now may be said; others are refused.
    save_network(random_network(2, 64, 4, seed=2), weights)
    with pytest.raises(UnfitWorkerError, match="this worker has weights"):
        tasks[0].compute(scheduler="threads")
    moved = virnuc_dask.tasks(path, model=str(tmp_path / "moved.pt"))
    assert all(report.computed for report in dask.compute(*moved, scheduler="threads"))


def test_a_path_of_weights_is_good_in_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_network(random_network(2, 64, 4), Path("own.pt"))
    virnuc_dask.create_store(VIRAL_PROTEINS, "out.zarr", **(SETTINGS | {"model": "own.pt"}))
    tasks = [virnuc_dask.tasks("out.zarr")[0], virnuc_dask.tasks("out.zarr", model="own.pt")[1]]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert all(report.computed for report in dask.compute(*tasks, scheduler="threads"))


@pytest.mark.slow
def test_two_stores_may_share_a_graph(
    store: Path, uninterrupted: Store, tmp_path: Path, client: Any
) -> None:
    other = tmp_path / "other.zarr"
    virnuc_dask.create_store(VIRAL_PROTEINS, other, **SETTINGS, pooling="max")
    tasks = [*virnuc_dask.tasks(store), *virnuc_dask.tasks(other)]
    assert all(report.computed for report in dask.compute(*tasks, scheduler="threads"))
    assert_ledger(Store(store), uninterrupted)
    options = {**SETTINGS, "pooling": "max", "client": client}
    virnuc_dask.run(VIRAL_PROTEINS, tmp_path / "max.zarr", **options)
    assert_ledger(Store(other), Store(tmp_path / "max.zarr"))


@pytest.mark.parametrize("device", ["auto", "gpu", "nonsense"])
def test_a_device_that_does_not_exist_is_refused(device: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"device '{device}'"):
        virnuc_dask.create_store(VIRAL_PROTEINS, tmp_path / "a.zarr", **SETTINGS, device=device)
    with pytest.raises(UsageError, match=f"device '{device}'"):
        virnuc_dask.tasks(store, device=device)
    if device != "auto":  # which means something there
        config = virnuc_dask.RunConfig(device=device)
        with pytest.raises(UsageError, match=f"device '{device}'"):
            virnuc_dask.run(VIRAL_PROTEINS, tmp_path / "a.zarr", config=config, **SETTINGS)
    assert not (tmp_path / "a.zarr").exists()


def test_a_device_without_the_precision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    virnuc_dask.create_store(VIRAL_PROTEINS, path, **SETTINGS, precision="float16", device="cuda")
    with pytest.raises(UsageError, match="float16 needs a GPU"):
        virnuc_dask.tasks(path)


def test_what_cannot_be_a_store_is_said_before_anything_is_made(tmp_path: Path) -> None:
    bad = tmp_path / "bad.faa"
    bad.write_text(">a\nMKV\n>b\nMK>V\n")
    with pytest.raises(InputError, match=r"bad\.faa.*line 4") as caught:
        virnuc_dask.create_store(bad, tmp_path / "a.zarr", **SETTINGS)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="no store there"):
        virnuc_dask.tasks(tmp_path / "a.zarr")
    with pytest.raises(UsageError, match="pooling"):
        virnuc_dask.create_store(VIRAL_PROTEINS, tmp_path / "a.zarr", **SETTINGS, pooling="sum")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.faa"]


def test_a_store_that_is_there_must_be_of_the_same_settings(store: Path) -> None:
    before = tree(store)
    virnuc_dask.create_store(VIRAL_PROTEINS, store, **SETTINGS)
    with pytest.raises(UsageError, match="pooling"):
        virnuc_dask.create_store(VIRAL_PROTEINS, store, **SETTINGS, pooling="max")
    assert tree(store) == before


# In the middle of the 150th protein, and in no other.
ROW = 149


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | list[str]], Path]:
    """From the call on, what encodes one of the rows fares as it says; in workers started later."""

    def arm(action: str | list[str]) -> Path:
        with xopen(VIRAL_PROTEINS) as text:
            sequences = [sequence for _, sequence in SimpleFastaParser(text)]
        motif = sequences[ROW][20:40]
        assert [row for row, sequence in enumerate(sequences) if motif in sequence] == [ROW]
        (tmp_path / "faults.json").write_text(json.dumps({motif: action}))
        faults.arm(monkeypatch, tmp_path / "faults.json")
        return tmp_path / f"{motif}.met"

    return arm


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(
    store: Path, uninterrupted: Store, armed: Callable[[str | list[str]], Path], tmp_path: Path
) -> None:
    """Dask itself gives its tasks to others."""
    met = armed(["kill"])
    with local_cluster(tmp_path) as client:
        before = set(client.run(os.getpid).values())
        reports = dask.compute(*virnuc_dask.tasks(store))
        assert met.stat().st_size == 2  # it fired, and the chunk was tried again
        assert before - set(client.run(os.getpid).values())
    assert sum(report.rows for report in reports) == 300
    assert virnuc_dask.tasks(store) == []
    clear_partial_files_of_the_killed(Store(store))
    assert_ledger(Store(store), uninterrupted)
    before = tree(store)
    assert virnuc_dask.resume(store).computed_chunks == 0
    assert tree(store) == before


@pytest.mark.slow
def test_a_row_that_kills_is_found_by_resume(
    make_store: Maker, armed: Callable[[str | list[str]], Path], tmp_path: Path
) -> None:
    """Tasks alone end as Dask's do; a run knows better."""
    whole = make_store(VIRAL_PROTEINS, "whole.zarr", rows_per_chunk=4)
    store = make_store(VIRAL_PROTEINS, embed=False, rows_per_chunk=4)
    met = armed("kill")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        local_cluster(tmp_path) as client,
    ):
        futures = client.compute(virnuc_dask.tasks(store.path))
        with pytest.raises(KilledWorker):
            futures[ROW // 4].result()
        wait(futures)
    assert met.stat().st_size == 2
    clear_partial_files_of_the_killed(store)
    done = finished_chunks(store)
    assert done
    summary = virnuc_dask.resume(store.path, workers=1)
    assert summary.counts[Status.CRASHED_WORKER.meaning] == 1
    assert finished_chunks(store).items() >= done.items()
    found, expected = virnuc_dask.open_store(store.path), virnuc_dask.open_store(whole.path)
    innocent = np.arange(300) != ROW
    assert found.status.values[ROW] == Status.CRASHED_WORKER
    assert np.array_equal(found.status.values[innocent], expected.status.values[innocent])
    assert np.array_equal(found.embedding.values[innocent], expected.embedding.values[innocent])
    assert virnuc_dask.tasks(store.path) == []
