"""A store in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

Nothing else knows obstore, which is loaded when it is first needed. Every process makes its own
client from its own environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, …); what goes from one
process to another is the URL. No credential is in a URL, a store, an event or an error.
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
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from virnuc_dask.errors import LocationError, NotAStoreError, StoreReplacedError, UsageError
from virnuc_dask.files import owner_mark, remove_orphans
from virnuc_dask.store.directory import ROOT, Directory, IsOurs, Staging

# Says which content a place is being filled with; gone once the root is there.
CLAIM = "unfinished"
# Three seconds or so in all; `runtime.failures` waits for what takes longer.
_RETRIES = {
    "max_retries": 5,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}
_UPLOADS = 8
_HASHED_AT_ONCE = 2**20


class Bucket:
    """A place for a store under a prefix of an object store's bucket.

    Has what `files.Directory` has. Keys are relative to the prefix. A PUT is atomic, and durable
    when it is answered; each is one request, so that nothing is left in the bucket of one that is
    cut off.

    Parameters
    ----------
    path : str
        A URL of scheme, bucket and prefix.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def address(self) -> str:
        """What other processes find it by."""
        return self.path

    @property
    def for_xarray(self) -> ObjectArrays:
        """What xarray opens."""
        return ObjectArrays(self.path, read_only=True)

    def hold(self) -> None:
        """Nothing that can be held; `arrays` says how another store is recognised."""

    def holds(self, is_ours: IsOurs) -> bool:
        """Whether the store that was opened is still there; `is_ours` knows its root's metadata."""
        root = self._read(ROOT)
        return root is not None and is_ours(root)

    def arrays(self, is_ours: IsOurs | None = None) -> ObjectArrays:
        """What Zarr reads and writes.

        Parameters
        ----------
        is_ours : callable, optional
            Whether the metadata of a root are those of the store that may be written to. Asked
            right before each write.
        """
        return ObjectArrays(self.path, is_ours)

    def exists(self) -> bool:
        """Whether anything is there, other than what a killed ingest left."""
        return not self.is_free()

    def is_free(self) -> bool:
        """Whether a new store may be put there: nothing is there, or a beginning without an end."""
        return not any(self._keys("")) or self._is_unfinished()

    def _is_unfinished(self) -> bool:
        return self.size(CLAIM) is not None and self.size(ROOT) is None

    def has_array(self, name: str) -> bool:
        """Whether an array, healthy or damaged, is there, and not of an ingest without its end."""
        # Read, and not only looked at: a server says why it refuses, but not when asked for a head.
        there = self._read(f"{name}/{ROOT}") is not None or any(self._keys(f"{name}/"))
        return there and not self._is_unfinished()

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        obstore = _obstore()
        with _errors_of(self.path, key):
            try:
                return int(obstore.head(_client(self.path), key)["size"])
            except FileNotFoundError:
                return None

    def listing(self, folder: str = "") -> dict[str, int | None]:
        """Names right under a prefix, with the bytes of what is an object; nothing is opened."""
        obstore = _obstore()
        with _errors_of(self.path):
            found = obstore.list_with_delimiter(_client(self.path), folder or None)
        sizes: dict[str, int | None] = dict.fromkeys(found["common_prefixes"])
        sizes |= {meta["path"]: meta["size"] for meta in found["objects"]}
        return {path.rpartition("/")[2]: size for path, size in sizes.items()}

    def _keys(self, prefix: str) -> Iterator[str]:
        obstore = _obstore()
        with _errors_of(self.path):
            for batch in obstore.list(_client(self.path), prefix or None):
                yield from (meta["path"] for meta in batch)

    def remove(self, key: str) -> None:
        """Remove an object, or all that is under a prefix, if it is there."""
        obstore = _obstore()
        for each in (key, *self._keys(f"{key}/")):
            with _errors_of(self.path, each), suppress(FileNotFoundError):
                obstore.delete(_client(self.path), each)

    def is_abandoned(self, key: str) -> bool:
        """Whether nobody is writing an object: whatever is listed is written."""
        return True

    def staging(self) -> Staging:
        """Where to put a new store together: on this machine; what dead ingests left is removed."""
        folder = Path(tempfile.gettempdir())
        remove_orphans(folder, "virnuc-dask")
        return Staging(folder, "virnuc-dask", mode=0o700)

    def publish(self, staging: Path) -> bool:
        """Upload a store that was put together: a claim first, its root's metadata last.

        There is a store once the root is there, which needs no rename. Until then:

        - Nothing is ever overwritten or removed. Objects are created, on the condition that there
          is none of the name; one that is there must be equal, byte for byte.
        - The claim is a digest of all that will be written, bar the root. So whoever goes on
          writes the same, be it a run that started together with this one, or the next after one
          that was killed. Whoever would write something else, for another input or other settings,
          is refused at the claim, before it has written anything.
        - The root is created as well; of several runs, which differ only in what `provenance` says,
          one makes the store and the others find it. The claim goes after the root has come, and
          whoever claims later looks for the root before it writes.

        A server without conditional PUTs (``AWS_CONDITIONAL_PUT=disabled``) is asked whether an
        object is there instead. Then only two runs that begin in the same instant, with different
        inputs, could still be mixed; `verify` would find that.

        Returns
        -------
        bool
            False if something was there first.

        Raises
        ------
        NotAStoreError
            Something else has begun there.
        """
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        keys = {file.relative_to(staging).as_posix(): file for file in files}
        root = keys.pop(ROOT)
        claimed = self._create(CLAIM, _digest(keys).encode())
        if self.size(ROOT) is None and not (claimed and self._upload(keys)):
            raise NotAStoreError(
                f"{self.path}: an ingest of another input, or with other settings, began there and"
                " has not ended; nothing was changed. If no run is at it, choose another URL, or"
                " remove what is there"
            )
        first = self._create(ROOT, root.read_bytes())
        self.remove(CLAIM)
        return first

    def _upload(self, files: dict[str, Path]) -> bool:
        with ThreadPoolExecutor(_UPLOADS) as pool:
            return all(pool.map(lambda key: self._create(key, files[key].read_bytes()), files))

    def _create(self, key: str, content: bytes) -> bool:
        """Create an object, unless it is there; False if another is."""
        # Looked at before, for servers that take no notice of the condition.
        while (there := self._read(key)) is None:
            if self._create_new(key, content):
                return True
        return there == content

    def _create_new(self, key: str, content: bytes) -> bool:
        """Create an object; False if one of the name is there."""
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

    def _read(self, key: str) -> bytes | None:
        obstore = _obstore()
        with _errors_of(self.path, key):
            try:
                return bytes(obstore.get(_client(self.path), key).bytes())
            except FileNotFoundError:
                return None

    def probe(self) -> None:
        """Write an object, read it and remove it, as `files.Directory` does."""
        key, content = f"probe{owner_mark()}.partial", os.urandom(16)
        try:
            self._create_new(key, content)
            found = self._read(key)
            self.remove(key)
        except LocationError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            if found != content:
                raise LocationError(errno.EIO, "what is written is not what is read", self.path)

    def explain(self, error: OSError) -> str:
        """Cause and place, for whoever has to see to it."""
        if isinstance(error, LocationError):
            return str(error)
        # A new store is put together on this machine's disk.
        return f"{self.path}: {Directory(Path(tempfile.gettempdir())).explain(error)}"


class ObjectArrays(ObjectStore[Any]):
    """Zarr's object store, which names the place in its errors and takes no credential along.

    Parameters
    ----------
    path : str
    is_ours : callable, optional
        Asked right before each write whether the root is still that of the same store. Another may
        take its place between the answer and the write, for there is no PUT on a condition that is
        about another object.
    read_only : bool
    """

    def __init__(
        self, path: str, is_ours: IsOurs | None = None, *, read_only: bool = False
    ) -> None:
        super().__init__(_client(path), read_only=read_only)
        self.path, self._is_ours = path, is_ours

    def __reduce__(self) -> tuple[Any, ...]:
        # The upstream class pickles the client, and with it the secret. Only readers are sent.
        return _reopen, (self.path, self.read_only)

    def __str__(self) -> str:
        return self.path

    def with_read_only(self, read_only: bool = False) -> ObjectArrays:
        """The same place, to be read or to be written."""
        return ObjectArrays(self.path, self._is_ours, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a key; None if there is none."""
        with _errors_of(self.path, key):
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether a key is there."""
        with _errors_of(self.path, key):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key, in one request: parts of an upload that is cut off would stay, unseen."""
        self._check_writable()
        obstore = _obstore()
        is_there = Bucket(self.path).holds
        if self._is_ours and not await asyncio.to_thread(is_there, self._is_ours):
            raise StoreReplacedError(self.path)
        with _errors_of(self.path, key):
            await obstore.put_async(self.store, key, value.as_buffer_like(), use_multipart=False)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Names right under a prefix."""
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
            f"stores in object stores need obstore ({error}): pip install 'virnuc_dask[s3]'"
        ) from error
    return obstore


@lru_cache(maxsize=16)
def _client(path: str) -> Any:
    """The process's client: its connections, and what it was given to identify itself with."""
    obstore = _obstore()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if not re.match(r"https?://[^/\s]+|$", os.environ.get(name, "")):
            # Not repeated: there may be a secret in it. obstore would panic.
            raise UsageError(f"{name} is not a URL such as https://host:9000")
    with _errors_of(path):
        return obstore.store.from_url(path, retry_config=_RETRIES)


def _digest(files: dict[str, Path]) -> str:
    """Of names and contents."""
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
# Where cloud machines ask for credentials of their own when the environment has none.
_METADATA = re.compile(r"169\.254\.\d+\.\d+|metadata\.google\.internal")
# What no waiting mends, as `runtime.failures` knows it from disks.
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
    said = _obstore().exceptions
    try:
        yield
    except (said.AlreadyExistsError, said.NotSupportedError, FileNotFoundError):
        raise  # answers, which are waited for
    except (said.BaseError, ValueError) as error:
        number, cause = _explained(str(error))
        # Not `from error`: for some servers its text has a signed URL in it.
        raise LocationError(number, cause, f"{path}/{key}".rstrip("/")) from None


def _explained(text: str) -> tuple[int, str]:
    """Errno and cause, in a line, of what obstore says in thirty."""
    text = re.sub(r"(https?://)[^/\s@]*@", r"\1", text)  # an endpoint's own credentials
    status, code, host = _STATUS.search(text), _CODE.search(text), _HOST.search(text)
    means = [_ERRNO.get(found[1]) for found in (status, code) if found]
    number = next(filter(None, means), errno.EIO)
    if _METADATA.search(text):
        cause = "no credentials are in the environment, such as AWS_ACCESS_KEY_ID"
    elif status:
        message = _MESSAGE.search(text)
        details = ": ".join(found[1] for found in (code, message) if found)
        cause = f"the server says {status[1]}{status[2]}" + f" ({details})" * bool(details)
    elif host is None or code:
        cause = re.sub(r"\?\S*", "", text.partition("\n")[0])
    elif "BadScheme" in text:
        cause = f"{host[0]} is not encrypted, which only AWS_ALLOW_HTTP=true permits"
    else:
        reason = _REASON.search(text)
        timed_out = "timed out" if "kind: Timeout" in text else "the connection broke"
        cause = f"{host[0]} does not answer: {reason[1] if reason else timed_out}"
    return number, "".join(c if c.isprintable() else " " for c in cause)[:300].strip()
