"""Embed a chunk of a store: read its sequences, encode them, write its rows."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.encoder import digests
from virnuc_dask.encoder.encoder import Encoded, Encoder, Usage
from virnuc_dask.encoder.memory import is_out_of_memory
from virnuc_dask.encoder.packing import Segments, cut_segments
from virnuc_dask.encoder.weights import Checkpoint, describe, hashing, load_checkpoint
from virnuc_dask.errors import IdentityMismatchError, ModelError, StoreReplacedError
from virnuc_dask.inputs.lengths import encoded_lengths, states_before_encoding
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.chunk_report import ChunkReport
from virnuc_dask.settings import Identity, ModelSpec, Status
from virnuc_dask.store.store import Store

# The start of ubiquitin. An encoder that fails on this sequence fails on any sequence.
UBIQUITIN = "MQIFVKTLTGKTITLEVEPS"


def embed_in_process(
    model: ModelSpec,
    device: str,
    lengths: NDArray[np.int32],
    residues: NDArray[np.uint8],
    identity: Identity,
) -> Rows:
    """Call `embed_rows` with the encoder of this process."""
    encoder = get_encoder(model, device)
    encoder.take_usage()
    rows = embed_rows(encoder, lengths, residues, identity)
    return replace(rows, usage=encoder.take_usage())


def embed_chunk(
    path: str,
    chunk: int,
    identity: Identity,
    model: ModelSpec,
    device: str = "cpu",
    embed: Callable[..., Rows] = embed_in_process,
    store_id: str | None = None,
) -> ChunkReport:
    """Embed one chunk of a store.

    The function is idempotent: the same chunk gives the same bytes, so a second copy of a task does
    no harm. A chunk that is present is not written again.

    Parameters
    ----------
    path : str
        Path or URL of the store on this worker.
    chunk : int
        Number of the chunk.
    identity : Identity
        Identity that the coordinator expects of the store.
    model : ModelSpec
        The model; its digest is compared with the weights when they are loaded.
    device : str
        A torch device.
    embed : callable
        Function with the arguments of `embed_in_process`.
    store_id : str, optional
        Id of the store. Without it, any store with this identity is accepted.

    Raises
    ------
    IdentityMismatchError
        The path holds a store with other settings or another input.
    StoreReplacedError
        The path holds another store now. Nothing is written into it.
    ModelError
        This worker has other weights under the model's name.
    StoreError
        A sequence array is damaged.
    """
    started = time.perf_counter()
    store = Store(path)
    if store_id not in (None, store.id):
        raise StoreReplacedError(path)
    if store.identity != identity:
        raise IdentityMismatchError(path, store.identity.differences(identity))
    lengths, residues = store.read_rows(chunk)
    if store.is_present(chunk):
        return ChunkReport(chunk, len(lengths), {}, False)
    read = time.perf_counter()
    rows = embed(model, device, lengths, residues, identity)
    computed = time.perf_counter()
    if not store.is_present(chunk):
        store.write_chunk(chunk, rows.status, rows.embedding.astype(identity.dtype), rows.residues)
    codes, numbers = np.unique(rows.status, return_counts=True)
    counts = {Status(c).meaning: int(n) for c, n in zip(codes, numbers, strict=True)}
    memory, gpu = _of_device(device)
    return ChunkReport(
        chunk=chunk,
        rows=len(lengths),
        counts=counts,
        computed=True,
        read_s=read - started,
        wait_s=rows.usage.wait_s,
        # Without loading the model. For child processes only the total time is known.
        compute_s=rows.usage.busy_s or computed - read,
        write_s=time.perf_counter() - computed,
        fill=rows.usage.tokens / max(1, rows.usage.capacity),
        memory=memory,
        gpu=gpu,
    )


def _of_device(device: str) -> tuple[int, int | None]:
    """Peak memory in bytes, and the utilisation of a GPU in per cent."""
    if not device.startswith("cuda"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None
    import torch

    try:
        utilisation: int | None = torch.cuda.utilization(device)
    except Exception:
        # nvidia-ml-py is missing, or the driver does not report it. The chunk is good nevertheless.
        utilisation = None
    return torch.cuda.max_memory_allocated(device), utilisation


@dataclass(frozen=True, slots=True)
class Rows:
    """Computed rows of a chunk.

    Attributes
    ----------
    status : ndarray, uint8, shape (n,)
    embedding : ndarray, float32, shape (n, D)
        NaN for quarantined rows.
    residues : ndarray, float16, shape (N, D), optional
        Embeddings of the encoded residues of all rows, concatenated; NaN for quarantined rows.
    usage : Usage
        Time and tokens, as far as this process knows them.
    """

    status: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    residues: NDArray[np.float16] | None
    usage: Usage = field(default_factory=Usage)


def embed_rows(
    encoder: Encoder,
    lengths: NDArray[np.int32],
    residues: NDArray[np.uint8],
    identity: Identity,
) -> Rows:
    """Embed rows, and return the state of each row too."""
    status = states_before_encoding(lengths, residues, identity.max_residues, identity.long)
    encoded = encoded_lengths(lengths, identity.max_residues, identity.long)
    if identity.per_residue:
        residues, lengths = _first_residues(residues, lengths, encoded), encoded.astype(np.int32)
    segments = cut_segments(lengths, identity.max_residues, identity.long)
    segments = segments.select(status[segments.row] < Status.INVALID_RESIDUES)
    row_of_residue = np.repeat(np.arange(len(lengths)), encoded)

    def encode(by: Encoder, part: Segments) -> Encoded:
        return by.encode_segments(residues, part, len(lengths), per_residue=identity.per_residue)

    try:
        result = encode(encoder, segments)
    except Exception as error:
        if not failures.is_of_the_input(error):
            raise
        # If this raises too, no row is the cause.
        encoder.encode([UBIQUITIN])
        result, guilty = _encode_apart(partial(encode, encoder), segments, row_of_residue)
        status[guilty] = Status.ENCODER_ERROR
    _check_memory(encoder, result)
    odd = ~_finite(result, row_of_residue, identity) & (status < Status.INVALID_RESIDUES)
    odd &= result.fits
    if odd.any() and encoder.spec.precision != "float32":
        # Values that overflow in another precision may be finite in float32.
        exact = get_encoder(replace(encoder.spec, precision="float32"), encoder.device)
        again = encode(exact, segments.select(odd[segments.row]))
        _check_memory(exact, again)
        _put(again, result, odd, row_of_residue)
        odd &= ~_finite(result, row_of_residue, identity)
    status[odd] = Status.NON_FINITE
    status[~result.fits] = Status.OUT_OF_MEMORY
    quarantined = status >= Status.INVALID_RESIDUES
    result.embedding[quarantined] = np.nan
    if result.residues is not None:
        result.residues[quarantined[row_of_residue]] = np.nan
    return Rows(status, result.embedding, result.residues)


def _check_memory(encoder: Encoder, result: Encoded) -> None:
    """If rows do not fit, encode a short sequence; it raises if others use the memory."""
    if not result.fits.all():
        encoder.encode([UBIQUITIN])


def _encode_apart(
    encode: Callable[[Segments], Encoded], segments: Segments, row_of_residue: NDArray[np.int64]
) -> tuple[Encoded, list[int]]:
    """Encode again, and halve each part that raises until the rows that raise alone are known.

    Returns
    -------
    encoded : Encoded
        Embeddings of all other rows.
    guilty : list of int
        Rows that raise alone.
    """
    whole = encode(segments.select(np.zeros(len(segments), np.bool_)))
    guilty: list[int] = []
    parts = [segments]
    while parts:
        part = parts.pop()
        members = np.unique(part.row)
        try:
            result = encode(part)
        except Exception as error:
            if not failures.is_of_the_input(error):
                raise
            if len(members) == 1:
                guilty.append(int(members[0]))
            else:
                second = part.row >= members[len(members) // 2]
                parts += [part.select(~second), part.select(second)]
            continue
        _put(result, whole, np.isin(np.arange(len(whole.fits)), members), row_of_residue)
    return whole, guilty


def _put(
    source: Encoded, target: Encoded, rows: NDArray[np.bool_], row_of_residue: NDArray[np.int64]
) -> None:
    target.embedding[rows] = source.embedding[rows]
    target.fits[rows] = source.fits[rows]
    if source.residues is not None and target.residues is not None:
        mask = rows[row_of_residue]
        target.residues[mask] = source.residues[mask]


def _finite(
    result: Encoded, row_of_residue: NDArray[np.int64], identity: Identity
) -> NDArray[np.bool_]:
    """Find the rows that can be stored as finite numbers; the largest float16 is 65,504."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(result.embedding.astype(identity.dtype)).all(axis=1)
    if result.residues is not None:
        finite[row_of_residue[~np.isfinite(result.residues).all(axis=1)]] = False
    return np.asarray(finite, np.bool_)


def _first_residues(
    residues: NDArray[np.uint8], lengths: NDArray[np.int32], counts: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Take the first `counts` residues of each row."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    position = np.arange(len(residues)) - np.repeat(starts, lengths)
    return residues[position < np.repeat(counts, lengths)]


_loading = threading.Lock()
_loaded: dict[tuple[ModelSpec, str], Encoder] = {}


def get_encoder(model: ModelSpec, device: str = "cpu") -> Encoder:
    """Return the encoder of this process. The first call loads it, and all threads share it.

    It is not a worker plugin, because Dask only logs the error of a plugin that fails after a
    restart, and the worker continues to take tasks.

    Raises
    ------
    ModelError
        The weights are not the expected ones, or not those of an ESM-2 model.
    MemoryError
        The device has too little memory, or others use it.
    """
    with _loading:
        encoder = _loaded.get((model, device))
        if encoder is None:
            checkpoint = load_checkpoint(model.reference)
            describe(checkpoint, model.precision, model.repr_layer, model.pooling, hashed=False)
            # Keep one model at a time, because a second one may not fit. But the float32 version of
            # a loaded model, which is needed for a few rows, is kept beside it.
            for loaded, on in list(_loaded):
                if model.precision != "float32" or replace(loaded, precision="float32") != model:
                    del _loaded[loaded, on]
            with hashing(checkpoint) as digest:
                try:
                    encoder = Encoder(checkpoint, model, device)
                except Exception as error:
                    # Unexpected weights may be the cause.
                    _check_weights(model, checkpoint, digest.result())
                    if is_out_of_memory(error):
                        raise MemoryError(
                            f"the model does not fit into memory now: {error}"
                        ) from error
                    raise
                _check_weights(model, checkpoint, digest.result())
            _loaded[model, device] = encoder
        return encoder


def _check_weights(model: ModelSpec, checkpoint: Checkpoint, digest: str) -> None:
    if digest != model.weights_sha256:
        if checkpoint.files:
            digests.forget(checkpoint.files)  # the store may have a wrong cached digest
        raise ModelError(
            f"model {model.reference}: this worker has weights {digest[:12]}, the store was made"
            f" with {model.weights_sha256[:12]}"
        )
