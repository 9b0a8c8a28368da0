"""Classifiers: honest splits, files that run nothing, scores that are resumed and never mixed."""

from __future__ import annotations

import builtins
import csv
import functools
import json
import operator
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import ROOT, VIRAL_PROTEINS, Maker, command, copied, made, tree
from models import Malicious
from numpy.typing import NDArray
from pyarrow import parquet
from s3 import BUCKET, Server
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import virnuc_dask
from virnuc_dask.analysis import chunk_passes, prediction, samples, training
from virnuc_dask.analysis import classifier as files
from virnuc_dask.analysis.classifier import load_classifier, save_classifier
from virnuc_dask.analysis.samples import Sample, groups_of
from virnuc_dask.cli.main import main
from virnuc_dask.errors import UsageError
from virnuc_dask.runtime.embed import embed_chunk
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import RANDOM_WEIGHTS, Settings, Tiling, Translation
from virnuc_dask.store import bucket
from virnuc_dask.store.results import keep_result, open_result
from virnuc_dask.store.store import Store

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def proteins(path: Path, count: int, favoured: str, seed: int, copies: int = 1) -> Path:
    """Random proteins with more of some letters, each several times under another name."""
    random = np.random.default_rng(seed)
    letters = list(AMINO_ACIDS + favoured)
    with path.open("w") as file:
        for number in range(count):
            sequence = "".join(random.choice(letters, random.integers(30, 60)))
            for copy in range(copies):
                file.write(f">{path.stem}{number}_{copy} a protein\n{sequence}\n")
    return path


Originals = tuple[Store, Store, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Viral proteins, and others."""
    folder = tmp_path_factory.mktemp("classes")
    return proteins(folder / "v.faa", 130, "KKK", 1), proteins(folder / "o.faa", 150, "DDD", 2)


@pytest.fixture(scope="module")
def originals(inputs: tuple[Path, Path]) -> Originals:
    """A store of each input and a classifier of their rows: each test has copies."""
    folder = inputs[0].parent
    viral = made(inputs[0], folder / "viral.zarr")
    other = made(inputs[1], folder / "other.zarr")
    virnuc_dask.train(viral.path, other.path, folder / "virus.skops")
    return viral, other, folder / "virus.skops"


@pytest.fixture
def viral(originals: Originals, tmp_path: Path) -> Store:
    return copied(originals[0], tmp_path / "viral.zarr")


@pytest.fixture
def other(originals: Originals, tmp_path: Path) -> Store:
    return copied(originals[1], tmp_path / "other.zarr")


@pytest.fixture
def trained(originals: Originals, tmp_path: Path) -> Path:
    return Path(shutil.copy(originals[2], tmp_path))


class Fits:
    """What classifiers were fitted on, and measured on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        fit = training._fit

        def seen(kind: Any, features: Any, is_first: Any, is_test: Any, *others: Any) -> Any:
            self.calls.append((np.concatenate(features), is_first, is_test))
            return fit(kind, features, is_first, is_test, *others)

        monkeypatch.setattr(training, "_fit", seen)

    def sides(self) -> list[set[bytes]]:
        """Different embeddings among the training rows, and among those held out."""
        features, _, is_test = self.calls[0]
        return [{row.tobytes() for row in features[side]} for side in (~is_test, is_test)]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    return Fits(monkeypatch)


# --- training ---


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_figures_are_of_the_saved_classifier_on_rows_it_has_not_seen(
    kind: Any, viral: Store, other: Store, tmp_path: Path, fits: Fits
) -> None:
    out = tmp_path / "c.skops"
    report = virnuc_dask.train(viral.path, other.path, out, kind=kind)
    assert [(each.training, each.held_out) for each in report.classes] == [(98, 32), (112, 38)]
    (features, is_viral, is_test), (composition, *_) = fits.calls
    assert features.shape == (280, 64)
    seen, held_out = fits.sides()
    assert not seen & held_out
    # As anybody would compute them who has the file and scikit-learn.
    score = load_classifier(out).pipeline.predict_proba(features[is_test])[:, 1]
    truth = is_viral[is_test] == 1
    pairs = score[truth][:, None] - score[~truth]
    auroc = (pairs > 0).mean() + (pairs == 0).mean() / 2
    np.testing.assert_allclose(report.embeddings.auroc, auroc)
    np.testing.assert_allclose(report.embeddings.brier, np.mean((score - truth) ** 2))
    assert report.embeddings.auroc > 0.8
    # The first protein, letter by letter.
    lengths, residues = viral.read_rows(0)
    first = residues[: lengths[0]].tobytes().decode()
    shares = [first.count(letter) / len(first) for letter in AMINO_ACIDS]
    np.testing.assert_allclose(composition[0], [*shares, np.log(len(first))], rtol=1e-6)
    assert report.composition.auroc > 0.6


def test_metrics_by_hand() -> None:
    found = training.measure(np.array([1, 0, 1, 1, 0]), np.array([0.95, 0.05, 0.45, 1.0, 0.41]))
    assert found.auroc == 1
    assert found.auprc == 1
    squares = [0.05**2, 0.05**2, 0.55**2, 0, 0.41**2]
    np.testing.assert_allclose(found.brier, sum(squares) / 5)
    # Bins 0 (one row), 4 (two rows, one of them viral) and 9 (two).
    error = (abs(0.05 - 0) + abs(0.86 - 1) + abs(1.95 - 2)) / 5
    np.testing.assert_allclose(found.calibration_error, error)
    assert [each["rows"] for each in found.reliability] == [1, 0, 0, 0, 2, 0, 0, 0, 0, 2]
    assert found.reliability[4]["score"] == pytest.approx(0.43)
    assert found.reliability[4]["observed"] == 0.5
    assert found.reliability[1]["observed"] is None
    # Two of three viral rows and both others are called right.
    assert found.precision_at(0.5) == 1
    worse = training.measure(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6]))
    assert worse.auroc == 0.75
    assert worse.precision_at(0.01) == pytest.approx(0.01)  # all are called viral
    np.testing.assert_allclose(worse.auprc, (1 / 1 + 2 / 3) / 2)


@pytest.mark.slow
def test_the_interval_is_of_groups_that_are_drawn() -> None:
    random = np.random.default_rng(3)
    is_first = np.repeat([1, 0], 60)
    score = np.clip(random.normal(0.4 + 0.2 * is_first, 0.2), 0, 1).round(2)  # some are level
    found = training.measure(is_first, score)
    # As anybody would do it who has scikit-learn.
    expected = []
    for _ in range(1000):
        rows = np.concatenate([random.choice(np.flatnonzero(is_first == n), 60) for n in (1, 0)])
        expected.append(roc_auc_score(is_first[rows], score[rows]))
    low, high = np.quantile(expected, [0.025, 0.975])
    np.testing.assert_allclose([found.auroc_low, found.auroc_high], [low, high], atol=0.02)
    assert found.auroc_low < found.auroc < found.auroc_high
    assert training.measure(is_first, score) == found
    assert training.measure(is_first, score, random_state=1).auroc_low != found.auroc_low
    # Nine copies of each row say no more than one of them.
    copies = np.repeat(np.arange(120), 9)
    grouped = training.measure(is_first[copies], score[copies], groups=copies)
    assert (grouped.auroc_low, grouped.auroc_high) == (found.auroc_low, found.auroc_high)
    alone = training.measure(is_first[copies], score[copies])
    assert alone.auroc_high - alone.auroc_low < (high - low) / 2


def test_copies_of_a_sequence_are_on_one_side(
    make_store: Maker, tmp_path: Path, fits: Fits
) -> None:
    stores = [
        make_store(proteins(tmp_path / f"{name}.faa", 30, name, number, copies=4), f"{name}.zarr")
        for number, name in enumerate("KD")
    ]
    report = virnuc_dask.train(stores[0].path, stores[1].path, tmp_path / "c.skops")
    seen, held_out = fits.sides()
    assert (len(seen), len(held_out)) == (44, 16)
    assert not seen & held_out
    assert [each.held_out for each in report.classes] == [32, 32]


def test_what_was_cut_off_makes_no_other_sequence(make_store: Maker, tmp_path: Path) -> None:
    """Rows that differ only in what was not encoded have one embedding."""
    file = tmp_path / "long.faa"
    file.write_text(">a\nMKTAYIAKQRWW\n>b\nMKTAYIAKQRYYYY\n>c\nMLKTAYIAKQR\n")
    store = make_store(file, max_residues=10)
    drawn = drawn_from(store, 10)
    assert drawn.sequence[0] == drawn.sequence[1] != drawn.sequence[2]
    assert drawn.length.tolist() == [10, 10, 10]
    assert np.array_equal(drawn.composition[0], drawn.composition[1])


def test_sequences_of_both_classes_are_left_out(
    make_store: Maker, viral: Store, inputs: tuple[Path, Path], tmp_path: Path, fits: Fits
) -> None:
    text = inputs[0].read_text().split(">")[1:]
    mixed = proteins(tmp_path / "mixed.faa", 40, "DDD", 3)
    with mixed.open("a") as file:
        for record in [*text[:5], *text[:3]]:
            file.write(">again_" + record)
    other = make_store(mixed, "mixed.zarr")
    report = virnuc_dask.train(viral.path, other.path, tmp_path / "c.skops")
    assert report.shared == 5
    assert [each.left_out for each in report.classes] == [5, 8]
    assert [each.training + each.held_out for each in report.classes] == [125, 40]
    assert len(fits.calls[0][0]) == 165
    assert any("5 sequences in both classes were left out" in note for note in report.notes)
    assert "left out      5 sequences in both classes, 5 and 8 rows" in report.lines()
    only = tmp_path / "only.faa"
    only.write_text("".join(f">x{record}" for record in text[:9]))
    with pytest.raises(UsageError, match=r"only.zarr: too few different sequences.*'other'"):
        virnuc_dask.train(viral.path, make_store(only, "only.zarr").path, tmp_path / "d.skops")
    assert not (tmp_path / "d.skops").exists()


def some_sample(sequence: list[bytes], read: list[int]) -> Sample:
    rows = len(sequence)
    return Sample(
        embedded=rows,
        embedding=np.zeros((rows, 2), np.float32),
        composition=np.zeros((rows, 21), np.float32),
        length=np.ones(rows, np.int64),
        sequence=sequence,
        read=np.array(read),
    )


def test_groups_by_hand() -> None:
    proteins_only = some_sample([b"a", b"b", b"a", b"c"], [-1] * 4)
    assert groups_of(proteins_only).tolist() == [0, 1, 0, 3]
    # Read 0 has a and b, read 3 has b and d, so d belongs to a.
    of_reads = some_sample([b"a", b"b", b"c", b"b", b"d", b"e"], [0, 0, 1, 3, 3, 4])
    assert groups_of(of_reads).tolist() == [0, 0, 2, 0, 0, 5]


def reads(path: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(count):
            letters = "".join(random.choice(list("ACGT"), random.integers(60, 260)))
            file.write(f">r{number}\n{letters}\n")
    return path


ORF = Translation(frames="orf", min_residues=15)


@pytest.mark.slow
def test_frames_of_a_read_are_on_one_side(make_store: Maker, tmp_path: Path, fits: Fits) -> None:
    stores = [
        make_store(reads(tmp_path / f"{seed}.fa", 60, seed), f"{seed}.zarr", translation=ORF)
        for seed in (1, 2)
    ]
    report = virnuc_dask.train(stores[0].path, stores[1].path, tmp_path / "c.skops")
    _, is_first, is_test = fits.calls[0]
    for store, number in zip(stores, (1, 0), strict=True):
        numbers = virnuc_dask.open_store(store.path).read.values
        assert len(np.unique(numbers)) < len(numbers)
        sides = is_test[is_first == number]
        assert not set(numbers[sides]) & set(numbers[~sides])
    assert report.classes[0].translation == str(ORF)


def drawn_from(store: Store, max_rows: int, seed: int = 0) -> Sample:
    with chunk_passes.open_pool(store, 2, None) as pool:
        counts = samples.count_embedded(store, pool)
        counter = chunk_passes.ChunkCounter(None, 0)
        return samples.draw(store, counts, max_rows, [seed], pool, counter)


@pytest.mark.slow
def test_a_sample_of_a_large_store(make_store: Maker, other: Store, tmp_path: Path) -> None:
    made = [make_store(VIRAL_PROTEINS, f"{n}.zarr", rows_per_chunk=n) for n in (32, 7)]
    made[0].remove_chunk(9)
    made[1].remove_chunk(42)
    made[1].remove_chunk(41)
    all_rows = virnuc_dask.open_store(made[0].path).embedding.values[:287]
    assert np.array_equal(drawn_from(made[1], 1000).embedding, all_rows)
    some = [drawn_from(store, 50) for store in made]
    kept = {row.tobytes() for row in all_rows}
    assert len(some[0].embedding) == 50
    assert {row.tobytes() for row in some[0].embedding} <= kept | {
        row.tobytes() for row in drawn_from(made[0], 1000).embedding
    }
    assert np.array_equal(some[1].embedding, drawn_from(made[1], 50).embedding)
    assert not np.array_equal(some[1].embedding, drawn_from(made[1], 50, seed=1).embedding)
    calls: list[tuple[int, int]] = []
    report = virnuc_dask.train(
        made[1].path,
        other.path,
        tmp_path / "c.skops",
        max_rows=60,
        progress=lambda *done: calls.append(done),
    )
    assert [(each.embedded, each.sampled) for each in report.classes] == [(287, 60), (150, 60)]
    assert calls[-1] == (41 + 5, 41 + 5)
    assert any("60 of 287 rows" in note for note in report.notes)


@pytest.mark.slow
def test_the_same_again_is_the_same_classifier(viral: Store, other: Store, tmp_path: Path) -> None:
    digests = []
    for number, how in enumerate(({}, {}, {"random_state": 1}, {"kind": "mlp"}, {"kind": "mlp"})):
        out = tmp_path / f"{number}.skops"
        virnuc_dask.train(viral.path, other.path, out, **how)
        digests.append(load_classifier(out).digest())
    assert digests[0] == digests[1]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 3


def test_a_digest_is_of_parameters_too(viral: Store, other: Store, tmp_path: Path) -> None:
    out = tmp_path / "mlp.skops"
    virnuc_dask.train(viral.path, other.path, out, kind="mlp")
    classifier = load_classifier(out)
    digest = classifier.digest()
    for step, how in ((1, {"activation": "tanh"}), (0, {"with_mean": False})):
        save_classifier(classifier, tmp_path / f"{step}.skops")
        changed = load_classifier(tmp_path / f"{step}.skops")
        assert changed.digest() == digest
        changed.pipeline.steps[step][1].set_params(**how)
        assert changed.digest() != digest


@pytest.mark.slow
def test_a_class_of_one_training_row(make_store: Maker, viral: Store, tmp_path: Path) -> None:
    """Early stopping would take a share of each class, and there is none of one row."""
    many = make_store(proteins(tmp_path / "m.faa", 270, "DDD", 4), "many.zarr")
    few = make_store(proteins(tmp_path / "f.faa", 2, "KKK", 5), "few.zarr")
    report = virnuc_dask.train(few.path, many.path, tmp_path / "few.skops", kind="mlp")
    assert [each.training for each in report.classes] == [1, 202]
    virnuc_dask.train(viral.path, many.path, tmp_path / "enough.skops", kind="mlp")
    stops = [
        load_classifier(tmp_path / f"{name}.skops").pipeline[-1].early_stopping
        for name in ("few", "enough")
    ]
    assert stops == [False, True]


@pytest.mark.slow
def test_a_cluster_reads_and_scores_the_same(
    viral: Store, other: Store, trained: Path, tmp_path: Path, client: Any
) -> None:
    out = tmp_path / "by_client.skops"
    virnuc_dask.train(viral.path, other.path, out, client=client)
    assert load_classifier(out).digest() == load_classifier(trained).digest()
    virnuc_dask.predict(viral.path, trained)
    virnuc_dask.predict(viral.path, trained, name="by_client", client=client)
    a, b = (tree(viral.path / f"score_{name}") for name in ("virus", "by_client"))
    assert {n: c for n, (_, _, c) in a.items() if n != "zarr.json"} == {
        n: c for n, (_, _, c) in b.items() if n != "zarr.json"
    }


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"kind": "forest"}, "kind must be one of logistic, mlp"),
        ({"test_size": 0}, "test_size must be"),
        ({"test_size": 1}, "test_size must be"),
        ({"max_rows": 1}, "max_rows must be"),
        ({"random_state": -1}, "random_state must be"),
        ({"classes": ("a", "a")}, "two different names"),
        ({"workers": 0}, "workers must be"),
    ],
)
def test_settings_that_make_no_sense(
    how: dict[str, Any], problem: str, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = make_store(awkward, embed=False)
    with pytest.raises(UsageError, match=problem):
        virnuc_dask.train(store.path, store.path, tmp_path / "c.skops", **how)


def test_what_cannot_be_trained_on_is_refused(
    viral: Store, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.skops"
    deeper = make_store(awkward, "deeper.zarr", repr_layer=1, pooling="max", embed=False)
    with pytest.raises(
        UsageError, match=r"not comparable:\n  repr_layer: 0 and 1\n  pooling:"
    ) as said:
        virnuc_dask.train(viral.path, deeper.path, out)
    for store in (viral, deeper):
        assert f"\n  {store.path}: {store.model.described('')}" in str(said.value)
    with pytest.raises(UsageError, match="hold the same sequences"):
        virnuc_dask.train(viral.path, viral.path, out)
    empty = make_store(awkward, "empty.zarr", embed=False)
    with pytest.raises(UsageError, match=r"empty.zarr has no embedded row yet"):
        virnuc_dask.train(viral.path, empty.path, out)
    with pytest.raises(UsageError, match=r"known are .skops"):
        virnuc_dask.train(viral.path, empty.path, tmp_path / "c.pkl")
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        virnuc_dask.train(viral.path, empty.path, out)
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is not replaced"):
        virnuc_dask.train(viral.path, empty.path, out, force=True)


def test_lengths_that_differ_are_noted(
    make_store: Maker, viral: Store, awkward: Path, trained: Path, tmp_path: Path
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    report = virnuc_dask.train(whole.path, viral.path, tmp_path / "lengths.skops")
    assert any("may learn only the length" in note for note in report.notes)
    found = virnuc_dask.predict(whole.path, trained)
    assert any("median lengths are" in note for note in found.notes)
    note, held_out = virnuc_dask.predict(viral.path, trained).notes
    assert note.startswith(f"{trained.name} was trained on 98 of these 130 rows")
    assert held_out.startswith(f"AUROC of {trained.name} on held-out rows of its training data: ")


# --- scores ---


def test_scores_are_scikit_learns(viral: Store, trained: Path) -> None:
    from skops.io import load

    found = virnuc_dask.predict(viral.path, trained)
    data = virnuc_dask.open_store(viral.path)
    loaded = load(trained, trusted=[])["classifier"]  # by nothing of ours
    expected = loaded.predict_proba(data.embedding.values)[:, 1]
    np.testing.assert_allclose(data.score_virus.values, expected, rtol=1e-6)
    assert data.score_virus.dtype == np.float32
    assert (found.scored, found.first) == (130, (expected >= 0.5).sum())
    assert (found.pending, found.quarantined, found.computed_chunks) == (0, 0, 5)
    before = tree(viral.path)
    assert virnuc_dask.predict(viral.path, trained).computed_chunks == 0
    assert tree(viral.path) == before


def test_a_store_that_is_being_filled(viral: Store, trained: Path) -> None:
    kept = {chunk: viral.read_chunk(chunk) for chunk in (1, 3)}
    for chunk in kept:
        viral.remove_chunk(chunk)
    found = virnuc_dask.predict(viral.path, trained)
    assert (found.scored, found.pending, found.computed_chunks) == (66, 64, 3)
    before = tree(viral.path / "score_virus")
    for chunk, content in kept.items():
        viral.write_chunk(chunk, *content)
    found = virnuc_dask.predict(viral.path, trained)
    assert (found.scored, found.pending, found.computed_chunks) == (130, 0, 2)
    assert before.items() <= tree(viral.path / "score_virus").items()


def test_quarantined_rows_have_no_score(make_store: Maker, awkward: Path, trained: Path) -> None:
    store = make_store(awkward, rows_per_chunk=2)
    out = trained.with_name("t.tsv")
    found = virnuc_dask.predict(store.path, trained, out=out)
    assert (found.scored, found.pending, found.quarantined, found.lines) == (4, 0, 3, 4)
    assert [line["row"] for line in read_tsv(out)] == ["0", "1", "4", "6"]


def test_another_classifier_of_the_name_is_refused(
    viral: Store, other: Store, trained: Path, tmp_path: Path
) -> None:
    virnuc_dask.predict(viral.path, trained)
    before = tree(viral.path)
    (tmp_path / "b").mkdir()
    virnuc_dask.train(viral.path, other.path, tmp_path / "b" / "virus.skops", random_state=3)
    with pytest.raises(
        UsageError, match=r"`score_virus` was made by another classifier; --replace"
    ):
        virnuc_dask.predict(viral.path, tmp_path / "b" / "virus.skops")
    assert tree(viral.path) == before
    with pytest.raises(UsageError, match="made by another classifier"):
        virnuc_dask.predict(viral.path, tmp_path / "b" / "virus.skops", force=True)
    assert tree(viral.path) == before
    virnuc_dask.predict(viral.path, tmp_path / "b" / "virus.skops", replace=True)
    about = open_result(viral, "score_virus").about
    assert about["classifier"] == load_classifier(tmp_path / "b" / "virus.skops").digest()
    # The same classifier elsewhere, and trained again, is no other.
    virnuc_dask.train(viral.path, other.path, trained, random_state=3, force=True)
    assert virnuc_dask.predict(viral.path, trained).computed_chunks == 0


def test_other_embeddings_are_refused(
    make_store: Maker, awkward: Path, trained: Path, tmp_path: Path
) -> None:
    deeper = make_store(awkward, "deeper.zarr", repr_layer=1, pooling="bos", embed=False)
    before = tree(deeper.path)
    with pytest.raises(
        UsageError, match=r"other embeddings.*:\n  repr_layer: 1 and 0\n  pooling"
    ) as said:
        virnuc_dask.predict(deeper.path, trained)
    digest = deeper.identity.weights_sha256[:12]
    assert str(said.value).splitlines()[-2:] == [
        f"  {deeper.path}: {deeper.model.described('')}",
        f"  {trained}: demo, weights {digest}, layer 0, mean pooling, float32",
    ]
    assert tree(deeper.path) == before


def test_names_and_tables_that_cannot_be(viral: Store, trained: Path, tmp_path: Path) -> None:
    odd = trained.rename(tmp_path / "my virus.skops")
    before = tree(viral.path)
    for how, problem in (
        ({}, "--name"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": "x", "out": tmp_path / "x.xlsx"}, "known are .tsv and .parquet"),
        ({"name": "x", "consensus": "max"}, "--out"),
        (
            {"name": "x", "consensus": "max", "out": tmp_path / "x.tsv"},
            "needs rows that were translated",
        ),
        ({"name": "x", "consensus": "min", "out": tmp_path / "x.tsv"}, "must be one of max"),
        (
            {"name": "x", "out": odd.with_suffix(".tsv").parent / "no" / "x.tsv"},
            "not a writable directory",
        ),
    ):
        with pytest.raises(UsageError, match=problem):
            virnuc_dask.predict(viral.path, odd, **how)
    assert tree(viral.path) == before
    virnuc_dask.predict(viral.path, odd, name="x", out=tmp_path / "x.tsv")
    with pytest.raises(UsageError, match=r"exists.*--force.*; scores that the store keeps are not"):
        virnuc_dask.predict(viral.path, odd, name="x", out=tmp_path / "x.tsv")
    again = virnuc_dask.predict(viral.path, odd, name="x", out=tmp_path / "x.tsv", force=True)
    assert (again.computed_chunks, again.lines) == (0, 130)


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_tables_of_rows(
    viral: Store, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "SEQUENCES_PER_CHUNK", 50)  # several parts
    for suffix in ("tsv", "parquet"):
        assert virnuc_dask.predict(viral.path, trained, out=tmp_path / f"t.{suffix}").lines == 130
    data = virnuc_dask.open_store(viral.path)
    lines = read_tsv(tmp_path / "t.tsv")
    columns = ["sequence_id", "row", "score", "class", "trained_on", "length", "status"]
    assert list(lines[0]) == [*columns, "description"]
    assert Counter(line["trained_on"] for line in lines) == {"1": 98, "0": 32}
    assert {line["status"] for line in lines} == {"embedded"}
    assert [line["sequence_id"] for line in lines] == data.sequence_id.values.tolist()
    scores = np.array([line["score"] for line in lines], np.float32)
    assert np.array_equal(scores, data.score_virus.values)
    assert [line["class"] == "viral" for line in lines] == (scores >= 0.5).tolist()
    table = parquet.read_table(tmp_path / "t.parquet")
    assert np.array_equal(table["score"].to_numpy(), data.score_virus.values)
    assert table["row"].to_pylist() == list(range(130))
    assert str(table["score"].type) == "float"
    assert table.schema.metadata[b"comment"].decode() == RANDOM_WEIGHTS


def test_rows_that_it_was_trained_on_are_marked_in_any_store(
    viral: Store,
    other: Store,
    inputs: tuple[Path, Path],
    make_store: Maker,
    tmp_path: Path,
    fits: Fits,
) -> None:
    out = tmp_path / "virus.skops"
    virnuc_dask.train(viral.path, other.path, out)
    seen, held_out = fits.sides()
    mixed = tmp_path / "mixed.faa"
    unknown = ">new\nMKTAYIAKQRMKTAYIAKQRMKTAYIAKQRMKTAYIAK\n"
    mixed.write_text(inputs[1].read_text() + unknown + inputs[0].read_text())
    store = make_store(mixed, "mixed.zarr", rows_per_chunk=7)
    table = tmp_path / "t.tsv"
    found = virnuc_dask.predict(store.path, out, out=table)
    data = virnuc_dask.open_store(store.path)
    expected = [row.tobytes() in seen for row in data.embedding.values]
    assert [line["trained_on"] == "1" for line in read_tsv(table)] == expected
    assert not expected[data.sequence_id.values.tolist().index("new")]
    rest = sum(row.tobytes() in held_out for row in data.embedding.values)
    assert sum(expected) + rest + 1 == len(data.sequence)
    trained = f"virus.skops was trained on {sum(expected)} of these {store.records} rows"
    assert found.notes[0].startswith(f"{trained}, whose scores are too good")
    # Also of scores that are there, without reading the sequences again; but not of others.
    assert virnuc_dask.predict(store.path, out).notes == found.notes
    virnuc_dask.train(viral.path, other.path, tmp_path / "next.skops", random_state=1)
    assert virnuc_dask.predict(store.path, tmp_path / "next.skops").notes != found.notes
    alone = tmp_path / "alone.faa"
    alone.write_text(unknown)
    (note,) = virnuc_dask.predict(make_store(alone, "alone.zarr").path, out).notes
    assert note.startswith("AUROC")


def test_scores_of_an_older_version_are_completed(viral: Store, trained: Path) -> None:
    """It kept no details. No value depends on them."""
    whole = virnuc_dask.predict(viral.path, trained, name="whole")
    about = open_result(viral, whole.name).about
    old = keep_result(viral, "score", "old", about)
    found = virnuc_dask.predict(viral.path, trained, name="old")
    assert found.computed_chunks == viral.chunk_count
    assert np.array_equal(old.array[:], open_result(viral, whole.name).array[:])
    details = open_result(viral, whole.name).details
    assert details["trained_rows"] > 0
    assert 0 <= details["held_out_auroc"] <= 1


def test_names_break_no_table(make_store: Maker, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.faa"
    file.write_text(">=cmd|'/c'!A1 +1\nMKTAYIAKQR\n>a\"b \t=x\nMKTAYIAK\n")
    store = make_store(file)
    virnuc_dask.predict(store.path, trained, out=tmp_path / "t.tsv")
    lines = read_tsv(tmp_path / "t.tsv")
    assert [line["sequence_id"] for line in lines] == ["'=cmd|'/c'!A1", 'a"b']
    assert lines[0]["description"] == "'+1"
    virnuc_dask.predict(store.path, trained, out=tmp_path / "u.tsv", guard=False)
    assert read_tsv(tmp_path / "u.tsv")[0]["sequence_id"] == "=cmd|'/c'!A1"


@pytest.mark.parametrize("consensus", ["max", "mean", "virnucpro"])
@pytest.mark.slow
def test_reads_by_consensus(
    consensus: Any,
    make_store: Maker,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prediction, "SEQUENCES_PER_CHUNK", 8)  # reads go on in the next part
    store = make_store(reads(tmp_path / "r.fa", 40, 7), "r.zarr", translation=ORF, rows_per_chunk=8)
    store.remove_chunk(2)
    out = tmp_path / "reads.parquet"
    found = virnuc_dask.predict(store.path, trained, out=out, consensus=consensus)
    data = virnuc_dask.open_store(store.path)
    rows = pd.DataFrame(
        {
            "read": data.read.values,
            "score": data.score_virus.values,
            "id": data.sequence_id.values,
            "frame": data.frame.values,
        }
    ).dropna()
    assert len(rows) == found.scored == store.records - 8
    # No verdict from some of a read's frames.
    unfinished = set(data.read.values[16:24])
    assert unfinished & set(rows["read"])
    rows = rows[~rows["read"].isin(unfinished)]
    groups = rows.groupby("read")
    table = parquet.read_table(out).to_pandas().set_index("read")
    assert found.lines == len(table) == len(groups)
    assert table.index.tolist() == sorted(table.index)
    assert groups.size().max() > 1
    assert np.array_equal(table["rows"], groups.size())
    expected = groups.score.mean() if consensus == "mean" else groups.score.max()
    np.testing.assert_allclose(table.score, expected, rtol=1e-6)
    best = rows.loc[groups.score.idxmax()]
    assert table.best_row.tolist() == best.index.tolist()
    assert table.best_sequence_id.tolist() == best.id.tolist()
    assert table.best_frame.tolist() == best.frame.tolist()
    assert table.read_id.tolist() == [f"r{number}" for number in table.index]
    if consensus == "virnucpro":
        other = groups.score.apply(lambda scores: (1 - scores).max())
        np.testing.assert_allclose(table.other_score, other, rtol=1e-5)
        is_viral = groups.score.max() >= other
        assert table["class"].tolist() == np.where(is_viral, "viral", "other").tolist()
        assert 0 < is_viral.sum() < len(is_viral)


@pytest.mark.slow
def test_proteins_in_tiles_by_consensus(
    make_store: Maker, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "SEQUENCES_PER_CHUNK", 64)
    store = make_store(VIRAL_PROTEINS, "t.zarr", tiling=Tiling(100))
    out = tmp_path / "proteins.parquet"
    found = virnuc_dask.predict(store.path, trained, out=out, consensus="mean")
    data = virnuc_dask.open_store(store.path)
    rows = pd.DataFrame({"read": data.read.values, "score": data.score_virus.values}).dropna()
    groups = rows.groupby("read")
    table = parquet.read_table(out).to_pandas().set_index("read")
    assert found.lines == len(table) == 300 < len(rows)
    assert "best_frame" not in table
    assert np.array_equal(table["rows"], groups.size())
    np.testing.assert_allclose(table.score, groups.score.mean(), rtol=1e-6)
    assert table.best_row.tolist() == groups.score.idxmax().tolist()
    assert table.read_id.tolist() == data.read_id.values[table.index].tolist()


def test_virnucpros_rule_by_hand() -> None:
    part = {
        "score": np.array([0.75, 0.25, 0.75, 0.125, 0.5], np.float32),
        "read": np.array([0, 0, 2, 2, 7]),
        "row": np.arange(5),
        "frame": np.array([1, -1, 2, 3, 1], np.int8),
        "trained_on": np.array([True, True, False, False, True]),
        **{name: np.array(list("abcde"), object) for name in ("read_id", "sequence_id")},
    }
    found = prediction._by_read(part, "virnucpro", ("viral", "other"))
    assert found["class"] == ["viral", "other", "viral"]  # a tie is viral
    assert found["score"] == [0.75, 0.75, 0.5]
    assert found["other_score"] == [0.75, 0.875, 0.5]
    assert found["trained_rows"] == [2, 0, 1]
    assert found["best_row"] == [0, 2, 4]


# --- kills ---


# Waits for its end once 20 chunks are there.
WAITS = """
import sys, time
from virnuc_dask.cli.main import main
from virnuc_dask.store.results import Result

write, chunks = Result.write, []

def some(self, chunk, values):
    if len(chunks) == 20:
        time.sleep(600)
    write(self, chunk, values)
    chunks.append(chunk)

Result.write = some
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_predict_is_killed_and_goes_on(
    make_store: Maker, some_proteins: Path, trained: Path, tmp_path: Path
) -> None:
    store = make_store(some_proteins, "killed.zarr", rows_per_chunk=1)
    shutil.copytree(store.path, whole := tmp_path / "whole.zarr")
    arguments = ("--classifier", trained, "--workers", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, "predict", str(store.path), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = store.path / "score_virus"
    deadline = time.monotonic() + 120
    while sum(file.name[2:].isdigit() for file in folder.glob("c.*")) < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    present = open_result(store, "score_virus").present()
    assert present.sum() == 20
    before = {f"c.{chunk}": tree(folder)[f"c.{chunk}"] for chunk in np.flatnonzero(present)}
    again = subprocess.run(
        command("predict", store.path, *arguments, "--json"), capture_output=True, check=True
    )
    assert json.loads(again.stdout)["computed_chunks"] == 100 - present.sum()
    assert before.items() <= tree(folder).items()  # not even written again
    virnuc_dask.predict(whole, trained)
    ours, theirs = (
        {name: content for name, (_, _, content) in tree(path / "score_virus").items()}
        for path in (store.path, whole)
    )
    del theirs["zarr.json"]  # each result has an id of its own
    assert {name: ours[name] for name in theirs} == theirs
    after = tree(folder)
    assert virnuc_dask.predict(store.path, trained).computed_chunks == 0
    assert tree(folder) == after


# --- files from strangers ---


class Singer:
    """Sings when it is made; skops would make it, if it trusted the type."""

    def __init__(self, canary: str) -> None:
        Path(canary).touch()
        self.canary = canary

    def __reduce__(self) -> Any:
        return Singer, (self.canary,)


def saved(classifier: object) -> bytes:
    from skops.io import dumps  # which takes seconds to import, and all workers import this module

    return dumps({"classifier": classifier, "about": "{}"})


def with_a_function(canary: Path) -> bytes:
    return saved(functools.partial(os.mkdir, str(canary)))


def with_a_caller(canary: Path) -> bytes:
    return saved(operator.methodcaller("touch", canary.name))


def with_a_constructor(canary: Path) -> bytes:
    from skops.io import get_untrusted_types, loads

    content = saved(Singer(str(canary)))
    canary.unlink()
    loads(content, trusted=get_untrusted_types(data=content))
    assert canary.exists()  # it would have sung
    canary.unlink()
    return content


def with_an_estimator_that_we_do_not_use(canary: Path) -> bytes:
    return saved(make_pipeline(StandardScaler(), SVC()).fit([[0.0], [1.0]], [0, 1]))


def as_a_pickle(canary: Path) -> bytes:
    return pickle.dumps(Malicious(canary))


@pytest.mark.parametrize(
    "make",
    [
        with_a_function,
        with_a_caller,
        with_a_constructor,
        with_an_estimator_that_we_do_not_use,
        as_a_pickle,
    ],
)
def test_a_strangers_file_runs_nothing(
    make: Any, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store, canary, file = (
        make_store(awkward, embed=False),
        tmp_path / "canary",
        tmp_path / "x.skops",
    )
    file.write_bytes(make(canary))
    before = tree(store.path)
    with pytest.raises(UsageError, match=r"types that are not trusted|not a classifier"):
        virnuc_dask.predict(store.path, file)
    assert not canary.exists()
    assert tree(store.path) == before


def with_loader(schema: Any) -> None:
    """What builds a list is told to import a module's attribute."""
    node = schema["content"]["classifier"]
    node["__loader__"] = "FunctionNode"


def with_other_type(schema: Any) -> None:
    schema["content"]["classifier"] |= {"__module__": "subprocess", "__class__": "Popen"}


def with_a_type_as_method(schema: Any) -> None:
    keys = schema["content"]["classifier"]["content"]["content"]
    keys["predict_proba"] = {"__class__": "system", "__module__": "os", "__loader__": "TypeNode"}


@pytest.mark.parametrize("tamper", [with_loader, with_other_type, with_a_type_as_method])
def test_a_classifier_that_was_tampered_with(
    tamper: Any, viral: Store, trained: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.skops"
    with zipfile.ZipFile(trained) as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name == "schema.json":
                schema = json.loads(content)
                tamper(schema)
                content = json.dumps(schema).encode()
            after.writestr(name, content)
    with pytest.raises(UsageError, match="types that are not trusted, and was not loaded"):
        load_classifier(changed)


def an_array(shape: str, kind: str = "<f8") -> bytes:
    """An array that says it has a shape, and holds three numbers."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(24)


@pytest.mark.parametrize(
    "array",
    [
        an_array("(1125899906842624,)"),
        an_array("(4,)"),
        an_array("(2,)"),
        an_array("(-1, -3)"),
        an_array("(3,)", "|O"),
        an_array("(1099511627776,)", "|V0"),
        b"PK\x05\x06" + bytes(18),
        b"",
    ],
)
def test_an_array_that_is_not_what_it_says(array: bytes, trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.skops"
    with zipfile.ZipFile(trained) as before, zipfile.ZipFile(changed, "w") as after:
        names = before.namelist()
        for name in names:
            after.writestr(name, array if name == names[0] else before.read(name))
    with pytest.raises(UsageError, match="not a classifier"):
        load_classifier(changed)


def test_what_is_loaded_was_checked(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be replaced between a look at it and the next: there is one only."""
    reads, read = [], Path.read_bytes

    def once(path: Path) -> bytes:
        reads.append(path)
        content = read(path)
        path.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", once)
    assert load_classifier(trained).classes == ("viral", "other")
    assert reads == [trained]

    def all_memory(_: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", all_memory)
    with pytest.raises(UsageError, match="MemoryError"):
        load_classifier(trained)


def test_files_that_are_damaged_or_something_else(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skops.io import dumps

    whole = load_classifier(trained)
    content = trained.read_bytes()
    odd = tmp_path / "odd.skops"
    for bad in (b"", b"hello", content[: len(content) // 2], content.replace(b"NUMPY", b"numpy")):
        odd.write_bytes(bad)
        with pytest.raises(UsageError, match="not a classifier"):
            load_classifier(odd)
    for name in ("missing.skops", "."):
        with pytest.raises(UsageError, match="cannot be read"):
            load_classifier(tmp_path / name)
    for about in (
        {"model": {"dimension": 3}},
        {"classes": ["viral"]},
        {"classes": [1, 2]},
        {"classes": ["viral\x1b[2J", "other"]},
        {"model": {}},
        {"median_length": "short"},
        {"versions": None},
    ):
        save_classifier(replace(whole, about=whole.about | about), odd)
        with pytest.raises(UsageError, match="not a classifier"):
            load_classifier(odd)
    odd.write_bytes(dumps([1, 2]))
    with pytest.raises(UsageError, match="not a classifier"):
        load_classifier(odd)
    monkeypatch.setattr(files, "_MOST_BYTES", 1000)
    with pytest.raises(UsageError, match="too many for a classifier"):
        load_classifier(trained)


def test_a_library_that_cannot_be_imported_is_not_the_files_fault(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the working directory may have the name of a module that skops imports."""

    def shadowed(name: str, *others: Any, **options: Any) -> Any:
        if name == "skops.io":
            raise AttributeError("module 'py' has no attribute 'path'")
        return real(name, *others, **options)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", shadowed)
    with pytest.raises(AttributeError, match="module 'py' has no attribute 'path'"):
        load_classifier(trained)


def test_another_scikit_learn_is_noted(viral: Store, trained: Path) -> None:
    classifier = load_classifier(trained)
    old = classifier.about | {"versions": {"scikit-learn": "1.4.2"}}
    save_classifier(replace(classifier, about=old), trained)
    assert "scikit-learn 1.4.2" in virnuc_dask.predict(viral.path, trained).notes[-1]


# --- the commands, and stores elsewhere ---


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.mark.slow
def test_the_commands(viral: Store, other: Store, tmp_path: Path) -> None:
    file = tmp_path / "virus.skops"
    command = ("train", "--viral", viral.path, "--other", other.path, "--out", file)
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    assert f"comment: {RANDOM_WEIGHTS}\n" in done.stderr
    assert "viral         130 of 130 rows embedded; trained on 98, held out 32" in done.stdout
    assert "held out                  embeddings  composition alone" in done.stdout
    interval = r"\nAUROC, 95 % interval +0\.\d{3} to [01]\.\d{3} +0\.\d{3} to [01]\.\d{3}\nAUPRC"
    assert re.search(interval, done.stdout)
    assert done.stdout.endswith("virus.skops\n")
    done = invoke(*command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "exists" in done.stderr
    done = invoke(*command, "--force", "--json")
    report = json.loads(done.stdout)
    figures = report["embeddings"]
    assert figures["auroc_low"] <= figures["auroc"] <= figures["auroc_high"]
    assert report["comment"] == RANDOM_WEIGHTS
    assert report["classes"][0]["input_sha256"] == viral.identity.input_sha256
    about = load_classifier(file).about
    assert about["training"] == {name: value for name, value in report.items() if name != "out"}
    table = tmp_path / "t.tsv"
    done = invoke("predict", viral.path, "--classifier", file, "--out", table)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.startswith(f"note: {file.name} was trained on 98 of these 130 rows")
    assert done.stderr.endswith(f"comment: {RANDOM_WEIGHTS}\n")
    assert done.stdout.startswith("score_virus: 130 rows scored, ")
    assert f"5 chunks computed now\n130 rows in {table}\n" in done.stdout
    virnuc_dask.train(viral.path, other.path, file, random_state=3, force=True)
    again = ("predict", viral.path, "--classifier", file, "--out", table)
    for one, problem in (("--force", "by another classifier"), ("--replace", "t.tsv exists")):
        done = invoke(*again, one)
        assert (done.exit_code, problem in done.stderr) == (2, True)
    assert invoke(*again, "--force", "--replace").exit_code == 0
    done = invoke("predict", viral.path, "--classifier", tmp_path / "no.skops")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no.skops: cannot be read" in done.stderr


@pytest.mark.slow
def test_in_a_bucket(
    s3: Server, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    urls = [f"s3://{BUCKET}/{uuid4().hex}/{name}.zarr" for name in "vo"]
    for url, file in zip(urls, inputs, strict=True):
        settings = Settings(model="demo", repr_layer=0, rows_per_chunk=32)
        store, model = prepare(file, url, settings, lambda _event: None)
        for chunk in range(store.chunk_count):
            embed_chunk(url, chunk, store.identity, model)
    out = tmp_path / "bucket.skops"
    virnuc_dask.train(*urls, out)
    found = virnuc_dask.predict(urls[0], out, out=tmp_path / "t.tsv")
    assert (found.scored, found.computed_chunks, found.lines) == (130, 5, 130)
    assert virnuc_dask.predict(urls[0], out).computed_chunks == 0
    bucket._client.cache_clear()
