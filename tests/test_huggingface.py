"""Weights from Hugging Face: the same model, bit for bit, as the same weights from fair-esm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from models import (
    random_network,
    random_sequences,
    relative_error,
    save_huggingface,
    save_network,
    upstream_mean,
)
from safetensors.torch import load_file, save_file

from virnuc_dask.encoder import load_encoder
from virnuc_dask.errors import ModelError, UsageError
from virnuc_dask.weights import load_checkpoint, weights_at_hand

SEQUENCES = random_sequences([1, 17, 60, 60, 200])


@pytest.fixture(scope="module")
def network() -> ESM2:
    return random_network(3, 64, 4)


@pytest.fixture
def folder(network: ESM2, tmp_path: Path) -> Path:
    return Path(save_huggingface(network, tmp_path / "hf"))


def test_a_directory_and_a_pt_file_are_the_same_model(
    network: ESM2, folder: Path, tmp_path: Path
) -> None:
    pt = save_network(network, tmp_path / "model.pt")
    expected = load_encoder(pt).encode(SEQUENCES)
    assert relative_error(expected, upstream_mean(network, SEQUENCES)) < 1e-5
    for reference in (folder, folder / "model.safetensors"):
        assert weights_at_hand(str(reference))
        encoder = load_encoder(str(reference))
        assert np.array_equal(encoder.encode(SEQUENCES), expected)
        # So a store that was made with one goes on with the other.
        assert encoder.spec.weights_sha256 == load_encoder(pt).spec.weights_sha256


def test_token_dropout_is_read(tmp_path: Path) -> None:
    network = random_network(2, 32, 2, token_dropout=False)
    found = load_encoder(save_huggingface(network, tmp_path / "hf")).encode(SEQUENCES)
    assert relative_error(found, upstream_mean(network, SEQUENCES)) < 1e-5


@pytest.mark.parametrize("change", ["bare", "without frequencies", "gamma and beta", "sharded"])
def test_the_layouts_there_are(change: str, folder: Path) -> None:
    expected = load_encoder(str(folder)).encode(SEQUENCES)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "bare":  # saved without the language-model head
        tensors = {n[4:]: t for n, t in tensors.items() if n.startswith("esm.")}
    elif change == "without frequencies":
        tensors = {n: t for n, t in tensors.items() if "inv_freq" not in n}
    elif change == "gamma and beta":
        tensors = {
            n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
            for n, t in tensors.items()
        }
    if change == "sharded":
        names = sorted(tensors)
        shards = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
        for shard in set(shards.values()):
            save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        file.unlink()
    else:
        assert tensors.keys() != load_file(file).keys()
        save_file(tensors, file)
    assert np.array_equal(load_encoder(str(folder)).encode(SEQUENCES), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "bert"),
        ("position_embedding_type", "absolute"),
        ("emb_layer_norm_before", True),
        ("is_folding_model", True),
        ("layer_norm_eps", 1e-12),
        ("intermediate_size", 100),
        ("vocab_size", 64),
        ("num_hidden_layers", 4),
        ("hidden_size", None),
    ],
)
def test_a_model_that_would_be_misread_is_refused(field: str, value: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ModelError, match=str(folder)):
        load_encoder(str(folder))


def test_another_alphabet_is_refused(folder: Path) -> None:
    tokens = Alphabet.from_architecture("ESM-1b").all_toks
    (folder / "vocab.txt").write_text("\n".join(tokens))
    load_checkpoint(str(folder))
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(ModelError, match="alphabet"):
        load_checkpoint(str(folder))


def test_a_file_is_not_to_blame_if_there_is_no_fair_esm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "esm.data", None)
    with pytest.raises(UsageError, match=r"^the module esm at "):
        load_checkpoint(str(folder))


def test_damaged_or_foreign_files_are_clear_errors(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="not an ESM-2 checkpoint, or damaged"):
            load_checkpoint(str(folder))
    save_file({"esm.encoder.layer.0.surprise.weight": torch.ones(2)}, file)
    with pytest.raises(ModelError, match=r"does not have: esm\.encoder\.layer\.0\.surprise"):
        load_checkpoint(str(folder))
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_checkpoint(str(folder))
    (tmp_path / "outside.safetensors").write_bytes(whole)
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its directory"):
        load_checkpoint(str(folder))
    with pytest.raises(ModelError, match="neither a file nor"):
        load_checkpoint(str(tmp_path / "nothing"))
