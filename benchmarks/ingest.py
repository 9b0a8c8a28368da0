"""How fast records become a store's sequence arrays, beside well-kept parsers in the same run.

    pip install dnaio needletail pyfastx
    python -m benchmarks.ingest

*Ingest* is all that `run` does before its first chunk: reading, cleaning or translating, digest,
compressed arrays on the disk; the parsers only iterate, and keep nothing. *Biopython* reads by
`SeqIO` and translates each frame by `Seq.translate`, keeping those that are open. Turns alternate;
rates are by processor time of one process, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

EXAMPLES = Path(__file__).parents[1] / "examples"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reads", type=int, default=200_000)
    parser.add_argument("--proteins", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(*measure(*arguments.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        reads, proteins = Path(folder, "reads.fq"), Path(folder, "proteins.faa")
        with reads.open("w") as file:
            genome = EXAMPLES / "lambda_virus.fa.gz"
            script = [sys.executable, EXAMPLES / "lambda_reads.py", genome]
            subprocess.run([*script, "--reads", str(arguments.reads)], stdout=file, check=True)
        write_proteins(proteins, arguments.proteins)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
        print("| input | what | records/s of processor time | peak RSS, MiB |\n|---|---|---|---|")
        for source, count in ((reads, arguments.reads), (proteins, arguments.proteins)):
            names = [name for name, (needs, _) in WAYS.items() if not needs or find_spec(needs)]
            if source == proteins:
                names.remove("Biopython, six frames")
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for _ in range(arguments.repeats):
                for name in names:
                    found[name].append(in_a_process(name, source))
            for name, turns in found.items():
                rates = [count / seconds for seconds, _ in turns]
                peak = max(peak for _, peak in turns)
                spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
                print(f"| {source.name} | {name} | {median(rates):,.0f} {spread} | {peak:,.0f} |")


def write_proteins(path: Path, count: int) -> None:
    """Random proteins of 33 to 100 residues, as reads give them."""
    chosen = random.Random(1)  # noqa: S311  # no secret
    with path.open("w") as file:
        for number in range(count):
            sequence = "".join(chosen.choices(AMINO_ACIDS, k=chosen.randint(33, 100)))
            file.write(f">read{number}_chunk_1F2\n{sequence}\n")


def in_a_process(name: str, source: Path) -> tuple[float, float]:
    """Seconds and MiB of a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", name, str(source)]
    seconds, peak = subprocess.check_output(command, text=True).split()
    return float(seconds), float(peak)


def measure(name: str, source: str) -> tuple[float, float]:
    """Processor seconds without imports, and peak RSS in MiB."""
    work = WAYS[name][1](source)
    started = time.process_time()
    work()
    seconds = time.process_time() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(source: str) -> Callable[[], object]:
    """All of it."""
    from virnuc_dask.runtime.prepare import prepare
    from virnuc_dask.settings import Settings, Translation

    how = Translation() if source.endswith("fq") else None
    settings = Settings("demo", repr_layer=0, translation=how)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepare(source, Path(folder, "out.zarr"), settings, lambda _event: None)

    # Model and Zarr are loaded by now.
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder, "few.faa")
        few.write_text(">a\nMKTAYIAKQR\n")
        prepare(few, Path(folder, "few.zarr"), Settings("demo", repr_layer=0), lambda _event: None)
    return work


def biopython(source: str) -> Callable[[], object]:
    """Open frames by the slow and sure way."""
    from Bio import SeqIO

    def work() -> int:
        found = 0
        for record in SeqIO.parse(source, "fastq"):
            for strand in (record.seq, record.seq.reverse_complement()):
                for shift in range(3):
                    size = (len(strand) - shift) // 3 * 3
                    protein = str(strand[shift : shift + size].translate()).removesuffix("*")
                    found += "*" not in protein and len(protein) >= 20
        return found

    return work


def biopython_parser(source: str) -> Callable[[], object]:
    """Titles and sequences as strings."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from Bio.SeqIO.QualityIO import FastqGeneralIterator

    parse = FastqGeneralIterator if source.endswith("fq") else SimpleFastaParser

    def work() -> None:
        with open(source) as file:
            for _ in parse(file):
                pass

    return work


def dnaio(source: str) -> Callable[[], object]:
    """The reader of cutadapt."""
    import dnaio

    def work() -> None:
        with dnaio.open(source) as records:
            for _ in records:
                pass

    return work


def needletail(source: str) -> Callable[[], object]:
    """A reader in Rust."""
    import needletail

    def work() -> None:
        for _ in needletail.parse_fastx_file(source):
            pass

    return work


def pyfastx(source: str) -> Callable[[], object]:
    """A reader in C."""
    import pyfastx

    def work() -> None:
        for _ in pyfastx.Fastx(source):
            pass

    return work


WAYS: dict[str, tuple[str, Callable[[str], Callable[[], object]]]] = {
    "ingest": ("", ours),
    "Biopython, six frames": ("", biopython),
    "Biopython's parser alone": ("", biopython_parser),
    "dnaio alone": ("dnaio", dnaio),
    "needletail alone": ("needletail", needletail),
    "pyfastx alone": ("pyfastx", pyfastx),
}


if __name__ == "__main__":
    main()
