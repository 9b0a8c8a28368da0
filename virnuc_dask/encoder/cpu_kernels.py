"""Compiled kernels for the CPU: attention, and the work between two matrix products.

``cpu_kernels.cpp`` is compiled when the package is installed, if there is a compiler, for each kind
of processor of the machine's architecture. This module loads the best library that the processor
can run. Without one, torch does the same work, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from virnuc_dask.settings import Precision

# The number of features must be a multiple of this, the widest vector of all builds.
_LANES = 16
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
# Tokens that justify another thread.
_ROWS_PER_THREAD = 8


def attend(qkv: Tensor, turns: Tensor, bounds: Tensor, heads: int) -> Tensor:
    """Attention within concatenated sequences, with rotary embedding of queries and keys.

    Parameters
    ----------
    qkv : Tensor, float32 or bfloat16, shape (tokens, 3 * D)
        Queries, keys and values of all heads.
    turns : Tensor, float32, shape (longest, D / heads)
        For each position in a sequence the cosines of its angles, then the sines.
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, then the end of the last sequence.
    heads : int

    Returns
    -------
    Tensor, shape (tokens, D)
        In the dtype of `qkv`. Zero for padding after the last sequence.
    """
    tokens, features = qkv.shape[0], qkv.shape[1] // 3
    out = qkv.new_empty(tokens, features)
    out[int(bounds[-1]) :] = 0
    work = bounds.diff().to(torch.float64).square()  # for each sequence
    kind = _KINDS[qkv.dtype]
    _run("attend", work, kind, qkv, turns, bounds, heads, features // heads, out)
    return out


def add_norm(
    x: Tensor, product: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add a product to x, in place, and return x's layer norm.

    Parameters
    ----------
    x : Tensor, float32, shape (tokens, D)
    product : Tensor, float32 or bfloat16, shape (tokens, D), optional
    weight, bias : Tensor, float32, shape (D,)
    eps : float
    dtype : torch.dtype
        Dtype of the result: float32 or bfloat16.
    """
    tokens, features = x.shape
    out = x.new_empty(tokens, features, dtype=dtype)
    kind = 0 if product is None else _KINDS[product.dtype]
    norm = (weight, bias, ctypes.c_float(eps))
    _run("add_norm", tokens, x, kind, product, *norm, features, _KINDS[dtype], out)
    return out


def _run(name: str, work: int | Tensor, *arguments: Tensor | ctypes.c_float | int | None) -> None:
    """Call a kernel for all rows, in as many threads as torch has.

    Parameters
    ----------
    name : str
    work : int or Tensor, shape (rows,)
        Number of rows, or the cost of each row if costs differ.
    arguments
        Arguments of the kernel after its first two, the first row and the end.
    """
    kernel = getattr(_library(), f"virnuc_{name}")

    def call(first: int, last: int) -> int:
        # Made in each thread: it keeps the tensors alive even if its caller is interrupted.
        values = (_address(item) if isinstance(item, Tensor) else item for item in arguments)
        return int(kernel(first, last, *values))

    threads = torch.get_num_threads()
    if isinstance(work, int):
        rows, threads = work, min(threads, work // _ROWS_PER_THREAD)
        ends = [rows * number // threads for number in range(1, threads)] if threads else []
    else:
        rows, sums = len(work), work.cumsum(0)
        shares = sums[-1:] * torch.arange(1, threads, device=work.device) / threads
        ends = torch.searchsorted(sums, shares).tolist()
    # ctypes releases the interpreter's lock during the call.
    failed = _pool().map(call, [0, *ends], [*ends, rows]) if ends else [call(0, rows)]
    if any(list(failed)):
        raise MemoryError(f"not enough memory for the kernel {name}")


def _address(tensor: Tensor) -> ctypes.c_void_p:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("kernels need dense tensors in the CPU's memory")
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels for this processor, or None if none were built for it."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("generic",))
    for name in names:
        if library := load(Path(__file__).with_name(f"_kernels_{name}.so")):
            return library
    return None


def load(path: Path) -> ctypes.CDLL | None:
    """Load a library. None if it is missing or was built from another ``cpu_kernels.cpp``."""
    try:
        library = ctypes.CDLL(str(path))
        built_from = (ctypes.c_char * 65).in_dll(library, "virnuc_source").value.decode()
        source = Path(__file__).with_suffix(".cpp").read_bytes()
    except (OSError, ValueError):
        return None
    return library if built_from == hashlib.sha256(source).hexdigest() else None


def is_usable(device: torch.device, precision: Precision, features: int) -> bool:
    """Whether there are kernels for a network with this number of features."""
    fits = features % _LANES == 0 and precision != "float16"
    return device.type == "cpu" and fits and _library() is not None
