"""Workers that stand still, and neither die nor answer: their chunks are computed by others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Maker, chunk_bytes, tree

import virnuc_dask
from virnuc_dask import RunConfig, events


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Any]:
    """A client of a scheduler and two workers that were started by hand and have no nannies."""
    from virnuc_dask.cluster import connect

    file, dask = tmp_path / "scheduler.json", [sys.executable, "-m", "dask"]
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["worker", "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    processes = [
        subprocess.Popen(
            [*dask, *command, "--scheduler-file", str(file)],
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        for command in (scheduler, worker, worker)
    ]
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        with connect(str(file)) as client:
            client.wait_for_workers(2, timeout=60)
            yield client
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(timeout=30)


def test_a_worker_that_stands_still_is_worked_around(
    make_store: Maker, peptides: Path, attached: Any
) -> None:
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    seen: list[events.Event] = []
    stopped: list[int] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        done = [event for event in seen if isinstance(event, events.ChunkDone)]
        if len(done) == 10 and not stopped:
            stopped.append(done[-1].pid)
            os.kill(done[-1].pid, signal.SIGSTOP)

    config = RunConfig(deadline_floor=10, deadline_first=20)
    summary = virnuc_dask.resume(store.path, client=attached, config=config, listener=listen)
    overdue = [event for event in seen if isinstance(event, events.ChunkOverdue)]
    assert len(overdue) == 1  # the only chunk that it had; no other was given to it
    assert not overdue[0].replaced  # without a nanny nobody would start another
    assert summary.exit_code == 0
    assert sum(summary.counts.values()) == store.records
    computed = [event.chunk for event in seen if isinstance(event, events.ChunkDone)]
    assert sorted(computed) == list(range(store.chunk_count))
    before = tree(store.path)

    # It wakes up, and what it still writes are the same bytes.
    os.kill(stopped[0], signal.SIGCONT)
    attached.run(time.sleep, 1)
    assert set(tree(store.path)) == set(before)
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)
    assert len(attached.nthreads()) == 2
    assert not any(attached.processing().values())
