"""What happens when the device's memory runs out, for a limit or because others have it.

An encoder halves its batches and goes on; only a sequence that does not fit even alone is refused.
A dry run has no allocator with a limit: there `torch.OutOfMemoryError` is raised for batches above
a number of tokens, and the tables say so.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_sections.report import Options, Report, run_section
from tests.support.models import random_network, random_sequences, save_network
from virnuc_dask.encoder.encoder import Encoder, load_encoder
from virnuc_dask.runtime.failures import is_sticky

Rows = NDArray[np.float32]

# Layers, features, heads: ESM-2 650M, of which 4 layers fill as much memory as 33 do.
SHAPE, DRY_SHAPE = (4, 1280, 20), (2, 64, 4)
SEQUENCES, DRY_SEQUENCES = 2000, 40
# What the neighbour leaves of the free memory.
LEFT_BYTES = 3 * 2**30
# Batches of other sizes round otherwise.
LOWEST_COSINE = 0.9999

# A process that has most of the card. It says what it holds, and ends with its input.
NEIGHBOUR = """
import sys, torch
held = []
for line in sys.stdin:
    left = int(line)
    step = 2**28
    while step >= 2**21:
        free = torch.cuda.mem_get_info()[0]
        if free - left < step:
            step //= 2
            continue
        try:
            held.append(torch.empty(step, dtype=torch.uint8, device="cuda"))
        except RuntimeError:
            step //= 2
    print(sum(block.numel() for block in held) >> 20, flush=True)
"""


def main(report: Report, options: Options) -> None:
    """A limit of this process's own, then a neighbour; raise unless all is recovered."""
    with ExitStack() as stack:
        # Its imports take as long as ours.
        neighbour = stack.enter_context(_Neighbour()) if options.device == "cuda" else None
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shape = DRY_SHAPE if options.dry_run else SHAPE
        path = save_network(random_network(*shape), Path(folder, "model.pt"))
        rows = _Rows(report, options)
        encoder = _load(path, options)
        first = encoder.token_budget
        peak = rows.undisturbed(encoder)

        encoder.token_budget = first
        with _limit(encoder, peak // 4, options):
            rows.add("a limit of a quarter of the peak", encoder, SMALLER)
        rows.add("no limit any more", encoder, AS_BEFORE)

        encoder.token_budget = first
        with ExitStack() as crowded:
            left = min(LEFT_BYTES, max(2**30, peak // 3))
            crowded.enter_context(_crowd(encoder, neighbour, left, 600))
            what = f"a neighbour leaves {left >> 20:,} MiB" if neighbour else "a neighbour"
            is_short = options.dry_run or left < peak / 2
            rows.add(f"{what}, loaded before", encoder, SMALLER if is_short else EITHER)
            rows.add(f"{what}, loaded beside it", _load(path, options), EITHER)
            crowded.enter_context(_crowd(encoder, neighbour, 0, 0))
            error = rows.add("it leaves nothing, 20 sequences", encoder, ANY_OUTCOME, 20)
        if neighbour:
            neighbour.end()
        if error is not None and is_sticky(error):
            report.note("The neighbour left this process of no use: a worker is started anew then.")
        else:
            rows.add("the neighbour has ended", encoder, AS_BEFORE)
        rows.add("the neighbour has ended, in a new process", Anew(path, options), AS_BEFORE)
        report.figure("tokens a batch at first", first)
        report.figure("tokens a batch in the end", encoder.token_budget)
    if rows.problems:
        raise AssertionError("; ".join(rows.problems))


# What must become of an encoder's batches, and whether it may raise MemoryError.
SMALLER, AS_BEFORE, EITHER, ANY_OUTCOME = "smaller", "as before", "either", "any outcome"


class _Rows:
    """The section's table, and what in it is not as it must be."""

    def __init__(self, report: Report, options: Options) -> None:
        self._report, self._options = report, options
        self._add = report.table(
            "Memory that runs out" + (" (the errors are injected)" if options.dry_run else ""),
            *("what", "outcome", "tokens a batch before", "after", "free MiB"),
            *("largest difference, relative", "lowest cosine"),
        )
        self.problems: list[str] = []
        count = DRY_SEQUENCES if options.dry_run else SEQUENCES
        lengths = np.random.default_rng(0).integers(100, 301, count)
        self._sequences = random_sequences(lengths.tolist())
        self._expected: Rows = np.empty((0, 0), np.float32)

    def undisturbed(self, encoder: Encoder) -> int:
        """Encode what all others are compared with; bytes that it takes beside the weights."""
        peak = 0
        if self._options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            peak = -torch.cuda.memory_reserved()
        self._expected = encoder.encode(self._sequences)
        if self._options.device == "cuda":
            peak += torch.cuda.max_memory_reserved()
            self._report.figure("peak of an undisturbed run beside the weights, MiB", peak >> 20)
        if not np.isfinite(self._expected).all():
            self.problems.append("undisturbed: not all values are finite")
        return peak

    def add(
        self, what: str, encoder: Encoder | Anew, batches: str, count: int | None = None
    ) -> Exception | None:
        """Encode and write down what came of it; returns what was raised."""
        if self._options.left() < 2:
            self.problems.append(f"{what}: no time was left")
            return None
        before, free = encoder.token_budget, None
        if self._options.device == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] >> 20
        try:
            found = encoder.encode(self._sequences[:count])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._add(what, text, before, encoder.token_budget, free, "", "")
            is_expected = isinstance(error, MemoryError) or is_sticky(error)
            if not (batches == ANY_OUTCOME and is_expected):
                self.problems.append(f"{what}: {text}")
            return error
        difference, cosine = _compare(found, self._expected[:count])
        after = encoder.token_budget
        self._add(what, "encoded", before, after, free, difference, f"{cosine:.7f}")
        if not np.isfinite(found).all() or not cosine > LOWEST_COSINE:
            self.problems.append(f"{what}: lowest cosine {cosine}")
        if batches in {SMALLER, AS_BEFORE} and (after < before) != (batches == SMALLER):
            self.problems.append(f"{what}: batches of {before} tokens before, {after} after")
        return None


class Anew:
    """An encoder that lives in a process of its own, for one call."""

    def __init__(self, path: str, options: Options) -> None:
        self._path, self._options = path, options
        self.token_budget = 0

    def encode(self, sequences: list[str]) -> Rows:
        """Rows, by a process that starts now."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_encode_anew, self._path, self._options, sequences).result()


def _encode_anew(path: str, options: Options, sequences: list[str]) -> Rows:
    return _load(path, options).encode(sequences)


class _Neighbour:
    """A process of its own that takes memory when it is told to."""

    def __enter__(self) -> _Neighbour:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def leave(self, free: int) -> None:
        """Let it take all but so many bytes of what is free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{free}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the neighbour ended; the log has its message")

    def end(self) -> None:
        """End it, and wait until its memory is free."""
        occupied = torch.cuda.mem_get_info()[0]
        self._process.kill()
        self._process.wait()
        until = time.monotonic() + 5
        while torch.cuda.mem_get_info()[0] < occupied + 2**30 and time.monotonic() < until:
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _load(path: str, options: Options) -> Encoder:
    return load_encoder(path, options.device, "float32" if options.dry_run else "bfloat16")


@contextmanager
def _limit(encoder: Encoder, free: int, options: Options) -> Iterator[None]:
    """With so many bytes for this process, beside what it holds anyway."""
    if options.device != "cuda":
        with _injected(encoder, 600):
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _crowd(
    encoder: Encoder, neighbour: _Neighbour | None, free: int, tokens: int
) -> Iterator[None]:
    """With a neighbour that leaves so much, until it is ended.

    In a dry run: with batches of so many tokens at most.
    """
    if neighbour is None:
        with _injected(encoder, tokens):
            yield
        return
    torch.cuda.empty_cache()
    neighbour.leave(free)
    yield


@contextmanager
def _injected(encoder: Encoder, tokens: int) -> Iterator[None]:
    """Let the network say of each batch above so many tokens that it does not fit."""
    network: Any = encoder._network
    represent = network.represent

    def limited(residues: Any, starts: Any, runs: Any) -> Any:
        if sum(count * (length + 2) for count, length in runs) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return represent(residues, starts, runs)

    network.represent = limited
    try:
        yield
    finally:
        network.represent = represent


def _compare(found: Rows, expected: Rows) -> tuple[float, float]:
    """Largest difference relative to a row's norm, and the lowest cosine."""
    norms = np.linalg.norm(expected, axis=1)
    largest = float((np.abs(found - expected).max(1) / norms).max())
    cosines = (found * expected).sum(1) / (norms * np.linalg.norm(found, axis=1))
    return largest, float(cosines.min())


if __name__ == "__main__":
    run_section(main)
