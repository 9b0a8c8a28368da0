"""An approximate index: what it finds beside an exact search, and rows that come later."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker

import virnuc_dask
from benchmarks.stores import random_store
from virnuc_dask.analysis.approximate import build_index, open_index
from virnuc_dask.errors import UsageError
from virnuc_dask.store import Store


@pytest.fixture
def store(make_store: Maker) -> Store:
    return make_store(VIRAL_PROTEINS, "viral.zarr")


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


def test_rows_that_come_later_are_added(make_store: Maker) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store = make_store(VIRAL_PROTEINS, embed=False)
    for chunk in (0, 4):
        store.write_chunk(chunk, *whole.read_chunk(chunk))
    index = build_index(store.path)
    first = open_index(index)
    assert (first.chunks, first.faiss.ntotal) == ([0, 4], 64)
    for chunk in range(store.chunk_count):
        store.write_chunk(chunk, *whole.read_chunk(chunk))
    done: list[tuple[int, int]] = []
    build_index(store.path, progress=lambda *counts: done.append(counts))
    assert done[-1] == (8, 8)
    later = open_index(index)
    assert (later.chunks, later.faiss.ntotal) == (list(range(10)), 300)
    assert np.array_equal(first.mean, later.mean)
    before = (index / "rows.faiss").stat()
    build_index(store.path)
    assert (index / "rows.faiss").stat() == before
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


def test_what_makes_no_sense_is_refused(store: Store, make_store: Maker) -> None:
    index = build_index(store.path)
    other = make_store(VIRAL_PROTEINS, "other.zarr")
    name = str(virnuc_dask.open_store(store.path).sequence_id.values[0])
    with pytest.raises(UsageError, match="index of another store"):
        virnuc_dask.nearest(other.path, name, query_store=store.path, index=index)
    with pytest.raises(UsageError, match="is of another store; --force"):
        build_index(other.path, index)
    assert open_index(build_index(other.path, index, force=True)).store == other.id
    with pytest.raises(UsageError, match="cosine, centred"):
        virnuc_dask.nearest(store.path, name, metric="euclidean", index=index)
    with pytest.raises(UsageError, match="is no index"):
        virnuc_dask.nearest(store.path, name, index=store.path)
    with pytest.raises(UsageError, match="is no index"):
        build_index(store.path, store.path)
    with pytest.raises(UsageError, match="at a URL"):
        build_index("s3://bucket/some.zarr")
    empty = make_store(VIRAL_PROTEINS, "empty.zarr", embed=False)
    with pytest.raises(UsageError, match="no embedded row"):
        build_index(empty.path)


def test_damage_is_said(store: Store) -> None:
    index = build_index(store.path)
    content = (index / "rows.faiss").read_bytes()
    (index / "rows.faiss").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="is no index"):
        open_index(index)
    (index / "rows.faiss").write_bytes(content)
    about = json.loads((index / "about.json").read_text())
    (index / "about.json").write_text(json.dumps(about | {"mean": [0.0]}))
    with pytest.raises(UsageError, match="is no index"):
        open_index(index)


def test_without_faiss_it_is_said_how_to_get_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r"pip install 'virnuc_dask\[faiss\]'"):
        build_index(store.path)


def test_the_commands(store: Store, cli: Cli) -> None:
    assert cli("index", store.path).stdout == f"index in {store.path}.faiss\n"
    query = virnuc_dask.open_store(store.path).sequence_id.values[0]
    found = cli("nearest", store.path, "--query", query, "--index", f"{store.path}.faiss")
    assert (found.returncode, len(found.stdout.splitlines())) == (0, 11)
