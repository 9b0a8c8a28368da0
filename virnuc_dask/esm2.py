"""ESM-2: a forward pass over packed tokens that pads nothing.

fair-esm gives the alphabet, the module and the published weights; the forward here runs on that
module's parameters and leaves out the language-model head. Lin et al. 2023,
https://doi.org/10.1126/science.ade2574; upstream: ``esm/model/esm2.py`` of fair-esm 2.0.0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from esm.data import Alphabet
from esm.pretrained import load_model_and_alphabet_core
from numpy.typing import NDArray
from torch import Tensor

from virnuc_dask import kernels
from virnuc_dask.attention import Layout, Runs, attend_natively, best_attention
from virnuc_dask.config import ModelSpec, Precision
from virnuc_dask.errors import ModelError
from virnuc_dask.kernels import Integers, Product
from virnuc_dask.linear import DTYPES, Linear, make_linear
from virnuc_dask.weights import Checkpoint

# On a CPU oneDNN makes and keeps a program for each number of tokens that it meets, which takes
# half a millisecond and megabytes: batches are filled up to a multiple, so that there are few.
_CPU_MULTIPLE = 32


class Network:
    """An ESM-2 on a device.

    Parameters
    ----------
    checkpoint : Checkpoint
    spec : ModelSpec
        Layers above ``repr_layer`` are left out.
    device : torch.device

    Raises
    ------
    ModelError
        The weights are not those of an ESM-2.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._multiple = _CPU_MULTIPLE if device.type == "cpu" else 1
        with warnings.catch_warnings():
            # Contacts are never predicted here.
            warnings.filterwarnings("ignore", "Regression weights not found")
            try:
                # The name only tells fair-esm which family it is.
                network, alphabet = load_model_and_alphabet_core("esm2", checkpoint.data)
            except RuntimeError as error:
                raise ModelError(f"model {checkpoint.reference}: {error}") from error
        # It stays on the host: of a large model a GPU holds what it needs, and not all of it twice.
        network = network.to(torch.float32).eval().requires_grad_(False)
        self._heads = int(network.attention_heads)
        # Without a masked token upstream's token dropout is this constant.
        scale = 1 - 0.15 * 0.8 if network.token_dropout else 1.0
        self._embedding: Tensor = (network.embed_tokens.weight * scale).to(device)
        has_kernels = kernels.serve(device, spec.precision, spec.dimension)
        self._layers = [
            _Layer.of(layer, self._heads, spec.precision, device, has_kernels)
            for layer in network.layers[: spec.repr_layer]
        ]
        # What enters the first attention depends on the token alone.
        with torch.inference_mode():
            self._first_qkv = [
                la.qkv(la.norm1(self._embedding)).finished() for la in self._layers[:1]
            ]
        is_last = spec.repr_layer == network.num_layers
        self._final_norm = _Norm.of(network.emb_layer_norm_after, device) if is_last else None
        self._inverse_frequencies: Tensor = network.layers[0].self_attn.rot_emb.inv_freq.to(device)
        self._bos, self._eos = int(alphabet.cls_idx), int(alphabet.eos_idx)
        self._token_of = _token_table(alphabet)
        dtype = DTYPES.get(spec.precision, torch.float32)
        self._attend = (
            attend_natively
            if has_kernels
            else best_attention(device, dtype, spec.dimension // self._heads)
        )

    def represent(
        self, residues: NDArray[np.uint8], starts: NDArray[np.int64], runs: Runs
    ) -> Tensor:
        """Representation of each token of sequences that are sorted by length.

        Parameters
        ----------
        residues : ndarray, uint8, shape (N,)
            ASCII residues that the starts point into.
        starts : ndarray, int64, shape (sequences,)
            First residue of each sequence.
        runs : list of (count, length)
            Residues of the sequences, in order.

        Returns
        -------
        Tensor, float32, shape (tokens, D)
            End to end, each sequence's BOS, residues and EOS.
        """
        lengths = np.repeat([n + 2 for _, n in runs], [count for count, _ in runs])
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        # BOS stands before a sequence's first residue, EOS after its last.
        sources = np.repeat(starts - 1, lengths) + positions
        tokens = self._token_of[residues[sources.clip(0, len(residues) - 1)]]
        tokens[ends - lengths], tokens[ends - 1] = self._bos, self._eos
        # Nothing attends to these, and nobody looks at what becomes of them.
        filled = np.pad(tokens, (0, -len(tokens) % self._multiple), constant_values=self._eos)
        bounds = np.concatenate(([0], ends)).astype(np.int32)
        # In float32 whatever the precision: rounded frequencies ruin long sequences.
        places = torch.arange(int(lengths.max()), dtype=torch.float32, device=self._device)
        layout = Layout(
            runs,
            self._to_device(bounds),
            self._to_device(positions),
            places[:, None] * self._inverse_frequencies,
        )
        return self._forward(self._to_device(filled), layout)[: len(tokens)]

    def _to_device(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Representation of packed tokens, shape (tokens, D)."""
        x = F.embedding(tokens, self._embedding)
        # What the last layer gave is added to x together with the next one's norm.
        product: Product | None = None
        for number, layer in enumerate(self._layers):
            qkv = (
                layer.qkv(layer.norm1(x, product))
                if number
                else Product(F.embedding(tokens, self._first_qkv[0]))
            )
            product = layer.out(self._attend(qkv, self._heads, layout))
            product = layer.down(layer.up.gelu(layer.norm2(x, product)))
        if product:
            x += product.finished()
        return self._final_norm.plain(x) if self._final_norm else x


@dataclass(frozen=True, slots=True)
class _Norm:
    """Layer norm; its result has the form that what follows takes, if there are kernels."""

    weight: Tensor
    bias: Tensor
    eps: float
    form: torch.dtype | None

    @classmethod
    def of(cls, norm: Any, device: torch.device, form: torch.dtype | None = None) -> _Norm:
        return cls(norm.weight.to(device), norm.bias.to(device), norm.eps, form)

    def __call__(self, x: Tensor, product: Product | None = None) -> Tensor | Integers:
        """Of x, to which the product is added in place."""
        if self.form:
            return kernels.add_norm(x, product, self.weight, self.bias, self.eps, self.form)
        if product:
            x += product.finished()
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Of x, in float32."""
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
    def of(
        cls, layer: Any, heads: int, precision: Precision, device: torch.device, has_kernels: bool
    ) -> _Layer:
        attention = layer.self_attn
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj

        def fused(name: str) -> Tensor:
            parts = [getattr(part, name) for part in (query, key)]
            turned = parts if has_kernels else [_pair(part, heads) for part in parts]
            return torch.cat([*turned, getattr(value, name)])

        def linear(weight: Tensor, bias: Tensor) -> Linear:
            return make_linear(weight.to(device), bias.to(device), precision)

        def like(module: Any) -> Linear:
            return linear(module.weight, module.bias)

        qkv = linear(fused("weight"), fused("bias"))
        form = qkv.takes if has_kernels else None
        return cls(
            _Norm.of(layer.self_attn_layer_norm, device, form),
            qkv,
            like(attention.out_proj),
            _Norm.of(layer.final_layer_norm, device, form),
            like(layer.fc1),
            like(layer.fc2),
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
