"""Attention within each of several sequences that lie end to end: no padding, no mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask.encoder import fused, kernels
from virnuc_dask.encoder.queues import to_device

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of sequences lie, which are sorted by length.

    Attributes
    ----------
    runs : list of (count, length)
        Residues of the sequences, in order; each has two tokens more.
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, and the end.
    positions : Tensor, int64, shape (tokens,)
        Place of each token in its sequence. Tokens beyond the last sequence have none.
    angles : Tensor, float32, shape (longest, d / 2)
        By which rotary embedding turns the pairs of features of a head, for each place.
    """

    runs: Runs
    bounds: Tensor
    positions: Tensor
    angles: Tensor

    @cached_property
    def turns(self) -> Tensor:
        """Cosines, then sines, for each place, shape (longest, d)."""
        return torch.cat([self.angles.cos(), self.angles.sin()], 1)

    @cached_property
    def programs(self) -> Tensor:
        """Programs of `fused.attend`."""
        lengths = np.repeat(
            [length + 2 for _, length in self.runs], [count for count, _ in self.runs]
        )
        return to_device(fused.cut_programs(lengths), self.bounds.device)

    @cached_property
    def rotation(self) -> Tensor:
        """Complex numbers of size 1, for each token, shape (tokens, 1, 1, d / 2)."""
        turned = torch.polar(torch.ones_like(self.angles), self.angles)
        return turned[self.positions][:, None, None]


# From queries, keys and values of so many heads, shape (tokens, 3 * D), to (tokens, D).
Attention = Callable[[Tensor, int, Layout], Tensor]


def attend_natively(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attention by the compiled kernel; feature i of a head turns with i + d / 2."""
    return kernels.attend(qkv, layout.turns, layout.bounds, heads)


def attend(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Attention by dense views, on any device; feature 2 i of a head turns with 2 i + 1.

    Sequences of equal length lie next to each other, so each run is a dense view, and no result
    depends on a neighbour.
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
    """`attend` by one kernel of ours, in the dtype of `qkv`."""
    return fused.attend(qkv, heads, layout.bounds, layout.programs, layout.turns)


def _rotate(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """Queries and keys turned, values as they are, float32, shape (tokens, 3, heads, d)."""
    tokens = len(layout.positions)
    pairs = qkv[:tokens].to(torch.float32).view(tokens, 3, heads, -1, 2)
    torch.view_as_complex(pairs[:, :2]).mul_(layout.rotation)
    return pairs.flatten(-2)


def _filled_up(attended: Tensor, qkv: Tensor) -> Tensor:
    """With nothing for the tokens beyond the last sequence."""
    missing = len(qkv) - len(attended)
    # Where there are none, padding would copy all.
    return F.pad(attended, (0, 0, 0, missing)) if missing else attended


def describe_attention(attention: Attention) -> str:
    """``compiled``, ``triton``, ``varlen`` (one launch for all) or ``sdpa`` (for each length)."""
    if isinstance(attention, PackedKernel):
        return "varlen"
    names: dict[Attention, str] = {attend_natively: "compiled", attend_fused: "triton"}
    return names.get(attention, "sdpa")


def best_attention(device: torch.device, dtype: torch.dtype, features: int) -> Attention:
    """`attend`, or where it can serve a single kernel for sequences of any lengths.

    ``torch.nn.attention.varlen.varlen_attn`` is for GPUs and half precision, and new: its results
    are compared with `attend` before it is trusted.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
    features : int
        Of a head, d.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return attend
    try:
        kernel = PackedKernel(dtype)
        bounds = torch.tensor([0, 3, 6, 13], dtype=torch.int32, device=device)
        positions = torch.tensor([0, 1, 2, 0, 1, 2, *range(7)], device=device)
        angles = torch.linspace(0, 3, 7 * features // 2, device=device).view(7, -1)
        layout = Layout([(2, 1), (1, 5)], bounds, positions, angles)
        qkv = torch.linspace(-2, 2, 13 * 3 * 2 * features, device=device).sin().view(13, -1)
        with torch.inference_mode():
            found = kernel(qkv.clone(), 2, layout)
            expected = attend(qkv, 2, layout)
        return kernel if torch.allclose(found.float(), expected, atol=0.02) else attend
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):
        return attend


class PackedKernel:
    """`attend` by a single launch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        module = import_module("torch.nn.attention.varlen")
        self._varlen_attn: Callable[..., Any] = module.varlen_attn

    def __call__(self, qkv: Tensor, heads: int, layout: Layout) -> Tensor:
        """As `attend`, in the kernel's dtype."""
        longest = max(length for _, length in layout.runs) + 2
        query, key, value = _rotate(qkv, heads, layout).to(self._dtype).unbind(1)
        # The arguments that torch 2.10 to 2.13 have in common, by position.
        attended: Tensor = self._varlen_attn(
            query, key, value, layout.bounds, layout.bounds, longest, longest
        )
        return _filled_up(attended.flatten(-2), qkv)
