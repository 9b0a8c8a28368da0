"""Results of a store that is not complete say so, and give no verdict that may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Maker
from rows import read_tsv

import virnuc_dask
from virnuc_dask.analysis.classifier import load_classifier
from virnuc_dask.analysis.rows import pending_note, pending_rows
from virnuc_dask.cli.main import main
from virnuc_dask.settings import Tiling, Translation
from virnuc_dask.store.store import Store


def invoke(*arguments: object) -> Any:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.stderr
    return done


def halves(make_store: Maker, folder: Path, **settings: Any) -> tuple[Store, Store]:
    """Two stores, of the even and of the odd proteins."""
    records = [f">p{number}\n{letters}\n" for number, letters in enumerate(sequences())]
    stores = []
    for number, name in enumerate(("viral", "other")):
        (folder / f"{name}.faa").write_text("".join(records[number::2]))
        stores.append(make_store(folder / f"{name}.faa", f"{name}.zarr", **settings))
    return stores[0], stores[1]


def sequences() -> list[str]:
    random = np.random.default_rng(5)
    return ["".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), 40)) for _ in range(160)]


def test_every_command_says_how_many_rows_are_missing(make_store: Maker, tmp_path: Path) -> None:
    viral, other = halves(make_store, tmp_path)
    labels, file = tmp_path / "labels.tsv", tmp_path / "c.skops"
    labels.write_text("".join(f"p{number}\t{number % 3}\n" for number in range(160)))
    commands: dict[tuple[object, ...], str] = {
        ("nearest", viral.path, "--query", "p0"): "v",
        ("nearest", other.path, "--query", "p0", "--query-store", viral.path): "",
        ("nearest", viral.path, "--query-store", viral.path): "v",
        ("nearest", viral.path, "--query-store", other.path): "vo",
        ("annotate", viral.path, "--labels", labels): "v",
        ("annotate", viral.path, "--labels", labels, "--reference", other.path): "vo",
        ("annotate", viral.path, "--labels", labels, "--leave-one-out"): "v",
        ("map", viral.path, "--refit"): "v",
        ("cluster", viral.path, "--n-clusters", 2, "--refit"): "v",
        ("train", "--viral", viral.path, "--other", other.path, "--out", file, "--force"): "vo",
        ("predict", viral.path, "--classifier", file, "--replace"): "v",
    }
    notes = {
        "v": f"{viral.path}: 32 of 80 rows are not embedded yet",
        "o": f"{other.path}: 16 of 80 rows are not embedded yet",
    }
    for command in commands:
        assert "embedded yet" not in invoke(*command).stderr
    viral.remove_chunk(1)
    for command, stores in commands.items():
        said = invoke(*command).stderr
        assert said.count(notes["v"]) == ("v" in stores), command
        assert "16 of 80" not in said
    other.remove_chunk(2)
    for command, stores in commands.items():
        said = invoke(*command).stderr
        for store, note in notes.items():
            # The second one's own rows are searched where the first one's are queries by name.
            is_searched = command[:2] == ("nearest", other.path)
            assert said.count(note) == (store in stores or (store == "o" and is_searched)), command
    assert "note: " + notes["v"] in invoke("map", viral.path).stderr


def test_documents_have_the_number(make_store: Maker, tmp_path: Path) -> None:
    viral, other = halves(make_store, tmp_path)
    viral.remove_chunk(1)
    labels, file = tmp_path / "labels.tsv", tmp_path / "c.skops"
    labels.write_text("".join(f"p{number}\t{number % 3}\n" for number in range(160)))
    command: tuple[object, ...] = ("train", "--viral", viral.path, "--other", other.path)
    done = json.loads(invoke(*command, "--out", file, "--json").stdout)
    assert [each["pending"] for each in done["classes"]] == [32, 0]
    assert load_classifier(file).about["training"]["classes"] == done["classes"]
    command = ("annotate", viral.path, "--labels", labels, "--leave-one-out", "--json")
    assert json.loads(invoke(*command).stdout)["pending"] == 32
    done = json.loads(invoke("predict", viral.path, "--classifier", file, "--json").stdout)
    assert (done["pending"], done["notes"][0]) == (32, pending_note(viral))


def test_the_number_takes_a_listing_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.remove_chunk(9)
    store.remove_chunk(2)
    monkeypatch.setattr(Store, "_read", None)
    assert pending_rows(store) == 32 + 12
    assert pending_note(store) == f"{store.path}: 44 of 300 rows are not embedded yet"


@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_read_without_all_its_scores_has_no_verdict(
    is_tiled: bool, make_store: Maker, tmp_path: Path
) -> None:
    viral, other = halves(make_store, tmp_path)
    file, out = tmp_path / "c.skops", tmp_path / "reads.tsv"
    virnuc_dask.train(viral.path, other.path, file)
    how: dict[str, Any]
    letters, how = "ACGT", {"translation": Translation(frames="orf", min_residues=3)}
    if is_tiled:  # a protein has more tiles than a chunk has rows
        letters, how = "ACDEFGHIKL", {"tiling": Tiling(8, 7)}
    random, inputs = np.random.default_rng(3), tmp_path / "reads.fa"
    inputs.write_text(
        "".join(f">r{n}\n{''.join(random.choice(list(letters), 60))}\n" for n in range(9))
    )
    store = make_store(inputs, "reads.zarr", rows_per_chunk=4, **how)
    invoke("predict", store.path, "--classifier", file, "--consensus", "max", "--out", out)
    whole = {line["read_id"]: line for line in read_tsv(out.read_text())}
    kept = {chunk: store.read_chunk(chunk) for chunk in (1, 2, 5, store.chunk_count - 1)}
    reads = store.array("read")[:]
    missing = np.concatenate([np.arange(store.records)[store.rows(chunk)] for chunk in kept])
    names = store.array("read_id").oindex[np.unique(reads[missing])].tolist()
    assert np.isin(np.delete(reads, missing), reads[missing]).any()
    for chunk in kept:
        store.remove_chunk(chunk)
    command = ("predict", store.path, "--classifier", file, "--name", "later")
    command += ("--consensus", "max", "--out", out, "--force")
    said = invoke(*command).stderr
    assert (
        f"note: {pending_note(store)}\nnote: reads with such rows are not in the table yet" in said
    )
    assert {line["read_id"]: line for line in read_tsv(out.read_text())} == {
        name: line for name, line in whole.items() if name not in names
    }
    for chunk, content in kept.items():
        store.write_chunk(chunk, *content)
    assert "yet" not in invoke(*command).stderr
    assert {line["read_id"]: line for line in read_tsv(out.read_text())} == whole
