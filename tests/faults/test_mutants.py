"""Tests of the tests: code that is spoilt in one way each, and the check that must notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import damage
import pytest
import zarr
from conftest import VIRAL_PROTEINS, Maker
from damage import check_damage, check_flipped_bits, file_of
from killed_writes import Bench, check_deaths_in_a_chunk
from nursery import Nursery
from power_cuts import (
    Lab,
    check_cut_after_an_ingest,
    check_cuts,
    cut_anywhere,
    cut_right_after_acknowledgements,
)
from zarr.codecs import ZstdCodec

# --- in the processes that write ---

IN_PLACE = """
def write_in_place(path, content):
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    files.sync(path.parent)

files.write_durably = directory.write_durably = write_in_place
"""
COMMIT_FIRST = """
def write_backwards(self, chunk, status, embedding, residues):
    self._write("embedding", self.rows(chunk), embedding)
    self._write_residues(self.slots(chunk), residues)
    self._write("status", self.rows(chunk), status)

store.Store.write_chunk = write_backwards
"""
NO_EMPTY_CHUNKS = "zarr.Array.with_config = lambda self, config: self"


@pytest.mark.parametrize(
    ("mutation", "chunk", "complaint"),
    [
        (IN_PLACE, 0, "is half there"),
        (COMMIT_FIRST, 0, "not in the order whose last is the commit"),
        (NO_EMPTY_CHUNKS, 1, "a chunk that was written is not there"),
    ],
    ids=["in place", "commit first", "no empty chunks"],
)
@pytest.mark.sweep
def test_a_store_that_writes_otherwise_does_not_survive_the_deaths_of_tasks(
    mutation: str, chunk: int, complaint: str, bench: Bench
) -> None:
    with Nursery(mutation) as mutant, pytest.raises(AssertionError, match=complaint):
        check_deaths_in_a_chunk(mutant, bench, chunk)


NO_SYNC = "os.fsync = lambda descriptor: None"
NO_SYNC_OF_FILES = """
real_fsync = os.fsync
os.fsync = lambda file: os.path.isdir(f"/proc/self/fd/{file}") and real_fsync(file)
"""
NO_SYNC_OF_NAMES = "files.sync = directory.sync = lambda path: None"
NO_SYNC_OF_THE_STORES_NAME = """
real_sync, real_sync_tree = files.sync, files.sync_tree

def sync_tree_alone(root):
    files.sync = real_sync
    real_sync_tree(root)
    files.sync = lambda path: None

directory.sync_tree = sync_tree_alone
directory.sync = lambda path: None
"""


@pytest.mark.parametrize(
    ("mutation", "cut"),
    [
        (NO_SYNC, cut_right_after_acknowledgements),
        (NO_SYNC, cut_anywhere),
        (NO_SYNC_OF_FILES, cut_right_after_acknowledgements),
        (NO_SYNC_OF_NAMES, cut_right_after_acknowledgements),
    ],
    ids=["no sync", "no sync, anywhere", "no sync of files", "no sync of names"],
)
@pytest.mark.slow
def test_a_store_that_does_not_sync_loses_acknowledged_chunks_to_a_power_cut(
    mutation: str, cut: Any, lab: Lab
) -> None:
    complaint = "an acknowledged chunk is lost"
    with Nursery(mutation) as mutant, pytest.raises(AssertionError, match=complaint):
        check_cuts(mutant, lab, cut)


@pytest.mark.parametrize(
    ("mutation", "complaint"),
    [
        ("directory.sync_tree = lambda root: None", "is damaged"),
        (NO_SYNC_OF_THE_STORES_NAME, "is lost"),
    ],
    ids=["no sync of the tree", "no sync of its name"],
)
@pytest.mark.slow
def test_an_ingest_that_does_not_sync_loses_its_store_to_a_power_cut(
    mutation: str, complaint: str, lab: Lab
) -> None:
    with Nursery(mutation) as mutant, pytest.raises(AssertionError, match=complaint):
        check_cut_after_an_ingest(mutant, lab)


# --- in this process, which looks at what is there ---


def test_a_store_that_trusts_any_file_is_deceived_by_an_empty_one(
    make_store: Maker, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr", **damage.SETTINGS)
    store = damage.copied(whole, tmp_path)
    monkeypatch.setattr("virnuc_dask.store.store.MIN_CHUNK_BYTES", 0)
    with pytest.raises(AssertionError, match="a file's name alone is trusted"):
        check_damage(store, whole, "residue_embedding", 9, b"", client)


@pytest.mark.parametrize("array", ["residue_embedding", "embedding"])
def test_a_store_without_checksums_does_not_notice_every_bit(
    array: str, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = zarr.Group.create_array

    def create_without(self: zarr.Group, *arguments: Any, **options: Any) -> Any:
        return create(self, *arguments, **options | {"compressors": (ZstdCodec(level=1),)})

    monkeypatch.setattr(zarr.Group, "create_array", create_without)
    unchecked = make_store(VIRAL_PROTEINS, **damage.SETTINGS)
    assert file_of(unchecked, array, 3).exists()
    with pytest.raises(AssertionError, match="is not noticed"):
        check_flipped_bits(unchecked, array, bits=24)
