"""Reads as a sequencer might give them, of a genome: seeded, of any length, with errors and N.

python examples/lambda_reads.py examples/lambda_virus.fa.gz > reads.fq
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
from itertools import starmap
from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def main() -> None:
    """Write reads as FASTQ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("genome", type=Path)
    parser.add_argument("--reads", type=int, default=1_000)
    parser.add_argument("--length", type=int, default=150)
    parser.add_argument("--error", type=float, default=0.01, help="Share of wrong letters.")
    parser.add_argument("--unknown", type=float, default=0.002, help="Share of N.")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)  # noqa: S311  # no secret
    opener = gzip.open if arguments.genome.suffix == ".gz" else open
    with opener(arguments.genome, "rt") as file:
        ((_, genome),) = SimpleFastaParser(file)

    def letter(true: str) -> str:
        lot = chosen.random()
        if lot < arguments.unknown:
            return "N"
        return chosen.choice("ACGT") if lot < arguments.unknown + arguments.error else true

    def read(number: int, start: int) -> str:
        piece = genome[start : start + arguments.length]
        if number % 2:
            piece = piece.translate(COMPLEMENT)[::-1]
        name = f"read{number} start={start} strand={'-' if number % 2 else '+'}"
        return f"@{name}\n{''.join(map(letter, piece))}\n+\n{'I' * len(piece)}\n"

    last = len(genome) - arguments.length
    starts = (chosen.randint(0, last) for _ in range(arguments.reads))
    sys.stdout.writelines(starmap(read, enumerate(starts)))


if __name__ == "__main__":
    main()
