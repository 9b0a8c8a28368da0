"""Results beside the embeddings: committed by chunk, resumed by presence, checked, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from conftest import VIRAL_PROTEINS, Cli, Maker, chunk_bytes, tree
from numpy.typing import NDArray
from pyarrow import parquet

import virnuc_dask
from virnuc_dask.analysis.chunk_passes import fill
from virnuc_dask.errors import ResultReplacedError, StoreError, StoreReplacedError, UsageError
from virnuc_dask.settings import Status
from virnuc_dask.store.results import Result, keep_result, open_result, result_names
from virnuc_dask.store.store import Store


def first_feature(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows[:, 0]


def first_two(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows[:, :2]


def filled(store: Store) -> Result:
    result = keep_result(store, "score", "x", {"by": "a test"})
    fill(result, first_feature)
    return result


def chunks_of(result: Result) -> dict[str, bytes]:
    """Its chunks' bytes."""
    found = tree(result.store.path / result.name)
    return {name: content for name, (_, _, content) in found.items() if name != "zarr.json"}


def test_a_result_has_a_value_for_each_row_and_changes_no_embedding(store: Store) -> None:
    before = chunk_bytes(store.path)
    result = filled(store)
    map_ = keep_result(store, "map", "x", {})
    fill(map_, first_two)
    assert chunk_bytes(store.path) == before
    assert Store(store.path).identity == store.identity
    for data in (virnuc_dask.open_store(store.path), xarray.open_zarr(store.path)):
        embedding = data.embedding.values
        assert np.array_equal(data.score_x.values, embedding[:, 0])
        assert np.array_equal(data.map_x.values, embedding[:, :2])
        assert data.map_x.dims == ("sequence", "axis")
    assert result_names(store) == ["map_x", "score_x"]
    assert open_result(store, "score_x").about == {"by": "a test"}
    assert result.present().all()
    assert virnuc_dask.verify(store.path).to_json()["leftovers"] == []


def test_a_mask_of_scores_selects_rows(store: Store) -> None:
    filled(store)
    data = virnuc_dask.open_store(store.path)
    high = data.isel(sequence=data.score_x > 0)
    assert 0 < high.sizes["sequence"] < 300
    assert (high.embedding[:, 0] > 0).all()


@pytest.mark.slow
def test_only_what_is_missing_is_computed(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    other = make_store(VIRAL_PROTEINS, "whole.zarr")
    for chunk in (2, 5):
        store.write_chunk(chunk, *other.read_chunk(chunk))
    result = keep_result(store, "score", "x", {})
    calls: list[tuple[int, int]] = []
    assert fill(result, first_feature, progress=lambda *done: calls.append(done)) == 2
    assert calls[-1] == (2, 2)
    assert np.flatnonzero(result.present()).tolist() == [2, 5]
    values = virnuc_dask.open_store(store.path).score_x.values
    assert np.flatnonzero(np.isfinite(values)).tolist() == [*range(64, 96), *range(160, 192)]
    for chunk in range(store.chunk_count):
        store.write_chunk(chunk, *other.read_chunk(chunk))
    before = tree(store.path / "score_x")
    assert fill(result, first_feature) == 8
    after = tree(store.path / "score_x")
    assert before.items() <= after.items()
    assert fill(result, first_feature) == 0
    assert tree(store.path / "score_x") == after
    assert np.array_equal(virnuc_dask.open_store(store.path).score_x.values, filled(other).array[:])


def test_workers_of_a_cluster_write_the_same(
    store: Store, make_store: Maker, client: object
) -> None:
    other = filled(make_store(VIRAL_PROTEINS, "other.zarr"))
    result = keep_result(store, "score", "x", {"by": "a test"})
    fill(result, lambda rows: rows[:, 0], client=client)  # pickled by value
    assert chunks_of(result) == chunks_of(other)


def test_quarantined_rows_have_no_value(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, max_residues=30)
    fill(result := keep_result(store, "score", "x", {}), first_feature)
    fill(clusters := keep_result(store, "cluster", "x", {}), lambda rows: np.ones(len(rows)))
    data = virnuc_dask.open_store(store.path)
    assert 0 < data.embedded.sum() < store.records
    assert np.array_equal(np.isfinite(result.array[:]), data.embedded.values)
    assert np.array_equal(clusters.array[:], np.where(data.embedded.values, 1, -1))


def test_another_result_of_the_name_is_not_mixed_in(store: Store) -> None:
    filled(store)
    with pytest.raises(UsageError, match=r"`score_x` was made with other settings \(by\); --rep"):
        keep_result(store, "score", "x", {"by": "another"})
    assert open_result(store, "score_x").present().all()
    result = keep_result(store, "score", "x", {"by": "another"}, replace=True)
    assert not result.present().any()
    assert np.isnan(result.array[:]).all()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "a.b", "ä", "a" * 65])
def test_names_are_words(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="letters, digits"):
        keep_result(store, "score", name, {})


def test_a_result_that_is_not_there_is_said(store: Store) -> None:
    with pytest.raises(UsageError, match="has no `score_x`; it has no results"):
        open_result(store, "score_x")


def test_a_beginning_without_metadata_is_made_anew(store: Store) -> None:
    filled(store)
    (store.path / "score_x" / "zarr.json").unlink()
    assert result_names(store) == []
    assert virnuc_dask.verify(store.path).leftovers == [f"{store.path}/score_x"]
    assert not keep_result(store, "score", "x", {}).present().any()


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damage_is_found_and_mended(store: Store, damage: str) -> None:
    whole = tree(filled(store).store.path / "score_x")
    file = store.path / "score_x" / "c.9"  # a short chunk, which Zarr reads before it is written
    content = bytearray(file.read_bytes())
    content[-6] ^= 4
    file.write_bytes(content if damage == "flipped" else content[:5])
    report = virnuc_dask.verify(store.path)
    assert (list(report.results), report.bad, report.exit_code) == (["score_x: chunk 9"], {}, 4)
    if damage == "flipped":
        with pytest.raises(StoreError, match="`score_x` is damaged"):
            virnuc_dask.export(store.path, store.path.with_name("out.csv"))
    assert virnuc_dask.verify(store.path, repair=True).exit_code == 0
    result = open_result(store, "score_x")
    assert np.flatnonzero(~result.present()).tolist() == [9]
    assert fill(result, first_feature) == 1
    assert virnuc_dask.verify(store.path).exit_code == 0
    assert {n: c for n, (_, _, c) in tree(store.path / "score_x").items()} == {
        n: c for n, (_, _, c) in whole.items()
    }


def test_nothing_is_written_into_another_store(store: Store, make_store: Maker) -> None:
    result = keep_result(store, "score", "x", {})
    store.path.rename(store.path.with_name("moved.zarr"))
    other = make_store(VIRAL_PROTEINS, store.path.name)
    before = tree(other.path)
    with pytest.raises(StoreReplacedError):
        keep_result(store, "score", "y", {})
    fill(result, first_feature)  # into the one that was opened, wherever it is
    assert tree(other.path) == before


def test_a_command_fills_no_result_that_another_has_replaced(store: Store) -> None:
    old = keep_result(store, "score", "x", {"by": "the first"})
    fill(old, first_feature)
    old.remove_chunk(3)
    new = keep_result(store, "score", "x", {"by": "the second"}, replace=True)
    with pytest.raises(ResultReplacedError, match="`score_x` was replaced by another command"):
        fill(old, first_feature)
    with pytest.raises(ResultReplacedError):
        old.write(3, old.empty(3))
    assert not new.present().any()
    assert fill(new, first_feature) == 10


def test_what_lands_in_a_result_that_is_new_meanwhile_is_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keep_result(store, "score", "x", {"by": "the first"})
    write = Result._write

    def replaced_while_it_writes(result: Result, chunk: int, values: NDArray[Any]) -> None:
        keep_result(store, "score", "x", {"by": "the second"}, replace=True)
        write(result, chunk, values)

    monkeypatch.setattr(Result, "_write", replaced_while_it_writes)
    with pytest.raises(ResultReplacedError):
        old.write(3, old.empty(3))
    new = open_result(store, "score_x")
    assert (new.about, new.touched().any()) == ({"by": "the second"}, False)


def test_only_the_result_that_was_seen_is_replaced(store: Store) -> None:
    first = keep_result(store, "map", "x", {"by": "the first"})
    second = keep_result(store, "map", "x", {"by": "the second"}, replace=first.id)
    with pytest.raises(UsageError, match="made with other settings"):
        keep_result(store, "map", "x", {"by": "the third"}, replace=first.id)
    assert open_result(store, "map_x").id == second.id


def test_a_workers_store_is_the_one_that_was_opened(
    store: Store, make_store: Maker, client: Any
) -> None:
    result = keep_result(store, "score", "x", {})
    store.path.rename(store.path.with_name("moved.zarr"))
    other = make_store(VIRAL_PROTEINS, store.path.name)
    keep_result(other, "score", "x", {})
    before = tree(other.path)
    with pytest.raises(StoreReplacedError):
        fill(result, lambda rows: rows[:, 0], client=client)
    assert tree(other.path) == before


@pytest.mark.slow
def test_rows_that_are_embedded_later_have_values_later(store: Store) -> None:
    whole = store.read_chunk(2)
    status, embedding = whole[0].copy(), whole[1].copy()
    status[5], embedding[5] = Status.TIMED_OUT, np.nan
    store.write_chunk(2, status, embedding)
    result = filled(store)
    assert np.flatnonzero(np.isnan(result.array[:])).tolist() == [69]
    assert virnuc_dask.verify(store.path).exit_code == 0
    store.write_chunk(2, *whole)
    report = virnuc_dask.verify(store.path, repair=True)
    assert report.results == {
        "score_x: chunk 2": "the rows with a value are not the rows with an embedding"
    }
    assert fill(result, first_feature) == 1
    assert np.isfinite(result.array[:]).all()
    assert virnuc_dask.verify(store.path).exit_code == 0
    # What is removed of the embeddings is removed of results.
    file = store.path / store.keys(4)[-1]
    file.write_bytes(file.read_bytes()[:-9])
    assert list(virnuc_dask.verify(store.path, repair=True).bad) == [4]
    assert np.flatnonzero(~result.present()).tolist() == [4]


@pytest.mark.slow
def test_torn_metadata_is_found_and_mended(store: Store, cli: Cli) -> None:
    filled(store)
    file = store.path / "score_x" / "zarr.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match="verify --repair"):
        virnuc_dask.export(store.path, store.path.with_name("out.csv"))
    found = cli("verify", store.path)
    assert (found.returncode, "score_x: metadata" in found.stdout) == (4, True)
    assert cli("verify", store.path, "--repair").returncode == 0
    assert not (store.path / "score_x").exists()
    assert filled(store).present().all()
    file.write_bytes(b"{}")
    assert not keep_result(store, "score", "x", {}, replace=True).present().any()


def test_what_somebody_else_has_put_there_is_no_result(store: Store) -> None:
    group = zarr.open_group(store.path, zarr_format=3)
    group.create_array("score_mine", shape=(7,), dtype="float32")
    before = tree(store.path)
    report = virnuc_dask.verify(store.path, repair=True)
    assert (report.exit_code, report.leftovers) == (0, [f"{store.path}/score_mine"])
    virnuc_dask.export(store.path, store.path.with_name("out.csv"))
    with pytest.raises(UsageError, match="not a result of this program"):
        keep_result(store, "score", "mine", {}, replace=True)
    assert tree(store.path) == before


def test_what_a_killed_writer_leaves_is_removed(store: Store) -> None:
    filled(store)
    (store.path / "score_x" / "c.0.abc.partial").write_bytes(b"x")
    virnuc_dask.verify(store.path, repair=True)
    assert virnuc_dask.verify(store.path).leftovers == []


@pytest.mark.slow
def test_exports_have_results(store: Store) -> None:
    filled(store)
    fill(keep_result(store, "map", "pca", {}), first_two)
    rows = virnuc_dask.open_store(store.path).embedding.values
    folder = store.path.parent
    virnuc_dask.export(store.path, folder / "o.csv")
    table = pd.read_csv(folder / "o.csv")
    virnuc_dask.export(store.path, folder / "o.parquet")
    other = parquet.read_table(folder / "o.parquet").to_pandas()
    for found in (table, other):
        np.testing.assert_allclose(found.score_x, rows[:, 0], rtol=1e-6)
        np.testing.assert_allclose(found.map_pca_1, rows[:, 0], rtol=1e-6)
        np.testing.assert_allclose(found.map_pca_2, rows[:, 1], rtol=1e-6)
    for name in ("o.h5ad", "o.zarr"):
        virnuc_dask.export(store.path, folder / name)
        read = anndata.read_h5ad if name == "o.h5ad" else anndata.read_zarr
        data = read(folder / name)
        assert np.array_equal(data.obsm["X_pca"], rows[:, :2])
        assert np.array_equal(data.obs.score_x, rows[:, 0])
        assert not [column for column in data.obs if column.startswith("map")]
    virnuc_dask.export(store.path, folder / "o.h5", matrix=True)
    virnuc_dask.export(store.path, folder / "o.npz")
    with np.load(folder / "o.npz") as arrays:
        assert np.array_equal(arrays["score_x"], rows[:, 0])


def test_a_missing_value_is_an_empty_cell(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, max_residues=30)
    fill(keep_result(store, "score", "x", {}), first_feature)
    virnuc_dask.export(store.path, store.path.with_name("o.tsv"))
    lines = store.path.with_name("o.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("score_x")
    is_empty = [not line.split("\t")[column] for line in lines[1:]]
    assert is_empty == (~virnuc_dask.open_store(store.path).embedded.values).tolist()
