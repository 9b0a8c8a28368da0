"""Linear layers at several precisions: oneDNN's fused kernels on a CPU, torch's own elsewhere.

Weights are packed once for oneDNN, which then adds the bias and applies the exact (erf) GELU while
a product is still in cache. These operators are private to torch, so they are tried when a layer is
built. Where they are missing, `torch.nn.functional.linear` is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask.encoder import gpu_kernels
from virnuc_dask.settings import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Number of tokens that weights are packed for. Other numbers give the same result.
_PACKED_TOKENS = 2048


class Linear:
    """``x W^T + b`` by torch itself, in the weight's dtype.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
    bias : Tensor, shape (out,)
    gelu : callable
        Exact GELU of a product. It may overwrite the product.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gelu: Callable[..., Tensor] = F.gelu) -> None:
        self._weight, self._bias, self._gelu = weight, bias, gelu

    def __call__(self, x: Tensor) -> Tensor:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product."""
        return self._gelu(self(x))


class OneDnnLinear(Linear):
    """The same layer by oneDNN, in float32 or bfloat16, with GELU fused into it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_TOKENS)
        super().__init__(packed, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        return self._apply(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product."""
        return self._apply(x, "gelu")

    def _apply(self, x: Tensor, function: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._weight.dtype), self._weight, self._bias, function, [], "none"
        )
        return product


def make_linear(
    weight: Tensor, bias: Tensor, precision: Precision, *, is_fused: bool = False
) -> Linear:
    """The fastest layer for a precision on this processor.

    Parameters
    ----------
    weight : Tensor, float32, shape (out, in)
    bias : Tensor, float32, shape (out,)
    precision : {'float32', 'bfloat16', 'float16'}
        The device must support it (`settings.precision_on`).
    is_fused : bool
        Whether to use `gpu_kernels.gelu`. `gpu_kernels.is_usable` decides.
    """
    dtype = DTYPES[precision]
    weight, bias = weight.to(dtype), bias.to(dtype)
    if is_fused:
        return Linear(weight, bias, gpu_kernels.gelu)
    kind = OneDnnLinear if weight.device.type == "cpu" and _has_onednn(dtype) else Linear
    return kind(weight, bias)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's fused layers."""
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        layer = OneDnnLinear(ones, ones[0])
        return bool((layer(ones) == 17).all() and (layer.gelu(ones) == 17).all())
    except (AttributeError, RuntimeError, TypeError):  # torch changed names or signatures
        return False
