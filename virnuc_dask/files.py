"""Files that survive SIGKILL and power cuts, marks of who writes them, and a store made of them."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from virnuc_dask.errors import StoreError

_OWNED_NAME = re.compile(r".+~(?P<host>[^~]+)~(?P<pid>\d+)~[0-9a-f]{32}\.(partial|ingest)")


class Directory:
    """A place for a store on a local or shared file system.

    Keys are paths below it, as Zarr's are: ``status/c.0``.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
        As the user named it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def location(self) -> str:
        """What other processes find it by."""
        return str(self.path.resolve())

    @property
    def for_xarray(self) -> Path:
        """What xarray opens."""
        return self.path

    def arrays(self) -> DurableStore:
        """What Zarr reads and writes."""
        return DurableStore(self.path)

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.path.exists()

    def is_free(self) -> bool:
        """Whether a new store may be put there: nothing is there, or an empty directory."""
        if self.path.exists() or self.path.is_symlink():
            return self.path.is_dir() and not any(self.path.iterdir())
        return True

    def has_array(self, name: str) -> bool:
        """Whether an array, healthy or damaged, is there."""
        return (self.path / name).is_dir()

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none."""
        file = self.path / key
        try:
            return file.stat().st_size if file.is_file() else None
        except FileNotFoundError:
            return None

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """Names in a folder, with the bytes of what is a file; one pass, and nothing is opened."""
        found: dict[str, int | None] = {}
        with os.scandir(self.path / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed since it was listed
                    found[entry.name] = entry.stat().st_size if entry.is_file() else None
        return found

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        file = self.path / key
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        sync(file.parent)

    def staging(self) -> Path:
        """Where to put a new store together: beside; what dead ingests left there is removed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(self.path.parent, f".{self.path.name}")
        return self.path.parent / f".{self.path.name}{owner_mark()}.ingest"

    def publish(self, staging: Path) -> bool:
        """Give a store that was put together its place, by one rename, durably.

        Returns
        -------
        bool
            False if something was there first.
        """
        sync_tree(staging)
        try:
            os.rename(staging, self.path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise StoreError(f"{self.path}: cannot put the store there: {error}") from error
        sync(self.path.parent)
        return True

    def probe(self) -> None:
        """Write a file, read it and remove it.

        A full disk will do: whether there is room is another question, and another time it may
        have another answer.

        Raises
        ------
        OSError
            What does not work.
        """
        file = self.path / f"probe{owner_mark()}.partial"
        content = os.urandom(16)
        try:
            try:
                file.write_bytes(content)
                if file.read_bytes() != content:
                    raise OSError(errno.EIO, "what is written is not what is read", str(self.path))
            finally:
                file.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def explain(self, error: OSError) -> str:
        """Cause, path and free space, for whoever has to make room."""
        cause = os.strerror(error.errno) if error.errno else str(error)
        file = f" ({error.filename})" if error.filename else ""
        there = self.path if self.path.exists() else self.path.parent
        try:
            free = f"{shutil.disk_usage(there).free / 1e6:,.1f} MB are free"
        except OSError as gone:
            free = f"its file system does not answer: {gone.strerror}"
        return f"{self.path}: {cause}{file}; {free}"


class DurableStore(LocalStore):
    """Zarr's local store, made durable: what has its final name survives a power cut.

    The upstream class renames without fsync, after which a crash leaves names with empty files.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key: temporary file, fsync, rename, fsync of the directory."""
        self._check_writable()
        await asyncio.to_thread(write_durably, self.root / key, value.as_buffer_like())

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, for Zarr's synchronous path."""
        self._check_writable()
        write_durably(self.root / key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)


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


def remove_orphans(folder: Path, name: str) -> None:
    """Remove what ingests of this name left in a folder when they were killed."""
    for orphan in folder.glob(f"{_glob_escape(name)}~*.ingest"):
        if not may_have_a_living_owner(orphan.name):
            shutil.rmtree(orphan, ignore_errors=True)  # another run may be removing it too


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


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
