"""Converts ESM-2 from Hugging Face's layout, ``config.json`` and weights, to fair-esm's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from virnuc_dask.encoder.fair_esm import fair_esm
from virnuc_dask.encoder.weight_files import huggingface_weights

# Tokens of ESM-2's alphabet. A fine-tuned model may have more, to reach a multiple of 8 to 128.
TOKENS, _MOST_TOKENS = 33, 128

# Names within a layer: Hugging Face's, then fair-esm's.
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
# One tensor for all layers: transformers 5 has it in memory and, by default, in files.
_FREQUENCIES = (
    "rotary_embeddings.inv_freq",
    "encoder.layer.*.attention.self.rotary_embeddings.inv_freq",
)
# Prefixes of the trunk's tensors that no embedding depends on, then of all the trunk's tensors.
UNUSED = ("contact_head.", "pooler.", "embeddings.position_")
_TRUNK = ("embeddings.", "encoder.", "rotary_embeddings.", *UNUSED)
_WORDS = "embeddings.word_embeddings.weight"
EMBEDDING = "embed_tokens.weight"
# Values of `rope_parameters` and `rope_scaling` that change nothing.
_PLAIN_ROTATION = {"rope_theta": 10_000, "rope_type": "default", "type": "default"}


def read_huggingface(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read an ESM-2 from a directory, or from a file of weights beside its ``config.json``.

    Parameters
    ----------
    path : Path

    Returns
    -------
    data : dict
        ``cfg`` and ``model`` as in fair-esm's files.
    left_out : tuple of str
        Tensors outside ESM-2, such as a classifier's.

    Raises
    ------
    ValueError
        The model is not an ESM-2, or fair-esm's module cannot express it.
    OSError, safetensors.SafetensorError, KeyError
        Files are missing or damaged.
    """
    folder = path if path.is_dir() else path.parent
    config = json.loads((folder / "config.json").read_text())
    _check(config, folder)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    stored: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else huggingface_weights(folder):
        stored |= read_tensors(file)
    prefix = _prefix(stored)
    tensors: dict[str, Tensor] = {}
    # Some files leave out the frequencies, because they follow from the configuration. Those in a
    # file take precedence, as in transformers: published ones are rounded to float16.
    frequencies = _inverse_frequencies(config["hidden_size"] // heads)
    left_out, around = [], prefix.removesuffix("esm.")
    for name, tensor in stored.items():
        short = name.removeprefix(prefix)
        is_own = name.startswith(prefix) and short.startswith(_TRUNK)
        # If ESM-2's own tensors have a prefix, every tensor with that prefix must be known.
        if not (is_own or (prefix != around and name.startswith(prefix))):
            left_out.append(name.removeprefix(around))
        elif short in _FREQUENCIES:
            frequencies = tensor
        elif renamed := fair_esm_name(short):
            tensors[renamed] = tensor
    embedding = tensors[EMBEDDING]
    if len(embedding) != config["vocab_size"]:
        raise ValueError(f"it has {len(embedding)} tokens, not vocab_size {config['vocab_size']}")
    tensors[EMBEDDING] = embedding[:TOKENS]
    for layer in range(layers):
        tensors.setdefault(f"layers.{layer}.self_attn.rot_emb.inv_freq", frequencies)
    settings = argparse.Namespace(
        encoder_layers=layers,
        encoder_embed_dim=config["hidden_size"],
        encoder_attention_heads=heads,
        token_dropout=config["token_dropout"],
    )
    # Any ESM-2 may have or lack parts of its own language-model head.
    others = tuple(sorted(name for name in left_out if not name.startswith("lm_head.")))
    return {"cfg": {"model": settings}, "model": tensors}, others


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by name. No code from the file is run."""
    if file.suffix == ".safetensors":
        return load_file(file)
    tensors = torch_load(file)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file.name} holds more than tensors")
    return tensors


def torch_load(file: Path) -> Any:
    """Load a file saved by torch, memory-mapped if its format allows it. No code is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files of torch before 1.6 cannot be mapped
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _prefix(names: Iterable[str]) -> str:
    """Prefix of the names of ESM-2's own tensors: empty, ``esm.`` or longer."""
    prefixes = [name.removesuffix(_WORDS) for name in names if name.endswith(_WORDS)]
    if len(prefixes) != 1:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(f"it has {len(prefixes)} tensors {_WORDS}, not one; the first are {some}")
    return prefixes[0]


def _check(config: dict[str, Any], folder: Path) -> None:
    """Refuse settings that would silently give other embeddings."""
    for name, expected in (
        ("model_type", "esm"),
        ("position_embedding_type", "rotary"),
        ("emb_layer_norm_before", False),
        ("is_folding_model", False),
        ("is_decoder", False),
        ("layer_norm_eps", 1e-5),
        ("rope_theta", 10_000),
        ("intermediate_size", 4 * config["hidden_size"]),
    ):
        # A missing setting has ESM-2's value by default, except for these two.
        default = None if name in ("position_embedding_type", "layer_norm_eps") else expected
        value = config.get(name, default)
        if (value or False) != expected:
            raise ValueError(f"config.json has {name} {value!r}, but ESM-2 has {expected!r}")
    if not TOKENS <= config["vocab_size"] <= _MOST_TOKENS:
        size = config["vocab_size"]
        raise ValueError(f"config.json has vocab_size {size}, but ESM-2 has {TOKENS}")
    if config.get("mask_token_id") not in (None, 32):
        raise ValueError("config.json has a mask_token_id that is not that of ESM-2's alphabet")
    for name in ("rope_parameters", "rope_scaling"):
        for key, value in (config.get(name) or {}).items():
            if _PLAIN_ROTATION.get(key) != value:
                raise ValueError(
                    f"config.json has {name} {config[name]!r}, which ESM-2 does not have"
                )
    vocabulary = folder / "vocab.txt"
    alphabet, _ = fair_esm()
    letters = alphabet.from_architecture("ESM-1b").all_toks
    # The 32nd token is a filler with another name in Hugging Face's files.
    if vocabulary.is_file() and vocabulary.read_text().split()[:31] != letters[:31]:
        raise ValueError("vocab.txt is not ESM-2's alphabet")


def fair_esm_name(short: str) -> str | None:
    """Name of a tensor of the trunk in fair-esm's files, or None if it is not needed."""
    if short.startswith(UNUSED):
        return None
    # Newer files keep TensorFlow's names for the two parts of a norm.
    module, _, kind = short.replace(".gamma", ".weight").replace(".beta", ".bias").rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    number, _, part = module.removeprefix("encoder.layer.").partition(".")
    if not module.startswith("encoder.layer.") or part not in _IN_LAYER:
        raise ValueError(f"a tensor that ESM-2 does not have: {short}")
    return f"layers.{int(number)}.{_IN_LAYER[part]}.{kind}"


def _inverse_frequencies(head: int) -> Tensor:
    # The same computation as in fair-esm's module.
    return 1.0 / (10_000 ** (torch.arange(0, head, 2).float() / head))
