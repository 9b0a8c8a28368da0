"""`run --overwrite`: what is replaced, when, and what never is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import faults
import numpy as np
import pytest
import zarr
from conftest import EXAMPLES, VIRAL_PROTEINS, Cli, Maker, command, tree
from harness import Run, assert_ledger

import virnuc_dask
from virnuc_dask.errors import (
    InputError,
    NotAStoreError,
    StoreError,
    StoreInUseError,
    StoreReplacedError,
    UsageError,
    VirnucError,
)
from virnuc_dask.files import remove_orphans
from virnuc_dask.runtime import events
from virnuc_dask.settings import RunConfig
from virnuc_dask.store.directory import Directory
from virnuc_dask.store.store import Store

OTHER_PROTEINS = EXAMPLES / "esm_some_proteins.fasta"
OPTIONS: dict[str, Any] = {"model": "demo", "rows_per_chunk": 32, "repr_layer": 0}


def replace(store: Store, inputs: Path, client: Any, **more: Any) -> virnuc_dask.RunSummary:
    options = {**OPTIONS, "client": client, "overwrite": True, **more}
    return virnuc_dask.run(inputs, store.path, **options)


def test_a_store_and_its_results_are_replaced(make_store: Maker, client: Any) -> None:
    old = make_store(VIRAL_PROTEINS)
    virnuc_dask.make_map(old.path)
    seen: list[events.Event] = []
    summary = replace(old, OTHER_PROTEINS, client, rows_per_chunk=4, listener=seen.append)
    assert (summary.exit_code, summary.computed_chunks, summary.records) == (0, 4, 15)
    (told,) = (event for event in seen if isinstance(event, events.StoreToBeReplaced))
    assert (told.records, told.chunks, told.present_chunks) == (300, 10, 10)
    assert_ledger(Store(old.path), make_store(OTHER_PROTEINS, "other.zarr", rows_per_chunk=4))
    assert "map_pca" not in virnuc_dask.open_store(old.path)
    assert sorted(os.listdir(old.path.parent)) == ["other.zarr", "out.zarr"]


def test_all_is_computed_again_for_the_same_input_and_settings(
    make_store: Maker, client: Any
) -> None:
    old = make_store(VIRAL_PROTEINS)
    assert replace(old, VIRAL_PROTEINS, client).computed_chunks == 10
    new = Store(old.path)
    assert new.id != old.id
    assert_ledger(new, make_store(VIRAL_PROTEINS, "other.zarr"))
    # A run of the old store, which is still under way, leaves the new one alone.
    before = tree(new.path)
    status, embedding = new.read_chunk(0)
    with pytest.raises(FileNotFoundError):
        old.write_chunk(0, status, embedding)
    with pytest.raises(StoreReplacedError):
        old.check_location()
    assert tree(new.path) == before


def test_where_nothing_is_it_is_a_run_like_any_other(
    tmp_path: Path, client: Any, make_store: Maker
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    for computed in (10, 10):
        summary = virnuc_dask.run(VIRAL_PROTEINS, link, client=client, overwrite=True, **OPTIONS)
        assert summary.computed_chunks == computed
    assert link.is_symlink()
    assert_ledger(Store(target), make_store(VIRAL_PROTEINS))


def test_bad_input_leaves_the_old_store(make_store: Maker, client: Any, tmp_path: Path) -> None:
    old = make_store(VIRAL_PROTEINS)
    before = tree(tmp_path)
    bad = tmp_path / "bad.faa"
    bad.write_text(">a\nMKV\n>b\nMK*V\n")
    with pytest.raises(InputError, match=r"line 3, record .b."):
        replace(old, bad, client, strict=True)
    bad.unlink()
    assert tree(tmp_path) == before


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def another_zarr(path: Path) -> None:
    group = zarr.create_group(path)
    for name in ("embedding", "status"):
        group.create_array(name, shape=(3,), dtype="f4")


def a_store_without_metadata(path: Path) -> None:
    another_zarr(path)
    (path / "zarr.json").unlink()


def a_store_of_the_future(path: Path) -> None:
    another_zarr(path)
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] = {"virnuc_dask": {"id": "x", "identity": {"format": 99}}}
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "something",
    [a_file, a_folder, another_zarr, a_store_without_metadata, a_store_of_the_future],
)
def test_nothing_else_is_ever_replaced(
    something: Callable[[Path], None], tmp_path: Path, client: Any
) -> None:
    something(tmp_path / "out.zarr")
    before = tree(tmp_path)
    with pytest.raises((NotAStoreError, StoreError)):
        virnuc_dask.run(
            VIRAL_PROTEINS, tmp_path / "out.zarr", overwrite=True, client=client, **OPTIONS
        )
    assert tree(tmp_path) == before


def test_a_shard_replaces_nothing(make_store: Maker, client: Any) -> None:
    old = make_store(VIRAL_PROTEINS)
    with pytest.raises(UsageError, match="overwrite with a shard"):
        replace(old, VIRAL_PROTEINS, client, config=RunConfig(shard="1/2"))
    assert Store(old.path).id == old.id


@pytest.mark.slow
def test_a_store_that_a_run_fills_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    table, motif, source = tmp_path / "faults.json", "WWCWW", tmp_path / "in.faa"
    table.write_text(json.dumps({motif: ["hang"]}))
    faults.arm(monkeypatch, table)
    source.write_text(f">a\nM{motif}\n>b\nMKVA\n")
    options = ("--model=demo", "--repr-layer=0", "--workers=1")
    run = Run("run", source, tmp_path / "out.zarr", *options)
    faults.await_met(table, motif)
    store = Store(tmp_path / "out.zarr")
    refused = cli("run", source, store.path, *options, "--overwrite")
    assert refused.returncode == 2
    assert "a run is filling this store; end it before you replace the store" in refused.stderr
    assert Store(store.path).id == store.id
    os.killpg(run.process.pid, signal.SIGKILL)
    assert run.finish() == -signal.SIGKILL
    done = cli("run", source, store.path, *options, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert Store(store.path).id != store.id


def test_a_run_that_begins_meanwhile_is_seen(make_store: Maker, client: Any) -> None:
    """It comes after the first look, while the input is read."""
    old = make_store(VIRAL_PROTEINS)
    before = tree(old.path)

    def begin(event: events.Event) -> None:
        if isinstance(event, events.Reading):
            others.enter_context(Store(old.path).location.in_use())

    with ExitStack() as others, pytest.raises(StoreInUseError):
        replace(old, OTHER_PROTEINS, client, listener=begin)
    assert tree(old.path) == before
    assert os.listdir(old.path.parent) == ["out.zarr"]


def test_a_store_that_cannot_be_published_leaves_the_old_one(
    make_store: Maker, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_store(VIRAL_PROTEINS)
    before = tree(old.path)

    def fail(self: Directory, staging: Path) -> bool:
        assert not old.path.exists()  # it is aside, and no other ingest takes it for a killed one's
        remove_orphans(old.path.parent, f".{old.path.name}")
        raise StoreError("no")

    monkeypatch.setattr(Directory, "publish", fail)  # a disk that fails in this very moment
    with pytest.raises(StoreError, match="no"):
        replace(old, OTHER_PROTEINS, client)
    assert tree(old.path) == before
    assert os.listdir(old.path.parent) == ["out.zarr"]


def test_no_store_is_replaced_for_a_cluster_that_is_not_there(
    make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_store(VIRAL_PROTEINS)
    before = tree(old.path)

    def fail(*_: Any) -> None:  # as on a machine with too few processes or files left
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("virnuc_dask.runtime.local.start_cores", fail)
    for wrong in (
        {"workers": 1},
        {"cluster": "tcp://127.0.0.1:9"},
        {"cluster": "nobody knows"},
        {"workers": 0},
        {"config": RunConfig(performance_report=str(tmp_path / "no" / "report.html"))},
    ):
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
            pytest.raises((VirnucError, OSError)),
        ):
            virnuc_dask.run(OTHER_PROTEINS, old.path, overwrite=True, **OPTIONS, **wrong)
    assert tree(old.path) == before


def test_what_another_run_has_put_there_in_the_last_moment_stays(
    make_store: Maker, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen the old store; the other one gets its lock first."""
    old, other = make_store(VIRAL_PROTEINS), make_store(OTHER_PROTEINS, "other.zarr")
    if_unused, new = Directory._if_unused, tree(other.path)

    @contextmanager
    def late(self: Directory) -> Iterator[bool]:
        if other.path.exists():
            shutil.rmtree(old.path)
            other.path.rename(old.path)
        with if_unused(Store(old.path).location) as is_unused:
            yield is_unused

    def from_now_on(event: events.Event) -> None:
        if isinstance(event, events.StoreToBeReplaced):
            monkeypatch.setattr(Directory, "_if_unused", late)

    summary = replace(old, OTHER_PROTEINS, client, listener=from_now_on)
    assert (summary.computed_chunks, tree(old.path)) == (0, new)


def test_of_two_that_replace_a_store_one_does_and_the_other_finds_it(
    make_store: Maker, client: Any
) -> None:
    old = make_store(VIRAL_PROTEINS)
    made: list[str] = []

    def replaced_by_another(event: events.Event) -> None:
        if isinstance(event, events.Reading) and not made:
            assert replace(old, OTHER_PROTEINS, client, rows_per_chunk=4).complete
            made.append(Store(old.path).id)

    late = replace(old, OTHER_PROTEINS, client, rows_per_chunk=4, listener=replaced_by_another)
    assert late.computed_chunks == 0
    assert [Store(old.path).id] == made


KILLED = """
import os, signal, sys
from virnuc_dask.store.directory import Directory
def die(self, staging):
    os.kill(os.getpid(), signal.SIGKILL)
Directory.publish = die
from virnuc_dask.cli.main import main
main()
"""


def test_a_kill_between_the_two_renames_leaves_a_place_for_the_same_command(
    make_store: Maker, client: Any, tmp_path: Path
) -> None:
    old = make_store(VIRAL_PROTEINS)
    arguments = command("run", OTHER_PROTEINS, old.path, "--model=demo", "--overwrite")[3:]
    killed = subprocess.run([*command()[:1], "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 2
    assert all(name.endswith(".ingest") for name in left)
    assert replace(old, OTHER_PROTEINS, client).computed_chunks == 1
    assert os.listdir(tmp_path) == ["out.zarr"]
    assert np.isfinite(virnuc_dask.open_store(old.path).embedding.values).all()
