"""What every fault test needs: a run in processes of its own, and the ledger at its end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults
import numpy as np
import psutil
from conftest import PROGRAM, chunk_bytes, tree
from nursery import wait_for

import virnuc_dask
from virnuc_dask.store.store import Store


def program(*, patient: bool = False, **settings: object) -> list[str]:
    """The program, with other values of settings that only Python can change.

    One that is patient takes its time to end after a signal, whatever its grace.
    """
    lines = [
        "from virnuc_dask.settings import RunConfig",
        f"RunConfig.__init__.__kwdefaults__.update({settings!r})",
        "from virnuc_dask.__main__ import main",
        "main()",
    ]
    if patient:
        lines.insert(0, "import virnuc_dask.runtime.run as run; run._LATE_S = 60")
    return [sys.executable, "-c", "\n".join(lines)]


class Run:
    """A command in a process group of its own, whose events are read as they come."""

    def __init__(self, *arguments: object, program: Any = PROGRAM, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*program, *map(str, arguments), "--json", "--no-telemetry"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a killed process may leave half a line
                self.events.append(json.loads(line))
                yield self.events[-1]

    def finish(self) -> int:
        for _ in self:
            pass
        return self.process.wait(timeout=120)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def computed(self) -> list[int]:
        return [event["chunk"] for event in self.of("chunk_done") if event["computed"]]


@contextmanager
def holding_after(patch: Any, table: Path, rows: int) -> Iterator[None]:
    """What is started within does so many rows, and is then held until `faults.release`.

    A worker that is held meets no further row, so that each needs one "hold" only.
    """
    table.write_text(json.dumps({"": ["pass"] * rows + ["hold"] * 99}))
    with patch.context() as inner:
        faults.arm(inner, table)
        yield


def await_held(table: Path, rows: int) -> None:
    """Wait until `holding_after` so many rows holds a worker."""
    met = table.with_name(".met")
    wait_for(lambda: met.exists() and met.stat().st_size > rows)


def assert_ledger(store: Store, reference: Store) -> None:
    """Every record is in exactly one state, every row is what an uninterrupted run gives."""
    data, expected = virnuc_dask.open_store(store.path), virnuc_dask.open_store(reference.path)
    assert data.sizes["sequence"] == reference.records
    assert list(data.sequence_id.values) == list(expected.sequence_id.values)
    assert np.array_equal(data.status.values, expected.status.values)
    assert (data.status.values != 0).all()
    for name in {"embedding", "residue_embedding"} & set(expected):
        assert np.array_equal(data[name].values, expected[name].values, equal_nan=True)
    assert chunk_bytes(store.path) == chunk_bytes(reference.path)  # and no stray file
    report = virnuc_dask.verify(store.path)
    assert (report.checked, report.missing, report.bad) == (store.chunk_count, 0, {})
    assert report.sequences is None
    assert report.leftovers == []


def finished_chunks(store: Store) -> dict[str, tuple[Any, Any, bytes]]:
    """Files of the chunks that are done: inode or ETag, time, content."""
    chunks = np.flatnonzero(store.present())
    done = {key for chunk in chunks for key in store.keys(int(chunk))}
    return {name: found for name, found in tree(store.path).items() if name in done}


def await_idle(client: Any) -> None:
    """Wait until no worker computes: a thread that nobody awaits still writes."""

    # In here, so that it travels whole.
    def executing(dask_worker: Any) -> int:
        return len(dask_worker.state.executing)

    wait_for(lambda: not any(client.run(executing).values()))


def await_end(pids: set[int], seconds: float = 20) -> None:
    """Workers must not outlive their coordinator: an orphan would hold a GPU for ever."""
    assert pids
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive the coordinator"
        time.sleep(0.05)


def clear_partial_files_of_the_killed(store: Store) -> None:
    """A worker killed in the middle of a write leaves a temporary file, which `verify` names."""
    report = virnuc_dask.verify(store.path, repair=True)
    assert all(name.endswith(".partial") for name in report.leftovers)
