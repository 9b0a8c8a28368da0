"""ESM-2 weights: where they come from, read without running any code from them."""

from __future__ import annotations

import argparse
import pickle
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from virnuc_dask.config import ModelSpec, Pooling, Precision
from virnuc_dask.errors import ModelError

# fair-esm's names, and the dimension of each model's embeddings.
PUBLISHED = {
    "esm2_t6_8M_UR50D": 320,
    "esm2_t12_35M_UR50D": 480,
    "esm2_t30_150M_UR50D": 640,
    "esm2_t33_650M_UR50D": 1280,
    "esm2_t36_3B_UR50D": 2560,
    "esm2_t48_15B_UR50D": 5120,
}
_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"

# Random weights that need no download, for trying the pipeline. Never for science.
DEMO = "demo"
_DEMO_LAYERS, _DEMO_DIMENSION, _DEMO_HEADS = 4, 64, 4

# Heads that no embedding depends on. Left out of the digest, so that weights with and without
# fair-esm's contact regression are the same weights.
_HEADS = ("lm_head.", "contact_head.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights as read, before a network is built from them.

    Attributes
    ----------
    reference : str
        What `load_checkpoint` was asked for; a file as an absolute path.
    data : dict
        In the layout of fair-esm's files: ``cfg`` and ``model``.
    """

    reference: str
    data: dict[str, Any]

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return int(self.data["cfg"]["model"].encoder_layers)

    @property
    def dimension(self) -> int:
        """Features per token, D."""
        return int(self.data["cfg"]["model"].encoder_embed_dim)

    def sha256(self) -> str:
        """Digest of every tensor that an embedding depends on, by name, shape and value."""
        digest = sha256()
        names = {
            name.removeprefix("encoder.").removeprefix("sentence_encoder."): tensor
            for name, tensor in self.data["model"].items()
        }
        for name in sorted(names):
            if not name.startswith(_HEADS):
                values = names[name].detach().to(torch.float32).contiguous().numpy()
                digest.update(f"{name} {values.shape}\n".encode())
                digest.update(values)
        return digest.hexdigest()


def load_checkpoint(reference: str) -> Checkpoint:
    """Read weights by name or from a file, running no code from it.

    Parameters
    ----------
    reference : str
        ``demo``; a fair-esm name, read from torch's hub cache or downloaded to it; or the path of
        a fair-esm ``.pt`` file. The contact regression is not needed.

    Raises
    ------
    ModelError
        An unknown name, a file that is missing, is no ESM-2 checkpoint, or holds anything but
        tensors and plain settings.
    """
    if reference == DEMO:
        return Checkpoint(DEMO, _demo_weights())
    file = Path(reference)
    if reference in PUBLISHED:
        file = Path(torch.hub.get_dir(), "checkpoints", f"{reference}.pt")
        if not file.exists():
            _download(reference, file)
    elif not file.is_file():
        raise ModelError(
            f"model {reference!r}: neither a file, nor one of {DEMO}, {', '.join(PUBLISHED)}"
        )
    else:
        reference = str(file.resolve())
    try:
        data = _read_tensors(file)
        checkpoint = Checkpoint(reference, data)
        if checkpoint.layers < 1 or checkpoint.dimension < 1 or not data["model"]:
            raise ModelError(f"model {file}: an empty checkpoint")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {file}: refused, it is damaged or holds more than tensors and settings"
            f" ({str(error).splitlines()[0]})"
        ) from error
    except ModelError:
        raise
    except Exception as error:
        # Torch's unpickler raises whatever comes when it is fed something else.
        raise ModelError(f"model {file}: not a fair-esm ESM-2 checkpoint: {error}") from error
    return checkpoint


def weights_at_hand(reference: str) -> bool:
    """Whether a model can be read without a download."""
    cached = Path(torch.hub.get_dir(), "checkpoints", f"{reference}.pt")
    return reference == DEMO or Path(reference).is_file() or cached.is_file()


def describe(
    checkpoint: Checkpoint,
    precision: Precision = "float32",
    repr_layer: int | None = None,
    pooling: Pooling = "mean",
) -> ModelSpec:
    """What a worker needs to know in order to load the same model. Reads every weight once."""
    layer = checkpoint.layers if repr_layer is None else repr_layer
    if not 0 <= layer <= checkpoint.layers:
        raise ModelError(
            f"model {checkpoint.reference}: layer {layer} of a model with {checkpoint.layers}"
        )
    return ModelSpec(
        checkpoint.reference,
        checkpoint.sha256(),
        checkpoint.dimension,
        layer,
        pooling,
        precision,
    )


def _read_tensors(file: Path) -> dict[str, Any]:
    # fair-esm's own loader unpickles whatever a file holds. Its files need one class beyond
    # tensors, and nothing else is let in.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise TypeError(f"holds a {type(loaded).__name__}")
    return loaded


def _download(name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The same address and the same cache as fair-esm's loader; the file appears when whole.
        torch.hub.download_url_to_file(_URL.format(name), str(file))
    except (URLError, OSError) as error:
        raise ModelError(
            f"model {name}: cannot download {_URL.format(name)} ({error}). Without a network, put"
            f" the file at {file}, give the path of a .pt file, or try --model {DEMO}"
        ) from error


def _demo_weights() -> dict[str, Any]:
    """A small ESM-2 with random weights, the same on every machine.

    NumPy's generator, since its stream is stable over versions and platforms and torch's is not
    promised to be.
    """
    random = np.random.Generator(np.random.PCG64(20_230_316))
    dimension = _DEMO_DIMENSION
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (33, dimension)}
    for number in range(_DEMO_LAYERS):
        layer = f"layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (dimension, dimension)
            shapes[f"{layer}self_attn.{name}.bias"] = (dimension,)
        for name, out, into in (
            ("fc1", 4 * dimension, dimension),
            ("fc2", dimension, 4 * dimension),
        ):
            shapes[f"{layer}{name}.weight"] = (out, into)
            shapes[f"{layer}{name}.bias"] = (out,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (dimension,)
    shapes["emb_layer_norm_after.weight"] = shapes["emb_layer_norm_after.bias"] = (dimension,)

    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        bound = (3 / shape[-1]) ** 0.5 if len(shape) == 2 else 0.1
        values = random.uniform(-bound, bound, shape).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            values += 1
        tensors[name] = torch.from_numpy(values)
    head = dimension // _DEMO_HEADS
    frequencies = 1.0 / 10_000 ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    for number in range(_DEMO_LAYERS):
        tensors[f"layers.{number}.self_attn.rot_emb.inv_freq"] = frequencies
    # fair-esm's module wants its language-model head; nothing here uses it.
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    tensors["lm_head.bias"] = torch.zeros(33)
    tensors["lm_head.dense.weight"] = torch.eye(dimension)
    tensors["lm_head.dense.bias"] = torch.zeros(dimension)
    tensors["lm_head.layer_norm.weight"] = torch.ones(dimension)
    tensors["lm_head.layer_norm.bias"] = torch.zeros(dimension)
    settings = argparse.Namespace(
        encoder_layers=_DEMO_LAYERS,
        encoder_embed_dim=dimension,
        encoder_attention_heads=_DEMO_HEADS,
        token_dropout=True,
    )
    return {"cfg": {"model": settings}, "model": tensors}
