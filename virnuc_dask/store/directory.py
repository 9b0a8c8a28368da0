"""A store in a local directory. A file with its final name survives SIGKILL and power cuts."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.storage import LocalStore

from virnuc_dask.errors import StoreError, StoreInUseError, StoreReplacedError, UsageError
from virnuc_dask.files import (
    is_abandoned,
    lock,
    owner_mark,
    remove_orphans,
    sync,
    sync_tree,
    write_durably,
)

# Longest name, in bytes, that becomes part of a longer one. A file name may have 255 bytes.
_LONGEST_NAME = 100
# Errors of a rename to a name that is taken.
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
ROOT = "zarr.json"
# Whether the current metadata of a root belong to the store that was opened.
IsOurs = Callable[[bytes], bool]


# How often, and how far apart, a lock is tried before a store counts as in use.
_LOOKS, _BETWEEN_LOOKS_S = 4, 0.02


class Held:
    """A directory held by a descriptor, so that it stays the same even if it is renamed.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
        Name of the directory.
    descriptor : int
    root : Path
        Path by which files are opened. It follows the directory if it is moved, and leads nowhere
        if it is removed. Without /proc it is the name.
    is_sure : bool
        False without /proc: then `root` may lead to another directory of the same name.
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
        """Whether the name still leads to this directory."""
        return self._is_at(self.path)

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def rename(self, path: Path) -> None:
        """Rename the directory."""
        self.path.rename(path)
        self.path = path
        if not self.is_sure:
            self.root = path

    def close(self) -> None:
        """Close the descriptor."""
        self._close()

    @contextmanager
    def names(self) -> Iterator[None]:
        """Make errors contain the user's name of a file, not the path by the descriptor."""
        try:
            yield
        except OSError as error:
            for name in ("filename", "filename2"):
                if file := getattr(error, name):
                    setattr(error, name, str(file).replace(str(self.root), str(self.path), 1))
            raise


class Directory:
    """A location for a store on a local or shared file system.

    Keys are relative paths, as in Zarr: ``status/c.0``.

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
        """Keep to the directory that has this name now, even if another takes the name later.

        Raises
        ------
        OSError
            There is no directory.
        """
        self._held = Held(self.path)
        self._location = os.path.realpath(self.path)

    @property
    def address(self) -> str:
        """Absolute path for other processes, with links resolved when `hold` was called."""
        return self._location or os.path.realpath(self.path)

    def holds(self, is_ours: IsOurs) -> bool:
        """Whether the opened store is still at this location; `is_ours` is for object stores."""
        return self._held is not None and self._held.is_in_place

    @property
    def _root(self) -> Path:
        return self._held.root if self._held else self.path

    @property
    def for_xarray(self) -> Path:
        """Argument for xarray to open the store."""
        return self.path

    def arrays(self, is_ours: IsOurs | None = None) -> DurableStore:
        """Return Zarr's access to this location.

        Parameters
        ----------
        is_ours : callable, optional
            Whether the metadata of a root belong to the store that may be written to. Called
            before each write if the directory cannot be held reliably.
        """
        held = self._held or Held(self.path)
        return DurableStore(held, None if held.is_sure else is_ours)

    def exists(self) -> bool:
        """Whether anything is at this location."""
        return self.path.exists()

    def is_free(self) -> bool:
        """Whether a new store may be created: the location is unused, or an empty directory.

        Links are followed, also a link to a path that does not exist yet.
        """
        target = Path(self.address)
        if os.path.lexists(target):
            return target.is_dir() and not any(target.iterdir())
        return True

    def has_array(self, name: str) -> bool:
        """Whether the location has this array, healthy or damaged."""
        return (self._root / name).is_dir()

    def size(self, key: str) -> int | None:
        """Size of a file in bytes; None if there is no file."""
        file = self._root / key
        with self._names():
            try:
                return file.stat().st_size if file.is_file() else None
            except FileNotFoundError:
                return None

    def read(self, key: str) -> bytes | None:
        """Content of a file; None if there is no file."""
        with self._names():
            try:
                return (self._root / key).read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """List a folder: each name, with the size in bytes of a file, or None. Opens no file."""
        sizes: dict[str, int | None] = {}
        with self._names(), os.scandir(self._root / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed after it was listed
                    sizes[entry.name] = entry.stat().st_size if entry.is_file() else None
        return sizes

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with its contents, if it exists."""
        file = self._root / key
        with self._names():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
            sync(file.parent)

    def is_abandoned(self, key: str) -> bool:
        """Whether no process is writing a file; see `files.is_abandoned`."""
        return is_abandoned(self._root / key)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold a shared lock while a run fills this store. It informs people; nothing needs it."""
        descriptor = self._open_root()
        try:
            with suppress(OSError):  # a file system without such locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    @property
    def is_in_use(self) -> bool:
        """Whether a run holds the lock. A run on another machine may go unnoticed."""
        with self._if_unused() as is_unused:
            return not is_unused

    @contextmanager
    def _if_unused(self) -> Iterator[bool]:
        """Whether no run holds the lock; meanwhile no run gets it."""
        descriptor = self._open_root()
        try:
            is_unused = False
            for _ in range(_LOOKS):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(_BETWEEN_LOOKS_S)  # perhaps only another process that looks
                    continue
                except OSError:  # a file system without such locks
                    pass
                is_unused = True
                break
            yield is_unused
        finally:
            os.close(descriptor)

    @contextmanager
    def emptied(self, is_ours: IsOurs | None) -> Iterator[None]:
        """Remove the store that `hold` holds, so that this block can publish another one.

        The store is renamed, and its files are removed after the block. After an error it gets its
        name back. If it is no longer at its location, nothing is removed.

        Parameters
        ----------
        is_ours : callable or None
            None if there was no store.

        Raises
        ------
        StoreInUseError
        """
        held = self._held
        if is_ours is None or held is None or not self.holds(is_ours):
            yield
            return
        with self._if_unused() as is_unused:
            if not self.holds(is_ours):  # another run has replaced it meanwhile
                yield
                return
            if not is_unused:
                raise StoreInUseError(str(self.path))
            # It is locked, so no ingest takes it for one that was killed, as long as this lives.
            lock(held.descriptor)
            with suppress(OSError):  # not the owner
                os.utime(held.root)  # where locks are not seen, nothing is taken that is so young
            target = Path(self.address)
            aside = target.with_name(f"{_hidden(target)}{owner_mark()}.ingest")
            try:
                os.rename(target, aside)
                yield
            except BaseException:
                with suppress(OSError):
                    os.rename(aside, target)
                raise
            finally:
                with suppress(OSError):  # a file system without such locks
                    fcntl.flock(held.descriptor, fcntl.LOCK_UN)
        shutil.rmtree(aside, ignore_errors=True)

    def _open_root(self) -> int:
        root = self._root / ROOT
        with self._names():
            try:
                # NFS gives an exclusive lock only on a file that is open for writing.
                return os.open(root, os.O_RDWR)
            except OSError:
                return os.open(root, os.O_RDONLY)

    def _names(self) -> AbstractContextManager[None]:
        return self._held.names() if self._held else nullcontext()

    def staging(self) -> Staging:
        """Create a staging directory beside the store; remove those of dead ingests.

        Raises
        ------
        UsageError
            No store can be created at this path, whatever the input.
        """
        target = Path(self.address)
        advice = ""
        try:
            if target.is_dir():
                advice = f"; name a directory within it, such as {self.path / 'out.zarr'}"
                if target.samefile(Path()):
                    raise UsageError(f"{self.path}: this is the working directory{advice}")
                if self.is_free():
                    _check_rename(target)
                elif os.path.ismount(target):
                    raise UsageError(f"{self.path}: a mount point cannot be replaced{advice}")
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_orphans(target.parent, _hidden(target))
            return Staging(target.parent, _hidden(target))
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            cause = os.strerror(errno.ENOTDIR if error.errno == errno.EEXIST else error.errno)
            raise UsageError(f"{self.path}: cannot create a store: {cause}{advice}") from error

    def publish(self, staging: Path) -> bool:
        """Move a finished store from its staging directory, durably, by one rename.

        Returns
        -------
        bool
            False if something else is already there.
        """
        target = Path(self.address)
        sync_tree(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise StoreError(f"{self.path}: cannot create the store: {error}") from error
        sync(target.parent)
        return True

    def probe(self) -> None:
        """Check access: write a file, read it and remove it.

        A full disk is no error here, because there may be space later.

        Raises
        ------
        OSError
            A file cannot be written, read or removed.
        """
        file = self._root / f"probe{owner_mark()}.partial"
        content = os.urandom(16)
        try:
            try:
                file.write_bytes(content)
                if file.read_bytes() != content:
                    raise OSError(errno.EIO, "a file does not read as written", str(self.path))
            finally:
                file.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def explain(self, error: OSError) -> str:
        """Describe an error for people: path, cause and free space."""
        cause = os.strerror(error.errno) if error.errno else str(error)
        file = f" ({error.filename})" if error.filename else ""
        existing = self.path if self.path.exists() else self.path.parent
        try:
            free = f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are free"
        except OSError as problem:
            free = f"its file system does not answer: {problem.strerror}"
        return f"{self.path}: {cause}{file}; {free}"


class DurableStore(LocalStore):
    """Zarr's local store with durable writes: a file with its final name survives a power cut.

    The upstream class renames without fsync, so a crash may leave empty files.

    Parameters
    ----------
    held : Held
        The directory.
    is_ours : callable, optional
        Called before each write; whether the directory is still the same store.
    read_only : bool
    """

    def __init__(
        self, held: Held, is_ours: IsOurs | None = None, *, read_only: bool = False
    ) -> None:
        super().__init__(held.root, read_only=read_only)
        self._held, self._is_ours = held, is_ours

    def with_read_only(self, read_only: bool = False) -> DurableStore:
        """Return a store for the same directory, read-only or writable."""
        return DurableStore(self._held, self._is_ours, read_only=read_only)

    def __str__(self) -> str:
        return self._held.path.as_posix()

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a key; None if it does not exist."""
        with self._held.names():
            return await super().get(key, prototype, byte_range)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Like `get`, for Zarr's synchronous path."""
        with self._held.names():
            return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key: temporary file, fsync, rename, then fsync of the directory."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Like `set`, for Zarr's synchronous path."""
        if self.read_only:
            raise ValueError(f"{self}: opened to be read only")
        with self._held.names():
            if self._is_ours and not self._is_ours((self.root / ROOT).read_bytes()):
                raise StoreReplacedError(str(self._held.path))
            file = self.root / key
            if file.name == ROOT and not file.parent.exists():  # a new array's metadata
                file.parent.mkdir(exist_ok=True)
                sync(self.root)
            write_durably(file, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key unless it exists."""
        if not await self.exists(key):
            await self.set(key, value)


class Staging:
    """A new directory in which a store is built; it is locked until `close`.

    Parameters
    ----------
    folder : Path
        Parent directory.
    name : str
        Beginning of its name.
    mode : int
        Permissions of the directory.

    Attributes
    ----------
    path : Path
    held : Held
    """

    def __init__(self, folder: Path, name: str, mode: int = 0o777) -> None:
        # It gets its final name after it is locked. Otherwise it would look abandoned. Until then
        # it is empty, and another ingest may remove it.
        while True:
            new = folder / f"{name}{owner_mark()}.new"
            new.mkdir(mode)
            self.path = new.with_suffix(".ingest")
            with suppress(FileNotFoundError):
                self.held = Held(new)
                lock(self.held.descriptor)
                self.held.rename(self.path)
                return

    def close(self) -> None:
        """Remove the directory, unless it was published, and unlock it."""
        if self.held.is_in_place:
            # An error here would hide the error of the ingest; the next ingest removes the rest.
            shutil.rmtree(self.path, ignore_errors=True)
        self.held.close()


def _hidden(target: Path) -> str:
    """Beginning of the hidden names of files beside a store."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}"


# Errors that mean that no store can be created at a path, whatever the input.
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


def _check_rename(folder: Path) -> None:
    """Check that an empty directory can be renamed; a mount point cannot."""
    aside = folder.with_name(f"{_hidden(folder)}{owner_mark()}.aside")
    os.rename(folder, aside)
    try:
        os.rename(aside, folder)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        aside.rmdir()  # another run's store has taken the name
