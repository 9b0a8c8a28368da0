"""How far each precision is from float32, and from fair-esm, on real weights and real sequences.

    python -m benchmarks.accuracy --model DIR [--device cuda] [--limit 300]

Random weights flatter every precision, for they have no outlier features; so this asks for a model.
The sequences are the examples' viral and other proteins of up to 500 residues, and the open frames
of reads of phage lambda. Rows are compared with those of our float32, which is compared with
fair-esm's own forward.

*Cosine* is that of a row and the same row in float32. *Centred* is the same after the mean of the
float32 rows is subtracted from both: without, unrelated proteins are alike at 0.9. *Neighbours* are
what matters downstream: the ten nearest other rows by centred cosine, and which share of those in
float32 they are, on average and for the worst row.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from Bio.SeqIO.FastaIO import SimpleFastaParser
from numpy.typing import NDArray

from benchmarks.encoder import cosine
from tests.support.models import upstream_mean, upstream_network
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.inputs.reader import read_blocks
from virnuc_dask.inputs.records import InputSummary
from virnuc_dask.settings import POOLINGS, Translation

EXAMPLES = Path(__file__).parents[1] / "examples"
PRECISIONS = {"cpu": ("bfloat16",), "cuda": ("float32", "bfloat16", "float16")}
NEIGHBOURS = 10

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far rows are from those that they should be.

    Attributes
    ----------
    largest : float
        Of any feature's difference.
    lowest, median : float
        Cosine.
    centred : float
        Lowest cosine once the mean row is subtracted.
    neighbours, worst : float
        Share of the nearest that are the same: on average, and of the worst row.
    """

    largest: float
    lowest: float
    median: float
    centred: float
    neighbours: float
    worst: float

    @classmethod
    def of(cls, found: Rows, expected: Rows) -> Deviation:
        """Compare rows, shape (n, D) each; n above `NEIGHBOURS`."""
        mean = expected.mean(0)
        plain = cosine(found, expected)
        shared = _shared(_nearest(found - mean), _nearest(expected - mean))
        return cls(
            float(np.abs(found - expected).max()),
            float(plain.min()),
            float(np.median(plain)),
            float(cosine(found - mean, expected - mean).min()),
            float(shared.mean()),
            float(shared.min()),
        )

    def cells(self) -> str:
        """As cells of a Markdown table."""
        return (
            f"{self.largest:.3g} | {self.lowest:.6f} | {self.median:.6f} | {self.centred:.6f} |"
            f" {self.neighbours:.1%} | {self.worst:.0%}"
        )


def _nearest(rows: Rows) -> NDArray[np.int64]:
    """The nearest other rows of each by cosine, shape (n, `NEIGHBOURS`)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argpartition(-likeness, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    both = [len(set(a) & set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    return np.array(both) / NEIGHBOURS


def proteins(limit: int) -> list[str]:
    """Real proteins of up to 500 residues."""
    found: list[str] = []
    for name in ("esm_some_proteins.fasta", "viral_proteins.faa.gz"):
        raw = (EXAMPLES / name).read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
        found += [sequence for _, sequence in SimpleFastaParser(iter(text.splitlines(True)))]
    return [sequence for sequence in found if 10 < len(sequence) <= 500][:limit]


def frames(limit: int) -> list[str]:
    """Open frames of real reads, 20 residues and longer."""
    with TemporaryDirectory() as folder:
        reads = Path(folder, "reads.fq")
        script = [sys.executable, EXAMPLES / "lambda_reads.py", EXAMPLES / "lambda_virus.fa.gz"]
        with reads.open("w") as file:
            subprocess.run(script, stdout=file, check=True)
        blocks = list(read_blocks([str(reads)], InputSummary(), translation=Translation()))
    found: list[str] = []
    for block in blocks:
        text = block.residues.tobytes().decode("ascii")
        ends = np.cumsum(block.lengths)
        found += [text[end - n : end] for end, n in zip(ends, block.lengths, strict=True)]
    return found[:: max(1, len(found) // limit)][:limit]


def table(model: str, device: str, limit: int) -> Iterator[tuple[str, str, str, Deviation]]:
    """Sequences, pooling, precision, and how far its rows are from float32 on a CPU."""
    network = upstream_network(model)
    for name, sequences in (("proteins", proteins(limit)), ("reads", frames(limit))):
        own = load_encoder(model).encode(sequences)
        yield (
            name,
            "mean",
            "float32, from fair-esm",
            Deviation.of(own, upstream_mean(network, sequences)),
        )
        for pooling in POOLINGS:
            exact = load_encoder(model, pooling=pooling).encode(sequences)
            for precision in PRECISIONS[device.partition(":")[0]]:
                options: dict[str, Any] = {"precision": precision, "pooling": pooling}
                found = load_encoder(model, device, **options).encode(sequences)
                yield name, pooling, precision, Deviation.of(found, exact)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="real weights: a path or a fair-esm name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=300, help="sequences of each kind")
    chosen = parser.parse_args()
    heads = ["sequences", "pooling", "precision", "largest difference", "lowest cosine", "median"]
    heads += ["lowest centred", "same neighbours", "worst row"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, pooling, precision, found in table(chosen.model, chosen.device, chosen.limit):
        print(f"| {name} | {pooling} | {precision} | {found.cells()} |", flush=True)


if __name__ == "__main__":
    main()
