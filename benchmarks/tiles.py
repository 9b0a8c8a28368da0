"""How well reads are recognised among whole proteins, and among tiles of them.

    python -m benchmarks.tiles --model esm2_t6_8M_UR50D [--reads 400 --workers 2 --folder stores]

Reads are of phage lambda, with errors (`examples/lambda_reads.py`), and their rows are their open
frames. What they are searched in is the genome's stretches of 100 residues and more between stops,
whole and in tiles. Of each frame that lies in one of these the nearest row should be at the same
place of the genome, in the same frame. The area under the curve is of the similarity to the
nearest row, which should be larger for these frames than for the others.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

import virnuc_dask
from virnuc_dask import Tiling, Translation

EXAMPLES = Path(__file__).parents[1] / "examples"
GENOME = EXAMPLES / "lambda_virus.fa.gz"
_READ = 150
_WITHIN = 0.9
CHOICES = (None, Tiling(96), Tiling(48), Tiling(48, 12), Tiling(24))


class Places:
    """Where rows lie in the genome: strand, and nucleotides from `first` on and before `end`."""

    def __init__(self, data: Any) -> None:
        span, start = 3 * data.length.values, data.start.values
        self.strand = np.sign(data.frame.values)
        self.first = np.where(self.strand > 0, start, start - span + 1)
        self.end = self.first + span

    def moved(self, headers: list[str]) -> None:
        """From places in reads to places in the genome, which the reads' headers say."""
        found = [re.fullmatch(r"start=(\d+) strand=(.)", header) for header in headers]
        start = np.array([int(each[1]) for each in found if each])
        reverse = np.array([each[2] == "-" for each in found if each])
        first, end = self.first, self.end
        self.first = start + np.where(reverse, _READ - end, first)
        self.end = start + np.where(reverse, _READ - first, end)
        self.strand = np.where(reverse, -self.strand, self.strand)

    def shared(self, row: int, others: Places) -> Any:
        """Nucleotides that a row shares with each of others, in the same frame."""
        is_same = (others.strand == self.strand[row]) & ((others.first - self.first[row]) % 3 == 0)
        end = np.minimum(others.end, self.end[row])
        return np.where(is_same, end - np.maximum(others.first, self.first[row]), 0)


def main() -> None:
    """Print a line for each way of cutting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reads", type=int, default=400)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--folder", type=Path, help="For the stores; those there are kept.")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        measure(folder, arguments.model, arguments.reads, arguments.workers)


def measure(folder: Path, model: str, count: int, workers: int | None) -> None:
    """Embed what is not there, and search."""

    def embedded(inputs: Path, name: str, **settings: Any) -> tuple[Path, Any]:
        path = folder / name
        virnuc_dask.run(inputs, path, model=model, workers=workers, **settings)
        return path, virnuc_dask.open_store(path)

    reads = folder / "reads.fq"
    script = [sys.executable, EXAMPLES / "lambda_reads.py", GENOME, "--reads", str(count)]
    with reads.open("w") as file:
        subprocess.run(script, stdout=file, check=True)
    queries, data = embedded(reads, "reads.zarr", translation=Translation())
    frames = Places(data)
    frames.moved(data.description.values.tolist())
    is_known: Any = None
    print("| reference | rows | area under the curve | nearest row at the right place |")
    for tiling in CHOICES:
        name = f"{str(tiling).replace(', ', '-').replace(' ', '-')}.zarr"
        how = Translation("orf", min_residues=100)
        path, reference = embedded(GENOME, name, translation=how, tiling=tiling)
        places = Places(reference)
        if tiling is None:
            lengths = 3 * data.length.values
            longest = [frames.shared(row, places).max() for row in range(len(lengths))]
            is_known = np.array(longest) >= _WITHIN * lengths
        found = virnuc_dask.nearest(path, query_store=queries, k=1)
        similarity, rows = found.similarity.values[:, 0], found.row.values[:, 0]
        area = roc_auc_score(is_known[found.query_row.values], similarity)
        pairs = zip(found.query_row.values.tolist(), rows.tolist(), strict=True)
        right = [frames.shared(query, places)[row] > 0 for query, row in pairs if is_known[query]]
        what = f"{tiling or 'whole'}"
        print(f"| {what} | {len(places.first):,} | {area:.3f} | {np.mean(right):.1%} |", flush=True)
    print(f"{is_known.sum()} frames of the reference and {(~is_known).sum()} others")


if __name__ == "__main__":
    main()
