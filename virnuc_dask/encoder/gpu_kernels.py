"""Triton kernels for the work between the matrix products of a layer on a GPU.

Twice per layer, a residual add, layer norm and conversion take one pass over memory, 12 D bytes per
token. Attention reads queries, keys and values once, applies rotary embedding on the way, and
writes its result, 8 D. GELU works in place, 16 D. So a layer moves 48 D bytes per token outside its
matrix products. torch's own operations move about 124 D.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from virnuc_dask.encoder.memory import is_out_of_memory

_log = logging.getLogger(__name__)
# Values per program of GELU.
GELU_BLOCK = 4096


class Tile(NamedTuple):
    """How attention is cut into programs.

    Attributes
    ----------
    queries : int
        Queries per program, all of one sequence.
    keys : int
        Keys that a program loads at a time.
    warps, stages : int
        Warps per program, and stages of its pipeline of copies.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# On an H200 the fastest for reads and proteins, or within 3 % of it (benchmarks/RESULTS.md). It is
# the same for all lengths, so that no row depends on the rest of its batch.
TILE = Tile(64, 64, 4, 1)


def add_norm(
    x: Tensor, product: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add a product to x, in place, and return x's layer norm.

    Parameters
    ----------
    x : Tensor, float32, shape (tokens, D)
    product : Tensor, shape (tokens, D), optional
    weight, bias : Tensor, float32, shape (D,)
    eps : float
    dtype : torch.dtype
        Dtype of the result.
    """
    _require_dense(x, weight, bias, *([] if product is None else [product]))
    tokens, features = x.shape
    out = torch.empty_like(x, dtype=dtype)
    block = _power_of_two(features)
    _kernels().add_norm[(tokens,)](
        x,
        x if product is None else product,
        weight,
        bias,
        out,
        eps,
        adds=product is not None,
        features=features,
        block=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def gelu(x: Tensor) -> Tensor:
    """Exact (erf) GELU of a dense tensor in half precision, in place."""
    _require_dense(x)
    count = x.numel()
    _kernels().gelu[(-(-count // GELU_BLOCK),)](x, count, block=GELU_BLOCK)
    return x


def attend(qkv: Tensor, heads: int, bounds: Tensor, programs: Tensor, turns: Tensor) -> Tensor:
    """Attention within concatenated sequences, with rotary embedding of queries and keys.

    Parameters
    ----------
    qkv : Tensor, bfloat16 or float16, shape (tokens, 3 * D)
        Queries, keys and values of all heads. Rotation pairs feature 2 i of a head with 2 i + 1.
    heads : int
    bounds : Tensor, int32, shape (sequences + 1,)
        First token of each sequence, then the end of the last sequence.
    programs : Tensor, int32, shape (programs, 2)
        See `cut_programs`.
    turns : Tensor, float32, shape (longest, d)
        For each position in a sequence the cosines of its angles, then the sines.

    Returns
    -------
    Tensor, shape (tokens, D)
        Undefined for padding after the last sequence.
    """
    _require_dense(qkv, bounds, programs, turns)
    if len(turns) * qkv.shape[1] >= 2**31:  # offsets within a sequence are 32-bit
        raise ValueError(f"a sequence of {len(turns):,} tokens is too long for attention on a GPU")
    features = qkv.shape[1] // 3 // heads
    out = torch.empty_like(qkv[:, : heads * features])
    _kernels().attend[(len(programs), heads)](
        qkv,
        out,
        bounds,
        programs,
        turns,
        # The kernel uses exp2 instead of exp.
        math.log2(math.e) / math.sqrt(features),
        heads=heads,
        features=features,
        # A matrix unit needs at least 16.
        pairs=max(16, _power_of_two(features // 2)),
        queries=TILE.queries,
        keys=TILE.keys,
        num_warps=TILE.warps,
        num_stages=TILE.stages,
    )
    return out


def cut_programs(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """Programs of `attend` for sequences sorted by length. The longest sequences come first.

    Parameters
    ----------
    lengths : ndarray, int64, shape (sequences,)
        Tokens per sequence.

    Returns
    -------
    ndarray, int32, shape (programs, 2)
        A sequence and its first query, for each program.
    """
    counts = -(-lengths // TILE.queries)
    begins = np.repeat(np.cumsum(counts) - counts, counts)
    first = (np.arange(len(begins)) - begins) * TILE.queries
    sequence = np.repeat(np.arange(len(lengths)), counts)
    return np.stack([sequence, first], 1)[::-1].astype(np.int32, order="C")


@cache
def is_usable(device: torch.device, dtype: torch.dtype, features: int, heads: int) -> bool:
    """Whether these kernels work on a device and agree with torch's own operations there.

    If not, the reason is logged once, and torch does the work.

    Raises
    ------
    RuntimeError
        The device is out of memory, or no longer usable.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return False
    try:
        problem = differs(device, dtype, features, heads)
    except Exception as error:  # no Triton, no C compiler, a cache that cannot be written, …
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise  # not a fault of the kernels, and it may not happen again
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _log.warning("without Triton kernels on %s, encoding is slower: %s", device, problem)
    return problem is None


def differs(device: torch.device, dtype: torch.dtype, features: int, heads: int) -> str | None:
    """Which kernel differs from torch in float32 by more than rounding, or None."""
    step, size = torch.finfo(dtype).eps, features // heads
    lengths = np.array([1, 3, 64, 65, 200])
    tokens = int(lengths.sum())

    def is_close(actual: Tensor, expected: Tensor, steps: float) -> bool:
        return torch.allclose(actual.float(), expected, rtol=steps * step, atol=steps * step)

    with torch.inference_mode():
        some = torch.arange(tokens * 3 * features, device=device, dtype=torch.float64)
        qkv = (some * some * 1e-3).sin().to(dtype).view(tokens, -1)
        x, weight, bias = qkv.float()[:, :features].contiguous(), *qkv.float()[:2, :features]
        product = qkv[:, -features:].contiguous()
        total = x + product
        expected = F.layer_norm(total, (features,), weight, bias, 1e-5)
        actual = add_norm(x, product, weight, bias, 1e-5, dtype)
        if not (torch.allclose(x, total) and is_close(actual, expected, 1)):
            return "residual and norm differ"
        if not is_close(gelu(4 * qkv), F.gelu(4 * qkv.float()), 1):
            return "GELU differs"
        half = torch.arange(size // 2, device=device) / (size // 2)
        angles = torch.arange(int(lengths.max()), device=device)[:, None] * 10_000**-half
        turns = torch.cat([angles.cos(), angles.sin()], 1)
        bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        programs = torch.from_numpy(cut_programs(lengths)).to(device)
        actual = attend(qkv, heads, bounds.to(device), programs, turns)
        if not is_close(actual, _attention(qkv, heads, lengths.tolist(), angles), 4):
            return "attention differs"
    return None


def _attention(qkv: Tensor, heads: int, lengths: list[int], angles: Tensor) -> Tensor:
    """Reference for `attend`: in float32, one sequence at a time."""
    outputs = []
    pairs = qkv.float().view(len(qkv), 3, heads, -1, 2)
    for part in torch.split(pairs, lengths):
        rotation = torch.polar(torch.ones_like(angles), angles)[: len(part), None, None]
        torch.view_as_complex(part[:, :2]).mul_(rotation)
        query, key, value = part.flatten(-2).permute(1, 2, 0, 3)
        output = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        outputs.append(output.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def _require_dense(*tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("kernels need dense tensors")


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


@cache
def _kernels() -> Any:
    # Triton loads slowly, and torch's builds for CPUs do not include it.
    from virnuc_dask.encoder import triton_kernels

    return triton_kernels
