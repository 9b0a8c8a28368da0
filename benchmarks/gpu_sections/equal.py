"""Our embeddings beside fair-esm's own forward in float32, on the same device.

The networks have random weights in which nothing cancels. fair-esm encodes each sequence alone, so
that its padding is no question. We encode each alone and all in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from numpy.typing import NDArray

from benchmarks.gpu_sections.report import Options, Report, run_section
from tests.support.models import checkpoint_data, random_network, random_sequences
from virnuc_dask.encoder.encoder import Encoder
from virnuc_dask.encoder.packing import cut_segments
from virnuc_dask.encoder.weights import Checkpoint, describe
from virnuc_dask.settings import Pooling, Precision

Rows = NDArray[np.float32]

# Layers, features, heads: of ESM-2 8M and 35M, and heads of 128 features.
SHAPES = [(6, 320, 20), (12, 480, 20), (4, 1280, 10)]
DRY_SHAPES = [(2, 64, 4), (2, 160, 5)]
LENGTHS = [1, 2, 3, 7, 33, 64, 66, 100, 100, 127, 128, 129, 300, 511, 777, 1022]
RANDOM_LENGTHS = 12
DRY_LENGTHS = [1, 2, 3, 33, 64, 100, 100, 129, 511]
# Rows that are longer than a window of so many residues.
WINDOW = 256
LONG_LENGTHS = [257, 511, 70, 1000, 1500]
DRY_LONG_LENGTHS = [257, 70, 500]

LARGEST_ERROR = 1e-4  # relative, of float32
# Residues are stored as float16, which alone makes half of this.
LARGEST_ERROR_OF_A_RESIDUE = 1e-3
LOWEST_COSINE = 0.999  # of any other precision


def main(report: Report, options: Options) -> None:
    """Compare all shapes, precisions and poolings; raise if any is too far off."""
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    errors = report.table(
        "fair-esm's float32 beside ours",
        *("layers, features, heads", "precision", "rows", "number", "largest difference"),
        *("relative to the row", "lowest cosine", "centred", "same bits alone and in a batch"),
    )
    served = report.table("What served", "layers, features, heads", "precision", "backends")
    precisions: list[Precision] = ["float32", "bfloat16"]
    if options.device == "cuda":
        precisions.append("float16")  # not offered on a CPU
    problems: list[str] = []
    shapes = DRY_SHAPES if options.dry_run else SHAPES
    for layers, dimension, heads in shapes:
        shape = f"{layers}, {dimension}, {heads}"
        if options.left() < 4:
            problems.append(f"no time was left for {shape}")
            continue
        network = random_network(layers, dimension, heads)
        checkpoint = Checkpoint("random", checkpoint_data(network))
        spec = describe(checkpoint)
        cases = _Cases.of(network, options)
        # Pooling comes after the network and depends on no shape: one shows all three.
        poolings: list[Pooling] = ["mean"]
        if dimension == shapes[0][1]:
            poolings += ["bos", "max"]
        for precision in precisions:
            backends: dict[str, str] = {}
            for pooling in poolings:
                chosen = replace(spec, precision=precision, pooling=pooling)
                encoder = Encoder(checkpoint, chosen, options.device)
                encoder.token_budget = 2**17  # all sequences are one batch
                backends |= encoder.backends
                for case in cases.compare(encoder, pooling):
                    errors(shape, precision, case.rows, *case.cells())
                    if problem := case.problem(precision):
                        problems.append(f"{shape}, {precision}, {case.rows}: {problem}")
            served(shape, precision, ", ".join(f"{k}: {v}" for k, v in backends.items()))
    if torch.backends.cuda.matmul.allow_tf32:
        problems.append("an encoder has turned TF32 on")
    report.figure("comparisons that failed", len(problems))
    for problem in problems:
        report.note(problem)
    if problems:
        raise AssertionError(f"{len(problems)} comparisons failed, first: {problems[0]}")


@dataclass(frozen=True)
class _Case:
    """Rows as found and as expected, shape (n, D)."""

    rows: str
    found: Rows
    expected: Rows
    alone: Rows | None = None
    of_residues: bool = False

    def cells(self) -> tuple[Any, ...]:
        same = ""
        if self.alone is not None:
            same = f"{(self.alone == self.found).all(1).sum()} of {len(self.found)}"
        return (
            len(self.found),
            float(np.abs(self._both() - self._expected()).max()),
            self._relative(),
            f"{self._cosine():.7f}",
            f"{self._cosine(self.expected.mean(0)):.7f}",
            same,
        )

    def problem(self, precision: Precision) -> str | None:
        if not np.isfinite(self._both()).all():
            return "not all values are finite"
        limit = LARGEST_ERROR_OF_A_RESIDUE if self.of_residues else LARGEST_ERROR
        if precision == "float32":
            error = self._relative()
            return None if error <= limit else f"relative error {error:.2e}, above {limit:.0e}"
        cosine = self._cosine()
        return None if cosine >= LOWEST_COSINE else f"cosine {cosine:.6f}, below {LOWEST_COSINE}"

    def _both(self) -> Rows:
        return self.found if self.alone is None else np.concatenate([self.found, self.alone])

    def _expected(self) -> Rows:
        return self.expected if self.alone is None else np.concatenate([self.expected] * 2)

    def _relative(self) -> float:
        largest = np.abs(self._both() - self._expected()).max(1)
        return float((largest / np.linalg.norm(self._expected(), axis=1)).max())

    def _cosine(self, centre: Rows | float = 0.0) -> float:
        found, expected = self._both() - centre, self._expected() - centre
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        return float(((found * expected).sum(1) / np.maximum(norms, 1e-30)).min())


@dataclass(frozen=True)
class _Cases:
    """Sequences, and fair-esm's rows of them.

    Attributes
    ----------
    whole, long : list of str
        `long` are cut into windows.
    pooled, windowed : dict
        Expected rows by pooling.
    residues : ndarray, shape (N, D)
        Expected residues of `whole`, end to end.
    """

    whole: list[str]
    long: list[str]
    pooled: dict[Pooling, Rows]
    windowed: Rows
    residues: Rows

    @classmethod
    def of(cls, network: ESM2, options: Options) -> _Cases:
        lengths = [*LENGTHS, *np.random.default_rng(1).integers(1, 1023, RANDOM_LENGTHS).tolist()]
        device = options.device
        whole = random_sequences(DRY_LENGTHS if options.dry_run else lengths)
        long = random_sequences(DRY_LONG_LENGTHS if options.dry_run else LONG_LENGTHS, seed=1)
        network = network.to(device)
        each = [_upstream(network, sequence, device) for sequence in whole]
        windowed = []
        for sequence in long:
            total, seen = np.zeros((len(sequence), network.embed_dim)), np.zeros(len(sequence))
            segments = cut_segments(np.array([len(sequence)], np.int32), WINDOW, "window")
            for start in segments.start.tolist():
                window = slice(start, start + WINDOW)
                total[window] += _upstream(network, sequence[window], device)[1:-1]
                seen[window] += 1
            windowed.append((total / seen[:, None]).mean(0).astype(np.float32))
        pooled: dict[Pooling, Rows] = {
            "mean": np.stack([tokens[1:-1].mean(0) for tokens in each]),
            "bos": np.stack([tokens[0] for tokens in each]),
            "max": np.stack([tokens[1:-1].max(0) for tokens in each]),
        }
        network.to("cpu")
        residues = np.concatenate([tokens[1:-1] for tokens in each])
        return cls(whole, long, pooled, np.stack(windowed), residues)

    def compare(self, encoder: Encoder, pooling: Pooling) -> Iterator[_Case]:
        """All cases of an encoder; windows and residues are those of the mean."""
        together = encoder.encode(self.whole)
        alone = np.concatenate([encoder.encode([sequence]) for sequence in self.whole])
        yield _Case(pooling, together, self.pooled[pooling], alone)
        if pooling != "mean":
            return
        lengths = np.array([len(sequence) for sequence in self.long], np.int32)
        windows = cut_segments(lengths, WINDOW, "window")
        found = encoder.encode_segments(_letters(self.long), windows, len(self.long)).embedding
        one_by_one = []
        for sequence in self.long:
            cut = cut_segments(np.array([len(sequence)], np.int32), WINDOW, "window")
            one_by_one.append(encoder.encode_segments(_letters([sequence]), cut, 1).embedding)
        rows = f"mean over windows of {WINDOW}"
        yield _Case(rows, found, self.windowed, np.concatenate(one_by_one))
        lengths = np.array([len(sequence) for sequence in self.whole], np.int32)
        uncut = cut_segments(lengths, int(lengths.max()), "truncate")
        encoded = encoder.encode_segments(
            _letters(self.whole), uncut, len(lengths), per_residue=True
        )
        assert encoded.residues is not None
        yield _Case(
            "residues", encoded.residues.astype(np.float32), self.residues, of_residues=True
        )


def _letters(sequences: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("".join(sequences).encode("ascii"), np.uint8)


_convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()


def _upstream(network: ESM2, sequence: str, device: str) -> Rows:
    """fair-esm's representation of each token of one sequence, shape (length + 2, D)."""
    _, _, tokens = _convert([("", sequence)])
    layer = network.num_layers
    with torch.inference_mode():
        hidden = network(tokens.to(device), repr_layers=[layer])["representations"][layer]
    found: Rows = hidden[0].cpu().numpy()
    return found


if __name__ == "__main__":
    run_section(main)
