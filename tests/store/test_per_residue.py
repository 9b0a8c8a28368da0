"""Representations of single residues: their values, their ragged layout, and what happens to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Cli, Maker, tree
from models import random_network, random_sequences, save_network, upstream

import virnuc_dask
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.packing import cut_segments
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.settings import Status
from virnuc_dask.store import create, verify
from virnuc_dask.store.chunk_checks import check_chunk, check_sequences
from virnuc_dask.store.store import Store, residue_slots

ARRAYS = ("status", "residue_embedding", "embedding")


@pytest.fixture
def network(tmp_path: Path) -> Any:
    network = random_network(2, 64, 4)
    save_network(network, tmp_path / "model.pt")
    return network


def fasta(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">s{n}\n{s}\n" for n, s in enumerate(sequences)))
    return path


def written(store: Store) -> dict[str, bytes]:
    return {
        name: content
        for name, (_, _, content) in tree(store.path).items()
        if name.split("/")[0] in ARRAYS
    }


# --- values ---


def by_upstream(network: Any, sequence: str, starts: list[int], size: int) -> Any:
    """Mean over windows of what fair-esm says of each residue, shape (residues, D)."""
    total, seen = np.zeros((len(sequence), network.embed_dim)), np.zeros((len(sequence), 1))
    for start in starts:
        window = sequence[start : start + size]
        total[start : start + size] += upstream(network, [window])[0][1:-1]
        seen[start : start + size] += 1
    assert seen.all()
    return total / seen


@pytest.mark.parametrize("policy", ["truncate", "window", "skip"])
@pytest.mark.parametrize("pooling", ["mean", "bos", "max"])
@pytest.mark.sweep
def test_each_residue_is_as_upstreams(
    policy: str, pooling: str, network: Any, tmp_path: Path, make_store: Maker
) -> None:
    # 70: two windows of 50 that overlap in 30; 130: three, in the middle of which none is alone.
    sequences = ["MKT", *random_sequences([50, 70, 51, 1, 130]), "MKT*AYI", "", "MKTAY"]
    store = make_store(
        fasta(tmp_path / "some.faa", sequences),
        model=str(tmp_path / "model.pt"),
        repr_layer=None,
        rows_per_chunk=4,
        per_residue=True,
        long=policy,
        pooling=pooling,
        max_residues=50,
    )
    for row, sequence in enumerate(sequences):
        found = virnuc_dask.open_residues(store.path, row).values
        long = len(sequence) > 50
        if not sequence or (long and policy == "skip"):
            assert found.shape == (0, 64)
        elif "*" in sequence:
            assert found.shape == (7, 64)
            assert np.isnan(found).all()
        else:
            kept = sequence[:50] if policy == "truncate" else sequence
            segments = cut_segments(np.array([len(kept)], np.int32), 50, "window")
            expected = by_upstream(network, kept, segments.start.tolist(), 50)
            assert found.dtype == np.float16
            # Two roundings to float16 where windows overlap, else one.
            assert np.allclose(found, expected, rtol=2e-3, atol=2e-4)
    assert check_sequences(store) is None
    assert [check_chunk(store, chunk) for chunk in range(3)] == [None] * 3


@pytest.mark.slow
def test_pooled_rows_are_the_same_with_and_without(make_store: Maker) -> None:
    one = make_store(VIRAL_PROTEINS, "one.zarr", repr_layer=2)
    two = make_store(VIRAL_PROTEINS, "two.zarr", repr_layer=2, per_residue=True)
    for chunk in range(one.chunk_count):
        for without, given in zip(one.read_chunk(chunk), two.read_chunk(chunk), strict=True):
            assert np.array_equal(without, given, equal_nan=True)
    # And the mean of the single residues is the row's.
    row = virnuc_dask.open_residues(two.path, 5).astype("float32").mean("residue").values
    assert np.allclose(row, two.read_chunk(0)[1][5], rtol=1e-2, atol=1e-3)


def test_a_residue_that_float16_does_not_hold_quarantines_its_row(
    network: Any, tmp_path: Path, make_store: Maker
) -> None:
    with torch.no_grad():
        network.embed_tokens.weight[network.alphabet.get_idx("W")] = 1e5
    model = save_network(network, tmp_path / "model.pt")
    inputs = fasta(tmp_path / "some.faa", ["MKT", "MWT", "MKTAY"])
    plain = make_store(inputs, "plain.zarr", model=model)
    store = make_store(inputs, model=model, per_residue=True)
    assert plain.read_status(0).tolist() == [Status.EMBEDDED] * 3
    assert store.read_status(0).tolist() == [Status.EMBEDDED, Status.NON_FINITE, Status.EMBEDDED]
    assert check_chunk(store, 0) is None
    assert np.isnan(virnuc_dask.open_residues(store.path, 1).values).all()


@pytest.mark.gpu
def test_each_residue_is_as_upstreams_on_a_gpu(network: Any, tmp_path: Path) -> None:
    encoder = load_encoder(str(tmp_path / "model.pt"), "cuda", "float32")
    sequences = random_sequences([20, 50, 3])
    lengths = np.array([20, 50, 3], np.int32)
    residues = np.frombuffer("".join(sequences).encode(), np.uint8)
    segments = cut_segments(lengths, 50, "truncate")
    found = encoder.encode_segments(residues, segments, 3, per_residue=True).residues
    expected = np.concatenate([upstream(network, [s])[0][1:-1] for s in sequences])
    assert found is not None
    assert np.allclose(found, expected, rtol=2e-3, atol=2e-3)


# --- layout ---


def test_no_two_chunks_of_rows_share_a_chunk_of_slots() -> None:
    slots, total = residue_slots(np.array([3, 0, 4, 0, 0, 9, 1]), 2, 4)
    # rows 0-1: 3 residues, one chunk; 2-3: 4, one chunk; 4-5: 9, three chunks; 6: one chunk
    assert slots.tolist() == [0, 3, 4, 8, 8, 8, 20]
    assert total == 24


@pytest.fixture
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1,024 slots, so that small chunks of rows have several."""
    monkeypatch.setattr(create, "_RESIDUE_VALUES_PER_CHUNK", 1024 * 64)


@pytest.mark.usefixtures("small_slots")
@pytest.mark.slow
def test_each_task_writes_its_own_files_and_the_commit_last(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False, per_residue=True)
    whole = make_store(VIRAL_PROTEINS, "whole.zarr", per_residue=True)
    seen: set[str] = set()
    for chunk in range(store.chunk_count):
        status, embedding = whole.read_chunk(chunk)
        kept = whole.read_residue_embeddings(chunk)[
            : whole.read_rows(chunk)[0].clip(max=1022).sum()
        ]
        assert not store.is_present(chunk)
        store.write_chunk(chunk, status, embedding, kept)
        assert store.is_present(chunk)
        new = set(written(store)) - seen - {f"{array}/zarr.json" for array in ARRAYS}
        assert new == set(store.keys(chunk))
        assert len(store.keys(chunk)) > 4
        times = [(store.path / key).stat().st_mtime_ns for key in store.keys(chunk)]
        assert times == sorted(times)
        seen |= new
    assert store.present().all()
    assert written(store) == written(whole)
    assert store.keys(0)[-1].startswith("embedding/")


def test_an_unfinished_row_is_nan(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False, per_residue=True)
    found = virnuc_dask.open_residues(store.path, 3)
    assert found.dims == ("residue", "feature")
    assert len(found) == int(store.read_rows(0)[0][3].clip(max=1022))
    assert np.isnan(found.values).all()


def test_a_row_or_a_store_that_has_none_is_named(make_store: Maker) -> None:
    plain = make_store(VIRAL_PROTEINS, "plain.zarr", embed=False)
    with pytest.raises(UsageError, match="without per_residue"):
        virnuc_dask.open_residues(plain.path, 0)
    store = make_store(VIRAL_PROTEINS, embed=False, per_residue=True)
    for row in (-1, 300):
        with pytest.raises(IndexError, match="of 300"):
            virnuc_dask.open_residues(store.path, row)


# --- faults ---


@pytest.fixture
def store(small_slots: None, make_store: Maker) -> Store:
    """Ten chunks of rows, each with several chunks of slots."""
    store = make_store(VIRAL_PROTEINS, per_residue=True, max_residues=2000)
    assert store.chunk_count == 10
    assert all(len(store.keys(chunk)) > 4 for chunk in range(9))
    return store


@pytest.mark.parametrize("size", [None, 0, 5])
def test_a_lost_or_stunted_file_is_computed_again_and_no_other(
    size: int | None, store: Store, client: Any
) -> None:
    before, times = written(store), tree(store.path)
    file = store.path / store.keys(4)[1]
    assert file.parent.name == "residue_embedding"
    file.unlink() if size is None else file.write_bytes(file.read_bytes()[:size])
    assert np.flatnonzero(~store.present()).tolist() == [4]
    assert not store.is_present(4)
    assert list(verify.verify(store.path).bad) == [4]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert written(store) == before
    own = set(store.keys(4))
    after = tree(store.path)
    assert {name for name in after if after[name] != times[name]} <= own
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
    assert tree(store.path) == after


def test_a_flipped_bit_is_found_and_mended(store: Store, client: Any) -> None:
    before = written(store)
    file = store.path / store.keys(2)[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert store.present().all()
    report = verify.verify(store.path, repair=True)
    assert list(report.bad) == [2]
    assert np.flatnonzero(~store.present()).tolist() == [2]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert written(store) == before


def test_residues_that_do_not_agree_with_the_status_are_found(store: Store) -> None:
    status, embedding = store.read_chunk(1)
    residues = store.read_residue_embeddings(1)[: store.read_rows(1)[0].sum()]
    residues[7, 3] = np.nan
    store.write_chunk(1, status, embedding, residues)
    assert "do not agree with the status" in str(check_chunk(store, 1))


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_damaged_slots_are_an_error_and_nothing_is_overwritten(change: Any, store: Store) -> None:
    change(store.path / "residue_slot" / "c.0")
    before = tree(store.path)
    for use in (store.present, lambda: store.is_present(0), lambda: verify.verify(store.path)):
        with pytest.raises(StoreError, match="residue_slot"):
            use()
    assert tree(store.path) == before


def test_slots_of_another_store_are_found(store: Store, make_store: Maker) -> None:
    other = make_store(
        VIRAL_PROTEINS, "other.zarr", per_residue=True, embed=False, rows_per_chunk=16
    )
    file = Path("residue_slot") / "c.0"
    assert check_sequences(store) is None
    (store.path / file).write_bytes((other.path / file).read_bytes())
    assert "residue_slot" in str(check_sequences(store))


@pytest.mark.slow
def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    inputs = fasta(tmp_path / "some.faa", ["MKTAYIAKQR", "MKT"])
    done = cli("run", inputs, "out.zarr", "--model=demo", "--per-residue", "--workers", 1, "-q")
    assert done.returncode == 0, done.stderr
    assert virnuc_dask.open_residues(tmp_path / "out.zarr", 0).shape == (10, 64)
    refused = cli("run", inputs, "out.zarr", "--model=demo", "--workers", 1, "-q")
    assert refused.returncode == 2
    assert "per_residue" in refused.stderr
    planned = cli("plan", inputs, "--model=demo", "--per-residue", "--json")
    assert '"residue_embedding_bytes": 1664' in planned.stdout
