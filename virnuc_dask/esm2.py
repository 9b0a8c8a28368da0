"""ESM-2: a forward pass over packed tokens that pads nothing.

fair-esm gives the alphabet, the module and the published weights; the forward here runs on that
module's parameters and leaves out the language-model head. Lin et al. 2023,
https://doi.org/10.1126/science.ade2574; upstream: ``esm/model/esm2.py`` of fair-esm 2.0.0.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from esm.data import Alphabet
from esm.pretrained import load_model_and_alphabet_core
from numpy.typing import NDArray
from torch import Tensor

from virnuc_dask.attention import Runs, best_attention
from virnuc_dask.config import ModelSpec, Pooling, Precision, precision_on
from virnuc_dask.errors import InputError, ModelError
from virnuc_dask.linear import DTYPES, Linear, make_linear
from virnuc_dask.packing import Batch, Segments, cut_batches, cut_segments, residue_weights
from virnuc_dask.residues import clean_sequence
from virnuc_dask.weights import DEMO, Checkpoint, describe, load_checkpoint

# Tokens per batch on a CPU: 512 to 4,096 are equally fast, and the smaller stay in cache.
CPU_TOKENS = 2048
# On a GPU at most; about 64 bytes per token and feature are alive at once.
_GPU_TOKENS, _TOKEN_BYTES = 2**17, 64


def load_encoder(
    model: str = DEMO,
    device: str = "cpu",
    precision: Precision = "float32",
    *,
    repr_layer: int | None = None,
    pooling: Pooling = "mean",
) -> Encoder:
    """Load an ESM-2 encoder.

    Parameters
    ----------
    model : str
        ``demo`` (random weights), a fair-esm name, or the path of weights.
    device : str
        A torch device.
    precision : {'float32', 'bfloat16', 'float16', 'int8'}
        Arithmetic of the matrix products; all else is float32.
    repr_layer : int, optional
        Layer whose representation is pooled; 0 is the token embedding. Default: the last.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues, or the BOS token.

    Raises
    ------
    ModelError
        The weights cannot be read, or have no such layer.
    UsageError
        A pooling or a precision that does not exist, or not on this device.
    """
    checkpoint = load_checkpoint(model)
    return Encoder(checkpoint, describe(checkpoint, precision, repr_layer, pooling), device)


class Encoder:
    """An ESM-2 network in memory. Its methods may be called from several threads.

    Attributes
    ----------
    spec : ModelSpec
    dimension : int
        Features per embedding, D.
    token_budget : int
        Tokens that are encoded at once; becomes less when memory runs out.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: str = "cpu") -> None:
        precision_on(device, spec.precision)
        self.spec = spec
        self.dimension = spec.dimension
        self._device = torch.device(device)
        with warnings.catch_warnings():
            # Contacts are never predicted here.
            warnings.filterwarnings("ignore", "Regression weights not found")
            try:
                # The name only tells fair-esm which family it is.
                network, alphabet = load_model_and_alphabet_core("esm2", checkpoint.data)
            except RuntimeError as error:
                raise ModelError(f"model {checkpoint.reference}: {error}") from error
        network = network.to(self._device, torch.float32).eval().requires_grad_(False)
        self._heads = int(network.attention_heads)
        # Without a masked token upstream's token dropout is this constant.
        scale = 1 - 0.15 * 0.8 if network.token_dropout else 1.0
        self._embedding: Tensor = network.embed_tokens.weight * scale
        self._layers = [
            _Layer.of(layer, self._heads, spec.precision)
            for layer in network.layers[: spec.repr_layer]
        ]
        # What enters the first attention depends on the token alone.
        with torch.inference_mode():
            self._first_qkv = [la.qkv(la.norm1(self._embedding)) for la in self._layers[:1]]
        is_last = spec.repr_layer == network.num_layers
        self._final_norm = _Norm.of(network.emb_layer_norm_after) if is_last else None
        self._inverse_frequencies: Tensor = network.layers[0].self_attn.rot_emb.inv_freq
        self._bos, self._eos = int(alphabet.cls_idx), int(alphabet.eos_idx)
        self._token_of = _token_table(alphabet)
        dtype = DTYPES.get(spec.precision, torch.float32)
        self._attend = best_attention(self._device, dtype, spec.dimension // self._heads)
        # Halved whenever memory runs out, and kept for all later chunks.
        self.token_budget = _first_budget(self._device, spec.dimension)
        # One chunk at a time computes in a process; other threads read and write meanwhile.
        self._computing = threading.Lock()

    def encode(self, sequences: Sequence[str]) -> NDArray[np.float32]:
        """Embed sequences of any length.

        Parameters
        ----------
        sequences : sequence of str
            Proteins; letters are treated as in a run (see the README, "Letters").

        Returns
        -------
        ndarray, float32, shape (n, D)

        Raises
        ------
        InputError
            A sequence is empty or has a letter that is no residue; counted from 0.
        MemoryError
            A sequence does not fit into memory, even alone.
        TypeError
            One string instead of several.
        """
        if isinstance(sequences, str | bytes):
            raise TypeError("encode takes a list of sequences, not one string")
        cleaned = []
        for number, sequence in enumerate(sequences):
            try:
                cleaned.append(clean_sequence(sequence))
            except InputError as error:
                raise InputError(error.problem, file=f"sequence {number}") from error
            if not cleaned[-1]:
                raise InputError("no residues", file=f"sequence {number}")
        lengths = np.array([len(sequence) for sequence in cleaned], np.int32)
        residues = np.frombuffer("".join(cleaned).encode("ascii"), np.uint8)
        whole = cut_segments(lengths, int(lengths.max(initial=1)), "truncate")
        embedding, fits = self.encode_segments(residues, whole, len(cleaned))
        if not fits.all():
            number = int(np.argmin(fits))
            raise MemoryError(f"sequence {number}, {lengths[number]} residues, does not fit")
        return embedding

    def encode_segments(
        self, residues: NDArray[np.uint8], segments: Segments, rows: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embed rows that are cut into segments.

        A row with several windows gets the mean over its residues, each counted once; with
        ``max``, the maximum over all windows; with ``bos``, the mean of the windows' BOS tokens.

        Parameters
        ----------
        residues : ndarray, uint8, shape (N,)
            ASCII residues that the segments point into.
        segments : Segments
        rows : int
            Rows of the result.

        Returns
        -------
        embedding : ndarray, float32, shape (rows, D)
            NaN for rows without a segment.
        fits : ndarray, bool, shape (rows,)
            False where a segment does not fit into memory, even alone.
        """
        result = np.full((rows, self.dimension), np.nan, np.float32)
        pool = self.spec.pooling
        result[segments.row] = -np.inf if pool == "max" else 0.0
        combine = np.maximum.at if pool == "max" else np.add.at
        fits = np.ones(rows, np.bool_)
        with self._computing, torch.inference_mode():
            done, unfit = self._encode_batches(residues, segments)
            for members, pooled in done:
                combine(result, segments.row[members], pooled.cpu().numpy())
        fits[segments.row[unfit]] = False
        return result, fits

    def _encode_batches(
        self, residues: NDArray[np.uint8], segments: Segments
    ) -> tuple[list[tuple[NDArray[np.int64], Tensor]], list[int]]:
        """Segments with their pooled representations, and the segments that do not fit.

        A GPU is left to work on while the next batch is prepared: nothing is copied back in here.
        """
        done: list[tuple[NDArray[np.int64], Tensor]] = []
        unfit: list[int] = []
        left = self._cut(segments, np.arange(len(segments)))
        while left:
            batch = left.popleft()
            pooled = self._encode_or_run_out(residues, segments, batch)
            if pooled is not None:
                done.append((batch.segments, pooled))
            elif len(batch.segments) == 1:
                unfit.append(int(batch.segments[0]))
            else:
                tokens = sum(count * (length + 2) for count, length in batch.runs)
                self.token_budget = max(1, min(self.token_budget, tokens) // 2)
                rest = [batch.segments, *(other.segments for other in left)]
                left = self._cut(segments, np.concatenate(rest))
        return done, unfit

    def _cut(self, segments: Segments, chosen: NDArray[np.int64]) -> deque[Batch]:
        batches = cut_batches(segments.length[chosen], self.token_budget)
        return deque(Batch(chosen[batch.segments], batch.runs) for batch in batches)

    # --- one batch ---

    def _encode_or_run_out(
        self, residues: NDArray[np.uint8], segments: Segments, batch: Batch
    ) -> Tensor | None:
        """None if memory ran out. What was allocated by then is free again."""
        try:
            return self._encode_batch(residues, segments, batch)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        _release_memory(self._device)
        return None

    def _encode_batch(
        self, residues: NDArray[np.uint8], segments: Segments, batch: Batch
    ) -> Tensor:
        """Pooled representations of a batch, shape (segments, D)."""
        lengths = segments.length[batch.segments] + 2
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        # BOS stands before a segment's first residue, EOS after its last.
        sources = np.repeat(segments.start[batch.segments] - 1, lengths) + positions
        tokens = self._token_of[residues[sources.clip(0, len(residues) - 1)]]
        tokens[ends - lengths], tokens[ends - 1] = self._bos, self._eos
        bounds = np.concatenate(([0], ends)).astype(np.int32)
        hidden = self._forward(
            self._to_device(tokens),
            self._to_device(positions),
            batch.runs,
            self._to_device(bounds),
        )
        pooled, first, done = [], 0, 0
        for count, length in batch.runs:
            run = hidden[first : first + count * (length + 2)].view(count, length + 2, -1)
            members = batch.segments[done : done + count]
            pooled.append(self._pool(run, segments, members))
            first, done = first + count * (length + 2), done + count
        return torch.cat(pooled)

    def _to_device(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _pool(self, run: Tensor, segments: Segments, members: NDArray[np.int64]) -> Tensor:
        """Pool segments of equal length, shape (count, length + 2, D), to (count, D)."""
        if self.spec.pooling == "max":
            return run[:, 1:-1].amax(1)
        if self.spec.pooling == "bos":
            windows = torch.from_numpy(segments.windows[members]).to(run)
            return run[:, 0] / windows[:, None]
        if (segments.windows[members] == 1).all():
            return run[:, 1:-1].mean(1)
        weights = np.stack([residue_weights(segments, int(number)) for number in members])
        return (run[:, 1:-1] * torch.from_numpy(weights).to(run)[:, :, None]).sum(1)

    def _forward(self, tokens: Tensor, positions: Tensor, runs: Runs, bounds: Tensor) -> Tensor:
        """Representation of packed tokens, shape (tokens, D)."""
        # In float32 whatever the precision: rounded frequencies ruin long sequences.
        angles = positions[:, None].to(torch.float32) * self._inverse_frequencies
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None, :]
        x = F.embedding(tokens, self._embedding)
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.norm1(x)) if number else F.embedding(tokens, self._first_qkv[0])
            qkv = qkv.to(torch.float32).view(len(x), 3, self._heads, -1, 2)
            torch.view_as_complex(qkv[:, :2]).mul_(rotation)
            x = layer.out.add(self._attend(qkv.flatten(-2), runs, bounds), x)
            x = layer.down.add(layer.up.gelu(layer.norm2(x)), x)
        return self._final_norm(x) if self._final_norm else x


def _first_budget(device: torch.device, dimension: int) -> int:
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(_GPU_TOKENS, max(CPU_TOKENS, free // 2 // (_TOKEN_BYTES * dimension))))


def _release_memory(device: torch.device) -> None:
    """Give back what the allocator keeps for later: the next batch may need it in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a libc other than glibc has no such function
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError, and oneDNN, short of memory, one of these.
    texts = ("can't allocate memory", "could not create a", "could not execute a")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any) -> _Norm:
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    norm1: _Norm
    qkv: Linear
    out: Linear
    norm2: _Norm
    up: Linear
    down: Linear

    @classmethod
    def of(cls, layer: Any, heads: int, precision: Precision) -> _Layer:
        attention = layer.self_attn
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj

        def fused(name: str) -> Tensor:
            rotated = [_pair(getattr(part, name), heads) for part in (query, key)]
            return torch.cat([*rotated, getattr(value, name)])

        def linear(module: Any) -> Linear:
            return make_linear(module.weight, module.bias, precision)

        return cls(
            _Norm.of(layer.self_attn_layer_norm),
            make_linear(fused("weight"), fused("bias"), precision),
            linear(attention.out_proj),
            _Norm.of(layer.final_layer_norm),
            linear(layer.fc1),
            linear(layer.fc2),
        )


def _pair(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection with the two halves of each head interleaved.

    Upstream rotates feature i of a head with feature i + d/2. Side by side the two are one complex
    number and the rotation one multiplication; no dot product of a query and a key changes.
    """
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _token_table(alphabet: Alphabet) -> NDArray[np.int64]:
    """Token of each ASCII letter; letters that are no residue never get here."""
    table = np.full(256, alphabet.unk_idx, np.int64)
    for token, index in alphabet.tok_to_idx.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table
