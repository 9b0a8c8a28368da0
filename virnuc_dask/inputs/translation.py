"""Translates nucleotides to proteins: windows of reads and contigs, and their six reading frames.

A batch is translated at once. The residue of a codon depends only on its position and strand, not
on its window or frame. So each letter gets two residues: of the codon that begins there, and of the
codon that ends there on the reverse strand. A frame is every third of them. Stops are counted by
cumulative sums over every third letter, so that frames with a stop, nine of ten, are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from Bio.Data import CodonTable
from numpy.typing import NDArray

from virnuc_dask.errors import UsageError
from virnuc_dask.inputs.records import Block, InputSummary, Origin, Record
from virnuc_dask.settings import Translation

_STOP, _UNKNOWN = ord("*"), ord("X")
# A, C, G, T and U. Any other letter is unknown.
_CODE = np.full(256, 4, np.uint8)
for _letters, _value in (("Aa", 0), ("Cc", 1), ("Gg", 2), ("TtUu", 3)):
    for _letter in _letters:
        _CODE[ord(_letter)] = _value
# VirNucPro's tables have no U.
_CODE_DNA = _CODE.copy()
_CODE_DNA[[ord("U"), ord("u")]] = 4


@dataclass(frozen=True, slots=True)
class Proteins:
    """Proteins of a batch of nucleotide records, in the order of records, windows, frames, starts.

    Attributes
    ----------
    read : ndarray, int64, shape (n,)
        Index of the record in the batch.
    window : ndarray, int32, shape (n,)
        Number of the window in the record, from 1.
    frame : ndarray, int8, shape (n,)
        +1, +2, +3, and -1, -2, -3 on the reverse strand.
    start : ndarray, int64, shape (n,)
        As in `Origin`.
    lengths : ndarray, int32, shape (n,)
        Residues.
    residues : ndarray, uint8, shape (sum of lengths,)
        ASCII, end to end.
    """

    read: NDArray[np.int64]
    window: NDArray[np.int32]
    frame: NDArray[np.int8]
    start: NDArray[np.int64]
    lengths: NDArray[np.int32]
    residues: NDArray[np.uint8]


def cut_windows(
    lengths: NDArray[np.int64], window: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut records into windows as VirNucPro does: the fewest that cover a record, evenly spaced.

    A record of L nucleotides has n = ceil(L / c) windows of c nucleotides, with n c - L = spare
    nucleotides for overlaps. With q, r = divmod(spare, n), the first min(q + r, n - 1) overlaps
    have q + 1 nucleotides and the others q. The last window can be short. [`split_fasta_chunk` in
    VirNucPro's units.py]

    Parameters
    ----------
    lengths : ndarray, int64, shape (reads,)
    window : int, optional
        Nucleotides per window, c. None: each record is one window.

    Returns
    -------
    read, number, start, stop : ndarray, int64, shape (windows,)
        Index of the record; number of the window in the record, from 0; first letter of the
        window in the record, and its end.
    """
    size = np.maximum(lengths, 1) if window is None else np.full(len(lengths), window)
    count = -(-lengths // size)
    read = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(read)) - np.repeat(np.cumsum(count) - count, count)
    spare = count * size - lengths
    q, r = np.divmod(spare, np.maximum(count, 1))
    more = np.minimum(q + r, count - 1)
    start = number * size[read] - number * q[read] - np.minimum(number, more[read])
    return read, number, start, np.minimum(start + size[read], lengths[read])


@dataclass(frozen=True, slots=True)
class _Stretches:
    """Runs of codons.

    `window` is the index of a window. `place` is the position of the first codon's lowest letter
    among all letters. `step`, 3 or -3, leads to the next codon. `count` is the number of codons.
    """

    window: NDArray[np.int64]
    frame: NDArray[np.int8]
    place: NDArray[np.int64]
    count: NDArray[np.int64]

    @property
    def step(self) -> NDArray[np.int64]:
        return np.where(self.frame > 0, 3, -3)

    @property
    def last(self) -> NDArray[np.int64]:
        """Position of the last codon of runs that have one."""
        return self.place + self.step * (self.count - 1)

    def select(self, kept: NDArray[np.bool_]) -> _Stretches:
        return _Stretches(self.window[kept], self.frame[kept], self.place[kept], self.count[kept])


class _Codons:
    """For each position, the residue of the codon with its lowest letter there, on each strand."""

    def __init__(self, codes: NDArray[np.uint8], genetic_code: int) -> None:
        # Two additional unknown letters, so that a codon begins at every letter.
        codes = np.append(codes, np.full(2, 4, np.uint8))
        forward, reverse = _tables(genetic_code)
        number = (codes[:-2] * 25 + codes[1:-1] * 5 + codes[2:]).astype(np.uint8)
        # Both strands end to end: positions on the reverse strand are `_letters` further on.
        self.residues = np.concatenate((forward[number], reverse[number]))
        self._letters = len(number)

    def places(self, runs: _Stretches) -> NDArray[np.int64]:
        """Positions of all codons of some runs, in order, shape (sum of counts,)."""
        numbers = np.arange(int(runs.count.sum()))
        numbers -= np.repeat(np.cumsum(runs.count) - runs.count, runs.count)
        return np.repeat(self._first(runs), runs.count) + np.repeat(runs.step, runs.count) * numbers

    def last(self, runs: _Stretches) -> NDArray[np.uint8]:
        """Residue of the last codon of runs that have one."""
        return self.residues[self._first(runs) + runs.step * (runs.count - 1)]

    def number_of(self, residue: int, runs: _Stretches) -> NDArray[np.int64]:
        """Number of codons of each run that stand for a residue: a difference of two sums."""
        marks = self.residues == residue
        padding = -len(marks) % 3
        sums = np.pad(marks, (3, padding)).reshape(-1, 3).cumsum(0, np.int32).ravel()
        strand = self._first(runs) - runs.place + 3
        low, high = np.minimum(runs.place, runs.last), np.maximum(runs.place, runs.last)
        return np.asarray(sums[high + strand] - sums[low + strand - 3], np.int64)

    def _first(self, runs: _Stretches) -> NDArray[np.int64]:
        return runs.place + np.where(runs.frame > 0, 0, self._letters)


@lru_cache
def _tables(genetic_code: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Residues of codons and of their reverse complements, at 25 a + 5 b + c. Code 4 is unknown."""
    table = CodonTable.unambiguous_dna_by_id.get(genetic_code)
    if table is None:
        raise UsageError(f"genetic code {genetic_code}: NCBI has no such table")
    forward, reverse = np.full(125, _UNKNOWN, np.uint8), np.full(125, _UNKNOWN, np.uint8)
    for a, b, c in product(range(4), repeat=3):
        codon = "".join("ACGT"[code] for code in (a, b, c))
        # Some tables have codons that can be a stop or a residue. Here they are stops.
        residue = "*" if codon in table.stop_codons else table.forward_table[codon]
        forward[25 * a + 5 * b + c] = ord(residue)
        reverse[25 * (3 - c) + 5 * (3 - b) + 3 - a] = ord(residue)
    return forward, reverse


def translate(sequences: Sequence[str], how: Translation) -> Proteins:
    """Translate a batch of nucleotide sequences.

    Parameters
    ----------
    sequences : sequence of str
        Without white space. In either case, letters other than A, C, G, T and U are unknown.
    how : Translation
    """
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    letters = np.frombuffer("".join(sequences).encode("ascii", "replace"), np.uint8)
    codes = (_CODE_DNA if how.frames == "virnucpro" else _CODE)[letters]
    codons = _Codons(codes, how.genetic_code)
    read, number, begin, end = cut_windows(lengths, how.window)
    before = np.cumsum(lengths) - lengths
    frames = _six_frames(before[read] + begin, end - begin)
    if how.frames == "virnucpro":
        kept = frames.select(codons.number_of(_STOP, frames) == 0)
    elif how.frames == "open":
        kept = _open(frames, codons)
    else:
        kept = _between_stops(frames, codons)
    if how.frames != "virnucpro":
        kept = kept.select(kept.count >= how.min_residues)
        unknown = codons.number_of(_UNKNOWN, kept)
        kept = kept.select(unknown <= how.max_unknown * kept.count)
    residues, sizes = codons.residues[codons.places(kept)], kept.count
    if how.frames == "virnucpro":
        # A codon with an unknown letter is left out, which shortens the protein.
        known = residues != _UNKNOWN
        sizes = sizes - codons.number_of(_UNKNOWN, kept)
        residues, kept, sizes = residues[known], kept.select(sizes > 0), sizes[sizes > 0]
    return Proteins(
        read[kept.window],
        number[kept.window].astype(np.int32) + 1,
        kept.frame,
        kept.place - before[read[kept.window]] + np.where(kept.frame > 0, 0, 2),
        sizes.astype(np.int32),
        residues,
    )


def _six_frames(first: NDArray[np.int64], size: NDArray[np.int64]) -> _Stretches:
    """F1, F2, F3, R1, R2, R3 of each window, without frames that have no codon."""
    shift = np.arange(3)
    count = np.maximum(0, (size[:, None] - shift) // 3)
    forward = first[:, None] + shift
    backward = (first + size - 3)[:, None] - shift
    frames = _Stretches(
        np.repeat(np.arange(len(first)), 6),
        np.tile(np.array([1, 2, 3, -1, -2, -3], np.int8), len(first)),
        np.hstack((forward, backward)).ravel(),
        np.hstack((count, count)).ravel(),
    )
    return frames.select(frames.count > 0)


def _open(frames: _Stretches, codons: _Codons) -> _Stretches:
    """Frames without a stop, and frames with one stop at the end, which is left out."""
    stops = codons.number_of(_STOP, frames)
    frames, stops = frames.select(stops <= 1), stops[stops <= 1]
    ends = codons.last(frames) == _STOP
    shorter = _Stretches(frames.window, frames.frame, frames.place, frames.count - ends)
    return shorter.select(stops == ends)


def _between_stops(frames: _Stretches, codons: _Codons) -> _Stretches:
    """Every stretch between two stops, or between a stop and an end of the frame."""
    is_stop = codons.residues[codons.places(frames)] == _STOP
    # An additional stop at the end of each frame, so that every stretch ends with one.
    ends = np.cumsum(frames.count)
    is_stop = np.insert(is_stop, ends, True)
    last = np.flatnonzero(is_stop)
    first = np.append(0, last[:-1] + 1)
    frame = np.searchsorted(ends + np.arange(len(ends)), last)
    begin = ends - frames.count + np.arange(len(ends))
    return _Stretches(
        frames.window[frame],
        frames.frame[frame],
        frames.place[frame] + frames.step[frame] * (first - begin[frame]),
        last - first,
    )


def translate_records(records: Sequence[Record], how: Translation, summary: InputSummary) -> Block:
    """Translate a batch of nucleotide records into rows with names and origins.

    Names are VirNucPro's: ``read_chunk_1F2``. Without windows they are ``read_F2``. With `orf` the
    positions of the stretch in the record follow, from 1: ``read_F2_31-420``.
    """
    sequences = ["".join(record.sequence.split()) for record in records]
    proteins = translate(sequences, how)
    ids = _names([record.id for record in records], proteins, how)
    origin = Origin(
        read_ids=[record.id for record in records],
        read=proteins.read + summary.reads,
        start=proteins.start,
        window=proteins.window,
        frame=proteins.frame,
    )
    headers = summary.take_headers(records).select(proteins.read)
    summary.take_reads(records, sequences, proteins.read, how)
    return Block(ids, proteins.lengths, proteins.residues, origin, headers)


def _names(reads: list[str], proteins: Proteins, how: Translation) -> list[str]:
    frames = [f"{'F' if frame > 0 else 'R'}{abs(frame)}" for frame in (*range(-3, 0), 0, 1, 2, 3)]
    parts = zip(
        proteins.read.tolist(),
        proteins.window.tolist(),
        proteins.frame.tolist(),
        proteins.start.tolist(),
        proteins.lengths.tolist(),
        strict=True,
    )
    if how.window is not None:
        return [f"{reads[r]}_chunk_{w}{frames[f + 3]}" for r, w, f, _, _ in parts]
    if how.frames != "orf":
        return [f"{reads[r]}_{frames[f + 3]}" for r, _, f, _, _ in parts]
    return [
        f"{reads[r]}_{frames[f + 3]}_"
        + (f"{s + 1}-{s + 3 * n}" if f > 0 else f"{s + 1}-{s + 2 - 3 * n}")
        for r, _, f, s, n in parts
    ]
