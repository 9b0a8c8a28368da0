"""What comes from strangers is data: a store runs nothing, an identifier is no path and no code."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Maker, tree
from models import Malicious
from rows import NAMES

import virnuc_dask
from virnuc_dask.errors import StoreError, VirnucError
from virnuc_dask.store import status
from virnuc_dask.store.store import Store


def with_pickle_codec(store: Store, _bait: bytes) -> None:
    """An array that says it is to be unpickled."""
    file = store.path / "sequence_id" / "zarr.json"
    document = json.loads(file.read_text())
    document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"id": "pickle"}}]
    file.write_text(json.dumps(document))


def with_an_array_of_format_2(store: Store, _bait: bytes) -> None:
    """The format before this one had pickled objects in arrays."""
    (store.path / "sequence_id" / "zarr.json").unlink()
    document = {
        "zarr_format": 2,
        "shape": [7],
        "chunks": [7],
        "dtype": "|O",
        "fill_value": None,
        "order": "C",
        "compressor": None,
        "filters": [{"id": "pickle", "protocol": 5}],
    }
    (store.path / "sequence_id" / ".zarray").write_text(json.dumps(document))
    (store.path / "sequence_id" / "0").write_bytes((store.path / "sequence_id/c.0").read_bytes())


@pytest.mark.filterwarnings("ignore:Object at sequence_id is not recognized")
@pytest.mark.parametrize("tamper", [with_pickle_codec, with_an_array_of_format_2])
def test_a_strangers_store_runs_nothing(
    tamper: Any, make_store: Maker, awkward: Path, tmp_path: Path, client: Any
) -> None:
    store, canary = make_store(awkward), tmp_path / "canary"
    bait = pickle.dumps(Malicious(canary))
    for name in ("sequence_id/c.0", "status/c.0", "embedding/c.0.0", "residues/c.0"):
        (store.path / name).write_bytes(bait)
    tamper(store, bait)
    for use in (
        status.status,
        status.row_states,
        virnuc_dask.verify,
        lambda path: list(status.quarantined(path)),
        lambda path: virnuc_dask.open_store(path).compute(),
        lambda path: virnuc_dask.resume(path, client=client),
        lambda path: virnuc_dask.run(awkward, path, model="demo", client=client),
    ):
        # Most of them fail, each in its way; what counts is what they do not do.
        with suppress(VirnucError, ValueError, RuntimeError, KeyError, TypeError, OSError):
            use(store.path)
        assert not canary.exists(), use
    with pytest.raises((StoreError, ValueError, RuntimeError, KeyError)):
        list(status.quarantined(store.path))
    pickle.loads(bait)
    assert canary.exists()  # it would have sung


def test_identifiers_are_only_data(cli: Cli, tmp_path: Path) -> None:
    # A digit quarantines each, so that it is shown too.
    text = "".join(f">{name} and more\nMKT{number}\n" for number, name in enumerate(NAMES))
    inputs = tmp_path / "odd.faa"
    inputs.write_text(text)
    before = set(tmp_path.parent.rglob("*"))
    done = cli("run", inputs, "out.zarr", "--model=demo", "--repr-layer", 0, "--workers", 1)
    assert done.returncode == 3, done.stderr
    shown = cli("status", "--rows", "out.zarr")
    sampled = cli("verify", "out.zarr")
    for output in (done.stdout, done.stderr, shown.stdout, sampled.stdout):
        assert len(output) < 5_000
        assert "\x1b" not in output
        assert "\x07" not in output
    assert "/etc/passwd" in shown.stdout
    # Whole and as they were, for programs and in the store; and nowhere else.
    listed = json.loads(cli("status", "--rows", "--json", "out.zarr").stdout)["quarantined"]
    assert [row["id"] for row in listed] == list(NAMES)
    assert list(virnuc_dask.open_store(tmp_path / "out.zarr").sequence_id.values) == list(NAMES)
    store = Store(tmp_path / "out.zarr")
    made = {tmp_path / "out.zarr" / name for name in tree(store.path)}
    new = {file for file in tmp_path.parent.rglob("*") if file.is_file()} - before
    assert new == made | {tmp_path / "out.zarr.telemetry.jsonl"}
