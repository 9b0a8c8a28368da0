"""Dask schedulers and workers, each a program started by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def started_cluster(
    folder: Path,
    *options: str,
    worker_options: tuple[str, ...] = (),
    scheduler_env: dict[str, str] | None = None,
    **environment: Any,
) -> Iterator[Path]:
    """A scheduler and a worker, each started by hand; the environment is the worker's."""
    file = folder / "scheduler.json"
    arguments = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with (
        started(file, *arguments, *options, env=scheduler_env),
        worker(file, *options, *worker_options, **environment),
    ):
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        yield file


@contextmanager
def worker(
    file: Path, *options: str, prefix: tuple[str, ...] = (), **environment: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """One more worker, of one thread."""
    arguments = ("worker", "--nthreads", "1", "--no-dashboard", *options)
    with started(file, *arguments, prefix=prefix, **environment) as process:
        yield process


@contextmanager
def started(
    file: Path, *arguments: str, prefix: tuple[str, ...] = (), **environment: Any
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(file)],
        stderr=subprocess.DEVNULL,
        cwd=file.parent,
        start_new_session=True,
        **environment,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
