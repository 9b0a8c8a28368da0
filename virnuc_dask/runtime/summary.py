"""The result of a run: counts, times and what is missing, and the table that people see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from virnuc_dask.errors import VirnucError
from virnuc_dask.runtime.events import Event
from virnuc_dask.settings import ModelSpec, Status
from virnuc_dask.text import counted, duration, printable, rate

# Reason for a missing chunk without a failed attempt.
NOT_COMPUTED = "not computed"


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
            speed = f"{rate(self.computed_rows / seconds)} sequences/s"
            speed += f", {rate(self.computed_residues / seconds)} residues/s"
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


class IncompleteRunError(VirnucError):
    """A run ended before every row of the store, or of its shard, had its final state.

    Finished chunks are safe, and `resume` computes the others.

    Parameters
    ----------
    summary : RunSummary
        What the run did, and why chunks are missing.
    """

    def __init__(self, summary: RunSummary) -> None:
        self.summary, self.exit_code = summary, summary.exit_code
        ended = summary.stopped
        if summary.interrupted is not None:
            ended = f"interrupted by signal {summary.interrupted}"
        text = f"{len(summary.missing):,} of {counted(summary.chunks, 'chunk')} missing"
        text += f" ({ended})" if ended else ""
        failed = (f"; chunk {c}: {e}" for c, e in summary.missing.items() if e != NOT_COMPUTED)
        text += next(failed, "")
        super().__init__(f"{summary.store}: {text}; `resume` goes on")

    def __reduce__(self) -> tuple[type[IncompleteRunError], tuple[RunSummary]]:
        return type(self), (self.summary,)


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


def table_lines(table: list[tuple[str, str]]) -> Iterator[str]:
    """Format names and values as a table. Only the terminal may wrap its lines."""
    width = max((len(name) for name, _ in table), default=0)
    for name, value in table:
        yield f"{name:<{width}}  {value}"
