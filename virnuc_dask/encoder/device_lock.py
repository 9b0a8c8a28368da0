"""A lock on a device: one chunk computes at a time, while others are read and written."""

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

# The lock is for speed alone. Whoever has waited this long goes on: another may hang.
_LONGEST_WAIT_S = 20.0
_LOOK_EVERY_S = 0.005


class DeviceLock:
    """A lock on a device: of this process's threads, and, of a GPU, of all this user's processes.

    Workers that share a card would each take half of it, and twice the memory. On a GPU it is
    released when all work is queued, before it is done: two processes may overlap by one chunk.

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
                with suppress(OSError):  # where it could not be had either
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._threads.release()


def _open(name: str) -> int | None:
    """A file for a lock, which ends with the process that has it; None where there can be none."""
    path = Path(tempfile.gettempdir(), f"virnuc_dask-{os.getuid()}-{name}.lock")
    try:
        # Not through a link that somebody else has put there.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None  # a full or foreign file system: the lock is for speed alone


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
