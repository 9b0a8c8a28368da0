"""A device lock: one chunk computes at a time while other chunks are read and written."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

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
        self._file: int | None = None
        if device.type == "cuda":
            self._file = _open(str(torch.cuda.get_device_properties(device).uuid))

    def __enter__(self) -> None:
        self._threads.acquire()
        if self._file is not None:
            _await(self._file)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._file is not None:
                with suppress(OSError):  # on a file system without locks, as in `_await`
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._threads.release()


def _open(name: str) -> int | None:
    """Open a lock file, or return None if that fails. A lock on it ends with its process."""
    path = Path(tempfile.gettempdir(), f"virnuc_dask-{os.getuid()}-{name}.lock")
    try:
        # O_NOFOLLOW: another user may have put a link there.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None  # a full or foreign file system; the lock only improves speed


def _await(file: int) -> None:
    until = time.monotonic() + _LONGEST_WAIT_S
    while time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_EVERY_S)
        except OSError:
            return  # a file system without locks
        else:
            return
