"""A device lock: one chunk computes at a time while other chunks are read and written."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from filelock import FileLock

# The lock only improves speed. After this time a waiter proceeds: the holder may hang.
_LONGEST_WAIT_S = 20.0
_LOOK_EVERY_S = 0.005


class DeviceLock:
    """A lock shared by the threads of a process and, on a GPU, by all processes of a user.

    Without it, workers that share a GPU each get half of its speed and need twice the memory. On a
    GPU the lock is released when all work is queued, before the work is done: two processes may
    overlap by one chunk.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = threading.Lock()
        self._processes: FileLock | None = None
        if device.type == "cuda":
            self._processes = _file_lock(str(torch.cuda.get_device_properties(device).uuid))

    def __enter__(self) -> None:
        self._threads.acquire()
        if self._processes is not None:
            try:
                self._processes.acquire(timeout=_LONGEST_WAIT_S)
            except OSError:
                pass  # held for too long, or a file system without locks
            except BaseException:
                self._threads.release()
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._processes is not None:
                with suppress(OSError):
                    self._processes.release()
        finally:
            self._threads.release()


def _file_lock(name: str) -> FileLock:
    """A lock that ends with its process. It follows no link: the folder is everybody's."""
    path = Path(tempfile.gettempdir(), f"virnuc_dask-{os.getuid()}-{name}.lock")
    return FileLock(
        path,
        poll_interval=_LOOK_EVERY_S,
        mode=0o600,
        thread_local=False,
        fallback_to_soft=False,
    )
