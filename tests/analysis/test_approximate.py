"""An approximate index: what it finds beside an exact search, and rows that come later."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Cli, Maker

import virnuc_dask
from benchmarks.stores import random_store
from virnuc_dask.analysis.approximate import build_index, open_index
from virnuc_dask.errors import UsageError
from virnuc_dask.store.store import Store


def rows_file(index: Path) -> Path:
    """The file that an index has its rows in; it has no other but one."""
    (found,) = set(index.iterdir()) - {index / "about.json"}
    return found


def test_in_few_lists_it_finds_what_an_exact_search_finds(store: Store) -> None:
    index = build_index(store.path)
    assert index == store.path.with_name("viral.zarr.faiss")
    ids = virnuc_dask.open_store(store.path).sequence_id.values.tolist()
    exact = virnuc_dask.nearest(store.path, ids, k=5)
    found = virnuc_dask.nearest(store.path, ids, k=5, index=index)
    assert (found.approximate, exact.approximate) == (1, 0)
    np.testing.assert_allclose(found.similarity, exact.similarity, atol=0.02)
    same = [len(set(a) & set(b)) for a, b in zip(found.row.values, exact.row.values, strict=True)]
    assert np.mean(same) > 4.5
    assert not (found.row.values == found.query_row.values[:, None]).any()


def test_torch_keeps_its_number_of_threads(store: Store) -> None:
    """Torch loads the OpenMP that faiss then uses; each process of these tests has one thread."""
    before = torch.get_num_threads()
    index = build_index(store.path, workers=before + 1)
    assert torch.get_num_threads() == before
    virnuc_dask.nearest(
        store.path, ["sp|P36782|VE2_HPV12"], index=index, workers=before + 1
    ).similarity.load()
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_in_many_lists_it_looks_into_some_and_finds_most(tmp_path: Path) -> None:
    store = random_store(tmp_path / "out.zarr", 20_000, 16, rows_per_chunk=1024)
    index = build_index(store.path, tmp_path / "index")
    assert open_index(index).faiss.nlist > open_index(index).faiss.nprobe
    vectors = store.read_chunk(3)[1][:50].astype(np.float32)
    exact = virnuc_dask.nearest(store.path, vectors, k=5)
    found = virnuc_dask.nearest(store.path, vectors, k=5, index=index)
    same = [len(set(a) & set(b)) for a, b in zip(found.row.values, exact.row.values, strict=True)]
    assert np.mean(same) > 2.5
    # The rows themselves are no queries here, so each is found.
    assert np.mean(found.row.values[:, 0] == np.arange(3 * 1024, 3 * 1024 + 50)) > 0.9


@pytest.mark.slow
def test_rows_that_come_later_are_added(make_store: Maker) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store = make_store(VIRAL_PROTEINS, embed=False)
    for chunk in (0, 4, 7):
        store.write_chunk(chunk, *whole.read_chunk(chunk))
    index = build_index(store.path)
    first = open_index(index)
    assert (first.chunks, first.faiss.ntotal) == ([0, 4, 7], 96)
    for chunk in range(store.chunk_count):
        store.write_chunk(chunk, *whole.read_chunk(chunk))
    done: list[tuple[int, int]] = []
    build_index(store.path, progress=lambda *counts: done.append(counts))
    assert done[-1] == (7, 7)
    later = open_index(index)
    assert (later.chunks, later.faiss.ntotal) == (list(range(10)), 300)
    assert np.array_equal(first.mean, later.mean)
    before = rows_file(index).stat()
    build_index(store.path)
    assert rows_file(index).stat() == before
    assert sorted(path.name for path in index.parent.iterdir()) == [
        "out.zarr",
        "out.zarr.faiss",
        "whole.zarr",
    ]


def test_fewer_rows_than_neighbours_leave_gaps(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, max_residues=30)
    index = build_index(store.path)
    found = virnuc_dask.nearest(store.path, ["b"], k=9, index=index)
    missing = found.row.values[0] < 0
    assert 0 < missing.sum() < 9
    assert np.isnan(found.similarity.values[0][missing]).all()
    assert set(found.sequence_id.values[0][missing]) == {""}


@pytest.mark.slow
def test_what_makes_no_sense_is_refused(store: Store, make_store: Maker) -> None:
    index = build_index(store.path)
    other = make_store(VIRAL_PROTEINS, "other.zarr")
    name = str(virnuc_dask.open_store(store.path).sequence_id.values[0])
    with pytest.raises(UsageError, match="index of another store"):
        virnuc_dask.nearest(other.path, name, query_store=store.path, index=index)
    with pytest.raises(UsageError, match="is an index of another store; --force"):
        build_index(other.path, index)
    assert open_index(build_index(other.path, index, force=True)).store == other.id
    with pytest.raises(UsageError, match="cosine metric and centring"):
        virnuc_dask.nearest(store.path, name, metric="euclidean", index=index)
    with pytest.raises(UsageError, match="is not an index"):
        virnuc_dask.nearest(store.path, name, index=store.path)
    with pytest.raises(UsageError, match="is not an index"):
        build_index(store.path, store.path)
    with pytest.raises(UsageError, match="at a URL"):
        build_index("s3://bucket/some.zarr")
    empty = make_store(VIRAL_PROTEINS, "empty.zarr", embed=False)
    with pytest.raises(UsageError, match="no embedded row"):
        build_index(empty.path)


def test_damage_is_said_and_force_replaces_it(store: Store) -> None:
    index = build_index(store.path)
    content = rows_file(index).read_bytes()
    rows_file(index).write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="is not an index"):
        open_index(index)
    with pytest.raises(UsageError, match=r"is not an index: .*, with --force to replace this one"):
        build_index(store.path)
    assert open_index(build_index(store.path, force=True)).faiss.ntotal == 300
    about = json.loads((index / "about.json").read_text())
    for wrong in ({"mean": [0.0]}, {"file": "../rows.faiss"}, {"file": 1}, {"trained": None}):
        (index / "about.json").write_text(json.dumps(about | wrong))
        with pytest.raises(UsageError, match="is not an index"):
            open_index(index)
    (index / "notes.txt").write_text("not ours")
    with pytest.raises(UsageError, match=r"makes one$"):
        build_index(store.path, force=True)
    (index / "notes.txt").unlink()
    build_index(store.path, force=True)
    assert rows_file(index).name == json.loads((index / "about.json").read_text())["file"]


def test_more_neighbours_of_vectors_than_rows(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, max_residues=30)
    index = build_index(store.path)
    vectors = virnuc_dask.open_store(store.path).embedding.values[:2].astype(np.float32)
    exact = virnuc_dask.nearest(store.path, vectors, k=9)
    found = virnuc_dask.nearest(store.path, vectors, k=9, index=index)
    there = exact.row.values >= 0
    assert 0 < there.sum() < there.size
    assert np.array_equal(found.row.values >= 0, there)
    assert np.array_equal(found.row.values[:, 0], [0, 1])
    assert np.array_equal(np.isnan(found.similarity.values), ~there)


def test_lists_are_learnt_anew_once_there_are_many_more_rows(tmp_path: Path) -> None:
    store = random_store(tmp_path / "out.zarr", 1024, 16, rows_per_chunk=128)
    chunks = [store.read_chunk(chunk) for chunk in range(store.chunk_count)]
    for chunk in range(1, store.chunk_count):
        store.remove_chunk(chunk)
    index = build_index(store.path)
    first = open_index(index)
    assert (first.trained, first.faiss.nlist) == (128, 2)
    for chunk in range(1, 4):
        store.write_chunk(chunk, *chunks[chunk])
    build_index(store.path)  # four times the rows are not more than that
    grown = open_index(index)
    assert (grown.trained, grown.faiss.nlist, grown.faiss.ntotal) == (128, 2, 512)
    assert np.array_equal(grown.mean, first.mean)
    build_index(store.path, refit=True)
    again = open_index(index)
    assert (again.trained, again.faiss.nlist, again.chunks) == (512, 8, [0, 1, 2, 3])
    whole = np.concatenate([values for _, values in chunks[:4]]).astype(np.float64)
    np.testing.assert_allclose(again.mean, whole.mean(axis=0), rtol=1e-5, atol=1e-6)
    for chunk in range(1, 4):
        store.remove_chunk(chunk)
    assert open_index(build_index(store.path, refit=True)).trained == 128
    for chunk in range(1, 8):
        store.write_chunk(chunk, *chunks[chunk])
    build_index(store.path)
    last = open_index(index)
    assert (last.trained, last.faiss.nlist, last.faiss.ntotal) == (1024, 16, 1024)
    assert last.chunks == list(range(8))
    rows_file(index)


def test_what_an_index_lacks_is_said(store: Store) -> None:
    content = store.read_chunk(9)
    store.remove_chunk(9)
    index = build_index(store.path)
    name = str(virnuc_dask.open_store(store.path).sequence_id.values[0])
    assert "the index lacks" not in virnuc_dask.nearest(store.path, name, index=index).note
    store.write_chunk(9, *content)
    found = virnuc_dask.nearest(store.path, name, index=index)
    assert found.note == ("the index lacks 1 of 10 chunks; `virnuc-dask index` adds them")
    build_index(store.path)
    assert "note" not in virnuc_dask.nearest(store.path, name, index=index).attrs


KILLED = """
import os, signal, sys
from virnuc_dask.analysis import approximate

{module}.{function} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
approximate.build_index(sys.argv[1], refit=True)
"""


@pytest.mark.parametrize(
    ("module", "function"), [("approximate", "write_durably"), ("os", "replace")]
)
@pytest.mark.slow
def test_a_kill_leaves_the_index_that_was_there(module: str, function: str, store: Store) -> None:
    script = KILLED.format(module=module, function=function)

    def kill() -> None:
        done = subprocess.run([sys.executable, "-c", script, store.path], check=False)
        assert done.returncode == -signal.SIGKILL

    kill()  # the first one: there is no index then
    index = store.path.with_name("viral.zarr.faiss")
    with pytest.raises(UsageError, match="is not an index"):
        open_index(index)
    build_index(store.path)
    about, rows = (index / "about.json").read_bytes(), rows_file(index)
    kill()
    assert len(list(index.glob("rows-*"))) == 2
    assert (index / "about.json").read_bytes() == about
    assert open_index(index).faiss.ntotal == 300
    build_index(store.path, refit=True)
    assert rows_file(index) != rows


def test_a_link_is_followed(store: Store, tmp_path: Path) -> None:
    link = store.path.with_name("viral.zarr.faiss")
    link.symlink_to(tmp_path / "elsewhere")
    build_index(store.path)
    first = rows_file(tmp_path / "elsewhere").name
    build_index(store.path, refit=True)
    assert link.is_symlink()
    assert rows_file(tmp_path / "elsewhere").name != first


def test_without_faiss_it_is_said_how_to_get_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        build_index(store.path)


@pytest.mark.slow
def test_the_commands(store: Store, cli_here: Cli) -> None:
    assert cli_here("index", store.path).stdout == f"index in {store.path}.faiss\n"
    before = rows_file(Path(f"{store.path}.faiss"))
    assert cli_here("index", store.path, "--refit").returncode == 0
    assert rows_file(Path(f"{store.path}.faiss")) != before
    query = virnuc_dask.open_store(store.path).sequence_id.values[0]
    found = cli_here("nearest", store.path, "--query", query, "--index", f"{store.path}.faiss")
    assert (found.returncode, len(found.stdout.splitlines())) == (0, 11)
