"""The task: what becomes of each row, and what a worker refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Maker, tree
from models import (
    random_network,
    random_sequences,
    relative_error,
    save_network,
    upstream,
    upstream_mean,
)

from virnuc_dask.encoder.encoder import Encoder, load_encoder
from virnuc_dask.encoder.network import Network
from virnuc_dask.encoder.weights import describe, load_checkpoint
from virnuc_dask.errors import IdentityMismatchError, ModelError
from virnuc_dask.runtime import embed
from virnuc_dask.runtime.embed import embed_chunk, embed_rows, get_encoder
from virnuc_dask.settings import Identity, Status


def identity(**changes: Any) -> Identity:
    plain = Identity(
        1, "", 0, "", 0, "mean", "float32", "float32", "", 1022, "truncate", 32, per_residue=False
    )
    return replace(plain, **changes)


def packed(sequences: list[str]) -> tuple[Any, Any]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    return lengths, np.frombuffer("".join(sequences).encode(), np.uint8)


def embedded(*arguments: Any) -> tuple[Any, Any]:
    rows = embed_rows(*arguments)
    return rows.status, rows.embedding


def test_every_row_gets_exactly_one_state() -> None:
    encoder = load_encoder("demo")
    sequences = ["MKTAYIAKQR", "", "MK1", "M" * 51, "M" * 60 + "*K", "A"]
    status, embedding = embedded(encoder, *packed(sequences), identity(max_residues=50))
    assert [Status(code).meaning for code in status] == [
        "embedded",
        "empty",
        "invalid_residues",
        "truncated",
        "invalid_residues",  # also where truncation would have hidden the stop
        "embedded",
    ]
    assert np.isfinite(embedding).all(axis=1).tolist() == [True, False, False, True, False, True]
    assert np.isnan(embedding[[1, 2, 4]]).all()
    expected = encoder.encode(["MKTAYIAKQR", "M" * 50, "A"])
    assert relative_error(embedding[[0, 3, 5]], expected) < 2e-6


def test_windows_are_a_mean_over_residues_each_counted_once(tmp_path: Path) -> None:
    network = random_network(2, 64, 4)
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"))
    sequences = random_sequences([40, 101, 260, 100, 1000])
    status, embedding = embedded(
        encoder, *packed(sequences), identity(max_residues=100, long="window")
    )
    assert [Status(code).meaning for code in status] == [
        "embedded",
        "windowed",
        "windowed",
        "embedded",
        "windowed",
    ]
    for sequence, row in zip(sequences, embedding, strict=True):
        assert relative_error(row[None], windowed_mean(network, sequence, 100)[None]) < 1e-4


def windowed_mean(network: Any, sequence: str, size: int) -> Any:
    """Average what all windows say of each residue, then average over the residues."""
    count = 1 if len(sequence) <= size else -(-(len(sequence) - size // 4) // (size - size // 4))
    size = min(size, len(sequence))
    starts = [k * (len(sequence) - size) // max(count - 1, 1) for k in range(count)]
    total = np.zeros((len(sequence), network.embed_dim))
    seen = np.zeros(len(sequence))
    for start in starts:
        tokens = upstream(network, [sequence[start : start + size]])[0]
        total[start : start + size] += tokens[1:-1]
        seen[start : start + size] += 1
    assert (seen > 0).all()
    return (total / seen[:, None]).mean(0)


@pytest.mark.parametrize("pooling", ["max", "bos"])
def test_windows_are_pooled_by_maximum_or_mean_of_bos(pooling: str, tmp_path: Path) -> None:
    network = random_network(2, 64, 4)
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"), pooling=pooling)
    (sequence,) = random_sequences([150])
    rows = embedded(
        encoder, *packed([sequence]), identity(max_residues=100, long="window", pooling=pooling)
    )[1]
    windows = [upstream(network, [sequence[start : start + 100]])[0] for start in (0, 50)]
    if pooling == "max":
        expected = np.maximum(windows[0][1:-1].max(0), windows[1][1:-1].max(0))
    else:
        expected = (windows[0][0] + windows[1][0]) / 2
    assert relative_error(rows, expected[None]) < 1e-4


def test_long_rows_are_skipped_on_request() -> None:
    status, embedding = embedded(
        load_encoder("demo"), *packed(["MKT", "M" * 51]), identity(max_residues=50, long="skip")
    )
    assert status.tolist() == [Status.EMBEDDED, Status.TOO_LONG]
    assert np.isnan(embedding[1]).all()


def test_what_overflows_the_stored_type_is_quarantined(tmp_path: Path) -> None:
    network = random_network(2, 64, 4)
    with torch.no_grad():
        network.emb_layer_norm_after.weight.mul_(1e6)
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"))
    sequences = packed(["MKTAYIAKQR", ""])
    status, embedding = embedded(encoder, *sequences, identity(dtype="float16"))
    assert status.tolist() == [Status.NON_FINITE, Status.EMPTY]
    assert np.isnan(embedding).all()
    status, _ = embedded(encoder, *sequences, identity(dtype="float32"))
    assert status.tolist() == [Status.EMBEDDED, Status.EMPTY]


@pytest.mark.parametrize("pooling", ["mean", "max", "bos"])
def test_a_model_that_yields_nan_quarantines_the_row(pooling: str, tmp_path: Path) -> None:
    network = random_network(2, 64, 4)
    with torch.no_grad():
        network.embed_tokens.weight[network.alphabet.get_idx("W")] = float("nan")
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"), pooling=pooling)
    sequences = ["MKT", "MWT", "MKTAY"]
    status, embedding = embedded(encoder, *packed(sequences), identity(pooling=pooling))
    assert status.tolist() == [Status.EMBEDDED, Status.NON_FINITE, Status.EMBEDDED]
    if pooling == "mean":
        clean = upstream_mean(network, ["MKT", "MKTAY"])
        assert relative_error(embedding[[0, 2]], clean) < 1e-4


def test_a_present_chunk_is_left_alone(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    before = tree(store.path)
    model = describe(load_checkpoint("demo"), repr_layer=0)
    report = embed_chunk(str(store.path), 0, store.identity, model)
    assert (report.computed, report.counts, report.rows) == (False, {}, 32)
    assert tree(store.path) == before


def test_a_store_that_was_replaced_meanwhile_is_refused(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    model = describe(load_checkpoint("demo"), repr_layer=0)
    other = replace(store.identity, input_sha256="0" * 64)
    with pytest.raises(IdentityMismatchError, match="input_sha256"):
        embed_chunk(str(store.path), 0, other, model)
    assert not store.touched()[0]


def test_other_weights_than_the_stores_are_refused() -> None:
    spec = describe(load_checkpoint("demo"))
    with pytest.raises(ModelError, match="this worker has weights"):
        get_encoder(replace(spec, weights_sha256="0" * 64))


def test_a_process_loads_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(
        embed, "load_checkpoint", lambda name: loads.append(name) or load_checkpoint(name)
    )
    monkeypatch.setattr(embed, "_loaded", {})
    spec = describe(load_checkpoint("demo"))
    with ThreadPoolExecutor(8) as pool:
        encoders = list(pool.map(lambda _: get_encoder(spec), range(8)))
    assert loads == ["demo"]
    assert len({id(encoder) for encoder in encoders}) == 1


# --- rows that raise ---

IDENTITY = Identity(
    1, "", 0, "", 0, "mean", "float32", "float32", "", 100, "window", 32, per_residue=True
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_network(random_network(2, 64, 4), tmp_path / "model.pt")


@pytest.fixture
def tryptophan() -> int:
    return int(random_network(1, 8, 2).alphabet.get_idx("W"))


# W stands for whatever makes an encoder raise; 130 residues are two windows.
CLEAN = [s.replace("W", "A") for s in random_sequences([30, 5, 130, 60, 30, 1, 77, 12])]
POISONED = [*CLEAN[:3], "MWT", *CLEAN[3:6], "", CLEAN[6][:50] + "W" + CLEAN[7] * 9, CLEAN[7]]
GUILTY = [3, 8]


def test_rows_that_raise_are_quarantined_and_no_others(
    model: str, tryptophan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Network._forward
    raised = 0

    def poisonous(self: Network, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal raised
        if (tokens == tryptophan).any():
            raised += 1
            raise RuntimeError("no kernel for this")
        return forward(self, tokens, *rest)

    expected = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert (expected.status[GUILTY] < Status.INVALID_RESIDUES).all()
    monkeypatch.setattr(Network, "_forward", poisonous)
    found = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert raised >= 4
    assert np.flatnonzero(found.status == Status.ENCODER_ERROR).tolist() == GUILTY
    others = np.setdiff1d(np.arange(len(POISONED)), GUILTY)
    assert np.array_equal(found.status[others], expected.status[others])
    assert np.array_equal(found.embedding[others], expected.embedding[others], equal_nan=True)
    assert np.isnan(found.embedding[GUILTY]).all()
    assert found.residues is not None
    assert expected.residues is not None
    guilty = np.isin(np.repeat(np.arange(len(POISONED)), packed(POISONED)[0]), GUILTY)
    assert np.array_equal(found.residues[~guilty], expected.residues[~guilty])
    assert np.isnan(found.residues[guilty]).all()


@pytest.mark.parametrize(
    "error", [RuntimeError("no such operator"), RuntimeError("CUDA error: device-side assert")]
)
def test_an_encoder_that_raises_for_anything_blames_no_row(
    error: Exception, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def broken(*_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr(Network, "_forward", broken)
    with pytest.raises(RuntimeError, match=str(error)):
        embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    assert calls <= 2


def test_a_row_that_is_no_number_is_computed_again_in_float32(
    model: str, tryptophan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_loaded", {})
    encoder = load_encoder(model, precision="bfloat16")
    identity = replace(IDENTITY, precision="bfloat16")
    usual = embed_rows(encoder, *packed(POISONED), identity)
    exact = embed_rows(load_encoder(model), *packed(POISONED), IDENTITY)
    overflow_where(encoder, tryptophan, monkeypatch)
    found = embed_rows(encoder, *packed(POISONED), identity)
    assert np.array_equal(found.status, usual.status)
    others = np.setdiff1d(np.arange(len(POISONED)), GUILTY)
    assert np.array_equal(found.embedding[others], usual.embedding[others], equal_nan=True)
    assert np.array_equal(found.embedding[GUILTY], exact.embedding[GUILTY])
    assert not np.array_equal(usual.embedding[GUILTY], exact.embedding[GUILTY])
    assert found.residues is not None
    assert np.isfinite(found.residues).all()
    # The float32 twin is kept beside the model, and another model replaces both.
    assert [spec.precision for spec, _ in embed._loaded] == ["float32"]
    embed.get_encoder(encoder.spec)
    assert [spec.precision for spec, _ in embed._loaded] == ["bfloat16"]
    embed.get_encoder(replace(encoder.spec, precision="float32"))
    assert len(embed._loaded) == 2


def overflow_where(encoder: Encoder, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for float16, which only a GPU has: sequences with a token overflow."""
    represent = encoder._network.represent

    def overflowing(residues: Any, starts: Any, runs: Any) -> torch.Tensor:
        hidden = represent(residues, starts, runs)
        first = 0
        lengths = [length for count, length in runs for _ in range(count)]
        for start, length in zip(starts, lengths, strict=True):
            if ord("W") in residues[start : start + length]:
                hidden[first : first + length + 2] = torch.inf
            first += length + 2
        return hidden

    monkeypatch.setattr(encoder._network, "represent", overflowing)
