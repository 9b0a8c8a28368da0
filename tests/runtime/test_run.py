"""The main line on real workers: what is computed, what is not, and what is said about it."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clusters import started_cluster
from conftest import AWKWARD, VIRAL_PROTEINS, Maker, tree
from distributed import Client, LocalCluster
from nursery import wait_for

import virnuc_dask
from virnuc_dask import IncompleteRunError, Tiling, Translation
from virnuc_dask.encoder.weights import load_checkpoint
from virnuc_dask.errors import InputError, ModelError, UsageError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.events import Listener
from virnuc_dask.runtime.plan import plan
from virnuc_dask.settings import RunConfig, Settings
from virnuc_dask.store import status, verify


@pytest.mark.slow
def test_rows_are_what_the_encoder_gives_in_the_order_of_the_input(
    tmp_path: Path, peptides: Path, client: Any
) -> None:
    summary = virnuc_dask.run(
        peptides, tmp_path / "a.zarr", model="demo", client=client, rows_per_chunk=500
    )
    assert (summary.exit_code, summary.complete) == (0, True)
    assert summary.counts == {"embedded": 2048, "truncated": 1}
    assert summary.computed_chunks == summary.chunks == 5
    data = virnuc_dask.open_store(tmp_path / "a.zarr")
    lines = peptides.read_text().splitlines()
    assert list(data.sequence_id.values) == [line[1:].split()[0] for line in lines[::2]]
    sample = np.random.default_rng(1).choice(2049, 40, replace=False)
    sequences = [lines[2 * row + 1][:1022] for row in sample]
    expected = virnuc_dask.load_encoder("demo").encode(sequences)
    found = data.embedding.values[sample]
    size = np.linalg.norm(expected, axis=1, keepdims=True)
    assert (np.abs(found - expected) / size).max() < 1e-5


def test_awkward_records_all_have_a_state(tmp_path: Path, awkward: Path, client: Any) -> None:
    seen: list[events.Event] = []
    summary = virnuc_dask.run(
        awkward,
        tmp_path / "a.zarr",
        model="demo",
        client=client,
        max_residues=50,
        listener=seen.append,
    )
    assert summary.counts == {"embedded": 3, "truncated": 1, "empty": 1, "invalid_residues": 2}
    assert sum(summary.counts.values()) == summary.records == 7
    assert summary.exit_code == 3
    assert list(status.quarantined(tmp_path / "a.zarr")) == [
        (2, "empty", "empty"),
        (3, "stop", "invalid_residues"),
        (5, "digit", "invalid_residues"),
    ]
    (read,) = (event for event in seen if isinstance(event, events.InputRead))
    assert (read.gaps, read.ambiguous_j, read.terminal_stops) == (2, 2, 1)
    assert (read.empty, read.invalid) == (1, 2)
    data = virnuc_dask.open_store(tmp_path / "a.zarr")
    embedded = (data.status < 16).values
    assert np.isfinite(data.embedding.values[embedded]).all()
    assert np.isnan(data.embedding.values[~embedded]).all()
    assert list(data.sequence_id.values).count("a") == 2


@pytest.mark.parametrize(
    ("long", "state"), [("truncate", "truncated"), ("window", "windowed"), ("skip", "too_long")]
)
@pytest.mark.slow
def test_long_sequences_follow_the_policy(
    long: str, state: str, tmp_path: Path, client: Any
) -> None:
    summary = virnuc_dask.run(
        VIRAL_PROTEINS, tmp_path / "a.zarr", model="demo", client=client, long=long
    )
    assert summary.counts == {"embedded": 271, state: 29}
    assert verify.verify(tmp_path / "a.zarr").exit_code == 0


def test_float16_is_stored_as_float16(tmp_path: Path, awkward: Path, client: Any) -> None:
    virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", client=client, dtype="float16")
    virnuc_dask.run(awkward, tmp_path / "b.zarr", model="demo", client=client, pooling="max")
    assert virnuc_dask.open_store(tmp_path / "a.zarr").embedding.dtype == np.float16
    assert virnuc_dask.open_store(tmp_path / "b.zarr").embedding.dtype == np.float32


def test_a_second_run_and_a_resume_write_nothing(
    tmp_path: Path, awkward: Path, client: Any
) -> None:
    path = tmp_path / "a.zarr"
    virnuc_dask.run(awkward, path, model="demo", client=client)
    before = tree(path)
    # None is needed.
    again = virnuc_dask.run(awkward, path, model="demo", cluster="no such cluster")
    resumed = virnuc_dask.resume(path, cluster="no such cluster")
    assert again.computed_chunks == resumed.computed_chunks == 0
    assert again.counts == resumed.counts
    assert again.exit_code == resumed.exit_code == 3
    assert tree(path) == before


def test_resume_computes_only_missing_chunks(make_store: Maker, client: Any) -> None:
    store = make_store(VIRAL_PROTEINS)
    before = tree(store.path)
    gone = [1, 4, 9]
    for chunk in gone:
        store.remove_chunk(chunk)
    # Without its companion an embedding is no checkpoint.
    (store.path / "status" / "c.6").unlink()
    seen: list[events.Event] = []
    summary = virnuc_dask.resume(store.path, client=client, listener=seen.append)
    assert summary.computed_chunks == 4
    done = sorted(event.chunk for event in seen if isinstance(event, events.ChunkDone))
    assert done == [1, 4, 6, 9]
    after = tree(store.path)
    assert {name: content for name, (_, _, content) in after.items()} == {
        name: content for name, (_, _, content) in before.items()
    }
    same = [name for name in before if after[name][:2] == before[name][:2]]
    assert len(before) - len(same) == 2 * 4


def test_a_chunk_that_keeps_failing_is_left_missing_and_the_others_are_done(
    make_store: Maker, client: Any
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    # A directory in the way of one chunk's file is an error for as long as it is there.
    obstacle = store.path / "embedding" / "c.3.0"
    obstacle.mkdir()
    seen: list[events.Event] = []
    with pytest.raises(IncompleteRunError) as raised:
        virnuc_dask.resume(
            store.path, client=client, config=RunConfig(attempts=2), listener=seen.append
        )
    error, summary = raised.value, raised.value.summary
    assert "out.zarr: 1 of 10 chunks missing; chunk 3: IsADirectoryError" in str(error)
    assert error.exit_code == pickle.loads(pickle.dumps(error)).exit_code == 4
    failures = [event for event in seen if isinstance(event, events.ChunkFailed)]
    assert [(event.chunk, event.attempt, event.final) for event in failures] == [
        (3, 1, False),
        (3, 2, True),
    ]
    assert list(summary.missing) == [3]
    assert "IsADirectoryError" in summary.missing[3]
    assert summary.counts["pending"] == 32
    assert summary.exit_code == 4
    obstacle.rmdir()
    assert virnuc_dask.resume(store.path, client=client).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_an_error_and_goes_on(
    number: signal.Signals, make_store: Maker, client: Any
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)

    def interrupt_once(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not interrupted:
            interrupted.append(event.chunk)
            signal.raise_signal(number)

    interrupted: list[int] = []
    config = RunConfig(in_flight=1)
    with pytest.raises(IncompleteRunError, match=f"interrupted by signal {number}") as raised:
        virnuc_dask.resume(store.path, client=client, config=config, listener=interrupt_once)
    summary = raised.value.summary
    assert summary.interrupted == number
    assert len(summary.missing) == store.chunk_count - summary.computed_chunks > 0
    again = virnuc_dask.resume(store.path, client=client)
    assert again.computed_chunks == len(summary.missing)


@pytest.mark.slow
def test_workers_refuse_other_weights_under_the_same_name(
    tmp_path: Path, awkward: Path, client: Any
) -> None:
    weights = tmp_path / "model.pt"
    data = load_checkpoint("demo").data
    torch.save(data, weights)
    virnuc_dask.run(awkward, tmp_path / "a.zarr", client=client, model=str(weights))
    store = virnuc_dask.store.store.Store(tmp_path / "a.zarr")
    store.remove_chunk(0)
    data["model"]["layers.0.fc1.bias"] += 1
    torch.save(data, weights)
    client.restart()  # the old weights are still in the workers' memory
    with pytest.raises(UsageError, match=r"2 of 2 workers .*\n.*this worker has weights"):
        virnuc_dask.resume(tmp_path / "a.zarr", client=client)
    assert not store.touched()[0]
    # The weights were moved: resume takes them from where they are now, if they are the same.
    summary = virnuc_dask.resume(tmp_path / "a.zarr", client=client, model="demo")
    assert summary.complete


def test_a_client_is_left_open_and_its_cluster_without_tasks(
    tmp_path: Path, awkward: Path, client: Any
) -> None:
    before = client.run_on_scheduler(_keys)  # other tests may still hold results
    virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", client=client)
    assert client.status == "running"
    # The client tells the scheduler in its own time.
    wait_for(lambda: client.run_on_scheduler(_keys) <= before)


def _keys(dask_scheduler: Any) -> set[Any]:
    return set(dask_scheduler.tasks)


def test_a_client_can_be_at_one_run_only(tmp_path: Path, awkward: Path, client: Any) -> None:
    """Dask hands a topic's events to one handler of a client: the other run would hear nothing."""
    refused: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not refused:
            with pytest.raises(UsageError, match="another run uses this client") as error:
                virnuc_dask.run(awkward, tmp_path / "b.zarr", model="demo", client=client)
            refused.append(str(error.value))

    path = tmp_path / "a.zarr"
    first = virnuc_dask.run(
        awkward, path, model="demo", client=client, listener=listen, rows_per_chunk=1
    )
    assert len(refused) == 1
    assert (first.complete, first.computed_chunks) == (True, 7)
    second = virnuc_dask.run(awkward, tmp_path / "b.zarr", model="demo", client=client)
    assert second.counts == first.counts


def test_a_scheduler_file_is_attached_to_and_left_running(tmp_path: Path, awkward: Path) -> None:
    with started_cluster(tmp_path) as file:
        summary = virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", cluster=str(file))
        assert summary.complete
        address = json.loads(file.read_text())["address"]
        assert virnuc_dask.run(awkward, tmp_path / "b.zarr", model="demo", cluster=address).complete
        with Client(address) as client:
            assert client.nthreads()
        with pytest.raises(UsageError, match="only for --cluster local"):
            virnuc_dask.run(awkward, tmp_path / "c.zarr", model="demo", cluster=address, workers=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "sum"}, "pooling must be one of mean, bos, max"),
        ({"long": "cut"}, "long must be one of"),
        ({"max_residues": 0}, "max_residues must be at least 1"),
        ({"rows_per_chunk": 20_000}, "rows_per_chunk must be 1 to 10,000"),
    ],
)
def test_nonsense_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, awkward: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", **settings)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"translate": "six-frame"}, {"translation": Translation()}),
        (
            {"translate": "six-frame", "frames": "orf", "genetic_code": 11, "min_residues": 9},
            {"translation": Translation("orf", genetic_code=11, min_residues=9)},
        ),
        (
            {"translate": "six-frame", "frames": "virnucpro", "window": 300},
            {"translation": Translation("virnucpro", 300)},
        ),
        ({"tile": 24}, {"tiling": Tiling(24)}),
        (
            {"tile": 24, "tile_step": 6, "pooling": "max"},
            {"tiling": Tiling(24, 6), "pooling": "max"},
        ),
    ],
)
def test_settings_are_named_as_on_the_command_line(
    options: dict[str, Any], same: dict[str, Any]
) -> None:
    assert Settings.of(model="demo", **options) == Settings("demo", **same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max", "frame": 1}, "there is no setting frame, pool"),
        ({"translate": "three-frame"}, "translate must be six-frame, not 'three-frame'"),
        ({"translate": True}, "translate must be six-frame, not True"),
        ({"window": 300}, "window requires translate six-frame"),
        ({"tile_step": 6}, "tile_step requires tile"),
        ({"tile": 24, "tiling": Tiling(24)}, "give tiling, or the options that make one"),
        ({"translate": "six-frame", "translation": Translation()}, "give translation, or the"),
        ({"translate": "six-frame", "frames": "all"}, "frames must be one of open, orf, virnucpro"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Settings.of(model="demo", **options)


def test_bad_input_bad_model_and_bad_target_fail_before_anything_is_written(
    tmp_path: Path, awkward: Path
) -> None:
    with pytest.raises(InputError):
        virnuc_dask.run(tmp_path / "missing.fa", tmp_path / "a.zarr", model="demo")
    with pytest.raises(InputError, match=r"line 6.*'stop'.*internal stop"):
        virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", strict=True)
    with pytest.raises(ModelError):
        virnuc_dask.run(awkward, tmp_path / "a.zarr", model="esm9")
    with pytest.raises(UsageError, match="in a directory, or in an object store"):
        virnuc_dask.run(awkward, "https://bucket/a.zarr", model="demo")
    assert os.listdir(tmp_path) == ["awkward.faa"]


@pytest.mark.slow
def test_the_plan_is_what_the_run_then_does(tmp_path: Path, client: Any) -> None:
    made = plan(VIRAL_PROTEINS, Settings("demo", rows_per_chunk=64), workers=2)
    summary = virnuc_dask.run(
        VIRAL_PROTEINS, tmp_path / "a.zarr", model="demo", client=client, rows_per_chunk=64
    )
    assert (made.input.records, made.chunks) == (summary.records, summary.chunks) == (300, 5)
    assert made.long_records == summary.counts["truncated"]
    assert made.encoded_residues == summary.computed_residues
    assert made.longest == 3164
    data = virnuc_dask.open_store(tmp_path / "a.zarr")
    assert made.embedding_bytes == data.embedding.nbytes
    assert made.sequence_bytes == data.residues.nbytes
    assert made.is_measured
    assert made.residues_per_s > 0
    assert made.model == summary.model
    assert made.chunk_seconds == made.largest_chunk / made.residues_per_s
    assert made.encoded_residues / made.chunks < made.largest_chunk < made.encoded_residues


def test_a_plan_needs_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    made = plan(VIRAL_PROTEINS, Settings(model="esm2_t33_650M_UR50D"))
    assert not made.is_measured
    assert made.seconds > 0
    assert made.model.weights_sha256 == ""
    assert made.embedding_bytes == 300 * 1280 * 4
    assert os.listdir(tmp_path) == []


def test_events_say_everything_as_json(tmp_path: Path, client: Any) -> None:
    path = tmp_path / "a.faa"
    path.write_text(AWKWARD)
    seen: list[events.Event] = []
    virnuc_dask.run(path, tmp_path / "a.zarr", model="demo", client=client, listener=seen.append)
    kinds = [event.to_json()["event"] for event in seen]
    # Either may be first: see `ModelChosen`.
    assert sorted(kinds[:2]) == ["model_chosen", "reading"]
    assert kinds[2:] == [
        "input_read",
        "run_started",
        "connected",
        "workers_checked",
        "workers_changed",
        "chunk_done",
        "run_summary",
    ]
    assert json.loads(json.dumps(seen[-1].to_json()))["exit_code"] == 3


def test_one_more_worker_starts_than_there_are_chunks(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS)
    store.remove_chunk(3)
    # As on a machine of many cores: five more processes would load torch for nothing.
    monkeypatch.setattr("virnuc_dask.runtime.dask_cluster.CPU_COUNT", 7)
    seen: list[events.Event] = []
    assert virnuc_dask.resume(store.path, listener=seen.append).computed_chunks == 1
    assert max(e.workers for e in seen if isinstance(e, events.WorkersChanged)) == 2


@pytest.mark.parametrize("model", ["demo", "esm2_t48_15B_UR50D"])
def test_a_plan_of_nothing_says_that_there_is_nothing(model: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.faa"
    empty.write_text(">a\n>b\n*\n")
    made = plan(empty, Settings(model=model))
    assert (made.input.records, made.encoded_residues) == (2, 0)
    assert dict(made.lines())["time"] == "none: no residues to encode"
    assert made.to_json()["seconds"] == 0.0


@contextmanager
def one_worker(threads: int) -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=threads, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def run_in_queue(store: Path, client: Client, listener: Listener) -> None:
    """15 chunks, six of them at once."""
    virnuc_dask.run(
        VIRAL_PROTEINS,
        store,
        model="demo",
        client=client,
        config=RunConfig(in_flight=6),
        listener=listener,
        rows_per_chunk=20,
        repr_layer=0,
    )


@pytest.mark.slow
def test_chunks_are_delayed_tasks_and_begin_with_the_longest(tmp_path: Path) -> None:
    seen: list[events.Event] = []
    with one_worker(threads=1) as client:
        run_in_queue(tmp_path / "a.zarr", client, seen.append)
        types = client.run_on_scheduler(_collections)
    assert types == {"Delayed"}
    costs = [event.residues for event in seen if isinstance(event, events.ChunkDone)]
    assert len(costs) == 15
    assert costs == sorted(costs, reverse=True)


def _collections(dask_scheduler: Any) -> set[str]:
    """What the tasks were when they were handed over, as Dask's spans have it."""
    return {
        collection["type"]
        for span in dask_scheduler.extensions["spans"].root_spans
        for collection in span.metadata["collections"]
    }


@pytest.mark.slow
def test_later_chunks_do_not_overtake_those_that_queue(tmp_path: Path) -> None:
    priorities: dict[int, Any] = {}

    def look(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not priorities:
            priorities.update(client.run_on_scheduler(_priorities))

    with one_worker(threads=2) as client:
        run_in_queue(tmp_path / "a.zarr", client, look)
    assert priorities.keys() >= {3, 4, 5, 6}
    # Two begin at once and are one graph. Low numbers go first, an earlier graph's before others'.
    (_, second, *_), (_, third, *_) = priorities[4], priorities[5]
    assert priorities[3][1] == second < third == priorities[6][1]


def _priorities(dask_scheduler: Any) -> dict[int, Any]:
    """Of chunks, by their number in the order in which they were handed over."""
    return {
        int(str(key).rpartition("-")[2]): task.priority
        for key, task in dask_scheduler.tasks.items()
    }
