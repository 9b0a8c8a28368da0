"""ESM-2 in Hugging Face's layout, ``config.json`` and safetensors, as fair-esm's files have it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from virnuc_dask.upstream import fair_esm

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"

# Names within a layer, there and here.
_IN_LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.self.rotary_embeddings": "self_attn.rot_emb",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}
_OUTSIDE = {
    "embeddings.word_embeddings": "embed_tokens",
    "encoder.emb_layer_norm_after": "emb_layer_norm_after",
}
# One for all layers: as transformers 5 has it in memory and, by default, in files.
_FREQUENCIES = (
    "rotary_embeddings.inv_freq",
    "encoder.layer.*.attention.self.rotary_embeddings.inv_freq",
)
# What no embedding depends on.
_UNUSED = ("lm_head.", "contact_head.", "pooler.", "embeddings.position_")
# Values of `rope_parameters` and `rope_scaling` that change nothing.
_PLAIN_ROTATION = {"rope_theta": 10_000, "rope_type": "default", "type": "default"}


def is_huggingface(path: Path) -> bool:
    """Whether a path is a directory or a file in Hugging Face's layout."""
    return path.suffix == ".safetensors" or (path / "config.json").is_file()


def read_huggingface(path: Path) -> dict[str, Any]:
    """Read an ESM-2 from its directory, or from a ``.safetensors`` file with a ``config.json``.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        ``cfg`` and ``model`` as in fair-esm's files.

    Raises
    ------
    ValueError
        Not an ESM-2, or not one that fair-esm's module can express.
    OSError, safetensors.SafetensorError, KeyError
        Files that are missing or damaged.
    """
    folder = path if path.is_dir() else path.parent
    config = json.loads((folder / "config.json").read_text())
    _check(config, folder)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    tensors: dict[str, Tensor] = {}
    # Some files leave out what follows from the configuration. What a file has counts: published
    # frequencies are rounded to float16, and transformers uses what it finds, too.
    frequencies = _inverse_frequencies(config["hidden_size"] // heads)
    for file in [path] if path.is_file() else _files(folder):
        for name, tensor in load_file(file).items():
            if name.removeprefix("esm.") in _FREQUENCIES:
                frequencies = tensor
            elif renamed := _fair_esm_name(name):
                tensors[renamed] = tensor
    for layer in range(layers):
        tensors.setdefault(f"layers.{layer}.self_attn.rot_emb.inv_freq", frequencies)
    settings = argparse.Namespace(
        encoder_layers=layers,
        encoder_embed_dim=config["hidden_size"],
        encoder_attention_heads=heads,
        token_dropout=config["token_dropout"],
    )
    return {"cfg": {"model": settings}, "model": tensors | idle_head(tensors)}


def idle_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A language-model head, which fair-esm's module wants and nothing here uses."""
    embedding = tensors["embed_tokens.weight"]
    tokens, dimension = embedding.shape
    return {
        "lm_head.weight": embedding,
        "lm_head.bias": torch.zeros(tokens),
        "lm_head.dense.weight": torch.eye(dimension),
        "lm_head.dense.bias": torch.zeros(dimension),
        "lm_head.layer_norm.weight": torch.ones(dimension),
        "lm_head.layer_norm.bias": torch.zeros(dimension),
    }


def _check(config: dict[str, Any], folder: Path) -> None:
    """Refuse what would silently give other embeddings."""
    for name, expected in (
        ("model_type", "esm"),
        ("position_embedding_type", "rotary"),
        ("emb_layer_norm_before", False),
        ("is_folding_model", False),
        ("is_decoder", False),
        ("layer_norm_eps", 1e-5),
        ("rope_theta", 10_000),
        ("intermediate_size", 4 * config["hidden_size"]),
        ("vocab_size", 33),
    ):
        found = config.get(name, expected)
        if (found or False) != expected:
            raise ValueError(f"config.json has {name} {found!r}, an ESM-2 {expected!r}")
    if config["token_dropout"] and config.get("mask_token_id") not in (None, 32):
        raise ValueError("config.json has another mask_token_id than ESM-2's alphabet")
    for name in ("rope_parameters", "rope_scaling"):
        for key, value in (config.get(name) or {}).items():
            if _PLAIN_ROTATION.get(key) != value:
                raise ValueError(f"config.json has {name} {config[name]!r}, which ESM-2 has not")
    vocabulary = folder / "vocab.txt"
    alphabet, _ = fair_esm()
    letters = alphabet.from_architecture("ESM-1b").all_toks
    # The 32nd is a filler, and has another name there.
    if vocabulary.is_file() and vocabulary.read_text().split()[:31] != letters[:31]:
        raise ValueError("vocab.txt is not ESM-2's alphabet")


def _files(folder: Path) -> list[Path]:
    whole, index = folder / _WEIGHTS, folder / _INDEX
    # As transformers chooses: one of the two may be left there from what was saved before.
    if whole.is_file() or not index.is_file():
        return [whole]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{_INDEX} names files outside its directory")
    return [folder / name for name in names]


def _fair_esm_name(name: str) -> str | None:
    """The name in fair-esm's files; None for what is not needed."""
    short = name.removeprefix("esm.")
    if short.startswith(_UNUSED):
        return None
    # Newer files keep the names that TensorFlow gave a norm's two parts.
    module, _, kind = short.replace(".gamma", ".weight").replace(".beta", ".bias").rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    number, _, part = module.removeprefix("encoder.layer.").partition(".")
    if not module.startswith("encoder.layer.") or part not in _IN_LAYER:
        raise ValueError(f"a tensor that ESM-2 does not have: {name}")
    return f"layers.{int(number)}.{_IN_LAYER[part]}.{kind}"


def _inverse_frequencies(head: int) -> Tensor:
    # As fair-esm's module computes them.
    return 1.0 / (10_000 ** (torch.arange(0, head, 2).float() / head))
