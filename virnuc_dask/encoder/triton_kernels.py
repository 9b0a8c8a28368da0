"""Triton kernels for the work between the matrix products of a layer. `gpu_kernels` calls them.

torch's builds for CUDA include Triton. Its interpreter runs the same kernels on a CPU, so they are
tested without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x,
    product,
    weight,
    bias,
    out,
    eps,
    adds: tl.constexpr,
    features: tl.constexpr,
    block: tl.constexpr,
):
    """Add a row of the product to x, in place, and store the row's layer norm in `out`."""
    column = tl.arange(0, block)
    inside = column < features
    at = tl.program_id(0).to(tl.int64) * features + column
    values = tl.load(x + at, mask=inside, other=0.0)
    if adds:
        values += tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, values, mask=inside)
    mean = tl.sum(values, 0) / features
    centred = tl.where(inside, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / features
    scale = tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0)
    normed = centred * tl.rsqrt(variance + eps) * scale + shift
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu(x, count, block: tl.constexpr):
    """GELU by the error function, in place.

    erf is formula 7.1.26 of Abramowitz and Stegun, with an absolute error below 1.5e-7.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    size = tl.abs(value) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = 1.061405429 * t - 1.453152027
    series = series * t + 1.421413741
    series = series * t - 0.284496736
    series = (series * t + 0.254829592) * t
    tail = 0.5 * series * tl.exp(-size * size)
    result = value * tl.where(value < 0, tail, 1.0 - tail)
    tl.store(x + at, result.to(x.dtype.element_ty), mask=at < count)


@triton.jit
def attend(
    qkv,
    out,
    bounds,
    programs,
    turns,
    scale,
    heads: tl.constexpr,
    features: tl.constexpr,
    pairs: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
):
    """Attention of some queries of one sequence in one head, with rotary embedding.

    `programs` has a sequence and a first query for each program. `pairs` is a power of two, at
    least the number of pairs of neighbouring features in a head. Additional pairs are zeros.
    """
    sequence = tl.load(programs + 2 * tl.program_id(0))
    first = tl.load(programs + 2 * tl.program_id(0) + 1)
    start = tl.load(bounds + sequence).to(tl.int64)
    length = (tl.load(bounds + sequence + 1) - start).to(tl.int32)
    column = tl.arange(0, 2 * pairs)
    of_head = (column < features)[None, :]
    head = qkv + start * (3 * heads * features) + tl.program_id(1) * features + column[None, :]

    query = first + tl.arange(0, queries)
    asks = (query < length)[:, None]
    q = tl.load(head + query[:, None] * (3 * heads * features), mask=asks & of_head, other=0.0)
    q_even, q_odd = _turn(q, query, asks, turns, features, pairs, queries)
    highest = tl.full((queries,), float("-inf"), tl.float32)
    total = tl.zeros((queries,), tl.float32)
    mixed = tl.zeros((queries, 2 * pairs), tl.float32)
    for begin in range(0, length, keys):
        key = begin + tl.arange(0, keys)
        answers = (key < length)[:, None]
        at = head + key[:, None] * (3 * heads * features)
        k = tl.load(at + heads * features, mask=answers & of_head, other=0.0)
        v = tl.load(at + 2 * heads * features, mask=answers & of_head, other=0.0)
        k_even, k_odd = _turn(k, key, answers, turns, features, pairs, keys)
        scores = tl.dot(q_even, tl.trans(k_even))
        scores = tl.dot(q_odd, tl.trans(k_odd), scores) * scale
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrinks = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrinks + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrinks[:, None])
        highest = higher
    to = out + (start + query)[:, None] * (heads * features)
    to += tl.program_id(1) * features + column[None, :]
    tl.store(to, (mixed / total[:, None]).to(out.dtype.element_ty), mask=asks & of_head)


@triton.jit
def _turn(
    values,
    position,
    inside,
    turns,
    features: tl.constexpr,
    pairs: tl.constexpr,
    rows: tl.constexpr,
):
    """The even and the odd features of some rows after rotary embedding."""
    pair = tl.arange(0, pairs)[None, :]
    used = inside & (pair < features // 2)
    at = turns + position[:, None] * features + pair
    cosine = tl.load(at, mask=used, other=0.0)
    sine = tl.load(at + features // 2, mask=used, other=0.0)
    even, odd = tl.split(tl.reshape(values.to(tl.float32), (rows, pairs, 2)))
    turned = even * cosine - odd * sine, even * sine + odd * cosine
    return turned[0].to(values.dtype), turned[1].to(values.dtype)
