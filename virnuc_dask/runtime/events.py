"""Events that a run sends to its listener, and the summary at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from virnuc_dask.settings import CONTIG_NUCLEOTIDES, ModelSpec, Status
from virnuc_dask.text import counted, duration, printable

# Reason for a missing chunk without a failed attempt.
NOT_COMPUTED = "not computed"


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
class InputRead(Event):
    """Counts of the complete input after cleaning, as in `InputSummary`."""

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
    """The scheduler of this cluster has no worker yet."""

    cluster: str


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


@dataclass(frozen=True, slots=True)
class RunSummary(Event):
    """Result of a run.

    Attributes
    ----------
    store : str
    model : ModelSpec
    device : str
        Device of the workers.
    records, chunks : int
        Rows and chunks of the store.
    counts : dict of str to int
        Rows of the whole store by state; they add up to `records`.
    computed_chunks, computed_rows, computed_residues : int
        Work of this run; residues are counted as encoded, truncated or covered by windows.
    missing : dict of int to str
        Missing chunks of the store, or of the shard, with the last error or `NOT_COMPUTED`.
    elsewhere : int
        Missing chunks that belong to other shards.
    retries, workers_lost : int
    busy : float, optional
        Share of the workers' time in which their devices computed.
    took : dict of str to float
        Total seconds of the chunks that this run computed: ``read_s``, ``wait_s``, ``compute_s``
        and ``write_s`` as in `ChunkReport`.
    memory : int
        Largest `memory` of any chunk in bytes, as in `ChunkReport`.
    seconds : float
        From the submission of the first chunk to the last report, without the start of workers.
    total_seconds : float
        Duration of the whole run.
    interrupted : int, optional
        The signal that ended the run early.
    stopped : str, optional
        Why no more chunks could be written: path, cause, free space.
    """

    store: str
    model: ModelSpec
    device: str
    records: int
    chunks: int
    counts: dict[str, int]
    computed_chunks: int
    computed_rows: int
    computed_residues: int
    missing: dict[int, str]
    elsewhere: int
    retries: int
    workers_lost: int
    busy: float | None
    took: dict[str, float]
    memory: int
    seconds: float
    total_seconds: float
    interrupted: int | None = None
    stopped: str | None = None

    def table(self) -> list[tuple[str, str]]:
        """Return the summary for people, as names and values."""
        rows = state_table(self.counts)
        rows.append(("rows", f"{self.records:,}"))
        done = self.chunks - len(self.missing) - self.elsewhere
        computed = f"{self.computed_chunks:,} computed now"
        rows.append(("chunks", f"{done:,} of {self.chunks:,}, {computed}"))
        if self.computed_rows:
            seconds = max(self.seconds, 1e-6)
            speed = f"{self.computed_rows / seconds:,.0f} sequences/s"
            speed += f", {self.computed_residues / seconds:,.0f} residues/s"
            rows.append(("speed", f"{speed} over {duration(seconds)}"))
        if self.busy:
            rows.append(("busy", f"{self.busy:.0%} of the workers' time was computing"))
        if self.retries or self.workers_lost:
            lost = counted(self.workers_lost, "worker")
            rows.append(("trouble", f"{lost} lost, {self.retries} retried"))
        rows.append(("model", printable(self.model.described(self.device), 1000)))
        rows.append(("store", printable(self.store, 1000)))
        return rows

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.table()
        )
        return f"<table>{''.join(cells)}</table>"

    @property
    def quarantined(self) -> int:
        """Number of quarantined rows."""
        return sum(self.counts.get(s.meaning, 0) for s in Status if s.quarantined)

    @property
    def complete(self) -> bool:
        """Whether every row of the store, or of the shard, has its final state."""
        return not self.missing

    @property
    def exit_code(self) -> int:
        """0 complete, 3 complete with quarantined rows, 4 incomplete, 128 + signal interrupted."""
        if self.interrupted is not None and self.missing:
            return 128 + self.interrupted
        if self.missing:
            return 4
        return 3 if self.quarantined else 0

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values, with its exit code."""
        # Not super(): a dataclass with slots is a new class, and super() refers to the old one.
        return {**Event.to_json(self), **self.model.comment(), "exit_code": self.exit_code}


def state_table(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the number of rows in each state for people, as names and values.

    Parameters
    ----------
    counts : mapping of str to int
        Rows by state, as in `RunSummary`. Truncated and windowed rows are embedded too, and the
        table counts them among the embedded rows.
    """
    long = {
        state.meaning: number
        for state in (Status.TRUNCATED, Status.WINDOWED)
        if (number := counts.get(state.meaning, 0))
    }
    embedded = counts.get(Status.EMBEDDED.meaning, 0) + sum(long.values())
    of_them = ", ".join(f"{number:,} of them {meaning}" for meaning, number in long.items())
    table = []
    if pending := counts.get(Status.PENDING.meaning, 0):
        table.append((Status.PENDING.meaning, f"{pending:,}"))
    if embedded:
        also = f" ({of_them})" if long else ""
        table.append((Status.EMBEDDED.meaning, f"{embedded:,}{also}"))
    for state in Status:
        if state.quarantined and (number := counts.get(state.meaning, 0)):
            table.append((f"quarantined: {state.meaning}", f"{number:,}"))
    return table


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
