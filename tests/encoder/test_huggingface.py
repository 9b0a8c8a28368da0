"""Weights from Hugging Face: the same model, bit for bit, as the same weights from fair-esm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
    transformers_mean,
    upstream_mean,
)
from safetensors.torch import load, save_file

import virnuc_dask
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.weight_files import weights_at_hand
from virnuc_dask.encoder.weights import load_checkpoint
from virnuc_dask.errors import ModelError, UsageError

SEQUENCES = random_sequences([1, 17, 60, 60, 200])


@pytest.fixture(scope="module")
def network() -> ESM2:
    return random_network(3, 64, 4)


@pytest.fixture
def folder(network: ESM2, tmp_path: Path) -> Path:
    return Path(save_huggingface(network, tmp_path / "hf"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_token_dropout_is_read(tmp_path: Path) -> None:
    network = random_network(2, 32, 2, token_dropout=False)
    found = load_encoder(save_huggingface(network, tmp_path / "hf")).encode(SEQUENCES)
    assert relative_error(found, upstream_mean(network, SEQUENCES)) < 1e-5


@pytest.mark.parametrize("change", ["bare", "without frequencies", "gamma and beta", "sharded"])
@pytest.mark.sweep
def test_the_layouts_there_are(change: str, folder: Path) -> None:
    expected = load_encoder(str(folder)).encode(SEQUENCES)
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
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
        assert tensors.keys() != load(file.read_bytes()).keys()
        save_file(tensors, file)
    assert np.array_equal(load_encoder(str(folder)).encode(SEQUENCES), expected)


@pytest.fixture(scope="module")
def rounded() -> ESM2:
    """With frequencies as published weights have them, rounded to float16."""
    network = random_network(3, 64, 4)
    for layer in network.layers:
        layer.self_attn.rot_emb.inv_freq.copy_(layer.self_attn.rot_emb.inv_freq.half())
    return network


# What `save_pretrained` writes into config.json, beside what `save_huggingface` does.
FIELDS_4 = {"dtype": "float32", "esmfold_config": None, "use_cache": True, "vocab_list": None}
FIELDS_5 = FIELDS_4 | {"add_cross_attention": False, "is_decoder": False}
IN_LAYER = "encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"


@pytest.mark.parametrize(
    ("norm", "frequencies", "fields"),
    [
        pytest.param(("weight", "bias"), None, FIELDS_4, id="4.57"),
        pytest.param(("gamma", "beta"), None, FIELDS_5, id="5.0"),
        pytest.param(
            ("gamma", "beta"), IN_LAYER.format("*"), FIELDS_5 | {"rope_theta": 10_000.0}, id="5.10"
        ),
        pytest.param(
            ("weight", "bias"),
            "rotary_embeddings.inv_freq",
            FIELDS_5 | {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
            id="5.10, not in the original format",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "esm."])
@pytest.mark.sweep
def test_what_transformers_has_saved_is_the_same_model(
    norm: tuple[str, str],
    frequencies: str | None,
    fields: dict[str, object],
    prefix: str,
    rounded: ESM2,
    tmp_path: Path,
) -> None:
    folder = Path(save_huggingface(rounded, tmp_path / "hf"))
    tensors = {
        name.replace("esm.", prefix)
        .replace("LayerNorm.weight", f"LayerNorm.{norm[0]}")
        .replace("LayerNorm.bias", f"LayerNorm.{norm[1]}"): tensor
        for name, tensor in load((folder / "model.safetensors").read_bytes()).items()
    }
    if not prefix:  # saved without the language-model head, and with a pooling layer
        tensors = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
        tensors["pooler.dense.weight"] = torch.ones(64, 64)
    if frequencies:
        shared = [tensors.pop(prefix + IN_LAYER.format(layer)) for layer in range(3)]
        tensors[prefix + frequencies] = shared[0]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    encoder = load_encoder(str(folder))
    expected = load_encoder(save_network(rounded, tmp_path / "model.pt"))
    assert encoder.spec.weights_sha256 == expected.spec.weights_sha256
    assert np.array_equal(encoder.encode(SEQUENCES), expected.encode(SEQUENCES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "EsmModel", "EsmModel without pooling"])
@pytest.mark.slow
def test_what_the_transformers_that_is_here_saves_is_read(
    kind: str, dtype: torch.dtype, rounded: ESM2, tmp_path: Path
) -> None:
    import transformers

    published = save_huggingface(rounded, tmp_path / "published")
    name, _, bare = kind.partition(" ")
    options = {"add_pooling_layer": False} if bare else {}
    network = getattr(transformers, name).from_pretrained(published, **options).to(dtype)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    network.save_pretrained(whole)
    network.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    esm = transformers.EsmModel.from_pretrained(whole, dtype=torch.float32).eval()
    expected = transformers_mean(esm, SEQUENCES)
    encoders = [load_encoder(str(p)) for p in (whole, sharded, whole / "model.safetensors")]
    for encoder in encoders:
        assert relative_error(encoder.encode(SEQUENCES), expected) < 1e-5
        assert encoder.spec.weights_sha256 == encoders[0].spec.weights_sha256
    if dtype == torch.float32:
        pt = load_encoder(save_network(rounded, tmp_path / "model.pt"))
        assert encoders[0].spec.weights_sha256 == pt.spec.weights_sha256


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "kind", ["EsmForSequenceClassification", "EsmForTokenClassification", "EsmForMaskedLM"]
)
@pytest.mark.slow
def test_a_fine_tuned_model_is_read_without_its_head(
    kind: str, shards: int, file: str, rounded: ESM2, tmp_path: Path
) -> None:
    import transformers

    published = save_huggingface(rounded, tmp_path / "published")
    network = getattr(transformers, kind).from_pretrained(published)
    with torch.no_grad():
        for parameter in network.esm.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "saved")
    _save_as(tmp_path / "saved", file, shards)
    esm = transformers.EsmModel.from_pretrained(tmp_path / "saved").eval()
    expected = transformers_mean(esm, SEQUENCES)
    encoder = load_encoder(str(tmp_path / "saved"))
    assert relative_error(encoder.encode(SEQUENCES), expected) < 1e-5
    heads = {name.split(".")[0] for name in load_checkpoint(str(tmp_path / "saved")).left_out}
    assert heads == (set() if kind == "EsmForMaskedLM" else {"classifier"})
    if shards == 1:
        one = load_encoder(str(tmp_path / "saved" / file))
        assert one.spec.weights_sha256 == encoder.spec.weights_sha256


def _save_as(folder: Path, file: str, shards: int) -> None:
    """What `save_pretrained` wrote, as its older versions would, or in several files."""
    tensors = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    stem, _, suffix = file.partition(".")

    def save(found: dict[str, torch.Tensor], name: str) -> None:
        if suffix == "bin":
            torch.save(found, folder / name)
        else:
            save_file(found, folder / name)

    if shards == 1:
        save(tensors, file)
        return
    where = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = dict(list(tensors.items())[number::shards])
        save(part, name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{file}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.slow
def test_a_vocabulary_may_be_padded_to_a_round_number(
    multiple: int, rounded: ESM2, tmp_path: Path
) -> None:
    import transformers

    published = save_huggingface(rounded, tmp_path / "published")
    network = transformers.EsmForMaskedLM.from_pretrained(published)
    network.resize_token_embeddings(33, pad_to_multiple_of=multiple)
    network.save_pretrained(tmp_path / "padded")
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] > 33
    padded, plain = load_encoder(str(tmp_path / "padded")), load_encoder(published)
    assert padded.spec.weights_sha256 == plain.spec.weights_sha256
    assert np.array_equal(padded.encode(SEQUENCES), plain.encode(SEQUENCES))


def test_a_trunk_within_another_module_is_found(folder: Path) -> None:
    expected = load_encoder(str(folder)).encode(SEQUENCES)
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
    own = {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}
    save_file(own | {"module.regressor.weight": torch.ones(3)}, file)
    assert np.array_equal(load_encoder(str(folder)).encode(SEQUENCES), expected)
    assert load_checkpoint(str(folder)).left_out == ("module.regressor.weight",)
    two = {f"other.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | two, file)
    with pytest.raises(ModelError, match=r"2 tensors embeddings\.word_embeddings\.weight, not one"):
        load_checkpoint(str(folder))
    save_file({"classifier.weight": torch.ones(3)}, file)
    with pytest.raises(ModelError, match=r"it has 0 tensors .*; the first are classifier\.weight"):
        load_checkpoint(str(folder))


def test_what_is_missing_is_said_before_any_work(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
    few = {name: t for name, t in tensors.items() if not name.startswith("esm.encoder.layer.2.")}
    save_file(few, file)
    with pytest.raises(ModelError, match=r"lacks 16 tensor\(s\) .* as layers\.2\.f.*; it has"):
        load_checkpoint(str(folder))
    wide = tensors | {"esm.encoder.layer.1.output.dense.bias": torch.ones(65)}
    save_file(wide, file)
    with pytest.raises(
        ModelError, match=r"layers\.1\.fc2\.bias has the shape \(65,\), not \(64,\)"
    ):
        load_checkpoint(str(folder))


@pytest.mark.slow
def test_files_may_be_links_as_in_hugging_faces_cache(
    folder: Path, tmp_path: Path, client: Any
) -> None:
    expected = load_encoder(str(folder)).encode(SEQUENCES)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(folder.iterdir()):
        (snapshot / file.name).symlink_to(file.rename(tmp_path / f"blob{number}"))
    inputs = tmp_path / "in.faa"
    inputs.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(SEQUENCES)))
    for number, model in enumerate((snapshot, snapshot / "model.safetensors")):
        store = tmp_path / f"{number}.zarr"
        assert virnuc_dask.run(inputs, store, model=str(model), client=client).exit_code == 0
        assert relative_error(virnuc_dask.open_store(store).embedding.values, expected) < 1e-6


def test_a_whole_file_goes_before_shards_as_in_transformers(folder: Path) -> None:
    """An earlier `save_pretrained` leaves its index there, without the shards."""
    expected = load_encoder(str(folder)).encode(SEQUENCES)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
        ("vocab_size", 32),
        ("vocab_size", 446),
        ("num_hidden_layers", 4),
        ("hidden_size", None),
        ("rope_theta", 20_000.0),
        ("rope_parameters", {"rope_theta": 20_000.0, "rope_type": "default"}),
        ("rope_parameters", {"full_attention": {"rope_theta": 20_000.0}}),
        ("rope_parameters", {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("is_decoder", True),
        ("mask_token_id", 4),
    ],
)
def test_a_model_that_would_be_misread_is_refused(field: str, value: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    expected = {"num_hidden_layers": "lacks 16", "hidden_size": "damaged"}.get(field, field)
    with pytest.raises(ModelError, match=expected) as caught:
        load_checkpoint(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("field", ["position_embedding_type", "layer_norm_eps"])
def test_what_has_another_default_in_transformers_must_be_said(field: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{field} None"):
        load_checkpoint(str(folder))


def test_a_file_that_does_not_exist_is_no_other_file(folder: Path) -> None:
    for name in ("merged.safetensors", "best.bin"):
        with pytest.raises(ModelError, match="neither a file nor"):
            load_checkpoint(str(folder / name))


def test_a_file_whose_directory_is_wanted_says_so(folder: Path, tmp_path: Path) -> None:
    alone = (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    for file in (alone, index):
        with pytest.raises(ModelError, match=r"give the directory, with its config\.json"):
            load_checkpoint(str(file))


def test_names_from_strangers_do_not_reach_the_terminal_as_they_are(folder: Path) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    save_file(tensors | {"esm.\x1b[2Jevil": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"a tensor that ESM-2 does not have: .\[2Jevil"):
        load_checkpoint(str(folder))


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
    whole, tensors = file.read_bytes(), load(file.read_bytes())
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="not an ESM-2 checkpoint, or damaged"):
            load_checkpoint(str(folder))
    surprise = {"esm.encoder.layer.0.surprise.weight": torch.ones(2)}
    save_file(tensors | surprise, file)
    with pytest.raises(ModelError, match=r"does not have: encoder\.layer\.0\.surprise"):
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
