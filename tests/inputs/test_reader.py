"""Reading input: what works, what is mended and counted, what is refused and how."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLES, VIRAL_PROTEINS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virnuc_dask.errors import InputError
from virnuc_dask.inputs import reader
from virnuc_dask.inputs.reader import read_blocks, read_records
from virnuc_dask.inputs.records import (
    ALPHABET,
    InputSummary,
    Record,
    clean,
    clean_sequence,
    invalid_rows,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FASTA = ">a first\nMKTAYI\nAKQR\n>b\nMKV\n>a again\nLLL\n"
FASTQ = "@a first\nMKTAYIAKQR\n+\nIIIIIIIIII\n@b\nMKV\n+b\n@@@\n@a again\nLLL\n+\nIII\n"
EXPECTED = [("a", "MKTAYIAKQR"), ("b", "MKV"), ("a", "LLL")]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


def read(*paths: Path | str, strict: bool = False) -> tuple[list[tuple[str, str]], InputSummary]:
    """Cleaned records as (identifier, residues), and the summary."""
    summary = InputSummary()
    found = []
    for block in read_blocks([*paths], summary, strict=strict):
        ends = np.cumsum(block.lengths)
        for name, end, length in zip(block.ids, ends, block.lengths, strict=True):
            found.append((name, block.residues[end - length : end].tobytes().decode()))
    return found, summary


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what works ---


@pytest.mark.parametrize("name", ["in.fa", "in.fastq", "in.txt.gz", "in"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("text", [FASTA, FASTQ], ids=["fasta", "fastq"])
def test_content_decides_the_format_and_not_the_name(
    name: str, compression: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, COMPRESS[compression](text.encode()))
    found, summary = read(path)
    assert found == EXPECTED
    assert (summary.records, summary.residues) == (3, 16)


@pytest.mark.parametrize(
    "text",
    [
        FASTA.replace("\n", "\r\n"),
        FASTA.rstrip("\n"),
        FASTA.replace("MKTAYI\nAKQR", "MKTAYIAKQR"),
        FASTA.replace("MKTAYI\nAKQR", "M\nK\nT\nA\nY\nI\nA\nK\nQ\nR"),
        FASTA.lower().replace(">A", ">a"),
        "\n\n" + FASTA.replace("\n", "\n\n"),
        "; a comment\n# another\n" + FASTA,
        FASTA.replace(">b", "; in between\n\n# > and more\n>b") + "; last",
        FASTA.replace("MKTAYI", "; after\n\n# its header\nMKTAYI"),
        "\ufeff" + FASTA,
        "\ufeff\ufeff" + FASTA.replace(">", "\ufeff>").replace("AKQR", "\ufeffAKQR"),
        "\ufeff# a comment\n" + FASTA,
        FASTA + "\x1a",
        FASTA.rstrip("\n") + "\x1a",
        "\x1a" + FASTA.replace(">b", "\x1a\ufeff>b").replace("\n", "\r\n") + "\x1a\x1a\r\n\x1a",
        FASTA.replace("\n", "\x1a\n"),
        FASTA.replace("MKV", "M K\tV "),
        FASTQ.replace("\n", "\r\n"),
        FASTQ.rstrip("\n"),
        FASTQ.lower().replace("@b\n@@@", "@b\n@@@"),
        FASTQ.replace(
            "@a first\nMKTAYIAKQR\n+\nIIIIIIIIII", "@a first\nMKTAYI\nAKQR\n+\nIIII\nIIIIII"
        ),
        "\n\n" + FASTQ,
        FASTQ.replace("@a", "\ufeff@a"),
        FASTQ.replace("@b\n@", "\x1a\ufeff@b\n@").replace("\n", "\r\n") + "\x1a",
        FASTQ.rstrip("\n") + "\x1a",
    ],
)
def test_common_variants_read_the_same(text: str, tmp_path: Path) -> None:
    found, summary = read(write(tmp_path / "in.fa", text))
    assert found == EXPECTED
    assert summary.sha256 == read(write(tmp_path / "plain.fa", FASTA))[1].sha256


def test_empty_headers_and_bytes_that_are_not_utf8_lose_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "in.fa", b">\nMKT\n>prot\xe9ine\nMKV\n>\xc3\xa9\nMKL\n")
    assert read(path)[0] == [("", "MKT"), ("protéine", "MKV"), ("é", "MKL")]


def test_files_are_read_in_order_as_one_input(tmp_path: Path) -> None:
    one = write(tmp_path / "one.fa", ">a\nMKTAYIAKQR\n")
    none = write(tmp_path / "none.fa", "")
    two = write(tmp_path / "two.fq.gz", gzip.compress(b"@b\nMKV\n+\nIII\n@a\nLLL\n+\nIII\n"))
    found, summary = read(one, none, two)
    assert found == EXPECTED
    assert summary.empty_files == [str(none)]
    assert summary.sha256 == read(write(tmp_path / "whole.fa", FASTA))[1].sha256


@pytest.mark.slow
def test_standard_input_is_read_compressed_or_not(tmp_path: Path) -> None:
    code = (
        "from virnuc_dask.inputs.records import InputSummary\n"
        "from virnuc_dask.inputs.reader import read_blocks\n"
        "print([name for block in read_blocks(['-'], InputSummary()) for name in block.ids])"
    )
    for compress in COMPRESS.values():
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=compress(FASTA.encode()),
            stdout=subprocess.PIPE,
            check=True,
        )
        assert done.stdout.decode().strip() == "['a', 'b', 'a']"


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    content = gzip.compress(b">a\nMKTAYIAKQR\n>b\nM") + gzip.compress(b"KV\n>a\nLLL\n")
    assert read(write(tmp_path / "in.fa.gz", content))[0] == EXPECTED


def test_lines_of_records_are_those_of_their_headers(tmp_path: Path) -> None:
    text = "\n; comment\n>a\r\nMK\r\n\r\nTA\r\n# another\r\n>b\nM\n\n\n>c\n>d\nM"
    path = write(tmp_path / "in.fa", text)
    assert [(r.id, r.line) for r in read_records(str(path))] == [
        ("a", 3),
        ("b", 8),
        ("c", 12),
        ("d", 13),
    ]
    path = write(tmp_path / "in.fq", FASTQ)
    assert [r.line for r in read_records(str(path))] == [1, 5, 9]


def test_real_files_read_as_biopython_reads_them() -> None:
    from Bio import SeqIO
    from xopen import xopen

    for path in (VIRAL_PROTEINS, EXAMPLES / "esm_some_proteins.fasta"):
        with xopen(path) as text:
            expected = [(r.id, str(r.seq)) for r in SeqIO.parse(text, "fasta")]
        assert read(path)[0] == expected


# --- letters ---


def test_letters_are_mended_by_rule_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.fa", f">all\n{ALPHABET}\n>j\nMJjK\n>gaps\n-M.K-\n>stop\nMK**\n>mix\nM-*-\n"
    )
    found, summary = read(path)
    assert [sequence for _, sequence in found] == [ALPHABET, "MXXK", "MK", "MK", "M"]
    assert (summary.ambiguous_j, summary.gaps, summary.terminal_stops) == (2, 5, 3)
    assert summary.invalid == 0


@pytest.mark.parametrize(
    "bad",
    ["M*K", "M1", "M?K", "Mé", "M@", "_M", "1M", "/M", "M/K", "M=", "M\x1aK", "M\x7fK", "M中"],
)
def test_other_letters_make_the_record_invalid(bad: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.fa", f">good\nMKT\n>bad\n{bad}\n>fine\nMKV\n")
    _, summary = read(path)
    assert (summary.records, summary.invalid) == (3, 1)
    assert summary.first_invalid is not None
    assert (summary.first_invalid.line, summary.first_invalid.record) == (3, "bad")
    with pytest.raises(InputError, match=r"in\.fa, line 3, record 'bad'") as refused:
        read(path, strict=True)
    assert refused.value.exit_code == 2


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n\r\0"), max_size=30), min_size=1, max_size=8
    )
)
def test_any_text_is_cleaned_or_named(texts: list[str]) -> None:
    summary = InputSummary()
    records = [
        Record(
            str(number),
            text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"),
            "f",
            number,
        )
        for number, text in enumerate(texts)
    ]
    block = clean(records, summary)
    invalid = invalid_rows(block.residues, block.lengths)
    assert int(block.lengths.sum()) == len(block.residues)
    assert summary.invalid == invalid.sum()
    assert (summary.first_invalid is not None) == bool(invalid.any())
    if invalid.any():
        assert summary.first_invalid is not None
        assert summary.first_invalid.line == int(np.argmax(invalid))
    good = set(ALPHABET.encode())
    ends = np.cumsum(block.lengths)
    for bad, end, length in zip(invalid, ends, block.lengths, strict=True):
        assert bad == (not set(block.residues[end - length : end].tolist()) <= good)


@given(st.text("ACDEFGHIKLMNPQRSTVWYXBUZOacdxJj-.* ", max_size=40))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    try:
        once = clean_sequence(text)
    except InputError:
        assert "*" in text.rstrip("*-. ")
    else:
        assert clean_sequence(once) == once
        assert set(once) <= set(ALPHABET)


def test_empty_records_keep_their_place(tmp_path: Path) -> None:
    found, summary = read(write(tmp_path / "in.fa", ">a\n>b\n\n>c\n*\n>d\n--\n>e\nM\n>f"))
    assert found == [("a", ""), ("b", ""), ("c", ""), ("d", ""), ("e", "M"), ("f", "")]
    assert summary.empty == 5


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"; only a comment\n", gzip.compress(b"", mtime=0)]
)
def test_input_without_a_record_is_refused(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "in.fa", content)
    with pytest.raises(InputError, match=r"in\.fa: no sequence record"):
        read(path)


def test_nucleotides_are_recognised(tmp_path: Path) -> None:
    assert (
        read(write(tmp_path / "in.fa", ">a\nACGTN\n>b\nMKT\n>c\nacguu\n"))[1].nucleotide_like == 2
    )


# --- the digest ---


def test_the_digest_knows_order_names_and_borders(tmp_path: Path) -> None:
    texts = [
        ">a\nAC\n>b\nD\n",
        ">a\nA\n>b\nCD\n",
        ">a\nACD\n",
        ">b\nD\n>a\nAC\n",
        ">a\nAC\n>c\nD\n",
        ">a\nAC\n>b\nE\n",
        ">ab\nAC\n>\nD\n",
        ">a\nAC\n>b\nD\n>c\n",
    ]
    digests = {read(write(tmp_path / "in.fa", text))[1].sha256 for text in texts}
    assert len(digests) == len(texts)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(records=st.integers(1, 400), residues=st.integers(1, 5000))
def test_the_digest_does_not_depend_on_blocks(
    records: int, residues: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(VIRAL_PROTEINS)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "BLOCK_RECORDS", records)
        patch.setattr(reader, "BLOCK_RESIDUES", residues)
        parts = read(VIRAL_PROTEINS)
    assert parts[0] == whole[0]
    assert parts[1].sha256 == whole[1].sha256


# --- what is refused ---


def refused(path: Path | str) -> InputError:
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return caught.value


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in str(refused(tmp_path / "missing.fa"))
    assert "directory" in str(refused(tmp_path))


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_with_its_line(
    compression: str, share: float, tmp_path: Path
) -> None:
    content = COMPRESS[compression](gzip.decompress(VIRAL_PROTEINS.read_bytes()))
    error = refused(write(tmp_path / "in.fa", content[: max(8, int(share * len(content)))]))
    assert error.line is not None
    assert "truncated or damaged" in str(error)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("seed", range(4))
def test_a_file_damaged_inside_is_refused(compression: str, seed: int, tmp_path: Path) -> None:
    content = bytearray(COMPRESS[compression](gzip.decompress(VIRAL_PROTEINS.read_bytes())))
    if compression == "zst":
        options = {zstd.CompressionParameter.checksum_flag: 1}
        content = bytearray(
            zstd.compress(gzip.decompress(VIRAL_PROTEINS.read_bytes()), options=options)
        )
    middle = random.Random(seed).randrange(len(content) // 3, len(content) - 100)
    content[middle : middle + 40] = bytes(b ^ 0x55 for b in content[middle : middle + 40])
    assert refused(write(tmp_path / "in.fa", bytes(content))).line is not None


def garbage(seed: int) -> bytes:
    return random.Random(seed).randbytes(4000)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + garbage(1),
        b"PK\x03\x04" + garbage(2),
        *[garbage(seed) for seed in range(3, 12)],
        b">a\nMKT\0AYI\n",
        ">a\nMKT\n".encode("utf-16"),
        ">a\nMKT\n".encode("utf-16-le"),
        ">a\nMKT\n".encode("utf-16-be"),
        b"\xfe\xff" + ">a\nMKT\n".encode("utf-16-be"),
        ">a\nMKT\n".encode("utf-32"),
        b"MKTAYIAKQR\n>a\nMKT\n",
        b"<!DOCTYPE html>\n<html></html>\n",
        b"id,sequence\na,MKT\n",
    ],
)
def test_what_is_no_sequence_file_is_refused_with_its_line(content: bytes, tmp_path: Path) -> None:
    assert refused(write(tmp_path / "in.fa", content)).line is not None


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("@a\nMKT\n+\nII\n", 1, "differs"),
        ("@a\nMKT\n+\nIII\n@b\nMKTAY\n+\nIII\n@c\nM\n+\nI\n", 5, ""),
        ("@a\nMKT\n+\nIII\n@b\nMKT\n+\n", 5, ""),
        ("@a\nMKT\n+\nIII\n@b\nMKT\n", 5, ""),
        ("@a\nMKT\n+\nIII\n@b\n", 5, ""),
        ("@a\nMKT\n+\nIII\n@b\nMKT\n+other\nIII\n", 5, "differ"),
        ("@a\nMKT\n+\nIII\n>b\nMKT\n", 1, ""),
        ("@a\nMKT\n+\nIIII\n", 1, ""),
    ],
)
def test_malformed_fastq_is_refused_at_the_record(
    text: str, line: int, problem: str, tmp_path: Path
) -> None:
    error = refused(write(tmp_path / "in.fq", text))
    assert error.line == line
    assert problem in str(error).lower()


def test_identifiers_are_data_and_never_break_a_message(tmp_path: Path) -> None:
    path: Any = write(tmp_path / "in.fa", f">{'x' * 10_000}\x1b[2J\nM1\n")
    with pytest.raises(InputError) as caught:
        read(path, strict=True)
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


# --- what looks like FASTA or FASTQ and is not ---


@pytest.mark.parametrize(
    ("text", "line", "record"),
    [
        (">a\nMKT*\n>b\nMKV\nMDV*>c\nMLK\n", 5, "b"),
        (">a\nMKT\n\n  >b\nMLK\n", 4, "a"),
        (">a\nMKT\ufeff>b\nMLK\n", 2, "a"),
        ("; c\n>a\n# c\nMKT>b\nMLK\n", 4, "a"),
        ("@a\nMKT\n+\n>>>\n@b\nM>K\n+\nIII\n", 5, "b"),
    ],
)
def test_a_header_glued_to_a_sequence_is_refused(
    text: str, line: int, record: str, tmp_path: Path
) -> None:
    error = refused(write(tmp_path / "in", text))
    assert (error.line, error.record) == (line, record)
    assert error.problem == "a '>' within a line of sequence; is a newline missing before it?"


@pytest.mark.parametrize("comment", ["# b", "; b", "#b", ";"])
def test_a_comment_between_lines_of_a_sequence_is_refused(comment: str, tmp_path: Path) -> None:
    text = f">a\nMK\n>b\n# here it may stand\nMKV\n\n{comment}\n\n# too\nLLL\n# here too\n>c\n"
    error = refused(write(tmp_path / "in", text))
    assert (error.line, error.record) == (7, "b")
    assert "remove the line" in error.problem


# Each whole, and as the tail of a file that begins well.
OTHER_FORMATS = {
    "HTML": "<!DOCTYPE html>\n<html><body>502</body></html>\n",
    "GenBank": "LOCUS       AB1  10 aa\nORIGIN\n        1 mktayiakqr\n//\n",
    "EMBL": "ID   X; SV 1; linear\nXX\nSQ   SEQUENCE 3 BP;\n     acg 3\n//\n",
    "Stockholm": "# STOCKHOLM 1.0\n\nseqa MKT\nseqb MKV\n//\n",
    "Clustal": "CLUSTAL W (1.8) multiple sequence alignment\n\na  MKT\nb  MKV\n   **.\n",
    "PHYLIP": " 2 3\na         MKT\nb         MKV\n",
    "NEXUS": "#NEXUS\nbegin data;\nmatrix\na MKT\n;\nend;\n",
    "MEGA": "#mega\n!Title x;\n#a\nMKT\n#b\nMKV\n",
    "MAF": "##maf version=1\na score=1\ns hg 0 3 + 5 ACG\n",
    "GFF": "##gff-version 3\nc\tx\tCDS\t1\t9\t.\t+\t0\tID=a\n##FASTA\n>c\nMKT\n",
    "MSF": "!!AA_MULTIPLE_ALIGNMENT 1.0\n\n MSF: 3 Type: P\n//\n a MKT\n",
    "SAM": "@HD\tVN:1.6\n@SQ\tSN:c\tLN:5\nr\t0\tc\t1\t9\t3M\t*\t0\t0\tACG\tIII\n",
    "a line of a table": "r\t0\tc\t1\t9\t3M\t*\t0\t0\tACG\tIII\n",
    "a diff": "diff -u a b\n--- a\n+++ b\n@@ -1 +1 @@\n-MKT\n+MKV\n",
    "IntelliGenetics": "; a comment\nNAME\nMKTAY1\n",
    "PIR": ">P1;CRAB\nALPHA CRYSTALLIN B CHAIN\n  MDITIHNPLI*\n",
    "PIR,": ">DL;X\nDESCRIPTION\n ACGT*\n",
    "quoted mail": "> >a\n> MKT\n",
    "fasta36": ">>sp|P1|X desc (12 aa)\n initn: 20 init1: 20\nMKT\n",
    "CD-HIT": ">Cluster 0\n0\t2799aa, >PF04998.6|RPOC2... *\n1\t27aa, >X... at 80%\n",
    "(.qual)": ">a\n40 40 38\n37 2\n",
    "numbers": ">MA1\n-0.1\t0.2\t0.3\t1e-5\n",
    "(csfasta": ">1_2_3_F3\nT0123012..1\n",
    "structure": ">101M:A:secstr\n    HHHHGT  B\n",
    "a structure": ">101M:A:disorder\n---XX\n",
    "structure,": ">ss_pred PSIPRED\nCCHHHEE\n>ss_conf\n9988\n>q\nMKT-a\n",
    "dot-bracket": ">a\nGGGAAACCC\n.((...)). ( -1.20)\n",
    "RNA": ">a\nGGGAAACCC\n<<<...>>>\n",
    "XMFA": "#FormatVersion Mauve1\n> 1:1-5 + a.fa\nMKT--\n> 2:1-5 - b.fa\nMKTAY\n=\n",
    "two versions": ">a\nMKT\n<<<<<<< HEAD\n>b\nMK\n=======\n>c\nMV\n>>>>>>> other\n",
    "BLAST": ">sp|P1 x\nLength=100\n\n Score = 20 bits\n\nQuery  1  MKT  3\n",
    "FASTQ": ">a\nMKT\n@b\nMKV\n+\nIII\n",
}


@pytest.mark.parametrize("begin", ["", ">first\nMKTAYI\n"], ids=["whole", "tail"])
@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_another_format_is_refused_by_its_name(name: str, begin: str, tmp_path: Path) -> None:
    error = refused(write(tmp_path / "in.fa", begin + OTHER_FORMATS[name]))
    assert error.line is not None
    assert name in error.problem
    assert "; " in error.problem, "what to do"


def test_colour_space_in_fastq_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "in.fq", "@a\nACG\n+\nIII\n@b\nT01230121\n+\n!IIIIIIII\n"))
    assert (error.line, error.record) == (5, "b")
    assert "csfastq" in error.problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#A3M#\n>q\nMKT-AY\n>h\nMKaT.AY\n", [("q", "MKTAY"), ("h", "MKATAY")]),
        (">Cluster 0\nMKT\n>Cluster 1\nMK\n", [("Cluster", "MKT"), ("Cluster", "MK")]),
        ("##gff-version 3\n##FASTA\n>c\nMKT\n", [("c", "MKT")]),
        (">gi|1|gb|A| x\x01gi|2| y\nMK\n>a > b >c\nMK\n", [("gi|1|gb|A|", "MK"), ("a", "MK")]),
        (">\nMK\n>   x y\nMK\n>  \nMK\n", [("", "MK"), ("x", "MK"), ("", "MK")]),
        (">P1\nMK\n>a;b\nMK\n>x:y:z\nMK\n", [("P1", "MK"), ("a;b", "MK"), ("x:y:z", "MK")]),
        (">1abc:A:sequence\nMK\n>ssx\nMK\n", [("1abc:A:sequence", "MK"), ("ssx", "MK")]),
        ("@a\tRX:Z:A\tBC:Z:C\tQX:Z:I\nMK\n+\n>;\n", [("a", "MK")]),
    ],
)
def test_what_is_fasta_or_fastq_is_read(
    text: str, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    found, summary = read(write(tmp_path / "in", text))
    assert (found, summary.invalid) == (expected, 0)


# --- damage, byte by byte ---


def small_fasta(first: int, last: int) -> bytes:
    letters = random.Random(first)
    rows = (f">r{n}\n{''.join(letters.choices(ALPHABET, k=30))}\n" for n in range(first, last))
    return "".join(rows).encode()


def compressed(kind: str, content: bytes) -> bytes:
    if kind == "zst":  # as the zstd command does; without, a changed letter goes unnoticed
        return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})
    return COMPRESS[kind](content)


def same_or_refused(path: Path, content: bytes, expected: list[tuple[str, str]]) -> bool:
    """True if refused; what is read is what was written, never less."""
    try:
        found = read(write(path, content))[0]
    except InputError as caught:
        error = caught
    else:
        assert found == expected
        return False
    assert error.exit_code == 2
    assert error.file == str(path)
    assert error.line is not None
    return True


COMPRESSIONS = ["gz", "bz2", "xz", "zst"]


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_file_cut_anywhere_is_refused(kind: str, tmp_path: Path) -> None:
    content = compressed(kind, small_fasta(0, 5))
    assert all(
        same_or_refused(tmp_path / "in.fa", content[:size], []) for size in range(1, len(content))
    )


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_byte_changed_anywhere_never_changes_what_is_read(
    kind: str, mask: int, tmp_path: Path
) -> None:
    path = tmp_path / "in.fa"
    expected = read(write(path, small_fasta(0, 5)))[0]
    content = compressed(kind, small_fasta(0, 5))
    refusals = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= mask
        refusals += same_or_refused(path, bytes(changed), expected)
    # The rest is the time and the system in a gzip header, and the like.
    assert refusals >= len(content) - 20


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_damage_in_a_later_stream_is_not_the_end_of_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "in.fa"
    first, second = compressed(kind, small_fasta(0, 5)), compressed(kind, small_fasta(5, 9))
    expected = read(write(path, small_fasta(0, 5) + small_fasta(5, 9)))[0]
    assert read(write(path, first + second))[0] == expected
    for position in range(len(second)):
        changed = bytearray(second)
        changed[position] ^= 0xFF
        same_or_refused(path, first + bytes(changed), expected)
        if position:
            assert same_or_refused(path, first + second[:position], expected)
    assert same_or_refused(path, first + b"garbage", expected)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_zeros_after_a_stream_are_padding(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "in.fa"
    content = compressed(kind, small_fasta(0, 5)) + bytes(8) + compressed(kind, small_fasta(5, 9))
    assert len(read(write(path, content + bytes(512)))[0]) == 9


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_many_streams_and_much_text_in_few_bytes_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "in.fa"
    many = b"".join(compressed(kind, f">r{n}\nMK\n".encode()) for n in range(500))
    assert read(write(path, many))[1].records == 500
    assert read(write(path, compressed(kind, b">a\n" + b"M" * 3_000_000)))[1].residues == 3_000_000


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_garbage_behind_the_mark_of_a_compression_is_refused(start: bytes, tmp_path: Path) -> None:
    for seed in range(50):
        assert same_or_refused(tmp_path / "in.fa", start + garbage(seed)[:300], [])


def test_a_skippable_frame_as_pzstd_writes_it_is_skipped(tmp_path: Path) -> None:
    frame = b"P*M\x18" + (4).to_bytes(4, "little") + b"size"
    assert read(write(tmp_path / "in.fa", frame + zstd.compress(FASTA.encode())))[0] == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_utf16_is_refused_in_a_compressed_file_too(
    kind: str, encoding: str, tmp_path: Path
) -> None:
    content = compressed(kind, FASTA.encode(encoding))
    assert refused(write(tmp_path / "in.fa", content)).line == 1


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_byte_order_mark_inside_a_compressed_file_is_dropped(kind: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / "in", compressed(kind, b"\xef\xbb\xbf" + FASTA.encode())))[0] == (
        EXPECTED
    )


# --- standard input and pipes ---

READ_ARGUMENTS = """
import sys
from virnuc_dask.errors import InputError
from virnuc_dask.inputs.records import InputSummary
from virnuc_dask.inputs.reader import read_blocks
summary = InputSummary()
try:
    names = [name for block in read_blocks(sys.argv[1:], summary) for name in block.ids]
    print(names, summary.empty_files)
except InputError as error:
    print("refused", error)
if sys.stdin is not None:
    sys.stdin.read()
"""


def read_in_a_process(shell: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", shell.replace("READ", '"$0" -c "$1"'), sys.executable, READ_ARGUMENTS],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_standard_input_named_twice_is_empty_the_second_time(tmp_path: Path) -> None:
    write(tmp_path / "in.gz", gzip.compress(FASTA.encode()))
    assert read_in_a_process("READ - - < in.gz", tmp_path) == "['a', 'b', 'a'] ['-']"


def test_closed_and_empty_standard_input_is_refused(tmp_path: Path) -> None:
    assert read_in_a_process("READ - <&-", tmp_path).startswith("refused standard input: cannot")
    assert read_in_a_process("READ - < /dev/null", tmp_path).startswith("refused standard input: ")


def test_a_pipe_that_gives_one_byte_at_first_is_still_recognised(tmp_path: Path) -> None:
    write(tmp_path / "in", gzip.compress(FASTA.encode()))
    slowly = "(head -c1 in; sleep 0.6; tail -c+2 in)"
    assert read_in_a_process(f"{slowly} | READ -", tmp_path) == "['a', 'b', 'a'] []"
    assert read_in_a_process(f"READ <({slowly})", tmp_path) == "['a', 'b', 'a'] []"


# --- more of what is refused, and where ---


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(InputError, match="cannot open"):
        read("in\0.fa")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n# c\n\n@a\r\nMKT\r\n+\r\nIII\r\n\r\n@b\r\nMKT\r\n+\r\nII\r\n", 9),
        ("@a\nMK\nT\n+\nI\nII\n@b\nMKT\n+c\nIII\n", 7),
        ("@a\nMKT\n+\nIII\n@b\nM KT\n+\nIIII\n", 5),
        ("\n\nMKT\n>a\nMKT\n", 3),
        ("##gff-version 3\nchr1\tx\tgene\n", 2),
    ],
)
def test_the_line_of_an_error_counts_blank_lines_and_comments(
    text: str, line: int, tmp_path: Path
) -> None:
    assert refused(write(tmp_path / "in", text)).line == line


def test_letters_and_lines_are_counted_in_the_file_that_holds_them(tmp_path: Path) -> None:
    good = write(tmp_path / "good.fa", FASTA)
    bad = write(tmp_path / "bad.fq", "@a\nMKT\n+\nIII\n\n@b\nM1\n+\nII\n")
    with pytest.raises(InputError) as caught:
        read(good, bad, strict=True)
    error = caught.value
    assert (error.file, error.line, error.record) == (str(bad), 6, "b")


def test_quality_lines_that_look_like_headers_or_comments_are_qualities(tmp_path: Path) -> None:
    path = write(tmp_path / "in.fq", "@a\nMKT\n+\n@II\n@\nMKV\n+\n#;>\n@c\n\n+\n\n")
    assert read(path)[0] == [("a", "MKT"), ("", "MKV"), ("c", "")]


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_layout_changes_neither_records_nor_lines_nor_digest(
    data: st.DataObject, tmp_path: Path
) -> None:
    rows = data.draw(
        st.lists(st.tuples(st.text("ab|", max_size=3), st.text("ACDXJ-.", max_size=12)), min_size=1)
    )
    text, lines = "", []
    filler = st.lists(st.sampled_from(["", "; c", "# c", "  "]), max_size=2)
    blank = st.sampled_from(["", "\n", "  \n"])
    for name, sequence in rows:
        text += "".join(f"{line}\n" for line in data.draw(filler))
        lines.append(text.count("\n") + 1)
        text += f">{name} description\n" if name else ">\n"
        text += "".join(f"{line}\n" for line in data.draw(filler))
        width = data.draw(st.integers(1, 12))
        for start in range(0, len(sequence), width):
            part = sequence[start : start + width]
            text += (part.lower() if data.draw(st.booleans()) else part) + "\n" + data.draw(blank)
        text += "".join(f"{line}\n" for line in data.draw(filler))
    text = text.replace("\n", data.draw(st.sampled_from(["\n", "\r\n"])))
    text = text.rstrip() if data.draw(st.booleans()) else text
    kind = data.draw(st.sampled_from(list(COMPRESS)))
    path = write(tmp_path / "in", COMPRESS[kind](text.encode()))
    assert [record.line for record in read_records(str(path))] == lines
    plain = "".join(f">{name}\n{sequence}\n" for name, sequence in rows)
    expected, summary = read(write(tmp_path / "plain", plain))
    found, other = read(path)
    assert found == expected
    assert other.sha256 == summary.sha256
    assert (other.gaps, other.ambiguous_j, other.empty) == (
        summary.gaps,
        summary.ambiguous_j,
        summary.empty,
    )
