"""ESM-2: a forward pass over packed tokens, without padding of sequences.

fair-esm provides the alphabet, the module and the published weights. The forward pass here uses
that module's parameters and leaves out the language-model head. Sources: Lin et al. 2023,
https://doi.org/10.1126/science.ade2574; ``esm/model/esm2.py`` of fair-esm 2.0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from virnuc_dask.encoder import cpu_kernels, gpu_kernels
from virnuc_dask.encoder.attention import (
    Layout,
    Runs,
    attend_fused,
    attend_natively,
    best_attention,
    describe_attention,
)
from virnuc_dask.encoder.device_queue import to_device
from virnuc_dask.encoder.fair_esm import fair_esm
from virnuc_dask.encoder.linear import DTYPES, Linear, make_linear
from virnuc_dask.encoder.memory import give_back_pages, release_memory
from virnuc_dask.encoder.weights import Checkpoint
from virnuc_dask.settings import ModelSpec, Precision

# On a CPU oneDNN makes and keeps a program for each number of tokens, which takes half a
# millisecond and megabytes. Batches are filled up to a multiple of this to keep programs few.
_CPU_MULTIPLE = 32


# Adds a product to x, in place, and returns the norm of x. See `cpu_kernels.add_norm`.
AddNorm = Callable[[Tensor, Tensor | None, Tensor, Tensor, float, torch.dtype], Tensor]
_ADD_NORM: dict[str, AddNorm] = {"compiled": cpu_kernels.add_norm, "triton": gpu_kernels.add_norm}


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

    Attributes
    ----------
    backends : dict of str to str
        What computes ``attention`` and ``elementwise`` work: ``torch`` or something faster.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._multiple = _CPU_MULTIPLE if device.type == "cpu" else 1
        network, alphabet = _build(checkpoint)
        self._heads = int(network.attention_heads)
        # Without masked tokens, fair-esm's token dropout is this constant factor.
        scale = 1 - 0.15 * 0.8 if network.token_dropout else 1.0
        self._embedding: Tensor = _on(device, network.embed_tokens.weight) * scale
        dtype = DTYPES[spec.precision]
        by = "torch"
        if cpu_kernels.is_usable(device, spec.precision, spec.dimension):
            by = "compiled"
        elif gpu_kernels.is_usable(device, dtype, spec.dimension, self._heads):
            by = "triton"
        self._layers = [
            _Layer.of(layer, self._heads, spec.precision, device, by)
            for layer in network.layers[: spec.repr_layer]
        ]
        # The input of the first attention depends on the token alone.
        with torch.inference_mode():
            self._first_qkv = [la.qkv(la.norm1(self._embedding)) for la in self._layers[:1]]
        is_last = spec.repr_layer == network.num_layers
        self._final_norm = _Norm.of(network.emb_layer_norm_after, device) if is_last else None
        self._inverse_frequencies = _on(device, network.layers[0].self_attn.rot_emb.inv_freq)
        self._bos, self._eos = int(alphabet.cls_idx), int(alphabet.eos_idx)
        self._token_of = _token_table(alphabet)
        ours = {"compiled": attend_natively, "triton": attend_fused}.get(by)
        self._attend = ours or best_attention(device, dtype, spec.dimension // self._heads)
        self.backends = {"attention": describe_attention(self._attend), "elementwise": by}

    def represent(
        self, residues: NDArray[np.uint8], starts: NDArray[np.int64], runs: Runs
    ) -> Tensor:
        """Representation of each token of sequences sorted by length.

        Parameters
        ----------
        residues : ndarray, uint8, shape (N,)
            ASCII residues. `starts` indexes into them.
        starts : ndarray, int64, shape (sequences,)
            First residue of each sequence.
        runs : list of (count, length)
            Runs of `count` sequences of `length` residues each, in order.

        Returns
        -------
        Tensor, float32, shape (tokens, D)
            BOS, residues and EOS of each sequence, end to end.
        """
        lengths = np.repeat([n + 2 for _, n in runs], [count for count, _ in runs])
        ends = np.cumsum(lengths)
        # BOS precedes the first residue of a sequence, EOS follows the last.
        sources = np.repeat(starts - 1 - (ends - lengths), lengths)
        sources += np.arange(len(sources))
        tokens = self._token_of.take(residues.take(sources, mode="clip"))
        tokens[ends - lengths], tokens[ends - 1] = self._bos, self._eos
        # No token attends to these fillers, and their results are cut off.
        filled = np.pad(tokens, (0, -len(tokens) % self._multiple), constant_values=self._eos)
        bounds = np.concatenate(([0], ends)).astype(np.int32)
        # In float32 at every precision: rounded frequencies ruin long sequences.
        indices = torch.arange(int(lengths.max()), dtype=torch.float32, device=self._device)
        layout = Layout(
            runs,
            to_device(bounds, self._device),
            indices[:, None] * self._inverse_frequencies,
        )
        return self._forward(to_device(filled, self._device), layout)[: len(tokens)]

    def _forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Representation of packed tokens, shape (tokens, D)."""
        x = F.embedding(tokens, self._embedding)
        # A layer's result is added to x in the same pass as the next layer's norm.
        product: Tensor | None = None
        for number, layer in enumerate(self._layers):
            qkv = (
                layer.qkv(layer.norm1(x, product))
                if number
                else F.embedding(tokens, self._first_qkv[0])
            )
            product = layer.out(self._attend(qkv, self._heads, layout))
            product = layer.down(layer.up.gelu(layer.norm2(x, product)))
        if product is not None:
            x += product
        return self._final_norm.plain(x) if self._final_norm else x


@dataclass(frozen=True, slots=True)
class _Norm:
    """Layer norm. With a kernel its result has the dtype that the next product takes."""

    weight: Tensor
    bias: Tensor
    eps: float
    kernel: AddNorm | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls,
        norm: Any,
        device: torch.device,
        kernel: AddNorm | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> _Norm:
        weight, bias = _on(device, norm.weight), _on(device, norm.bias)
        return cls(weight, bias, norm.eps, kernel, dtype)

    def __call__(self, x: Tensor, product: Tensor | None = None) -> Tensor:
        """Norm of x, after the product is added to x in place."""
        if self.kernel:
            return self.kernel(x, product, self.weight, self.bias, self.eps, self.dtype)
        if product is not None:
            x += product
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Norm of x, in float32."""
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
        cls, layer: Any, heads: int, precision: Precision, device: torch.device, by: str
    ) -> _Layer:
        """Copy a layer's parameters to the device, and release the memory of the originals."""
        attention = layer.self_attn
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj

        add_norm, dtype = _ADD_NORM.get(by), DTYPES[precision]

        def joined(name: str) -> Tensor:
            parts = [getattr(part, name) for part in (query, key)]
            turned = parts if by == "compiled" else [_pair(part, heads) for part in parts]
            return torch.cat([*turned, getattr(value, name)])

        def linear(weight: Tensor, bias: Tensor) -> Linear:
            weight, bias = _on(device, weight), _on(device, bias)
            return make_linear(weight, bias, precision, is_fused=by == "triton")

        def like(module: Any) -> Linear:
            return linear(module.weight, module.bias)

        ours = cls(
            _Norm.of(layer.self_attn_layer_norm, device, add_norm, dtype),
            linear(joined("weight"), joined("bias")),
            like(attention.out_proj),
            _Norm.of(layer.final_layer_norm, device, add_norm, dtype),
            like(layer.fc1),
            like(layer.fc2),
        )
        # Otherwise pages read and temporary copies stay on the host until all layers are loaded.
        for parameter in layer.parameters():
            give_back_pages(parameter)
        release_memory(torch.device("cpu"))
        return ours


def _build(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """fair-esm's module with the checkpoint's own tensors as parameters, and its alphabet.

    The tensors stay on the host and keep their dtype, so that a GPU holds only what it needs of a
    large model, and nothing twice. The module's heads, which are unused, may lack parameters.
    """
    alphabet_class, network_class = fair_esm()
    alphabet = alphabet_class.from_architecture("ESM-1b")
    with _NoRandomWeights():
        network = network_class(
            checkpoint.layers,
            checkpoint.dimension,
            checkpoint.heads,
            alphabet,
            checkpoint.token_dropout,
        )
    # Names and shapes were checked when the checkpoint was read.
    network.load_state_dict(checkpoint.tensors(), strict=False, assign=True)
    return network.requires_grad_(False), alphabet


class _NoRandomWeights(TorchFunctionMode):
    """Leaves new parameters uninitialised: drawing 650 million random weights takes seconds."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


_RANDOM = (
    *(Tensor.uniform_, Tensor.normal_),
    *(torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_),
)


def _on(device: torch.device, values: Tensor) -> Tensor:
    """A dense float32 copy on the device, with neither a mapped file's memory nor its strides."""
    return values.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)


def _pair(rows: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head in the rows of a query or key projection.

    fair-esm rotates feature i of a head with feature i + d/2. Side by side the two are one complex
    number, and the rotation is one multiplication. No dot product of a query and a key changes.
    """
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _token_table(alphabet: Any) -> NDArray[np.int64]:
    """Token of each ASCII letter. Letters that are no residue never get here."""
    table = np.full(256, alphabet.unk_idx, np.int64)
    for token, index in alphabet.tok_to_idx.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table
