"""Create a new store with all sequences, before any embedding is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import log2
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from virnuc_dask.errors import NotAStoreError, StoreError
from virnuc_dask.files import sync_tree
from virnuc_dask.inputs.lengths import encoded_lengths
from virnuc_dask.inputs.records import Block, Headers
from virnuc_dask.settings import Identity, Status
from virnuc_dask.store.directory import ROOT
from virnuc_dask.store.location import location_of
from virnuc_dask.store.store import (
    ATTRIBUTE,
    CHUNK_FILE,
    RESIDUES_PER_STORED_CHUNK,
    SEQUENCES_PER_CHUNK,
    TILED,
    TRANSLATED,
    Store,
    can_create,
    is_store,
    residue_slots,
)

# About 10 MB of float16 in a chunk of `residue_embedding`.
_RESIDUE_VALUES_PER_CHUNK = 2**22
# Long names of `start`.
_FIRST_NUCLEOTIDE = "first nucleotide of the first codon in the record, from 0"
_FIRST_RESIDUE = "first residue in the record, from 0"


class Ingest:
    """Builds a new store in a staging directory, and publishes the complete store in one step.

    It is a context manager: without `commit` it removes the staging directory at the end. If the
    process is killed, the next ingest removes it. The directory is hidden beside the store's path
    or, for an object store, in the folder for temporary files. So the store's location holds
    either nothing or a complete store. The staging directory is locked while it is written.

    Parameters
    ----------
    path : str or Path
        Location of the store, a path or a URL. An empty directory there is replaced.
    translated, tiled : bool
        Rows are translated from nucleotide records, or are tiles; blocks then have an origin.
    overwrite : bool
        Replace a store of this program, once the new one is complete.

    Raises
    ------
    NotAStoreError
        Something else is at the location.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        translated: bool = False,
        tiled: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._origin_arrays = TRANSLATED if translated else TILED if tiled else ()
        self._first = _FIRST_NUCLEOTIDE if translated else _FIRST_RESIDUE
        self.location = location_of(path)
        self._old = Store(path) if overwrite and not can_create(path) else None
        self._overwrite = overwrite
        # Another run may have created the store in the meantime; `commit` does not change it.
        if not (can_create(path) or is_store(path)):
            raise NotAStoreError(f"{path}: exists and is not empty; nothing was changed")
        self._staging = self.location.staging()
        self._written: dict[str, Any] = {}
        try:
            self._begin()
        except BaseException:
            self._staging.close()
            raise

    def _begin(self) -> None:
        # Nothing needs to be durable before the final rename.
        self._group = zarr.create_group(LocalStore(self._staging.held.root), zarr_format=3)
        dims, per_chunk = ("sequence",), (SEQUENCES_PER_CHUNK,)
        self._ids = _Appender(self._create("sequence_id", "string", per_chunk, "", dims))
        self._length = _Appender(
            self._create("length", "int32", per_chunk, -1, dims, {"long_name": "residues"})
        )
        self._offset = _Appender(
            self._create("offset", "int64", per_chunk, -1, dims, {"long_name": "first residue"})
        )
        self._residues = _Appender(
            self._create(
                "residues",
                "uint8",
                (RESIDUES_PER_STORED_CHUNK,),
                0,
                ("residue",),
                {"long_name": "residues of all sequences, ASCII"},
            )
        )
        description = self._create(
            "description", "string", per_chunk, "", dims, {"long_name": "rest of the header"}
        )
        source = self._create(
            "source", "int32", per_chunk, -1, dims, {"long_name": "input, a number into `files`"}
        )
        self._headers = {"description": _Appender(description), "source": _Appender(source)}
        self._next_offset = 0
        self._origin: dict[str, _Appender] = {}
        if self._origin_arrays:
            self._begin_origin()

    def _begin_origin(self) -> None:
        """Create the arrays for the origin of rows: one entry per row, or per input record."""
        for name, dtype, fill, what in (
            ("read", "int64", -1, "number of the input record, into read_id"),
            ("window", "int32", 0, "window of the record, from 1"),
            ("frame", "int8", 0, "reading frame, negative on the reverse strand"),
            ("start", "int64", -1, self._first),
        ):
            if name not in self._origin_arrays:
                continue
            array = self._create(
                name, dtype, (SEQUENCES_PER_CHUNK,), fill, ("sequence",), {"long_name": what}
            )
            self._origin[name] = _Appender(array)
        # It has its own dimension, because a read may have no row or several rows.
        ids = self._create("read_id", "string", (SEQUENCES_PER_CHUNK,), "", ("input_record",))
        self._origin["read_id"] = _Appender(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lost = isinstance(error, FileNotFoundError) and not self._staging.held.is_in_place
        self._staging.close()
        if lost:
            raise self._removed() from error

    def _removed(self) -> StoreError:
        return StoreError(
            f"{self.location.path}: the unfinished store of this run was removed, by hand or by a"
            " run on a machine that does not see this machine's locks; the same command starts over"
        )

    def append(self, block: Block) -> None:
        """Add records."""
        if block.origin is not None:
            origin = block.origin
            ids = np.array(origin.read_ids, dtype=np.dtypes.StringDType())
            self._origin["read_id"].append(ids)
            for name in self._origin.keys() - {"read_id"}:
                self._origin[name].append(getattr(origin, name))
        if not len(block.lengths):
            return
        ends = self._next_offset + np.cumsum(block.lengths, dtype=np.int64)
        headers = block.headers or Headers(
            [""] * len(block.ids), np.zeros(len(block.ids), np.int32)
        )
        texts = np.array(headers.description, dtype=np.dtypes.StringDType())
        self._headers["description"].append(texts)
        self._headers["source"].append(headers.source)
        self._ids.append(np.array(block.ids, dtype=np.dtypes.StringDType()))
        self._length.append(block.lengths)
        self._offset.append(ends - block.lengths)
        self._residues.append(block.residues)
        self._next_offset = int(ends[-1])

    def commit(
        self,
        identity: Identity,
        dimension: int,
        provenance: dict[str, Any],
        comment: dict[str, str],
    ) -> bool:
        """Publish the store durably; `comment` holds attributes that readers see first.

        Returns
        -------
        bool
            False if another run created a store there first; this store is then discarded.

        Raises
        ------
        StoreError
            Files of this store are missing, or something else is at the location now.
        """
        sequences = (self._ids, self._length, self._offset, self._residues)
        for appender in (*sequences, *self._headers.values(), *self._origin.values()):
            appender.flush()
        self._written["source"].attrs["files"] = provenance.get("inputs", [])
        rows = min(identity.rows_per_chunk, identity.records)
        meanings = {s: s.meaning for s in Status}
        self._create(
            "status",
            "uint8",
            (rows,),
            int(Status.PENDING),
            ("sequence",),
            {
                "long_name": "state of the row",
                "flag_values": [int(s) for s in meanings],
                "flag_meanings": " ".join(meanings.values()),
            },
            identity.records,
        )
        self._create(
            "embedding",
            identity.dtype,
            (rows, dimension),
            float("nan"),
            ("sequence", "feature"),
            {"long_name": f"ESM-2 embedding, {identity.pooling} pooling"},
            identity.records,
        )
        if identity.per_residue:
            self._create_residue_arrays(identity, dimension)
        more = " residue_slot" if identity.per_residue else ""
        more += "".join(f" {name}" for name in self._origin)
        self._group.attrs.update(
            {
                **comment,
                "Conventions": "CF-1.11",
                "coordinates": f"sequence_id length status description source{more}",
                ATTRIBUTE: {
                    "id": uuid4().hex,
                    "headers": True,
                    "identity": identity.to_json(),
                    "provenance": provenance,
                },
            }
        )
        path = self.location.path
        self._check_all_is_there()
        if self._old is not None:
            sync_tree(self._staging.path)  # so that only two renames separate the two stores
        with self._emptied():
            if self.location.publish(self._staging.path):
                return True
        if not is_store(path):
            raise StoreError(f"{path}: cannot create the store: something else is there now")
        return False

    def _emptied(self) -> AbstractContextManager[None]:
        if self._old is not None:
            return self._old.location.emptied(self._old.is_root)
        return self.location.emptied(None) if self._overwrite else nullcontext()

    def _check_all_is_there(self) -> None:
        """Check that all files exist: Zarr reads a missing chunk as zeros, without an error."""
        held = self._staging.held
        expected = {ROOT} | {f"{name}/{ROOT}" for name in self._written}
        for name in self._written.keys() - CHUNK_FILE.keys():
            count = self._written[name].cdata_shape[0]
            expected |= {f"{name}/c.{chunk}" for chunk in range(count)}
        root = held.root
        files = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
        if not held.is_in_place or expected - files:
            raise self._removed()

    def _create_residue_arrays(self, identity: Identity, dimension: int) -> None:
        lengths = self._length.read()
        encoded = encoded_lengths(lengths, identity.max_residues, identity.long)
        largest = np.add.reduceat(encoded, np.arange(0, len(encoded), identity.rows_per_chunk))
        per_chunk = 2 ** round(log2(_RESIDUE_VALUES_PER_CHUNK / dimension))
        per_chunk = max(1, min(per_chunk, int(largest.max())))
        slots, total = residue_slots(encoded, identity.rows_per_chunk, per_chunk)
        self._create(
            "residue_slot",
            "int64",
            (SEQUENCES_PER_CHUNK,),
            -1,
            ("sequence",),
            {"long_name": "first slot of the row's residues"},
            len(slots),
        )[:] = slots
        self._create(
            "residue_embedding",
            "float16",
            (per_chunk, dimension),
            float("nan"),
            ("slot", "feature"),
            {"long_name": "ESM-2 representation of each residue"},
            total,
        )

    def _create(
        self,
        name: str,
        dtype: str,
        chunks: tuple[int, ...],
        fill: object,
        dims: tuple[str, ...],
        attributes: dict[str, Any] | None = None,
        rows: int = 0,
    ) -> Any:
        self._written[name] = self._group.create_array(
            name,
            shape=(rows, *chunks[1:]),
            chunks=chunks,
            dtype=dtype,
            fill_value=fill,
            dimension_names=dims,
            attributes=attributes or {},
            # "." keeps an array's chunks in one directory, which lists ten times faster.
            chunk_key_encoding={"name": "default", "separator": "."},
            # Without the checksum a flipped bit is read without an error.
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            config={"write_empty_chunks": True},
        )
        return self._written[name]


class _Appender:
    """Appends to a one-dimensional array in whole chunks, so that no chunk is written twice."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._pending: list[NDArray[Any]] = []
        self._waiting = 0

    def append(self, values: NDArray[Any]) -> None:
        self._pending.append(values)
        self._waiting += len(values)
        chunk = self._array.chunks[0]
        if self._waiting >= chunk:
            self._write(self._waiting - self._waiting % chunk)

    def flush(self) -> None:
        self._write(self._waiting)

    def read(self) -> NDArray[Any]:
        """Read all values that were appended and flushed."""
        return np.asarray(self._array[:])

    def _write(self, count: int) -> None:
        if not count:
            return
        values = np.concatenate(self._pending)
        done = self._array.shape[0]
        self._array.resize((done + count,))
        self._array[done:] = values[:count]
        self._pending, self._waiting = [values[count:]], len(values) - count
