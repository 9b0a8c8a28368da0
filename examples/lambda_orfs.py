"""Write the open reading frames of a small genome as peptides: real input for trying things out.

Every stretch between two stop codons, in all six frames, of at least so many residues. For
real work use a gene finder.

    python examples/lambda_orfs.py examples/lambda_virus.fa.gz > lambda_orfs.faa
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from Bio import SeqIO
from Bio.Seq import Seq
from xopen import xopen


def open_frames(genome: Seq, minimum: int) -> Iterator[tuple[str, str]]:
    """Stop-to-stop peptides as (name, residues); ``R2_1034`` is frame and first codon."""
    for strand, sequence in (("F", genome), ("R", genome.reverse_complement())):
        for frame in range(3):
            codons = (len(sequence) - frame) // 3
            protein = str(sequence[frame : frame + 3 * codons].translate())
            start = 0
            for peptide in protein.split("*"):
                if len(peptide) >= minimum:
                    yield f"{strand}{frame + 1}_{start}", peptide
                start += len(peptide) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("genome", help="FASTA, plain or compressed")
    parser.add_argument("--minimum", type=int, default=20, help="residues (default: %(default)s)")
    arguments = parser.parse_args()
    with xopen(arguments.genome) as text:
        for record in SeqIO.parse(text, "fasta"):
            # Old GenBank headers: gi|9626243|ref|NC_001416.1|
            accession = record.id.strip("|").split("|")[-1]
            for name, peptide in open_frames(record.seq, arguments.minimum):
                print(f">{accession}_{name}\n{peptide}")


if __name__ == "__main__":
    main()
