"""Before any work: read the input into a store, or compare it with one; or only plan."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from dask.system import CPU_COUNT
from numpy.typing import NDArray

from virnuc_dask import __version__, events, retry
from virnuc_dask.config import (
    AUTO,
    FORMAT,
    PRECISIONS,
    Identity,
    ModelSpec,
    Precision,
    Settings,
    precision_on,
    rows_per_chunk,
)
from virnuc_dask.errors import (
    IdentityMismatchError,
    InputError,
    PlaceError,
    StoreError,
    UsageError,
)
from virnuc_dask.events import Listener
from virnuc_dask.files import expanded
from virnuc_dask.ingest import Ingest
from virnuc_dask.packing import encoded_lengths, residues_to_encode
from virnuc_dask.places import place_of
from virnuc_dask.residues import ALPHABET_POLICY, Block, InputSummary
from virnuc_dask.sequences import read_blocks
from virnuc_dask.store import Store, can_create
from virnuc_dask.upstream import fair_esm
from virnuc_dask.weights import (
    PUBLISHED,
    describe,
    load_checkpoint,
    published_part,
    resolved,
    weights_at_hand,
)

Inputs = str | Path | Sequence[str | Path]

# Residues that are encoded to estimate the speed: a second or two with a small model.
_TRIAL_RESIDUES = 2**14
# Share of the records from which on an input is taken for what they look like.
_MOST = 0.9


def prepare(
    inputs: Inputs, store: str | Path, settings: Settings, emit: Listener, device: str = "cpu"
) -> tuple[Store, ModelSpec]:
    """Make a store of an input, or make sure that a store there was made from it.

    Parameters
    ----------
    inputs : path or sequence of path
    store : path
    settings : Settings
    emit : callable
        Gets `ModelRead`, `Reading` and `InputRead` events.
    device : str
        That the workers will compute on; ``auto`` precision depends on it.

    Raises
    ------
    UsageError
        The device does not exist, or does not have the precision.
    InputError
        The input cannot be read. No store is left behind.
    IdentityMismatchError
        The store was made with other settings, or from another input.
    NotAStoreError, StoreError, ModelError
    """
    # What can fail without reading the input fails first.
    check_device(device)
    existing = None if can_create(store) else Store(store)
    precision = precision_on(device, settings.precision)
    if existing and settings.precision == AUTO:
        precision = _precision_of(existing)
    checkpoint = load_checkpoint(settings.model)
    spec = describe(checkpoint, precision, settings.repr_layer, settings.pooling)
    has_adapter = checkpoint.adapter is not None
    emit(events.ModelRead(spec.reference, spec.weights_sha256, has_adapter, checkpoint.left_out))
    del checkpoint  # the weights may be large, and reading takes long
    files, summary = _listed(inputs), InputSummary()
    blocks = read_blocks(files, summary, strict=settings.strict, translation=settings.translation)
    if existing is None:
        with _explained(store):
            ingest = Ingest(store, translated=settings.translation is not None)
        with ingest:
            for block in blocks:
                with _explained(store):
                    ingest.append(block)
                emit(events.Reading(summary.records, summary.residues))
            _check(settings, summary, files)
            wanted = _identity(settings, spec, summary)
            with _explained(store):
                ingest.commit(wanted, spec.dimension, _provenance(files, spec, summary))
        # Ours, or that of a run which was faster.
        existing = Store(store)
    else:
        for _ in blocks:
            emit(events.Reading(summary.records, summary.residues))
        _check(settings, summary, files)
        wanted = _identity(settings, spec, summary, existing.identity.rows_per_chunk)
    if differences := existing.identity.differences(wanted):
        raise IdentityMismatchError(str(store), differences)
    emit(_input_read(summary))
    return existing, spec


def check_device(device: str) -> None:
    """Refuse a device that torch has no name for. Whether it is there, each worker finds out.

    Raises
    ------
    UsageError
    """
    import torch

    try:
        torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: {error}") from error


def model_of(store: Store, reference: str | None = None) -> ModelSpec:
    """The model that a store was made for.

    Parameters
    ----------
    store : Store
    reference : str, optional
        Where the weights are now, if not where they were.

    Raises
    ------
    UsageError
        The store is of a precision that there was once.
    """
    identity = store.identity
    return ModelSpec(
        resolved(reference or str(store.provenance["model"])),
        identity.weights_sha256,
        store.dimension,
        identity.repr_layer,
        identity.pooling,
        _precision_of(store),
    )


def _precision_of(store: Store) -> Precision:
    """What a store's rows are computed in. One that is not offered any more is read, not added to.

    Raises
    ------
    UsageError
    """
    precision = store.identity.precision
    if precision not in PRECISIONS:
        raise UsageError(
            f"{store.path}: precision {precision} is no longer offered: on real weights its rows"
            " fell to a cosine of 0.98 beside float32; run again into another store"
        )
    return precision


@contextmanager
def _explained(store: str | Path) -> Iterator[None]:
    """Say what is wrong with a store's disk; what a listener writes to is another matter."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PlaceError) or not retry.is_hopeless(error):
            raise
        raise StoreError(place_of(store).explain(error)) from error


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take.

    Attributes
    ----------
    input : InputRead
    longest, median : int
        Residues.
    long_records : int
        Records longer than `max_residues`.
    encoded_residues : int
        Residues that would go through the encoder.
    chunks, rows_per_chunk : int
    embedding_bytes : int
        Before compression, which gains little on embeddings.
    sequence_bytes : int
        Residues, before compression.
    residue_embedding_bytes : int
        Representations of single residues, before compression.
    residues_per_s : float, optional
        Of one worker, measured here on a sample; None if the weights are not on this machine, or
        the sample has nothing to encode.
    workers : int
        That the estimate counts on.
    without_row : list of str
        Identifiers of the nucleotide records that give no row.
    """

    input: events.InputRead
    longest: int
    median: int
    long_records: int
    encoded_residues: int
    chunks: int
    rows_per_chunk: int
    embedding_bytes: int
    sequence_bytes: int
    residue_embedding_bytes: int
    residues_per_s: float | None
    workers: int
    without_row: list[str]

    @property
    def seconds(self) -> float | None:
        """Estimated time on this machine."""
        if not self.encoded_residues:
            return 0.0
        if self.residues_per_s is None:
            return None
        return self.encoded_residues / (self.residues_per_s * self.workers)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"seconds": self.seconds}

    def lines(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as (name, value)."""
        if self.input.reads:
            yield "reads", f"{self.input.reads:,} ({self.input.nucleotides:,} nucleotides)"
            yield "without frame", f"{self.input.without_row:,} reads"
        yield "rows" if self.input.reads else "records", f"{self.input.records:,}"
        yield "residues", f"{self.input.residues:,} (median {self.median:,}, most {self.longest:,})"
        if self.input.empty or self.input.invalid:
            yield "quarantined", f"{self.input.invalid:,} invalid, {self.input.empty:,} empty"
        yield "long records", f"{self.long_records:,}"
        yield "to encode", f"{self.encoded_residues:,} residues"
        yield "chunks", f"{self.chunks:,} of {self.rows_per_chunk:,} rows"
        parts = (self.embedding_bytes, self.sequence_bytes, self.residue_embedding_bytes)
        size = sum(parts) / 1e6
        yield "store", f"about {size:,.1f} MB before compression"
        if not self.encoded_residues:
            yield "time", "none: there is nothing to encode"
        elif self.seconds is None or self.residues_per_s is None:
            yield "time", "unknown: the weights are not on this machine"
        else:
            yield (
                "time",
                f"about {self.seconds / 60:,.1f} min with {self.workers} workers here"
                f" ({self.residues_per_s:,.0f} residues/s each, one thread)",
            )


def plan(inputs: Inputs, settings: Settings | None = None, *, workers: int | None = None) -> Plan:
    """Read an input and say what embedding it would take. Writes nothing.

    Parameters
    ----------
    inputs : path or sequence of path
    settings : Settings, optional
    workers : int, optional
        Workers for the estimate; default: one for each core.

    Raises
    ------
    InputError, ModelError
    UsageError
        There is no fair-esm.
    """
    fair_esm()
    settings = settings or Settings()
    summary = InputSummary()
    sample: Block | None = None
    files = _listed(inputs)
    blocks = read_blocks(files, summary, strict=settings.strict, translation=settings.translation)
    for block in blocks:
        if sample is None and len(block.lengths):
            sample = _first_rows(block, _TRIAL_RESIDUES)
    _check(settings, summary, files)
    lengths = summary.all_lengths()
    rate: float | None = None
    published = published_part(settings.model)
    if published is None or weights_at_hand(published):
        rate, dimension = _trial(settings, sample)
    else:
        dimension = PUBLISHED[published]
    encoded = _encoded(settings, lengths)
    rows = settings.rows_per_chunk or rows_per_chunk(summary.records, encoded)
    width = 4 if settings.dtype == "float32" else 2
    kept = encoded_lengths(lengths, settings.max_residues, settings.long)
    return Plan(
        _input_read(summary),
        int(lengths.max()),
        int(np.median(lengths)),
        int((lengths > settings.max_residues).sum()),
        encoded,
        -(-summary.records // rows),
        rows,
        summary.records * dimension * width,
        summary.residues,
        int(kept.sum()) * dimension * 2 if settings.per_residue else 0,
        rate,
        workers or CPU_COUNT,
        summary.without_row,
    )


def _check(settings: Settings, summary: InputSummary, files: Sequence[str | Path]) -> None:
    """Refuse what gives no row, proteins that are to be translated, nucleotides that are not."""
    if settings.molecule == AUTO:
        _check_molecule(summary)
    if not summary.records:
        raise InputError(
            f"none of {summary.reads:,} records gives a row: no frame is open, or long enough",
            file=", ".join(map(str, files)),
        )


def _check_molecule(summary: InputSummary) -> None:
    override = "--molecule {} if they are"
    first = summary.first_protein_like
    if first and summary.protein_like >= _MOST * summary.reads:
        raise InputError(
            f"{summary.protein_like:,} of {summary.reads:,} records have letters of proteins, which"
            f" cannot be translated; leave out --translate, or {override.format('nucleotide')}"
            " nucleotides all the same. The first",
            file=first.file,
            line=first.line,
            record=first.id,
        )
    letters = summary.records - summary.empty
    if not summary.reads and letters and summary.nucleotide_like >= _MOST * letters:
        raise UsageError(
            f"{summary.nucleotide_like:,} of {letters:,} records look like nucleotides, and this"
            " model reads proteins: --translate six-frame, or"
            f" {override.format('protein')} proteins all the same"
        )


def _input_read(summary: InputSummary) -> events.InputRead:
    return events.InputRead(
        summary.records,
        summary.residues,
        summary.empty,
        summary.invalid,
        summary.ambiguous_j,
        summary.gaps,
        summary.terminal_stops,
        summary.nucleotide_like,
        tuple(summary.empty_files),
        summary.reads,
        summary.nucleotides,
        len(summary.without_row),
    )


def _provenance(
    files: Sequence[str | Path], spec: ModelSpec, summary: InputSummary
) -> dict[str, Any]:
    """How the store came to be, for people; nothing is ever decided by it."""
    packages = ("fair-esm", "torch", "zarr", "dask", "numpy")
    return {
        "model": spec.reference,
        "inputs": [str(file) for file in files],
        "input": {k: v for k, v in _input_read(summary).to_json().items() if k != "event"},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {"virnuc_dask": __version__} | {name: version(name) for name in packages},
    }


# --- parts ---------------------------------------------------------------------------------------


def _listed(inputs: Inputs) -> list[str]:
    """Inputs one by one; ``-`` is standard input, whatever is there."""
    names = [inputs] if isinstance(inputs, (str, Path)) else inputs
    return [name if name == "-" else expanded(name) for name in names]


def _first_rows(block: Block, residues: int) -> Block:
    """The first rows of a block with about this many residues, at least one row."""
    rows = max(1, int(np.searchsorted(np.cumsum(block.lengths), residues)))
    lengths = block.lengths[:rows]
    return Block(block.ids[:rows], lengths, block.residues[: int(lengths.sum())])


def _encoded(settings: Settings, lengths: NDArray[np.int32]) -> int:
    """Residues that go through the encoder."""
    return int(residues_to_encode(lengths, settings.max_residues, settings.long).sum())


def _identity(
    settings: Settings, spec: ModelSpec, summary: InputSummary, rows: int | None = None
) -> Identity:
    """What row values depend on; `rows` per chunk where the user chose none."""
    encoded = _encoded(settings, summary.all_lengths())
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
        rows_per_chunk=settings.rows_per_chunk or rows or rows_per_chunk(summary.records, encoded),
        per_residue=settings.per_residue,
        translation=str(settings.translation) if settings.translation else None,
    )


def _trial(settings: Settings, block: Block | None) -> tuple[float | None, int]:
    """Residues per second of one worker with one thread, and the embedding's dimension."""
    import torch

    from virnuc_dask.embed import embed_rows
    from virnuc_dask.encoder import load_encoder

    encoder = load_encoder(
        settings.model,
        precision=precision_on("cpu", settings.precision),
        repr_layer=settings.repr_layer,
        pooling=settings.pooling,
    )
    identity = _identity(settings, encoder.spec, InputSummary())
    encoded = 0 if block is None else _encoded(settings, block.lengths)
    if block is None or not encoded:
        return None, encoder.dimension
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        embed_rows(encoder, block.lengths, block.residues, identity)
        return encoded / (time.perf_counter() - started), encoder.dimension
    finally:
        torch.set_num_threads(threads)
