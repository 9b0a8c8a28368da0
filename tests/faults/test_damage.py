"""Damage to a finished store: what each command says of it, and how it is mended, byte for byte."""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker, made, tree
from damage import SETTINGS, check_damage, check_flipped_bits, copied, file_of, flip
from harness import assert_ledger

import virnuc_dask
from virnuc_dask.errors import StoreError
from virnuc_dask.runtime.recomputed import compare_recomputed
from virnuc_dask.store import status, verify
from virnuc_dask.store.store import INGESTED, TRANSLATED, Store

ARRAYS = ("status", "residue_embedding", "embedding")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """What nobody damages."""
    store = made(VIRAL_PROTEINS, tmp_path_factory.mktemp("whole") / "whole.zarr", **SETTINGS)
    before = tree(store.path)
    yield store
    assert tree(store.path) == before


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Store:
    return copied(whole, tmp_path)


# --- what can be noticed ---

DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "half of it": lambda content, dice: content[: len(content) // 2],
    "two bytes fewer": lambda content, dice: content[:-2],
    "two bytes more": lambda content, dice: content + dice.randbytes(2),
    "zeros": lambda content, dice: bytes(len(content)),
    "noise": lambda content, dice: dice.randbytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.slow
def test_a_damaged_file_is_found_by_verify_and_mended(
    array: str, damage: str, store: Store, whole: Store, client: Any
) -> None:
    dice = random.Random(f"{array} {damage}")
    chunk = dice.choice([0, 4, 9])  # 9 is shorter
    content = DAMAGE[damage](file_of(store, array, chunk).read_bytes(), dice)
    check_damage(store, whole, array, chunk, content, client)


@pytest.mark.parametrize("size", [0, 1, 12])
def test_a_stunted_file_of_residues_is_no_chunk(
    size: int, store: Store, whole: Store, client: Any
) -> None:
    content = file_of(store, "residue_embedding", 9).read_bytes()[:size]
    check_damage(store, whole, "residue_embedding", 9, content, client)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.slow
def test_any_flipped_bit_is_found(array: str, store: Store) -> None:
    check_flipped_bits(store, array, bits=12)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.sweep
def test_a_chunk_of_a_flipped_bit_is_computed_again(
    array: str, store: Store, whole: Store, client: Any
) -> None:
    content = file_of(store, array, 3).read_bytes()
    check_damage(store, whole, array, 3, flip(content, 4 * len(content)), client)


@pytest.mark.parametrize("array", ["status", "residue_embedding"])
def test_another_chunks_file_is_found_where_it_does_not_agree_with_the_sequences(
    array: str, store: Store, whole: Store, client: Any
) -> None:
    another = file_of(store, array, 3).read_bytes()
    check_damage(store, whole, array, 2, another, client, decodes=True)


@pytest.mark.slow
def test_another_chunks_embeddings_are_found_by_a_sample(
    store: Store, whole: Store, client: Any
) -> None:
    file = file_of(store, "embedding", 2)
    shutil.copyfile(file_of(store, "embedding", 3), file)
    damaged = tree(store.path)
    assert verify.verify(store.path).exit_code == 0  # they are what a chunk may be
    drift = compare_recomputed(store.path, 60, seed=1)
    assert not drift.good
    assert store.rows(2).start <= drift.worst_row < store.rows(2).stop
    assert tree(store.path) == damaged
    file.unlink()
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert compare_recomputed(store.path, 60, seed=1).good
    assert_ledger(store, whole)


@pytest.mark.slow
def test_another_chunks_residues_are_found_by_a_sample(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full file of residues has no empty slots to disagree with."""
    monkeypatch.setattr("virnuc_dask.store.create._RESIDUE_VALUES_PER_CHUNK", 2**16)
    store = make_store(VIRAL_PROTEINS, **SETTINGS)
    one, other = (store.path / key for key in store.keys(0)[1:3])
    shutil.copyfile(other, one)
    assert verify.verify(store.path).exit_code == 0
    drift = compare_recomputed(store.path, 300)
    assert not drift.good
    assert store.rows(0).start <= drift.worst_row < store.rows(0).stop


# --- files that do not belong there ---


@pytest.mark.filterwarnings("ignore:Object at notes.txt is not recognized")
@pytest.mark.slow
def test_strays_are_ignored_by_readers_and_removed_where_tasks_write(
    store: Store, whole: Store, client: Any
) -> None:
    host = os.uname().nodename
    with ExitStack() as writers:
        living = [store.path / array / f"c.0.0~{host}~1~{'0' * 32}.partial" for array in ARRAYS]
        removable = [
            store.path / array / name
            for array in ARRAYS
            for name in ("c.0.1", "c.00.0", "c.0.0.swp", ".nfs0001", f"c.0~{host}~1~x.partial")
        ]
        kept = [store.path / "residues" / "c.0.bak", store.path / "notes.txt"]
        for file in (*living, *removable, *kept):
            file.write_bytes(file_of(store, "embedding", 0).read_bytes())
        for file in living:
            fcntl.flock(writers.enter_context(file.open()), fcntl.LOCK_EX)
        (store.path / "embedding" / "c.0.2").symlink_to(whole.path / "zarr.json")
        removable.append(store.path / "embedding" / "c.0.2")
        data = virnuc_dask.open_store(store.path)
        assert data.identical(virnuc_dask.open_store(whole.path))
        assert status.status(store.path).present.all()
        before = tree(store.path)
        assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
        assert tree(store.path) == before
        report = verify.verify(store.path, repair=True)
        assert (report.exit_code, report.bad) == (0, {})
        assert set(report.leftovers) == set(map(str, (*removable, *kept)))
        assert all(file.exists() for file in (*living, *kept))
        assert not any(os.path.lexists(file) for file in removable)
    assert set(verify.verify(store.path, repair=True).leftovers) == set(map(str, (*living, *kept)))
    for file in kept:
        file.unlink()
    assert_ledger(store, whole)


# --- metadata ---


@pytest.mark.parametrize(
    ("array", "damage"),
    [
        *(("", damage) for damage in ("half of it", "zeros", "noise", "deleted")),
        *(("embedding", damage) for damage in ("half of it", "zeros", "noise", "deleted")),
        *(("status", damage) for damage in ("half of it", "deleted")),
        *(("residue_embedding", damage) for damage in ("half of it", "deleted")),
        *((array, "deleted") for array in INGESTED if array not in TRANSLATED),
        ("sequence_id", "noise"),
        ("offset", "half of it"),
    ],
)
@pytest.mark.sweep
def test_without_its_metadata_nothing_touches_a_store(
    array: str, damage: str, store: Store, whole: Store
) -> None:
    file = store.path / array / "zarr.json"
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes(), random.Random(1)))
    damaged = tree(store.path)
    calls: tuple[Callable[[], object], ...] = (
        lambda: status.status(store.path),
        lambda: status.row_states(store.path),
        lambda: verify.verify(store.path, repair=True),
        lambda: virnuc_dask.resume(store.path),
        lambda: virnuc_dask.run(VIRAL_PROTEINS, store.path, model="demo", repr_layer=0),
        lambda: virnuc_dask.open_store(store.path),
    )
    for call in calls:
        with pytest.raises(StoreError, match=rf"{store.path}.*{array}.*zarr\.json") as error:
            call()
        assert error.value.exit_code == 4
        assert tree(store.path) == damaged
    shutil.copyfile(whole.path / array / "zarr.json", file)
    assert_ledger(store, whole)


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["resume"], ["verify", "--repair"], ["run", "--model=demo", str(VIRAL_PROTEINS)]],
)
@pytest.mark.slow
def test_torn_metadata_is_one_line_and_exit_code_4(
    arguments: list[str], store: Store, cli: Cli
) -> None:
    file = store.path / "status" / "zarr.json"
    file.write_bytes(file.read_bytes()[:100])
    damaged = tree(store.path)
    found = cli(*arguments, store.path)
    assert (found.returncode, found.stdout) == (4, "")
    assert re.fullmatch(rf"error: {store.path}: .*`status` \(its zarr\.json\).*\n", found.stderr)
    assert tree(store.path) == damaged
