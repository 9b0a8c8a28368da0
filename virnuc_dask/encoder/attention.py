"""Attention within each of several concatenated sequences, without padding or masks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.attention
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask.encoder import cpu_kernels, gpu_kernels
from virnuc_dask.encoder.device_queue import to_device
from virnuc_dask.encoder.memory import is_out_of_memory

_log = logging.getLogger(__name__)
Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """Positions of the packed tokens of a batch. Its sequences are sorted by length.

    Attributes
    ----------
    runs : list of (count, length)
        Runs of `count` sequences of `length` residues each, in order. BOS and EOS add two tokens
        to each sequence.
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, then the end of the last sequence.
    angles : Tensor, float32, shape (longest, d / 2)
        Rotary embedding: angle for each position and each pair of features of a head.
    """

    runs: Runs
    bounds: Tensor
    angles: Tensor

    @cached_property
    def tokens(self) -> int:
        """Number of tokens, without padding after the last sequence."""
        return sum(count * (length + 2) for count, length in self.runs)

    @cached_property
    def turns(self) -> Tensor:
        """Cosines, then sines, for each position, shape (longest, d)."""
        return torch.cat([self.angles.cos(), self.angles.sin()], 1)

    @cached_property
    def programs(self) -> Tensor:
        """Programs of `gpu_kernels.attend`, as `gpu_kernels.cut_programs` returns them."""
        lengths = np.repeat(
            [length + 2 for _, length in self.runs], [count for count, _ in self.runs]
        )
        return to_device(gpu_kernels.cut_programs(lengths), self.bounds.device)

    @cached_property
    def rotation(self) -> Tensor:
        """Rotation of each token as complex numbers of modulus 1, shape (tokens, 1, 1, d / 2)."""
        turned = torch.polar(torch.ones_like(self.angles), self.angles)
        parts = [turned[: length + 2].repeat(count, 1) for count, length in self.runs]
        return torch.cat(parts)[:, None, None]


# Takes queries, keys and values, shape (tokens, 3 * D), the number of heads and the layout.
# Returns shape (tokens, D).
Attention = Callable[[Tensor, int, Layout], Tensor]


def attend_natively(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attention by the compiled kernel. Rotation pairs feature i of a head with i + d / 2."""
    return cpu_kernels.attend(qkv, layout.turns, layout.bounds, heads)


def attend(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attention on dense views, on any device. Rotation pairs feature 2 i of a head with 2 i + 1.

    Sequences of equal length are adjacent, so each run is a dense view. No result depends on a
    neighbour.
    """
    turned = _rotate(qkv, heads, layout)
    outputs, first = [], 0
    for count, length in layout.runs:
        tokens = count * (length + 2)
        run = turned[first : first + tokens].view(count, length + 2, *turned.shape[1:])
        query, key, value = run.permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value)
        outputs.append(output.transpose(1, 2).reshape(tokens, -1))
        first += tokens
    return _filled_up(torch.cat(outputs), qkv)


def attend_fused(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attention as in `attend`, by one Triton kernel, in the dtype of `qkv`."""
    return gpu_kernels.attend(qkv, heads, layout.bounds, layout.programs, layout.turns)


def _rotate(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Rotate queries and keys, not values. Returns float32, shape (tokens, 3, heads, d)."""
    tokens = layout.tokens
    pairs = qkv[:tokens].to(torch.float32).view(tokens, 3, heads, -1, 2)
    torch.view_as_complex(pairs[:, :2]).mul_(layout.rotation)
    return pairs.flatten(-2)


def _filled_up(attended: Tensor, qkv: Tensor) -> Tensor:
    """Append zeros for the padding after the last sequence."""
    missing = len(qkv) - len(attended)
    # Without padding, `F.pad` would still copy the whole tensor.
    return F.pad(attended, (0, 0, 0, missing)) if missing else attended


def describe_attention(attention: Attention) -> str:
    """``compiled``, ``triton``, ``varlen`` (a single launch) or ``sdpa`` (one for each length).

    ``varlen FA4`` is ``varlen`` by FlashAttention 4.
    """
    if isinstance(attention, PackedKernel):
        return " ".join(filter(None, ["varlen", attention.flash_attention]))
    names: dict[Attention, str] = {attend_natively: "compiled", attend_fused: "triton"}
    return names.get(attention, "sdpa")


def best_attention(device: torch.device, dtype: torch.dtype, features: int) -> Attention:
    """`PackedKernel` where it works, otherwise `attend`.

    It needs a GPU and half precision.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
    features : int
        Features per head, d.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return attend
    return usable_packed_kernel(device, dtype, features) or attend


def usable_packed_kernel(
    device: torch.device, dtype: torch.dtype, features: int
) -> PackedKernel | None:
    """Packed attention that agrees with `attend`, with FlashAttention 4 if that can be had.

    torch's function is new, and FlashAttention 4 more so. The reason why one of them is not used is
    logged.

    Raises
    ------
    RuntimeError
        The device is out of memory, or no longer usable.
    """
    before = _switched_on()
    for flash_attention in ("FA4", None):
        try:
            kernel = PackedKernel(dtype, flash_attention)
            if _agrees(kernel, device, features):
                return kernel
            problem = "it differs from scaled-dot-product attention"
        except Exception as error:  # not installed, an old torch or GPU, a failed compilation, …
            is_of_device = "CUDA error" in str(error) and "no kernel image" not in str(error)
            if is_of_device or is_out_of_memory(error):
                raise  # not a fault of the kernel, and it may not happen again
            problem = f"{type(error).__name__}: {error}"
        _log.info("no packed attention by %s: %s", flash_attention or "torch", problem)
        if _switched_on() != before:
            torch.nn.attention.restore_flash_attention_impl()
    return None


def _agrees(kernel: Attention, device: torch.device, features: int) -> bool:
    """Whether a kernel's attention is that of `attend` but for rounding."""
    bounds = torch.tensor([0, 3, 6, 208], dtype=torch.int32, device=device)
    angles = torch.linspace(0, 3, 202 * features // 2, device=device).view(202, -1)
    layout = Layout([(2, 1), (1, 200)], bounds, angles)
    qkv = torch.linspace(-2, 2, 208 * 3 * 2 * features, device=device).mul(50).sin().view(208, -1)
    with torch.inference_mode():
        actual = kernel(qkv.clone(), 2, layout)
        expected = attend(qkv, 2, layout)
    return torch.allclose(actual.float(), expected, atol=0.02)


def _switched_on() -> str | None:
    """Which FlashAttention torch uses in this process; None for its own, or with torch < 2.11."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    name: str | None = current()
    return name


class PackedKernel:
    """Attention as in `attend`, by a single launch of torch's kernel for any lengths.

    Parameters
    ----------
    dtype : torch.dtype
        Half precision.
    flash_attention : str or None, optional
        Which FlashAttention torch is to use, as ``FA4``. It is switched on for the whole process,
        unless this process has chosen one already. By default torch's choice stays.
    """

    def __init__(self, dtype: torch.dtype, flash_attention: str | None = None) -> None:
        self._dtype = dtype
        module = import_module("torch.nn.attention.varlen")
        self._varlen_attn: Callable[..., Any] = module.varlen_attn
        if flash_attention and _switched_on() is None:
            torch.nn.attention.activate_flash_attention_impl(flash_attention)
        self.flash_attention = _switched_on()

    def __call__(self, qkv: Tensor, heads: int, layout: Layout) -> Tensor:
        """Attention as in `attend`, in the kernel's dtype."""
        longest = max(length for _, length in layout.runs) + 2
        query, key, value = _rotate(qkv, heads, layout).to(self._dtype).unbind(1)
        # torch 2.10 to 2.14 share these arguments, by position.
        attended: Tensor = self._varlen_attn(
            query, key, value, layout.bounds, layout.bounds, longest, longest
        )
        return _filled_up(attended.flatten(-2), qkv)
