"""Which ESM-2 models there are, and about how long one takes. Loads no torch.

How long is estimated from a model's size and the kind of device alone, never measured, so that what
follows from it, the size of a chunk, is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.settings import ModelSpec, Precision

# Operations per second of one worker, about. A core of a CPU reaches 50 (AVX2) to 220 (AVX-512) in
# float32; of GPUs an RTX 4090 reaches 90 in 16 bits, an A100 180, an H200 590: see RESULTS.md.
_CORE = 100e9
_GPU: dict[Precision, float] = {"float32": 30e12, "bfloat16": 200e12, "float16": 200e12}
# Bytes per second at which weights are downloaded, by a slow line.
_DOWNLOAD = 2e6

# A chunk is what a kill costs, so it should take about this long; where there are few sequences,
# less, so that each worker gets several chunks, but not so little that overhead counts.
_CHUNK_S = 40.0
_LEAST_CHUNK_S = 0.1
_CHUNKS_PER_WORKER = 4
_MOST_ROWS = 8192
# Of the residues' own representations, which lie in memory together.
_MOST_RESIDUE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Published:
    """An ESM-2 model of fair-esm's.

    Attributes
    ----------
    layers, dimension : int
    megabytes : int
        To download. The two largest are in float16.
    """

    layers: int
    dimension: int
    megabytes: int


# By fair-esm's names.
PUBLISHED = {
    "esm2_t6_8M_UR50D": Published(6, 320, 30),
    "esm2_t12_35M_UR50D": Published(12, 480, 134),
    "esm2_t30_150M_UR50D": Published(30, 640, 593),
    "esm2_t33_650M_UR50D": Published(33, 1280, 2_610),
    "esm2_t36_3B_UR50D": Published(36, 2560, 5_680),
    "esm2_t48_15B_UR50D": Published(48, 5120, 30_300),
}


def parameters(layers: int, dimension: int) -> int:
    """Weights in the matrices of an ESM-2's layers, which are nearly all that it has."""
    return 12 * layers * dimension**2


def operations(layers: int, dimension: int, length: float) -> float:
    """Floating-point operations for a residue of a sequence, its share of attention included.

    Parameters
    ----------
    layers, dimension : int
    length : float
        Residues of the sequence.
    """
    return 2.0 * parameters(layers, dimension) + 4.0 * layers * dimension * length


@dataclass(frozen=True, slots=True)
class Estimate:
    """About how fast one worker is, estimated from sizes alone.

    Attributes
    ----------
    residues_per_s : float
    load_s : float
        Seconds to download the weights, by a slow line.
    """

    residues_per_s: float
    load_s: float

    @classmethod
    def of(cls, model: ModelSpec, device: str, length: float) -> Estimate:
        """Of a model on a kind of device, for sequences of so many residues on average."""
        rate = _CORE if device.partition(":")[0] == "cpu" else _GPU[model.precision]
        # A network of no layers looks up its tokens.
        work = max(operations(model.repr_layer, model.dimension, length), 1.0 * model.dimension)
        # All layers are downloaded, also those that are not used.
        known = PUBLISHED.get(model.reference)
        size = 1e6 * known.megabytes if known else 0.0
        return cls(rate / work, size / _DOWNLOAD)

    def rows_per_chunk(
        self,
        residues: NDArray[np.int64],
        workers: int,
        residue_bytes: NDArray[np.int64] | None = None,
    ) -> int:
        """Rows that make a chunk: the largest power of two that fits.

        No chunk takes more than 40 seconds of one worker by this estimate, there are four for each
        worker unless they would take less than a tenth of a second, and none has more than 8,192
        rows.

        Parameters
        ----------
        residues : ndarray, int64, shape (records,)
            Residues of each row that will go through the encoder.
        workers : int
        residue_bytes : ndarray, int64, shape (records,), optional
            Of the representations of single residues that are to be kept of each row, of which a
            chunk may have 256 MiB.
        """

        def fits(rows: int) -> bool:
            seconds = costliest(residues, rows) / self.residues_per_s
            chunks = -(-len(residues) // rows)
            are_many = chunks >= _CHUNKS_PER_WORKER * workers or seconds <= _LEAST_CHUNK_S
            size = 0 if residue_bytes is None else costliest(residue_bytes, rows)
            return are_many and seconds <= _CHUNK_S and size <= _MOST_RESIDUE_BYTES

        rows = _MOST_ROWS
        while rows > 1 and not fits(rows):
            rows //= 2
        return rows


def costliest(costs: NDArray[np.int64], rows: int) -> int:
    """What the chunk that costs most has, of chunks of so many rows.

    Parameters
    ----------
    costs : ndarray, int64, shape (records,)
    rows : int
    """
    return int(np.add.reduceat(costs, np.arange(0, len(costs), rows)).max())
