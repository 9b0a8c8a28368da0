"""How fast the encoder is on a GPU, beside its peers, and which kernels take the time.

    python -m benchmarks.gpu_sections.speed --seconds 140 --report speed.json

Every engine gets the same sequences, as many as it can do in some seconds, and gives the mean over
residues of each. The weights are random, which cost the same as trained ones. Ours is called as a
worker calls it: three threads, chunks of about 2^17 residues, from letters to rows on the host;
store and network are left out. It computes in float16, as a run does on a GPU. *Unfused* is the
same encoder without the kernels of `virnuc_dask.encoder.gpu_kernels`.

The peers have their weights in bfloat16. *fair-esm* is the loop of its `scripts/extract.py`
without writing, *HF* Hugging Face's `EsmModel` with sdpa on the same batches of 4,096 tokens, and
*HF, 65,536* the same model as one who knows GPUs would call it: tokens by a table, large batches of
nearly equal lengths, means on the device, one copy at the end.
"""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import log2
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from esm.data import Alphabet
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.encoder import SHAPES, flop, padded_batches, random_sequences
from benchmarks.gpu_sections.report import Options, Report, run_section
from tests.support.models import checkpoint_data, random_network
from virnuc_dask.encoder.encoder import Encoder
from virnuc_dask.encoder.packing import Segments, cut_segments
from virnuc_dask.encoder.weights import Checkpoint
from virnuc_dask.settings import ModelSpec, Precision

Rows = NDArray[np.float32]
Encode = Callable[[list[str]], Rows]
OURS, BFLOAT16, UNFUSED, FAIR_ESM, HF, HF_LARGE = (
    "ours",
    "ours, bfloat16",
    "ours, unfused",
    "fair-esm",
    "HF",
    "HF, 65,536",
)
PEERS = (FAIR_ESM, HF, HF_LARGE)
# Threads of a worker, longest sequence, and seconds that are kept for the profiles.
THREADS, MAX_RESIDUES, PROFILES_S = 3, 1022, 14.0
# For a dry run, in place of 650M and 3B.
DRY_SHAPES = {"tiny 64": (2, 64, 4), "tiny 128": (3, 128, 8)}
# Which kind of work a kernel does: the first pattern that its name matches.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|attend|softmax",
    "matrix products": r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|sm\d\d_|matmul|linear|mm$",
    "casts and copies": r"memcpy|memset|copy|catarray|pad|aten::(cat|to|fill_|zero_)",
    "pooling": r"reduce_kernel|aten::(mean|sum)",
    # The last one: Triton's kernels have plain names.
    "norms, rotary, elementwise": r"norm|elementwise|gelu|gather|index|triton|aten::|^\w+$",
}


def main(report: Report, options: Options) -> None:
    """Measure in order of importance: ours, then the peers, then the kernels."""
    if options.dry_run:
        SHAPES.update(DRY_SHAPES)
    small, large = DRY_SHAPES if options.dry_run else ("650M", "3B")
    logging.getLogger("virnuc_dask").addHandler(Notes(report))
    bench = Bench(report, options)
    bench.attempt("rates of the device", bench.measure_device)
    workloads = [(small, "reads"), (large, "reads"), (small, "proteins"), (large, "proteins")]
    for model, lengths in workloads:
        bench.attempt(f"ours, {model} {lengths}", bench.measure_ours, model, lengths)
    bench.measure_peers(workloads)
    for model, lengths in workloads[:3]:
        bench.attempt(f"profile, {model} {lengths}", bench.profile, model, lengths)
    bench.attempt("rate of the product afterwards", bench.measure_product, "afterwards")
    if bench.failed:
        raise SystemExit(f"failed: {'; '.join(bench.failed)}")


class Notes(logging.Handler):
    """What the package warns of, such as kernels that do not serve, goes into the report."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Make a note of it."""
        self._report.note(record.getMessage()[:2000])


class Bench:
    """What the measurements share.

    Parameters
    ----------
    report : Report
    options : Options

    Attributes
    ----------
    failed : list of str
        What raised.
    """

    def __init__(self, report: Report, options: Options) -> None:
        self.report, self.options = report, options
        self.failed: list[str] = []
        self._device = options.device
        self._product_rate = float("nan")
        self._models: dict[str, Model] = {}
        self._pools: dict[str, list[str]] = {}
        # Seconds that each measurement aims at, turns of ours, and seconds for the profiles.
        self._aim = 0.05 if self.options.dry_run else 3.0 * self.options.seconds / 140
        self._turns = 1 if self.options.dry_run else 2
        self._reserve = 0.0 if self.options.dry_run else PROFILES_S
        # By model and lengths, then by engine, one for each turn.
        self._rates: dict[str, dict[str, list[float]]] = {}
        self._add_rate = self.report.table(
            "Speed",
            "model, lengths",
            "engine",
            "turn",
            "seconds",
            "sequences/s",
            "tokens/s",
            "TFLOP/s",
            "of the product's rate",
            "GiB beside the weights",
            "remark",
        )

    @cached_property
    def _add_ratio(self) -> Callable[..., None]:
        return self.report.table(
            "Ratio to fair-esm", "model, lengths", "engine", "tokens/s", "ratio to fair-esm"
        )

    @cached_property
    def _add_kind(self) -> Callable[..., None]:
        return self.report.table(
            "Time by kind of kernel, one chunk",
            "model, lengths",
            "kind",
            "device ms",
            "calls",
            "share of device time",
            "share of wall time",
        )

    def attempt(
        self, what: str, step: Callable[..., Any], *arguments: Any, needs: float = 2.0
    ) -> Any:
        """A step's result, or None and a note: it raised, or no time is left for it."""
        if not self.options.dry_run and self.options.left() < needs:
            self.report.note(f"{what}: skipped, no time is left")
            return None
        try:
            return step(*arguments)
        except Exception as error:
            self.report.note(f"{what}: {type(error).__name__}: {error}"[:2000])
            self.failed.append(what)
        # Here, where the traceback no longer holds any tensor.
        release()
        return None

    # --- the device ---

    def measure_device(self) -> None:
        """Rates that bound all others."""
        self.measure_product("before")
        size = 2**31 if self._device == "cuda" else 2**24
        source, target = (torch.zeros(size // 4, device=self._device) for _ in range(2))
        seconds = median(seconds_of(lambda: target.copy_(source), 10, self._device))
        self.report.figure("copy_gb_per_s", round(2 * size / seconds / 1e9, 1))

    def measure_product(self, when: str) -> None:
        """FLOP/s of one large product of random matrices."""
        size = 8192 if self._device == "cuda" else 256
        a, b = (
            torch.randn(size, size, device=self._device, dtype=torch.bfloat16) for _ in range(2)
        )
        warm_until = time.monotonic() + (1.0 if self._device == "cuda" else 0.05)
        while time.monotonic() < warm_until:
            seconds_of(lambda: a @ b, 10, self._device)
        rate = 2 * size**3 / median(seconds_of(lambda: a @ b, 20, self._device))
        if when == "before":
            self._product_rate = rate
        self.report.figure(f"product_{size}_bfloat16_tflop_per_s_{when}", round(rate / 1e12, 4))

    # --- ours ---

    def measure_ours(self, model: str, lengths: str) -> None:
        """The encoder as it is and in other ways, turn by turn."""
        self._take_turns(model, lengths, self._model(model).encoders, turns=self._turns)
        rates = self._rates.get(f"{model} {lengths}", {}).get(OURS)
        if rates and lengths == "reads":
            frames = median(rates) / self._mean_tokens(lengths) * 3600
            self.report.figure(f"frames per hour {model} reads", round(frames))

    def _take_turns(
        self, model: str, lengths: str, encoders: dict[str, Encoder], turns: int
    ) -> None:
        rows = self._rows_per_chunk(lengths)
        chunks, per_chunk = 0, 0.0
        for name, encoder in list(encoders.items()):
            what = f"{name}, {model} {lengths}"
            seconds = self.attempt(f"{what}, warming up", self._warm_up, encoder, lengths, rows)
            if seconds is None:
                encoders = {n: e for n, e in encoders.items() if n != name}
            elif not chunks:  # all variants get as many
                chunks = min(64, max(2, round(self._aim / seconds)))
                per_chunk = seconds
        if not encoders:
            return
        sequences = self._sequences(lengths, chunks * rows)
        batches = [Chunk.of(part) for part in cut(sequences, rows)]
        for turn in range(1, turns + 1):
            for name, encoder in encoders.items():
                self.attempt(
                    f"{name}, {model} {lengths}, turn {turn}",
                    self._measure,
                    model,
                    lengths,
                    name,
                    sequences,
                    lambda encoder=encoder: encode_chunks(encoder, batches),
                    turn,
                    needs=1.2 * chunks * per_chunk + 1 + (self._reserve if turn > 1 else 0),
                )

    def _warm_up(self, encoder: Encoder, lengths: str, rows: int) -> float:
        """Seconds of one chunk, the second time."""
        sequences = self._sequences(lengths, rows)
        encode_chunks(encoder, [Chunk.of(sequences[: max(2, rows // 8)])])
        started = time.perf_counter()
        encode_chunks(encoder, [Chunk.of(sequences)])
        return time.perf_counter() - started

    # --- peers ---

    def measure_peers(self, workloads: list[tuple[str, str]]) -> None:
        """Each peer once on each kind of sequences, with what time the profiles leave."""
        left = len(workloads) * len(PEERS)
        for model, lengths in workloads:
            for name in PEERS:
                share = (self.options.left() - self._reserve) / left
                left -= 1
                what = f"{name}, {model} {lengths}"
                if share < (0 if self.options.dry_run else 1):
                    self.report.note(f"{what}: skipped, the time is kept for the profiles")
                    continue
                # Making the peer, a small piece first and the sequences take the other half.
                aim = min(self._aim, share / 2)
                self.attempt(what, self._measure_peer, model, lengths, name, aim)
            self._compare(f"{model} {lengths}")

    def _measure_peer(self, model: str, lengths: str, name: str, aim: float) -> None:
        encode = self._model(model).peer(name)
        tokens = 200 if self.options.dry_run else 2**16 if name == HF_LARGE else 2**14
        mean = self._mean_tokens(lengths)
        piece = self._sequences(lengths, max(2, round(tokens / mean)))
        encode(piece[: max(1, len(piece) // 2)])
        started = time.perf_counter()
        encode(piece)
        seconds = time.perf_counter() - started
        sequences = self._sequences(lengths, round(len(piece) * max(1.0, aim / seconds)))
        self._measure(model, lengths, name, sequences, lambda: encode(sequences), 1, encode)

    def _compare(self, workload: str) -> None:
        rates = self._rates.get(workload, {})
        if FAIR_ESM not in rates:
            return
        peer = median(rates[FAIR_ESM])
        for name, values in rates.items():
            ratio = median(values) / peer
            self._add_ratio(workload, name, f"{median(values):,.0f}", f"{ratio:.2f}")
            self.report.figure(f"ratio_to_fair_esm {workload} {name}", round(ratio, 3))

    # --- one measurement ---

    def _measure(
        self,
        model: str,
        lengths: str,
        name: str,
        sequences: list[str],
        work: Callable[[], Rows],
        turn: int,
        peer: Any = None,
    ) -> None:
        workload, on_gpu = f"{model} {lengths}", self._device == "cuda"
        held = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        started = time.perf_counter()
        rows = work()
        seconds = time.perf_counter() - started
        peak = f"{(torch.cuda.max_memory_allocated() - held) / 2**30:.2f}" if on_gpu else "-"
        tokens = sum(len(sequence) + 2 for sequence in sequences)
        speed = flop(model, sequences) / seconds
        rates = self._rates.setdefault(workload, {}).setdefault(name, [])
        rates.append(tokens / seconds)
        converter = getattr(peer, "converter_s", None)
        self._add_rate(
            workload,
            name,
            turn,
            f"{seconds:.2f}",
            f"{len(sequences) / seconds:,.1f}",
            f"{tokens / seconds:,.0f}",
            f"{speed / 1e12:,.4g}",
            f"{speed / self._product_rate:.1%}",
            peak,
            f"batch converter {converter / seconds:.0%} of it" if converter else "",
        )
        self.report.figure(f"tokens_per_s {workload} {name}", round(median(rates)))
        if not np.isfinite(rows).all():
            raise ValueError(f"{(~np.isfinite(rows)).any(axis=1).sum()} rows are not finite")

    def _model(self, name: str) -> Model:
        """A model on the device, made at the first call, with its encoders."""
        if name not in self._models:
            model = self._models[name] = Model(name, self._device)
            _ = model.network
            # Without one of them nothing can be compared with it, but the others are worth it.
            half: Precision = "float16" if self._device == "cuda" else "float32"
            variants: list[tuple[str, Precision, bool]] = [
                (OURS, half, True),
                (BFLOAT16, "bfloat16", True),
                (UNFUSED, half, False),
            ]
            for variant in variants:
                what = f"{variant[0]}, {name}, making it"
                self.attempt(what, self._add_variant, model, *variant)
        return self._models[name]

    def _add_variant(self, model: Model, variant: str, precision: Precision, fused: bool) -> None:
        encoder = model.encoders[variant] = model.encoder(precision, fused=fused)
        self.report.figure(
            f"encoder {model.name} {variant}",
            {
                "backends": encoder.backends,
                "token_budget": encoder.token_budget,
            },
        )

    def _sequences(self, lengths: str, count: int) -> list[str]:
        """The first so many of the sequences that all engines get."""
        pool = self._pools.get(lengths, [])
        while len(pool) < count:
            tokens = int(1.3 * count * (68.5 if lengths == "reads" else 302))
            pool = random_sequences(lengths, max(8000, tokens))
            if self.options.dry_run:  # most CPUs emulate bfloat16, slowly
                pool = [sequence[:80] for sequence in pool]
            self._pools[lengths] = pool
            count = min(count, len(pool))
        return pool[:count]

    def _mean_tokens(self, lengths: str) -> float:
        return float(np.mean([len(sequence) + 2 for sequence in self._sequences(lengths, 2000)]))

    def _rows_per_chunk(self, lengths: str) -> int:
        if self.options.dry_run:
            return 2
        sample = self._sequences(lengths, 2000)
        # About 2^17 residues, as in the tables of before.
        return int(2 ** round(log2(2**17 * len(sample) / sum(map(len, sample)))))

    # --- kernels ---

    def profile(self, model: str, lengths: str) -> None:
        """Which kernels one chunk takes, and how long the device is idle meanwhile."""
        encoders = self._model(model).encoders
        name, encoder = next(iter(encoders.items()))
        sequences = self._sequences(lengths, self._rows_per_chunk(lengths))
        small, chunk = (
            Chunk.of(part) for part in (sequences[: len(sequences) // 8 + 1], sequences)
        )
        on_gpu = self._device == "cuda"
        encode_chunks(encoder, [chunk])
        trace(lambda: encode_chunks(encoder, [small]), on_gpu)  # starting a profiler takes time
        events, wall_ms = trace(lambda: encode_chunks(encoder, [chunk]), on_gpu)
        kernels = sum_by_name(events)
        total = sum(ms for ms, _ in kernels.values())
        workload = f"{model} {lengths}, {name}"
        add_kernel = self.report.table(
            f"Kernels, {workload}", "kernel", "kind", "device ms", "calls", "share of device time"
        )
        by_kind: dict[str, tuple[float, int]] = {}
        ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
        for number, (kernel, (ms, calls)) in enumerate(ordered):
            kind = kind_of(kernel)
            sum_ms, sum_calls = by_kind.get(kind, (0.0, 0))
            by_kind[kind] = sum_ms + ms, sum_calls + calls
            if number < 15:
                add_kernel(kernel[:200], kind, f"{ms:.3f}", calls, f"{ms / total:.1%}")
        for kind, (ms, calls) in sorted(by_kind.items(), key=lambda item: -item[1][0]):
            cells = (f"{ms:.3f}", calls, f"{ms / total:.1%}", f"{ms / wall_ms:.1%}")
            self._add_kind(workload, kind, *cells)
            self.report.figure(f"share_of_device_time {workload} {kind}", round(ms / total, 4))
        if not on_gpu:
            self.report.note(f"{workload}: operators of a CPU, no device to be idle")
            return
        # Copies may overlap with kernels.
        busy = union_ms(events)
        span = max(event.stop for event in events) - min(event.start for event in events)
        for kind, idle, of in (
            ("idle, whole call", wall_ms - busy, wall_ms),
            ("idle, first kernel to last", span / 1e3 - busy, span / 1e3),
        ):
            self._add_kind(workload, kind, f"{idle:.3f}", "", "", f"{idle / of:.1%}")
            self.report.figure(f"{kind} {workload}", round(idle / of, 4))


# --- engines -------------------------------------------------------------------------------------


@dataclass
class Model:
    """A model with random weights, bfloat16 on the device, and all engines that have them.

    Attributes
    ----------
    name : str
        Of `SHAPES`.
    device : str
    encoders : dict of str to Encoder
        This package's variants.
    """

    name: str
    device: str
    encoders: dict[str, Encoder] = field(default_factory=dict)

    @cached_property
    def network(self) -> Any:
        """fair-esm's module, made where it stays: on a CPU 3B takes a minute."""
        with torch.device(self.device):
            return random_network(*SHAPES[self.name]).bfloat16()

    def encoder(self, precision: Precision, *, fused: bool = True) -> Encoder:
        """The encoder of this package, with the same weights."""
        layers, dimension, _ = SHAPES[self.name]
        # Nobody compares the digest, and to make one takes minutes.
        spec = ModelSpec(self.name, "0" * 64, dimension, layers, "mean", precision)
        checkpoint = Checkpoint(self.name, checkpoint_data(self.network))
        release()
        gate = (
            nullcontext()
            if fused
            else patch("virnuc_dask.encoder.gpu_kernels.is_usable", lambda *_, **__: False)
        )
        with torch.device(self.device), gate:
            encoder = Encoder(checkpoint, spec, self.device)
        release()
        return encoder

    def peer(self, name: str) -> Encode:
        """A peer by its name."""
        if name == FAIR_ESM:
            return SmallBatches(self._fair_esm, self.device)
        if name == HF:
            return SmallBatches(self._hugging_face, self.device)
        return LargeBatches(
            self._hugging_face, self.device, 1000 if self.device == "cpu" else 2**16
        )

    def _fair_esm(self, tokens: Tensor) -> Tensor:
        last = self.network.num_layers
        output = self.network(tokens, repr_layers=[last], return_contacts=False)
        hidden: Tensor = output["representations"][last]
        return hidden

    def _hugging_face(self, tokens: Tensor) -> Tensor:
        output = self._esm_model(input_ids=tokens, attention_mask=(tokens != 1).long())
        hidden: Tensor = output.last_hidden_state
        return hidden

    @cached_property
    def _esm_model(self) -> Any:
        from transformers import EsmConfig, EsmModel

        layers, dimension, heads = SHAPES[self.name]
        config = EsmConfig(
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=dimension,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * dimension,
            max_position_embeddings=1026,
            position_embedding_type="rotary",
            layer_norm_eps=1e-5,
            token_dropout=True,
            emb_layer_norm_before=False,
            attn_implementation="sdpa",
        )
        with torch.device(self.device):
            model = EsmModel(config, add_pooling_layer=False).bfloat16().eval()
        release()
        if model.config._attn_implementation != "sdpa":
            raise RuntimeError(f"attention by {model.config._attn_implementation}, not by sdpa")
        return model


class SmallBatches:
    """The loop of fair-esm's `scripts/extract.py`: 4,096 tokens at a time, means on the host.

    Parameters
    ----------
    forward : callable
        From padded tokens, shape (n, longest), to their representations, shape (n, longest, D).
    device : str

    Attributes
    ----------
    converter_s : float
        Seconds of the last call in which fair-esm made batches and tokens, on the host.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], device: str) -> None:
        self._forward, self._device = forward, device
        self.converter_s = 0.0

    def __call__(self, sequences: list[str]) -> Rows:
        """One row for each sequence, shape (n, D)."""
        rows: list[Rows] = [np.empty(0, np.float32)] * len(sequences)
        for labels, texts, tokens in self._batches(sequences):
            with torch.no_grad():
                hidden = self._forward(tokens.to(self._device)).to("cpu")
            for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
                rows[int(label)] = hidden[row, 1 : len(text) + 1].mean(0).float().numpy()
        return np.stack(rows)

    def _batches(self, sequences: list[str]) -> Iterator[tuple[list[str], list[str], Tensor]]:
        self.converter_s = 0.0
        batches = padded_batches(sequences)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.converter_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


class LargeBatches:
    """Padded batches as large as the device likes, means on the device.

    Parameters
    ----------
    forward : callable
        As of `SmallBatches`.
    device : str
    budget : int
        Tokens of a batch, padding counted.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], device: str, budget: int) -> None:
        self._forward, self._device, self._budget = forward, device, budget
        alphabet = Alphabet.from_architecture("ESM-1b")
        self._special = alphabet.cls_idx, alphabet.eos_idx, alphabet.padding_idx
        self._token_of = np.zeros(256, np.int64)
        for token, index in alphabet.tok_to_idx.items():
            if len(token) == 1:
                self._token_of[ord(token)] = index

    def __call__(self, sequences: list[str]) -> Rows:
        """One row for each sequence, shape (n, D)."""
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        means = []
        first = 0
        with torch.no_grad():
            while first < len(order):
                count = max(1, self._budget // (len(sequences[order[first]]) + 2))
                chosen = [sequences[number] for number in order[first : first + count]]
                means.append(self._means(chosen))
                first += count
            found = torch.cat(means).cpu().numpy()
        rows = np.empty_like(found)
        rows[order] = found
        return rows

    def _means(self, sequences: list[str]) -> Tensor:
        bos, eos, padding = self._special
        lengths = np.array([len(sequence) for sequence in sequences])
        places = np.arange(lengths.max() + 2)
        inside = (places >= 1) & (places <= lengths[:, None])
        tokens = np.full(inside.shape, padding, np.int64)
        tokens[inside] = self._token_of[np.frombuffer("".join(sequences).encode(), np.uint8)]
        tokens[:, 0], tokens[np.arange(len(lengths)), lengths + 1] = bos, eos
        hidden = self._forward(torch.from_numpy(tokens).to(self._device))
        weights = torch.from_numpy(inside / lengths[:, None]).to(hidden)
        return torch.bmm(weights[:, None], hidden)[:, 0].float()


@dataclass(frozen=True)
class Chunk:
    """Rows as a task has them after it has read them.

    Attributes
    ----------
    residues : ndarray, uint8, shape (N,)
        ASCII, end to end.
    lengths : ndarray, int32, shape (n,)
    """

    residues: NDArray[np.uint8]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, sequences: list[str]) -> Chunk:
        """Of sequences."""
        residues = np.frombuffer("".join(sequences).encode("ascii"), np.uint8)
        return cls(residues, np.array([len(sequence) for sequence in sequences], np.int32))

    def segments(self) -> Segments:
        """What the encoder is to encode, as `virnuc_dask.runtime.embed` cuts it."""
        return cut_segments(self.lengths, MAX_RESIDUES, "truncate")


def encode_chunks(encoder: Encoder, chunks: list[Chunk]) -> Rows:
    """Embed chunks as a worker's threads do."""

    def encode(chunk: Chunk) -> Rows:
        encoded = encoder.encode_segments(chunk.residues, chunk.segments(), len(chunk.lengths))
        if not encoded.fits.all():
            raise MemoryError("a sequence does not fit into memory")
        return encoded.embedding

    if len(chunks) == 1:
        return encode(chunks[0])
    with ThreadPoolExecutor(THREADS) as threads:
        return np.concatenate(list(threads.map(encode, chunks)))


def cut(sequences: list[str], rows: int) -> Iterator[list[str]]:
    """Parts of so many sequences."""
    for first in range(0, len(sequences), rows):
        yield sequences[first : first + rows]


def release() -> None:
    """Free what nobody holds: an encoder's batches are as large as the memory that is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- clocks and traces ---------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], times: int, device: str) -> list[float]:
    """Seconds of each of several calls, by the device's own clock where there is one."""
    if device == "cpu":
        stamps = [time.perf_counter()]
        for _ in range(times):
            work()
            stamps.append(time.perf_counter())
        return [stop - start for start, stop in pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy of a trace; times in microseconds."""

    name: str
    start: float
    stop: float
    own: float


def trace(work: Callable[[], Any], on_gpu: bool) -> tuple[list[Kernel], float]:
    """What a device does during a call, and the call's milliseconds.

    On a CPU the operators, each without those that it calls.
    """
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    choices = [[ProfilerActivity.CPU]]
    if on_gpu:  # alone if that works: recording operators too slows the host down
        choices = [[ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA]]
    for activities in choices:
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            wall_ms = 1e3 * (time.perf_counter() - started)
        kernels = []
        for event in profiler.events() or []:
            if event.device_type == kind and not getattr(event, "is_user_annotation", False):
                span = event.time_range
                own = span.elapsed_us() if on_gpu else event.self_cpu_time_total
                kernels.append(Kernel(event.name, span.start, span.end, own))
        if kernels:
            return kernels, wall_ms
    raise RuntimeError("the profiler has recorded nothing")


def sum_by_name(kernels: list[Kernel]) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls."""
    sums: dict[str, tuple[float, int]] = {}
    for kernel in kernels:
        ms, calls = sums.get(kernel.name, (0.0, 0))
        sums[kernel.name] = ms + kernel.own / 1e3, calls + 1
    return sums


def union_ms(kernels: list[Kernel]) -> float:
    """Milliseconds in which at least one of them runs."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((kernel.start, kernel.stop) for kernel in kernels):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3


def kind_of(kernel: str) -> str:
    """Which kind of work a kernel does, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "other"


if __name__ == "__main__":
    run_section(main)
