"""The Zarr store, and nothing else that knows Zarr: what is written when, and what presence means.

A store appears at its path by one rename, whole, with every sequence in it. From then on only
tasks write, each one its own chunk of ``status`` and then of ``embedding``. A chunk of both is
the checkpoint: there is no other record of what is done.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from virnuc_dask.config import FORMAT, Identity, Status
from virnuc_dask.errors import NotAStoreError, StoreError
from virnuc_dask.files import may_have_a_living_owner, sync, write_durably
from virnuc_dask.residues import Block, InputDigest

SEQUENCES_PER_CHUNK = 65_536
RESIDUES_PER_STORED_CHUNK = 2**22

# The smallest Zstandard frame that holds anything, and four bytes of checksum. A file below that
# is what a power cut leaves of a chunk that was not synced.
MIN_CHUNK_BYTES = 13

ATTRIBUTE = "virnuc_dask"
_CHUNK_FILE = {
    "status": re.compile(r"c\.(0|[1-9]\d*)"),
    "embedding": re.compile(r"c\.(0|[1-9]\d*)\.0"),
}
_INGESTED = ("sequence_id", "length", "offset", "residues")


class Store:
    """One store on a local or shared file system, opened. Nothing is read until it is asked for.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    path : Path
    identity : Identity
        Everything that the row values depend on.
    provenance : dict
        How the store came to be: input, model, versions. Never compared.

    Raises
    ------
    NotAStoreError
        The path holds nothing, or something else.
    StoreError
        The store's metadata is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        if not self.path.exists():
            raise NotAStoreError(f"{path}: no store there")
        if not is_store(self.path):
            raise NotAStoreError(f"{path}: not a store of this program; nothing was changed")
        try:
            self._zarr = DurableStore(self.path)
            attributes: Any = zarr.open_group(self._zarr, mode="r", zarr_format=3).attrs.asdict()
            document = attributes[ATTRIBUTE]
            if document["identity"]["format"] != FORMAT:
                raise StoreError(
                    f"{path}: store format {document['identity']['format']}; this version of"
                    f" virnuc_dask reads format {FORMAT}"
                )
            self.identity = Identity.from_json(document["identity"])
            self.provenance: dict[str, Any] = document["provenance"]
            self.dimension = int(self._array("embedding").shape[1])
        except (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise StoreError(
                f"{path}: the metadata (a zarr.json) is missing or damaged: {error!r}"
            ) from error

    # --- the plan ---

    @property
    def records(self) -> int:
        """Rows, one for each record of the input, in its order."""
        return self.identity.records

    @property
    def chunk_count(self) -> int:
        """Chunks of rows, the unit of work and of the checkpoint."""
        return -(-self.records // self.identity.rows_per_chunk)

    def rows(self, chunk: int) -> slice:
        """Rows of a chunk."""
        start = chunk * self.identity.rows_per_chunk
        return slice(start, min(start + self.identity.rows_per_chunk, self.records))

    def rows_in(self, chunks: Iterable[int]) -> int:
        """How many rows some chunks have together."""
        spans = (self.rows(int(chunk)) for chunk in chunks)
        return sum(int(span.stop - span.start) for span in spans)

    def present(self) -> NDArray[np.bool_]:
        """Which chunks are done, shape (chunk_count,): `status` and `embedding` both have a file.

        One directory listing each; nothing is opened or decoded.
        """
        return self._listed("status") & self._listed("embedding")

    def is_present(self, chunk: int) -> bool:
        """Whether one chunk is done."""
        return all(self._is_chunk(self._file(name, chunk)) for name in _CHUNK_FILE)

    def has_files(self, chunk: int) -> bool:
        """Whether a chunk has any file, be it damaged or without its companion."""
        return any(self._file(name, chunk).is_file() for name in _CHUNK_FILE)

    def lengths(self) -> NDArray[np.int32]:
        """Residues of every record, shape (records,)."""
        try:
            lengths = np.asarray(self._array("length")[:], np.int32)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}: `length` is damaged: {error}") from error
        if (lengths < 0).any():
            raise StoreError(f"{self.path}: a chunk of `length` is missing")
        return lengths

    # --- rows ---

    def read_rows(self, chunk: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Sequences of a chunk.

        Returns
        -------
        lengths : ndarray, int32, shape (n,)
        residues : ndarray, uint8, shape (sum of lengths,)
            ASCII, end to end.

        Raises
        ------
        StoreError
            A sequence array is damaged or lacks a chunk, which would otherwise read as zeros.
        """
        rows = self.rows(chunk)
        try:
            lengths = np.asarray(self._array("length")[rows], np.int32)
            offsets = np.asarray(self._array("offset")[rows], np.int64)
            if (lengths < 0).any() or (offsets < 0).any():
                raise StoreError(f"{self.path}: a chunk of `length` or `offset` is missing")
            end = int(offsets[-1]) + int(lengths[-1])
            residues = np.asarray(self._array("residues")[int(offsets[0]) : end], np.uint8)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}: sequence arrays are damaged: {error}") from error
        if len(residues) != lengths.sum() or not residues.all():
            raise StoreError(f"{self.path}: a chunk of `residues` is missing")
        return lengths, residues

    def write_chunk(
        self, chunk: int, status: NDArray[np.uint8], embedding: NDArray[np.floating[Any]]
    ) -> None:
        """Write a chunk; when `embedding` has its name, the chunk is done, durably.

        Parameters
        ----------
        chunk : int
        status : ndarray, uint8, shape (n,)
        embedding : ndarray, float, shape (n, D)
        """
        rows = self.rows(chunk)
        expected = (rows.stop - rows.start, self.dimension)
        if status.shape != expected[:1] or embedding.shape != expected:
            raise ValueError(f"chunk {chunk} takes {expected}, not {embedding.shape}")
        for name, values in (("status", status), ("embedding", embedding)):
            try:
                self._array(name)[rows] = values
            except (ValueError, RuntimeError):
                # Zarr reads a short last chunk before it overwrites it, so that damage there
                # would stop the very write that repairs it.
                self._file(name, chunk).unlink(missing_ok=True)
                self._array(name)[rows] = values

    def read_chunk(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]:
        """Status, shape (n,), and embedding, shape (n, D), of a chunk."""
        rows = self.rows(chunk)
        return np.asarray(self._array("status")[rows]), np.asarray(self._array("embedding")[rows])

    def read_status(self, chunk: int) -> NDArray[np.uint8]:
        """Status codes of a chunk, shape (n,)."""
        return np.asarray(self._array("status")[self.rows(chunk)])

    def read_ids(self, chunk: int) -> list[str]:
        """Identifiers of a chunk's records."""
        return [str(name) for name in self._array("sequence_id")[self.rows(chunk)]]

    # --- honesty ---

    def check_chunk(self, chunk: int, *, sequences: bool = True) -> str | None:
        """What is wrong with a chunk, or None. Reads and decodes all of it.

        Four levels: both files present and not too small; both decode with their checksums; each
        status code is known and final, and agrees with the sequence; embeddings are finite exactly
        where the status says so. Without `sequences` the status is not compared with them, which
        is for a store whose sequence arrays are damaged.
        """
        for name in _CHUNK_FILE:
            file = self._file(name, chunk)
            if not file.is_file():
                return f"{name} chunk is missing"
            if file.stat().st_size < MIN_CHUNK_BYTES:
                return f"{name} chunk has {file.stat().st_size} bytes"
        try:
            status, embedding = self.read_chunk(chunk)
        except (ValueError, RuntimeError) as error:
            return f"does not decode: {error}"
        if not np.isin(status, [s for s in Status if s is not Status.PENDING]).all():
            return "status has a code that no finished row has"
        if sequences and (problem := self._disagreement(status, self.read_rows(chunk)[0])):
            return problem
        embedded = status < Status.INVALID_RESIDUES
        if not np.isfinite(embedding[embedded]).all():
            return "an embedded row is not finite"
        if not np.isnan(embedding[~embedded]).all():
            return "a quarantined row has an embedding"
        return None

    def _disagreement(self, status: NDArray[np.uint8], lengths: NDArray[np.int32]) -> str | None:
        long = lengths > self.identity.max_residues
        for_long = np.isin(status, (Status.TRUNCATED, Status.WINDOWED, Status.TOO_LONG))
        if (for_long & ~long).any() or (long & (status == Status.EMBEDDED)).any():
            return "status does not agree with the lengths"
        if ((status == Status.EMPTY) != (lengths == 0)).any():
            return "status does not agree with the empty records"
        return None

    def check_sequences(self) -> str | None:
        """What is wrong with the sequence arrays, or None.

        All of them are decoded, and their digest is compared with the input's.
        """
        digest = InputDigest()
        try:
            for start in range(0, self.records, SEQUENCES_PER_CHUNK):
                rows = slice(start, min(start + SEQUENCES_PER_CHUNK, self.records))
                lengths = np.asarray(self._array("length")[rows], np.int32)
                offsets = np.asarray(self._array("offset")[rows], np.int64)
                if (lengths < 0).any() or (np.diff(offsets) != lengths[:-1]).any():
                    return "`length` and `offset` do not agree"
                end = int(offsets[-1]) + int(lengths[-1])
                residues = np.asarray(self._array("residues")[int(offsets[0]) : end], np.uint8)
                ids = [str(name) for name in self._array("sequence_id")[rows]]
                digest.update(Block(ids, lengths, residues))
        except (ValueError, RuntimeError) as error:
            return f"sequence arrays do not decode: {error}"
        if digest.hexdigest() != self.identity.input_sha256:
            return "sequence arrays do not hold the input that the store was made from"
        return None

    def leftovers(self) -> list[Path]:
        """Files that are no part of the store and belong to no living writer.

        Readers ignore them. A `.partial` file is listed once the process that its name gives is
        known to be dead; on another host that cannot be known.
        """
        names = {*_INGESTED, *_CHUNK_FILE}
        found = [p for p in self.path.iterdir() if p.name not in {*names, "zarr.json"}]
        for name in names:
            pattern = _CHUNK_FILE.get(name, re.compile(r"c\.(\d+)"))
            limit = self._array(name).cdata_shape[0]
            for file in (self.path / name).iterdir():
                match = pattern.fullmatch(file.name)
                is_chunk = match is not None and int(match[1]) < limit and file.is_file()
                if file.name != "zarr.json" and not is_chunk:
                    found.append(file)
        return sorted(file for file in found if not may_have_a_living_owner(file.name))

    def remove_chunk(self, chunk: int) -> None:
        """Remove a chunk, so that it is computed again. The commit goes first."""
        for name in reversed(_CHUNK_FILE):
            self._file(name, chunk).unlink(missing_ok=True)
            sync(self.path / name)

    # --- files ---

    def _array(self, name: str) -> Any:
        # The setting is not stored with an array, and opening one ignores it (zarr 3.1.6): every
        # process that writes must set it afterwards, or a chunk that holds only fill values is
        # never written and never done.
        array = zarr.open_array(self._zarr, path=name, mode="r+", zarr_format=3)
        return array.with_config({"write_empty_chunks": True})

    def _file(self, name: str, chunk: int) -> Path:
        return self.path / name / (f"c.{chunk}.0" if name == "embedding" else f"c.{chunk}")

    @staticmethod
    def _is_chunk(file: Path) -> bool:
        try:
            return file.is_file() and file.stat().st_size >= MIN_CHUNK_BYTES
        except FileNotFoundError:
            return False

    def _listed(self, name: str) -> NDArray[np.bool_]:
        """Chunks of an array by a listing: Zarr's own count takes minutes for 100,000 chunks."""
        found = np.zeros(self.chunk_count, np.bool_)
        with os.scandir(self.path / name) as entries:
            for entry in entries:
                match = _CHUNK_FILE[name].fullmatch(entry.name)
                if match is None or int(match[1]) >= self.chunk_count:
                    continue
                with suppress(FileNotFoundError):  # removed since it was listed: not present
                    is_file = entry.is_file()
                    found[int(match[1])] = is_file and entry.stat().st_size >= MIN_CHUNK_BYTES
        return found


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


def local_path(path: str | Path) -> Path:
    """The path of a store on a file system."""
    if "://" in str(path):
        raise NotAStoreError(f"{path}: only stores on a file system are supported so far")
    return Path(path)


def can_create(path: str | Path) -> bool:
    """Whether nothing, or an empty directory, is at a path."""
    path = local_path(path)
    return not (path.exists() or path.is_symlink()) or (path.is_dir() and not any(path.iterdir()))


def is_store(path: str | Path) -> bool:
    """Whether a path looks like one of our stores, healthy or damaged."""
    path = local_path(path)
    return path.is_dir() and all((path / name).is_dir() for name in ("embedding", "status"))
