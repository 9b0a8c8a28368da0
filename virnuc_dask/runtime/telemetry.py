"""The file beside a store that keeps every event of its runs, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from virnuc_dask.runtime import events
from virnuc_dask.runtime.events import Event, Listener

_OF_A_CHUNK = (events.ChunkDone, events.ChunkFailed, events.ChunkOverdue, events.WorkerLost)


@contextmanager
def recorded(listener: Listener, path: Path | None) -> Iterator[Listener]:
    """Yield a listener that also appends every event to a file, as JSON lines.

    Nothing is written before the first event about a chunk. A file that cannot be written does not
    stop the run; one message reports it.
    """
    if path is None:
        yield listener
        return
    recorder = _Recorder(path)

    def listen(event: Event) -> None:
        recorder(event)
        listener(event)

    yield listen


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path, self._run = path, uuid4().hex
        self._waiting: list[str] = []
        self._has_begun = self._has_failed = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.Reading) or self._has_failed:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"run": self._run, "time": now} | event.to_json()) + "\n"
        self._waiting.append(line)
        self._has_begun |= isinstance(event, _OF_A_CHUNK)
        if not self._has_begun:
            return
        try:
            # Opened each time, because other runs on the same store may append whole lines too.
            with open(self._path, "a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            self._has_failed = True
            print(f"no telemetry: {self._path}: {error.strerror}", file=sys.stderr)
        self._waiting.clear()
