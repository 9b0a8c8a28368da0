"""ESM-2: a forward pass over packed tokens that pads nothing.

fair-esm gives the alphabet, the module and the published weights; the forward here runs on that
module's parameters and leaves out the language-model head. Lin et al. 2023,
https://doi.org/10.1126/science.ade2574; upstream: ``esm/model/esm2.py`` of fair-esm 2.0.0.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from esm.data import Alphabet
from esm.pretrained import load_model_and_alphabet_core
from numpy.typing import NDArray
from torch import Tensor

from virnuc_dask.config import ModelSpec, Pooling, Precision
from virnuc_dask.errors import InputError, ModelError
from virnuc_dask.packing import Batch, Segments, cut_batches, cut_segments, residue_weights
from virnuc_dask.residues import clean_sequence
from virnuc_dask.weights import DEMO, Checkpoint, describe, load_checkpoint

# Tokens per batch on a CPU: 512 to 4,096 are equally fast, and the smaller stay in cache.
TOKEN_BUDGET = 2048


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
        ``demo`` (random weights), a fair-esm name, or the path of a ``.pt`` file.
    device : str
        A torch device.
    precision : {'float32'}
        Arithmetic.
    repr_layer : int, optional
        Layer whose representation is pooled; 0 is the token embedding. Default: the last.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues, or the BOS token.

    Raises
    ------
    ModelError
        The weights cannot be read, or have no such layer.
    UsageError
        A pooling or a precision that does not exist.
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
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: str = "cpu") -> None:
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
        self._embedding: Tensor = network.embed_tokens.weight
        # Without a masked token upstream's token dropout is this constant.
        self._scale = 1 - 0.15 * 0.8 if network.token_dropout else 1.0
        self._layers = [_Layer.of(layer) for layer in network.layers[: spec.repr_layer]]
        is_last = spec.repr_layer == network.num_layers
        self._final_norm = _Norm.of(network.emb_layer_norm_after) if is_last else None
        self._inverse_frequencies: Tensor = network.layers[0].self_attn.rot_emb.inv_freq
        self._bos, self._eos = int(alphabet.cls_idx), int(alphabet.eos_idx)
        self._token_of = _token_table(alphabet)
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
        return self.encode_segments(residues, whole, len(cleaned))

    def encode_segments(
        self, residues: NDArray[np.uint8], segments: Segments, rows: int
    ) -> NDArray[np.float32]:
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
        ndarray, float32, shape (rows, D)
            NaN for rows without a segment.
        """
        result = np.full((rows, self.dimension), np.nan, np.float32)
        pool = self.spec.pooling
        result[segments.row] = -np.inf if pool == "max" else 0.0
        with self._computing, torch.inference_mode():
            for batch in cut_batches(segments.length, TOKEN_BUDGET):
                pooled = self._encode_batch(residues, segments, batch)
                row = segments.row[batch.segments]
                if pool == "max":
                    np.maximum.at(result, row, pooled)
                else:
                    np.add.at(result, row, pooled)
        return result

    # --- one batch ---

    def _encode_batch(
        self, residues: NDArray[np.uint8], segments: Segments, batch: Batch
    ) -> NDArray[np.float32]:
        tokens, positions = [], []
        for number in batch.segments:
            start, length = int(segments.start[number]), int(segments.length[number])
            codes = self._token_of[residues[start : start + length]]
            tokens.append(np.concatenate(([self._bos], codes, [self._eos])))
            positions.append(np.arange(length + 2))
        hidden = self._forward(
            torch.from_numpy(np.concatenate(tokens)).to(self._device),
            torch.from_numpy(np.concatenate(positions)).to(self._device),
            batch.runs,
        )
        pooled, first, done = [], 0, 0
        for count, length in batch.runs:
            run = hidden[first : first + count * (length + 2)].view(count, length + 2, -1)
            members = batch.segments[done : done + count]
            pooled.append(self._pool(run, segments, members))
            first, done = first + count * (length + 2), done + count
        return np.asarray(torch.cat(pooled).cpu().numpy(), np.float32)

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

    def _forward(self, tokens: Tensor, positions: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """Representation of packed tokens, shape (tokens, D)."""
        angles = positions[:, None].to(torch.float32) * self._inverse_frequencies
        cos, sin = angles.cos()[:, None, None, :], angles.sin()[:, None, None, :]
        x = F.embedding(tokens, self._embedding) * self._scale
        for layer in self._layers:
            qkv = F.linear(layer.norm1(x), layer.qkv_weight, layer.qkv_bias)
            qkv = qkv.view(len(x), 3, self._heads, -1)
            left, right = qkv[:, :2].chunk(2, -1)
            rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
            attended = _attend(rotated[:, 0], rotated[:, 1], qkv[:, 2], runs)
            x = x + F.linear(attended, layer.out_weight, layer.out_bias)
            inner = F.gelu(F.linear(layer.norm2(x), layer.up_weight, layer.up_bias))
            x = x + F.linear(inner, layer.down_weight, layer.down_bias)
        return self._final_norm(x) if self._final_norm else x


def _attend(query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Attention within each sequence: (tokens, H, d) three times, to (tokens, H * d).

    Sequences of equal length lie next to each other, so each run is a dense view: no padding and
    no mask, and no result depends on a neighbour.
    """
    outputs, first = [], 0
    for count, length in runs:
        tokens = count * (length + 2)
        q, k, v = (
            part[first : first + tokens].view(count, length + 2, *part.shape[1:]).transpose(1, 2)
            for part in (query, key, value)
        )
        output = F.scaled_dot_product_attention(q, k, v)
        outputs.append(output.transpose(1, 2).reshape(tokens, -1))
        first += tokens
    return torch.cat(outputs)


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
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm2: _Norm
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return cls(
            _Norm.of(layer.self_attn_layer_norm),
            torch.cat([projection.weight for projection in projections]),
            torch.cat([projection.bias for projection in projections]),
            attention.out_proj.weight,
            attention.out_proj.bias,
            _Norm.of(layer.final_layer_norm),
            layer.fc1.weight,
            layer.fc1.bias,
            layer.fc2.weight,
            layer.fc2.bias,
        )


def _token_table(alphabet: Alphabet) -> NDArray[np.int64]:
    """Token of each ASCII letter; letters that are no residue never get here."""
    table = np.full(256, alphabet.unk_idx, np.int64)
    for token, index in alphabet.tok_to_idx.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table
