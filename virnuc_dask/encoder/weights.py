"""Finds and reads ESM-2 weights without running any code from them."""

from __future__ import annotations

import argparse
import pickle
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from virnuc_dask.encoder import digests
from virnuc_dask.encoder.digests import KnownWeights
from virnuc_dask.encoder.huggingface import read_huggingface, torch_load
from virnuc_dask.encoder.lora import Adapter, read_adapter
from virnuc_dask.encoder.memory import give_back_pages
from virnuc_dask.encoder.models import PUBLISHED, model_spec
from virnuc_dask.encoder.weight_files import (
    FileStates,
    exists,
    file_of,
    has_weights,
    is_adapter,
    is_huggingface,
    published_base,
    resolved,
    states_of,
)
from virnuc_dask.errors import ModelError, UsageError
from virnuc_dask.settings import DEMO, ModelSpec, Pooling, Precision
from virnuc_dask.text import printable

# Prefixes of the names of fair-esm's other models.
_OTHER_MODELS = ("esm1", "esm_msa1", "esm_if1", "esmfold")
_URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"

_DEMO_LAYERS, _DEMO_DIMENSION, _DEMO_HEADS = 4, 64, 4

# Heads that no embedding depends on. The digest leaves them out, so that weights with and without
# fair-esm's contact regression are the same weights.
_HEADS = ("lm_head.", "contact_head.")
# Values to convert and hash at once: 16 MiB.
_HASHED_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights as read, before a network is built from them.

    Attributes
    ----------
    reference : str
        Argument of `load_checkpoint`, with the path of a file made absolute.
    data : dict
        ``cfg`` and ``model`` in the layout of fair-esm's files. With an adapter, its base model's.
    adapter : Adapter, optional
    left_out : tuple of str
        Tensors outside ESM-2, such as a classifier's.
    files : FileStates, optional
        State of its files before they were read.
    """

    reference: str
    data: dict[str, Any]
    adapter: Adapter | None = None
    left_out: tuple[str, ...] = ()
    files: FileStates | None = None

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return int(self.data["cfg"]["model"].encoder_layers)

    @property
    def dimension(self) -> int:
        """Features per token, D."""
        return int(self.data["cfg"]["model"].encoder_embed_dim)

    @property
    def heads(self) -> int:
        """Attention heads per layer."""
        return int(self.data["cfg"]["model"].encoder_attention_heads)

    @property
    def token_dropout(self) -> bool:
        """Whether the token embeddings are scaled by 0.88."""
        return bool(self.data["cfg"]["model"].token_dropout)

    def tensors(self) -> dict[str, Tensor]:
        """Weights of the network by name, with the adapter merged."""
        tensors = self.base()
        return tensors if self.adapter is None else self.adapter.merged(tensors)

    def sha256(self, given_up: threading.Event | None = None) -> str:
        """Digest of everything that an embedding depends on: tensors by name, shape and value.

        An adapter is hashed by its parts, because the last bits of merged weights differ between
        machines.

        Parameters
        ----------
        given_up : threading.Event, optional
            Once it is set, hashing stops, and the result is empty.
        """
        given_up = given_up or threading.Event()
        # No tensor shows this setting. The others follow from the tensors' names and shapes.
        digest = sha256(f"token_dropout {self.token_dropout}\n".encode())
        _feed(digest, self.base(), given_up)
        if self.adapter is not None:
            digest.update(b"adapter\n")
            _feed(digest, self.adapter.parts(), given_up)
        return "" if given_up.is_set() else digest.hexdigest()

    def base(self) -> dict[str, Tensor]:
        """Weights by name, without an adapter's changes and without heads."""
        tensors = {
            name.removeprefix("encoder.").removeprefix("sentence_encoder."): tensor
            for name, tensor in self.data["model"].items()
        }
        return {name: t for name, t in tensors.items() if not name.startswith(_HEADS)}


def known_sha256(checkpoint: Checkpoint, given_up: threading.Event | None = None) -> str:
    """Digest of weights. It does not read them if an earlier run has kept their digest.

    This is only for naming weights. A process that computes with them uses `Checkpoint.sha256`,
    which hashes the values themselves.

    Parameters
    ----------
    checkpoint : Checkpoint
    given_up : threading.Event, optional
        Once it is set, hashing stops, and the result is empty.
    """
    files = checkpoint.files
    # If the files are unchanged since they were mapped, their digest is that of the mapped values.
    if files and files.is_same(states_of(checkpoint.reference)) and (kept := digests.recall(files)):
        return kept.sha256
    digest = checkpoint.sha256(given_up)
    if digest and files and files.is_same(states_of(checkpoint.reference)):
        known = KnownWeights(
            digest,
            checkpoint.layers,
            checkpoint.dimension,
            checkpoint.adapter is not None,
            checkpoint.left_out,
        )
        digests.remember(files, known)
    return digest


@contextmanager
def hashing(checkpoint: Checkpoint, *, or_known: bool = False) -> Iterator[Future[str]]:
    """Compute the digest of weights in another thread. It takes minutes for the largest models.

    Leaving the context stops the computation.

    Parameters
    ----------
    checkpoint : Checkpoint
    or_known : bool
        Whether the digest may come from an earlier run, as in `known_sha256`.
    """
    given_up = threading.Event()
    with ThreadPoolExecutor(1, "virnuc-dask-hashing") as thread:
        compute = partial(known_sha256, checkpoint) if or_known else checkpoint.sha256
        digest = thread.submit(compute, given_up)
        del compute
        del checkpoint  # frees its memory once the digest is known
        try:
            yield digest
        finally:
            given_up.set()


def _feed(digest: Any, tensors: dict[str, Tensor], given_up: threading.Event) -> None:
    """Hash tensors as float32, part by part, so that large ones need no more memory."""
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        rows = tensors[name].detach()
        rows = rows if rows.dim() else rows[None]
        width = rows.shape[1:].numel()
        for part in torch.split(rows, max(1, _HASHED_AT_ONCE // max(1, width))):
            if given_up.is_set():
                return
            digest.update(part.to(torch.float32).contiguous().numpy())
            give_back_pages(part)
        give_back_pages(rows)  # also those that the system read around each part


def load_checkpoint(reference: str) -> Checkpoint:
    """Read weights by name or from a file. No code from the file is run.

    Parameters
    ----------
    reference : str
        ``demo``; a fair-esm name, read from torch's hub cache or downloaded to it; or a path. The
        path is that of a fair-esm ``.pt`` file, with or without contact regression; of a directory
        or a file of weights in Hugging Face's layout; or of a directory with a PEFT LoRA adapter.

    Raises
    ------
    ModelError
        The name is unknown, or the file is missing, is not an ESM-2 checkpoint, or holds more than
        tensors and plain settings.
    """
    if reference == DEMO:
        return Checkpoint(DEMO, _demo_weights())
    file = file_of(reference)
    if reference in PUBLISHED:
        if not file.is_file():
            _download(reference, file)
        return _read(reference, file)
    if not exists(file):
        if reference.startswith(_OTHER_MODELS):
            raise ModelError(
                f"model {reference!r}: only ESM-2 is supported: {', '.join(PUBLISHED)}, and models"
                " derived from them"
            )
        raise ModelError(
            f"model {reference!r}: neither a file nor a Hugging Face directory, nor one of"
            f" {DEMO}, {', '.join(PUBLISHED)}"
        )
    return _read(resolved(reference), file)


def describe(
    checkpoint: Checkpoint,
    precision: Precision = "float32",
    repr_layer: int | None = None,
    pooling: Pooling = "mean",
    *,
    hashed: bool = True,
) -> ModelSpec:
    """Specification with which a worker loads the same model. Reads every weight once.

    Parameters
    ----------
    checkpoint : Checkpoint
    precision : str
    repr_layer : int, optional
        Default: the last.
    pooling : str
    hashed : bool
        If False, the digest is empty and no weights are read.

    Raises
    ------
    ModelError
        The model has no such layer.
    UsageError
        The pooling or precision does not exist.
    """
    spec = model_spec(
        checkpoint.reference,
        checkpoint.layers,
        checkpoint.dimension,
        precision,
        repr_layer,
        pooling,
    )
    return replace(spec, weights_sha256=checkpoint.sha256()) if hashed else spec


# torch's allow-list is global: a thread that leaves its context clears it for other threads.
_reading = threading.Lock()


def _read(reference: str, file: Path) -> Checkpoint:
    files = states_of(reference)
    try:
        checkpoint = replace(_parse(reference, file), files=files)
        problem = _problem(checkpoint)
    except pickle.UnpicklingError as error:
        # Without torch's text, which advises to read the file without protection.
        raise ModelError(
            f"model {file}: refused, because it is damaged or holds more than tensors and settings"
        ) from error
    except (MemoryError, UsageError):
        raise  # not caused by the file's content
    except Exception as error:  # damaged bytes may raise anything
        detail = printable((str(error).splitlines() or [""])[0], 300)
        raise ModelError(
            f"model {file}: not an ESM-2 checkpoint, or damaged ({type(error).__name__}: {detail})"
        ) from error
    if problem:
        raise ModelError(f"model {file}: not an ESM-2 checkpoint: {printable(problem, 300)}")
    return checkpoint


def _parse(reference: str, file: Path) -> Checkpoint:
    if file.suffix in (".safetensors", ".json") and file.is_file() and not is_huggingface(file):
        raise ValueError("give the directory, with its config.json")
    if not is_adapter(file):
        data, left_out = read_huggingface(file) if is_huggingface(file) else (_unpickle(file), ())
        return Checkpoint(reference, data, None, left_out)
    adapter = read_adapter(file)
    if has_weights(file):  # its base is in the same directory
        data, left_out = read_huggingface(file)
    else:
        base = load_checkpoint(published_base(file))
        data, left_out = base.data, base.left_out
    checkpoint = Checkpoint(reference, data, adapter, (*left_out, *adapter.left_out))
    adapter.check(checkpoint.base())
    return checkpoint


def _unpickle(file: Path) -> Any:
    # fair-esm's own loader unpickles anything. Its files need one class besides tensors, and no
    # other is allowed here.
    with _reading, torch.serialization.safe_globals([argparse.Namespace]):
        return torch_load(file)


def _problem(checkpoint: Checkpoint) -> str | None:
    """Problem of a checkpoint, apart from those that fair-esm finds when it builds the model."""
    data = checkpoint.data
    if not isinstance(data, dict) or not {"cfg", "model"} <= data.keys():
        return "no entries 'cfg' and 'model'"
    if not isinstance(data["model"], dict) or not data["model"]:
        return "no tensors"
    for name, tensor in data["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            return f"{name!r} is not a tensor"
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            return f"{name!r} is not a dense tensor of floating-point numbers"
    layers, dimension, heads = checkpoint.layers, checkpoint.dimension, checkpoint.heads
    _ = checkpoint.token_dropout  # raises if there is none
    # Each head's features are rotated in pairs.
    if min(layers, dimension, heads) < 1 or dimension % (2 * heads):
        return f"{layers} layers, {dimension} features and {heads} heads do not fit together"
    tensors = checkpoint.base()
    shapes = _shapes(layers, dimension, heads)
    if missing := sorted(shapes.keys() - tensors.keys()):
        return (
            f"it lacks {len(missing)} tensor(s) of an ESM-2 with {layers} layers and {dimension}"
            f" features, such as {', '.join(missing[:3])}; it has {', '.join(sorted(tensors)[:3])}"
        )
    if surplus := sorted(tensors.keys() - shapes.keys()):
        some = ", ".join(surplus[:3])
        return f"it has {len(surplus)} tensor(s) that ESM-2 does not have: {some}"
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            return f"{name} has the shape {tuple(tensors[name].shape)}, not {shape}"
    return None


def _shapes(layers: int, dimension: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that an embedding depends on, by name."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (33, dimension)}
    for number in range(layers):
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
        shapes[f"{layer}self_attn.rot_emb.inv_freq"] = (dimension // heads // 2,)
    shapes["emb_layer_norm_after.weight"] = shapes["emb_layer_norm_after.bias"] = (dimension,)
    return shapes


def _download(name: str, file: Path) -> None:
    if file.parts[0] == "~":  # torch would make a folder of that name
        raise ModelError(
            f"model {name}: there is no home directory for its weights; set TORCH_HOME to another"
            " directory, or give the path of a .pt file"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The address and the cache of fair-esm's loader. torch takes a broken connection for the
        # end of the file, so the file gets its name only after it was read.
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=file.parent) as folder:
            part = Path(folder, file.name)
            torch.hub.download_url_to_file(_URL.format(name), str(part))
            _read(name, part)
            part.replace(file)
    except (OSError, HTTPException, ModelError) as error:
        raise ModelError(
            f"model {name}: cannot download {_URL.format(name)} to {file} ({error}). Without a"
            f" network, put the file there, give the path of a .pt file, or try --model {DEMO}"
            " (random weights)"
        ) from error


def _demo_weights() -> dict[str, Any]:
    """A small ESM-2 with random weights, the same on every machine.

    They come from NumPy's generator, because its stream is stable over versions and platforms, and
    torch does not promise that. Frequencies are computed in float64, because float32 powers differ
    between processors.
    """
    random = np.random.Generator(np.random.PCG64(20_230_316))
    dimension = _DEMO_DIMENSION
    head = dimension // _DEMO_HEADS
    exponents = np.arange(0, head, 2) / head
    frequencies = torch.from_numpy((1.0 / 10_000.0**exponents).astype(np.float32))
    tensors: dict[str, Tensor] = {}
    for name, shape in _shapes(_DEMO_LAYERS, dimension, _DEMO_HEADS).items():
        if name.endswith("inv_freq"):
            tensors[name] = frequencies
            continue
        bound = (3 / shape[-1]) ** 0.5 if len(shape) == 2 else 0.1
        values = random.uniform(-bound, bound, shape).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            values += 1
        tensors[name] = torch.from_numpy(values)
    settings = argparse.Namespace(
        encoder_layers=_DEMO_LAYERS,
        encoder_embed_dim=dimension,
        encoder_attention_heads=_DEMO_HEADS,
        token_dropout=True,
    )
    return {"cfg": {"model": settings}, "model": tensors}
