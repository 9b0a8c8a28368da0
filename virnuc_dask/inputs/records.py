"""Records and the letter rules: what is a residue, what is mended, what is not."""

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
# Names the rules of `clean` below; part of a store's identity, so change it with them.
ALPHABET_POLICY = "esm2; J to X; gaps removed; terminal stop removed"

_GAPS = "-."
# Letters of proteins that stand for no nucleotide, nor, by IUPAC's code, for several.
_PROTEIN_ONLY = frozenset("EFILPQZJOefilpqzjo*")
_TAIL = "*" + _GAPS  # what may follow the last residue


class Record(NamedTuple):
    """One input record, as written in the file. Millions are made: a tuple is made the fastest.

    Attributes
    ----------
    id : str
        First word of the header; may be empty, and need not be unique.
    sequence : str
        Residues as written, white space and line breaks included.
    file : str
        The input, as the user named it.
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
    """What the headers of a block's rows say, and where they stand. No row value depends on it.

    Attributes
    ----------
    description : list of str
        What follows the identifier; of a translated row its read's, of a tile its record's.
    source : ndarray, int32, shape (n,)
        Which of `InputSummary.files`.
    """

    description: list[str]
    source: NDArray[np.int32]

    def select(self, records: NDArray[np.int64]) -> Headers:
        """Those of some records, in the order given, shape (n,)."""
        return Headers([self.description[n] for n in records.tolist()], self.source[records])


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows of a block come from, if they were translated or are tiles.

    Attributes
    ----------
    read_ids : list of str
        Identifiers of all records that were read for the block, also those without a row.
    read : ndarray, int64, shape (n,)
        Which record of the input, from 0.
    start : ndarray, int64, shape (n,)
        The first nucleotide of the protein's first codon in the record, from 0; of a reverse frame
        it is the highest. Of a tile of a protein record, its first residue after cleaning, from 0.
    window : ndarray, int32, shape (n,), optional
        Which window of the record, from 1; of translated rows.
    frame : ndarray, int8, shape (n,), optional
        +1, +2, +3; -1, -2, -3 on the reverse strand; of translated rows.
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
        ASCII residues in upper case, records end to end. A record that `invalid_rows` finds keeps
        its offending letters.
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
    """What reading the input found; filled while the blocks go by.

    Attributes
    ----------
    records, residues : int
        Rows, one for each record unless it was translated or tiled, and their residues.
    empty : int
        Records without a residue. They keep their row, with status ``empty``.
    invalid : int
        Records with letters that are no residues. They keep their row, ``invalid_residues``; of
        tiles those with such a letter.
    ambiguous_j, gaps, terminal_stops : int
        Letters J read as X, gap letters removed, terminal stops removed.
    lengths : list of ndarray, int32
        Lengths of all rows, block by block.
    files : dict of str to int
        Inputs, numbered in their order; one that was given twice by its first place.
    empty_files : list of str
        Inputs without a record.
    first_invalid : InputError, optional
        Where the first invalid record is.
    nucleotide_like : int
        Records that use no letter but A C G T U N.
    reads, nucleotides : int
        Nucleotide records that were translated, and their letters.
    without_row : list of str
        Identifiers of the reads that gave no row.
    contigs_without_row : int
        Those of them that are so long that ``orf`` would have been the rule for them, and was not.
    tiled : int
        Proteins, records or frames, that were cut into tiles.
    protein_like : int
        Reads with a letter that stands for no nucleotide, nor for several.
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
    files: dict[str, int] = field(default_factory=dict)
    empty_files: list[str] = field(default_factory=list)
    first_invalid: InputError | None = None
    sha256: str = ""

    def take_headers(self, records: Sequence[Record]) -> Headers:
        """What the headers of records say; files that were not met before are added to `files`."""
        sources = (self.files.setdefault(record.file, len(self.files)) for record in records)
        return Headers(
            [record.description for record in records],
            np.fromiter(sources, np.int32, len(records)),
        )

    def take_rows(self, lengths: NDArray[np.int32]) -> None:
        """Count rows, by their lengths."""
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
        """Count translated records; `with_row` says which of them have rows."""
        self.reads += len(records)
        self.nucleotides += sum(map(len, sequences))
        has_row = np.zeros(len(records), np.bool_)
        has_row[with_row] = True
        without = np.flatnonzero(~has_row).tolist()
        self.without_row += [records[number].id for number in without]
        if how.rule != "orf":
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

    Several streams, so that the digest does not depend on where blocks are cut. Of translated and
    tiled rows also where they come from, and of records that gave no row the identifiers.
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
        """Add where rows come from."""
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
    """Which rows hold a letter that is no residue, an internal stop included.

    Parameters
    ----------
    residues : ndarray, uint8, shape (sum of lengths,)
    lengths : ndarray, int32, shape (n,)

    Returns
    -------
    ndarray, bool, shape (n,)
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    found = np.zeros(len(lengths), np.bool_)
    found[rows[~_VALID[residues]]] = True
    return found


def clean_sequence(sequence: str) -> str:
    """Clean one sequence by the rules of a run (see the README, "Letters").

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
    """A header's text; bytes that were not UTF-8 are taken as Latin-1, which loses none."""
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
    """Apply the letter rules to a batch at once: one look-up per letter, no loop over letters."""
    written = [_without_space(record.sequence) for record in records]
    kept = [sequence.rstrip(_TAIL) for sequence in written]
    for whole, sequence in zip(written, kept, strict=True):
        if len(sequence) != len(whole):
            stops = whole.count("*", len(sequence))
            summary.terminal_stops += stops
            summary.gaps += len(whole) - len(sequence) - stops
    lengths = np.fromiter(map(len, kept), np.int64, len(kept))
    # Letters beyond ASCII become '?', which is no residue either.
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
    ids = [record.id for record in records]
    return Block(ids, lengths32, letters, headers=summary.take_headers(records))


def _without_space(sequence: str) -> str:
    """Drop white space of every kind, as the parsers do at the ends of lines."""
    return "".join(sequence.split())


def _invalid_letter(record: Record) -> InputError:
    allowed = set(ALPHABET + ALPHABET.lower() + "Jj" + _GAPS)
    body = _without_space(record.sequence).rstrip(_TAIL)
    position, letter = next((i, c) for i, c in enumerate(body, 1) if c not in allowed)
    # Other surrogates stand for no byte; only a caller's own text can have them.
    shown = decoded_header(letter) if "\udc80" <= letter <= "\udcff" else letter
    what = "an internal stop '*'" if letter == "*" else f"letter {shown!r}, no residue"
    return InputError(
        f"{what} at position {position}", file=record.file, line=record.line, record=record.id
    )
