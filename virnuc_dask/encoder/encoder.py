"""Embeds sequences of any length: batches that fit into memory, and pooling."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from virnuc_dask.encoder.attention import Runs
from virnuc_dask.encoder.device_lock import DeviceLock
from virnuc_dask.encoder.device_queue import Queue, to_device
from virnuc_dask.encoder.memory import fitting_tokens, grown, is_out_of_memory, release_memory
from virnuc_dask.encoder.network import Network
from virnuc_dask.encoder.packing import (
    Batch,
    Segments,
    cut_batches,
    cut_segments,
    residue_tokens,
    residue_weights,
)
from virnuc_dask.encoder.weights import Checkpoint, describe, load_checkpoint
from virnuc_dask.errors import InputError
from virnuc_dask.inputs.records import clean_sequence
from virnuc_dask.settings import ModelSpec, Pooling, Precision, precision_on


def load_encoder(
    model: str,
    device: str = "cpu",
    precision: Precision = "float32",
    *,
    repr_layer: int | None = None,
    pooling: Pooling = "mean",
) -> Encoder:
    """Load an ESM-2 encoder.

    Parameters
    ----------
    model : str
        A fair-esm name, the path of weights, or ``demo`` (random weights). There is no default.
    device : str
        A torch device.
    precision : {'float32', 'bfloat16', 'float16'}
        Arithmetic of the matrix products. Everything else is float32.
    repr_layer : int, optional
        Layer to pool; 0 is the token embedding. Default: the last.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues, or the BOS token.

    Raises
    ------
    ModelError
        The weights cannot be read, or the model has no such layer.
    UsageError
        The pooling or precision does not exist, or the device does not support the precision.
    """
    checkpoint = load_checkpoint(model)
    return Encoder(checkpoint, describe(checkpoint, precision, repr_layer, pooling), device)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings of some rows.

    Attributes
    ----------
    embedding : ndarray, float32, shape (rows, D)
        NaN for rows without a segment.
    fits : ndarray, bool, shape (rows,)
        False if a segment of the row does not fit into memory, even alone.
    residues : ndarray, float16, shape (N, D), optional
        Representation of each residue: the mean where windows overlap, NaN outside all segments.
    """

    embedding: NDArray[np.float32]
    fits: NDArray[np.bool_]
    residues: NDArray[np.float16] | None


@dataclass(slots=True)
class Usage:
    """Time and tokens used by encoding.

    Attributes
    ----------
    wait_s : float
        Seconds spent waiting while the device computed other chunks: for its lock, and on a GPU
        also in its queue.
    busy_s : float
        Seconds that the device took, from the start of the work to its end.
    tokens, capacity : int
        Tokens encoded, and tokens that the batches had room for.
    """

    wait_s: float = 0.0
    busy_s: float = 0.0
    tokens: int = 0
    capacity: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Results of one batch: its segments pooled, shape (s, D), and on request their residues.

    Residues are end to end. Results of a GPU are incomplete until its queue has reached the end of
    the copies to the host.
    """

    segments: NDArray[np.int64]
    pooled: Tensor
    residues: Tensor | None


class Encoder:
    """An ESM-2 network in memory. Its methods may be called from several threads.

    Attributes
    ----------
    spec : ModelSpec
    device : str
    dimension : int
        Features per embedding, D.
    token_budget : int
        Tokens encoded at once. It shrinks when memory runs out. On a GPU it grows again when
        memory is free.
    backends : dict of str to str
        What computes ``attention`` and ``elementwise`` work: ``torch`` or something faster.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, device: str = "cpu") -> None:
        precision_on(device, spec.precision)
        self.spec, self.device = spec, device
        self.dimension = spec.dimension
        self._device = torch.device(device)
        self._queue = Queue(self._device)
        with self._queue.as_current_device():
            self._network = Network(checkpoint, spec, self._device)
        release_memory(torch.device("cpu"))  # used by merging an adapter
        self.backends = self._network.backends
        # Halved whenever memory runs out. On a CPU it stays halved. On a GPU it grows again,
        # because other processes may have used the memory.
        self.token_budget = fitting_tokens(self._device, spec.dimension)
        self._device_lock = DeviceLock(self._device)
        self._used = threading.local()

    def encode(self, sequences: Sequence[str]) -> NDArray[np.float32]:
        """Embed sequences of any length.

        Parameters
        ----------
        sequences : sequence of str
            Proteins. Letters are treated as in a run (see "Letters" in `docs/reference/input.md`).

        Returns
        -------
        ndarray, float32, shape (n, D)

        Raises
        ------
        InputError
            A sequence is empty or has a letter that is no residue. The message counts from 0.
        MemoryError
            A sequence does not fit into memory, even alone.
        TypeError
            `sequences` is one string instead of several.
        """
        if isinstance(sequences, str | bytes):
            raise TypeError("encode takes a list of sequences, not one string")
        cleaned = []
        for number, sequence in enumerate(sequences):
            try:
                cleaned.append(clean_sequence(sequence))
            except InputError as error:
                raise InputError(error.problem, file=f"sequence {number}") from error
            if not cleaned[-1]:
                raise InputError("no residues", file=f"sequence {number}")
        lengths = np.array([len(sequence) for sequence in cleaned], np.int32)
        residues = np.frombuffer("".join(cleaned).encode("ascii"), np.uint8)
        whole = cut_segments(lengths, int(lengths.max(initial=1)), "truncate")
        encoded = self.encode_segments(residues, whole, len(cleaned))
        if not encoded.fits.all():
            # If other processes used the memory, later batches need not stay small.
            self.token_budget = fitting_tokens(self._device, self.dimension)
            number = int(np.argmin(encoded.fits))
            raise MemoryError(f"sequence {number}, {lengths[number]} residues, does not fit")
        return encoded.embedding

    def encode_segments(
        self,
        residues: NDArray[np.uint8],
        segments: Segments,
        rows: int,
        *,
        per_residue: bool = False,
    ) -> Encoded:
        """Embed rows that are cut into segments.

        With ``mean``, a row with several windows gets the mean over its residues, each counted
        once; with ``max``, the maximum over all windows; with ``bos``, the mean of the windows'
        BOS tokens.

        Parameters
        ----------
        residues : ndarray, uint8, shape (N,)
            ASCII residues. `segments` indexes into them.
        segments : Segments
        rows : int
            Number of rows in the result.
        per_residue : bool
            Also return the representation of each residue.
        """
        embedding = np.full((rows, self.dimension), np.nan, np.float32)
        embedding[segments.row] = -np.inf if self.spec.pooling == "max" else 0.0
        each = np.full((len(residues), self.dimension), np.nan, np.float16) if per_residue else None
        if each is not None and len(segments):
            each[segments.start[0] + np.flatnonzero(segments.shares < 1)] = 0  # windows add to it
        usage = self._usage()
        asked = time.perf_counter()
        unfit: list[int] = []
        queued: list[_Part] = []
        with self._device_lock, torch.inference_mode(), self._queue.as_current_device():
            began = self._queue.mark()
            if self._device.type == "cuda":
                fitting = fitting_tokens(self._device, self.dimension)
                self.token_budget = grown(self.token_budget, fitting)
            for part in self._encode_batches(residues, segments, per_residue, unfit):
                if self._queue.is_immediate:
                    # Free each part at once: small tensors between large ones fragment memory.
                    self._combine(part, segments, embedding, each)
                else:
                    queued.append(part)
            ended = self._queue.mark()
        # The lock is free now: on a GPU another chunk can be queued before this one is done.
        busy = self._queue.wait(began, ended)
        usage.busy_s += busy
        usage.wait_s += max(0.0, time.perf_counter() - asked - busy)
        for part in queued:
            self._combine(part, segments, embedding, each)
        fits = np.ones(rows, np.bool_)
        fits[segments.row[unfit]] = False
        return Encoded(embedding, fits, each)

    def take_usage(self) -> Usage:
        """Time and tokens used by this thread since the last call."""
        usage, self._used.usage = self._usage(), Usage()
        return usage

    def _usage(self) -> Usage:
        if not hasattr(self._used, "usage"):
            self._used.usage = Usage()
        usage: Usage = self._used.usage
        return usage

    def _encode_batches(
        self,
        residues: NDArray[np.uint8],
        segments: Segments,
        per_residue: bool,
        unfit: list[int],
    ) -> Iterator[_Part]:
        """Encode batch by batch. Segments that do not fit are added to `unfit`.

        Nothing in here waits for a GPU: it works while the next batch is prepared.
        """
        usage = self._usage()
        left = self._cut(segments, np.arange(len(segments)))
        while left:
            batch = left.popleft()
            part = self._encode_or_run_out(residues, segments, batch, per_residue)
            tokens = sum(count * (length + 2) for count, length in batch.runs)
            if part is not None:
                usage.tokens += tokens
                # A batch may exceed the budget, for example if a sequence is longer.
                usage.capacity += max(tokens, self.token_budget)
                yield part
            elif len(batch.segments) == 1:
                unfit.append(int(batch.segments[0]))
            else:
                self.token_budget = max(1, min(self.token_budget, tokens) // 2)
                rest = [batch.segments, *(other.segments for other in left)]
                left = self._cut(segments, np.concatenate(rest))

    def _cut(self, segments: Segments, members: NDArray[np.int64]) -> deque[Batch]:
        batches = cut_batches(segments.length[members], self.token_budget)
        return deque(Batch(members[batch.segments], batch.runs) for batch in batches)

    def _combine(
        self,
        part: _Part,
        segments: Segments,
        embedding: NDArray[np.float32],
        each: NDArray[np.float16] | None,
    ) -> None:
        """Add the results of a batch to its rows. They must have arrived on the host."""
        pooled, rows = part.pooled.numpy(), segments.row[part.segments]
        shared = segments.windows[part.segments] > 1
        embedding[rows[~shared]] = pooled[~shared]
        combine = np.maximum if self.spec.pooling == "max" else np.add
        combine.at(embedding, rows[shared], pooled[shared])
        if each is not None and part.residues is not None:
            _scatter(each, part.residues.numpy(), segments, part.segments)

    # --- one batch ---

    def _encode_or_run_out(
        self, residues: NDArray[np.uint8], segments: Segments, batch: Batch, per_residue: bool
    ) -> _Part | None:
        """Encode a batch. If memory runs out, free what was allocated and return None."""
        try:
            return self._encode_batch(residues, segments, batch, per_residue)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self._device)
        return None

    def _encode_batch(
        self, residues: NDArray[np.uint8], segments: Segments, batch: Batch, per_residue: bool
    ) -> _Part:
        hidden = self._network.represent(residues, segments.start[batch.segments], batch.runs)
        lengths = segments.length[batch.segments]
        inner = to_device(residue_tokens(lengths), self._device)
        if self.spec.pooling == "mean":
            weights = to_device(residue_weights(segments, batch.segments), self._device)
            first = to_device(np.cumsum(lengths) - lengths, self._device)
            pooled = F.embedding_bag(inner, hidden, first, mode="sum", per_sample_weights=weights)
        elif self.spec.pooling == "max":
            pooled = (largest_by_run if self._queue.is_immediate else largest)(hidden, batch.runs)
        else:
            begins = to_device(np.cumsum(lengths + 2) - lengths - 2, self._device)
            windows = to_device(segments.windows[batch.segments], self._device)
            pooled = hidden[begins] / windows[:, None]
        each = self._queue.start_copy(hidden[inner].to(torch.float16)) if per_residue else None
        return _Part(batch.segments, self._queue.start_copy(pooled), each)


# Not `embedding_bag` with mode max: it treats NaN as less than any number.


def largest_by_run(hidden: Tensor, runs: Runs) -> Tensor:
    """Maximum over each sequence's residues, by an operation for each length: for a CPU.

    Parameters
    ----------
    hidden : Tensor, float32, shape (tokens, D)
    runs : list of (count, length)
        See `Batch`.

    Returns
    -------
    Tensor, float32, shape (sequences, D)
        NaN where a residue is NaN.
    """
    parts = torch.split(hidden, [count * (length + 2) for count, length in runs])
    return torch.cat(
        [
            part.view(count, length + 2, -1)[:, 1:-1].amax(1)
            for part, (count, length) in zip(parts, runs, strict=True)
        ]
    )


def largest(hidden: Tensor, runs: Runs) -> Tensor:
    """Like `largest_by_run`, by one operation for all lengths: on a GPU each costs time.

    It changes BOS and EOS of `hidden`. On a CPU it takes twenty times as long.
    """
    lengths = np.repeat([length + 2 for _, length in runs], [count for count, _ in runs])
    ends = np.cumsum(lengths)
    outer = to_device(np.concatenate((ends - lengths, ends - 1)), hidden.device)
    hidden.index_fill_(0, outer, -torch.inf)
    # unsafe: lengths are not checked. A check would wait for the GPU.
    return torch.segment_reduce(
        hidden, "max", lengths=to_device(lengths, hidden.device), axis=0, unsafe=True
    )


def _scatter(
    each: NDArray[np.float16],
    values: NDArray[np.float16],
    segments: Segments,
    members: NDArray[np.int64],
) -> None:
    """Write the residues of some segments, given end to end, to their rows of `each`."""
    ends = np.cumsum(segments.length[members])
    for number, part in zip(members.tolist(), np.split(values, ends[:-1]), strict=True):
        start = int(segments.start[number])
        target = each[start : start + len(part)]
        if segments.windows[number] == 1:
            target[:] = part
            continue
        shares = segments.shares_of(number)
        alone, shared = shares == 1, np.flatnonzero(shares < 1)
        target[alone] = part[alone]
        # By torch, because NumPy takes four times as long with float16.
        added = torch.from_numpy(part[shared]).float() * torch.from_numpy(shares[shared, None])
        target[shared] = torch.from_numpy(target[shared]).float().add_(added).half().numpy()
