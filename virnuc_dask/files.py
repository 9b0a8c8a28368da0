"""Files that survive SIGKILL and power cuts, marks of who writes them, and a store made of them."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from virnuc_dask.errors import UsageError

# The process that writes, for people to read: across containers it proves nothing.
_OWNED_NAME = re.compile(r".+~(?P<host>[^~]+)~\d+~[0-9a-f]{32}\.(?P<kind>partial|ingest|new)")
# Without a lock that proves it, a writer counts as dead once it has written nothing for so long.
_ABANDONED_S = 24 * 3600.0


def expanded(path: str | Path) -> str:
    """A path, with the home directory that ``~`` or ``~user`` at its beginning stands for.

    Raises
    ------
    UsageError
        The user has no home directory.
    """
    found = os.path.expanduser(path)  # noqa: PTH111  # pathlib refuses a name that just looks so
    if found == str(path) and found.partition("/")[0] == "~":
        raise UsageError(f"{path}: there is no home directory; set HOME, or write the whole path")
    return found


def write_durably(path: Path, content: Any) -> None:
    """Replace a file in one step that survives SIGKILL and power cuts.

    Parameters
    ----------
    path : Path
        In a directory that exists.
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


# --- who writes ----------------------------------------------------------------------------------


def owner_mark() -> str:
    """Part of a name that says which process is writing, and is never the same twice."""
    return f"~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"


def lock(descriptor: int) -> bool:
    """Say by a lock that somebody writes: the kernel drops it when the process ends, however.

    Waits for whoever looks at it at this moment.

    Returns
    -------
    bool
        False if the file system has no such locks; then only time tells.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def _if_abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody is writing a file or directory; nobody else judges it in the meantime.

    A name without a mark has no writer of ours. Of others the lock tells; and time, where there are
    no locks, where they may not reach from one machine to another, or before there is one.
    """
    match = _OWNED_NAME.fullmatch(path.name)
    if match is None:
        yield True
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False  # gone by now, or not ours to judge
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tells = match["host"] == socket.gethostname() and match["kind"] != "new"
        except BlockingIOError:
            yield False
            return
        except OSError:
            tells = False
        yield tells or _is_old(path)
    finally:
        os.close(descriptor)


def _is_old(path: Path) -> bool:
    try:
        # The folders of an ingest's arrays are one level below it.
        last = max(entry.stat().st_mtime for entry in (path, *path.glob("*")))
    except FileNotFoundError:
        return False  # somebody is at it
    return time.time() - last > _ABANDONED_S


def is_abandoned(path: Path) -> bool:
    """Whether nobody is writing a file or directory, for all that can be known."""
    with _if_abandoned(path) as abandoned:
        return abandoned


def remove_orphans(folder: Path, name: str) -> None:
    """Remove what ingests of this name left in a folder when they were killed."""
    pattern = f"{glob.escape(name)}~*"
    for orphan in (*folder.glob(f"{pattern}.ingest"), *folder.glob(f"{pattern}.new")):
        with _if_abandoned(orphan) as abandoned:
            if abandoned:
                shutil.rmtree(orphan, ignore_errors=True)  # another run may be removing it too


def sync(path: Path) -> None:
    """Have the system put a file's content, or a directory's names, on the disk."""
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
