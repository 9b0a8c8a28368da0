"""Which ESM-2 models there are, and about how long one takes. Loads no torch.

How long is estimated from a model's size and the kind of device alone, never measured, so that what
follows from it, the size of a chunk, is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2

from virnuc_dask.config import ModelSpec, Precision

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
        return cls(rate / work, 4 * parameters(model.repr_layer, model.dimension) / _DOWNLOAD)

    def rows_per_chunk(
        self, records: int, residues: int, workers: int, residue_bytes: int = 0
    ) -> int:
        """Rows that make a chunk: a power of two.

        A chunk takes up to 40 seconds on one worker by this estimate, less if there would not be
        four for each worker, and has at most 8,192 rows.

        Parameters
        ----------
        records : int
            Rows of the store.
        residues : int
            Residues of all of them that will go through the encoder.
        workers : int
        residue_bytes : int
            Of the representations of single residues that are to be kept, of all rows.
        """
        rows_per_s = records * self.residues_per_s / max(1, residues)
        rows = max(records / (max(1, workers) * _CHUNKS_PER_WORKER), rows_per_s * _LEAST_CHUNK_S)
        rows = min(rows, rows_per_s * _CHUNK_S, _MOST_ROWS)
        if residue_bytes:
            rows = min(rows, records * _MOST_RESIDUE_BYTES / residue_bytes)
        return int(2 ** floor(log2(max(1.0, rows))))
