"""Random ESM-2 models in the layout of fair-esm's files, and fair-esm's own forward on them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from numpy.typing import NDArray
from safetensors.torch import save_file

from virnuc_dask.encoder.weights import load_checkpoint

LETTERS = "ACDEFGHIKLMNPQRSTVWYXBUZO"


def random_network(
    layers: int, dimension: int, heads: int, *, seed: int = 0, token_dropout: bool = True
) -> ESM2:
    """An ESM-2 in which nothing cancels: biases, norms and attention are all perturbed."""
    torch.manual_seed(seed)
    network = ESM2(layers, dimension, heads, "ESM-1b", token_dropout).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def upstream_network(reference: str) -> ESM2:
    """fair-esm's own module, with the weights that a reference names."""
    found = load_checkpoint(reference)
    sizes = found.layers, found.dimension, found.heads
    network = ESM2(*sizes, "ESM-1b", found.token_dropout).eval()
    missing, surplus = network.load_state_dict(found.tensors(), strict=False)
    assert all(name.startswith(("lm_head.", "contact_head.")) for name in (*missing, *surplus))
    return network.requires_grad_(False)


def checkpoint_data(network: ESM2) -> dict[str, Any]:
    """A network in the layout of the published files, prefixes and all."""
    settings = argparse.Namespace(
        encoder_layers=network.num_layers,
        encoder_embed_dim=network.embed_dim,
        encoder_attention_heads=network.attention_heads,
        token_dropout=network.token_dropout,
        arch="esm2",
    )
    tensors = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith("contact_head"):
            prefix = "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder."
            tensors[prefix + name] = tensor
    return {"cfg": {"model": settings}, "model": tensors}


def save_network(network: ESM2, path: Path) -> str:
    torch.save(checkpoint_data(network), path)
    return str(path)


def save_huggingface(network: ESM2, folder: Path) -> str:
    """A network as Hugging Face's published files hold it: safetensors and a configuration."""
    tensors = {
        _huggingface_name(name): tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if name != "lm_head.weight"  # the embedding, stored once
    }
    config = {
        "architectures": ["EsmForMaskedLM"],
        "emb_layer_norm_before": False,
        "hidden_act": "gelu",
        "hidden_size": network.embed_dim,
        "intermediate_size": 4 * network.embed_dim,
        "is_folding_model": False,
        "layer_norm_eps": 1e-05,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": network.attention_heads,
        "num_hidden_layers": network.num_layers,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": network.token_dropout,
        "vocab_size": 33,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _huggingface_name(name: str) -> str:
    for theirs, ours in (
        ("embed_tokens", "esm.embeddings.word_embeddings"),
        ("emb_layer_norm_after", "esm.encoder.emb_layer_norm_after"),
        ("self_attn.q_proj", "attention.self.query"),
        ("self_attn.k_proj", "attention.self.key"),
        ("self_attn.v_proj", "attention.self.value"),
        ("self_attn.out_proj", "attention.output.dense"),
        ("self_attn.rot_emb", "attention.self.rotary_embeddings"),
        ("self_attn_layer_norm", "attention.LayerNorm"),
        ("final_layer_norm", "LayerNorm"),
        ("fc1", "intermediate.dense"),
        ("fc2", "output.dense"),
        ("contact_head", "esm.contact_head"),
    ):
        name = name.replace(theirs, ours)
    return f"esm.encoder.layer.{name[7:]}" if name.startswith("layers.") else name


def upstream(
    network: ESM2, sequences: list[str], layer: int | None = None
) -> list[NDArray[np.float32]]:
    """Per-token representations by fair-esm's own forward: BOS, residues, EOS of each sequence."""
    layer = network.num_layers if layer is None else layer
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    _, _, tokens = convert([("", sequence) for sequence in sequences])
    with torch.inference_mode():
        hidden = network(tokens, repr_layers=[layer])["representations"][layer]
    return [hidden[n, : len(s) + 2].numpy() for n, s in enumerate(sequences)]


def upstream_mean(
    network: ESM2, sequences: list[str], layer: int | None = None
) -> NDArray[np.float32]:
    """fair-esm's own mean over residues, one sequence at a time, shape (n, D)."""
    return np.stack([upstream(network, [s], layer)[0][1:-1].mean(0) for s in sequences])


def transformers_mean(network: Any, sequences: list[str]) -> NDArray[np.float32]:
    """The same by an `EsmModel` of transformers."""
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    means = []
    for sequence in sequences:
        _, _, tokens = convert([("", sequence)])
        with torch.inference_mode():
            means.append(network(tokens).last_hidden_state[0, 1:-1].mean(0).numpy())
    return np.stack(means)


def random_sequences(lengths: list[int], seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list(LETTERS), length)) for length in lengths]


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference in any row, relative to the row's norm."""
    norms = np.linalg.norm(expected, axis=1)
    return float((np.abs(found - expected).max(axis=1) / norms).max())


class Malicious:
    """A pickle that writes a file when it is read without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)
