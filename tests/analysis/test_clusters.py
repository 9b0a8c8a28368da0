"""Clusters: scikit-learn's k-means, the same for rows that come later."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker, tree
from numpy.typing import NDArray
from pyarrow import parquet
from rows import all_rows, move_chunks
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

import virnuc_dask
from virnuc_dask.analysis import clusters
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.settings import RANDOM_WEIGHTS
from virnuc_dask.store.results import open_result
from virnuc_dask.store.store import Store


def labels(store: Store, name: str = "cluster_kmeans") -> NDArray[np.int32]:
    return open_result(store, name).read(slice(None))


def placed(rows: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Rows in the space where distances are taken."""
    rows = rows - rows.mean(axis=0)
    return rows / np.linalg.norm(rows, axis=1)[:, None] if metric == "cosine" else rows


def spread(rows: NDArray[np.float64], found: NDArray[Any]) -> float:
    """Sum of the squares of distances to the mean of each cluster."""
    return float(
        sum(
            ((part := rows[found == n]) - part.mean(axis=0)).__pow__(2).sum()
            for n in np.unique(found)
        )
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.slow
def test_as_good_as_scikit_learn(store: Store, metric: Any) -> None:
    found = virnuc_dask.make_clusters(store.path, n_clusters=6, metric=metric)
    rows, number = placed(all_rows(store)[1], metric), labels(store)
    best = KMeans(6, n_init=20, random_state=0).fit(rows)
    assert spread(rows, number) < 1.05 * best.inertia_
    assert np.array_equal(found.sizes, np.bincount(number))
    assert found.sizes.sum() == 300
    centres = np.stack([rows[number == n].mean(axis=0) for n in range(6)])
    distances = np.linalg.norm(rows[:, None] - centres, axis=2)
    # Each row is with the centre that is nearest, but for those between two that still move.
    assert (distances.argmin(axis=1) == number).mean() > 0.97
    for n, row in enumerate(found.medoid_rows):
        assert number[row] == n
        own = np.sort(distances[number == n, n])
        assert distances[row, n] <= own[2]
    if metric == "euclidean":
        np.testing.assert_allclose(
            found.medoid_scores, distances[found.medoid_rows, range(6)], rtol=0.1
        )
    assert abs(found.silhouette - silhouette_score(rows, number)) < 1e-4
    assert found.medoid_ids == [all_rows(store)[0][row] for row in found.medoid_rows]
    assert (found.name, found.fitted_rows, found.computed_chunks) == ("cluster_kmeans", 300, 10)


@pytest.mark.slow
def test_passes_are_lloyds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same centres, as scikit-learn's own iterations, one by one."""
    monkeypatch.setattr(clusters, "_TOLERANCE", 0)
    rows = all_rows(store)[1]
    space = placed(rows, "cosine")
    start = clusters._start(
        store, store.present(), {"n_clusters": 5, "metric": "cosine", "random_state": 0}, 1
    )
    for passes in (1, 2, 4):  # the second changes which is the largest
        monkeypatch.setattr(clusters, "_MOST_PASSES", passes)
        virnuc_dask.make_clusters(store.path, f"n{passes}", n_clusters=5)
        model = KMeans(5, init=start.centres, n_init=1, max_iter=passes, tol=0).fit(space)
        ours = open_result(store, f"cluster_n{passes}")
        assert ours.about["passes"] == passes
        # Numbers are by the rows that each centre has in the end.
        counts = np.bincount(model.predict(space), minlength=5)
        order = np.argsort(-counts, kind="stable")
        found = clusters._labeller(store, ours.about).centres
        np.testing.assert_allclose(found, model.cluster_centers_[order], atol=1e-4)
        assert np.array_equal(np.bincount(labels(store, ours.name)), counts[order])


@pytest.mark.slow
def test_the_same_whatever_computes_it(make_store: Maker, client: Any) -> None:
    ways = [{"workers": 1}, {"workers": 3}, {"client": client}]
    stores = [make_store(VIRAL_PROTEINS, f"{n}.zarr") for n in range(3)]
    tables = []
    for store, how in zip(stores, ways, strict=True):
        out = io.StringIO()
        virnuc_dask.write_clusters(virnuc_dask.make_clusters(store.path, **how), out)
        tables.append(out.getvalue())
    assert tables[0] == tables[1] == tables[2]
    assert np.array_equal(labels(stores[0]), labels(stores[2]))


@pytest.mark.slow
def test_rows_that_come_later_get_the_same_centres(make_store: Maker) -> None:
    store, whole = make_store(VIRAL_PROTEINS, embed=False), make_store(VIRAL_PROTEINS, "w.zarr")
    with pytest.raises(UsageError, match="has 0 different embedded rows, too few for 4"):
        virnuc_dask.make_clusters(store.path, n_clusters=4)
    move_chunks(store, whole, (0, 3, 4, 7))
    assert virnuc_dask.make_clusters(store.path, n_clusters=4).computed_chunks == 4
    assert (labels(store) == -1).sum() == 300 - 4 * 32
    before = tree(store.path / "cluster_kmeans")
    move_chunks(store, whole, (1, 2, 5, 6, 8, 9))
    found = virnuc_dask.make_clusters(store.path, n_clusters=4)
    assert (found.computed_chunks, found.fitted_rows, found.sizes.sum()) == (6, 128, 300)
    assert "had 4 of the 10 chunks" in str(found.note)
    assert before.items() <= tree(store.path / "cluster_kmeans").items()
    about = open_result(store, "cluster_kmeans").about
    expected = clusters._labeller(store, about)(all_rows(whole)[1].astype(np.float32))
    assert np.array_equal(labels(store), expected)
    after = tree(store.path)
    assert virnuc_dask.make_clusters(store.path, n_clusters=4).computed_chunks == 0
    assert tree(store.path) == after
    with pytest.raises(UsageError, match=r"other settings \(n_clusters\)"):
        virnuc_dask.make_clusters(store.path, n_clusters=5)
    assert virnuc_dask.make_clusters(store.path, n_clusters=5, replace=True).note is None


def test_what_makes_no_sense_is_refused(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward)
    for wrong in (
        {"n_clusters": 1},
        {"n_clusters": 2**20},
        {"metric": "cosin"},
        {"random_state": 2**32},
        {"name": "../x"},
        {"n_clusters": 7},
    ):
        with pytest.raises(UsageError):
            virnuc_dask.make_clusters(store.path, **wrong)
    found = virnuc_dask.make_clusters(store.path, n_clusters=2)
    embedded = virnuc_dask.open_store(store.path).embedded.values
    assert np.array_equal(labels(store) >= 0, embedded)
    assert found.sizes.sum() == embedded.sum()


def test_an_empty_cluster_has_empty_cells(store: Store, tmp_path: Path) -> None:
    found = virnuc_dask.make_clusters(store.path, n_clusters=2)
    nothing = np.full(2, np.nan, np.float32)
    found = replace(
        found,
        sizes=np.array([300, 0]),
        medoid_rows=np.array([7, -1]),
        medoid_ids=["x", ""],
        medoid_descriptions=["", ""],
        medoid_lengths=np.array([30, -1], np.int32),
        medoid_scores=np.array([0.5, np.nan], np.float32),
        silhouettes=nothing,
    )
    clusters.write_clusters(found, tmp_path / "c.tsv")
    lines = (tmp_path / "c.tsv").read_text().splitlines()
    assert lines[1:] == ["0\t300\tx\t7\t0.5\t\t30\t", "1\t0\t\t\t\t\t\t"]
    clusters.write_clusters(found, tmp_path / "c.parquet")
    table = parquet.read_table(tmp_path / "c.parquet")
    for name in ("row", "similarity", "length"):
        assert [value is None for value in table[name].to_pylist()] == [False, True]
    assert table["silhouette"].null_count == 2


def test_damage_is_said(store: Store) -> None:
    status, embedding = store.read_chunk(3)
    embedding = embedding.copy()
    embedding[5] = np.nan
    store.write_chunk(3, status, embedding)
    with pytest.raises(StoreError, match="not finite"):
        virnuc_dask.make_clusters(store.path)


@pytest.mark.slow
def test_the_command(cli_here: Cli, store: Store, tmp_path: Path) -> None:
    done = cli_here("cluster", store.path, "--n-clusters", 3)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"comment: {RANDOM_WEIGHTS}\ncluster_kmeans in ")
    lines = list(csv.DictReader(io.StringIO(done.stdout), delimiter="\t"))
    assert list(lines[0]) == [
        *("cluster", "size", "medoid", "row", "similarity", "silhouette", "length", "description")
    ]
    assert [int(line["size"]) for line in lines] == np.bincount(labels(store)).tolist()
    again = cli_here("cluster", store.path, "--n-clusters", 3, "--out", "c.parquet")
    assert (again.returncode, again.stdout) == (0, "3 clusters in c.parquet\n")
    assert "0 chunks labelled now" in again.stderr
    table = parquet.read_table(tmp_path / "c.parquet")
    assert table["medoid"].to_pylist() == [line["medoid"] for line in lines]
    assert table.schema.metadata[b"comment"] == RANDOM_WEIGHTS.encode()
    for wrong in (("--out", "c.parquet"), ("--n-clusters", 4), ("--out", "c.txt")):
        done = cli_here("cluster", store.path, "--n-clusters", 3, *wrong)
        assert (done.returncode, done.stdout) == (2, "")
    done = cli_here("cluster", store.path, "--n-clusters", 3, "--out", "c.parquet")
    assert "--force, which replaces it; labels that the store keeps are not" in done.stderr
    four = ("cluster", store.path, "--n-clusters", 4, "--out", "c.tsv")
    (tmp_path / "c.tsv").write_text("mine")
    before = tree(store.path)
    # Each of the two is about one thing: the file, or what the store keeps.
    for one, problem in (("--force", "other settings"), ("--replace", "c.tsv exists")):
        done = cli_here(*four, one)
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
    assert (tree(store.path), (tmp_path / "c.tsv").read_text()) == (before, "mine")
    assert cli_here(*four, "--force", "--replace").returncode == 0
    assert len((tmp_path / "c.tsv").read_text().splitlines()) == 5
