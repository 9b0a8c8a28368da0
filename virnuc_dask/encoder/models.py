"""The published ESM-2 models, and estimates of their speed. Does not load torch.

Estimates depend only on a model's size and the kind of device, never on a measurement. So the size
of a chunk, which follows from them, is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import ModelError, UsageError
from virnuc_dask.settings import POOLINGS, PRECISIONS, ModelSpec, Pooling, Precision

# Approximate operations per second of one worker. A CPU core reaches 50e9 (AVX2) to 220e9 (AVX-512)
# in float32. In 16 bits an RTX 4090 reaches 90e12, an A100 180e12, an H200 590e12: see RESULTS.md.
_CORE = 100e9
_GPU: dict[Precision, float] = {"float32": 30e12, "bfloat16": 200e12, "float16": 200e12}
# Bytes per second of a download over a slow connection.
_DOWNLOAD = 2e6

# A killed worker loses one chunk, so a chunk should take about this long. If there are few
# sequences it takes less, so that each worker gets several chunks, but enough to hide overhead.
_CHUNK_S = 40.0
_LEAST_CHUNK_S = 0.1
_CHUNKS_PER_WORKER = 4
_MOST_ROWS = 8192
# Bytes of residue embeddings per chunk, which are in memory together.
_MOST_RESIDUE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Published:
    """An ESM-2 model published by fair-esm.

    Attributes
    ----------
    layers, dimension : int
    megabytes : int
        Size of the download. The two largest models are in float16.
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


def model_spec(
    reference: str,
    layers: int,
    dimension: int,
    precision: Precision = "float32",
    repr_layer: int | None = None,
    pooling: Pooling = "mean",
) -> ModelSpec:
    """Specification of a model, still without the digest of its weights.

    Parameters
    ----------
    reference : str
    layers, dimension : int
        Of the model.
    precision : str
    repr_layer : int, optional
        Default: the last.
    pooling : str

    Raises
    ------
    ModelError
        The model has no such layer.
    UsageError
        The pooling or precision does not exist.
    """
    for value, allowed in ((pooling, POOLINGS), (precision, PRECISIONS)):
        if value not in allowed:
            raise UsageError(f"{value!r}: must be one of {', '.join(allowed)}")
    layer = layers if repr_layer is None else repr_layer
    if not 0 <= layer <= layers:
        raise ModelError(f"model {reference}: layer {layer} of a model with {layers}")
    return ModelSpec(reference, "", dimension, layer, pooling, precision)


def parameters(layers: int, dimension: int) -> int:
    """Number of weights in the matrices of an ESM-2's layers: nearly all of its weights."""
    return 12 * layers * dimension**2


def operations(layers: int, dimension: int, length: float) -> float:
    """Floating-point operations per residue of a sequence, including its share of attention.

    Parameters
    ----------
    layers, dimension : int
    length : float
        Residues in the sequence.
    """
    return 2.0 * parameters(layers, dimension) + 4.0 * layers * dimension * length


@dataclass(frozen=True, slots=True)
class Estimate:
    """Approximate speed of one worker, estimated from sizes alone.

    Attributes
    ----------
    residues_per_s : float
    load_s : float
        Seconds to download the weights over a slow connection.
    """

    residues_per_s: float
    load_s: float

    @classmethod
    def of(cls, model: ModelSpec, device: str, length: float) -> Estimate:
        """Estimate for a model on a kind of device, with this mean number of residues."""
        rate = _CORE if device.partition(":")[0] == "cpu" else _GPU[model.precision]
        # A network without layers only looks up its tokens.
        work = max(operations(model.repr_layer, model.dimension, length), 1.0 * model.dimension)
        # All layers are downloaded, even unused ones.
        published = PUBLISHED.get(model.reference)
        size = 1e6 * published.megabytes if published else 0.0
        return cls(rate / work, size / _DOWNLOAD)

    def rows_per_chunk(
        self,
        residues: NDArray[np.int64],
        workers: int,
        residue_bytes: NDArray[np.int64] | None = None,
    ) -> int:
        """Rows per chunk: the largest power of two that meets all limits.

        By this estimate no chunk takes more than 40 seconds of one worker. There are at least four
        chunks per worker, unless a chunk takes no more than a tenth of a second. No chunk has more
        than 8,192 rows.

        Parameters
        ----------
        residues : ndarray, int64, shape (records,)
            Residues to encode in each row.
        workers : int
        residue_bytes : ndarray, int64, shape (records,), optional
            Bytes of residue embeddings to keep for each row. A chunk may have 256 MiB of them.
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
    """Cost of the most expensive chunk, if each chunk has `rows` rows.

    Parameters
    ----------
    costs : ndarray, int64, shape (records,)
    rows : int
    """
    return int(np.add.reduceat(costs, np.arange(0, len(costs), rows)).max())
