"""A store in a local directory: what has its final name survives SIGKILL and power cuts."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from virnuc_dask.errors import StoreError, StoreReplacedError, UsageError
from virnuc_dask.files import (
    is_abandoned,
    lock,
    owner_mark,
    remove_orphans,
    sync,
    sync_tree,
    write_durably,
)

# Of a name that is put into a longer one: a file's name may have 255 bytes.
_LONGEST_NAME = 100
# Of a rename, if something is there.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
ROOT = "zarr.json"
# Whether the metadata of a root, as they are now, are those of the store that was opened.
IsOurs = Callable[[bytes], bool]


class Held:
    """A directory that is held by a descriptor: the same one, whatever becomes of its name.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
        As it was named.
    root : Path
        What leads to it also after it was moved, and nowhere once it was removed. Without /proc
        that is the name; `is_sure` is False then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        by_descriptor = Path(f"/proc/self/fd/{self.descriptor}")
        self.is_sure = self._is_at(by_descriptor)
        self.root = by_descriptor if self.is_sure else path

    @property
    def is_in_place(self) -> bool:
        """Whether its name still leads to it."""
        return self._is_at(self.path)

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def rename(self, path: Path) -> None:
        """Give it another name."""
        self.path.rename(path)
        self.path = path
        if not self.is_sure:
            self.root = path

    def close(self) -> None:
        """Let go of it."""
        self._close()

    @contextmanager
    def names(self) -> Iterator[None]:
        """Have errors name files as the user does."""
        try:
            yield
        except OSError as error:
            for name in ("filename", "filename2"):
                if file := getattr(error, name):
                    setattr(error, name, str(file).replace(str(self.root), str(self.path), 1))
            raise


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
        self._held: Held | None = None
        self._location: str | None = None

    def hold(self) -> None:
        """From now on be this directory, even if another takes its name.

        Raises
        ------
        OSError
            There is no directory.
        """
        self._held = Held(self.path)
        self._location = os.path.realpath(self.path)

    @property
    def address(self) -> str:
        """What other processes find it by; where links led when it was held."""
        return self._location or os.path.realpath(self.path)

    def holds(self, is_ours: IsOurs) -> bool:
        """Whether the store that was opened is still there; `is_ours` knows its root's metadata."""
        return self._held is not None and self._held.is_in_place

    @property
    def _root(self) -> Path:
        return self._held.root if self._held else self.path

    @property
    def for_xarray(self) -> Path:
        """What xarray opens."""
        return self.path

    def arrays(self, is_ours: IsOurs | None = None) -> DurableStore:
        """What Zarr reads and writes.

        Parameters
        ----------
        is_ours : callable, optional
            Whether the metadata of a root are those of the store that may be written to. Asked
            before each write where the directory cannot be held for certain.
        """
        held = self._held or Held(self.path)
        return DurableStore(held, None if held.is_sure else is_ours)

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.path.exists()

    def is_free(self) -> bool:
        """Whether a new store may be put there: nothing is there, or an empty directory.

        A link is followed, also one that leads to nothing yet.
        """
        target = Path(self.address)
        if os.path.lexists(target):
            return target.is_dir() and not any(target.iterdir())
        return True

    def has_array(self, name: str) -> bool:
        """Whether an array, healthy or damaged, is there."""
        return (self._root / name).is_dir()

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none."""
        file = self._root / key
        with self._names():
            try:
                return file.stat().st_size if file.is_file() else None
            except FileNotFoundError:
                return None

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """Names in a folder, with the bytes of what is a file; one pass, and nothing is opened."""
        found: dict[str, int | None] = {}
        with self._names(), os.scandir(self._root / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed since it was listed
                    found[entry.name] = entry.stat().st_size if entry.is_file() else None
        return found

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        file = self._root / key
        with self._names():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
            sync(file.parent)

    def is_abandoned(self, key: str) -> bool:
        """Whether nobody is writing a file; see `is_abandoned`."""
        return is_abandoned(self._root / key)

    def _names(self) -> AbstractContextManager[None]:
        return self._held.names() if self._held else nullcontext()

    def staging(self) -> Staging:
        """Where to put a new store together: beside; what dead ingests left there is removed.

        Raises
        ------
        UsageError
            No store can be put at this path, whatever is read.
        """
        target = Path(self.address)
        advice = ""
        try:
            if target.is_dir():
                advice = f"; name a directory within it, such as {self.path / 'out.zarr'}"
                if target.samefile(Path()):
                    raise UsageError(f"{self.path}: this is the working directory{advice}")
                _move_there_and_back(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_orphans(target.parent, _hidden(target))
            return Staging(target.parent, _hidden(target))
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            cause = os.strerror(errno.ENOTDIR if error.errno == errno.EEXIST else error.errno)
            raise UsageError(f"{self.path}: cannot put a store there: {cause}{advice}") from error

    def publish(self, staging: Path) -> bool:
        """Give a store that was put together its place, by one rename, durably.

        Returns
        -------
        bool
            False if something was there first.
        """
        target = Path(self.address)
        sync_tree(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise StoreError(f"{self.path}: cannot put the store there: {error}") from error
        sync(target.parent)
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
        file = self._root / f"probe{owner_mark()}.partial"
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

    Parameters
    ----------
    held : Held
        The directory.
    is_ours : callable, optional
        Asked before each write whether the directory is still the same store.
    read_only : bool
    """

    def __init__(
        self, held: Held, is_ours: IsOurs | None = None, *, read_only: bool = False
    ) -> None:
        super().__init__(held.root, read_only=read_only)
        self._held, self._is_ours = held, is_ours

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """The same directory, to be read or to be written."""
        return DurableStore(self._held, self._is_ours, read_only=read_only)

    def __str__(self) -> str:
        return self._held.path.as_posix()

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a key; None if there is none."""
        with self._held.names():
            return await super().get(key, prototype, byte_range)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As `get`, for Zarr's synchronous path."""
        with self._held.names():
            return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key: temporary file, fsync, rename, fsync of the directory."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, for Zarr's synchronous path."""
        self._check_writable()
        with self._held.names():
            if self._is_ours and not self._is_ours((self.root / ROOT).read_bytes()):
                raise StoreReplacedError(str(self._held.path))
            file = self.root / key
            if file.name == ROOT and not file.parent.exists():  # a new array's metadata
                file.parent.mkdir(exist_ok=True)
                sync(self.root)
            write_durably(file, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)


class Staging:
    """A new directory in which a store is put together, locked until it is closed.

    Parameters
    ----------
    folder : Path
        Where it is made.
    name : str
        How its name begins.
    mode : int

    Attributes
    ----------
    path : Path
    held : Held
    """

    def __init__(self, folder: Path, name: str, mode: int = 0o777) -> None:
        # It has its name only once it is locked, or it could be taken for a dead one's.
        new = folder / f"{name}{owner_mark()}.new"
        new.mkdir(mode)
        self.held = Held(new)
        lock(self.held.descriptor)
        self.path = new.with_suffix(".ingest")
        self.held.rename(self.path)

    def close(self) -> None:
        """Remove it, unless it was published, and unlock it."""
        if self.held.is_in_place:
            # An error here would hide the one that ended the ingest; the next ingest removes it.
            shutil.rmtree(self.path, ignore_errors=True)
        self.held.close()


def _hidden(target: Path) -> str:
    """How names of what is made beside a store begin."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}"


# Why no store can be put somewhere, whatever is read.
_NOT_HERE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.EXDEV,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def _move_there_and_back(folder: Path) -> None:
    """See whether an empty directory can be renamed, as a mount point cannot."""
    aside = folder.with_name(f"{_hidden(folder)}{owner_mark()}.aside")
    os.rename(folder, aside)
    try:
        os.rename(aside, folder)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        aside.rmdir()  # another run's store is there by now
