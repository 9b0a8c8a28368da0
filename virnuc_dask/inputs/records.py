"""Records and the rules for letters: which are residues, which are corrected, which are invalid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import InputError
from virnuc_dask.settings import CONTIG_NUCLEOTIDES, Translation

# The 20 amino acids, and ESM's own X B U Z O.
ALPHABET = "ACDEFGHIKLMNPQRSTVWYXBUZO"
# Names the rules of `clean` below. It is part of a store's identity: change it with the rules.
ALPHABET_POLICY = "esm2; J to X; gaps removed; terminal stop removed"

_GAPS = "-."
# Protein letters that stand neither for a nucleotide nor, in IUPAC's code, for several.
_PROTEIN_ONLY = frozenset("EFILPQZJOefilpqzjo*")
_TAIL = "*" + _GAPS  # may follow the last residue


class Record(NamedTuple):
    """One input record, as written in the file. A tuple, the fastest to make by the million.

    Attributes
    ----------
    id : str
        First word of the header. It may be empty and need not be unique.
    sequence : str
        Residues as written, including white space and line breaks.
    file : str
        Name of the input as the user gave it.
    line : int
        Line of the record's header, counted from 1.
    description : str
        The rest of the header.
    """

    id: str
    sequence: str
    file: str
    line: int
    description: str = ""


@dataclass(frozen=True, slots=True)
class Headers:
    """Headers of a block's rows, and their files. No row value depends on them.

    Attributes
    ----------
    description : list of str
        Text after the identifier. A translated row has its read's, a tile has its record's.
    source : ndarray, int32, shape (n,)
        Number of the file in `InputSummary.files`.
    """

    description: list[str]
    source: NDArray[np.int32]

    def select(self, records: NDArray[np.int64]) -> Headers:
        """Headers of some records, in the order given, shape (n,)."""
        return Headers([self.description[n] for n in records.tolist()], self.source[records])


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows of a block come from, if they are translated or are tiles.

    Attributes
    ----------
    read_ids : list of str
        Identifiers of all records that were read for the block, including those without a row.
    read : ndarray, int64, shape (n,)
        Number of the record in the input, from 0.
    start : ndarray, int64, shape (n,)
        Translated rows: position in the record of the first nucleotide of the protein's first
        codon, from 0. On the reverse strand this is the protein's highest position. Tiles of
        protein records: first residue of the tile in the cleaned record, from 0.
    window : ndarray, int32, shape (n,), optional
        Translated rows: number of the window in the record, from 1.
    frame : ndarray, int8, shape (n,), optional
        Translated rows: +1, +2, +3, and -1, -2, -3 on the reverse strand.
    """

    read_ids: list[str]
    read: NDArray[np.int64]
    start: NDArray[np.int64]
    window: NDArray[np.int32] | None = None
    frame: NDArray[np.int8] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive cleaned records.

    Attributes
    ----------
    ids : list of str
    lengths : ndarray, int32, shape (n,)
        Residues per record, after cleaning.
    residues : ndarray, uint8, shape (sum of lengths,)
        ASCII residues in upper case, records end to end. Records that `invalid_rows` finds keep
        their invalid letters.
    origin : Origin, optional
    headers : Headers, optional
    """

    ids: list[str]
    lengths: NDArray[np.int32]
    residues: NDArray[np.uint8]
    origin: Origin | None = None
    headers: Headers | None = None


@dataclass(slots=True)
class InputSummary:
    """Counts and findings from reading the input, filled while blocks are read.

    Attributes
    ----------
    records, residues : int
        Rows and their residues. A record has one row unless it is translated or tiled.
    empty : int
        Records without a residue. They keep their row, with status ``empty``.
    invalid : int
        Records with letters that are no residues. They keep their row, with status
        ``invalid_residues``. In tiled records, only tiles with such a letter have this status.
    ambiguous_j, gaps, terminal_stops : int
        Letters J read as X, gap letters removed, terminal stops removed.
    lengths : list of ndarray, int32
        Lengths of all rows, block by block.
    invalid_lengths : list of ndarray, int32
        Lengths of the invalid records.
    files : dict of str to int
        Inputs, numbered in order. An input that is given twice has its first number.
    empty_files : list of str
        Inputs without a record.
    first_invalid : InputError, optional
        Error with the position of the first invalid record.
    nucleotide_like : int
        Records with no letters except A C G T U N.
    reads, nucleotides : int
        Nucleotide records that were translated, and their letters.
    without_row : list of str
        Identifiers of the reads that gave no row.
    contigs_without_row : int
        Reads without a row that are long enough for the rule ``orf``, but had another rule.
    tiled : int
        Proteins (records or frames) that were cut into tiles.
    protein_like : int
        Reads with a letter that stands neither for a nucleotide nor for several.
    first_protein_like : Record, optional
    """

    records: int = 0
    residues: int = 0
    empty: int = 0
    invalid: int = 0
    ambiguous_j: int = 0
    gaps: int = 0
    terminal_stops: int = 0
    nucleotide_like: int = 0
    reads: int = 0
    nucleotides: int = 0
    without_row: list[str] = field(default_factory=list)
    contigs_without_row: int = 0
    tiled: int = 0
    protein_like: int = 0
    first_protein_like: Record | None = None
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    invalid_lengths: list[NDArray[np.int32]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    empty_files: list[str] = field(default_factory=list)
    first_invalid: InputError | None = None
    sha256: str = ""

    def take_headers(self, records: Sequence[Record]) -> Headers:
        """Headers of records. New files are added to `files`."""
        sources = (self.files.setdefault(record.file, len(self.files)) for record in records)
        return Headers(
            [record.description for record in records],
            np.fromiter(sources, np.int32, len(records)),
        )

    def take_rows(self, lengths: NDArray[np.int32]) -> None:
        """Count rows of these lengths."""
        self.records += len(lengths)
        self.residues += int(lengths.sum())
        self.lengths.append(lengths)

    def take_reads(
        self,
        records: Sequence[Record],
        sequences: Sequence[str],
        with_row: NDArray[np.int64],
        how: Translation,
    ) -> None:
        """Count translated records. `with_row` has the indices of those with rows."""
        self.reads += len(records)
        self.nucleotides += sum(map(len, sequences))
        has_row = np.zeros(len(records), np.bool_)
        has_row[with_row] = True
        without = np.flatnonzero(~has_row).tolist()
        self.without_row += [records[number].id for number in without]
        if how.frames != "orf":
            long = (len(sequences[number]) >= CONTIG_NUCLEOTIDES for number in without)
            self.contigs_without_row += sum(long)
        for record, sequence in zip(records, sequences, strict=True):
            if not _PROTEIN_ONLY.isdisjoint(sequence):
                self.protein_like += 1
                self.first_protein_like = self.first_protein_like or record

    def all_lengths(self) -> NDArray[np.int32]:
        """Lengths of all rows, shape (records,)."""
        return np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int32)


class InputDigest:
    """SHA-256 of cleaned records: their identifiers, lengths and residues, in order.

    Each of these is a stream of its own, so the digest does not depend on where blocks are cut. For
    translated and tiled rows the digest includes their origin and the identifiers of all records.
    """

    def __init__(self) -> None:
        self._streams = [sha256(), sha256(), sha256()]

    def update(self, block: Block) -> None:
        """Add records."""
        ids, lengths, residues = self._streams[:3]
        ids.update("".join(f"{name}\n" for name in block.ids).encode())
        lengths.update(block.lengths.astype("<i4").tobytes())
        residues.update(block.residues.tobytes())
        if block.origin is not None:
            self.update_origin(block.origin)

    def update_origin(self, origin: Origin) -> None:
        """Add the origin of rows."""
        if len(self._streams) == 3:
            self._streams += [sha256() for _ in range(5)]
        reads, *others = self._streams[3:]
        reads.update("".join(f"{name}\n" for name in origin.read_ids).encode())
        values = (origin.read, origin.window, origin.frame, origin.start)
        for stream, array in zip(others, values, strict=True):
            if array is not None:
                stream.update(array.astype(array.dtype.newbyteorder("<")).tobytes())

    def hexdigest(self) -> str:
        """Digest of all records so far."""
        return sha256(b"".join(stream.digest() for stream in self._streams)).hexdigest()


def invalid_rows(residues: NDArray[np.uint8], lengths: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which rows have a letter that is no residue, such as an internal stop.

    Parameters
    ----------
    residues : ndarray, uint8, shape (sum of lengths,)
    lengths : ndarray, int32, shape (n,)

    Returns
    -------
    ndarray, bool, shape (n,)
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    invalid = np.zeros(len(lengths), np.bool_)
    invalid[rows[~_VALID[residues]]] = True
    return invalid


def clean_sequence(sequence: str) -> str:
    """Clean one sequence by the rules of a run (see "Letters" in `docs/reference/input.md`).

    Raises
    ------
    InputError
        A letter is no residue.
    """
    summary = InputSummary()
    block = clean([Record("", sequence, "argument", 1)], summary)
    if summary.first_invalid is not None:
        raise InputError(summary.first_invalid.problem, file="sequence")
    return block.residues.tobytes().decode("ascii")


def decoded_header(text: str) -> str:
    """Text of a header. If its bytes are not UTF-8 it is read as Latin-1, which loses none."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text


def _table(pairs: Iterable[tuple[str, str]]) -> NDArray[np.uint8]:
    table = np.arange(256, dtype=np.uint8)
    for old, new in pairs:
        table[ord(old)] = ord(new)
    return table


_UPPER = _table((letter, letter.upper()) for letter in "abcdefghijklmnopqrstuvwxyz")
_VALID = np.isin(np.arange(256), np.frombuffer(ALPHABET.encode(), np.uint8))
_IS_GAP = np.isin(np.arange(256), np.frombuffer(_GAPS.encode(), np.uint8))
_NOT_NUCLEOTIDE = ~np.isin(np.arange(256), np.frombuffer(b"ACGTUN", np.uint8))


def clean(records: Sequence[Record], summary: InputSummary) -> Block:
    """Apply the letter rules to a whole batch, by one table look-up per letter."""
    written = [_without_space(record.sequence) for record in records]
    kept = [sequence.rstrip(_TAIL) for sequence in written]
    for whole, sequence in zip(written, kept, strict=True):
        if len(sequence) != len(whole):
            stops = whole.count("*", len(sequence))
            summary.terminal_stops += stops
            summary.gaps += len(whole) - len(sequence) - stops
    lengths = np.fromiter(map(len, kept), np.int64, len(kept))
    # Letters outside ASCII become '?', which is no residue either.
    letters = _UPPER[np.frombuffer("".join(kept).encode("ascii", "replace"), np.uint8)]

    removed = _IS_GAP[letters]
    if removed.any():
        summary.gaps += int(removed.sum())
        rows = np.repeat(np.arange(len(kept)), lengths)
        lengths -= np.bincount(rows[removed], minlength=len(kept))
        letters = letters[~removed]
    ambiguous = letters == ord("J")
    summary.ambiguous_j += int(ambiguous.sum())
    letters[ambiguous] = ord("X")

    lengths32 = lengths.astype(np.int32)
    invalid = invalid_rows(letters, lengths32)
    if invalid.any() and summary.first_invalid is None:
        row = int(np.argmax(invalid))
        summary.first_invalid = _invalid_letter(records[row])
    rows = np.repeat(np.arange(len(kept)), lengths32)
    protein_like = np.bincount(rows[_NOT_NUCLEOTIDE[letters]], minlength=len(kept)) > 0
    summary.nucleotide_like += int((~protein_like & (lengths32 > 0)).sum())
    summary.empty += int((lengths32 == 0).sum())
    summary.invalid += int(invalid.sum())
    summary.invalid_lengths += [lengths32[invalid]] if invalid.any() else []
    ids = [record.id for record in records]
    return Block(ids, lengths32, letters, headers=summary.take_headers(records))


def _without_space(sequence: str) -> str:
    """Remove white space of every kind, as parsers do at the ends of lines."""
    return "".join(sequence.split())


def _invalid_letter(record: Record) -> InputError:
    allowed = set(ALPHABET + ALPHABET.lower() + "Jj" + _GAPS)
    body = _without_space(record.sequence).rstrip(_TAIL)
    position, letter = next((i, c) for i, c in enumerate(body, 1) if c not in allowed)
    # Other surrogates stand for no byte. Only text from a caller can have them.
    shown = decoded_header(letter) if "\udc80" <= letter <= "\udcff" else letter
    if letter == "*":
        problem = f"an internal stop '*' at position {position}"
    else:
        problem = f"letter {shown!r} at position {position} is not a residue"
    return InputError(problem, file=record.file, line=record.line, record=record.id)
