"""Files that survive SIGKILL and power cuts, and the marks of who is writing them."""

from __future__ import annotations

import errno
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OWNED_NAME = re.compile(r".+~(?P<host>[^~]+)~(?P<pid>\d+)~[0-9a-f]{32}\.(partial|ingest)")


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
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def probe(folder: Path) -> str | None:
    """Write a file into a folder, read it and remove it.

    Returns
    -------
    str, optional
        What does not work, naming the folder. A full disk works: whether there is room is
        another question, and another time it may have another answer.
    """
    file = folder / f"probe{owner_mark()}.partial"
    content = os.urandom(16)
    try:
        try:
            file.write_bytes(content)
            if file.read_bytes() != content:
                return f"{folder}: what is written is not what is read"
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        return f"{folder}: cannot be written and read: {error.strerror}"
    return None


def owner_mark() -> str:
    """Part of a name that says which process is writing, and is never the same twice."""
    return f"~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"


def may_have_a_living_owner(name: str) -> bool:
    """Whether a file or directory may be written right now, by its name's mark.

    A name without a mark has no writer of ours. A writer on another host may be alive for all
    that can be known here.
    """
    match = _OWNED_NAME.fullmatch(name)
    if match is None:
        return False
    if match["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
