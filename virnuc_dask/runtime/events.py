"""Events that a run sends to its listener."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from virnuc_dask.settings import CONTIG_NUCLEOTIDES, ModelSpec
from virnuc_dask.text import counted


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run."""

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain JSON values, with its kind under ``event``."""
        return {"event": _snake(type(self).__name__), **asdict(self)}


Listener = Callable[[Event], None]


def silence(_event: Event) -> None:
    """Ignore an event: the listener if none is given."""


@dataclass(frozen=True, slots=True)
class Reading(Event):
    """Input read so far; `records` counts rows."""

    records: int
    residues: int


@dataclass(frozen=True, slots=True)
class ModelChosen(Event):
    """The model and its device. This is the first event, or one of the first.

    Weights that take more than a second to hash are hashed while the input is read, so `Reading`
    events may come first.

    If the run has read the weights, `has_adapter` says whether an adapter was merged, and
    `left_out` names the tensors that are not part of ESM-2, such as a classifier's.
    """

    model: ModelSpec
    device: str
    has_adapter: bool = False
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON values, with a comment if the weights are random."""
        return {**Event.to_json(self), **self.model.comment()}


@dataclass(frozen=True, slots=True)
class StoreToBeReplaced(Event):
    """The run begins afresh: this store is removed once the input is read."""

    store: str
    records: int
    chunks: int
    present_chunks: int


@dataclass(frozen=True, slots=True)
class InputRead(Event):
    """Counts of the complete input after cleaning, as in `InputSummary`.

    `truncated` counts the rows of which only the first `max_residues` are to be encoded, and
    `residues_left_out` the other residues of these rows.
    """

    records: int
    residues: int
    empty: int
    invalid: int
    ambiguous_j: int
    gaps: int
    terminal_stops: int
    nucleotide_like: int
    empty_files: tuple[str, ...]
    reads: int = 0
    nucleotides: int = 0
    without_row: int = 0
    contigs_without_row: int = 0
    tiled: int = 0
    truncated: int = 0
    residues_left_out: int = 0
    max_residues: int = 0

    @property
    def hint(self) -> str:
        """Advice about records without a row, to end a sentence; empty if there are none."""
        if not self.contigs_without_row:
            return ""
        return (
            f"; contigs and genomes, here {counted(self.contigs_without_row, 'record')} of"
            f" {CONTIG_NUCLEOTIDES:,} nucleotides or more, need --frames orf"
        )


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Size of the store, the chunks it has, and the work of this run or of its shard.

    `records` counts the rows of the store.
    """

    store: str
    records: int
    chunks: int
    present_chunks: int
    present_rows: int
    chunks_to_compute: int
    rows_to_compute: int
    residues_to_encode: int


@dataclass(frozen=True, slots=True)
class WorkersChanged(Event):
    """The number of workers or threads changed to these values."""

    workers: int
    threads: int


@dataclass(frozen=True, slots=True)
class WaitingForWorkers(Event):
    """The scheduler of this cluster has no worker yet, or its file is not there yet."""

    cluster: str
    reason: str


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """The run is connected to a scheduler with a Dask dashboard at this address."""

    dashboard: str


@dataclass(frozen=True, slots=True)
class WorkersChecked(Event):
    """Number of workers with the versions, store, weights and device of the run."""

    workers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerUnfit(Event):
    """A worker that joined later lacks something; it gets no chunks."""

    worker: str
    lacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChunkDone(Event):
    """A chunk is in the store.

    `residues` is the number of residues to encode; for the other fields see `ChunkReport`.
    """

    chunk: int
    rows: int
    residues: int
    quarantined: int
    computed: bool
    worker: str
    read_s: float
    wait_s: float
    compute_s: float
    write_s: float
    fill: float
    memory: int
    gpu: int | None
    pid: int


@dataclass(frozen=True, slots=True)
class ChunkFailed(Event):
    """A chunk raised an error; if `final`, this run does not try it again."""

    chunk: int
    attempt: int
    error: str
    final: bool


@dataclass(frozen=True, slots=True)
class WorkerLost(Event):
    """A worker vanished with these chunks; other workers compute them."""

    worker: str
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkOverdue(Event):
    """A chunk took far longer than usual. It is computed elsewhere; its worker may be replaced."""

    chunk: int
    worker: str
    seconds: float
    replaced: bool


@dataclass(frozen=True, slots=True)
class ChunkSuspected(Event):
    """Workers died or hung while they computed a chunk; it is then computed in child processes."""

    chunk: int
    deaths: int


@dataclass(frozen=True, slots=True)
class Stopping(Event):
    """The run got a signal; running chunks have this many seconds to finish."""

    signal: int
    running: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CannotGoOn(Event):
    """No more chunks can be written; running chunks may finish."""

    reason: str
    running: int


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
