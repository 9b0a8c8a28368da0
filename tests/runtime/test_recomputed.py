"""Rows computed again, alone and in float32: what a sample finds that no checksum can."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from conftest import VIRAL_PROTEINS, Cli, Maker, tree
from models import random_network, random_sequences, save_network
from xopen import xopen

from virnuc_dask.errors import ModelError, UsageError
from virnuc_dask.runtime import embed
from virnuc_dask.runtime.recomputed import Comparison, compare_recomputed
from virnuc_dask.store import verify


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 96 viral proteins: each is encoded alone, which takes its time."""
    path = tmp_path_factory.mktemp("some") / "proteins.faa"
    with xopen(VIRAL_PROTEINS) as text:
        records = list(islice(SimpleFastaParser(text), 96))
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


@pytest.mark.parametrize(("long", "dtype"), [("truncate", "float32"), ("window", "float16")])
@pytest.mark.slow
def test_a_good_store_shows_rounding_only(
    long: str, dtype: str, some: Path, make_store: Maker
) -> None:
    store = make_store(some, repr_layer=None, max_residues=300, long=long, dtype=dtype)
    assert (store.lengths() > 300).any()
    before = tree(store.path)
    drift = compare_recomputed(store.path, 1000, seed=1)
    assert (drift.rows, drift.good) == (96, True)
    assert drift.cosine > 0.999999
    largest = np.abs(np.concatenate([store.read_chunk(c)[1] for c in range(3)])).max()
    assert drift.largest < largest * (1e-5 if dtype == "float32" else 1e-3)
    assert tree(store.path) == before


@pytest.mark.slow
def test_the_drift_of_a_precision_is_measured(
    tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_loaded", {})
    model = save_network(random_network(3, 160, 10), tmp_path / "model.pt")
    # Short and few: most processors only imitate bfloat16.
    inputs = tmp_path / "some.faa"
    sequences = random_sequences(list(range(20, 60)))
    inputs.write_text("".join(f">{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    store = make_store(inputs, model=model, repr_layer=None, precision="bfloat16")
    drift = compare_recomputed(store.path, 20, seed=1)
    assert (drift.rows, drift.good, drift.precision) == (20, True, "bfloat16")
    assert 0.999 < drift.cosine < 1 - 1e-9
    assert drift.largest > 1e-4
    assert drift == compare_recomputed(store.path, 20, seed=1)
    assert drift != compare_recomputed(store.path, 20, seed=2)


@pytest.mark.parametrize(
    ("precision", "good"),
    [("float32", False), ("float16", False), ("bfloat16", True), ("int8", True)],
)
def test_what_a_precision_rounds_by_itself_is_no_drift(precision: str, good: bool) -> None:
    assert Comparison(1, 0.1, 0.9978, 0, "a", precision).good == good
    assert not Comparison(1, 0.1, 0.99, 0, "a", precision).good


@pytest.mark.slow
def test_a_chunk_in_the_place_of_another_is_found(some: Path, make_store: Maker, cli: Cli) -> None:
    store = make_store(some, repr_layer=None)
    files = store.path / "embedding"
    shutil.copyfile(files / "c.1.0", files / "c.2.0")
    assert verify.verify(store.path).exit_code == 0  # nothing is damaged: only a sample tells
    drift = compare_recomputed(store.path, 96)
    assert not drift.good
    assert store.rows(2).start <= drift.worst_row < store.rows(2).stop
    assert drift.worst_id == store.read_ids(2)[drift.worst_row - store.rows(2).start]
    done = cli("verify", store.path, "--sample", 96)
    assert done.returncode == 4
    assert "these embeddings do not belong to the sequences" in done.stdout


def test_quarantined_rows_are_never_sampled(awkward: Path, make_store: Maker) -> None:
    store = make_store(awkward, repr_layer=None, rows_per_chunk=2)
    drift = compare_recomputed(store.path, 7)
    assert (drift.rows, drift.good) == (4, True)  # of seven, three are quarantined


def test_a_store_without_a_row_is_refused(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    with pytest.raises(UsageError, match="no row has an embedding"):
        compare_recomputed(store.path, 5)


def test_other_weights_are_refused(tmp_path: Path, make_store: Maker) -> None:
    model = save_network(random_network(1, 64, 4), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="this worker has weights"):
        compare_recomputed(make_store(VIRAL_PROTEINS).path, 5, model=model)


@pytest.mark.slow
def test_the_command_line_says_what_it_measured(
    some: Path, make_store: Maker, cli_here: Cli
) -> None:
    store = make_store(some, repr_layer=None)
    done = cli_here("verify", store.path, "--sample", 5, "--seed", 1)
    assert done.returncode == 0
    assert "5 rows computed again in float32" in done.stdout
    document = json.loads(cli_here("verify", store.path, "--sample", 5, "--json").stdout)
    assert document["drift"]["good"]
    assert document["exit_code"] == 0
    # What is damaged comes first.
    (store.path / "embedding" / "c.2.0").write_bytes(b"not a chunk, and long enough")
    done = cli_here("verify", store.path, "--sample", 5)
    assert done.returncode == 4
    assert "because the store is damaged" in done.stdout
