"""Export: read back by each format's own library, and what spreadsheets make of identifiers."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas
import pyarrow
import pytest
from conftest import ROOT, Cli, Maker, command, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from nursery import wait_for
from pyarrow import parquet
from rows import NAMES
from xopen import xopen
from zarr.storage import LocalStore

import virnuc_dask
from virnuc_dask.analysis import formats
from virnuc_dask.analysis.chunk_passes import fill
from virnuc_dask.analysis.formats import rows_per_part
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import RANDOM_WEIGHTS, Settings, Status, Translation
from virnuc_dask.store.results import keep_result, open_result
from virnuc_dask.store.store import Store

PEPTIDE = "MKTAYIAKQRQISFVKSHFSRQ"

# Columns before the embedding.
HEAD = ["sequence_id", "length", "status", "description", "source"]


@pytest.fixture
def store(tmp_path: Path, client: Any) -> Store:
    """Three chunks: names of all kinds, and a row that is quarantined."""
    names = [*NAMES[:-1], "x" * 999, "+1", "-1", "@SUM(A1)", "twin#14", "twin", "twin"]
    names += ["a,b", 'a"b', "a;=1+1", "", ".", "YP_009724390.1"]
    rows = [f">{name}\n{PEPTIDE[number % 9 :]}\n" for number, name in enumerate(names)]
    rows.insert(3, ">bad\nMKT1\n")
    file = tmp_path / "names.faa"
    file.write_text("".join(rows))
    path = tmp_path / "names.zarr"
    virnuc_dask.run(file, path, model="demo", rows_per_chunk=8, client=client)
    return Store(path)


def contents(store: Store) -> tuple[list[str], list[int], list[str], NDArray[Any]]:
    data = virnuc_dask.open_store(store.path).load()
    states = [Status(code).meaning for code in data.status.values]
    return list(data.sequence_id.values), list(data.length.values), states, data.embedding.values


def read_csv(path: Path, delimiter: str = ",") -> tuple[list[str], list[list[str]]]:
    csv.field_size_limit(sys.maxsize)
    with xopen(path, newline="", format="gz" if path.suffix.lower() == ".gz" else None) as file:
        head, *rows = csv.reader(file, delimiter=delimiter)
    return head, rows


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.csv.gz", "My.CSV.GZ"])
def test_csv_holds_every_row_exactly(name: str, store: Store, tmp_path: Path) -> None:
    ids, lengths, states, embedding = contents(store)
    assert virnuc_dask.export(store.path, tmp_path / name, guard=False) == len(ids) == 21
    head, rows = read_csv(tmp_path / name, "\t" if "tsv" in name else ",")
    assert head[:7] == [*HEAD, "feature_0", "feature_1"]
    assert [row[0] for row in rows] == ids
    assert [int(row[1]) for row in rows] == lengths
    assert [row[2] for row in rows] == states
    assert rows[3][:3] == ["bad", "4", "invalid_residues"]
    assert not any(rows[3][5:])
    found = np.array([[float(cell or "nan") for cell in row[5:]] for row in rows], np.float32)
    assert np.array_equal(found, embedding, equal_nan=True)


def test_a_spreadsheet_computes_no_identifier(store: Store, tmp_path: Path) -> None:
    virnuc_dask.export(store.path, tmp_path / "out.csv")
    _, rows = read_csv(tmp_path / "out.csv")
    ids = [row[0] for row in rows]
    assert not any(name.startswith(("=", "+", "-", "@", "\t", "\r")) for name in ids)
    guarded = [name for name in ids if name.startswith("'")]
    assert guarded == ["'=cmd|'/c'!A1", "'+1", "'-1", "'@SUM(A1)"]
    # Nor does one that takes semicolons for separators.
    for cells in read_csv(tmp_path / "out.csv", ";")[1]:
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    # All others are as they were.
    assert [name.removeprefix("'") for name in ids] == contents(store)[0]


def test_parquet(store: Store, tmp_path: Path) -> None:
    ids, lengths, states, embedding = contents(store)
    virnuc_dask.export(store.path, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["sequence_id"].to_pylist() == ids
    assert table["length"].to_pylist() == lengths
    assert table["status"].to_pylist() == states
    # Of fixed size: what Hugging Face's datasets and others take for vectors.
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 64)
    lists = table["embedding"].to_pylist()
    assert lists.pop(3) is None
    assert np.array_equal(np.array(lists, np.float32), np.delete(embedding, 3, axis=0))
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(frame.sequence_id) == ids
    assert frame.embedding[3] is None
    assert np.array_equal(np.stack(frame.embedding.drop(3)), np.delete(embedding, 3, axis=0))


def test_npz(store: Store, tmp_path: Path) -> None:
    ids, lengths, states, embedding = contents(store)
    virnuc_dask.export(store.path, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        # A description as wide as the longest in every row would be larger than the embeddings.
        assert sorted(file) == sorted([*HEAD[:3], "source", "embedding", "virnuc_dask"])
        assert file["source"].tolist() == virnuc_dask.open_store(store.path).source.values.tolist()
        assert file["sequence_id"].tolist() == ids
        assert file["length"].tolist() == lengths
        assert file["status"].tolist() == states
        assert np.array_equal(file["embedding"], embedding, equal_nan=True)
        assert file["embedding"].dtype == np.float32


def test_hdf5_has_one_dataset_for_each_embedded_row(store: Store, tmp_path: Path) -> None:
    ids, _, states, embedding = contents(store)
    assert virnuc_dask.export(store.path, tmp_path / "out.h5") == 20
    with h5py.File(tmp_path / "out.h5") as file:
        assert all(isinstance(item, h5py.Dataset) for item in file.values())  # no groups
        assert "bad" not in file
        by_row = {int(item.attrs["row"]): item for item in file.values()}
        assert sorted(by_row) == [row for row in range(21) if row != 3]
        for row, item in by_row.items():
            assert item.attrs["sequence_id"] == ids[row]
            assert item.attrs["status"] == states[row]
            assert np.array_equal(item[:], embedding[row])
        assert file["YP_009724390.1"].attrs["row"] == 20
        # The second twin's second name was taken, too.
        assert {file[f"twin{more}"].attrs["row"] for more in ("", "#14", "#14#14")} == {12, 13, 14}


def test_hdf5_as_one_matrix(store: Store, tmp_path: Path) -> None:
    ids, lengths, states, embedding = contents(store)
    assert virnuc_dask.export(store.path, tmp_path / "out.h5", matrix=True) == 21
    with h5py.File(tmp_path / "out.h5") as file:
        assert sorted(file) == sorted([*HEAD, "embedding"])
        assert file["sequence_id"].asstr()[:].tolist() == ids
        assert file["length"][:].tolist() == lengths
        assert file["status"].asstr()[:].tolist() == states
        assert np.array_equal(file["embedding"][:], embedding, equal_nan=True)
        assert json.loads(file.attrs["virnuc_dask"])["model"] == "demo"
    for name in ("out.csv", "out.h5ad", "out.zarr"):
        with pytest.raises(UsageError, match=r"--matrix is for \.h5"):
            virnuc_dask.export(store.path, tmp_path / name, matrix=True)


def read_anndata(path: Path) -> anndata.AnnData:
    # From 0.12 on it warns of what it will write in another way; here it only reads.
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


@pytest.fixture
def clustered(make_store: Maker, awkward: Path) -> Store:
    """Rows of the clusters 0, 2 and 11, and three that have none."""
    store = make_store(awkward, "clustered.zarr", rows_per_chunk=3)
    numbers = {0: [0, 11], 1: [2], 2: [0]}
    chunks = iter(numbers.values())
    fill(keep_result(store, "cluster", "x", {}), lambda _: np.array(next(chunks)), workers=1)
    assert open_result(store, "cluster_x").array[:].tolist() == [0, 11, -1, -1, 2, -1, 0]
    return store


@pytest.mark.filterwarnings("error::UserWarning:anndata")
@pytest.mark.parametrize("name", ["out.h5ad", "out.zarr"])
def test_clusters_are_categories_in_anndata(name: str, clustered: Store, tmp_path: Path) -> None:
    virnuc_dask.export(clustered.path, tmp_path / name)
    column = read_anndata(tmp_path / name).obs.cluster_x
    assert list(column.cat.categories) == ["0", "2", "11"]
    assert column.tolist()[:2] + column.tolist()[4:5] == ["0", "11", "2"]
    assert column.isna().tolist() == [False, False, True, True, False, True, False]
    if name.endswith(".zarr"):
        return  # of which anndata warns that its metadata is not consolidated
    lazy = anndata.experimental.read_lazy(tmp_path / name).obs
    assert list(lazy["cluster_x"].dtype.categories) == ["0", "2", "11"]


def test_clusters_of_no_row_are_written(make_store: Maker, awkward: Path, tmp_path: Path) -> None:
    store = make_store(awkward, embed=False)
    keep_result(store, "cluster", "x", {})
    for name in ("none.h5ad", "none.zarr"):
        virnuc_dask.export(store.path, tmp_path / name, partial=True)
        assert read_anndata(tmp_path / name).obs.cluster_x.isna().all()


def test_a_row_without_a_cluster_has_an_empty_cell(clustered: Store, tmp_path: Path) -> None:
    fill(keep_result(clustered, "score", "x", {}), lambda rows: np.full(len(rows), 0.5))
    virnuc_dask.export(clustered.path, tmp_path / "out.tsv")
    head, rows = read_csv(tmp_path / "out.tsv", "\t")
    cells = [(row[head.index("cluster_x")], row[head.index("score_x")]) for row in rows]
    assert cells == [
        *[("0", "0.5"), ("11", "0.5"), ("", ""), ("", ""), ("2", "0.5"), ("", ""), ("0", "0.5")]
    ]
    virnuc_dask.export(clustered.path, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["cluster_x"].to_pylist() == [0, 11, None, None, 2, None, 0]


@pytest.mark.filterwarnings("error::UserWarning:anndata")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["out.h5ad", "out.zarr"])
def test_anndata(name: str, dtype: str, make_store: Maker, tmp_path: Path) -> None:
    source = tmp_path / "twins.faa"
    names = ["a", "a", "bad", "a", "a#1", "b", "a#1", "", "ü", "", "a#1#1"]
    source.write_text("".join(f">{n}\n{'MKT1' if n == 'bad' else PEPTIDE}\n" for n in names))
    store = make_store(source, "twins.zarr", rows_per_chunk=4, dtype=dtype)
    store.remove_chunk(1)
    assert virnuc_dask.export(store.path, tmp_path / name, partial=True) == len(names)
    ids, lengths, states, embedding = contents(store)
    states[4:8] = ["pending"] * 4
    data = read_anndata(tmp_path / name)
    assert data.shape == embedding.shape
    assert data.X.dtype == dtype
    assert np.array_equal(data.X, embedding, equal_nan=True)
    assert np.isnan(data.X[[2, 4, 5, 6, 7]]).all()
    assert list(data.obs.columns) == HEAD
    assert list(data.obs.sequence_id) == ids == names
    assert list(data.obs.length) == lengths
    assert list(data.obs.status) == states
    assert list(data.obs.status.cat.categories) == ["pending", "embedded", "invalid_residues"]
    # The first keeps its name; and what is put behind another's is nobody's name.
    expected = ["a", "a#1#1#1", "bad", "a#3", "a#1", "b", "a#1#6", "", "ü", "#9", "a#1#1"]
    assert list(data.obs_names) == expected
    assert list(data.var_names) == [f"feature_{number}" for number in range(64)]
    assert json.loads(data.uns["virnuc_dask"])["weights_sha256"] == store.identity.weights_sha256
    # What is read can be written, and a part of it be taken.
    data[data.obs.status == "embedded"].copy().write_h5ad(tmp_path / "again.h5ad")
    assert anndata.read_h5ad(tmp_path / "again.h5ad").n_obs == 6


def test_anndata_is_read_row_by_row_from_the_file(store: Store, tmp_path: Path) -> None:
    virnuc_dask.export(store.path, tmp_path / "out.h5ad")
    embedding = contents(store)[3]
    data = anndata.read_h5ad(tmp_path / "out.h5ad", backed="r")
    try:
        assert isinstance(data.X, h5py.Dataset)
        assert np.array_equal(data[5:9].X, embedding[5:9])
    finally:
        data.file.close()


def test_what_goes_while_it_is_exported_is_missed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_PART_BYTES", 1)  # one chunk in a part
    last = store.chunk_count - 1

    def remove(_done: int, _total: int) -> None:
        store.remove_chunk(last)

    assert last > 0
    for name in ("out.csv", "out.parquet", "out.npz"):
        status, embedding = store.read_chunk(last)
        with pytest.raises(StoreError, match=f"chunk {last} is gone or damaged"):
            virnuc_dask.export(store.path, tmp_path / name, progress=remove)
        assert not (tmp_path / name).exists()
        store.write_chunk(last, status, embedding)
    # The states of a chunk are there before its embeddings are.
    store.location.remove(f"embedding/c.{last}.0")
    virnuc_dask.export(store.path, tmp_path / "part.csv", partial=True)
    assert [row[2] for row in read_csv(tmp_path / "part.csv")[1]][-1] == "pending"


def test_a_file_beside_a_table_is_replaced_only_if_it_is_of_an_export(
    store: Store, tmp_path: Path
) -> None:
    beside = tmp_path / "out.csv.json"
    beside.write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="does not belong to an export"):
        virnuc_dask.export(store.path, tmp_path / "out.csv", force=True)
    assert beside.read_text() == '{"mine": 1}'
    beside.unlink()
    for _ in range(2):
        virnuc_dask.export(store.path, tmp_path / "out.csv", force=True)
    assert "exported_by" in beside.read_text()


def test_descriptions_and_sources_go_along_however_long(tmp_path: Path, make_store: Maker) -> None:
    source = tmp_path / "in, put.faa"
    texts = ['=of "one"\tand two', "", "x" * 100_000]
    source.write_text("".join(f">{n} {text}\n{PEPTIDE}\n" for n, text in enumerate(texts)))
    store = make_store(source, "long.zarr")
    for name in ("out.csv", "out.parquet", "rows.h5", "out.h5ad", "out.npz"):
        virnuc_dask.export(store.path, tmp_path / name)
    csv.field_size_limit(sys.maxsize)
    _, rows = read_csv(tmp_path / "out.csv")
    assert [row[3] for row in rows] == [f"'{texts[0]}", *texts[1:]]
    assert {row[4] for row in rows} == {str(source)}
    assert parquet.read_table(tmp_path / "out.parquet")["description"].to_pylist() == texts
    assert list(anndata.read_h5ad(tmp_path / "out.h5ad").obs.description) == texts
    with h5py.File(tmp_path / "rows.h5") as file:
        found = [file[str(n)].attrs.get("description") for n in range(3)]
        assert found == [*texts[:2], None]  # attributes hold 64 KiB
        assert file["2"].attrs["source"] == str(source)


# As a reader of each format sees them; the embedding is empty where there is none.
Row = tuple[str, int, str, tuple[float, ...]]


def read_rows(path: Path, store: Store) -> list[Row]:
    """All rows of an export; of HDF5 with a dataset a row those that are in it."""
    columns: dict[str, Any]
    if path.suffix in (".csv", ".gz"):
        _, cells = read_csv(path)
        heads = ("sequence_id", "length", "status")
        columns = {name: [row[number] for row in cells] for number, name in enumerate(heads)}
        values = [[float(cell) for cell in row[5:] if cell] for row in cells]
    elif path.suffix == ".parquet":
        columns = parquet.read_table(path).to_pydict()
        values = [value or [] for value in columns["embedding"]]
    elif path.suffix == ".npz":
        with np.load(path) as file:
            columns, values = dict(file), file["embedding"].tolist()
    elif path.suffix == ".h5":
        with h5py.File(path) as file:
            if "embedding" in file:
                columns = {n: v.asstr()[:] if v.dtype == object else v for n, v in file.items()}
                columns = {name: list(value) for name, value in columns.items()}
                values = file["embedding"][:].tolist()
            else:
                items = sorted(file.values(), key=lambda item: item.attrs["row"])
                columns = {n: [i.attrs[n] for i in items] for n in ("sequence_id", "length")}
                columns["status"] = [item.attrs["status"] for item in items]
                values = [item[:].tolist() for item in items]
    else:
        data = read_anndata(path)
        columns, values = dict(data.obs), data.X.tolist()
    kept = [() if np.isnan(value).any() else tuple(value) for value in values]
    ids, lengths, states = (columns[name] for name in ("sequence_id", "length", "status"))
    return list(zip(map(str, ids), map(int, lengths), map(str, states), kept, strict=True))


EVERY = ["out.csv", "out.csv.gz", "out.parquet", "out.npz", "rows.h5", "matrix.h5"]
EVERY += ["out.h5ad", "out.zarr"]
DONE = [state for state in Status if state is not Status.PENDING]
# A second > at the start of a line is no FASTA.
NAME = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=5).filter(
    lambda name: not name.startswith(">")
)


@settings(max_examples=8)
@given(
    names=st.lists(NAME | st.just("twin"), min_size=1, max_size=9),
    states=st.lists(st.sampled_from(DONE), min_size=9, max_size=9),
    missing=st.integers(0, 3),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_every_suffix_gives_the_same_rows(
    names: list[str], states: list[Status], missing: int, dtype: Any, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.faa").write_text("".join(f">{name}\n{PEPTIDE}\n" for name in names))
        chosen = Settings(model="demo", rows_per_chunk=3, dtype=dtype)
        store, _ = prepare([folder / "in.faa"], folder / "in.zarr", chosen, lambda _event: None)
        numbers = np.random.default_rng(seed)
        for chunk in set(range(store.chunk_count)) - {missing}:
            rows = store.rows(chunk)
            codes = np.array(states[rows], np.uint8)
            scale = 10.0 ** numbers.integers(-7, 4, (len(codes), 1))
            values = (numbers.standard_normal((len(codes), 64)) * scale).astype(dtype)
            values[codes >= Status.INVALID_RESIDUES] = np.nan
            store.write_chunk(chunk, codes, values)
        ids, lengths, meanings, embedding = contents(store)
        whole = [
            (*others, () if np.isnan(row).any() else tuple(row.tolist()))
            for *others, row in zip(ids, lengths, meanings, embedding, strict=True)
        ]
        assert ids == names
        for name in EVERY:
            out, matrix = folder / name, name == "matrix.h5"
            virnuc_dask.export(store.path, out, partial=True, guard=False, matrix=matrix)
            expected = [row for row in whole if row[3] or name != "rows.h5"]
            found = read_rows(out, store)
            if "csv" in name:
                # The shortest decimal that gives the number back, in the store's precision.
                found = [(*r[:3], tuple(np.array(r[3], dtype).tolist())) for r in found]
            assert found == expected


def test_a_store_in_float16(make_store: Maker, awkward: Path, client: Any, tmp_path: Path) -> None:
    store = make_store(awkward, dtype="float16")
    virnuc_dask.resume(store.path, client=client)
    store.remove_chunk(0)
    virnuc_dask.export(store.path, tmp_path / "nothing.npz", partial=True)
    with np.load(tmp_path / "nothing.npz", allow_pickle=False) as file:
        assert np.isnan(file["embedding"]).all()
        assert (file["status"] == "pending").all()
    virnuc_dask.resume(store.path, client=client)
    _, _, _, embedding = contents(store)
    assert embedding.dtype == np.float16
    virnuc_dask.export(store.path, tmp_path / "out.npz")
    virnuc_dask.export(store.path, tmp_path / "out.parquet")
    virnuc_dask.export(store.path, tmp_path / "out.csv")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert np.array_equal(file["embedding"], embedding, equal_nan=True)
    lists = parquet.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()
    good = ~np.isnan(embedding).all(1)
    assert [item is not None for item in lists] == good.tolist()
    assert np.array_equal(np.array([item for item in lists if item], np.float16), embedding[good])
    _, rows = read_csv(tmp_path / "out.csv")
    found = np.array([[float(cell or "nan") for cell in row[5:]] for row in rows], np.float16)
    assert np.array_equal(found, embedding, equal_nan=True)


@pytest.mark.slow
def test_translated_rows_say_where_they_are_from(tmp_path: Path, client: Any) -> None:
    script = [sys.executable, "examples/lambda_reads.py", "examples/lambda_virus.fa.gz"]
    reads = subprocess.run(script, cwd=ROOT, capture_output=True, check=True).stdout
    file, path = tmp_path / "reads.fq", tmp_path / "reads.zarr"
    file.write_bytes(b"".join(reads.splitlines(keepends=True)[:80]))
    virnuc_dask.run(file, path, model="demo", translation=Translation(), client=client)
    data = virnuc_dask.open_store(path).load()
    head = [*HEAD, "read_id", "read", "window", "frame", "start"]
    for name in ("out.csv", "out.parquet", "out.npz", "out.h5", "out.h5ad", "out.zarr"):
        assert virnuc_dask.export(path, tmp_path / name) == len(data.read) > 20
    virnuc_dask.export(path, tmp_path / "matrix.h5", matrix=True)
    # There are reads without a row, and reads with several.
    names = data.read_id.values[data.read.values].tolist()
    assert 1 < len(set(names)) < len(names)
    assert set(names) < set(data.read_id.values)
    found, rows = read_csv(tmp_path / "out.csv")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert found[:11] == [*head, "feature_0"]
    assert table.column_names == [*head, "embedding"]
    with (
        np.load(tmp_path / "out.npz", allow_pickle=False) as arrays,
        h5py.File(tmp_path / "out.h5") as sets,
        h5py.File(tmp_path / "matrix.h5") as matrix,
    ):
        assert sorted(arrays) == sorted({*head, "embedding", "virnuc_dask"} - {"description"})
        assert sorted(matrix) == sorted([*head, "embedding"])
        for number, name in enumerate(head[3:], 3):
            expected = names if name == "read_id" else data[name].values.tolist()
            assert [row[number] for row in rows] == list(map(str, expected))
            assert table[name].to_pylist() == expected
            assert name == "description" or arrays[name].tolist() == expected
            text = matrix[name].asstr() if matrix[name].dtype == object else matrix[name]
            assert text[:].tolist() == expected
            for other in ("out.h5ad", "out.zarr"):
                assert list(read_anndata(tmp_path / other).obs[name]) == expected
            for row, identifier in enumerate(data.sequence_id.values):
                assert sets[identifier].attrs[name] == expected[row]


def test_a_reads_name_is_no_formula(tmp_path: Path, make_store: Maker) -> None:
    source = tmp_path / "reads.fa"
    source.write_text(">=1+1\n" + "ATGAAAACCGCG" * 20 + "\n")
    store = make_store(source, "reads.zarr", translation=Translation())
    virnuc_dask.export(store.path, tmp_path / "out.csv")
    head, rows = read_csv(tmp_path / "out.csv")
    assert {row[head.index("read_id")] for row in rows} == {"'=1+1"}


def test_what_is_missing_is_not_left_out_in_silence(store: Store, tmp_path: Path) -> None:
    store.remove_chunk(1)
    with pytest.raises(StoreError, match="lacks 1 of 3 chunks"):
        virnuc_dask.export(store.path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert virnuc_dask.export(store.path, tmp_path / "out.csv", partial=True) == 21
    _, rows = read_csv(tmp_path / "out.csv")
    assert [row[2] for row in rows[8:16]] == ["pending"] * 8
    virnuc_dask.export(store.path, tmp_path / "out.parquet", partial=True)
    lists = parquet.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()
    assert lists[8:16] == [None] * 8


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz", "h5", "h5ad", "zarr"])
def test_an_export_is_whole_or_not_there(suffix: str, store: Store, tmp_path: Path) -> None:
    file = store.path / "embedding" / "c.1.0"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    before = set(tmp_path.iterdir())
    with pytest.raises(StoreError, match="chunk 1 is damaged"):
        virnuc_dask.export(store.path, tmp_path / f"out.{suffix}")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "suffix", ["csv", "csv.gz", "csv.zst", "csv.xz", "parquet", "npz", "h5", "h5ad", "zarr"]
)
@pytest.mark.sweep
def test_no_room_is_one_line_that_names_the_file(suffix: str, store: Store, tmp_path: Path) -> None:
    before, out = set(tmp_path.iterdir()), f"out.{suffix}"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *command("export", store.path, out)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 4
    assert done.stderr == f"error: [Errno 27] File too large: '{out}'\n"
    assert set(tmp_path.iterdir()) == before


def test_what_zarr_still_writes_after_an_error_is_removed_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []
    put, put_once = LocalStore.set, LocalStore.set_if_not_exists

    async def full(self: LocalStore, key: str, value: Any) -> None:
        if "/" in key:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await put(self, key, value)

    async def late(self: LocalStore, key: str, value: Any) -> None:
        begun.append(key)
        await asyncio.sleep(0.2)  # by then the error has ended the export, were it not to wait
        await put_once(self, key, value)
        ended.append(key)

    monkeypatch.setattr(LocalStore, "set", full)
    monkeypatch.setattr(LocalStore, "set_if_not_exists", late)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        virnuc_dask.export(store.path, tmp_path / "out.zarr")
    assert begun
    wait_for(lambda: begun == ended)
    assert set(tmp_path.iterdir()) == before


def test_lost_identifiers_are_not_exported_as_none(store: Store, tmp_path: Path) -> None:
    (store.path / "sequence_id" / "c.0").unlink()
    with pytest.raises(StoreError, match="do not hold the input"):
        virnuc_dask.export(store.path, tmp_path / "out.csv")


def test_an_identifier_too_long_for_numpy(tmp_path: Path, client: Any) -> None:
    (tmp_path / "long.faa").write_text(f">{'x' * 100_000}\nMKT\n>y\nMKV\n")
    virnuc_dask.run(tmp_path / "long.faa", tmp_path / "long.zarr", model="demo", client=client)
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match="100,000 letters"):
        virnuc_dask.export(tmp_path / "long.zarr", tmp_path / "out.npz")
    assert set(tmp_path.iterdir()) == before
    assert virnuc_dask.export(tmp_path / "long.zarr", tmp_path / "out.h5") == 2


def test_what_cannot_be_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("out", "out.xlsx", "out.npz.gz", "out.gz", ".csv"):
        with pytest.raises(UsageError, match="cannot tell the format"):
            virnuc_dask.export(store.path, tmp_path / name)
    with pytest.raises(UsageError, match="on this machine"):
        virnuc_dask.export(store.path, "s3://bucket/out.csv")
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        virnuc_dask.export(store.path, tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"needs h5py .*: pip install h5py"):
        virnuc_dask.export(store.path, tmp_path / "out.h5")


@pytest.mark.slow
def test_the_command(cli_here: Cli, store: Store, tmp_path: Path) -> None:
    done = cli_here("export", store.path, "out.csv")
    assert (done.returncode, done.stdout) == (0, "21 rows in out.csv\n"), done.stderr
    assert read_csv(tmp_path / "out.csv")[1][2][0].startswith("'=cmd")
    assert cli_here("export", store.path, "raw.csv", "--no-guard").returncode == 0
    assert read_csv(tmp_path / "raw.csv")[1][2][0].startswith("=cmd")
    assert cli_here("export", store.path, "out.csv").returncode == 2
    assert cli_here("export", store.path, "out.csv", "--force").returncode == 0
    assert cli_here("export", store.path, "out.h5", "--matrix").stdout == "21 rows in out.h5\n"
    store.remove_chunk(0)
    done = cli_here("export", store.path, "more.csv")
    assert done.returncode == 4
    assert "--partial" in done.stderr
    partial = cli_here("export", store.path, "more.csv", "--partial")
    assert (partial.returncode, partial.stderr) == (0, f"comment: {RANDOM_WEIGHTS}\n")


def test_pandas_reads_identifiers_as_they_are(make_store: Maker, tmp_path: Path) -> None:
    """Neuraminidase is NA; and what is said in docs is what reads it."""
    source = tmp_path / "flu.faa"
    source.write_text(">NA\nMKT\n>0012\nMKV\n>1e5\nMLK\n>nan\nM*K\n")
    store = make_store(source, "flu.zarr")
    virnuc_dask.export(store.path, tmp_path / "flu.csv")
    how = 'dtype={"sequence_id": str}, keep_default_na=False, na_values=[""]'
    assert how in (ROOT / "docs" / "howto" / "exports.md").read_text()
    table = pandas.read_csv(
        tmp_path / "flu.csv", dtype={"sequence_id": str}, keep_default_na=False, na_values=[""]
    )
    assert list(table.sequence_id) == ["NA", "0012", "1e5", "nan"]
    assert table.feature_0.dtype == np.float64
    assert list(table.feature_0.isna()) == [False, False, False, True]


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet", "npz", "h5", "h5ad", "zarr"])
def test_an_export_says_what_its_rows_are(suffix: str, store: Store, tmp_path: Path) -> None:
    out = tmp_path / f"out.{suffix}"
    virnuc_dask.export(store.path, out)
    if suffix == "parquet":
        text = parquet.read_schema(out).metadata[b"virnuc_dask"].decode()
    elif suffix == "npz":
        text = np.load(out)["virnuc_dask"].item()
    elif suffix == "h5":
        with h5py.File(out) as file:
            text = file.attrs["virnuc_dask"]
    elif suffix in ("h5ad", "zarr"):
        text = read_anndata(out).uns["virnuc_dask"]
    else:
        text = (tmp_path / f"out.{suffix}.json").read_text()
    about = json.loads(text)
    assert about["comment"] == RANDOM_WEIGHTS
    assert (about["model"], about["device"]) == ("demo", "cpu")
    for name in ("weights_sha256", "repr_layer", "pooling", "precision", "input_sha256"):
        assert about[name] == getattr(store.identity, name)
    assert about["exported_by"] == f"virnuc_dask {virnuc_dask.__version__}"
    assert about["versions"]["torch"]


def test_a_file_beside_a_table_is_never_replaced(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out.csv.json").write_text("mine")
    with pytest.raises(UsageError, match=r"out\.csv\.json exists"):
        virnuc_dask.export(store.path, tmp_path / "out.csv")
    assert (tmp_path / "out.csv.json").read_text() == "mine"
    assert not (tmp_path / "out.csv").exists()


# --- what is there is replaced, or stays ---------------------------------------------------------

REPLACED = ["out.csv", "out.parquet", "out.npz", "out.h5", "out.h5ad", "out.zarr"]


def files(path: Path) -> dict[str, bytes]:
    """The content of an export and of what is beside it."""
    found = {
        str(file.relative_to(path.parent)): file.read_bytes()
        for start in (path, path.with_name(f"{path.name}.json"))
        for file in (start, *start.rglob("*"))
        if file.is_file()
    }
    assert found
    return found


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.sweep
def test_force_replaces_what_is_there(name: str, store: Store, client: Any, tmp_path: Path) -> None:
    out = tmp_path / name
    store.remove_chunk(2)
    virnuc_dask.export(store.path, out, partial=True)
    partly = files(out)
    with pytest.raises(UsageError, match="exists"):
        virnuc_dask.export(store.path, out, partial=True)
    assert files(out) == partly
    virnuc_dask.resume(store.path, client=client)
    before = set(tmp_path.iterdir())
    virnuc_dask.export(store.path, out, force=True)
    assert set(tmp_path.iterdir()) == before
    virnuc_dask.export(store.path, tmp_path / f"new{out.suffix}")
    assert files(out) != partly
    rows = [row for row in read_rows(out, store) if row[3]]
    assert rows == [row for row in read_rows(tmp_path / f"new{out.suffix}", store) if row[3]]
    assert len(rows) == 20


def failed_export(within: Sequence[str], store: Store, out: Path) -> str:
    """The one line that `export --force` says when it fails within another command."""
    done = subprocess.run(
        [*within, *command("export", store.path, out.name, "--force")],
        cwd=out.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    return done.stderr


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.sweep
def test_the_old_one_stays_if_the_new_one_fails(name: str, store: Store, tmp_path: Path) -> None:
    out = tmp_path / name
    virnuc_dask.export(store.path, out)
    old, before = files(out), set(tmp_path.iterdir())
    # No room.
    limited = ("sh", "-c", 'ulimit -f 1; exec "$@"', "sh")
    said = failed_export(limited, store, tmp_path / name)
    assert "File too large" in said
    assert files(out) == old
    assert set(tmp_path.iterdir()) == before
    # A store that is damaged.
    chunk = store.path / "embedding" / "c.1.0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"123456789")
    with pytest.raises(StoreError, match="chunk 1 is damaged"):
        virnuc_dask.export(store.path, out, force=True)
    assert files(out) == old
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.sweep
def test_the_old_one_stays_if_the_export_is_killed(name: str, store: Store, tmp_path: Path) -> None:
    out = tmp_path / name
    virnuc_dask.export(store.path, out)
    old = files(out)
    code = (
        "import os, sys, virnuc_dask\n"
        "kill = lambda done, total: os.kill(os.getpid(), 9)\n"
        "virnuc_dask.export(*sys.argv[1:], force=True, progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.path, out], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert files(out) == old


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.zarr"])
@pytest.mark.slow
def test_the_old_one_stays_if_it_cannot_be_moved(name: str, store: Store, tmp_path: Path) -> None:
    """A mount point has a name that no rename takes from it."""
    out = tmp_path / name
    virnuc_dask.export(store.path, out)
    old, before = files(out), set(tmp_path.iterdir())
    mount = f'mount --bind "{out}" "{out}" && exec "$@"'
    mounted = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs leave to mount in a namespace of its own, as root has")
    said = failed_export(mounted, store, tmp_path / name)
    assert "busy" in said
    assert name in said
    assert files(out) == old
    assert set(tmp_path.iterdir()) == before


def test_what_is_not_an_export_is_never_replaced(store: Store, tmp_path: Path) -> None:
    (photos := tmp_path / "photos.zarr").mkdir()
    (photos / "cat.jpg").write_bytes(b"a cat")
    (tmp_path / "empty.zarr").mkdir()
    virnuc_dask.export(store.path, tmp_path / "real.zarr")
    virnuc_dask.export(store.path, tmp_path / "mixed.zarr")
    (tmp_path / "mixed.zarr" / "more").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "mine.txt")
    (tmp_path / "beside.csv.json").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    names = ["names", "photos", "empty", "mixed", "link", "file"]
    everything = tree(tmp_path), set(tmp_path.rglob("*"))
    for name in [*(f"{name}.zarr" for name in names), "folder.csv", "link.csv", "beside.csv"]:
        with pytest.raises(UsageError, match="is not replaced"):
            virnuc_dask.export(store.path, tmp_path / name, force=True)
    with pytest.raises(UsageError, match="is not replaced"):
        virnuc_dask.export(store.path, tmp_path / "pipe.h5", force=True)
    assert (tree(tmp_path), set(tmp_path.rglob("*"))) == everything


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("force", [False, True])
def test_what_comes_while_it_is_written_stays(
    name: str, force: bool, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / name
    before = set(tmp_path.iterdir())

    def come(_done: int, _total: int) -> None:
        if force:
            out.mkdir()
            (out / "mine").write_text("mine")
        else:
            out.write_text("mine")

    with pytest.raises(UsageError, match="is not replaced" if force else "exists"):
        virnuc_dask.export(store.path, out, force=force, progress=come)
    assert (out / "mine" if force else out).read_text() == "mine"
    assert set(tmp_path.iterdir()) - before == {out}


def test_another_programs_anndata_is_replaced(store: Store, tmp_path: Path) -> None:
    """In format 2 of Zarr, which has other files for the same."""
    other = anndata.AnnData(np.ones((2, 3), np.float32))
    with (
        warnings.catch_warnings(action="ignore"),  # some versions warn of it
        anndata.settings.override(zarr_write_format=2),
    ):
        other.write_zarr(tmp_path / "out.zarr")
    assert (tmp_path / "out.zarr" / ".zattrs").exists()
    virnuc_dask.export(store.path, tmp_path / "out.zarr", force=True)
    assert read_anndata(tmp_path / "out.zarr").shape == (21, 64)


# --- memory and progress -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """100,000 rows and 400,000, which are 26 MB and 102 MB of embeddings."""
    folder = tmp_path_factory.mktemp("large")
    made = []
    for count in (100_000, 400_000):
        source = folder / f"{count}.faa"
        source.write_text("".join(f">protein_{number}\n{PEPTIDE}\n" for number in range(count)))
        chosen = Settings(model="demo", rows_per_chunk=4096)
        store, _ = prepare([source], folder / f"{count}.zarr", chosen, lambda _event: None)
        numbers = np.random.default_rng(0)
        for chunk in range(store.chunk_count):
            rows = store.rows(chunk).stop - store.rows(chunk).start
            values = numbers.standard_normal((rows, 64), np.float32)
            store.write_chunk(chunk, np.full(rows, Status.EMBEDDED, np.uint8), values)
        made.append(store)
    return made[0], made[1]


# VmHWM and not getrusage, which begins with what the parent process had.
PEAK = """
import sys
import virnuc_dask
virnuc_dask.export(*sys.argv[1:3], matrix=sys.argv[3] == "matrix")
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.parametrize("name", ["out.parquet", "out.npz", "matrix.h5", "out.h5ad", "out.zarr"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(
    name: str, large_stores: tuple[Store, Store], tmp_path: Path
) -> None:
    peaks = []
    for number, store in enumerate(large_stores):
        out = tmp_path / f"{number}{name}"
        arguments = [sys.executable, "-c", PEAK, store.path, out, Path(name).stem]
        # With one arena, or what is free in others is counted too.
        alone = os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        peaks.append(int(subprocess.check_output(arguments, cwd=ROOT, env=alone)))
    # Columns of several chunks are read at once: 35 to 62 MB more. All embeddings would be 77 MB
    # beside them.
    assert peaks[1] - peaks[0] < 75e6, peaks


def test_how_far_it_is(large_stores: tuple[Store, Store], tmp_path: Path) -> None:
    store, seen = large_stores[0], []
    virnuc_dask.export(
        store.path, tmp_path / "out.npz", progress=lambda done, total: seen.append((done, total))
    )
    step = rows_per_part(store)
    assert len(seen) > 1
    assert seen == [(min(end, 100_000), 100_000) for end in range(step, 100_000 + step, step)]


def test_a_terminal_shows_how_far_it_is(store: Store, tmp_path: Path) -> None:
    terminal, stderr = os.openpty()
    arguments = command("export", store.path, "out.csv")
    done = subprocess.run(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    shown = os.read(terminal, 1000).decode()
    os.close(terminal)
    assert (done.returncode, done.stdout) == (0, b"21 rows in out.csv\n")
    assert shown == f"\rwrote 21 of 21 rows\r\ncomment: {RANDOM_WEIGHTS}\r\n"
