"""Read the input into a new store, or compare it with an existing store."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask import __version__
from virnuc_dask.encoder.digests import known_weights
from virnuc_dask.encoder.models import Estimate, model_spec
from virnuc_dask.encoder.weight_files import resolved
from virnuc_dask.errors import (
    IdentityMismatchError,
    InputError,
    LocationError,
    RandomWeightsWarning,
    StoreError,
    StoreInUseError,
    UsageError,
)
from virnuc_dask.files import expanded
from virnuc_dask.inputs.lengths import encoded_lengths, residues_to_encode
from virnuc_dask.inputs.reader import read_blocks
from virnuc_dask.inputs.records import ALPHABET_POLICY, InputSummary
from virnuc_dask.runtime import events, failures
from virnuc_dask.runtime.events import Listener
from virnuc_dask.settings import (
    AUTO,
    DEMO,
    FORMAT,
    PRECISIONS,
    RANDOM_WEIGHTS,
    Identity,
    ModelSpec,
    Precision,
    Settings,
    precision_on,
)
from virnuc_dask.store.create import Ingest
from virnuc_dask.store.location import location_of
from virnuc_dask.store.store import Store, can_create

Inputs = str | Path | Sequence[str | Path]

# From this share of similar records on, the whole input is taken as protein or nucleotide.
_MOST = 0.9
_PLAIN_DEVICES = ("cpu", "cuda")
# Most weights are hashed within this time. Reading starts after it at the latest.
_PROMPT_S = 1.0


def prepare(
    inputs: Inputs,
    store: str | Path,
    settings: Settings,
    emit: Listener,
    device: str = "cpu",
    count_workers: Callable[[], int] = lambda: 1,
    overwrite: bool = False,
) -> tuple[Store, ModelSpec]:
    """Create a store from an input, or check that an existing store was created from it.

    Parameters
    ----------
    inputs : path or sequence of path
    store : path
    settings : Settings
    emit : callable
        Called with `ModelChosen`, `Reading` and `InputRead` events.
    device : str
        Device of the workers. The ``auto`` precision and the size of chunks depend on it.
    count_workers : callable
        Returns about how many workers there will be, so that each gets several chunks. Called only
        before a store is created.
    overwrite : bool
        Replace a store of this program. It stays as it is if the input cannot be read.

    Raises
    ------
    UsageError
        torch does not know the device, or the device does not support the precision.
    InputError
        The input cannot be read. No store is created.
    IdentityMismatchError
        The store has other settings or another input.
    NotAStoreError, StoreError, ModelError
    """
    # Checks that need no input come first.
    check_device(device)
    existing = None if can_create(store) else Store(store)
    if existing and overwrite:
        emit(_to_be_replaced(existing))
        existing = None
    precision = precision_on(device, settings.precision)
    if existing and settings.precision == AUTO:
        precision = _precision_of(existing)
    files, summary = listed(inputs), InputSummary()
    blocks = read_blocks(
        files,
        summary,
        strict=settings.strict,
        translation=settings.translation,
        tiling=settings.tiling,
    )
    with _announced(settings, precision, device, emit) as announced:
        warn_of_random_weights(announced.model, stacklevel=4)
        if existing is None:
            with _explained(store):
                ingest = Ingest(
                    store,
                    translated=settings.translation is not None,
                    tiled=settings.tiling is not None,
                    overwrite=overwrite,
                )
            with ingest:
                for block in blocks:
                    with _explained(store):
                        ingest.append(block)
                    announced.tell_if_known()
                    emit(events.Reading(summary.records, summary.residues))
                check_input(settings, summary, files)
                model = announced.spec()
                rows = rows_per_chunk(settings, model, summary, device, count_workers())
                identity = identity_of(settings, model, summary, rows)
                with _explained(store):
                    provenance = _provenance(files, model, input_read(settings, summary), device)
                    ingest.commit(identity, model.dimension, provenance, model.comment())
            # This run's store, or that of a faster run, which may have another chunk size.
            existing = Store(store)
        else:
            for _ in blocks:
                announced.tell_if_known()
                emit(events.Reading(summary.records, summary.residues))
            check_input(settings, summary, files)
            model = announced.spec()
    rows = settings.rows_per_chunk or existing.identity.rows_per_chunk
    identity = identity_of(settings, model, summary, rows)
    if differences := existing.identity.differences(identity):
        raise IdentityMismatchError(str(store), differences)
    emit(input_read(settings, summary))
    return existing, model


def _to_be_replaced(store: Store) -> events.StoreToBeReplaced:
    if store.location.is_in_use:
        raise StoreInUseError(str(store.path))
    present = int(store.present().sum())
    return events.StoreToBeReplaced(str(store.path), store.records, store.chunk_count, present)


@contextmanager
def _announced(
    settings: Settings, precision: Precision, device: str, emit: Listener
) -> Iterator[_Announced]:
    """Announce the model. Weights that an earlier run has read are not read again."""
    reference, layer, pooling = settings.model, settings.repr_layer, settings.pooling
    if known := known_weights(reference):
        model = model_spec(
            resolved(reference), known.layers, known.dimension, precision, layer, pooling
        )
        digest = Future[str]()
        digest.set_result(known.sha256)
        event = events.ModelChosen(model, device, known.has_adapter, known.left_out)
        yield _Announced(event, digest, emit)
        return
    from virnuc_dask.encoder.weights import describe, hashing, load_checkpoint

    checkpoint = load_checkpoint(reference)
    model = describe(checkpoint, precision, layer, pooling, hashed=False)
    event = events.ModelChosen(model, device, checkpoint.adapter is not None, checkpoint.left_out)
    with hashing(checkpoint, or_known=True) as digest:
        del checkpoint  # the weights may be large, and reading the input takes long
        yield _Announced(event, digest, emit)


class _Announced:
    """A model whose digest is still being computed; its event is emitted once that is known."""

    def __init__(self, event: events.ModelChosen, digest: Future[str], emit: Listener) -> None:
        self._event, self._digest, self._emit = event, digest, emit
        self._is_told = False
        wait([digest], timeout=_PROMPT_S)
        self.tell_if_known()

    @property
    def model(self) -> ModelSpec:
        """The model, without its digest as long as that is not known."""
        return self._event.model

    def tell_if_known(self) -> None:
        """Emit the event if the digest is known. It is emitted only once."""
        if self._digest.done() and not self._is_told:
            self._is_told = True
            model = replace(self._event.model, weights_sha256=self._digest.result())
            self._event = replace(self._event, model=model)
            self._emit(self._event)

    def spec(self) -> ModelSpec:
        """Wait for the digest, and return the model with it."""
        wait([self._digest])
        self.tell_if_known()
        return self._event.model


def check_device(device: str) -> None:
    """Refuse a device name that torch does not know. Each worker checks that it has the device.

    Raises
    ------
    UsageError
    """
    if device in _PLAIN_DEVICES:
        return  # without waiting for torch
    import torch

    try:
        torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: {error}") from error


def warn_of_random_weights(model: ModelSpec, stacklevel: int) -> None:
    """Warn if the model has random weights; `stacklevel` is that of `warnings.warn`."""
    if model.has_random_weights:
        message = f"model {DEMO!r} has {RANDOM_WEIGHTS}"
        warnings.warn(message, RandomWeightsWarning, stacklevel=stacklevel)


def model_of(store: Store, reference: str | None = None) -> ModelSpec:
    """Return the model of a store.

    Parameters
    ----------
    store : Store
    reference : str, optional
        Current location of the weights, if they were moved.

    Raises
    ------
    UsageError
        The store's precision is no longer offered.
    """
    _precision_of(store)
    return replace(store.model, reference=resolved(reference or store.model.reference))


def _precision_of(store: Store) -> Precision:
    """Return the precision of a store. Stores of a precision no longer offered are read-only.

    Raises
    ------
    UsageError
    """
    precision = store.identity.precision
    if precision not in PRECISIONS:
        raise UsageError(
            f"{store.path}: precision {precision} is no longer offered: with real weights the"
            " cosine of its rows to float32 fell to 0.98; run again into another store"
        )
    return precision


@contextmanager
def _explained(store: str | Path) -> Iterator[None]:
    """Turn an error of the store's disk into one that explains it.

    It is not used around a listener, which may write to another disk.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, LocationError) or not failures.is_hopeless(error):
            raise
        raise StoreError(location_of(store).explain(error)) from error


def check_input(settings: Settings, summary: InputSummary, files: Sequence[str | Path]) -> None:
    """Refuse input without rows, proteins with `--translate`, and nucleotides without it."""
    if settings.molecule == AUTO:
        _check_molecule(summary)
    if not summary.records:
        raise InputError(
            f"none of {summary.reads:,} records gives a row: no frame is open, or long enough"
            f"{input_read(settings, summary).hint}",
            file=", ".join(map(str, files)),
        )


def _check_molecule(summary: InputSummary) -> None:
    override = "pass --molecule {0} if they are {0}s"
    first = summary.first_protein_like
    if first and summary.protein_like >= _MOST * summary.reads:
        raise InputError(
            f"{summary.protein_like:,} of {summary.reads:,} records, starting with this one,"
            " contain protein letters, and proteins cannot be translated; omit --translate, or"
            f" {override.format('nucleotide')}",
            file=first.file,
            line=first.line,
            record=first.id,
        )
    letters = (summary.tiled or summary.records) - summary.empty
    if not summary.reads and letters and summary.nucleotide_like >= _MOST * letters:
        raise UsageError(
            f"{summary.nucleotide_like:,} of {letters:,} records look like nucleotides, but the"
            f" model reads proteins; pass --translate six-frame, or {override.format('protein')}"
        )


def input_read(settings: Settings, summary: InputSummary) -> events.InputRead:
    """Return the counts of an input as an event."""
    truncated = left_out = 0
    if settings.long == "truncate":
        # Invalid rows are quarantined. Of tiles, only those with invalid letters are.
        invalid = [] if summary.tiled else summary.invalid_lengths
        for sign, parts in ((1, summary.lengths), (-1, invalid)):
            for lengths in parts:
                beyond = lengths[lengths > settings.max_residues].astype(np.int64)
                truncated += sign * len(beyond)
                left_out += sign * int((beyond - settings.max_residues).sum())
    return events.InputRead(
        records=summary.records,
        residues=summary.residues,
        empty=summary.empty,
        invalid=summary.invalid,
        ambiguous_j=summary.ambiguous_j,
        gaps=summary.gaps,
        terminal_stops=summary.terminal_stops,
        nucleotide_like=summary.nucleotide_like,
        empty_files=tuple(summary.empty_files),
        reads=summary.reads,
        nucleotides=summary.nucleotides,
        without_row=len(summary.without_row),
        contigs_without_row=summary.contigs_without_row,
        tiled=summary.tiled,
        truncated=truncated,
        residues_left_out=left_out,
        max_residues=settings.max_residues,
    )


def _provenance(
    files: Sequence[str | Path], model: ModelSpec, read: events.InputRead, device: str
) -> dict[str, Any]:
    """Describe how the store was created. People read it; no code depends on it."""
    packages = ("fair-esm", "torch", "zarr", "dask", "numpy")
    return {
        "model": model.reference,
        "device": device,
        "inputs": [str(file) for file in files],
        "input": {k: v for k, v in read.to_json().items() if k != "event"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {"virnuc_dask": __version__} | {name: version(name) for name in packages},
    }


# --- parts ---------------------------------------------------------------------------------------


def listed(inputs: Inputs) -> list[str]:
    """Return the inputs as a list; ``-`` is standard input even if a file has that name."""
    names = [inputs] if isinstance(inputs, (str, Path)) else inputs
    return [name if name == "-" else expanded(name) for name in names]


def encoded_residues(settings: Settings, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Number of residues to encode for each row."""
    return residues_to_encode(lengths, settings.max_residues, settings.long)


def rows_per_chunk(
    settings: Settings, spec: ModelSpec, summary: InputSummary, device: str, workers: int
) -> int:
    """Choose the number of rows per chunk of a new store."""
    if settings.rows_per_chunk:
        return settings.rows_per_chunk
    lengths = summary.all_lengths()
    encoded = encoded_residues(settings, lengths)
    kept = None
    if settings.per_residue:
        kept = encoded_lengths(lengths, settings.max_residues, settings.long)
        kept *= 2 * spec.dimension  # bytes of float16
    estimate = Estimate.of(spec, device, encoded.mean())
    return estimate.rows_per_chunk(encoded, workers, kept)


def identity_of(settings: Settings, spec: ModelSpec, summary: InputSummary, rows: int) -> Identity:
    """Collect everything that the values of rows depend on."""
    return Identity(
        format=FORMAT,
        input_sha256=summary.sha256,
        records=summary.records,
        weights_sha256=spec.weights_sha256,
        repr_layer=spec.repr_layer,
        pooling=settings.pooling,
        precision=spec.precision,
        dtype=settings.dtype,
        alphabet=ALPHABET_POLICY,
        max_residues=settings.max_residues,
        long=settings.long,
        rows_per_chunk=rows,
        per_residue=settings.per_residue,
        translation=str(settings.translation) if settings.translation else None,
        tiling=str(settings.tiling) if settings.tiling else None,
    )
