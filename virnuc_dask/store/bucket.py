"""A store in an object store: S3 and compatible servers, Google Cloud Storage, Azure.

Only this module uses obstore, and loads it on first use. Each process makes its own client from its
own environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …). Processes send each other only
the URL. No URL, store, event or error contains credentials.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.storage import ObjectStore

from virnuc_dask.errors import LocationError, NotAStoreError, StoreReplacedError, UsageError
from virnuc_dask.files import owner_mark, remove_orphans
from virnuc_dask.store.directory import ROOT, Directory, IsOurs, Staging

# Object with a digest of the content that is being uploaded; removed once the root exists.
CLAIM = "unfinished"
# Beginning of a claim while a store is being removed.
_REMOVAL = b"removal "
# About three seconds in all; `runtime.failures` handles longer failures.
_RETRIES = {
    "max_retries": 5,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}
_UPLOADS = 8
_HASHED_AT_ONCE = 2**20


class Bucket:
    """A location for a store: a prefix in a bucket of an object store.

    It has the same methods as `directory.Directory`. Keys are relative to the prefix. A PUT is
    atomic, and durable once the server answers. Each PUT is one request, so an interrupted one
    leaves nothing in the bucket.

    Parameters
    ----------
    path : str
        URL with scheme, bucket and prefix.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def address(self) -> str:
        """URL for other processes."""
        return self.path

    @property
    def for_xarray(self) -> ObjectArrays:
        """Argument for xarray to open the store."""
        return ObjectArrays(self.path, read_only=True)

    def hold(self) -> None:
        """Do nothing: a prefix cannot be held; `arrays` describes how a replacement is detected."""

    def holds(self, is_ours: IsOurs) -> bool:
        """Whether the opened store is still at this location; `is_ours` checks its root."""
        root = self.read(ROOT)
        return root is not None and is_ours(root)

    def arrays(self, is_ours: IsOurs | None = None) -> ObjectArrays:
        """Return Zarr's access to this location.

        Parameters
        ----------
        is_ours : callable, optional
            Whether the metadata of a root belong to the store that may be written to. Called right
            before each write.
        """
        return ObjectArrays(self.path, is_ours)

    def exists(self) -> bool:
        """Whether anything is at this location, except objects of an unfinished ingest."""
        return not self.is_free()

    def is_free(self) -> bool:
        """Whether a new store may be created: it is empty, or has an unfinished ingest."""
        return not any(self._keys("")) or self._is_unfinished()

    def _is_unfinished(self) -> bool:
        return self.size(CLAIM) is not None and self.size(ROOT) is None

    def has_array(self, name: str) -> bool:
        """Whether a finished store here has this array, healthy or damaged."""
        # A GET, not a HEAD: only the answer to a GET says why a server refuses.
        exists = self.read(f"{name}/{ROOT}") is not None or any(self._keys(f"{name}/"))
        return exists and not self._is_unfinished()

    def size(self, key: str) -> int | None:
        """Size of an object in bytes; None if there is no object."""
        obstore = _obstore()
        with _errors_of(self.path, key):
            try:
                return int(obstore.head(_client(self.path), key)["size"])
            except FileNotFoundError:
                return None

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """List a prefix: each name directly under it, with the size in bytes of an object, or None.

        Opens no object.
        """
        obstore = _obstore()
        with _errors_of(self.path):
            entries = obstore.list_with_delimiter(_client(self.path), folder or None)
        sizes: dict[str, int | None] = dict.fromkeys(entries["common_prefixes"])
        sizes |= {meta["path"]: meta["size"] for meta in entries["objects"]}
        return {path.rpartition("/")[2]: size for path, size in sizes.items()}

    def _keys(self, prefix: str) -> Iterator[str]:
        obstore = _obstore()
        with _errors_of(self.path):
            for batch in obstore.list(_client(self.path), prefix or None):
                yield from (meta["path"] for meta in batch)

    def remove(self, key: str) -> None:
        """Remove an object, or all objects under a prefix, if they exist."""
        obstore = _obstore()
        for each in (key, *self._keys(f"{key}/")):
            with _errors_of(self.path, each), suppress(FileNotFoundError):
                obstore.delete(_client(self.path), each)

    def is_abandoned(self, key: str) -> bool:
        """Return True: an object that is listed is completely written."""
        return True

    def in_use(self) -> AbstractContextManager[None]:
        """Do nothing: object stores have no locks that end with their process."""
        return nullcontext()

    @property
    def is_in_use(self) -> bool:
        """False: a run on an object store cannot be noticed."""
        return False

    def staging(self) -> Staging:
        """Create a staging directory on this machine's disk; remove those of dead ingests."""
        folder = Path(tempfile.gettempdir())
        remove_orphans(folder, "virnuc-dask")
        return Staging(folder, "virnuc-dask", mode=0o700)

    @contextmanager
    def emptied(self, is_ours: IsOurs | None) -> Iterator[None]:
        """Remove the store at this location, so that this block can publish another one.

        A run that is killed here leaves a mark, and the next one that calls this goes on. A run
        that finds the mark of another one stops; but nothing here can be locked, so start one.

        Parameters
        ----------
        is_ours : callable or None
            Whether the metadata of a root belong to the store that is to be removed. If another
            store is at the location, nothing is removed. None if there was no store.
        """
        is_replaced = is_ours is not None and self.holds(is_ours)
        claim = self.read(CLAIM) or b""
        if is_replaced or (claim.startswith(_REMOVAL) and self.size(ROOT) is None):
            self._remove_all(_REMOVAL + uuid4().hex.encode())
        yield

    def _remove_all(self, mark: bytes) -> None:
        obstore = _obstore()
        with _errors_of(self.path, CLAIM):
            obstore.put(_client(self.path), CLAIM, mark, use_multipart=False)
        self.remove(ROOT)  # first, so that no run writes into this store any more
        # Again, for what a run wrote meanwhile.
        while keys := [key for key in self._keys("") if key != CLAIM]:
            if self.read(CLAIM) != mark:
                raise NotAStoreError(f"{self.path}: another run replaces the store there, too")
            with _errors_of(self.path):
                obstore.delete(_client(self.path), keys)
        self.remove(CLAIM)

    def publish(self, staging: Path) -> bool:
        """Upload a finished store: first a claim, last the metadata of the root.

        The store exists once the root exists, so no rename is needed. Until then:

        - Nothing is overwritten or removed. Each object is created by a PUT on the condition that
          it does not exist; an existing object must be equal, byte for byte.
        - The claim is a digest of all objects except the root. So every run that passes the claim
          writes the same objects: a concurrent run, or the next run after one was killed. A run
          with another input or other settings is refused at the claim, before it writes anything.
        - The root is created in the same way. Concurrent runs differ only in `provenance`: one
          run creates the store, and the others find it. The claim is removed after the root is
          created, and a run that claims later checks for the root before it writes.

        If a server has no conditional PUTs (``AWS_CONDITIONAL_PUT=disabled``), a request checks
        that the object does not exist. Then two runs with different inputs could still mix their
        objects if they start in the same instant; `verify` finds that.

        Returns
        -------
        bool
            False if another run created the store first.

        Raises
        ------
        NotAStoreError
            An ingest with another input or other settings is unfinished at this location.
        """
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        keys = {file.relative_to(staging).as_posix(): file for file in files}
        root = keys.pop(ROOT)
        digest = _digest(keys).encode()
        claimed = self._create(CLAIM, digest)
        if not claimed and (self.read(CLAIM) or b"").startswith(_REMOVAL):
            raise NotAStoreError(
                f"{self.path}: a run with --overwrite was ended while it removed a store there;"
                " nothing was changed; such a run goes on"
            )
        if self.size(ROOT) is None and not (claimed and self._upload(keys)):
            raise NotAStoreError(
                f"{self.path}: an ingest of another input, or with other settings, is unfinished"
                " there; nothing was changed. If no run is writing there, remove its objects, or"
                " give another URL"
            )
        if self.read(CLAIM) != digest and self.size(ROOT) is None:
            raise NotAStoreError(f"{self.path}: another run has removed this upload")
        first = self._create(ROOT, root.read_bytes())
        self.remove(CLAIM)
        return first

    def _upload(self, files: dict[str, Path]) -> bool:
        with ThreadPoolExecutor(_UPLOADS) as pool:
            return all(pool.map(lambda key: self._create(key, files[key].read_bytes()), files))

    def _create(self, key: str, content: bytes) -> bool:
        """Create an object, or find an equal one; False if a different one exists."""
        # Read first, because some servers ignore the condition of a PUT.
        while (existing := self.read(key)) is None:
            if self._create_new(key, content):
                return True
        return existing == content

    def _create_new(self, key: str, content: bytes) -> bool:
        """Create an object; False if the name is taken."""
        obstore = _obstore()
        with _errors_of(self.path, key):
            try:
                obstore.put(_client(self.path), key, content, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
            except (obstore.exceptions.NotSupportedError, NotImplementedError):
                if self.size(key) is not None:
                    return False
                obstore.put(_client(self.path), key, content, use_multipart=False)
        return True

    def read(self, key: str) -> bytes | None:
        """Content of an object; None if there is none."""
        obstore = _obstore()
        with _errors_of(self.path, key):
            try:
                return bytes(obstore.get(_client(self.path), key).bytes())
            except FileNotFoundError:
                return None

    def probe(self) -> None:
        """Check access: write an object, read it and remove it, as `directory.Directory` does."""
        key, content = f"probe{owner_mark()}.partial", os.urandom(16)
        try:
            self._create_new(key, content)
            read_back = self.read(key)
            self.remove(key)
        except LocationError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            if read_back != content:
                raise LocationError(errno.EIO, "an object does not read as written", self.path)

    def explain(self, error: OSError) -> str:
        """Describe an error for people: location and cause."""
        if isinstance(error, LocationError):
            return str(error)
        # The error is of the staging directory, which is on this machine's disk.
        return f"{self.path}: {Directory(Path(tempfile.gettempdir())).explain(error)}"


class ObjectArrays(ObjectStore[Any]):
    """Zarr's object store, with the location in its errors and without credentials in its pickle.

    Parameters
    ----------
    path : str
    is_ours : callable, optional
        Called right before each write; whether the root still belongs to the same store. Another
        store may replace it between this check and the write, because a PUT cannot have a
        condition about another object.
    read_only : bool
    """

    def __init__(
        self, path: str, is_ours: IsOurs | None = None, *, read_only: bool = False
    ) -> None:
        super().__init__(_client(path), read_only=read_only)
        self.path, self._is_ours = path, is_ours

    def __reduce__(self) -> tuple[Any, ...]:
        # The upstream class pickles the client, with its secret. Only readers are ever pickled.
        return _reopen, (self.path, self.read_only)

    def __str__(self) -> str:
        return self.path

    def with_read_only(self, read_only: bool = False) -> ObjectArrays:
        """Return a store for the same location, read-only or writable."""
        return ObjectArrays(self.path, self._is_ours, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a key; None if it does not exist."""
        with _errors_of(self.path, key):
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether a key exists."""
        with _errors_of(self.path, key):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key in one request: an interrupted multipart upload would leave hidden parts."""
        self._check_writable()
        obstore = _obstore()
        is_in_place = Bucket(self.path).holds
        if self._is_ours and not await asyncio.to_thread(is_in_place, self._is_ours):
            raise StoreReplacedError(self.path)
        with _errors_of(self.path, key):
            await obstore.put_async(self.store, key, value.as_buffer_like(), use_multipart=False)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """List the names directly under a prefix."""
        with _errors_of(self.path):
            async for name in super().list_dir(prefix):
                yield name


def _reopen(path: str, read_only: bool) -> ObjectArrays:
    return ObjectArrays(path, read_only=read_only)


def _obstore() -> Any:
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UsageError(
            f"a store in an object store needs obstore ({error}): pip install obstore"
        ) from error
    return obstore


@lru_cache(maxsize=16)
def _client(path: str) -> Any:
    """The client of this process, with its connections and credentials."""
    obstore = _obstore()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if not re.match(r"https?://[^/\s]+|$", os.environ.get(name, "")):
            # obstore would panic. The message does not repeat the value: it may contain a secret.
            raise UsageError(f"{name} is not a URL such as https://host:9000")
    with _errors_of(path):
        return obstore.store.from_url(path, retry_config=_RETRIES)


def _digest(files: dict[str, Path]) -> str:
    """Digest of the names and contents of files."""
    digest = hashlib.sha256()
    for key in sorted(files):
        digest.update(f"{key}\0{files[key].stat().st_size}\0".encode())
        with open(files[key], "rb") as file:
            while part := file.read(_HASHED_AT_ONCE):
                digest.update(part)
    return digest.hexdigest()


# --- errors --------------------------------------------------------------------------------------

_STATUS = re.compile(r"status code: (\d{3})([^:\n]*)")
_CODE = re.compile(r"(?:<Code>|\(code: )(\w+)")
_MESSAGE = re.compile(r"<Message>([^<]*)")
_HOST = re.compile(r"https?://[^/\s?]+")
_REASON = re.compile(r'(?:message|error): "([^"]*)"')
# Metadata services, which obstore asks for credentials if the environment has none.
_METADATA = re.compile(r"169\.254\.\d+\.\d+|metadata\.google\.internal")
# Errors that waiting does not repair, with the errno that `runtime.failures` knows from disks.
_ERRNO = {
    "401": errno.EACCES,
    "403": errno.EACCES,
    "507": errno.ENOSPC,
    "AccessDenied": errno.EACCES,
    "ExpiredToken": errno.EACCES,
    "NoSuchBucket": errno.ENXIO,
}


@contextmanager
def _errors_of(path: str, key: str = "") -> Iterator[None]:
    """Turn obstore's errors into a `LocationError`, which `runtime.failures` understands."""
    exceptions = _obstore().exceptions
    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.NotSupportedError, FileNotFoundError):
        raise  # these are answers, which callers expect
    except (exceptions.BaseError, ValueError) as error:
        number, cause = _explained(str(error))
        # Not `from error`: for some servers its text contains a signed URL.
        raise LocationError(number, cause, f"{path}/{key}".rstrip("/")) from None


def _explained(text: str) -> tuple[int, str]:
    """Errno and one-line cause of obstore's message, which may have thirty lines."""
    text = re.sub(r"(https?://)[^/\s@]*@", r"\1", text)  # remove credentials of an endpoint
    status, code, host = _STATUS.search(text), _CODE.search(text), _HOST.search(text)
    numbers = [_ERRNO.get(match[1]) for match in (status, code) if match]
    number = next(filter(None, numbers), errno.EIO)
    if _METADATA.search(text):
        cause = "the environment has no credentials, such as AWS_ACCESS_KEY_ID"
    elif status:
        message = _MESSAGE.search(text)
        details = ": ".join(match[1] for match in (code, message) if match)
        cause = f"the server says {status[1]}{status[2]}" + f" ({details})" * bool(details)
    elif host is None or code:
        cause = re.sub(r"\?\S*", "", text.partition("\n")[0])
    elif "BadScheme" in text:
        cause = f"{host[0]} is not encrypted; set AWS_ALLOW_HTTP=true to permit that"
    else:
        reason = _REASON.search(text)
        kind = "timed out" if "kind: Timeout" in text else "the connection broke"
        cause = f"{host[0]} does not answer: {reason[1] if reason else kind}"
    return number, "".join(c if c.isprintable() else " " for c in cause)[:300].strip()
