"""Each kind of work of a layer by itself, in ms: ours, and what else could do it.

    python -m benchmarks.gpu_sections.kernels --seconds 60 --report kernels.json

Shapes are those of one batch: 65,536 tokens of ESM-2 650M, and of 3B. Attention is measured for
sequences of different lengths and for all tiles that one might choose, which is how
`virnuc_dask.encoder.gpu_kernels.TILE` was chosen.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.gpu_sections.report import Options, Report, run_section
from benchmarks.gpu_sections.runs import DeviceWatch
from virnuc_dask.encoder import gpu_kernels
from virnuc_dask.encoder.attention import Layout, PackedKernel, attend
from virnuc_dask.encoder.gpu_kernels import Tile

# Tokens of the shortest and the longest sequence; None: lengths of proteins.
LENGTHS = {
    "33 to 64": (33, 64),
    "65 to 96": (65, 96),
    "97 to 128": (97, 128),
    "proteins": None,
    "1,024": (1024, 1024),
}
CHOICES = [
    *(Tile(64, 64, 4, 1), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    *(Tile(128, 64, 8, 1), Tile(128, 32, 4, 2), Tile(128, 128, 8, 1)),
]


def main(report: Report, options: Options) -> None:
    """The products, what is elementwise, attention."""
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # the only way on a CPU
    device = torch.device(options.device)
    shapes = {"tiny": (64, 4)} if options.dry_run else {"650M": (1280, 20), "3B": (2560, 40)}
    tokens = 300 if options.dry_run else 2**16
    with torch.inference_mode():
        measure_products(report, device, shapes, tokens, seconds=0.1 if options.dry_run else 0.6)
        try:
            problem = gpu_kernels.differs(device, torch.float16, 64, 4)
        except Exception as error:
            if not options.dry_run:
                raise
            # There may be no Triton, and the interpreter of 3.6 lacks loops of unknown length.
            report.note(f"Triton's interpreter: {type(error).__name__}: {error}")
            return
        report.figure("what differs", problem)
        measure_elementwise(report, device, shapes, tokens)
        add = report.table("Attention of a layer", "model", "tokens of a sequence", "by", "ms")
        for model, (features, heads) in shapes.items():
            for name, lengths in LENGTHS.items():
                if options.left() < 3:
                    report.note(f"attention, {model}, {name}: no time is left")
                elif not options.dry_run or name in ("33 to 64", "proteins"):
                    case = (device, random_lengths(lengths, tokens), features, heads)
                    for by, ms in attention(*case, all_tiles=model in ("650M", "tiny")):
                        add(model, name, by, ms)
    if problem:
        raise SystemExit(problem)


def measure_products(
    report: Report,
    device: torch.device,
    shapes: dict[str, tuple[int, int]],
    tokens: int,
    seconds: float,
) -> None:
    """Products of random bfloat16 matrices, each long enough for clocks to settle."""
    add = report.table("Products", "model", "which", "ms", "TFLOP/s", "W", "MHz")
    size = 8192 if device.type == "cuda" else 128
    sizes = [("", "square", size, size, size)]
    for model, (features, _) in shapes.items():
        for name, out, into in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            sizes.append((model, name, tokens, out * features, into * features))
    for model, name, rows, out, into in sizes:
        x = torch.randn(rows, into, device=device, dtype=torch.bfloat16)
        weight = torch.randn(out, into, device=device, dtype=torch.bfloat16) / into**0.5
        bias = weight[:, 0].contiguous()
        with DeviceWatch() as watch:
            ms = milliseconds(lambda x=x, w=weight, b=bias: F.linear(x, w, b), device, seconds)
        half = watch.samples[len(watch.samples) // 2 :]
        add(
            model,
            f"{name}, {rows} x {out} x {into}",
            f"{ms:.3f}",
            f"{2 * rows * out * into / ms / 1e9:,.4g}",
            mean_of([sample.power for sample in half]),
            mean_of([sample.clock for sample in half]),
        )


def mean_of(values: Sequence[float]) -> str:
    """Their mean; some cards say 0 of what they do not measure."""
    return f"{np.mean(values):,.0f}" if any(values) else "-"


def measure_elementwise(
    report: Report, device: torch.device, shapes: dict[str, tuple[int, int]], tokens: int
) -> None:
    """What each pass over memory takes, and which bandwidth that is."""
    add = report.table("Elementwise work", "model", "which", "by", "ms", "GB/s")
    for model, (features, _) in shapes.items():
        x = torch.randn(tokens, features, device=device)
        half = x.to(torch.float16 if device.type == "cpu" else torch.bfloat16)
        wide = torch.randn(tokens, 4 * features, device=device).to(half.dtype)
        weight = torch.rand(features, device=device)
        x.zero_()  # which is added to again and again

        def plain(x: Tensor = x, half: Tensor = half, weight: Tensor = weight) -> None:
            x.add_(half)
            F.layer_norm(x, x.shape[1:], weight, weight).to(half.dtype)

        def ours(x: Tensor = x, half: Tensor = half, weight: Tensor = weight) -> None:
            gpu_kernels.add_norm(x, half, weight, weight, 1e-5, half.dtype)

        works: list[tuple[str, str, int, Callable[[], Any]]] = [
            ("add and norm", "torch", 12, plain),
            ("add and norm", "ours", 12, ours),
            ("GELU", "torch", 16, lambda wide=wide: F.gelu(wide)),
        ]
        for name, by, size, work in works:
            ms = milliseconds(work, device)
            add(model, name, by, f"{ms:.3f}", f"{size * features * tokens / ms / 1e6:,.0f}")
        for block in (2048, 4096, 8192):
            with patch("virnuc_dask.encoder.gpu_kernels.GELU_BLOCK", block):
                ms = milliseconds(lambda wide=wide: gpu_kernels.gelu(wide), device)
            rate = f"{16 * features * tokens / ms / 1e6:,.0f}"
            add(model, "GELU", f"ours, {block} a program", f"{ms:.3f}", rate)


def random_lengths(lengths: tuple[int, int] | None, tokens: int) -> list[int]:
    """Sorted lengths of sequences of about so many tokens."""
    random = np.random.default_rng(0)
    if lengths:
        found = random.integers(lengths[0], lengths[1] + 1, tokens // lengths[0] + 1)
    else:
        found = random.lognormal(math.log(300) - 0.245, 0.7, tokens).clip(20, 1022).astype(int) + 2
    return sorted(found[: max(2, int(np.searchsorted(found.cumsum(), tokens)))].tolist())


def attention(
    device: torch.device, lengths: list[int], features: int, heads: int, *, all_tiles: bool
) -> list[tuple[str, str]]:
    """Milliseconds by each way, rotary embedding included."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    values, counts = np.unique(lengths, return_counts=True)
    runs = [(int(n), int(v) - 2) for n, v in zip(counts, values, strict=True)]
    ends = np.cumsum(lengths)
    size = features // heads
    half = torch.arange(size // 2, device=device) / (size // 2)
    angles = torch.arange(max(lengths), device=device)[:, None] * 10_000**-half

    def layout() -> Layout:
        return Layout(
            runs,
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
            angles,
        )

    qkv = torch.randn(int(ends[-1]), 3 * features, device=device).to(dtype)
    found = []
    peers: dict[str, Callable[..., Tensor]] = {"torch: rotary, sdpa for each length": attend}
    if device.type == "cuda":
        peers["torch: rotary, varlen_attn"] = PackedKernel(dtype)
        kernel = PackedKernel(dtype)
        views = qkv.view(-1, 3, heads, size).unbind(1)
        bounds, longest = layout().bounds, max(lengths)
        alone = lambda: kernel._varlen_attn(*views, bounds, bounds, longest, longest)  # noqa: E731
        found.append(("torch: varlen_attn alone", f"{milliseconds(alone, device):.3f}"))
    for name, peer in peers.items():
        same = layout()
        ms = milliseconds(lambda peer=peer, same=same: peer(qkv, heads, same), device)
        found.append((name, f"{ms:.3f}"))
    for tile in CHOICES if all_tiles else [gpu_kernels.TILE]:
        with patch("virnuc_dask.encoder.gpu_kernels.TILE", tile):
            same = layout()
            case = (qkv, heads, same.bounds, same.programs, same.turns)
            try:
                ms = milliseconds(lambda case=case: gpu_kernels.attend(*case), device)
            except Exception as error:  # a tile that does not fit into shared memory
                found.append((f"ours, {tuple(tile)}", type(error).__name__))
                continue
        found.append((f"ours, {tuple(tile)}", f"{ms:.3f}"))
    return found


def milliseconds(work: Callable[[], Any], device: torch.device, seconds: float = 0.03) -> float:
    """Median of as many calls as fill so many seconds, after some that do not count."""
    if device.type == "cpu":
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    for _ in range(3):
        work()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 10:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(marks)]
    return median(times)


if __name__ == "__main__":
    run_section(main)
