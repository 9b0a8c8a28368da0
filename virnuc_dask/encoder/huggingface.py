"""ESM-2 in Hugging Face's layout, ``config.json`` and weights, as fair-esm's files have it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from virnuc_dask.encoder.upstream import fair_esm

# As transformers chooses: others may be left there from what was saved before.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".bin")
# Tokens of ESM-2's alphabet; a fine-tuned model may have more, to make a multiple of 8 to 128.
TOKENS, _MOST_TOKENS = 33, 128

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
# What no embedding depends on, in ESM-2's trunk; and how the names of the trunk begin.
UNUSED = ("contact_head.", "pooler.", "embeddings.position_")
_TRUNK = ("embeddings.", "encoder.", "rotary_embeddings.", *UNUSED)
_WORDS = "embeddings.word_embeddings.weight"
EMBEDDING = "embed_tokens.weight"
# Values of `rope_parameters` and `rope_scaling` that change nothing.
_PLAIN_ROTATION = {"rope_theta": 10_000, "rope_type": "default", "type": "default"}


def is_huggingface(path: Path) -> bool:
    """Whether a path is a directory or a file in Hugging Face's layout."""
    if path.suffix in _SUFFIXES and path.is_file():
        return (path.parent / "config.json").is_file()
    return (path / "config.json").is_file()


def has_weights(folder: Path) -> bool:
    """Whether a directory holds weights, under a name that they have there."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def huggingface_files(path: Path) -> list[Path]:
    """All files that `read_huggingface` takes values or names from.

    Raises
    ------
    ValueError, OSError, KeyError
        Files that are missing or damaged.
    """
    if path.is_file():
        return [path.parent / "config.json", path]
    index = [path / name for name in _WEIGHTS if (path / name).is_file()][:1]
    return list(dict.fromkeys([path / "config.json", *index, *_files(path)]))


def read_huggingface(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read an ESM-2, from a directory or a file of weights with a ``config.json`` beside it.

    Parameters
    ----------
    path : Path

    Returns
    -------
    data : dict
        ``cfg`` and ``model`` as in fair-esm's files.
    left_out : tuple of str
        Tensors outside of ESM-2, such as a classifier's.

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
    found: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else _files(folder):
        found |= read_tensors(file)
    prefix = _prefix(found)
    tensors: dict[str, Tensor] = {}
    # Some files leave out what follows from the configuration. What a file has counts: published
    # frequencies are rounded to float16, and transformers uses what it finds, too.
    frequencies = _inverse_frequencies(config["hidden_size"] // heads)
    left_out, around = [], prefix.removesuffix("esm.")
    for name, tensor in found.items():
        short = name.removeprefix(prefix)
        is_own = name.startswith(prefix) and short.startswith(_TRUNK)
        # Where ESM-2's own tensors have a place of their own, all that is there must be known.
        if not (is_own or (prefix != around and name.startswith(prefix))):
            left_out.append(name.removeprefix(around))
        elif short in _FREQUENCIES:
            frequencies = tensor
        elif renamed := fair_esm_name(short):
            tensors[renamed] = tensor
    embedding = tensors[EMBEDDING]
    if len(embedding) != config["vocab_size"]:
        raise ValueError(f"it has {len(embedding)} tokens, vocab_size is {config['vocab_size']}")
    tensors[EMBEDDING] = embedding[:TOKENS]
    for layer in range(layers):
        tensors.setdefault(f"layers.{layer}.self_attn.rot_emb.inv_freq", frequencies)
    settings = argparse.Namespace(
        encoder_layers=layers,
        encoder_embed_dim=config["hidden_size"],
        encoder_attention_heads=heads,
        token_dropout=config["token_dropout"],
    )
    # Of its own head every ESM-2 may have or lack the parts.
    others = tuple(sorted(name for name in left_out if not name.startswith("lm_head.")))
    return {"cfg": {"model": settings}, "model": tensors}, others


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by name; no code from it is run."""
    if file.suffix == ".safetensors":
        return load_file(file)
    found = torch_load(file)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file.name} holds more than tensors")
    return found


def torch_load(file: Path) -> Any:
    """What torch has saved, mapped into memory where its format allows it; no code is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files of torch before 1.6 cannot be mapped
            raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _prefix(names: Iterable[str]) -> str:
    """What stands before the names of ESM-2's own tensors: ``esm.`` or less or more."""
    found = [name.removesuffix(_WORDS) for name in names if name.endswith(_WORDS)]
    if len(found) != 1:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(f"it has {len(found)} tensors {_WORDS}, not one; the first are {some}")
    return found[0]


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
    ):
        # What a file leaves out may be another's default, but for these two.
        missing = None if name in ("position_embedding_type", "layer_norm_eps") else expected
        found = config.get(name, missing)
        if (found or False) != expected:
            raise ValueError(f"config.json has {name} {found!r}, an ESM-2 {expected!r}")
    if not TOKENS <= config["vocab_size"] <= _MOST_TOKENS:
        raise ValueError(f"config.json has vocab_size {config['vocab_size']}, an ESM-2 {TOKENS}")
    if config.get("mask_token_id") not in (None, 32):
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
    here = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not here:
        raise ValueError(f"found none of {', '.join(_WEIGHTS)}")
    if here[0].suffix != ".json":
        return here[:1]
    names = sorted(set(json.loads(here[0].read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{here[0].name} names files outside its directory")
    return [folder / name for name in names]


def fair_esm_name(short: str) -> str | None:
    """The name in fair-esm's files of a tensor of the trunk; None for what is not needed."""
    if short.startswith(UNUSED):
        return None
    # Newer files keep the names that TensorFlow gave a norm's two parts.
    module, _, kind = short.replace(".gamma", ".weight").replace(".beta", ".bias").rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    number, _, part = module.removeprefix("encoder.layer.").partition(".")
    if not module.startswith("encoder.layer.") or part not in _IN_LAYER:
        raise ValueError(f"a tensor that ESM-2 does not have: {short}")
    return f"layers.{int(number)}.{_IN_LAYER[part]}.{kind}"


def _inverse_frequencies(head: int) -> Tensor:
    # As fair-esm's module computes them.
    return 1.0 / (10_000 ** (torch.arange(0, head, 2).float() / head))
