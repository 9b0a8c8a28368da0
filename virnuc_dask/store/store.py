"""The Zarr store, and nothing else that knows Zarr: what is written when, and what presence means.

A store appears at its place in one step, whole, with every sequence in it. From then on only
tasks write, each one its own chunk of ``status`` and then of ``embedding``. A chunk of both is
the checkpoint: there is no other record of what is done. On request the representations of single
residues stand between the two, ragged: each chunk of rows has several chunks of slots to itself.
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

import numpy as np
import zarr
from numpy.typing import NDArray

from virnuc_dask.errors import NotAStoreError, StoreError, StoreReplacedError
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.inputs.records import decoded_header
from virnuc_dask.settings import FORMAT, Identity, ModelSpec, Status
from virnuc_dask.store.bucket import Bucket
from virnuc_dask.store.directory import Directory
from virnuc_dask.store.location import location_of

SEQUENCES_PER_CHUNK = 65_536
RESIDUES_PER_STORED_CHUNK = 2**22

# The smallest Zstandard frame that holds anything, and four bytes of checksum. A file below that
# is what a power cut leaves of a chunk that was not synced.
MIN_CHUNK_BYTES = 13

ATTRIBUTE = "virnuc_dask"
# What a task writes, in this order: the last is the commit.
CHUNK_FILE = {
    "status": re.compile(r"c\.(0|[1-9]\d*)"),
    "residue_embedding": re.compile(r"c\.(0|[1-9]\d*)\.0"),
    "embedding": re.compile(r"c\.(0|[1-9]\d*)\.0"),
}
TASK_ARRAYS = tuple(CHUNK_FILE)
PER_RESIDUE = ("residue_slot", "residue_embedding")
# Where rows come from that are not whole records: frames, or tiles of proteins.
TRANSLATED = ("read_id", "read", "window", "frame", "start")
TILED = ("read_id", "read", "start")
HEADERS = ("description", "source")
INGESTED = ("sequence_id", "length", "offset", "residues", "residue_slot", *HEADERS, *TRANSLATED)
# What Zarr raises of metadata that is torn, gone, or not ours.
_DAMAGED = (AttributeError, KeyError, TypeError, ValueError, FileNotFoundError)


class Store:
    """One store, opened. Nothing is read until it is asked for.

    It stays that store: if another takes its place, nothing of this one is written into it. A
    directory is held by a descriptor; in an object store the root is looked at before each write.

    Parameters
    ----------
    path : str or Path
        On a local or shared file system, or the URL of a place in an object store.

    Attributes
    ----------
    path : Path or str
        As the user named it; a URL is a str.
    place : Directory or Bucket
    id : str
        Random; no other store has it, also if it was made of the same input and settings.
    identity : Identity
        Everything that the row values depend on.
    provenance : dict
        How the store came to be: input, model, versions. Never compared.
    zarr_store : zarr.abc.store.Store
        What Zarr reads and writes; it writes into no other store that has taken this one's place.

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
        self.zarr_store = self.location.arrays(self._is_ours)
        self.names = {*INGESTED, *CHUNK_FILE}
        if not document.get("headers"):  # made before they were kept
            self.names.difference_update(HEADERS)
        if not self.identity.per_residue:
            self.names.difference_update(PER_RESIDUE)
        self.names.difference_update(TRANSLATED)
        self.names.update(origin_arrays(self.identity))
        self._arrays = {name: self.open_array(name) for name in self.names}
        self.dimension = int(self.array("embedding").shape[1])

    def check_location(self) -> None:
        """Make sure that the store is still where it was opened.

        Raises
        ------
        StoreReplacedError
            It was removed, moved, or replaced.
        """
        if not self.location.holds(self._is_ours):
            raise StoreReplacedError(str(self.path))

    def _is_ours(self, root: bytes) -> bool:
        try:
            return _id_of(json.loads(root)["attributes"][ATTRIBUTE]) == self.id
        except _DAMAGED:
            return False

    # --- the plan ---

    @property
    def model(self) -> ModelSpec:
        """The model of its rows; the reference is where the weights were when it was made."""
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
        """The device that it was made for; empty if it does not say so, as older stores."""
        return str(self.provenance.get("device", ""))

    def about(self) -> dict[str, Any]:
        """What a reader of its rows should know, as plain JSON values, for exports."""
        return {
            **self.model.comment(),
            "model": self.model.reference,
            "device": self.device,
            **self.identity.to_json(),
            "versions": self.provenance.get("versions", {}),
        }

    @property
    def records(self) -> int:
        """Rows: one for each record of the input, in its order, or for each frame or tile."""
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

        One listing each, with sizes; no chunk of them is opened or decoded.
        """
        found = self._listed("status", MIN_CHUNK_BYTES)
        found &= self._listed("embedding", MIN_CHUNK_BYTES)
        if self.identity.per_residue:
            there, wanted = self._residue_files(MIN_CHUNK_BYTES)
            found &= there == wanted
        return found

    def touched(self) -> NDArray[np.bool_]:
        """Which chunks have any file, be it damaged or without its companions."""
        found = self._listed("status", 0) | self._listed("embedding", 0)
        if self.identity.per_residue:
            found |= self._residue_files(0)[0] > 0
        return found

    def is_present(self, chunk: int) -> bool:
        """Whether one chunk is done."""
        return all((self.location.size(key) or 0) >= MIN_CHUNK_BYTES for key in self.keys(chunk))

    def slots(self, chunk: int) -> slice:
        """Slots of `residue_embedding` that belong to a chunk of rows: whole chunks of slots."""
        rows = self.rows(chunk)
        firsts = self._read_slots(slice(rows.start, rows.stop + 1))
        is_last = rows.stop == self.records
        end = self.array("residue_embedding").shape[0] if is_last else firsts[-1]
        return slice(int(firsts[0]), int(end))

    def lengths(self) -> NDArray[np.int32]:
        """Residues of every row, shape (records,)."""
        try:
            lengths = np.asarray(self.array("length")[:], np.int32)
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
        """Write a chunk; when `embedding` has its name, the chunk is done, durably.

        Parameters
        ----------
        chunk : int
        status : ndarray, uint8, shape (n,)
        embedding : ndarray, float, shape (n, D)
        residues : ndarray, float16, shape (N, D), optional
            Of each encoded residue, end to end; for a store that keeps them.
        """
        rows = self.rows(chunk)
        expected = (rows.stop - rows.start, self.dimension)
        if status.shape != expected[:1] or embedding.shape != expected:
            raise ValueError(f"chunk {chunk} takes {expected}, not {embedding.shape}")
        if (residues is not None) != self.identity.per_residue:
            raise ValueError(f"chunk {chunk}: representations of residues are not as the store's")
        self._write("status", rows, status)
        if residues is not None:
            self._write_residues(self.slots(chunk), residues)
        self._write("embedding", rows, embedding)

    def _write(self, name: str, rows: slice, values: NDArray[Any]) -> None:
        try:
            self.array(name)[rows] = values
        except (ValueError, RuntimeError):
            # Zarr reads a short last chunk before it overwrites it, so that damage there would
            # stop the very write that repairs it.
            self.location.remove(_key(name, rows.start // self.identity.rows_per_chunk))
            self.array(name)[rows] = values

    def _write_residues(self, slots: slice, residues: NDArray[np.float16]) -> None:
        array = self.array("residue_embedding")
        step = array.chunks[0]
        if not slots.stop - slots.start - step < len(residues) <= slots.stop - slots.start:
            raise ValueError(f"{slots} does not take {len(residues)} residues")
        for first in range(slots.start, slots.stop, step):
            part = residues[first - slots.start :][:step]
            whole = np.full(array.chunks, np.nan, np.float16)
            whole[: len(part)] = part
            array[first : first + step] = whole

    def read_chunk(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]:
        """Status, shape (n,), and embedding, shape (n, D), of a chunk."""
        rows = self.rows(chunk)
        return np.asarray(self.array("status")[rows]), np.asarray(self.array("embedding")[rows])

    def read_residue_embeddings(self, chunk: int) -> NDArray[np.float16]:
        """Representations of a chunk's residues and the unused slots, NaN, after them."""
        return np.asarray(self.array("residue_embedding")[self.slots(chunk)])

    def read_status(self, chunk: int) -> NDArray[np.uint8]:
        """Status codes of a chunk, shape (n,)."""
        return np.asarray(self.array("status")[self.rows(chunk)])

    def read_ids(self, chunk: int) -> list[str]:
        """Identifiers of a chunk's records."""
        return [str(name) for name in self.array("sequence_id")[self.rows(chunk)]]

    def read_columns(self, rows: slice) -> dict[str, NDArray[Any]]:
        """What is known of some rows beside their state and embedding, one array for each column.

        ``sequence_id``, ``length``, ``description`` and ``source``, the input's name, if the store
        has them, of translated rows ``read_id``, the name of the read, and ``read``, ``window``,
        ``frame``, ``start``, of tiles of proteins these but for ``window`` and ``frame``. Text is
        in NumPy's StringDType.
        """
        names = ["sequence_id", "length", *HEADERS, *TRANSLATED]
        names = [name for name in names if name in self.names]
        columns = {name: self.array(name)[rows] for name in names if name != "read_id"}
        if "source" in columns:
            files = np.array(self.files, np.dtypes.StringDType())
            columns["source"] = files[columns["source"]]
        if "read" in columns:
            # There is one for each read, also for those without a row.
            numbers, which = np.unique(columns["read"], return_inverse=True)
            columns["read_id"] = self.array("read_id").oindex[numbers][which]
        return {name: np.asarray(columns[name]) for name in names}

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Say which part of the store is damaged, if it does not decode.

        Raises
        ------
        StoreError
        """
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"{self.path}: {what} is damaged ({error}); `verify --repair` removes it, `resume`"
                " computes it again"
            ) from error

    @property
    def files(self) -> list[str]:
        """Inputs that the numbers in `source` mean; none in a store that has no such array."""
        names = self.array("source").attrs.get("files", []) if "source" in self.names else []
        return [decoded_header(str(name)) for name in names]

    def remove_chunk(self, chunk: int) -> None:
        """Remove a chunk, so that it is computed again. The commit goes first."""
        self.check_location()
        for key in reversed(self.keys(chunk)):
            self.location.remove(key)

    # --- files ---

    def array(self, name: str) -> Any:
        """An array of the store, to read and to write."""
        return self._arrays[name]

    def open_array(self, name: str) -> Any:
        """An array by its name, opened anew.

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
        # The setting is not stored with an array, and opening one ignores it (zarr 3.1.6): every
        # process that writes must set it afterwards, or a chunk that holds only fill values is
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
        """Residues of each row that are encoded, shape (n,)."""
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
        """Chunks of an array that have a file of so many bytes.

        By one listing: Zarr's own count takes minutes for 100,000 chunks.
        """
        count = self.array(name).cdata_shape[0]
        return listed(self.location.listing(name), CHUNK_FILE[name], count, least)

    def _residue_files(self, least: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Files of residues that each chunk of rows has, and those that it is to have."""
        slots = self.array("residue_embedding")
        firsts = self._read_slots(slice(None, None, self.identity.rows_per_chunk))
        bounds = np.append(firsts, slots.shape[0]) // slots.chunks[0]
        before = np.append(0, np.cumsum(self._listed("residue_embedding", least)))
        return np.diff(before[bounds]), np.diff(bounds)


def listed(
    files: dict[str, int | None], pattern: re.Pattern[str], count: int, least: int
) -> NDArray[np.bool_]:
    """Which of an array's chunks have a file of so many bytes, shape (count,)."""
    found = np.zeros(count, np.bool_)
    for name, size in files.items():
        match = pattern.fullmatch(name)
        if match and size is not None and int(match[1]) < count:
            found[int(match[1])] = size >= least
    return found


def _key(name: str, chunk: int) -> str:
    return f"{name}/c.{chunk}" if name == "status" else f"{name}/c.{chunk}.0"


def residue_slots(
    encoded: NDArray[np.int64], rows_per_chunk: int, slots_per_chunk: int
) -> tuple[NDArray[np.int64], int]:
    """Where the residues of each row are in `residue_embedding`; it follows from lengths alone.

    Each chunk of rows begins at a chunk of slots, so that no two tasks write to the same.

    Parameters
    ----------
    encoded : ndarray, int64, shape (n,)
        Residues per row that are encoded.
    rows_per_chunk, slots_per_chunk : int

    Returns
    -------
    slots : ndarray, int64, shape (n,)
        First slot of each row.
    total : int
        Slots in all.
    """
    firsts = np.arange(0, len(encoded), rows_per_chunk)
    sizes = -(-np.add.reduceat(encoded, firsts) // slots_per_chunk) * slots_per_chunk
    before = np.cumsum(encoded) - encoded
    shift = np.cumsum(sizes) - sizes - before[firsts]
    return before + np.repeat(shift, rows_per_chunk)[: len(encoded)], int(sizes.sum())


def origin_arrays(identity: Identity) -> tuple[str, ...]:
    """Arrays that say where rows come from, in a store with such an identity."""
    if identity.translation:
        return TRANSLATED
    return TILED if identity.tiling else ()


def is_embedded(status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether rows in these states have an embedding, shape (n,)."""
    return np.asarray((status > Status.PENDING) & (status < Status.INVALID_RESIDUES))


def can_create(path: str | Path) -> bool:
    """Whether a new store may be put at a path or URL."""
    return location_of(path).is_free()


def is_store(path: str | Path) -> bool:
    """Whether what is at a path or URL looks like one of our stores, healthy or damaged."""
    return _has_arrays(location_of(path))


def _has_arrays(location: Directory | Bucket) -> bool:
    return all(location.has_array(name) for name in ("embedding", "status"))


def _id_of(document: dict[str, Any]) -> str:
    """A store's own name; of one that was made before they had any, what comes closest."""
    if "id" in document:
        return str(document["id"])
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
