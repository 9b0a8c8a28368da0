"""Show a run: a live bar on a terminal or in a notebook, else lines; JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from itertools import pairwise
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from virnuc_dask.runtime import events
from virnuc_dask.runtime.events import Event, Listener
from virnuc_dask.runtime.summary import RunSummary
from virnuc_dask.text import counted, duration, printable, share

# Seconds between lines of plain output, so that the log of a long run stays readable.
_PLAIN_EVERY_S = 10.0
_NOTEBOOK_EVERY_S = 0.25
# Computed chunks after which the time that is left is shown.
_FIRST_CHUNKS = 3
_MAP_CELLS = 64
# Width of the bar by the least width of the terminal; a narrower terminal shows no bar.
_BAR_WIDTHS = {100: 24, 60: 16, 36: 8}
# Columns of the spinner, the percentage, and the spaces after these and after the bar.
_BESIDE_THE_TEXT = 8
# A cell whose chunks are all present, some, or none; and the same for encodings without blocks.
_BLOCKS, _SIGNS = ("█", "▒", "░"), ("#", "+", ".")


@contextmanager
def display(kind: str) -> Iterator[Listener]:
    """Yield a listener that shows events.

    Parameters
    ----------
    kind : {'auto', 'json', 'plain', 'quiet'}
        ``auto``: a live bar if stderr is a terminal that can redraw a line, else plain lines. JSON
        goes to stdout, everything else to stderr. ``quiet`` shows problems only.
    """
    console = _Console(stderr=True, markup=False, emoji=False, highlight=False)
    if kind == "json":
        yield _JsonLines(sys.stdout)
    elif kind == "auto" and console.is_interactive and sys.stderr.isatty():
        bar = _Bar(console)
        with bar.progress:
            yield bar
    else:
        yield _PlainLines(console, quiet=kind == "quiet")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Say nothing more if nobody reads; rich would end the program."""
        self.quiet = True


class _Tally:
    """Rates and counts so far, for the bar and for the lines."""

    def __init__(self) -> None:
        self.rows = self.total = self.residues_left = 0
        self.computed_rows = self.computed_residues = self.computed_chunks = 0
        self.workers = self.retries = self.quarantined = 0
        self.has_begun = self.is_stopping = False
        self._began: float | None = None

    def take(self, event: Event) -> None:
        match event:
            case events.RunStarted():
                self.total = event.present_rows + event.rows_to_compute
                self.rows = event.present_rows
                self.residues_left = event.residues_to_encode
            case events.WaitingForWorkers():
                self.has_begun = True
            case events.WorkersChanged():
                self.workers, self.has_begun = event.workers, True
                # Rates count from the arrival of the first worker, because its start takes seconds.
                if self.workers:
                    self._began = self._began or time.monotonic()
            case events.ChunkDone():
                self.rows += event.rows
                self.residues_left -= event.residues
                self.quarantined += event.quarantined
                if event.computed:
                    self.computed_chunks += 1
                    self.computed_rows += event.rows
                    self.computed_residues += event.residues
            case events.ChunkFailed(final=False):
                self.retries += 1
            case events.ChunkOverdue():
                self.retries += 1
            case events.WorkerLost():
                self.retries += len(event.chunks)
            case events.Stopping():
                self.is_stopping = True

    def text(self, columns: int | None = None) -> str:
        """The parts that fit into this number of columns, the most important first."""
        if not self.workers and self.rows < self.total:
            return "waiting for workers" if self.has_begun else "starting workers"
        return _fitting(self._parts(), columns)

    def _parts(self) -> Iterator[str]:
        seconds = max(1e-6, time.monotonic() - (self._began or time.monotonic()))
        rate = self.computed_residues / seconds
        # The first chunks are the longest, and the time until the first one is that of the start.
        is_known = rate and (self.computed_chunks >= _FIRST_CHUNKS or not self.residues_left)
        left = duration(max(0, self.residues_left) / rate) if is_known else "?"
        yield f"{self.rows:,}/{self.total:,} rows"
        yield "stopping" if self.is_stopping else f"ETA {left}"
        if self.quarantined:
            yield f"{self.quarantined:,} quarantined"
        if self.retries:
            yield f"{self.retries:,} retried"
        if rate:
            yield f"{self.computed_rows / seconds:,.0f} seq/s"
        yield counted(self.workers, "worker")
        if rate:
            yield f"{rate:,.0f} res/s"


class _Bar:
    def __init__(self, console: Console) -> None:
        bar = next((bar for least, bar in _BAR_WIDTHS.items() if console.width >= least), 0)
        self._beside = _BESIDE_THE_TEXT + bar
        self.progress = Progress(
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            *([BarColumn(bar_width=bar)] if bar else []),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._tally = _Tally()
        self._task = self.progress.add_task("starting", total=None)

    def __call__(self, event: Event) -> None:
        self._tally.take(event)
        if isinstance(event, events.Reading):
            self.progress.update(self._task, description=_reading(event, self._columns))
        elif isinstance(event, RunSummary):
            self.progress.stop()
        else:
            for line in _notice(event):
                self.progress.console.print(line)
            self.progress.update(
                self._task,
                total=self._tally.total or None,
                completed=self._tally.rows,
                description=self._tally.text(self._columns),
            )

    @property
    def _columns(self) -> int:
        return self.progress.console.width - self._beside


class _PlainLines:
    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._tally = _Tally()
        self._said = time.monotonic()

    def __call__(self, event: Event) -> None:
        self._tally.take(event)
        for line in _notice(event, quiet=self._quiet):
            self._say(line)
        if self._quiet or isinstance(event, RunSummary):
            return
        if time.monotonic() - self._said >= _PLAIN_EVERY_S:
            self._said = time.monotonic()
            if isinstance(event, events.Reading):
                self._say(_reading(event))
            elif self._tally.total:
                self._say(self._tally.text())

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class NotebookBar:
    """Listener that shows a bar in the output of a notebook cell. It does not need ipywidgets."""

    def __init__(self) -> None:
        display: Any = import_module("IPython.display").display
        self._tally, self._notes = _Tally(), list[str]()
        self._shown = time.monotonic()
        self._cell = display({"text/plain": "starting"}, raw=True, display_id=True)

    def __call__(self, event: Event) -> None:
        """Show an event, or only count it if the bar was updated a moment ago."""
        self._tally.take(event)
        notes = list(_notice(event))
        self._notes += notes
        is_due = time.monotonic() - self._shown >= _NOTEBOOK_EVERY_S
        if not (notes or is_due or isinstance(event, RunSummary)):
            return
        self._shown = time.monotonic()
        said = _reading(event) if isinstance(event, events.Reading) else self._tally.text()
        lines = [*self._notes, said]
        done, total = self._tally.rows, max(1, self._tally.total)
        shown = f'<progress value="{done}" max="{total}"></progress> {escape(lines.pop())}'
        above = "".join(f"<div>{escape(line)}</div>" for line in lines)
        text = {"text/html": f"{above}<div>{shown}</div>", "text/plain": "\n".join([*lines, said])}
        self._cell.update(text, raw=True)


def notebook_listener() -> Listener | None:
    """Return a bar if this process is the kernel of a notebook, else None."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return NotebookBar() if getattr(shell, "kernel", None) is not None else None


class _JsonLines:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._began = time.monotonic()

    def __call__(self, event: Event) -> None:
        document = event.to_json() | {"elapsed_s": round(time.monotonic() - self._began, 3)}
        self._stream.write(json.dumps(document) + "\n")
        self._stream.flush()


def _reading(event: events.Reading, columns: int | None = None) -> str:
    parts = (f"reading input: {event.records:,} rows", f"{event.residues:,} residues")
    return _fitting(parts, columns)


def _fitting(parts: Iterable[str], columns: int | None) -> str:
    """Join the parts that fit into a line of this number of columns, in their order."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if columns is None or len(longer) <= columns:
            line = longer
    return line


def _notice(event: Event, *, quiet: bool = False) -> Iterator[str]:
    """Lines that stay on the screen."""
    match event:
        case events.ModelChosen() if not quiet:
            yield from _model_notes(event)
        case events.StoreToBeReplaced():
            yield (
                f"{event.store}: {counted(event.records, 'row')}, {event.present_chunks:,} of"
                f" {counted(event.chunks, 'chunk')} done; replaced once the input is read"
            )
        case events.InputRead():
            if not quiet:
                yield from input_notes(event)
                yield from _truncation_note(event)
        case events.RunStarted() if not quiet:
            yield (
                f"{event.store}: {counted(event.records, 'row')} in"
                f" {counted(event.chunks, 'chunk')}, {event.present_chunks:,} done,"
                f" {event.chunks_to_compute:,} to compute"
            )
        case events.Connected() if not quiet:
            yield f"dashboard: {event.dashboard}"
        case events.WaitingForWorkers():
            yield f"waiting for workers: {event.reason}"
        case events.WorkersChecked() if not quiet:
            yield (
                f"{counted(event.workers, 'worker')} checked in {duration(event.seconds)}:"
                " versions, store, weights, device"
            )
        case events.WorkerUnfit():
            yield f"worker {event.worker} gets no chunks: {'; '.join(event.lacks)}"
        case events.WorkerLost():
            yield (
                f"worker {event.worker} was lost; {counted(len(event.chunks), 'chunk')}"
                " will be computed elsewhere"
            )
        case events.ChunkOverdue():
            then = "the worker is replaced" if event.replaced else "the worker gets no more chunks"
            yield (
                f"chunk {event.chunk} has hung on worker {event.worker} for {event.seconds:.0f} s;"
                f" {then}, and another worker computes the chunk"
            )
        case events.ChunkSuspected():
            yield (
                f"workers died or hung {counted(event.deaths, 'time')} while they computed chunk"
                f" {event.chunk}; it is now computed in a child process"
            )
        case events.ChunkFailed():
            after = "not tried again in this run" if event.final else "will be tried again"
            yield f"chunk {event.chunk}, attempt {event.attempt}: {event.error}; {after}"
        case events.CannotGoOn():
            yield f"no more chunks can be written: {event.reason}"
        case events.Stopping():
            yield (
                f"stopping: {counted(event.running, 'running chunk')} may finish within"
                f" {event.seconds:.0f} s; a second signal exits immediately"
            )


def _model_notes(event: events.ModelChosen) -> Iterator[str]:
    model = event.model
    yield f"model: {printable(model.described(event.device), 1000)}"
    if event.has_adapter:
        yield f"note: the LoRA adapter in {model.reference} is merged with its base model"
    if event.left_out:
        heads = ", ".join(sorted({name.split(".")[0] for name in event.left_out}))
        yield (
            f"note: {model.reference} also holds {counted(len(event.left_out), 'tensor')} that"
            f" ESM-2 does not have ({printable(heads)}); ignored"
        )


def input_notes(event: events.InputRead) -> Iterator[str]:
    """Yield notes about the input for its owner."""
    for file in event.empty_files:
        yield f"note: {file} contains no records"
    if event.empty:
        yield f"note: {counted(event.empty, 'record')} without residues; quarantined as empty"
    if event.invalid:
        which = "their tiles with such letters are quarantined" if event.tiled else "quarantined"
        yield (
            f"note: {counted(event.invalid, 'record')} with letters that are not residues;"
            f" {which} as invalid_residues (--strict refuses such input)"
        )
    changed = {
        "J read as X": event.ambiguous_j,
        "gap letters removed": event.gaps,
        "terminal stops removed": event.terminal_stops,
    }
    if any(changed.values()):
        yield "note: " + ", ".join(f"{n:,} {what}" for what, n in changed.items() if n)
    if event.without_row:
        yield (
            f"note: {event.without_row:,} of {counted(event.reads, 'record')} gave no row: no frame"
            f" is open, or long enough{event.hint}"
        )


def _truncation_note(event: events.InputRead) -> Iterator[str]:
    if event.truncated:
        yield (
            f"note: {counted(event.truncated, 'row')} of more than {event.max_residues:,} residues"
            f" will be truncated to these, which leaves out"
            f" {share(event.residues_left_out, event.residues)} of all residues (--long window"
            " embeds whole sequences)"
        )


# --- the map of chunks --------------------------------------------------------------------------


def chunk_map(present: NDArray[np.bool_], encoding: str, cells: int = _MAP_CELLS) -> str:
    """Draw which chunks are present, in order. A cell stands for one chunk or for several."""
    try:
        "".join(_BLOCKS).encode(encoding)
        full, part, none = _BLOCKS
    except UnicodeEncodeError:
        full, part, none = _SIGNS
    if len(present) <= cells:
        shares = present.astype(float)
    else:
        edges = np.linspace(0, len(present), cells + 1).astype(int)
        shares = np.array([present[a:b].mean() for a, b in pairwise(edges)])
    return "".join(full if share == 1 else none if share == 0 else part for share in shares)
