"""Linear layers at several precisions: oneDNN's fused kernels on a CPU, torch's own elsewhere.

Weights are packed once for oneDNN, which then adds the bias and takes the exact (erf) GELU while a
product is still in cache. These operators are private to torch, so they are tried when a
layer is built, and `torch.nn.functional.linear` stands in where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask import fused, kernels
from virnuc_dask.config import Precision
from virnuc_dask.kernels import Integers, Product

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Tokens that weights are packed for; any other number gives the same result.
_PACKED_TOKENS = 2048
# A token or a feature of zeros has a scale all the same.
_TINY = 1e-30


class Linear:
    """``x W^T + b`` by torch itself, in the weight's dtype.

    Parameters
    ----------
    weight : Tensor, shape (out, in)
    bias : Tensor, shape (out,)
    gelu : callable
        Exact GELU of a product, which it may overwrite.

    Attributes
    ----------
    takes : torch.dtype
        Of an input that needs no conversion; uint8 stands for `Integers`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gelu: Callable[..., Tensor] = F.gelu) -> None:
        self._weight, self._bias, self.takes = weight, bias, weight.dtype
        self._gelu = gelu

    def __call__(self, x: Tensor | Integers) -> Product:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        return Product(F.linear(self._converted(x), self._weight, self._bias))

    def gelu(self, x: Tensor | Integers) -> Tensor | Integers:
        """GELU of the product."""
        return self._gelu(self(x).values)

    def _converted(self, x: Tensor | Integers) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("8-bit integers are for layers of them")
        return x.to(self.takes)


class OneDnnLinear(Linear):
    """The same by oneDNN, float32 or bfloat16, with GELU fused into it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_TOKENS)
        super().__init__(packed, bias)
        self.takes = weight.dtype

    def __call__(self, x: Tensor | Integers) -> Product:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        return Product(self._apply(x, "none"))

    def gelu(self, x: Tensor | Integers) -> Tensor:
        """GELU of the product."""
        return self._apply(x, "gelu")

    def _apply(self, x: Tensor | Integers, function: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            self._converted(x), self._weight, self._bias, function, [], "none"
        )
        return product


class Int8Linear(Linear):
    """Products of 8-bit integers: weights scaled per output feature, activations per token.

    A scale that spanned the batch would let a token's neighbours change its result.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        scale = weight.abs().amax(1).clamp_min(_TINY) / 127
        integers = (weight / scale[:, None]).round()
        self._scale, self._zero = scale, torch.zeros(len(scale), dtype=torch.int64)
        self._offset = torch.full((weight.shape[1],), 128.5)
        self._fused = _has_onednn_int8()
        # Both this layer's input and its output are rows that the kernels must fit.
        self._kernels = all(kernels.serve(weight.device, "int8", n) for n in weight.shape)
        super().__init__(_pack_int8(integers) if self._fused else integers, bias)
        self.takes = torch.uint8

    def __call__(self, x: Tensor | Integers) -> Product:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        x8, scale = self._quantise(x) if isinstance(x, Tensor) else x
        if self._fused:
            product = _int8_product(x8, self._weight, self._scale, self._zero)
        else:
            signed = x8.to(torch.float32) - 128
            product = F.linear(signed, self._weight).mul_(self._scale)
        return Product(product, scale, self._bias)

    def gelu(self, x: Tensor | Integers) -> Tensor | Integers:
        """GELU of the product."""
        product = self(x)
        if self._kernels:
            return kernels.quantise(product, gelu=True)
        return F.gelu(product.finished())

    def _quantise(self, x: Tensor) -> Integers:
        if self._kernels:
            return kernels.quantise(Product(x), gelu=False)
        largest = torch.maximum(x.amax(1), -x.amin(1))
        scale = largest.clamp_min_(_TINY).div_(127)
        # Truncated x / scale + 128.5: rounded, and 128 is zero. oneDNN multiplies unsigned
        # integers by signed ones quickly, and signed by signed a thousand times slower; from
        # float32 torch converts fast to 16 bits, and slowly to unsigned 8.
        shifted = torch.addcmul(self._offset, x, scale.reciprocal()[:, None])
        return Integers(shifted.to(torch.int16).to(torch.uint8), scale)


def make_linear(
    weight: Tensor, bias: Tensor, precision: Precision, *, is_fused: bool = False
) -> Linear:
    """The fastest layer that this processor has for a precision.

    Parameters
    ----------
    weight : Tensor, float32, shape (out, in)
    bias : Tensor, float32, shape (out,)
    precision : {'float32', 'bfloat16', 'float16', 'int8'}
        The device must have it (`config.precision_on`).
    is_fused : bool
        Whether `fused.serve` says so.
    """
    if precision == "int8":
        return Int8Linear(weight, bias)
    dtype = DTYPES[precision]
    weight, bias = weight.to(dtype), bias.to(dtype)
    if is_fused:
        return Linear(weight, bias, fused.gelu)
    kind = OneDnnLinear if weight.device.type == "cpu" and _has_onednn(dtype) else Linear
    return kind(weight, bias)


@cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's fused layers."""
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        layer = OneDnnLinear(ones, ones[0])
        return bool((layer(ones).values == 17).all() and (layer.gelu(ones) == 17).all())
    except (AttributeError, RuntimeError, TypeError):  # other names or signatures: not ours
        return False


@cache
def _has_onednn_int8() -> bool:
    # At the ends of the range: processors without VNNI saturate.
    size, end = 64, 127
    try:
        packed = _pack_int8(torch.full((size, size), -float(end)))
        x = torch.full((size, size), 128 + end, dtype=torch.uint8)
        zero = torch.zeros(size, dtype=torch.int64)
        product = _int8_product(x, packed, torch.ones(size), zero)
        return bool((product == -size * end * end).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _pack_int8(integers: Tensor) -> Tensor:
    shape = [_PACKED_TOKENS, integers.shape[1]]
    packed: Tensor = torch.ops.onednn.qlinear_prepack(integers.to(torch.int8), shape)
    return packed


def _int8_product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``(x - 128) W^T scale``, float32, from x as unsigned and W as packed signed integers."""
    float32: Any = torch.float32
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, scale, zero, None, 1.0, 0, float32, "none", [], ""
    )
    return product
