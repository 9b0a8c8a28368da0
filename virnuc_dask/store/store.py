"""The Zarr store: its arrays, the order of writes, and which chunks are done.

A store appears at its location in one step, complete, with all sequences. From then on only tasks
write: each task writes its own chunk of ``status`` and then of ``embedding``. A chunk of both is
the checkpoint; there is no other record of progress. On request a task also writes residue
embeddings, between the two. They are ragged: each chunk of rows has its own chunks of slots.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from virnuc_dask.errors import NotAStoreError, StoreError, StoreReplacedError
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.inputs.records import decoded_header
from virnuc_dask.settings import FORMAT, Identity, ModelSpec, Status
from virnuc_dask.store.bucket import Bucket
from virnuc_dask.store.directory import Directory
from virnuc_dask.store.location import location_of

SEQUENCES_PER_CHUNK = 65_536
RESIDUES_PER_STORED_CHUNK = 2**22

# The smallest non-empty Zstandard frame plus four bytes of checksum. A power cut may leave a
# smaller file of a chunk that was not synced.
MIN_CHUNK_BYTES = 13

# How chunks are encoded: bytes, Zstandard, then four bytes of CRC-32C.
_CODECS, _CHECKSUM_BYTES = (BytesCodec, ZstdCodec, Crc32cCodec), 4

ATTRIBUTE = "virnuc_dask"
# Arrays that a task writes, in this order; the last is the commit.
CHUNK_FILE = {
    "status": re.compile(r"c\.(0|[1-9]\d*)"),
    "residue_embedding": re.compile(r"c\.(0|[1-9]\d*)\.0"),
    "embedding": re.compile(r"c\.(0|[1-9]\d*)\.0"),
}
TASK_ARRAYS = tuple(CHUNK_FILE)
PER_RESIDUE = ("residue_slot", "residue_embedding")
# Origins of rows that are not whole records: of translated frames, and of tiles of proteins.
TRANSLATED = ("read_id", "read", "window", "frame", "start")
TILED = ("read_id", "read", "start")
HEADERS = ("description", "source")
INGESTED = ("sequence_id", "length", "offset", "residues", "residue_slot", *HEADERS, *TRANSLATED)
# Errors that Zarr raises for metadata that is damaged, missing, or from another program.
_DAMAGED = (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError)


class Store:
    """An opened store. Array data is read only on request.

    If another store replaces it at the same location, nothing is written into the other store. A
    directory is held by a descriptor; in an object store the root metadata is read before each
    write.

    Parameters
    ----------
    path : str or Path
        Path on a local or shared file system, or URL in an object store.

    Attributes
    ----------
    path : Path or str
        As the user named it; a URL is a str.
    location : Directory or Bucket
    id : str
        Random identifier; a store made from the same input and settings has another one.
    identity : Identity
        Everything that the row values depend on.
    provenance : dict
        How the store was made: input, model, versions. Never compared.
    zarr_store : zarr.abc.store.Store
        Zarr's access to the store; it never writes into another store at the same location.

    Raises
    ------
    NotAStoreError
        The path holds nothing, or something else.
    StoreError
        The store's metadata is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.location = location_of(path)
        self.path = self.location.path
        try:
            self.location.hold()
            there = _has_arrays(self.location)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
                raise
            raise NotAStoreError(f"{self.path}: {error.strerror}") from error
        if not there:
            if not self.location.exists():
                raise NotAStoreError(f"{self.path}: no store there")
            raise NotAStoreError(f"{self.path}: not a store of this program; nothing was changed")
        try:
            arrays = self.location.arrays()
            attributes: Any = zarr.open_group(arrays, mode="r", zarr_format=3).attrs.asdict()
            document = attributes[ATTRIBUTE]
            self.id = _id_of(document)
            if document["identity"]["format"] != FORMAT:
                raise StoreError(
                    f"{path}: store format {document['identity']['format']}; this version of"
                    f" virnuc_dask reads format {FORMAT}"
                )
            self.identity = Identity.from_json(document["identity"])
            self.provenance: dict[str, Any] = document["provenance"]
        except _DAMAGED as error:
            raise StoreError(
                f"{path}: the metadata (zarr.json) is missing or damaged: {error!r}"
            ) from error
        self.zarr_store = self.location.arrays(self.is_root)
        self.names = {*INGESTED, *CHUNK_FILE}
        if not document.get("headers"):  # a store from before headers were kept
            self.names.difference_update(HEADERS)
        if not self.identity.per_residue:
            self.names.difference_update(PER_RESIDUE)
        self.names.difference_update(TRANSLATED)
        self.names.update(origin_arrays(self.identity))
        self._arrays = {name: self.open_array(name) for name in self.names}
        self.dimension = int(self.array("embedding").shape[1])

    def check_location(self) -> None:
        """Check that the store is still at the location where it was opened.

        Raises
        ------
        StoreReplacedError
            It was removed, moved, or replaced.
        """
        if not self.location.holds(self.is_root):
            raise StoreReplacedError(str(self.path))

    def is_root(self, root: bytes) -> bool:
        """Whether a root's metadata are this store's."""
        try:
            return _id_of(json.loads(root)["attributes"][ATTRIBUTE]) == self.id
        except _DAMAGED:
            return False

    # --- model and chunks ---

    @property
    def model(self) -> ModelSpec:
        """Model of the rows; its reference names the weights as they were at creation."""
        return ModelSpec(
            str(self.provenance.get("model", "unknown")),
            self.identity.weights_sha256,
            self.dimension,
            self.identity.repr_layer,
            self.identity.pooling,
            self.identity.precision,
        )

    @property
    def device(self) -> str:
        """Device that the store was made for; empty for older stores, which do not record it."""
        return str(self.provenance.get("device", ""))

    def about(self) -> dict[str, Any]:
        """Facts for readers of the rows, such as the model, as plain JSON values for exports."""
        return {
            **self.model.comment(),
            "model": self.model.reference,
            "device": self.device,
            **self.identity.to_json(),
            "versions": self.provenance.get("versions", {}),
        }

    @property
    def records(self) -> int:
        """Number of rows: one per input record, frame or tile, in the order of the input."""
        return self.identity.records

    @property
    def chunk_count(self) -> int:
        """Number of chunks of rows; a chunk is the unit of work and of the checkpoint."""
        return -(-self.records // self.identity.rows_per_chunk)

    def rows(self, chunk: int) -> slice:
        """Rows of a chunk."""
        start = chunk * self.identity.rows_per_chunk
        return slice(start, min(start + self.identity.rows_per_chunk, self.records))

    def rows_in(self, chunks: Iterable[int]) -> int:
        """Total number of rows in these chunks."""
        spans = (self.rows(int(chunk)) for chunk in chunks)
        return sum(int(span.stop - span.start) for span in spans)

    def present(self) -> NDArray[np.bool_]:
        """Which chunks are done, shape (chunk_count,): all their arrays have a file.

        Takes one listing per array, with sizes; no chunk of these arrays is opened or decoded.
        """
        done = self._listed("status", MIN_CHUNK_BYTES)
        done &= self._listed("embedding", MIN_CHUNK_BYTES)
        if self.identity.per_residue:
            present, expected = self._residue_files(MIN_CHUNK_BYTES)
            done &= present == expected
        return done

    def touched(self) -> NDArray[np.bool_]:
        """Which chunks have any file, even a damaged or incomplete set, shape (chunk_count,)."""
        touched = self._listed("status", 0) | self._listed("embedding", 0)
        if self.identity.per_residue:
            touched |= self._residue_files(0)[0] > 0
        return touched

    def is_present(self, chunk: int) -> bool:
        """Whether one chunk is done."""
        return all((self.location.size(key) or 0) >= MIN_CHUNK_BYTES for key in self.keys(chunk))

    def slots(self, chunk: int) -> slice:
        """Slots of `residue_embedding` for a chunk of rows; they are whole chunks of slots."""
        rows = self.rows(chunk)
        firsts = self._read_slots(slice(rows.start, rows.stop + 1))
        is_last = rows.stop == self.records
        end = self.array("residue_embedding").shape[0] if is_last else firsts[-1]
        return slice(int(firsts[0]), int(end))

    def lengths(self) -> NDArray[np.int32]:
        """Residues per row, shape (records,)."""
        try:
            lengths = np.asarray(self.array("length")[:], np.int32)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}: `length` is damaged: {error}") from error
        if (lengths < 0).any():
            raise StoreError(f"{self.path}: a chunk of `length` is missing")
        return lengths

    # --- rows ---

    def read_rows(self, chunk: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Read the sequences of a chunk.

        Returns
        -------
        lengths : ndarray, int32, shape (n,)
        residues : ndarray, uint8, shape (sum of lengths,)
            ASCII codes of all sequences, concatenated.

        Raises
        ------
        StoreError
            A sequence array is damaged or lacks a chunk, which Zarr would read as fill values.
        """
        rows = self.rows(chunk)
        try:
            lengths = np.asarray(self.array("length")[rows], np.int32)
            offsets = np.asarray(self.array("offset")[rows], np.int64)
            if (lengths < 0).any() or (offsets < 0).any():
                raise StoreError(f"{self.path}: a chunk of `length` or `offset` is missing")
            end = int(offsets[-1]) + int(lengths[-1])
            residues = np.asarray(self.array("residues")[int(offsets[0]) : end], np.uint8)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}: sequence arrays are damaged: {error}") from error
        if len(residues) != lengths.sum() or not residues.all():
            raise StoreError(f"{self.path}: a chunk of `residues` is missing")
        return lengths, residues

    def write_chunk(
        self,
        chunk: int,
        status: NDArray[np.uint8],
        embedding: NDArray[np.floating[Any]],
        residues: NDArray[np.float16] | None = None,
    ) -> None:
        """Write a chunk; it is done, durably, once the file of `embedding` has its final name.

        Parameters
        ----------
        chunk : int
        status : ndarray, uint8, shape (n,)
        embedding : ndarray, float, shape (n, D)
        residues : ndarray, float16, shape (N, D), optional
            Embeddings of all encoded residues, concatenated; only for a store that keeps them.
        """
        rows = self.rows(chunk)
        expected = (rows.stop - rows.start, self.dimension)
        if status.shape != expected[:1] or embedding.shape != expected:
            raise ValueError(
                f"chunk {chunk}: embeddings must have the shape {expected}, not {embedding.shape}"
            )
        if (residues is not None) != self.identity.per_residue:
            raise ValueError(
                f"chunk {chunk}: residue embeddings must be given exactly if the store keeps them"
            )
        self._write("status", rows, status)
        if residues is not None:
            self._write_residues(self.slots(chunk), residues)
        self._write("embedding", rows, embedding)

    def _write(self, name: str, rows: slice, values: NDArray[Any]) -> None:
        try:
            self.array(name)[rows] = values
        except (ValueError, RuntimeError):
            # Zarr reads a short last chunk before it overwrites it. A damaged chunk would raise an
            # error, and could never be repaired.
            self.location.remove(_key(name, rows.start // self.identity.rows_per_chunk))
            self.array(name)[rows] = values

    def _write_residues(self, slots: slice, residues: NDArray[np.float16]) -> None:
        array = self.array("residue_embedding")
        step = array.chunks[0]
        if not slots.stop - slots.start - step < len(residues) <= slots.stop - slots.start:
            raise ValueError(f"{len(residues)} residues do not fill {slots}")
        for first in range(slots.start, slots.stop, step):
            part = residues[first - slots.start :][:step]
            whole = np.full(array.chunks, np.nan, np.float16)
            whole[: len(part)] = part
            array[first : first + step] = whole

    def read_chunk(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]:
        """Read the status, shape (n,), and the embeddings, shape (n, D), of a chunk; read-only."""
        return self.read_status(chunk), self._read("embedding", chunk)

    def read_residue_embeddings(self, chunk: int) -> NDArray[np.float16]:
        """Read the residue embeddings of a chunk, shape (slots, D); unused slots are NaN."""
        return np.asarray(self.array("residue_embedding")[self.slots(chunk)])

    def read_status(self, chunk: int) -> NDArray[np.uint8]:
        """Read the status codes of a chunk, shape (n,); read-only."""
        return self._read("status", chunk)

    def _read(self, name: str, chunk: int) -> NDArray[Any]:
        """Read a chunk of rows of an array. It is decoded in this thread if that can be done."""
        array, rows = self.array(name), self.rows(chunk)
        is_plain = tuple(map(type, array.metadata.codecs)) == _CODECS
        content = self.location.read(_key(name, chunk)) if is_plain else None
        if content is None:
            return np.asarray(array[rows])
        whole = _decoded(content, array.chunks, array.dtype.newbyteorder("<"))
        return whole[: rows.stop - rows.start]

    def read_ids(self, chunk: int) -> list[str]:
        """Read the identifiers of a chunk's rows."""
        return [str(name) for name in self.array("sequence_id")[self.rows(chunk)]]

    def read_columns(self, rows: slice) -> dict[str, NDArray[Any]]:
        """Read the columns of rows other than status and embedding, one array per column.

        All stores have ``sequence_id`` and ``length``. Newer stores have ``description`` and
        ``source``, the name of the input. Translated rows have ``read_id``, the name of the read,
        ``read``, ``window``, ``frame`` and ``start``; tiles of proteins have the same without
        ``window`` and ``frame``. Text has NumPy's StringDType.
        """
        names = ["sequence_id", "length", *HEADERS, *TRANSLATED]
        names = [name for name in names if name in self.names]
        columns = {name: self.array(name)[rows] for name in names if name != "read_id"}
        if "source" in columns:
            files = np.array(self.files, np.dtypes.StringDType())
            columns["source"] = files[columns["source"]]
        if "read" in columns:
            # `read_id` has one entry per read, also for reads without a row.
            numbers, which = np.unique(columns["read"], return_inverse=True)
            columns["read_id"] = self.array("read_id").oindex[numbers][which]
        return {name: np.asarray(columns[name]) for name in names}

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn decoding errors into an error that names the damaged part of the store.

        Raises
        ------
        StoreError
            The part does not decode.
        """
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self.path}: {what} is damaged ({error}); `verify --repair` removes it, and"
                " `resume` computes it again"
            ) from error

    @property
    def files(self) -> list[str]:
        """Names of the inputs that `source` numbers; empty if the store has no `source`."""
        names = self.array("source").attrs.get("files", []) if "source" in self.names else []
        return [decoded_header(str(name)) for name in names]

    def remove_chunk(self, chunk: int) -> None:
        """Remove a chunk, so that it is computed again. The commit is removed first."""
        self.check_location()
        for key in reversed(self.keys(chunk)):
            self.location.remove(key)

    # --- files ---

    def array(self, name: str) -> Any:
        """Return an opened array of the store, for reading and writing."""
        return self._arrays[name]

    def open_array(self, name: str) -> Any:
        """Open an array by its name.

        Raises
        ------
        StoreError
            Its metadata is missing or damaged.
        """
        try:
            array = zarr.open_array(self.zarr_store, path=name, mode="r+", zarr_format=3)
        except _DAMAGED as error:
            raise StoreError(
                f"{self.path}: the metadata of `{name}` (its zarr.json) is missing or damaged:"
                f" {error!r}"
            ) from error
        # The setting is not stored with an array, and opening an array ignores it (zarr 3.1.6), so
        # each writing process must set it after opening. Otherwise a chunk of only fill values is
        # never written and never done.
        return array.with_config({"write_empty_chunks": True})

    def keys(self, chunk: int) -> list[str]:
        """Files of a chunk of rows, in the order in which a task writes them."""
        between: list[str] = []
        if self.identity.per_residue:
            slots, step = self.slots(chunk), self.array("residue_embedding").chunks[0]
            numbers = range(slots.start // step, slots.stop // step)
            between = [_key("residue_embedding", number) for number in numbers]
        return [_key("status", chunk), *between, _key("embedding", chunk)]

    def encoded(self, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Number of encoded residues per row, shape (n,)."""
        return encoded_lengths(lengths, self.identity.max_residues, self.identity.long)

    def _read_slots(self, rows: slice) -> NDArray[np.int64]:
        try:
            slots = np.asarray(self.array("residue_slot")[rows], np.int64)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.path}: `residue_slot` is damaged: {error}") from error
        if (slots < 0).any():
            raise StoreError(f"{self.path}: a chunk of `residue_slot` is missing")
        return slots

    def _listed(self, name: str, least: int) -> NDArray[np.bool_]:
        """Chunks of an array that have a file of at least `least` bytes.

        Takes one listing; Zarr's own count takes minutes for 100,000 chunks.
        """
        count = self.array(name).cdata_shape[0]
        return listed(self.location.listing(name), CHUNK_FILE[name], count, least)

    def _residue_files(self, least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Files of residue embeddings per chunk of rows: number present, and number expected."""
        slots = self.array("residue_embedding")
        firsts = self._read_slots(slice(None, None, self.identity.rows_per_chunk))
        bounds = np.append(firsts, slots.shape[0]) // slots.chunks[0]
        before = np.append(0, np.cumsum(self._listed("residue_embedding", least)))
        return np.diff(before[bounds]), np.diff(bounds)


def _decoded(content: bytes, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Check and decode a chunk.

    Zarr would pass all reads of a process through one thread, and copy each chunk into new memory:
    two threads took twice as long with it.

    Raises
    ------
    ValueError, RuntimeError
        The content is damaged.
    """
    view = np.frombuffer(content, np.uint8)
    body, checksum = view[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if google_crc32c.value(body).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise ValueError("stored and computed checksum do not match")
    values: NDArray[Any] = np.frombuffer(zstd.decompress(body), dtype).reshape(shape)
    return values


def listed(
    files: dict[str, int | None], pattern: re.Pattern[str], count: int, least: int
) -> NDArray[np.bool_]:
    """Which of an array's chunks have a file of at least `least` bytes, shape (count,)."""
    has_file = np.zeros(count, np.bool_)
    for name, size in files.items():
        match = pattern.fullmatch(name)
        if match and size is not None and int(match[1]) < count:
            has_file[int(match[1])] = size >= least
    return has_file


def _key(name: str, chunk: int) -> str:
    return f"{name}/c.{chunk}" if name == "status" else f"{name}/c.{chunk}.0"


def residue_slots(
    encoded: NDArray[np.int64], rows_per_chunk: int, slots_per_chunk: int
) -> tuple[NDArray[np.int64], int]:
    """Position of each row's residues in `residue_embedding`; it follows from the lengths alone.

    Each chunk of rows starts at a new chunk of slots, so two tasks never write to the same chunk.

    Parameters
    ----------
    encoded : ndarray, int64, shape (n,)
        Encoded residues per row.
    rows_per_chunk, slots_per_chunk : int

    Returns
    -------
    slots : ndarray, int64, shape (n,)
        First slot of each row.
    total : int
        Total number of slots.
    """
    firsts = np.arange(0, len(encoded), rows_per_chunk)
    sizes = -(-np.add.reduceat(encoded, firsts) // slots_per_chunk) * slots_per_chunk
    before = np.cumsum(encoded) - encoded
    shift = np.cumsum(sizes) - sizes - before[firsts]
    return before + np.repeat(shift, rows_per_chunk)[: len(encoded)], int(sizes.sum())


def origin_arrays(identity: Identity) -> tuple[str, ...]:
    """Names of the arrays that record the origin of rows, in a store with this identity."""
    if identity.translation:
        return TRANSLATED
    return TILED if identity.tiling else ()


def is_embedded(status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether rows with these status codes have an embedding, shape (n,)."""
    return np.asarray((status > Status.PENDING) & (status < Status.INVALID_RESIDUES))


def can_create(path: str | Path) -> bool:
    """Whether a new store may be created at a path or URL."""
    return location_of(path).is_free()


def is_store(path: str | Path) -> bool:
    """Whether a path or URL looks like a store of this program, healthy or damaged."""
    return _has_arrays(location_of(path))


def _has_arrays(location: Directory | Bucket) -> bool:
    return all(location.has_array(name) for name in ("embedding", "status"))


def _id_of(document: dict[str, Any]) -> str:
    """Identifier of a store; older stores have none, so a digest of their metadata serves."""
    if "id" in document:
        return str(document["id"])
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
