"""ESM-2 encoders side by side, turn by turn in one run: this package's precisions and its peers.

    python -m benchmarks.encoder                       # CPU, one thread
    python -m benchmarks.encoder --device cuda --models 8M,650M,3B

Every engine gets the same sequences and gives the mean over residues of the last layer, with random
weights, which cost the same as trained ones. *fair-esm* is the loop of its `scripts/extract.py`
without writing. *HF* is Hugging Face's `EsmModel` with sdpa on the same padded batches, and
*esm-cpp* a C++ engine with weights of 8 bits; `pip install transformers esm-cpp` brings them.

Each has a process of its own, and they take turns. On a CPU time is processor time. FLOP
are 2 per parameter of the layers and token, and attention's; their share is of one layer of 2,048
features at the same precision. Prints Markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from esm.data import Alphabet, FastaBatchedDataset
from numpy.typing import NDArray

from tests.support.models import random_network, save_huggingface, save_network
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.linear import make_linear

Encode = Callable[[list[str]], NDArray[np.float32]]
# Layers, features and heads of the published models.
SHAPES = {
    "8M": (6, 320, 20),
    "35M": (12, 480, 20),
    "150M": (30, 640, 20),
    "650M": (33, 1280, 20),
    "3B": (36, 2560, 40),
}
# Tokens that a turn encodes, on a CPU; a GPU gets a hundred times as many.
TOKENS = {"8M": 16_000, "35M": 12_000, "150M": 8_000, "650M": 4_000, "3B": 2_000}
# As `virnuc_dask.runtime.local` starts its workers.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
PACKAGES = {"HF": "transformers", "esm-cpp int8": "esm_cpp"}
DISTRIBUTIONS = ("reads", "proteins")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="8M,35M,150M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the C++ engine and for child processes
    torch.set_num_threads(1)
    on_cpu = arguments.device == "cpu"
    ours = ["float32", "bfloat16", *([] if on_cpu else ["float16"])]
    hardware = processor() if on_cpu else torch.cuda.get_device_name()
    print(f"{hardware}, torch {torch.__version__}, {arguments.turns} turns.", end=" ")
    rates = {precision: layer_rate(precision, arguments.device) for precision in ours}
    print("One layer of 2,048 features reaches", end=" ")
    print(", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()) + ".")
    print(
        "\n| model, lengths | engine | sequences/s | tokens/s | ratio to fair-esm (range) | GFLOP/s"
        " | of a layer's | max abs | cosine | centred | peak MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    names = ["fair-esm", *(name for name, package in PACKAGES.items() if has(package)), *ours]
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models.split(","):
            weights = Path(folder, f"{model}.pt")
            network = random_network(*SHAPES[model])
            save_network(network, weights)
            save_huggingface(network, weights.with_suffix(""))
            for lengths in DISTRIBUTIONS:
                tokens = TOKENS[model] * (1 if on_cpu else 100)
                engines = [Engine(name, model, weights, arguments.device) for name in names]
                for line in compare(engines, model, lengths, tokens, arguments.turns, rates):
                    print(line, flush=True)


def compare(
    engines: list[Engine],
    model: str,
    lengths: str,
    tokens: int,
    turns: int,
    rates: dict[str, float],
) -> Iterator[str]:
    """One table row for each engine."""
    sequences = random_sequences(lengths, tokens)
    exact = sum(len(sequence) + 2 for sequence in sequences)
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    results: dict[str, NDArray[np.float32]] = {}
    for engine in engines:
        engine.encode(sequences[:8])
    for _ in range(turns):
        for engine in engines:
            spent, results[engine.name] = engine.encode(sequences)
            seconds[engine.name].append(spent)
    expected = results["fair-esm"]
    centre = expected.mean(axis=0)
    for engine in engines:
        name, times = engine.name, seconds[engine.name]
        ratios = [peer / own for peer, own in zip(seconds["fair-esm"], times, strict=True)]
        speed = flop(model, sequences) / median(times)
        found = results[name]
        cells = [
            f"{model} {lengths}",
            name,
            f"{len(sequences) / median(times):,.1f}",
            f"{exact / median(times):,.0f}",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{speed / 1e9:,.0f}",
            f"{speed / rates.get(name, rates['float32']):.0%}",
            f"{np.abs(found - expected).max():.1e}",
            f"{cosine(found, expected).min():.6f}",
            f"{cosine(found - centre, expected - centre).min():.5f}",
            f"{engine.finish():,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


# --- engines -------------------------------------------------------------------------------------


class Engine:
    """An engine in a process of its own, with the environment that it is run in.

    This package's workers have an allocator that keeps large blocks
    (`virnuc_dask.runtime.local`); the peers have the one that a user's shell gives them.
    """

    def __init__(self, name: str, model: str, weights: Path, device: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, model, weights, device))
        settings = {} if name in ("fair-esm", *PACKAGES) else MALLOC
        for variable in MALLOC:
            os.environ.pop(variable, None)
        os.environ.update(settings)
        self._process.start()

    def encode(self, sequences: list[str]) -> tuple[float, NDArray[np.float32]]:
        """Seconds, and rows."""
        self._pipe.send(sequences)
        answer: tuple[float, NDArray[np.float32]] = self._pipe.recv()
        return answer

    def finish(self) -> float:
        """Peak memory in MiB."""
        self._pipe.send(None)
        peak = float(self._pipe.recv())
        self._process.join()
        return peak


def _serve(pipe: Connection, name: str, model: str, weights: Path, device: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    encode = make(name, model, weights, device)
    while sequences := pipe.recv():
        started = now(device)
        rows = encode(sequences)
        pipe.send((now(device) - started, rows))
    if device == "cpu":
        # Not getrusage: its peak is that of the parent, if that was larger.
        status = Path("/proc/self/status").read_text()
        pipe.send(int(status.split("VmHWM:")[1].split()[0]) / 2**10)
    else:
        pipe.send(torch.cuda.max_memory_allocated() / 2**20)


def make(name: str, model: str, weights: Path, device: str) -> Encode:
    """An engine with its model in memory."""
    if name == "fair-esm":
        return fair_esm(model, device)
    if name == "HF":
        return hugging_face(weights.with_suffix(""), device)
    if name == "esm-cpp int8":
        return esm_cpp(weights.with_suffix(""))
    encoder = load_encoder(str(weights), device, name)  # type: ignore[arg-type]
    return encoder.encode


def fair_esm(model: str, device: str) -> Encode:
    """The loop of fair-esm's `scripts/extract.py`, with its defaults."""
    network = random_network(*SHAPES[model]).to(device)
    last = network.num_layers

    def encode(sequences: list[str]) -> NDArray[np.float32]:
        rows = np.empty((len(sequences), network.embed_dim), np.float32)
        for labels, texts, tokens in padded_batches(sequences):
            with torch.no_grad():
                output = network(tokens.to(device), repr_layers=[last], return_contacts=False)
            hidden = output["representations"][last].to("cpu")
            for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
                rows[int(label)] = hidden[row, 1 : len(text) + 1].mean(0).numpy()
        return rows

    return encode


def hugging_face(folder: Path, device: str) -> Encode:
    """Hugging Face's model with the same weights, on the same batches."""
    from transformers import EsmModel

    network = EsmModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
    network = network.eval().to(device)

    def encode(sequences: list[str]) -> NDArray[np.float32]:
        rows = np.empty((len(sequences), network.config.hidden_size), np.float32)
        for labels, texts, tokens in padded_batches(sequences):
            with torch.no_grad():
                tokens = tokens.to(device)
                output = network(input_ids=tokens, attention_mask=(tokens != 1).long())
            hidden = output.last_hidden_state.to("cpu")
            for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
                rows[int(label)] = hidden[row, 1 : len(text) + 1].mean(0).numpy()
        return rows

    return encode


def esm_cpp(folder: Path) -> Encode:
    """The C++ engine with weights of 8 bits, one sequence after the other, as its API has it."""
    from esm_cpp import Model, Tokenizer

    network = Model.load_from_safetensors(str(folder / "model.safetensors"))
    network.quantize_weights()
    tokenizer = Tokenizer()

    def encode(sequences: list[str]) -> NDArray[np.float32]:
        rows = np.empty((len(sequences), network.config.hidden_size), np.float32)
        for row, sequence in enumerate(sequences):
            tokens = np.array(tokenizer.encode(sequence), np.int32)
            _, hidden = network.forward_with_hidden_states(tokens)
            rows[row] = hidden[-1][1:-1].mean(0)
        return rows

    return encode


def has(package: str) -> bool:
    """Whether a peer is installed; says so if not."""
    found = find_spec(package) is not None
    if not found:
        print(f"(no {package}: left out)", file=sys.stderr)
    return found


def padded_batches(sequences: list[str]) -> Iterator[tuple[list[str], list[str], torch.Tensor]]:
    """fair-esm's own batches: sorted by length, 4,096 tokens."""
    data = FastaBatchedDataset([str(n) for n in range(len(sequences))], sequences)
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter(1022)
    for batch in data.get_batch_indices(4096, extra_toks_per_seq=1):
        yield convert([data[number] for number in batch])


# --- measuring -----------------------------------------------------------------------------------


def random_sequences(lengths: str, tokens: int) -> list[str]:
    """Sequences of about so many tokens: reads' frames of 33 to 100 residues, or proteins."""
    random = np.random.default_rng(0)
    if lengths == "reads":
        sizes = random.integers(33, 101, tokens)
    else:
        spread = 0.7
        mean = np.log(300) - spread**2 / 2
        sizes = random.lognormal(mean, spread, tokens).clip(20, 1022).astype(int)
    sizes = sizes[: max(8, int(np.searchsorted(np.cumsum(sizes + 2), tokens)))]
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    return ["".join(random.choice(letters, size)) for size in sizes]


def now(device: str) -> float:
    """Seconds of this process's processor, or once a GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def flop(model: str, sequences: list[str]) -> float:
    """Operations of the layers' matrix products and of attention, padding not counted."""
    layers, dimension, _ = SHAPES[model]
    lengths = np.array([len(sequence) + 2 for sequence in sequences], float)
    per_layer = 2 * 12 * dimension**2 * lengths.sum() + 4 * dimension * (lengths**2).sum()
    return float(layers * per_layer)


def layer_rate(precision: str, device: str) -> float:
    """FLOP/s of a large matrix product."""
    size = 2048
    x, weight = (torch.randn(size, size, device=device) for _ in range(2))
    layer = make_linear(weight, weight[0], precision)  # type: ignore[arg-type]
    times = []
    for _ in range(10):
        started = now(device)
        layer(x)
        times.append(now(device) - started)
    return float(2 * size**3 / min(times))


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Cosine of each row of one with the same row of the other, in float64."""
    a, b = a.astype(float), b.astype(float)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / norms)


def processor() -> str:
    """What the processor calls itself, and which of its instructions matter here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    flags = [flag for flag in ("avx512_bf16", "avx512_vnni", "amx_tile") if flag in text]
    return (
        f"{(names or [platform.machine()])[0]} ({', '.join(flags) or 'no'} extensions), one thread"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
