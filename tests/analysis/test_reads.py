"""Rows of translated reads, taken together by read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, VIRAL_PROTEINS, Maker

import virnuc_dask
from virnuc_dask.analysis.reads import How
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import Translation
from virnuc_dask.store.store import Store

CONTIG = ROOT / "examples" / "lambda_virus.fa.gz"


@pytest.fixture
def frames(make_store: Maker, tmp_path: Path) -> Store:
    """Frames of reads with none, one and several; some frames are quarantined, and one chunk of
    them is not computed yet."""
    reads = tmp_path / "reads.fa"
    rng = np.random.default_rng(5)
    with reads.open("w") as file:
        for number in range(60):
            letters = "".join(rng.choice(list("ACGT"), rng.integers(40, 260)))
            file.write(f">r{number}\n{letters}\n")
    how = Translation(frames="orf", min_residues=25)
    store = make_store(reads, rows_per_chunk=16, translation=how, max_residues=40, long="skip")
    store.remove_chunk(2)
    return store


def expected(data: Any, how: str) -> pd.DataFrame:
    rows = pd.DataFrame(data.embedding.values.astype(np.float32)).groupby(data.read.values)
    return getattr(rows, how)()


@pytest.mark.parametrize("how", ["mean", "max", "min"])
def test_rows_of_a_read_are_one(frames: Store, how: How) -> None:
    data = virnuc_dask.open_store(frames.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = virnuc_dask.by_read(data, how)
        values = found.embedding.values
    wanted = expected(data, how)
    assert found.embedding.chunks
    assert values.dtype == np.float32
    assert found.read.values.tolist() == wanted.index.tolist()
    assert np.allclose(values, wanted.values, rtol=1e-5, atol=1e-6, equal_nan=True)
    # Each case is among them.
    assert len(wanted) < 60
    assert {1, 2} <= set(found.rows.values.tolist())
    assert np.isnan(values).all(axis=1).any()
    some = data.embedded.to_series().groupby(data.read.values).agg(["sum", "size"])
    assert ((some["sum"] > 0) & (some["sum"] < some["size"])).any()
    assert found.read_id.values.tolist() == [f"r{number}" for number in wanted.index]
    assert found.rows.values.tolist() == some["size"].tolist()


def test_a_part_of_the_rows_is_as_good(frames: Store) -> None:
    data = virnuc_dask.open_store(frames.path, embedded_only=True)
    part = data.isel(sequence=data.frame > 0)
    assert 0 < part.sizes["sequence"] < data.sizes["sequence"]
    found = virnuc_dask.by_read(part)
    assert np.allclose(found.embedding.values, expected(part, "mean").values, rtol=1e-5, atol=1e-6)
    none = virnuc_dask.by_read(data.isel(sequence=slice(0, 0)))
    assert none.embedding.shape == (0, 64)


@pytest.mark.slow
def test_windows_of_one_long_record_are_one_row(make_store: Maker) -> None:
    """More rows of a read than a chunk has."""
    store = make_store(CONTIG, rows_per_chunk=8, translation=Translation(window=300))
    data = virnuc_dask.open_store(store.path)
    found = virnuc_dask.by_read(data)
    assert found.rows.values.tolist() == [store.records]
    assert store.records > 50
    assert np.allclose(found.embedding.values, expected(data, "mean").values, rtol=1e-4, atol=1e-5)


def test_the_graph_grows_with_chunks_and_not_with_reads(frames: Store) -> None:
    data = virnuc_dask.open_store(frames.path)
    found = virnuc_dask.by_read(data)
    tasks = dict(found.embedding.__dask_graph__())
    assert frames.chunk_count > 3
    assert len(tasks) <= 12 * frames.chunk_count


def test_what_cannot_be_taken_together_is_refused(frames: Store, make_store: Maker) -> None:
    data = virnuc_dask.open_store(frames.path)
    with pytest.raises(UsageError, match="order of their reads"):
        virnuc_dask.by_read(data.isel(sequence=slice(None, None, -1)))
    with pytest.raises(UsageError, match="one of mean, max, min"):
        virnuc_dask.by_read(data, "sum")  # type: ignore[arg-type]
    only = virnuc_dask.by_read(data[["embedding"]])  # which leaves out the reads' names
    assert list(only.coords) == ["read", "rows"]
    proteins = make_store(VIRAL_PROTEINS, "proteins.zarr", embed=False)
    with pytest.raises(UsageError, match="not translated"):
        virnuc_dask.by_read(virnuc_dask.open_store(proteins.path))
