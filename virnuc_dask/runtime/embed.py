"""The task: read a chunk's sequences, embed them, write the region. Runs on a worker."""

from __future__ import annotations

import os
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
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.inputs.records import invalid_rows
from virnuc_dask.runtime import failures
from virnuc_dask.settings import Identity, ModelSpec, Status
from virnuc_dask.store.store import Store

# Ubiquitin's beginning: an encoder that has trouble with it has trouble with anything.
BEYOND_DOUBT = "MQIFVKTLTGKTITLEVEPS"


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """What a task did. The embeddings themselves stay in the store.

    Attributes
    ----------
    chunk, rows : int
    counts : dict of str to int
        Rows per state; empty if the chunk was found done. The store's `status` has all.
    computed : bool
        False if the chunk was there: another task had written it, or this one before its worker
        died.
    read_s, wait_s, compute_s, write_s : float
        Seconds of each part; waited is for the device, which another chunk had.
    fill : float
        Tokens of the batches, as a share of what they had room for; 0 if nothing was encoded.
    memory : int
        Most bytes that the device has held for this process; for a CPU, the process's peak RSS.
    gpu : int, optional
        Utilisation of the GPU in the last second or less, per cent.
    pid : int
        Process that did it.
    """

    chunk: int
    rows: int
    counts: dict[str, int]
    computed: bool
    read_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    fill: float = 0.0
    memory: int = 0
    gpu: int | None = None
    pid: int = field(default_factory=os.getpid)


def embed_here(
    model: ModelSpec,
    device: str,
    lengths: NDArray[np.int32],
    residues: NDArray[np.uint8],
    identity: Identity,
) -> Rows:
    """`embed_rows` by the process's encoder."""
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
    embed: Callable[..., Rows] = embed_here,
    store_id: str | None = None,
) -> ChunkReport:
    """Embed one chunk of a store.

    Idempotent: the same chunk gives the same bytes, so a second copy of a task does no harm. A
    chunk that is present is left alone.

    Parameters
    ----------
    path : str
        The store, as this worker sees it.
    chunk : int
        Chunk of rows.
    identity : Identity
        What the coordinator takes the store for.
    model : ModelSpec
        The model; its weights are compared with the spec's digest when they are loaded.
    device : str
        A torch device.
    embed : callable
        Has the arguments of `embed_here`.
    store_id : str, optional
        Of the store that is meant; any with this identity if it is left out.

    Raises
    ------
    IdentityMismatchError
        The path holds a store of other settings.
    StoreReplacedError
        The path holds another store by now. Nothing is written into it.
    ModelError
        This worker finds other weights under the model's name.
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
    return ChunkReport(
        chunk,
        len(lengths),
        counts,
        True,
        read - started,
        rows.usage.wait_s,
        # Without loading the model; of child processes only the whole is known.
        rows.usage.busy_s or computed - read,
        time.perf_counter() - computed,
        rows.usage.tokens / max(1, rows.usage.capacity),
        *_of_device(device),
    )


def _of_device(device: str) -> tuple[int, int | None]:
    """Peak memory and, of a GPU, utilisation."""
    if not device.startswith("cuda"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, None
    import torch

    try:
        utilisation: int | None = torch.cuda.utilization(device)
    except Exception:
        # No nvidia-ml-py, or a driver that does not say: no reason to do a chunk again.
        utilisation = None
    return torch.cuda.max_memory_allocated(device), utilisation


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a chunk, computed.

    Attributes
    ----------
    status : ndarray, uint8, shape (n,)
    embedding : ndarray, float32, shape (n, D)
        NaN where the row is quarantined.
    residues : ndarray, float16, shape (N, D), optional
        Representation of each encoded residue, end to end; NaN where the row is quarantined.
    usage : Usage
        What it took, as far as this process knows.
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
    """Embed rows and say what became of each."""
    long = lengths > identity.max_residues
    status = np.full(len(lengths), Status.EMBEDDED, np.uint8)
    status[long] = {
        "truncate": Status.TRUNCATED,
        "window": Status.WINDOWED,
        "skip": Status.TOO_LONG,
    }[identity.long]
    status[lengths == 0] = Status.EMPTY
    # A record with a letter that is no residue is quarantined, also if truncation would hide it.
    status[invalid_rows(residues, lengths)] = Status.INVALID_RESIDUES

    encoded = encoded_lengths(lengths, identity.max_residues, identity.long)
    if identity.per_residue:
        residues, lengths = _first_residues(residues, lengths, encoded), encoded.astype(np.int32)
    segments = cut_segments(lengths, identity.max_residues, identity.long)
    segments = segments.select(status[segments.row] < Status.INVALID_RESIDUES)
    row_of_residue = np.repeat(np.arange(len(lengths)), encoded)

    def encode(by: Encoder, part: Segments) -> Encoded:
        return by.encode_segments(residues, part, len(lengths), per_residue=identity.per_residue)

    try:
        found = encode(encoder, segments)
    except Exception as error:
        if not failures.is_of_the_input(error):
            raise
        # If this raises too, it is no row's fault.
        encoder.encode([BEYOND_DOUBT])
        found, guilty = _encode_apart(partial(encode, encoder), segments, row_of_residue)
        status[guilty] = Status.ENCODER_ERROR
    _doubt(encoder, found)
    odd = ~_finite(found, row_of_residue, identity) & (status < Status.INVALID_RESIDUES)
    odd &= found.fits
    if odd.any() and encoder.spec.precision != "float32":
        # What another precision cannot hold may well be a number in this one.
        exact = get_encoder(replace(encoder.spec, precision="float32"), encoder.device)
        again = encode(exact, segments.select(odd[segments.row]))
        _doubt(exact, again)
        _put(again, found, odd, row_of_residue)
        odd &= ~_finite(found, row_of_residue, identity)
    status[odd] = Status.NON_FINITE
    status[~found.fits] = Status.OUT_OF_MEMORY
    quarantined = status >= Status.INVALID_RESIDUES
    found.embedding[quarantined] = np.nan
    if found.residues is not None:
        found.residues[quarantined[row_of_residue]] = np.nan
    return Rows(status, found.embedding, found.residues)


def _doubt(encoder: Encoder, found: Encoded) -> None:
    """If some rows do not fit, see that it is theirs, and not that others have the memory."""
    if not found.fits.all():
        encoder.encode([BEYOND_DOUBT])


def _encode_apart(
    encode: Callable[[Segments], Encoded], segments: Segments, row_of_residue: NDArray[np.int64]
) -> tuple[Encoded, list[int]]:
    """Encode again, and halve what raises until the rows that raise alone are known.

    Returns
    -------
    encoded : Encoded
        Of all other rows.
    guilty : list of int
    """
    whole = encode(segments.select(np.zeros(len(segments), np.bool_)))
    guilty: list[int] = []
    parts = [segments]
    while parts:
        part = parts.pop()
        members = np.unique(part.row)
        try:
            found = encode(part)
        except Exception as error:
            if not failures.is_of_the_input(error):
                raise
            if len(members) == 1:
                guilty.append(int(members[0]))
            else:
                second = part.row >= members[len(members) // 2]
                parts += [part.select(~second), part.select(second)]
            continue
        _put(found, whole, np.isin(np.arange(len(whole.fits)), members), row_of_residue)
    return whole, guilty


def _put(
    source: Encoded, target: Encoded, rows: NDArray[np.bool_], row_of_residue: NDArray[np.int64]
) -> None:
    """Copy some rows."""
    target.embedding[rows] = source.embedding[rows]
    target.fits[rows] = source.fits[rows]
    if source.residues is not None and target.residues is not None:
        chosen = rows[row_of_residue]
        target.residues[chosen] = source.residues[chosen]


def _finite(
    found: Encoded, row_of_residue: NDArray[np.int64], identity: Identity
) -> NDArray[np.bool_]:
    """Which rows are numbers that can be stored: float16 tops out at 65,504."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(found.embedding.astype(identity.dtype)).all(axis=1)
    if found.residues is not None:
        finite[row_of_residue[~np.isfinite(found.residues).all(axis=1)]] = False
    return np.asarray(finite, np.bool_)


def _first_residues(
    residues: NDArray[np.uint8], lengths: NDArray[np.int32], wanted: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The first residues of each row, as many as are wanted of it."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    place = np.arange(len(residues)) - np.repeat(starts, lengths)
    return residues[place < np.repeat(wanted, lengths)]


_loading = threading.Lock()
_loaded: dict[tuple[ModelSpec, str], Encoder] = {}


def get_encoder(model: ModelSpec, device: str = "cpu") -> Encoder:
    """The process's encoder, loaded at the first call and shared by its threads.

    A getter and not a worker plugin: a plugin that fails after a restart is only logged, and the
    worker goes on taking tasks.

    Raises
    ------
    ModelError
        The weights are others, or none of an ESM-2.
    MemoryError
        Others have the device's memory, or there is too little of it.
    """
    with _loading:
        encoder = _loaded.get((model, device))
        if encoder is None:
            checkpoint = load_checkpoint(model.reference)
            describe(checkpoint, model.precision, model.repr_layer, model.pooling, hashed=False)
            # One model at a time, for a second may not fit beside it; but a model's float32 twin,
            # which is there for a few rows, does not replace it.
            for spec, place in list(_loaded):
                if model.precision != "float32" or replace(spec, precision="float32") != model:
                    del _loaded[spec, place]
            with hashing(checkpoint) as digest:
                try:
                    encoder = Encoder(checkpoint, model, device)
                except Exception as error:
                    # Other weights may be why.
                    _check_weights(model, checkpoint, digest.result())
                    if is_out_of_memory(error):
                        raise MemoryError(f"the model does not fit now: {error}") from error
                    raise
                _check_weights(model, checkpoint, digest.result())
            _loaded[model, device] = encoder
        return encoder


def _check_weights(model: ModelSpec, checkpoint: Checkpoint, digest: str) -> None:
    if digest != model.weights_sha256:
        if checkpoint.files:
            digests.forget(checkpoint.files)  # the store's may be a kept one that is wrong
        raise ModelError(
            f"model {model.reference}: this worker has weights {digest[:12]}, the store was made"
            f" with {model.weights_sha256[:12]}"
        )
