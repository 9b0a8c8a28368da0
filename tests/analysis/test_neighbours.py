"""Nearest rows: as scikit-learn finds them, whatever the threads, and what is missing."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from conftest import VIRAL_PROTEINS, Cli, Maker
from numpy.typing import NDArray
from pyarrow import parquet
from rows import NAMES, all_rows, read_tsv
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors

import virnuc_dask
from virnuc_dask.analysis import chunk_passes, neighbours
from virnuc_dask.analysis.tables import write_table
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.settings import RANDOM_WEIGHTS, Status, Tiling
from virnuc_dask.store.store import Store

COLUMNS = ["query", "query_row", "rank", "neighbour", "row"]
COLUMNS += ["similarity", "length", "status", "description"]


@pytest.fixture
def few_rows_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks for each chunk, several calls for each search, several batches of queries."""
    monkeypatch.setattr(chunk_passes, "_VALUES_PER_BLOCK", 64 * 7)
    monkeypatch.setattr(chunk_passes, "_ROWS_PER_TASK", 64)
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 50)
    monkeypatch.setattr(neighbours, "_PAIRS_AT_ONCE", 11)


def expected(
    rows: NDArray[np.float64],
    query: NDArray[np.float64],
    metric: str,
    centre: bool,
    own: list[int] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All rows from the nearest on, by scikit-learn in float64; a row's own comes last."""
    mean = rows.mean(axis=0) if centre else 0
    index = NearestNeighbors(n_neighbors=len(rows), metric=metric, algorithm="brute")
    found, numbers = index.fit(rows - mean).kneighbors(query - mean)
    distances = np.empty_like(found)
    np.put_along_axis(distances, numbers, found, axis=1)
    if own is not None:
        distances[np.arange(len(own)), own] = np.inf
    # Two of the proteins are equal, and so are two others.
    order = np.argsort(distances.round(9), axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), order


def score(data: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = data["similarity" if "similarity" in data else "distance"].values
    return values


@pytest.mark.usefixtures("few_rows_a_block")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.slow
def test_the_same_as_scikit_learn(metric: Any, centre: bool, dtype: str, make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, dtype=dtype)
    ids, rows = all_rows(store)
    assert len(set(ids)) == len(ids) == 300
    found = virnuc_dask.nearest(store.path, ids, k=6, metric=metric, centre=centre)
    distances, numbers = expected(rows, rows, metric, centre, list(range(300)))
    numbers = numbers[:, :6]
    assert np.array_equal(found.row.values, numbers)
    similar = 1 - distances if metric == "cosine" else distances
    np.testing.assert_allclose(score(found), similar[:, :6], rtol=1e-5, atol=1e-6)
    assert found.query_id.values.tolist() == ids
    assert np.array_equal(found.query_row.values, np.arange(300))
    assert np.array_equal(found.sequence_id.values, np.array(ids, object)[numbers])
    assert np.array_equal(found.length.values, store.lengths()[numbers])
    assert dict(found.sizes) == {"query": 300, "neighbour": 6}
    types = {name: str(found[name].dtype) for name in ("row", "sequence_id", "length")}
    assert types == {"row": "int64", "sequence_id": "object", "length": "int32"}
    assert score(found).dtype == np.float32


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.slow
def test_the_result_depends_on_no_threads_chunks_or_blocks(
    metric: Any, make_store: Maker, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = (make_store(VIRAL_PROTEINS, f"{n}.zarr", rows_per_chunk=n) for n in (32, 7))
    ids = all_rows(store)[0][:40]
    first = virnuc_dask.nearest(store.path, ids, metric=metric)
    for workers in (1, 3):
        assert first.equals(virnuc_dask.nearest(store.path, ids, metric=metric, workers=workers))
    assert first.equals(virnuc_dask.nearest(store.path, ids, metric=metric, client=client))
    assert first.equals(virnuc_dask.nearest(other.path, ids, metric=metric))
    for values in (1, 64 * 5):
        monkeypatch.setattr(chunk_passes, "_VALUES_PER_BLOCK", values)
        monkeypatch.setattr(chunk_passes, "_ROWS_PER_TASK", values)
        assert first.equals(virnuc_dask.nearest(store.path, ids, metric=metric))
    one_by_one = [virnuc_dask.nearest(store.path, name, metric=metric) for name in ids[:5]]
    for number, found in enumerate(one_by_one):
        assert np.array_equal(found.row.values[0], first.row.values[number])
        assert np.array_equal(score(found)[0], score(first)[number])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_what_is_equally_near_comes_by_its_number(
    metric: Any, make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "copies.faa"
    names = [f">{'copy' if row % 3 else 'other'}{row}\n" for row in range(60)]
    residues = ["MKTAYIAKQRQISFVKSHFSRQ\n" if row % 3 else "MLKVV\n" for row in range(60)]
    file.write_text("".join(a + b for a, b in zip(names, residues, strict=True)))
    store = make_store(file, rows_per_chunk=16)
    copies = [row for row in range(60) if row % 3]
    for values in (2**19, 64 * 7):
        monkeypatch.setattr(chunk_passes, "_VALUES_PER_BLOCK", values)
        found = virnuc_dask.nearest(store.path, "copy31", k=20, metric=metric)
        assert found.row.values.tolist() == [[row for row in copies if row != 31][:20]]
        best = 1 if metric == "cosine" else 0
        np.testing.assert_allclose(score(found), best, atol=1e-6)


def test_only_embedded_rows_take_part(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, rows_per_chunk=2)
    data = virnuc_dask.open_store(store.path).load()
    good = np.flatnonzero(data.status.values < Status.INVALID_RESIDUES)
    assert good.tolist() == [0, 1, 4, 6]
    found = virnuc_dask.nearest(store.path, "b", k=10)
    assert sorted(found.row.values[0, :3].tolist()) == [0, 4, 6]
    # Nothing more, and it says so.
    assert found.row.values[0, 3:].tolist() == [-1] * 7
    assert found.sequence_id.values[0, 3:].tolist() == [""] * 7
    assert found.length.values[0, 3:].tolist() == [-1] * 7
    assert np.isnan(score(found)[0, 3:]).all()
    assert np.isfinite(score(found)[0, :3]).all()
    for name, reason in (("empty", "empty"), ("digit", "invalid_residues")):
        with pytest.raises(UsageError, match=rf"quarantined \({reason}\).* {name}"):
            virnuc_dask.nearest(store.path, ["b", name])


def test_a_store_that_is_being_filled(store: Store) -> None:
    ids, rows = all_rows(store)
    virnuc_dask.nearest(store.path, ids[0], k=200)
    for chunk in (2, 5):
        store.remove_chunk(chunk)
    # The states of a chunk are there before its embeddings are.
    store.location.remove("embedding/c.9.0")
    assert store.read_status(9).all()
    left = np.flatnonzero(np.repeat(store.present(), 32)[:300])
    found = virnuc_dask.nearest(store.path, ids[0], k=250)
    # Not with the mean of before.
    distances, numbers = expected(rows[left], rows[:1], "cosine", True, [0])
    assert np.array_equal(found.row.values[0, : len(left) - 1], left[numbers[0, :-1]])
    np.testing.assert_allclose(
        score(found)[0, : len(left) - 1], 1 - distances[0, :-1], rtol=1e-5, atol=1e-6
    )
    assert (found.row.values[0, len(left) - 1 :] == -1).all()
    with pytest.raises(UsageError, match=r"not computed yet; .*resume"):
        virnuc_dask.nearest(store.path, [ids[0], ids[64]])


def test_a_store_without_any_row_yet(make_store: Maker, store: Store) -> None:
    empty = make_store(VIRAL_PROTEINS, "empty.zarr", embed=False)
    found = virnuc_dask.nearest(empty.path, query_store=store.path, k=2)
    assert (found.row.values == -1).all()
    with pytest.raises(UsageError, match="has no embedded row yet"):
        virnuc_dask.nearest(store.path, query_store=empty.path)


def test_identifiers_that_are_unknown_or_occur_twice(
    store: Store, make_store: Maker, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=r"no record has the identifier.* none, \\x1b|none, \ufffd"
    ):
        virnuc_dask.nearest(store.path, [all_rows(store)[0][3], "none", "\x1b"])
    with pytest.raises(UsageError, match=r"x0, .* x9 and 5 more"):
        virnuc_dask.nearest(store.path, [f"x{number}" for number in range(15)])
    for query in ([], None, np.zeros((0, 64))):
        with pytest.raises(UsageError, match="no query"):
            virnuc_dask.nearest(store.path, query)
    file = tmp_path / "twins.faa"
    file.write_text(">twin\nMKTAY\n>c\nMLKV\n>twin\nMKTAYIAKQR\n>d\nMKT\n")
    twins = make_store(file, "twins.zarr", rows_per_chunk=3)
    found = virnuc_dask.nearest(twins.path, ["d", "twin", "d"], k=3)
    assert found.query_row.values.tolist() == [3, 0, 2]
    assert found.query_id.values.tolist() == ["d", "twin", "twin"]
    for query, others in zip(found.query_row.values, found.row.values, strict=True):
        assert sorted([query, *others]) == [0, 1, 2, 3]


def test_a_protein_in_tiles_stands_for_all_its_rows(make_store: Maker, tmp_path: Path) -> None:
    file = tmp_path / "a.faa"
    file.write_text(">p\nMKTAYIAKQRQISFVK\n>q\nMLKVVGGWCCHHPPCC\n>r\nMLKVVGGW\n")
    store = make_store(file, tiling=Tiling(8, 7), rows_per_chunk=2)
    data = virnuc_dask.open_store(store.path)
    ids, proteins = data.sequence_id.values.tolist(), data.read.values
    of_p, of_q = (np.flatnonzero(proteins == number).tolist() for number in (0, 1))
    assert min(len(of_p), len(of_q)) > 1
    found = virnuc_dask.nearest(store.path, ["q", ids[of_p[-1]], "p"], k=1)
    # A row is a query as often as it is named.
    assert found.query_row.values.tolist() == [*of_q, of_p[-1], *of_p]
    assert found.query_id.values.tolist() == [ids[row] for row in found.query_row.values]
    page = virnuc_dask.report(store.path, tmp_path / "page.html", query="q")
    assert f"Nearest to {ids[of_q[0]]}</h2>" in page.read_text()  # the row that it shows
    store.remove_chunk(of_q[-1] // 2)
    with pytest.raises(UsageError, match=f"not computed yet.* {ids[of_q[-1]]}"):
        virnuc_dask.nearest(store.path, "q")


def test_another_stores_rows(store: Store, make_store: Maker, awkward: Path) -> None:
    other = make_store(awkward, "other.zarr", dtype="float16", rows_per_chunk=3)
    rows, queries = all_rows(store)[1], all_rows(other)[1]
    found = virnuc_dask.nearest(store.path, query_store=other.path, k=4)
    assert found.query_row.values.tolist() == [0, 1, 4, 6]
    distances, numbers = expected(rows, queries[[0, 1, 4, 6]], "cosine", True)
    assert np.array_equal(found.row.values, numbers[:, :4])
    np.testing.assert_allclose(score(found), 1 - distances[:, :4], rtol=1e-5, atol=1e-6)
    # 22 residues beside 300.
    assert "median lengths are" in found.attrs["note"]
    assert "in tiles of the shorter length with `run --tile 7`" in found.attrs["note"]
    # The row of the same number is another's.
    one = virnuc_dask.nearest(store.path, ["b"], query_store=other.path, k=300)
    assert sorted(one.row.values[0].tolist()) == list(range(300))
    assert "note" not in virnuc_dask.nearest(store.path, query_store=store.path, k=1).attrs


def test_a_store_with_other_settings_is_refused(store: Store, make_store: Maker) -> None:
    other = make_store(VIRAL_PROTEINS, "other.zarr", repr_layer=1, pooling="max", embed=False)
    with pytest.raises(UsageError, match=r"not comparable:\n  repr_layer: 0 and 1\n  pooling:"):
        virnuc_dask.nearest(store.path, query_store=other.path)


def test_vectors(store: Store) -> None:
    ids, rows = all_rows(store)
    vectors = rows[:3] + 0.01
    found = virnuc_dask.nearest(store.path, vectors, k=5)
    assert np.array_equal(found.row.values, expected(rows, vectors, "cosine", True)[1][:, :5])
    assert found.query_row.values.tolist() == [-1] * 3
    assert found.query_id.values.tolist() == [""] * 3
    write_table(found, written := io.StringIO())
    assert {line["query_row"] for line in read_tsv(written.getvalue())} == {""}
    for wrong in (vectors[:, :5], vectors[0], vectors * np.nan):
        with pytest.raises(UsageError, match="vectors need"):
            virnuc_dask.nearest(store.path, wrong)
    with pytest.raises(UsageError, match="not both"):
        virnuc_dask.nearest(store.path, vectors, query_store=store.path)
    named = virnuc_dask.nearest(store.path, np.array(ids[:3]), k=5)
    assert named.query_id.values.tolist() == ids[:3]
    for wrong in ({"k": 0}, {"metric": "cosin"}, {"workers": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            virnuc_dask.nearest(store.path, ids[:1], **wrong)


def test_a_result_is_what_its_own_rows_give(store: Store) -> None:
    """Whatever is found, the store says the same of the two rows."""
    ids, rows = all_rows(store)
    mean = rows.mean(axis=0)
    found = virnuc_dask.nearest(store.path, ids, k=3)
    a, b = rows[found.query_row.values][:, None] - mean, rows[found.row.values] - mean
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(score(found), cosine, rtol=1e-5, atol=1e-6)
    found = virnuc_dask.nearest(store.path, ids, k=3, metric="euclidean")
    b = rows[found.row.values]
    distance = np.linalg.norm(rows[found.query_row.values][:, None] - b, axis=-1)
    np.testing.assert_allclose(score(found), distance, rtol=1e-6)


def test_the_mean_is_taken_once(store: Store) -> None:
    ids = all_rows(store)[0]
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        virnuc_dask.nearest(store.path, ids[:2], progress=lambda *counts: seen.append(counts))
    assert seen == [(10, 20), (20, 20), (10, 10)]
    before = virnuc_dask.verify(store.path)
    assert (before.leftovers, before.bad) == ([], {})


@pytest.mark.parametrize(
    "how", [{}, {"centre": False}, {"metric": "euclidean"}], ids=["centred", "not", "euclidean"]
)
def test_rows_that_are_no_numbers_are_refused(store: Store, how: dict[str, Any]) -> None:
    """One of them would hide others."""
    ids = all_rows(store)[0]
    status, embedding = store.read_chunk(3)
    embedding = embedding.copy()
    embedding[5] = np.nan
    store.write_chunk(3, status, embedding)
    for query in (ids[0], ids[3 * 32 + 5]):
        with pytest.raises(StoreError, match="not finite"):
            virnuc_dask.nearest(store.path, query, **how)


def test_damage_is_said(store: Store) -> None:
    ids = all_rows(store)[0]
    file = store.path / "embedding" / "c.3.0"
    file.write_bytes(file.read_bytes()[:-5] + b"\0" * 5)
    with pytest.raises(StoreError, match="chunk 3 is damaged"):
        virnuc_dask.nearest(store.path, ids[0])
    with pytest.raises(StoreError, match="chunk 3 is damaged"):
        virnuc_dask.nearest(store.path, ids[100], metric="euclidean")


def test_float16_is_converted_exactly() -> None:
    every = np.arange(65_536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = chunk_passes.as_float32(finite)
    assert np.array_equal(found.view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.slow
def test_the_command(cli_here: Cli, store: Store, make_store: Maker, awkward: Path) -> None:
    ids = all_rows(store)[0]
    found = virnuc_dask.nearest(store.path, [ids[7], ids[3]], k=3)
    done = cli_here("nearest", store.path, "--query", ids[7], "--query", ids[3], "--k", 3)
    assert done.returncode == 0
    assert done.stderr.startswith(f"comment: {RANDOM_WEIGHTS}\nfor comparison: in a random sample")
    assert f"of at most {found.attrs['random_median']:z.2f}, and" in done.stderr
    most = f"has more than {found.attrs['random_99']:z.2f}"
    assert f"{most}, so about 3 of the 300 rows\n" in done.stderr
    head, *lines = done.stdout.splitlines()
    descriptions = virnuc_dask.open_store(store.path).description.values
    assert head.split("\t") == COLUMNS
    assert len(lines) == 6
    for number, line in enumerate(read_tsv(done.stdout)):
        query, rank = divmod(number, 3)
        assert line["query"] == ids[(7, 3)[query]]
        assert line["query_row"] == str((7, 3)[query])
        assert line["rank"] == str(rank + 1)
        assert line["neighbour"] == ids[int(line["row"])]
        assert int(line["row"]) == found.row.values[query, rank]
        assert np.float32(line["similarity"]) == found.similarity.values[query, rank]
        assert int(line["length"]) == store.lengths()[int(line["row"])]
        assert line["description"] == descriptions[int(line["row"])] != ""
        is_long = store.lengths()[int(line["row"])] > 1022
        assert line["status"] == ("truncated" if is_long else "embedded")
    other = make_store(awkward, "other.zarr")
    command = ["nearest", store.path, "--query-store", other.path, "--k", 2]
    done = cli_here(*command, "--metric", "euclidean", "--no-centre", "--out", "out.tsv")
    assert (done.returncode, done.stdout) == (0, "8 neighbours in out.tsv\n"), done.stderr
    assert done.stderr.startswith("note: median lengths are")
    done = cli_here(*command, "--out", "out.tsv")
    assert done.returncode == 2
    assert "exists" in done.stderr
    done = cli_here(*command, "--out", "nowhere/out.tsv")
    assert done.returncode == 2
    assert "is not a writable directory" in done.stderr
    done = cli_here("nearest", store.path, "--query", "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no record has the identifier none" in done.stderr
    assert cli_here("nearest", store.path).returncode == 2
    done = cli_here(*command, "--out", "out.xlsx")
    assert done.returncode == 2
    assert "known are .tsv and .parquet" in done.stderr


def test_parquet(store: Store, tmp_path: Path) -> None:
    ids = all_rows(store)[0]
    found = virnuc_dask.nearest(store.path, ids[:5], k=4)
    assert write_table(found, tmp_path / "out.parquet") == 20
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == COLUMNS
    assert table["query_row"].to_pylist() == [row for row in range(5) for _ in range(4)]
    assert table["status"].to_pylist() == found.status.values.ravel().tolist()
    assert table["query"].to_pylist() == [name for name in ids[:5] for _ in range(4)]
    assert table["rank"].to_pylist() == [1, 2, 3, 4] * 5
    assert table["neighbour"].to_pylist() == found.sequence_id.values.ravel().tolist()
    assert np.array_equal(table["similarity"].to_numpy(), found.similarity.values.ravel())
    assert str(table["similarity"].type) == "float"
    assert b"random weights" in table.schema.metadata[b"virnuc_dask"]
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".parquet"] == [
        "out.parquet"
    ]


def read_to_the_end(terminal: int) -> bytes:
    """All that is written to a terminal, which comes in parts."""
    shown = b""
    with suppress(OSError):  # EIO: nobody has it open any more
        while part := os.read(terminal, 4096):
            shown += part
    return shown


def test_identifiers_break_no_table(make_store: Maker, tmp_path: Path) -> None:
    names = [*NAMES[:-1], 'a"b', '"', "''", "+1", "\x85", "x\x0by", "\u2028"]
    file = tmp_path / "names.faa"
    file.write_text(
        "".join(f">{name} more\nMKTAY{'VLAGIMK'[:n]}\n" for n, name in enumerate(names))
    )
    store = make_store(file)
    ids = all_rows(store)[0]
    found = virnuc_dask.nearest(store.path, query_store=store.path, k=len(ids))
    write_table(found, tmp_path / "out.tsv")
    lines = read_tsv((tmp_path / "out.tsv").read_bytes().decode())
    assert len(lines) == len(ids) * (len(ids) - 1)
    for line in lines:
        assert None not in line
        # An apostrophe is before what is a formula, and before nothing else.
        name = ids[int(line["row"])]
        assert line["neighbour"] == (f"'{name}" if name[:1] in tuple("=+-@") and name else name)
    # A terminal gets no control codes.
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read_to_the_end, ours)
        with os.fdopen(theirs, "w") as terminal:
            write_table(virnuc_dask.nearest(store.path, ids[:1], k=len(ids)), terminal)
        shown = reader.result()
    os.close(ours)
    assert b"owned" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
    # The columns are aligned; numbers are short.
    head, *lines = shown.decode().splitlines()
    assert len(lines) == len(ids) - 1
    assert "\t" not in shown.decode()
    end = head.index("similarity") + len("similarity")
    assert all(re.fullmatch(r" [ -][01]\.\d{4}", line[end - 8 : end]) for line in lines)


def test_the_similarity_of_random_rows(store: Store, make_store: Maker, awkward: Path) -> None:
    ids, rows = all_rows(store)
    found = virnuc_dask.nearest(store.path, ids[0])
    pairs = 1 - pdist(rows - rows.mean(axis=0), "cosine")
    np.testing.assert_allclose(found.attrs["random_median"], np.median(pairs), atol=1e-5)
    np.testing.assert_allclose(found.attrs["random_99"], np.quantile(pairs, 0.99), atol=1e-5)
    # It is of the store that is searched; other measures have none.
    other = make_store(awkward, "queries.zarr")
    also = virnuc_dask.nearest(store.path, query_store=other.path)
    assert also.attrs["random_99"] == found.attrs["random_99"]
    for options in ({"centre": False}, {"metric": "euclidean"}):
        assert "random_99" not in virnuc_dask.nearest(store.path, ids[0], **options).attrs
    # A single row has no pair.
    alone = make_store(awkward.parent / "awkward.faa", "alone.zarr", rows_per_chunk=1)
    for chunk in range(1, alone.chunk_count):
        alone.remove_chunk(chunk)
    for _ in range(2):  # also from the cache
        attrs = virnuc_dask.nearest(alone.path, query_store=store.path).attrs
        assert neighbours.random_pairs(attrs) is None
    tiny = {"random_median": -0.001, "random_99": 0.5, "searched_rows": 3}
    said = str(neighbours.random_pairs(tiny))
    assert "at most 0.00, and" in said
    assert said.endswith("more than 0.50")


@pytest.mark.slow
def test_the_mean_is_kept_for_other_processes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids = all_rows(store)[0][:3]
    read: list[tuple[int, int]] = []
    first = virnuc_dask.nearest(store.path, ids, progress=lambda *each: read.append(each))
    assert read[-1] == (2 * store.chunk_count, 2 * store.chunk_count)
    (entry,) = (tmp_path / "virnuc_dask").glob("mean-*.json")
    again = virnuc_dask.nearest(store.path, ids, progress=lambda *each: read.append(each))
    assert read[-1] == (store.chunk_count, store.chunk_count)
    xarray.testing.assert_identical(again, first)
    # Of other chunks, or damaged, it is computed again.
    kept = json.loads(entry.read_text())
    for damage in ({"key": None}, {"value": "AAAA"}, {"value": None}, {"value": 7}):
        entry.write_text(json.dumps(kept | damage))
        again = virnuc_dask.nearest(store.path, ids, progress=lambda *each: read.append(each))
        assert read[-1][1] == 2 * store.chunk_count
        xarray.testing.assert_identical(again, first)
        assert json.loads(entry.read_text()) == kept


def test_queries_of_a_whole_copy_of_a_store_that_lacks_chunks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy has the same id, but not the same chunks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    partial = Store(shutil.copytree(store.path, tmp_path / "copy.zarr"))
    partial.remove_chunk(3)
    ids, rows = all_rows(store)
    here = partial.rows(3)
    query = ids[here.start : here.start + 2]
    left = np.setdiff1d(np.arange(len(rows)), np.arange(here.start, here.stop))
    distances, numbers = expected(rows[left], rows[here][:2], "cosine", True)
    for _ in range(2):  # before there is a mean, and after
        found = virnuc_dask.nearest(partial.path, query, k=4, query_store=store.path)
        assert np.array_equal(found.row.values, left[numbers[:, :4]])
        np.testing.assert_allclose(score(found), 1 - distances[:, :4], rtol=1e-5, atol=1e-6)


def test_the_mean_is_of_the_rows_that_are_embedded_now(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids = all_rows(store)[0][:3]
    status, embedding = store.read_chunk(3)
    fewer, nothing = status.copy(), embedding.copy()
    fewer[:8], nothing[:8] = Status.ENCODER_ERROR, np.nan
    store.write_chunk(3, fewer, nothing)
    before = virnuc_dask.nearest(store.path, ids)
    store.write_chunk(3, status, embedding)
    after = virnuc_dask.nearest(store.path, ids)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    xarray.testing.assert_identical(after, virnuc_dask.nearest(store.path, ids))
    assert not np.array_equal(before.similarity, after.similarity)
