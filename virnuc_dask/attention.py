"""Attention within each of several sequences that lie end to end: no padding, no mask."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Runs = list[tuple[int, int]]
Attention = Callable[[Tensor, Runs, Tensor], Tensor]


def attend(qkv: Tensor, runs: Runs, bounds: Tensor) -> Tensor:
    """Attention by dense views, on any device.

    Sequences of equal length lie next to each other, so each run is a dense view, and no result
    depends on a neighbour.

    Parameters
    ----------
    qkv : Tensor, shape (tokens, 3, H, d)
        Queries, keys and values of H heads.
    runs : list of (count, length)
        Sequences in order; each has two tokens more than residues.
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, and the end. Not used here; see `best_attention`.

    Returns
    -------
    Tensor, shape (tokens, H * d)
    """
    outputs, first = [], 0
    for count, length in runs:
        tokens = count * (length + 2)
        run = qkv[first : first + tokens].view(count, length + 2, *qkv.shape[1:])
        query, key, value = run.permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value)
        outputs.append(output.transpose(1, 2).reshape(tokens, -1))
        first += tokens
    return torch.cat(outputs)


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
        runs = [(2, 1), (1, 5)]
        bounds = torch.tensor([0, 3, 6, 13], dtype=torch.int32, device=device)
        qkv = torch.linspace(-2, 2, 13 * 3 * 2 * features, device=device).sin()
        qkv = qkv.view(13, 3, 2, features)
        with torch.inference_mode():
            found, expected = kernel(qkv, runs, bounds), attend(qkv, runs, bounds)
        return kernel if torch.allclose(found.float(), expected, atol=0.02) else attend
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):
        return attend


class PackedKernel:
    """`attend` by a single launch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        module = import_module("torch.nn.attention.varlen")
        self._varlen_attn: Callable[..., Any] = module.varlen_attn

    def __call__(self, qkv: Tensor, runs: Runs, bounds: Tensor) -> Tensor:
        """As `attend`, in the kernel's dtype."""
        longest = max(length for _, length in runs) + 2
        query, key, value = qkv.to(self._dtype).unbind(1)
        # The arguments that torch 2.10 to 2.13 have in common, by position.
        attended: Tensor = self._varlen_attn(query, key, value, bounds, bounds, longest, longest)
        return attended.flatten(-2)
