"""A store as xarray shows it: rows that say what they are, masks, and what is read when."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray
from conftest import ROOT, VIRAL_PROTEINS, Maker, tree
from rows import forget_headers

import virnuc_dask
from virnuc_dask.analysis.columns import named
from virnuc_dask.errors import StoreError
from virnuc_dask.inputs.records import InputSummary, Record
from virnuc_dask.settings import Status, Translation
from virnuc_dask.store.store import HEADERS, Store

OTHER_PROTEINS = ROOT / "examples" / "esm_some_proteins.fasta"


@pytest.fixture
def several(tmp_path: Path) -> list[Path]:
    """Two inputs with headers of every kind, one without a record, and one once more."""
    first, empty, second = (tmp_path / name for name in ("a b.faa", "empty.faa", "c.fq"))
    first.write_bytes(
        b">one  two words, and a tab\there \nMKT\n>alone\nMKV\n>\nMKW\n"
        b">bad\xe9 caf\xc3\xa9\nMKL\n>caf\xc3\xa9 bad\xe9\nM1K\n"
    )
    empty.write_text("")
    second.write_text("@read 1:N:0:ATCACG\nMKTA\n+\nIIII\n")
    return [first, empty, second, first]


def test_rows_know_their_headers_and_their_files(several: list[Path], make_store: Maker) -> None:
    data = virnuc_dask.open_store(make_store(several).path)
    names = ["one", "alone", "", "bad\xe9", "café", "read"]
    assert data.sequence_id.values.tolist() == names + names[:5]
    assert data.description.values[:6].tolist() == [
        "two words, and a tab\there",
        "",
        "",
        "café",
        "bad\xe9",
        "1:N:0:ATCACG",
    ]
    first, second = str(several[0]), str(several[2])
    assert data.source.values.tolist() == [first] * 5 + [second] + [first] * 5
    assert data.embedded.values.tolist() == [True] * 4 + [False, True] + [True] * 4 + [False]
    # Other libraries take them.
    for name in ("sequence_id", "description", "source"):
        assert data[name].values.astype(str).tolist() == data[name].values.tolist()
    assert data.isel(sequence=data.source == second).sizes["sequence"] == 1
    assert np.flatnonzero(data.sequence_id.str.startswith("b")).tolist() == [3, 9]


@pytest.mark.slow
def test_no_value_of_a_row_depends_on_its_description(tmp_path: Path, make_store: Maker) -> None:
    """A store is gone on with where only descriptions or files' names have changed."""
    text = gzip.decompress(VIRAL_PROTEINS.read_bytes()).decode()
    bare = tmp_path / "bare.faa"
    bare.write_text("".join(f"{line.split()[0]}\n" for line in text.splitlines()))
    store, other = make_store(VIRAL_PROTEINS), make_store(bare, "bare.zarr")
    assert store.identity == other.identity
    assert virnuc_dask.open_store(store.path).description.values[0].startswith("RNA-dependent")
    assert set(virnuc_dask.open_store(other.path).description.values) == {""}


def test_frames_have_their_reads_description(tmp_path: Path, make_store: Maker) -> None:
    reads = tmp_path / "reads.fa"
    dna = "ATGAAAACCGCGTATATTGCGAAACAGCGTCAGATTAGCTTTGTGAAAAGCCATTTTAGC"
    reads.write_text(f">none too short\nACG\n>r1 first of two\n{dna}\n>r2\n{dna}\n")
    store = make_store(reads, translation=Translation(min_residues=10))
    data = virnuc_dask.open_store(store.path)
    wanted = {"r1": "first of two", "r2": ""}
    names = data.read_id.values[data.read.values]
    assert set(names) == wanted.keys()
    assert data.description.values.tolist() == [wanted[name] for name in names]
    assert set(data.source.values) == {str(reads)}
    assert list(data.coords)[:4] == ["sequence_id", "description", "source", "length"]


@pytest.mark.slow
def test_masks_work_and_leave_embeddings_lazy(awkward: Path, make_store: Maker) -> None:
    store = make_store(awkward, rows_per_chunk=3)
    data = virnuc_dask.open_store(store.path)
    good = data.embedded.values
    assert 0 < good.sum() < len(good)
    everything = data.embedding.values
    assert np.array_equal(good, np.isfinite(everything).all(axis=1))
    for found in (
        data.embedding[data.embedded],
        data.embedding.isel(sequence=data.embedded),
        data.isel(sequence=data.embedded).embedding,
        data.embedding.where(data.embedded, drop=True),
        data.where(data.embedded, drop=True).embedding,
        virnuc_dask.open_store(store.path, embedded_only=True).embedding,
        pickle.loads(pickle.dumps(data)).embedding[data.embedded],
    ):
        assert found.chunks
        assert np.array_equal(found.values, everything[good])
        assert found.sequence_id.values.tolist() == data.sequence_id.values[good].tolist()
    short = data.embedding[data.length < 5]
    assert short.shape[0] == (data.length.values < 5).sum()
    assert data.embedded[2:5].values.tolist() == good[2:5].tolist()
    assert data.embedded[[4, 1]].values.tolist() == good[[4, 1]].tolist()


def test_a_files_name_need_not_be_text(tmp_path: Path, make_store: Maker) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.faa")
    source.write_text(">a\nMKT\n")
    store = make_store(source)
    shown = str(tmp_path / "caf\xe9.faa")
    assert virnuc_dask.open_store(store.path).source.values.tolist() == [shown]
    for name in ("out.csv", "out.parquet", "out.npz", "out.h5", "out.h5ad"):
        virnuc_dask.export(store.path, tmp_path / name)
    assert shown in (tmp_path / "out.csv").read_text()


def test_a_row_is_found_by_its_identifier(make_store: Maker) -> None:
    data = virnuc_dask.open_store(make_store(VIRAL_PROTEINS).path)
    indexed = data.set_xindex("sequence_id")
    chosen = ["sp|P17460|RDRP_TCV", "tr|D6CFW8|D6CFW8_9VIRU"]
    found = indexed.sel(sequence_id=chosen)
    assert found.embedding.chunks
    rows = [data.sequence_id.values.tolist().index(name) for name in chosen]
    assert np.array_equal(found.embedding.values, data.embedding.values[rows])
    assert indexed.sel(sequence_id=chosen[0]).length == data.length.values[rows[0]]
    with pytest.raises(KeyError):
        indexed.sel(sequence_id="nobody")


def test_what_a_run_has_added_since_is_seen(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    data = virnuc_dask.open_store(store.path)
    assert not data.embedded.values.any()
    assert virnuc_dask.open_store(store.path, embedded_only=True).sizes["sequence"] == 0
    rows = store.rows(1)
    count = rows.stop - rows.start
    store.write_chunk(
        1, np.full(count, Status.EMBEDDED, np.uint8), np.ones((count, store.dimension), np.float32)
    )
    assert np.flatnonzero(data.embedded).tolist() == list(range(rows.start, rows.stop))
    # The states of a chunk are there before its embeddings are.
    (store.path / "status" / "c.3").write_bytes((store.path / "status" / "c.1").read_bytes())
    assert data.status[store.rows(3)].values.all()
    assert np.flatnonzero(data.embedded).tolist() == list(range(rows.start, rows.stop))
    assert data.embedding[data.embedded].values.sum() == count * store.dimension


def test_opening_reads_no_chunk(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    for path in store.path.rglob("c.*"):
        path.write_bytes(b"damaged")
    data = virnuc_dask.open_store(store.path)
    assert data.sizes["sequence"] == 300
    assert "embedding" in repr(data)
    assert data._repr_html_()
    with pytest.raises(ValueError, match=r"checksum|Checksum|too short|buffer"):
        data.sequence_id.values  # noqa: B018


@pytest.mark.slow
def test_a_store_from_before_there_were_headers_is_opened(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    forget_headers(store)
    data = virnuc_dask.open_store(store.path)
    assert list(data.coords) == ["sequence_id", "length", "status", "embedded"]
    report = virnuc_dask.verify(store.path)
    assert (report.sequences, report.leftovers) == (None, [])
    for name in ("old.csv", "old.npz", "old.h5ad"):
        assert virnuc_dask.export(store.path, store.path.with_name(name), partial=True) == 300
    assert virnuc_dask.resume(store.path, cluster="local", workers=1).exit_code == 0
    assert data.embedded.values.all()
    found = virnuc_dask.nearest(store.path, data.sequence_id[:2])
    assert "description" not in found
    assert found.sizes == {"query": 2, "neighbour": 10}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("damage", ["deleted", "flipped", "emptied"])
def test_damaged_headers_are_found(make_store: Maker, name: str, damage: str) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    chunk = store.path / name / "c.0"
    if damage == "deleted":
        chunk.unlink()
    else:
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content if damage == "flipped" else b"")
    before = tree(store.path)
    report = virnuc_dask.verify(store.path, repair=True)
    assert report.sequences
    assert report.exit_code == 4
    assert tree(store.path) == before


def test_a_source_that_is_no_input_is_found(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    store.array("source")[5] = 7
    assert "`source`" in str(virnuc_dask.verify(store.path).sequences)


def test_many_inputs_are_numbered_at_once_and_one_given_twice_by_its_first_place() -> None:
    summary = InputSummary()
    names = [f"{number}.faa" for number in range(20_000)]
    for name in ("0.faa", "1.faa", "0.faa"):
        summary.files.setdefault(name, len(summary.files))
    headers = summary.take_headers([Record("a", "MK", name, 1) for name in names])
    assert headers.source.tolist() == list(range(20_000))


def test_a_number_without_a_file_is_no_file() -> None:
    numbers = xarray.Variable("n", np.array([0, 1, 2, -1], np.int32))
    assert named(numbers, ["a", "b"]).values.tolist() == ["a", "b", "", ""]


def test_a_torn_store_says_so(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    (store.path / "description" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="description"):
        Store(store.path)
