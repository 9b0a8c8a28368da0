"""Rows that kill the process that encodes them: found, quarantined, and no other row with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Maker, command, tree

import virnuc_dask
from virnuc_dask import RunConfig, events, faults
from virnuc_dask.config import ModelSpec, Status
from virnuc_dask.embed import embed_rows, get_encoder
from virnuc_dask.errors import VirnucError
from virnuc_dask.isolate import embed_apart
from virnuc_dask.store import Store
from virnuc_dask.weights import describe, load_checkpoint

ABORTS, KILLS, RAISES = "WWCWW", "CCWCC", "HWHWH"


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the motifs do harm, in this process and in its children."""
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({ABORTS: "abort", KILLS: "kill", RAISES: "raise"}))
    monkeypatch.setenv(faults.VARIABLE, str(table))


def poisoned(peptides: Path, path: Path, guilty: dict[int, str], records: int) -> Path:
    """Real peptides, some with a motif in the middle."""
    lines = [line.strip() for line in peptides.read_text().splitlines()]
    sequences = [line for line in lines if not line.startswith(">")][:records]
    assert len(sequences) == records
    for row, motif in guilty.items():
        sequences[row] = sequences[row][:6] + motif + sequences[row][6:]
    path.write_text("".join(f">p{n}\n{s}\n" for n, s in enumerate(sequences)))
    return path


# One killer, two in one chunk, one alone at a chunk's end, and one that only raises.
GUILTY = {3: ABORTS, 17: KILLS, 20: ABORTS, 47: KILLS, 50: RAISES}


def test_rows_that_kill_are_quarantined_and_nothing_else_is_lost(
    peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, armed: None
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", GUILTY, 64)
    arguments = (inputs, "--rows-per-chunk", 8, "--workers", 2, "--per-residue", "--json")
    run = subprocess.run(
        command("run", *arguments[:1], tmp_path / "out.zarr", *arguments[1:]),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 3, run.stderr
    seen = [json.loads(line) for line in run.stdout.splitlines()]
    kinds = [event["event"] for event in seen]
    assert kinds.count("worker_lost") >= 2  # the fault fired
    suspected = {event["chunk"] for event in seen if event["event"] == "chunk_suspected"}
    assert suspected >= {0, 2, 5}
    counts = seen[-1]["counts"]
    assert counts == {"embedded": 59, "crashed_worker": 4, "encoder_error": 1}

    # Without the faults, the same rows are the same, by value.
    monkeypatch.delenv(faults.VARIABLE)
    subprocess.run(
        command("run", *arguments[:1], tmp_path / "whole.zarr", *arguments[1:], "-q"),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=200,
    )
    found = virnuc_dask.open_store(tmp_path / "out.zarr")
    whole = virnuc_dask.open_store(tmp_path / "whole.zarr")
    status = found.status.values
    assert np.flatnonzero(status == Status.CRASHED_WORKER).tolist() == [3, 17, 20, 47]
    assert np.flatnonzero(status == Status.ENCODER_ERROR).tolist() == [50]
    innocent = status == Status.EMBEDDED
    assert innocent.sum() == 59
    assert np.array_equal(found.embedding.values[innocent], whole.embedding.values[innocent])
    assert np.isnan(found.embedding.values[~innocent]).all()
    for row in range(64):
        residues = virnuc_dask.open_residues(tmp_path / "out.zarr", row).values
        expected = virnuc_dask.open_residues(tmp_path / "whole.zarr", row).values
        if innocent[row]:
            assert np.array_equal(residues, expected)
        else:
            assert residues.shape == expected.shape
            assert np.isnan(residues).all()
    assert virnuc_dask.verify(tmp_path / "out.zarr").exit_code == 0
    before = tree(tmp_path / "out.zarr")
    assert virnuc_dask.resume(tmp_path / "out.zarr").exit_code == 3
    assert tree(tmp_path / "out.zarr") == before


# --- one chunk, in child processes ---


@pytest.fixture
def model() -> ModelSpec:
    return describe(load_checkpoint("demo"))


def rows_of(store: Store) -> tuple[Any, Any]:
    return store.read_rows(0)


def test_children_give_what_this_process_gives(awkward: Path, make_store: Maker) -> None:
    store = make_store(awkward, embed=False, per_residue=True, repr_layer=None, max_residues=50)
    spec = describe(load_checkpoint("demo"))
    apart = embed_apart(spec, "cpu", *rows_of(store), store.identity)
    here = embed_rows(get_encoder(spec), *rows_of(store), store.identity)
    assert np.array_equal(apart.status, here.status)
    assert np.array_equal(apart.embedding, here.embedding, equal_nan=True)
    assert apart.residues is not None
    assert here.residues is not None
    assert np.array_equal(apart.residues, here.residues, equal_nan=True)


@pytest.mark.usefixtures("armed")
@pytest.mark.parametrize("guilty", [{0: KILLS}, {0: ABORTS, 1: KILLS, 2: ABORTS}])
def test_every_row_may_be_guilty(
    guilty: dict[int, str], peptides: Path, tmp_path: Path, make_store: Maker, model: ModelSpec
) -> None:
    inputs = poisoned(peptides, tmp_path / "some.faa", guilty, 3)
    store = make_store(inputs, embed=False, repr_layer=None)
    rows = embed_apart(model, "cpu", *rows_of(store), store.identity)
    assert np.flatnonzero(rows.status == Status.CRASHED_WORKER).tolist() == list(guilty)
    assert np.isnan(rows.embedding).all(axis=1).sum() == len(guilty)


def test_a_child_that_raises_blames_no_row(awkward: Path, make_store: Maker) -> None:
    store = make_store(awkward, embed=False, repr_layer=None)
    other = ModelSpec("demo", "0" * 64, 64, 2)
    with pytest.raises(VirnucError, match=r"ended with 70: ModelError: .*this worker has weights"):
        embed_apart(other, "cpu", *rows_of(store), store.identity)


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.json")  # nobody writes to it: the child would wait for ever
    child = subprocess.Popen(
        [sys.executable, "-m", "virnuc_dask.isolate", str(tmp_path)], stdin=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=5)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) == 1


def test_an_innocent_suspect_is_embedded(make_store: Maker, awkward: Path, client: Any) -> None:
    """Every chunk is suspect from the first death on, and a worker is killed from outside."""
    store = make_store(awkward, embed=False, repr_layer=None, rows_per_chunk=1)
    whole = make_store(awkward, "whole.zarr", repr_layer=None, rows_per_chunk=1)
    seen: list[events.Event] = []
    killed: list[int] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.ChunkDone) and not killed:
            killed.append(event.pid)
            os.kill(event.pid, 9)

    config = RunConfig(suspect_after=1)
    summary = virnuc_dask.resume(store.path, client=client, config=config, listener=listen)
    assert summary.workers_lost == 1
    assert summary.complete
    assert "crashed_worker" not in summary.counts
    assert np.array_equal(
        virnuc_dask.open_store(store.path).embedding.values,
        virnuc_dask.open_store(whole.path).embedding.values,
        equal_nan=True,
    )
