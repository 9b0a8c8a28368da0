"""Cuts proteins into tiles: overlapping pieces of one length, for example that of reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.inputs.records import Block, InputSummary, Origin
from virnuc_dask.settings import Tiling

# One protein may give millions of tiles.
_ROWS_PER_BLOCK = 65_536
_RESIDUES_PER_BLOCK = 2**22


class Tiles(NamedTuple):
    """Some tiles of a batch of proteins, in order.

    Attributes
    ----------
    protein : ndarray, int64, shape (n,)
        Index of the protein in the batch.
    start, stop : ndarray, int64, shape (n,)
        The tile has the protein's residues from `start` to before `stop`, counted from 0.
    """

    protein: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]


def cut_tiles(
    lengths: NDArray[np.int32], how: Tiling, at_once: int = _ROWS_PER_BLOCK
) -> Iterator[Tiles]:
    """Cut proteins into tiles: one at every step, and the last at the end of the protein.

    A protein of L residues gives 1 + ceil((L - size) / step) tiles, all of `size` residues. A
    protein no longer than `size` is one tile, even if it is empty.

    Parameters
    ----------
    lengths : ndarray, int32, shape (proteins,)
    how : Tiling
    at_once : int
        Maximum number of tiles to make at a time.
    """
    last_start = np.maximum(lengths.astype(np.int64) - how.size, 0)
    counts = 1 - (-last_start // how.stride)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for first in range(0, max(total, 1), at_once):
        numbers = np.arange(first, min(first + at_once, total))
        protein = np.searchsorted(ends, numbers, side="right")
        number = numbers - (ends - counts)[protein]
        start = np.minimum(number * how.stride, last_start[protein])
        yield Tiles(protein, start, np.minimum(start + how.size, lengths[protein]))


def tile_block(block: Block, how: Tiling, summary: InputSummary) -> Iterator[Block]:
    """Tiles of a block's proteins, as one block or several.

    A tile's name is its protein's name and its residues there, counted from 1 as in Pfam:
    ``P12345/25-48``. A tile has its protein's header.
    """
    first_residue = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
    read_ids = block.ids if block.origin is None else block.origin.read_ids
    at_once = max(1, min(_ROWS_PER_BLOCK, _RESIDUES_PER_BLOCK // how.size))
    for tiles in cut_tiles(block.lengths, how, at_once):
        lengths = tiles.stop - tiles.start
        begin = first_residue[tiles.protein] + tiles.start
        positions = np.arange(int(lengths.sum()))
        positions += np.repeat(begin - np.cumsum(lengths) + lengths, lengths)
        spans = zip(*(values.tolist() for values in tiles), strict=True)
        yield Block(
            [f"{block.ids[protein]}/{start + 1}-{stop}" for protein, start, stop in spans],
            lengths.astype(np.int32),
            block.residues[positions],
            _origin(block, tiles, read_ids, summary.tiled),
            block.headers and block.headers.select(tiles.protein),
        )
        read_ids = []
    summary.tiled += len(block.ids)


def _origin(block: Block, tiles: Tiles, read_ids: list[str], before: int) -> Origin:
    """Where tiles begin in the input: at a residue of a protein or at a nucleotide of a read."""
    origin, protein = block.origin, tiles.protein
    if origin is None or origin.window is None or origin.frame is None:
        return Origin(read_ids, before + protein, tiles.start)
    frame = origin.frame[protein]
    start = origin.start[protein] + 3 * tiles.start * np.sign(frame)
    return Origin(read_ids, origin.read[protein], start, origin.window[protein], frame)
