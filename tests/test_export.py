"""Export: read back by each format's own library, and what spreadsheets make of identifiers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
from conftest import ROOT, Cli, Maker, command
from numpy.typing import NDArray
from pyarrow import parquet
from test_security import NAMES
from xopen import xopen

import virnuc_dask
from virnuc_dask.config import RANDOM_WEIGHTS, Status, Translation
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.store import Store

PEPTIDE = "MKTAYIAKQRQISFVKSHFSRQ"


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
    assert head[:5] == ["sequence_id", "length", "status", "feature_0", "feature_1"]
    assert [row[0] for row in rows] == ids
    assert [int(row[1]) for row in rows] == lengths
    assert [row[2] for row in rows] == states
    assert rows[3][:3] == ["bad", "4", "invalid_residues"]
    assert not any(rows[3][3:])
    found = np.array([[float(cell or "nan") for cell in row[3:]] for row in rows], np.float32)
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
    lists = table["embedding"].to_pylist()
    assert lists.pop(3) is None
    assert np.array_equal(np.array(lists, np.float32), np.delete(embedding, 3, axis=0))


def test_npz(store: Store, tmp_path: Path) -> None:
    ids, lengths, states, embedding = contents(store)
    virnuc_dask.export(store.path, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert sorted(file) == ["embedding", "length", "sequence_id", "status", "virnuc_dask"]
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
    found = np.array([[float(cell or "nan") for cell in row[3:]] for row in rows], np.float16)
    assert np.array_equal(found, embedding, equal_nan=True)


def test_translated_rows_say_where_they_are_from(tmp_path: Path, client: Any) -> None:
    script = [sys.executable, "examples/lambda_reads.py", "examples/lambda_virus.fa.gz"]
    reads = subprocess.run(script, cwd=ROOT, capture_output=True, check=True).stdout
    file, path = tmp_path / "reads.fq", tmp_path / "reads.zarr"
    file.write_bytes(b"".join(reads.splitlines(keepends=True)[:80]))
    virnuc_dask.run(file, path, model="demo", translation=Translation(), client=client)
    data = virnuc_dask.open_store(path).load()
    head = ["sequence_id", "length", "status", "read", "window", "frame", "start"]
    for name in ("out.csv", "out.parquet", "out.npz", "out.h5"):
        assert virnuc_dask.export(path, tmp_path / name) == len(data.read) > 20
    found, rows = read_csv(tmp_path / "out.csv")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert found[:8] == [*head, "feature_0"]
    assert table.column_names == [*head, "embedding"]
    with (
        np.load(tmp_path / "out.npz", allow_pickle=False) as arrays,
        h5py.File(tmp_path / "out.h5") as sets,
    ):
        assert sorted(arrays) == sorted([*head, "embedding", "virnuc_dask"])
        for number, name in enumerate(head[3:], 3):
            expected = data[name].values.tolist()
            assert [int(row[number]) for row in rows] == expected
            assert table[name].to_pylist() == arrays[name].tolist() == expected
            for row, identifier in enumerate(data.sequence_id.values):
                assert sets[identifier].attrs[name] == expected[row]


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


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz", "h5"])
def test_an_export_is_whole_or_not_there(suffix: str, store: Store, tmp_path: Path) -> None:
    file = store.path / "embedding" / "c.1.0"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    before = set(tmp_path.iterdir())
    with pytest.raises(StoreError, match="chunk 1 is damaged"):
        virnuc_dask.export(store.path, tmp_path / f"out.{suffix}")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "csv.zst", "csv.xz", "parquet", "npz", "h5"])
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
    with pytest.raises(UsageError, match=r"needs h5py .*virnuc_dask\[export\]"):
        virnuc_dask.export(store.path, tmp_path / "out.h5")


def test_the_command(cli: Cli, store: Store, tmp_path: Path) -> None:
    done = cli("export", store.path, "out.csv")
    assert (done.returncode, done.stdout) == (0, "21 rows in out.csv\n"), done.stderr
    assert read_csv(tmp_path / "out.csv")[1][2][0].startswith("'=cmd")
    assert cli("export", store.path, "raw.csv", "--no-guard").returncode == 0
    assert read_csv(tmp_path / "raw.csv")[1][2][0].startswith("=cmd")
    assert cli("export", store.path, "out.csv").returncode == 2
    store.remove_chunk(0)
    done = cli("export", store.path, "more.csv")
    assert done.returncode == 4
    assert "--partial" in done.stderr
    assert cli("export", store.path, "more.csv", "--partial").returncode == 0


def test_pandas_reads_identifiers_as_they_are(make_store: Maker, tmp_path: Path) -> None:
    """Neuraminidase is NA; and what is said in README is what reads it."""
    source = tmp_path / "flu.faa"
    source.write_text(">NA\nMKT\n>0012\nMKV\n>1e5\nMLK\n>nan\nM*K\n")
    store = make_store(source, "flu.zarr")
    virnuc_dask.export(store.path, tmp_path / "flu.csv")
    how = 'dtype={"sequence_id": str}, keep_default_na=False, na_values=[""]'
    assert how in (ROOT / "README.md").read_text()
    table = pandas.read_csv(
        tmp_path / "flu.csv", dtype={"sequence_id": str}, keep_default_na=False, na_values=[""]
    )
    assert list(table.sequence_id) == ["NA", "0012", "1e5", "nan"]
    assert table.feature_0.dtype == np.float64
    assert list(table.feature_0.isna()) == [False, False, False, True]


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet", "npz", "h5"])
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
