"""Labels from neighbours: as scikit-learn gives them, and how often they are right."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import xarray
from conftest import VIRAL_PROTEINS, Cli, Maker
from numpy.typing import NDArray
from pyarrow import parquet
from rows import forget_headers, read_tsv
from s3 import BUCKET
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support
from sklearn.neighbors import KNeighborsClassifier

import virnuc_dask
from virnuc_dask.analysis import chunk_passes, neighbours
from virnuc_dask.analysis import labels as labels_module
from virnuc_dask.analysis.points import draw_points
from virnuc_dask.analysis.tables import write_annotations
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import RANDOM_WEIGHTS, Tiling, Translation
from virnuc_dask.store import bucket
from virnuc_dask.store.location import location_of
from virnuc_dask.store.store import Store


@pytest.fixture
def few_rows_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_passes, "_VALUES_PER_BLOCK", 64 * 7)
    monkeypatch.setattr(chunk_passes, "_ROWS_PER_TASK", 64)
    monkeypatch.setattr(neighbours, "_QUERIES_AT_ONCE", 50)


def label_file(store: Store, path: Path, rows: Any = slice(None)) -> list[tuple[str, str]]:
    """Labels of some rows: the first letter of the protein's name."""
    data = virnuc_dask.open_store(store.path)
    ids, texts = data.sequence_id.values[rows], data.description.values[rows]
    lines = [(name, text[:1]) for name, text in zip(ids, texts, strict=True)]
    path.write_text("".join(f"{name}\t{label}\n" for name, label in lines))
    return lines


def vectors(store: Store, metric: str, centre: bool) -> NDArray[np.float64]:
    rows = virnuc_dask.open_store(store.path).embedding.values.astype(np.float64)
    return rows - rows.mean(axis=0) if centre and metric == "cosine" else rows


def similarity(metric: str) -> Any:
    """The reliability of one neighbour, from scikit-learn's distance."""
    if metric == "cosine":
        return lambda distances: np.maximum(1 - distances, 0)
    return lambda distances: 0.5 / (0.5 + distances)


def classifier(k: int, metric: str) -> KNeighborsClassifier:
    return KNeighborsClassifier(k, metric=metric, algorithm="brute", weights=similarity(metric))


@pytest.mark.usefixtures("few_rows_a_block")
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    ("metric", "centre"), [("cosine", True), ("cosine", False), ("euclidean", True)]
)
@pytest.mark.sweep
def test_the_same_as_scikit_learn(
    k: int, metric: Any, centre: bool, store: Store, tmp_path: Path
) -> None:
    labelled, others = np.arange(0, 300, 2), np.arange(1, 300, 2)
    lines = label_file(store, tmp_path / "labels.tsv", slice(None, None, 2))
    rows = vectors(store, metric, centre)
    model = classifier(k, metric).fit(rows[labelled], [label for _, label in lines])
    found = virnuc_dask.annotate(
        store.path, tmp_path / "labels.tsv", k=k, metric=metric, centre=centre
    )
    assert np.array_equal(found.query_row.values, np.arange(300))
    some = found.isel(query=others)
    expected = model.predict(rows[others])
    assert len(set(expected)) > 5
    assert some.label.values.tolist() == expected.tolist()
    distances, numbers = model.kneighbors(rows[others])
    weights = similarity(metric)(distances).sum(axis=1)
    share = model.predict_proba(rows[others]).max(axis=1)
    np.testing.assert_allclose(some.reliability.values, share * weights / k, rtol=1e-4, atol=1e-5)
    if k == 1:
        assert np.array_equal(some.row.values, labelled[numbers[:, 0]])
        assert some["labels"].values.tolist() == some.label.values.tolist()
        score = some.similarity if metric == "cosine" else some.distance
        expected_score = 1 - distances[:, 0] if metric == "cosine" else distances[:, 0]
        np.testing.assert_allclose(score.values, expected_score, rtol=1e-5, atol=1e-5)
    else:
        # The neighbour is the nearest one with the label.
        # Of two equal ones it is the first.
        numbers = np.take_along_axis(numbers, np.lexsort((numbers, distances.round(9))), axis=1)
        for row, near in zip(some.row.values, labelled[numbers], strict=True):
            label = dict(lines)[str(found.query_id.values[row])]
            with_it = [n for n in near if dict(lines)[str(found.query_id.values[n])] == label]
            assert row == with_it[0]
    assert found.attrs["labelled_rows"] == 150


@pytest.mark.usefixtures("few_rows_a_block")
@pytest.mark.parametrize(("k", "metric"), [(1, "euclidean"), (5, "cosine")])
@pytest.mark.slow
def test_leave_one_out_is_scikit_learns(
    k: int, metric: Any, store: Store, tmp_path: Path, client: Any
) -> None:
    lines = label_file(store, tmp_path / "labels.tsv")
    labels = np.array([label for _, label in lines])
    rows = vectors(store, metric, True)
    starts = np.append(0, np.cumsum(store.lengths()))
    residues = store.array("residues")[:].tobytes()
    sequences = np.array([residues[a:b] for a, b in pairwise(starts)])
    counts = Counter(sequences.tolist())
    copies = sum(count for count in counts.values() if count > 1)
    assert copies > 0
    given, sure = [], []
    for row in range(300):
        others = sequences != sequences[row]
        model = classifier(k, metric).fit(rows[others], labels[others])
        shares = model.predict_proba(rows[[row]])[0]
        given.append(model.classes_[shares.argmax()])
        distances = model.kneighbors(rows[[row]])[0]
        sure.append(shares.max() * similarity(metric)(distances).sum() / k)
    found = virnuc_dask.leave_one_out(store.path, tmp_path / "labels.tsv", k=k, metric=metric)
    assert (found.rows, found.copies, found.unanswered) == (300, copies, 0)
    assert found.accuracy == pytest.approx(accuracy_score(labels, given))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, given))
    names = [each.label for each in found.labels]
    assert [each.support for each in found.labels] == sorted(Counter(labels).values(), reverse=True)
    assert found.baseline == found.labels[0].support / 300
    precision, recall, _, support = precision_recall_fscore_support(
        labels, given, labels=names, zero_division=np.nan
    )
    for number, each in enumerate(found.labels):
        assert each.support == support[number]
        assert each.predicted == given.count(each.label)
        assert each.precision == (
            None if np.isnan(precision[number]) else pytest.approx(precision[number])
        )
        assert each.recall == pytest.approx(recall[number])
    best = np.argsort(sure)[::-1]
    for part in found.reliable:
        among = best[: round(part.share * 300)]
        assert part.reliability == pytest.approx(np.array(sure)[among].min(), rel=1e-4)
        assert part.accuracy == pytest.approx(np.mean((labels == given)[among]))
    assert [round(part.share, 2) for part in found.reliable] == pytest.approx(
        [0.5, 0.25, 0.1], abs=0.02
    )
    again = virnuc_dask.leave_one_out(
        store.path, tmp_path / "labels.tsv", k=k, metric=metric, client=client
    )
    assert again == found


SEQUENCES = {"a": "MKTAYIAKQR", "b": "MLKVVGGW", "c": "CCHHPPCC", "d": "MKTAYIAKQK"}


def fasta(path: Path, sequences: dict[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{residues}\n" for name, residues in sequences.items()))
    return path


def test_an_identifier_may_have_several_labels(make_store: Maker, tmp_path: Path) -> None:
    store = make_store(fasta(tmp_path / "a.faa", SEQUENCES), rows_per_chunk=2)
    labels = tmp_path / "labels.tsv"
    labels.write_text("a\tGO:2\na\tGO:1\na\tGO:1\r\nb\tGO:1\nc\tGO:3\n")
    found = virnuc_dask.annotate(store.path, labels, metric="euclidean", k=1)
    d = found.isel(query=3)
    assert (d.label.item(), d["labels"].item(), d.row.item()) == ("GO:1", "GO:1|GO:2", 0)
    # a and b, or a and c: the nearer neighbour's reliability is the higher one.
    found = virnuc_dask.annotate(store.path, labels, metric="euclidean", k=3)
    d = found.isel(query=3)
    rows = virnuc_dask.open_store(store.path).embedding.values.astype(np.float64)
    near = 0.5 / (0.5 + np.linalg.norm(rows[:3] - rows[3], axis=1))
    assert d.label.item() == "GO:1"
    assert d.reliability.item() == pytest.approx((near[0] + near[1]) / 3, rel=1e-5)
    assert d["labels"].item() == "GO:1|GO:2|GO:3"
    # Of four neighbours asked for there are three: one that is missing says nothing.
    fewer = virnuc_dask.annotate(store.path, labels, metric="euclidean", k=4).isel(query=3)
    assert fewer.reliability.item() == pytest.approx((near[0] + near[1]) / 4, rel=1e-5)
    result = virnuc_dask.leave_one_out(store.path, labels, metric="euclidean")
    assert result.rows == 3
    assert {each.label: each.support for each in result.labels} == {
        "GO:1": 2,
        "GO:2": 1,
        "GO:3": 1,
    }


def test_copies_do_not_answer_for_each_other(make_store: Maker, tmp_path: Path) -> None:
    same = {"a": "MKTAYIAKQR", "b": "MKTAYIAKQR", "c": "MKTAYIAKQR"}
    labels = tmp_path / "labels.tsv"
    labels.write_text("a\tx\nb\tx\nc\tx\n")
    store = make_store(fasta(tmp_path / "a.faa", same))
    found = virnuc_dask.leave_one_out(store.path, labels)
    assert (found.rows, found.correct, found.unanswered, found.copies) == (3, 0, 3, 3)
    assert found.labels[0].precision is None
    # Also those that differ only behind the end of what is encoded.
    longer = {"a": "MKTAYIAKQR", "b": "MKTAYIAKQRW", "c": "CCHHPPCC"}
    store = make_store(fasta(tmp_path / "b.faa", longer), "b.zarr", max_residues=10)
    assert virnuc_dask.leave_one_out(store.path, labels).copies == 2


TILES = {
    "a": "MKTAYIAKQRQISFVKSHFSRQ",
    "b": "MLKVVGGWCCHHPPCCWW",
    "c": "MLKVVGGWMKTAYIAKQRDDEE",
    "d": "GGSTTRNNPPWWYYFFLLIIMM",
}


def test_rows_of_one_protein_or_read_do_not_answer_for_each_other(
    make_store: Maker, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{name}\t{name}\n" for name in TILES))
    store = make_store(fasta(tmp_path / "a.faa", TILES), tiling=Tiling(8, 7), rows_per_chunk=2)
    data = virnuc_dask.open_store(store.path)
    found = virnuc_dask.leave_one_out(store.path, labels)
    # Each label is of one protein's tiles only, which do not meet.
    assert (found.rows, found.correct, found.unanswered) == (store.records, 0, 0)
    assert found.copies == store.records
    # b's and c's first tiles are equal: so no tile of b meets one of c.
    groups = labels_module._groups(store, np.arange(store.records))
    protein = data.read.values
    assert [np.unique(groups[protein == number]).size for number in range(4)] == [1, 1, 1, 1]
    assert np.unique(groups).size == 3
    (reads := tmp_path / "r.fa").write_text(">r1\n" + "ATGGCTAAAGGTCTGA" * 6 + "\n>r2\nATGAAAC\n")
    frames = make_store(reads, "r.zarr", translation=Translation(frames="orf", min_residues=5))
    of_read = virnuc_dask.open_store(frames.path).read.values
    groups = labels_module._groups(frames, np.arange(frames.records))
    assert np.unique(groups[of_read == 0]).size == 1
    assert (of_read == 0).sum() > 1


def test_an_identifier_may_be_a_reads_or_a_proteins(make_store: Maker, tmp_path: Path) -> None:
    store = make_store(fasta(tmp_path / "a.faa", TILES), tiling=Tiling(8, 7), rows_per_chunk=2)
    data = virnuc_dask.open_store(store.path)
    ids, proteins = data.sequence_id.values.tolist(), data.read_id.values
    names = proteins[data.read.values].tolist()
    assert ids[1] not in TILES
    labels = tmp_path / "labels.tsv"
    labels.write_text(f"identifier\tlabel\na\tx\na\tz\nb\ty\n{ids[1]}\tits own\nnobody\tx\n")
    known = labels_module._read_labels(labels, store)
    wanted = {"a": ["x", "z"], "b": ["y"], "c": [], "d": []}
    for row, name in enumerate(names):
        found = [known.names[code] for code in known.of(np.array([row]))[1]]
        assert found == (["its own"] if row == 1 else wanted[name])
    assert "has 1 identifier not in" in known.note
    # A protein whose rows all have labels of their own is not one that is missing.
    lines = "".join(f"{name}\tx\n" for name, of in zip(ids, names, strict=True) if of == "a")
    labels.write_text(f"b\ty\na\ty\n{lines}")
    assert not labels_module._read_labels(labels, store).note


def test_a_map_takes_the_same_identifiers(make_store: Maker, tmp_path: Path) -> None:
    store = make_store(fasta(tmp_path / "a.faa", TILES), tiling=Tiling(8, 7), rows_per_chunk=2)
    data = virnuc_dask.open_store(store.path)
    names = data.read_id.values[data.read.values].tolist()
    own = data.sequence_id.values[1]
    labels = tmp_path / "labels.tsv"
    labels.write_text(f"a\tx\na\tz\nb\ty\n{own}\tits own\n")
    virnuc_dask.make_map(store.path)
    drawn = draw_points(store, "pca", colour=str(labels))
    wanted = {"a": "x|z", "b": "y", "c": "no label", "d": "no label"}
    expected = [wanted[name] for name in names]
    expected[1] = "its own"
    assert drawn.values == expected
    labels.write_text("nobody\tx\n")
    with pytest.raises(UsageError, match="none of its identifiers belongs to a drawn row"):
        draw_points(store, "pca", colour=str(labels))


def test_input_files_are_labels(make_store: Maker, tmp_path: Path) -> None:
    files = [tmp_path / folder / "a.faa" for folder in "xy"]
    for letters, file in zip(("ACD", "KLM"), files, strict=True):
        file.parent.mkdir()
        records = [(letter, n) for letter in letters for n in (4, 5)]
        file.write_text("".join(f">{a}{n}\n{a * 10}{letters * n}\n" for a, n in records))
    store = make_store(files)
    table = tmp_path / "labels.tsv"
    names = [f"a.faa ({number})" for number in (1, 2)]
    ids = virnuc_dask.open_store(store.path).sequence_id.values
    table.write_text("".join(f"{name}\t{names[n // 6]}\n" for n, name in enumerate(ids)))
    found = virnuc_dask.annotate(store.path, "source", k=3)
    xarray.testing.assert_equal(found, virnuc_dask.annotate(store.path, table, k=3))
    assert set(found.label.values) == set(names)
    counted = virnuc_dask.leave_one_out(store.path, "source")
    assert {each.label: each.support for each in counted.labels} == dict.fromkeys(names, 6)
    empty = make_store(files, "empty.zarr", embed=False)
    with pytest.raises(UsageError, match="has no embedded row yet"):
        virnuc_dask.annotate(store.path, "source", reference=empty.path)
    forget_headers(store)
    with pytest.raises(UsageError, match="does not know which file"):
        virnuc_dask.annotate(store.path, "source")


def test_only_labelled_embedded_rows_take_part(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = make_store(awkward, rows_per_chunk=2)
    labels = tmp_path / "labels.tsv"
    labels.write_text("name\tgroup\n\nb\tx\nempty\ty\nnobody\tz\n")
    found = virnuc_dask.annotate(store.path, labels, k=2)
    assert found.query_row.values.tolist() == [0, 1, 4, 6]
    # The only labelled row is no neighbour of itself.
    assert found.label.values.tolist() == ["x", "", "x", "x"]
    assert found.row.values.tolist() == [1, -1, 1, 1]
    assert found["labels"].values[1] == found.sequence_id.values[1] == ""
    assert found.reliability.values[1] == 0
    assert np.isnan(found.similarity.values[1])
    write_annotations([found], tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert lines[2] == "b\t1\t\t0.0\t\t\t\t\t\t\t"  # a name, a reliability, and no neighbour
    note = found.attrs["note"]
    assert f"{labels} has 1 identifier not in {store.path} (nobody)" in note
    assert "has 1 labelled row without" in note
    store.remove_chunk(0)
    with pytest.raises(UsageError, match="none of the 2 labelled rows has an embedding"):
        virnuc_dask.annotate(store.path, labels)
    empty = make_store(awkward, "empty.zarr", embed=False)
    whole = make_store(awkward, "whole.zarr")
    with pytest.raises(UsageError, match="has no embedded row yet"):
        virnuc_dask.annotate(empty.path, labels, reference=whole.path)


def test_both_rows_of_an_identifier_that_occurs_twice_are_labelled(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    (labels := tmp_path / "labels.tsv").write_text("a\tx\n")
    found = virnuc_dask.leave_one_out(make_store(awkward).path, labels)
    assert (found.rows, found.correct) == (2, 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"id\tlabel\na x\n", r"labels.tsv, line 2: no tab"),
        (b"a\tx\n\n\tx\n", r"line 3: the identifier is empty"),
        (b"a\t \tx\n", r"line 1: the label is empty"),
        (b"a\tx|y\n", r"line 1: '\|' in a label"),
        (b"\n", r"no lines; each line needs an identifier, a tab and a label"),
        (b"A\tx\nB\ty\n", r"none of its 2 identifiers is in .*; for example, the file has 'B' and"),
    ],
)
def test_malformed_labels_are_said(
    content: bytes, problem: str, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.tsv").write_bytes(content)
    store = make_store(awkward)
    for function in (virnuc_dask.annotate, virnuc_dask.leave_one_out):
        with pytest.raises(UsageError, match=problem):
            function(store.path, tmp_path / "labels.tsv")
    with pytest.raises(UsageError, match=r"nowhere\.tsv: No such file"):
        virnuc_dask.annotate(store.path, tmp_path / "nowhere.tsv")


def test_headers_that_are_no_utf_8_are_found(make_store: Maker, tmp_path: Path) -> None:
    (tmp_path / "a.faa").write_bytes(b">caf\xe9\nMKTAY\n>th\xc3\xa9\nMLKV\n")
    store = make_store(tmp_path / "a.faa")
    labels = tmp_path / "labels.tsv"
    labels.write_bytes(b"\xef\xbb\xbfcaf\xe9\tx\nth\xc3\xa9\tcaf\xe9\n")
    found = virnuc_dask.annotate(store.path, labels)
    assert found.label.values.tolist() == ["caf\xe9", "x"]


def test_stores_that_are_not_comparable_are_refused(
    store: Store, make_store: Maker, tmp_path: Path
) -> None:
    other = make_store(VIRAL_PROTEINS, "other.zarr", pooling="max", embed=False)
    label_file(store, tmp_path / "labels.tsv")
    with pytest.raises(UsageError, match=r"not comparable:\n  pooling"):
        virnuc_dask.annotate(store.path, tmp_path / "labels.tsv", reference=other.path)
    with pytest.raises(UsageError, match="k must be at least 1"):
        virnuc_dask.annotate(store.path, tmp_path / "labels.tsv", k=0)


@pytest.mark.usefixtures("few_rows_a_block")
@pytest.mark.slow
def test_the_command(cli_here: Cli, store: Store, make_store: Maker, awkward: Path) -> None:
    folder = store.path.parent
    label_file(store, folder / "labels.tsv")
    (folder / "some.faa").write_text(">=1+1 formula\nMKTAYIAKQRQISFVKSHFSRQ\n" * 3)
    query = make_store(folder / "some.faa", "query.zarr")
    command = ["annotate", query.path, "--reference", store.path, "--labels", "labels.tsv"]
    done = cli_here(*command, "--k", 3)
    assert done.returncode == 0, done.stderr
    assert f"comment: {RANDOM_WEIGHTS}" in done.stderr
    assert "note: median lengths" in done.stderr
    found = virnuc_dask.annotate(query.path, folder / "labels.tsv", reference=store.path, k=3)
    lines = read_tsv(done.stdout)
    assert list(lines[0]) == [
        *("query", "query_row", "label", "reliability", "labels", "neighbour", "row"),
        *("similarity", "length", "status", "description"),
    ]
    assert [line["query"] for line in lines] == ["'=1+1"] * 3
    for number, line in enumerate(lines):
        one = found.isel(query=number)
        assert line["query_row"] == str(number)  # all three have one name
        assert line["label"] == one.label.item()
        assert line["labels"] == one["labels"].item()
        assert np.float32(line["reliability"]) == one.reliability.item()
        assert np.float32(line["similarity"]) == one.similarity.item()
        assert (line["neighbour"], int(line["row"])) == (one.sequence_id.item(), one.row.item())
    done = cli_here(*command, "--k", 3, "--out", "out.tsv", "--no-guard")
    assert (done.returncode, done.stdout) == (0, "3 rows in out.tsv\n"), done.stderr
    assert [line["query"] for line in read_tsv((folder / "out.tsv").read_text())] == ["=1+1"] * 3
    done = cli_here(*command, "--out", "out.tsv")
    assert (done.returncode, "out.tsv exists" in done.stderr) == (2, True)
    assert cli_here(*command, "--out", "out.tsv", "--force").returncode == 0
    done = cli_here("annotate", store.path, "--labels", "labels.tsv", "--leave-one-out", "--json")
    assert done.returncode == 0, done.stderr
    expected = virnuc_dask.leave_one_out(store.path, folder / "labels.tsv").to_json()
    assert json.loads(done.stdout) | {"reference": ""} == expected | {"reference": ""}
    assert expected["comment"] == RANDOM_WEIGHTS
    done = cli_here(*command, "--leave-one-out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == [
        expected["labels"][0]["label"],
        str(expected["labels"][0]["support"]),
    ]
    assert f"accuracy {expected['accuracy']:.1%}" in done.stdout
    for wrong in (["--json"], ["--leave-one-out", "--out", "x.tsv"]):
        assert cli_here(*command, *wrong).returncode == 2
    (folder / "bad.tsv").write_text("a b\n")
    done = cli_here("annotate", store.path, "--labels", "bad.tsv", "--out", "new.tsv")
    assert (done.returncode, done.stderr) == (
        2,
        "error: bad.tsv, line 1: no tab; each line needs an identifier, a tab and a label\n",
    )
    assert not list(folder.glob("*new.tsv"))


@pytest.mark.usefixtures("few_rows_a_block")
@pytest.mark.slow
def test_parquet_is_written_part_by_part(store: Store, tmp_path: Path) -> None:
    label_file(store, tmp_path / "labels.tsv", slice(0, 100))
    parts = list(labels_module.annotate_in_parts(store.path, tmp_path / "labels.tsv", k=2))
    assert [part.sizes["query"] for part in parts] == [50] * 6
    assert write_annotations(iter(parts), tmp_path / "out.parquet") == 300
    found = virnuc_dask.annotate(store.path, tmp_path / "labels.tsv", k=2)
    file = parquet.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 6
    table = file.read()
    assert table["label"].to_pylist() == found.label.values.tolist()
    assert table["query"].to_pylist() == found.query_id.values.tolist()
    assert np.array_equal(table["reliability"].to_numpy(), found.reliability.values)
    assert RANDOM_WEIGHTS.encode() == table.schema.metadata[b"comment"]


def test_in_an_object_store(
    store: Store, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()
    url = f"s3://{BUCKET}/{uuid4().hex}/labels.zarr"
    place = location_of(url)
    assert place.publish(store.path)
    label_file(store, tmp_path / "labels.tsv")
    here, there = (
        virnuc_dask.leave_one_out(path, tmp_path / "labels.tsv") for path in (store.path, url)
    )
    assert here.labels == there.labels
