"""Compiled kernels for the CPU: attention, and what stands between two matrix products.

``kernels.cpp`` is built when the package is installed, where there is a compiler, for each kind of
processor that the machine's architecture has; the best that this processor can run is loaded here.
Without any, torch does the same, slower.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from virnuc_dask.config import Precision

# Features are a multiple of this, the widest vector that kernels are built for.
_LANES = 16
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
# Tokens or sequences that are worth another thread.
_ROWS_PER_THREAD = 8


class Integers(NamedTuple):
    """Rows of 8-bit integers: ``(values - 128) * scale``.

    Attributes
    ----------
    values : Tensor, uint8, shape (tokens, features)
    scale : Tensor, float32, shape (tokens,)
    """

    values: Tensor
    scale: Tensor


class Product(NamedTuple):
    """What a linear layer gives: ``values * scale + bias``, or without a scale the values.

    Attributes
    ----------
    values : Tensor, shape (tokens, features)
    scale : Tensor, float32, shape (tokens,), optional
    bias : Tensor, float32, shape (features,), optional
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def finished(self) -> Tensor:
        """The product itself."""
        if self.scale is None or self.bias is None:
            return self.values
        return torch.addcmul(self.bias, self.values, self.scale[:, None])


def attend(qkv: Product, turns: Tensor, bounds: Tensor, heads: int) -> Tensor:
    """Attention within sequences that lie end to end, queries and keys turned by rotary angles.

    Parameters
    ----------
    qkv : Product, float32 or bfloat16, shape (tokens, 3 * D)
        Queries, keys and values, of all heads each.
    turns : Tensor, float32, shape (longest, D / heads)
        For each position in a sequence the cosines of its angles, then the sines.
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, and the end.
    heads : int

    Returns
    -------
    Tensor, shape (tokens, D)
        Of the product's dtype.
    """
    tokens, features = qkv.values.shape[0], qkv.values.shape[1] // 3
    out = torch.empty(tokens, features, dtype=qkv.values.dtype)
    kind = _KINDS[qkv.values.dtype]
    _run("attend", len(bounds) - 1, kind, *qkv, turns, bounds, heads, features // heads, out)
    return out


def add_norm(
    x: Tensor, product: Product | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor | Integers:
    """Add a product to x, in place, and return x's layer norm.

    Parameters
    ----------
    x : Tensor, float32, shape (tokens, D)
    product : Product, float32 or bfloat16, optional
    weight, bias : Tensor, float32, shape (D,)
    eps : float
    dtype : torch.dtype
        Of the result: float32 or bfloat16, or uint8 for `Integers`.
    """
    tokens, features = x.shape
    out, scale = torch.empty(tokens, features, dtype=dtype), torch.empty(tokens)
    kind = _KINDS[product.values.dtype] if product else 0
    given = product or (None, None, None)
    norm = (weight, bias, ctypes.c_float(eps))
    _run("add_norm", tokens, x, kind, *given, *norm, features, _KINDS[dtype], out, scale)
    return Integers(out, scale) if dtype == torch.uint8 else out


def quantise(product: Product, *, gelu: bool) -> Integers:
    """A product of float32, or its GELU, as integers."""
    tokens, features = product.values.shape
    out = Integers(torch.empty(tokens, features, dtype=torch.uint8), torch.empty(tokens))
    _run("quantise", tokens, *product, int(gelu), features, *out)
    return out


def _run(name: str, rows: int, *arguments: Tensor | ctypes.c_float | int | None) -> None:
    """Call a kernel for all rows, in as many threads as torch has."""
    kernel = getattr(_library(), f"virnuc_{name}")
    # ctypes lets go of the interpreter's lock meanwhile.
    given = [
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument
        for argument in arguments
    ]
    threads = min(torch.get_num_threads(), rows // _ROWS_PER_THREAD)
    if threads > 1:
        ends = pairwise(rows * number // threads for number in range(threads + 1))
        failed = list(_pool().map(lambda part: kernel(*part, *given), ends))
    else:
        failed = [kernel(0, rows, *given)]
    if any(failed):
        raise MemoryError(f"no memory for {name}")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels for this processor, or None: they were not built, or not for it."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("generic",))
    for name in names:
        try:
            return ctypes.CDLL(str(Path(__file__).with_name(f"_kernels_{name}.so")))
        except OSError:  # it is not there, or of another architecture
            continue
    return None


def serve(device: torch.device, precision: Precision, features: int) -> bool:
    """Whether there are kernels for a network of so many features."""
    fits = features % _LANES == 0 and precision != "float16"
    return device.type == "cpu" and fits and _library() is not None
