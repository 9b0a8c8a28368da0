"""Estimate the cost of a run before it starts, and list the available models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

from virnuc_dask.encoder.fair_esm import fair_esm
from virnuc_dask.encoder.models import (
    PUBLISHED,
    Estimate,
    costliest,
    model_spec,
    operations,
    parameters,
)
from virnuc_dask.encoder.weight_files import published_part, weights_at_hand
from virnuc_dask.encoder.weights import Checkpoint, describe, known_sha256, load_checkpoint
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.inputs.reader import read_blocks
from virnuc_dask.inputs.records import Block, InputSummary
from virnuc_dask.runtime import events
from virnuc_dask.runtime.prepare import (
    Inputs,
    check_device,
    check_input,
    encoded_residues,
    identity_of,
    input_read,
    listed,
    rows_per_chunk,
)
from virnuc_dask.settings import (
    AUTO,
    DEMO,
    RANDOM_WEIGHTS,
    LongPolicy,
    ModelSpec,
    Settings,
    precision_on,
)
from virnuc_dask.text import counted, duration, printable, share

# Residues to encode for measuring the speed: a second or two with a small model.
_TRIAL_RESIDUES = 2**14
# Share of the speed of a matrix product that a model reaches, and the protein length of the
# estimate.
_NETWORK_SHARE, _TYPICAL_RESIDUES = 0.8, 300
# How each value of `--long` treats long rows.
_MADE_OF_LONG: dict[LongPolicy, str] = {
    "truncate": "embedded, truncated to that length",
    "window": "embedded in windows",
    "skip": "quarantined as too_long",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Cost of a run.

    Attributes
    ----------
    input : InputRead
    model : ModelSpec
        Has no digest if the weights are not on this machine.
    device : str
    longest, median : int
        Residues.
    long_records : int
        Rows longer than `max_residues`.
    encoded_residues : int
        Residues that would go through the encoder.
    chunks, rows_per_chunk : int
    largest_chunk : int
        Residues to encode in the chunk with the most of them.
    embedding_bytes : int
        Before compression, which saves little on embeddings.
    sequence_bytes : int
        Residues, before compression.
    residue_embedding_bytes : int
        Embeddings of single residues, before compression.
    residues_per_s : float
        Speed of one worker.
    is_measured : bool
        Whether the speed was measured on a sample. It is estimated from the model's size if the
        weights are not on this machine, the device is not a CPU, or nothing is to be encoded.
    workers : int
        Number of workers assumed in the estimate.
    without_row : list of str
        Identifiers of the nucleotide records that give no row.
    long : {'truncate', 'window', 'skip'}
        How rows longer than `max_residues` are treated.
    max_residues : int
    """

    input: events.InputRead
    model: ModelSpec
    device: str
    longest: int
    median: int
    long_records: int
    encoded_residues: int
    chunks: int
    rows_per_chunk: int
    largest_chunk: int
    embedding_bytes: int
    sequence_bytes: int
    residue_embedding_bytes: int
    residues_per_s: float
    is_measured: bool
    workers: int
    without_row: list[str]
    long: LongPolicy
    max_residues: int

    @property
    def seconds(self) -> float:
        """Estimated seconds of the run, with all workers."""
        return self.encoded_residues / (self.residues_per_s * self.workers)

    @property
    def chunk_seconds(self) -> float:
        """Estimated seconds of the largest chunk: the most work that a killed worker loses."""
        return self.largest_chunk / self.residues_per_s

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        seconds = {"seconds": self.seconds, "chunk_seconds": self.chunk_seconds}
        return asdict(self) | self.model.comment() | seconds

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the plan for people, as (name, value)."""
        yield "model", printable(self.model.described(self.device), 1000)
        if self.input.reads:
            yield "records", f"{self.input.reads:,} ({self.input.nucleotides:,} nucleotides)"
            yield "without frame", counted(self.input.without_row, "record")
            if self.input.tiled:
                yield "frames", f"{self.input.tiled:,}"
        else:
            yield "records", f"{self.input.tiled or self.input.records:,}"
        yield "rows", f"{self.input.records:,}"
        yield "residues", f"{self.input.residues:,} (median {self.median:,}, most {self.longest:,})"
        if self.input.empty or self.input.invalid:
            of = "tiles of records: " if self.input.tiled else ""
            yield "quarantined", f"{of}{self.input.invalid:,} invalid, {self.input.empty:,} empty"
        long = f"{self.long_records:,} of more than {self.max_residues:,} residues"
        left_out = share(self.input.residues_left_out, self.input.residues)
        without = f", without {left_out} of all residues" if self.input.residues_left_out else ""
        how = f"; {_MADE_OF_LONG[self.long]}{without}" if self.long_records else ""
        yield "long rows", long + how
        yield "to encode", f"{self.encoded_residues:,} residues"
        yield "chunks", f"{self.chunks:,} of {self.rows_per_chunk:,} rows"
        parts = (self.embedding_bytes, self.sequence_bytes, self.residue_embedding_bytes)
        size = sum(parts) / 1e6
        yield "store", f"about {size:,.1f} MB before compression"
        if not self.encoded_residues:
            yield "time", "none: no residues to encode"
            return
        how = (
            "measured with one thread and no other worker"
            if self.is_measured
            else "estimated from the model's size"
        )
        yield (
            "time",
            f"about {duration(self.seconds)} with {counted(self.workers, 'worker')}, and some"
            f" seconds to start ({self.residues_per_s:,.0f} residues/s each, {how})",
        )
        yield (
            "a chunk",
            f"up to about {duration(self.chunk_seconds)}: the most work that a killed worker loses",
        )


def plan(
    inputs: Inputs, settings: Settings, *, device: str = AUTO, workers: int | None = None
) -> Plan:
    """Read an input and estimate the cost of embedding it. Nothing is written.

    Parameters
    ----------
    inputs : path or sequence of path
    settings : Settings
    device : str
        Device of the workers; ``auto`` means ``cpu``.
    workers : int, optional
        Workers for the estimate; default: one per core on a CPU, one on another device.

    Raises
    ------
    InputError, ModelError
    UsageError
        fair-esm is not installed.
    """
    fair_esm()
    device = "cpu" if device == AUTO else device
    check_device(device)
    workers = workers or (CPU_COUNT if device == "cpu" else 1)
    summary = InputSummary()
    sample: Block | None = None
    files = listed(inputs)
    blocks = read_blocks(
        files,
        summary,
        strict=settings.strict,
        translation=settings.translation,
        tiling=settings.tiling,
    )
    for block in blocks:
        if sample is None and len(block.lengths):
            sample = _first_rows(block, _TRIAL_RESIDUES)
    check_input(settings, summary, files)
    lengths = summary.all_lengths()
    precision = precision_on(device, settings.precision)
    published = published_part(settings.model)
    rate: float | None = None
    if published is None or weights_at_hand(published):
        checkpoint = load_checkpoint(settings.model)
        model = describe(checkpoint, precision, settings.repr_layer, settings.pooling, hashed=False)
        model = replace(model, weights_sha256=known_sha256(checkpoint))
        if sample and device == "cpu":
            rate = _trial(checkpoint, model, settings, sample)
    else:
        size = PUBLISHED[published]
        layer, pooling = settings.repr_layer, settings.pooling
        model = model_spec(settings.model, size.layers, size.dimension, precision, layer, pooling)
    dimension, encoded = model.dimension, encoded_residues(settings, lengths)
    estimate = Estimate.of(model, device, encoded.mean())
    rows = rows_per_chunk(settings, model, summary, device, workers)
    width = 4 if settings.dtype == "float32" else 2
    kept = encoded_lengths(lengths, settings.max_residues, settings.long)
    return Plan(
        input=input_read(settings, summary),
        model=model,
        device=device,
        longest=int(lengths.max()),
        median=int(np.median(lengths)),
        long_records=int((lengths > settings.max_residues).sum()),
        encoded_residues=int(encoded.sum()),
        chunks=-(-summary.records // rows),
        rows_per_chunk=rows,
        largest_chunk=costliest(encoded, rows),
        embedding_bytes=summary.records * dimension * width,
        sequence_bytes=summary.residues,
        residue_embedding_bytes=int(kept.sum()) * dimension * 2 if settings.per_residue else 0,
        residues_per_s=rate or estimate.residues_per_s,
        is_measured=rate is not None,
        workers=workers,
        without_row=summary.without_row,
        long=settings.long,
        max_residues=settings.max_residues,
    )


def _first_rows(block: Block, residues: int) -> Block:
    """Take the first rows of a block with about this many residues, at least one row."""
    rows = max(1, int(np.searchsorted(np.cumsum(block.lengths), residues)))
    lengths = block.lengths[:rows]
    return Block(block.ids[:rows], lengths, block.residues[: int(lengths.sum())])


def _trial(
    checkpoint: Checkpoint, model: ModelSpec, settings: Settings, block: Block
) -> float | None:
    """Residues per second of one worker with one thread; None if there is nothing to encode."""
    import torch

    from virnuc_dask.encoder.encoder import Encoder
    from virnuc_dask.runtime.embed import embed_rows

    encoded = int(encoded_residues(settings, block.lengths).sum())
    if not encoded:
        return None
    encoder = Encoder(checkpoint, model)
    identity = identity_of(settings, model, InputSummary(), len(block.lengths))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        embed_rows(encoder, block.lengths, block.residues, identity)
        return encoded / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def model_choices() -> str:
    """Describe the models, and the highest speed of each on this machine; takes about a second."""
    import torch

    rates = [CPU_COUNT * _products_per_s("cpu")]
    where = f"with {counted(CPU_COUNT, 'core')}"
    with suppress(RuntimeError):  # the GPU is used by others or broken
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            rates.append(count * _products_per_s("cuda"))
            where += f", and with --cluster local-cuda on {counted(count, 'GPU')}"
    lines = [
        "which model? --model takes one of these names, a path, or demo",
        "",
        f"  {'name':<20} {'parameters':>10} {'layers':>6} {'dimension':>9} {'download':>9}"
        f" {'residues/s':>10}",
    ]
    for name, model in PUBLISHED.items():
        size = parameters(model.layers, model.dimension)
        work = operations(model.layers, model.dimension, _TYPICAL_RESIDUES)
        lines.append(
            f"  {name:<20} {_rounded(size):>10} {model.layers:>6} {model.dimension:>9}"
            f" {_rounded(1e6 * model.megabytes):>8}B"
            + "".join(f" {_NETWORK_SHARE * rate / work:>10,.0f}" for rate in rates)
        )
    lines += [
        f"  {'PATH':<20} a .pt file or a directory in Hugging Face's layout; also a",
        f"  {'':<20} fine-tuned model or a LoRA adapter",
        f"  {DEMO:<20} {RANDOM_WEIGHTS}",
        "",
        f"residues/s: upper limit for proteins of {_TYPICAL_RESIDUES} residues, on this machine"
        f" {where}:",
        f"{_NETWORK_SHARE:.0%} of the speed of matrix products on one of them, times their number",
    ]
    return "\n".join(lines)


def _products_per_s(device: str) -> float:
    """Measure the floating-point operations per second of matrix products on one core or GPU."""
    import torch

    size, dtype = (8192, torch.float16) if device == "cuda" else (1024, torch.float32)
    factors = torch.ones(2, size, size, dtype=dtype, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            float((factors[0] @ factors[1])[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best


def _rounded(number: float) -> str:
    """Write a large number with a unit: 650 M, 2.8 G."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            digits = 1 if number < 10 * size else 0
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f} "
