"""Durable file writes, and marks and locks that show which process is writing a file."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from virnuc_dask.errors import UsageError

# The host and process number are for people: containers may share both, so they prove nothing.
_OWNED_NAME = re.compile(r".+~(?P<host>[^~]+)~\d+~[0-9a-f]{32}\.(partial|ingest)")
# Where a lock proves nothing, a writer counts as dead after this many seconds without a write.
_ABANDONED_S = 24 * 3600.0


def expanded(path: str | Path) -> str:
    """Replace ``~`` or ``~user`` at the beginning of a path by the home directory.

    Raises
    ------
    UsageError
        The user has no home directory.
    """
    # A name such as "~other" may be an ordinary file; pathlib would raise an error for it.
    full = os.path.expanduser(path)  # noqa: PTH111
    if full == str(path) and full.partition("/")[0] == "~":
        raise UsageError(f"{path}: you have no home directory; set HOME, or write the full path")
    return full


def write_durably(path: Path, content: Any) -> None:
    """Write or replace a file atomically and durably: it survives SIGKILL and power cuts.

    Parameters
    ----------
    path : Path
        The directory must exist.
    content : bytes-like
    """
    partial = path.with_name(f"{path.name}{owner_mark()}.partial")
    try:
        with open(partial, "xb") as file:
            lock(file.fileno())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


# --- writers -------------------------------------------------------------------------------------


def owner_mark() -> str:
    """Part of a file name that identifies the writing process; each call returns a new one."""
    return f"~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"


def lock(descriptor: int) -> bool:
    """Lock a file that this process is writing.

    The kernel releases the lock when the process ends, for any reason. This call waits while
    another process tests the lock.

    Returns
    -------
    bool
        False if the file system has no such locks. Then only the time of the last write shows
        whether a writer is alive.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def _if_abandoned(path: Path) -> Iterator[bool]:
    """Whether no process is writing a file or directory; holds its lock while the caller decides.

    A file whose name has no mark has no writer in this package, so it counts as abandoned. A file
    with a mark is abandoned if its lock is free. In two cases a free lock proves nothing, and the
    last write must be old too: the file system has no locks, or the file is another host's.
    """
    match = _OWNED_NAME.fullmatch(path.name)
    if match is None:
        yield True
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False  # removed since, or not readable by this user
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock_proves_it = match["host"] == socket.gethostname()
        except BlockingIOError:
            yield False
            return
        except OSError:
            lock_proves_it = False
        yield lock_proves_it or _is_old(path)
    finally:
        os.close(descriptor)


def _is_old(path: Path) -> bool:
    try:
        # An ingest writes its arrays one level below its directory.
        last = max(entry.stat().st_mtime for entry in (path, *path.glob("*")))
    except FileNotFoundError:
        return False  # another process is changing it
    return time.time() - last > _ABANDONED_S


def is_abandoned(path: Path) -> bool:
    """Whether no process is writing a file or directory, as far as locks and times show."""
    with _if_abandoned(path) as abandoned:
        return abandoned


def remove_orphans(folder: Path, name: str) -> None:
    """Remove the directories that killed ingests of this name left in a folder."""
    pattern = f"{glob.escape(name)}~*"
    for unlocked in folder.glob(f"{pattern}.new"):
        with suppress(OSError):  # of a living ingest, which makes another
            unlocked.rmdir()
    for orphan in folder.glob(f"{pattern}.ingest"):
        with _if_abandoned(orphan) as abandoned:
            if abandoned:
                shutil.rmtree(orphan, ignore_errors=True)  # another run may be removing it too


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Sync every file and directory of a tree."""

    def paths() -> Iterator[Path]:
        for directory, _, files in os.walk(root):
            yield from (Path(directory, name) for name in files)
            yield Path(directory)

    for path in paths():
        sync(path)
