"""Windows and six frames: byte for byte as VirNucPro's, and against Biopython's own translation."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from Bio.Data import CodonTable
from Bio.Seq import Seq
from conftest import EXAMPLES, ROOT, VIRAL_PROTEINS, Cli, Maker, tree
from harness import Run, assert_ledger
from nursery import wait_for

import virnuc_dask
from virnuc_dask.errors import IdentityMismatchError, InputError, StoreError, UsageError
from virnuc_dask.inputs.translation import cut_windows, translate
from virnuc_dask.runtime.plan import plan
from virnuc_dask.settings import Settings, Translation
from virnuc_dask.store import verify
from virnuc_dask.store.store import Store

Row = tuple[int, int, str, str]


def rows(sequences: list[str], how: Translation) -> list[Row]:
    """As (read, window, frame, protein)."""
    found = translate(sequences, how)
    text = found.residues.tobytes().decode()
    ends = np.cumsum(found.lengths)
    frames = [("F" if f > 0 else "R") + str(abs(f)) for f in found.frame.tolist()]
    proteins = [text[e - n : e] for e, n in zip(ends, found.lengths, strict=True)]
    return list(zip(found.read.tolist(), found.window.tolist(), frames, proteins, strict=True))


def dirty(seed: int, lengths: list[int]) -> list[str]:
    """Random sequences with lower case, N, IUPAC's codes, U and gaps in some of them."""
    chosen = random.Random(seed)
    letters = "ACGTacgtNnURYKMSWBDHV-"
    clean, odd = [10] * 4 + [0] * 18, [10] * 8 + [1] * 14
    return [
        "".join(chosen.choices(letters, odd if chosen.random() < 0.5 else clean, k=n))
        for n in lengths
    ]


# --- as VirNucPro does: written from its description, one letter and one list at a time ---


def as_virnucpro(sequences: list[str], size: int) -> list[Row]:
    table = CodonTable.unambiguous_dna_by_id[1]
    codons = table.forward_table | dict.fromkeys(table.stop_codons, "*")
    found = []
    for number, sequence in enumerate(sequences):
        windows = -(-len(sequence) // size)
        spare = windows * size - len(sequence)
        each = spare // windows if windows else 0
        overlaps = [each + 1] * (spare - each * (windows - 1)) + [each] * windows
        moved = 0
        for k in range(windows):
            window = sequence[k * size - moved :][:size].upper()
            moved += overlaps[k]
            other = "".join({"A": "T", "C": "G", "G": "C", "T": "A"}.get(c, c) for c in window)
            for name, strand in (("F", window), ("R", other[::-1])):
                for shift in range(3):
                    triples = [strand[i : i + 3] for i in range(shift, len(strand) - 2, 3)]
                    protein = "".join(codons.get(triple, "") for triple in triples)
                    if protein and "*" not in protein:
                        found.append((number, k + 1, f"{name}{shift + 1}", protein))
    return found


@pytest.mark.parametrize("size", [60, 300, 500])
@pytest.mark.slow
def test_virnucpro_to_the_byte_for_every_length(size: int) -> None:
    sequences = dirty(size, [*range(1, 1701), *range(1, 1701)])
    expected = as_virnucpro(sequences, size)
    assert len(expected) > 1_000
    assert rows(sequences, Translation("virnucpro", size)) == expected


@pytest.mark.parametrize("last", range(8))
@pytest.mark.parametrize("before", range(60, 63))
def test_a_batch_may_end_and_begin_with_next_to_nothing(before: int, last: int) -> None:
    sequences = dirty(before, [last, before, last])
    expected = as_virnucpro(sequences, 60)
    assert rows(sequences, Translation("virnucpro", 60)) == expected
    for rule in ("open", "orf"):
        how = Translation(rule, min_residues=1, max_unknown=1.0)
        alone = [row[1:] for sequence in sequences for row in rows([sequence], how)]
        assert [row[1:] for row in rows(sequences, how)] == alone


def test_virnucpro_names_rows_as_it_does(tmp_path: Path, make_store: Maker) -> None:
    """Blank and repeated headers, words after the first, and a record too short for a codon."""
    source = tmp_path / "in.fa"
    source.write_text(">\nATGGCATTT\n>a b c\n" + "ATGGCACAG" * 12 + "\n>a\nAC\n")
    how = Translation("virnucpro", 60)
    store = make_store(source, embed=False, translation=how)
    sequences = ["ATGGCATTT", "ATGGCACAG" * 12, "AC"]
    names = ["", "a", "a"]
    expected = as_virnucpro(sequences, 60)
    assert store.read_ids(0) == [f"{names[r]}_chunk_{k}{frame}" for r, k, frame, _ in expected]
    data = virnuc_dask.open_store(store.path)
    assert data.read_id.values.tolist() == names
    assert data.read.values.tolist() == [row[0] for row in expected]
    assert data.window.values.tolist() == [row[1] for row in expected]
    assert bytes(data.residues.values).decode() == "".join(row[3] for row in expected)


# --- windows ---


def test_windows_cover_all_and_are_as_few_as_can_be() -> None:
    lengths = np.arange(2_000)
    for size in (30, 31, 300):
        read, _, start, stop = cut_windows(lengths, size)
        for length, group in groupby(zip(read, start, stop, strict=True), key=lambda w: w[0]):
            found = [(int(a), int(b)) for _, a, b in group]
            assert len(found) == -(-length // size)
            assert (found[0][0], found[-1][1]) == (0, length)
            assert all(a[0] < b[0] <= a[1] for a, b in pairwise(found))
            assert all(b - a == size for a, b in found[:-1])


def test_windows_and_frames_are_as_the_readme_says() -> None:
    _, _, start, stop = cut_windows(np.array([700]), 300)
    assert list(zip(start + 1, stop, strict=True)) == [(1, 300), (234, 533), (467, 700)]
    short = Translation(min_residues=1, max_unknown=0.5)
    assert (0, 1, "F1", "MX") in rows(["ATGNCATAA"], short)
    virnucpro = Translation("virnucpro", 300)
    assert "F1" not in [row[2] for row in rows(["ATGNCATAA"], virnucpro)]
    assert (0, 1, "F1", "M") in rows(["ATGNCA"], virnucpro)


# --- open frames, against Biopython ---


def plain(sequence: str, code: int) -> dict[str, str]:
    """The six frames of a whole record; a codon with an unknown letter is X."""
    known = "".join(c if c in "ACGT" else "N" for c in sequence.upper().replace("U", "T"))
    strands = {"F": known, "R": str(Seq(known).reverse_complement())}
    table = CodonTable.unambiguous_dna_by_id[code]
    codons = table.forward_table | dict.fromkeys(table.stop_codons, "*")
    return {
        f"{name}{shift + 1}": "".join(
            codons.get(strand[i : i + 3], "X") for i in range(shift, len(strand) - 2, 3)
        )
        for name, strand in strands.items()
        for shift in range(3)
    }


def test_this_is_biopythons_translation() -> None:
    sequence = dirty(5, [3_000])[0].upper().translate(str.maketrans("URYKMSWBDHV-", "TACGTACGTACG"))
    for code in (1, 2, 4, 11, 25):
        forward = sequence.replace("N", "A")
        expected = str(Seq(forward).translate(code))
        assert plain(forward, code)["F1"] == expected


@pytest.mark.parametrize("code", [1, 4, 11])
def test_open_frames_end_at_most_with_a_stop(code: int) -> None:
    sequences = dirty(code, [n % 400 for n in range(2_000)])
    how = Translation("open", None, code, min_residues=7, max_unknown=0.2)
    expected = [
        (number, 1, name, protein.removesuffix("*"))
        for number, sequence in enumerate(sequences)
        for name, protein in plain(sequence, code).items()
        if "*" not in protein.removesuffix("*")
        and len(protein.removesuffix("*")) >= 7
        and protein.count("X") <= 0.2 * len(protein.removesuffix("*"))
    ]
    assert len(expected) > 100
    assert {row[2] for row in expected} == {"F1", "F2", "F3", "R1", "R2", "R3"}
    assert rows(sequences, how) == expected


def test_orfs_are_all_stretches_between_stops_and_say_where_they_are() -> None:
    sequences = dirty(8, [0, 1, 2, 3, 59, 60, 61, 5_000, 300])
    how = Translation("orf", min_residues=9, max_unknown=1.0)
    expected = [
        (number, 1, name, stretch)
        for number, sequence in enumerate(sequences)
        for name, protein in plain(sequence, 1).items()
        for stretch in protein.split("*")
        if len(stretch) >= 9
    ]
    assert len(expected) > 100
    assert rows(sequences, how) == expected
    found = translate(sequences, how)
    for (number, _, frame, protein), start in zip(expected, found.start, strict=True):
        span = 3 * len(protein)
        if frame[0] == "F":
            piece = sequences[number][start : start + span]
        else:
            piece = sequences[number][start - span + 1 : start + 1]
        assert plain(piece, 1)[f"{frame[0]}1"] == protein


def test_a_letter_is_translated_alone_as_in_a_batch() -> None:
    sequences = dirty(9, list(range(200, 260)))
    how = Translation("open", 90, min_residues=7)
    alone = [row[1:] for sequence in sequences for row in rows([sequence], how)]
    assert [row[1:] for row in rows(sequences, how)] == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("closed",), "one of open, orf, virnucpro"),
        (("open", 29), "window must be at least 30"),
        (("virnucpro",), "needs a window"),
        (("orf", 300), "whole records"),
        (("virnucpro", 300, 11), "genetic code 1"),
        (("open", None, 1, 0), "min_residues"),
        (("open", None, 1, 20, 1.5), "max_unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Translation(*arguments)
    with pytest.raises(UsageError, match="no such table"):
        translate(["ACGT"], Translation(genetic_code=99))


# --- a run ---


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 reads of phage lambda, with errors and N."""
    path = tmp_path_factory.mktemp("reads") / "reads.fq"
    script = [sys.executable, "examples/lambda_reads.py", "examples/lambda_virus.fa.gz"]
    with path.open("w") as file:
        subprocess.run(script, cwd=ROOT, stdout=file, check=True)
    return path


@pytest.mark.slow
def test_reads_are_embedded_killed_and_resumed(
    reads: Path, tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Translation()
    whole = make_store(reads, "whole.zarr", rows_per_chunk=16, translation=how)
    path = tmp_path / "out.zarr"
    identity = ("--model=demo", "--translate", "six-frame", "--rows-per-chunk", 16)
    options = (*identity, "--repr-layer", 0, "--workers", 1)
    # In the ingest, of an input that does not end.
    early = Run("run", "-", path, *options, stdin=subprocess.PIPE)
    early.process.stdin.write(reads.read_text()[:20_000])
    early.process.stdin.flush()
    wait_for(lambda: list(tmp_path.glob(".out.zarr~*.ingest")))
    early.process.kill()
    assert early.finish() == -signal.SIGKILL
    assert not early.of("run_started")
    assert not path.exists()
    (_length,), residues = whole.read_rows(whole.chunk_count - 1)  # of one row, so it comes last
    table = tmp_path / "faults.json"
    with faults.holding(monkeypatch, table, residues.tobytes().decode()):
        run = Run("run", reads, path, *options)
    for event in run:
        if event["event"] == "chunk_done" and len(run.computed()) == 10:
            run.process.kill()
            break
    run.finish()
    assert run.process.returncode == -signal.SIGKILL
    done = set(np.flatnonzero(Store(path).present()).tolist())
    assert 10 <= len(done) < whole.chunk_count
    again = Run("run", reads, path, *options)
    assert again.finish() == 0
    assert done.isdisjoint(again.computed())
    verify.verify(path, repair=True)
    assert_ledger(Store(path), whole)
    before = tree(path)
    assert virnuc_dask.resume(path, cluster="none is needed").computed_chunks == 0
    assert tree(path) == before


@pytest.mark.slow
def test_no_read_is_lost(reads: Path, make_store: Maker) -> None:
    store = make_store(reads, translation=Translation())
    data = virnuc_dask.open_store(store.path)
    names = [line[1:].split()[0] for line in reads.read_text().splitlines()[::4]]
    assert data.read_id.values.tolist() == names
    without = sorted(set(range(1_000)) - set(data.read.values.tolist()))
    made = plan(reads, Settings("demo", translation=Translation()))
    assert made.input.reads == 1_000
    assert 0 < made.input.without_row == len(without)
    assert made.without_row == [names[number] for number in without]
    # Rows of a read, lazily.
    grouped = data.embedding.groupby(data.read.load()).max()
    assert grouped.chunks is not None
    read = int(data.read[0])
    mine = data.embedding.values[data.read.values == read]
    assert np.array_equal(grouped.sel(read=read).values, mine.max(axis=0))


@pytest.mark.slow
def test_where_rows_come_from_is_verified(reads: Path, make_store: Maker) -> None:
    store = make_store(reads, translation=Translation())
    assert verify.verify(store.path).sequences is None
    moved = store.path / "read_id" / "zarr.json"
    content = moved.read_bytes()
    moved.unlink()
    with pytest.raises(StoreError, match=r"read_id.*zarr\.json"):
        Store(store.path)
    moved.write_bytes(content)
    store.array("read_id")[3] = "another"
    assert "do not hold the input" in str(verify.verify(store.path).sequences)


def test_translation_is_part_of_the_identity(
    reads: Path, make_store: Maker, client: Any, tmp_path: Path
) -> None:
    store = make_store(reads, embed=False, translation=Translation())
    with pytest.raises(IdentityMismatchError, match=r"at least 20 residues.*at least 10 residues"):
        virnuc_dask.run(
            reads,
            store.path,
            model="demo",
            client=client,
            translation=Translation(min_residues=10),
            repr_layer=0,
        )
    assert store.identity.translation == str(Translation())
    # A store of proteins, and one from before there was translation.
    proteins = make_store(VIRAL_PROTEINS, "proteins.zarr", embed=False)
    document = proteins.identity.to_json()
    assert document.pop("translation") is None
    assert type(proteins.identity).from_json(document) == proteins.identity


@pytest.mark.slow
def test_the_molecule_is_looked_at(reads: Path, cli: Cli, tmp_path: Path) -> None:
    common = ("out.zarr", "--model=demo", "--repr-layer", 0, "--workers", 1, "-q")
    refused = cli("run", reads, *common)
    assert refused.returncode == 2
    assert "look like nucleotides" in refused.stderr
    assert "--translate six-frame" in refused.stderr
    assert not (tmp_path / "out.zarr").exists()
    refused = cli("run", VIRAL_PROTEINS, *common, "--translate", "six-frame")
    assert refused.returncode == 2
    assert "viral_proteins.faa.gz, line 1, record" in refused.stderr
    assert not (tmp_path / "out.zarr").exists()
    assert cli("run", reads, *common, "--molecule", "protein").returncode in (0, 3)


@pytest.mark.slow
def test_a_run_of_reads_with_virnucpros_rule(cli: Cli, tmp_path: Path) -> None:
    quick = ("--model=demo", "--repr-layer", 0, "--workers", 1)
    options = ("--translate", "six-frame", "--frames", "virnucpro", "--window", "300")
    genome = EXAMPLES / "lambda_virus.fa.gz"
    done = cli("run", genome, "out.zarr", *quick, *options)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "out.zarr")
    assert store.identity.translation == "six-frame; virnucpro; window 300"
    assert store.read_ids(0)[0].startswith("gi|9626243|ref|NC_001416.1|_chunk_")
    assert "without_row_ids" not in store.provenance["input"]  # `read_id` has them
    alone = cli("run", VIRAL_PROTEINS, "b.zarr", *quick, "--frames", "orf")
    assert alone.returncode == 2
    assert "frames requires translate six-frame" in alone.stderr
    wrong = cli("run", genome, "b.zarr", *quick, "--translate", "six-frame", "--window", "many")
    assert wrong.returncode == 2
    assert "is neither a number nor none" in wrong.stderr


def test_an_input_without_an_open_frame_is_refused(tmp_path: Path, make_store: Maker) -> None:
    source = tmp_path / "short.fa"
    source.write_text(">a\nACGTACGT\n>b\nACG\n")
    with pytest.raises(InputError, match=r"none of 2 records gives a row"):
        make_store(source, embed=False, translation=Translation())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.fa"]
