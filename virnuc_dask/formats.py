"""A store's rows for other programs: CSV, Parquet, HDF5 or NumPy, one chunk in memory at a time."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.config import Status
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.store import Store

# A cell that begins with one of these is a formula to a spreadsheet. See OWASP, "CSV injection".
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_LONGEST_KEY = 200


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one chunk.

    Attributes
    ----------
    first : int
        Row number of the first.
    ids, states : list of str
    lengths : ndarray, int32, shape (n,)
    embedding : ndarray, shape (n, D)
        NaN where a row is quarantined or not done.
    """

    first: int
    ids: list[str]
    lengths: NDArray[np.int32]
    states: list[str]
    embedding: NDArray[np.floating[Any]]


def export(store: str | Path, out: str | Path, *, partial: bool = False, guard: bool = True) -> int:
    """Write a store's rows, in their order, into one file.

    Parameters
    ----------
    store : path
    out : path
        Its suffix says how. ``.csv`` and ``.tsv``, also with ``.gz`` and the like: a line for each
        row, with its state and a column for each feature, empty without an embedding. ``.parquet``:
        the same, the embedding one column of lists, null without. ``.npz``: arrays `sequence_id`,
        `length`, `status` and `embedding`, NaN without. ``.h5``: one dataset for each embedded
        row, named by its identifier.
    partial : bool
        Also of a store that is not complete.
    guard : bool
        In CSV and TSV, put an apostrophe before an identifier that a spreadsheet would compute.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    UsageError
        The suffix is not known, the package for it is not there, or `out` exists.
    StoreError
        The store is not complete, or damaged.
    """
    opened, path = Store(store), Path(out)
    write = _writer(path, guard)
    if path.exists():
        raise UsageError(f"{path} exists; give another name, or remove it")
    missing = int((~opened.present()).sum())
    if missing and not partial:
        raise StoreError(
            f"{store} lacks {missing:,} of {opened.chunk_count:,} chunks: `virnuc-dask resume`"
            " computes them, --partial exports what is there"
        )
    # Under its name once it is whole; the suffix stays, as writers look at it.
    unfinished = path.with_name(f".{uuid4().hex[:8]}-{path.name}")
    try:
        rows = write(unfinished, opened, _parts(opened))
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


_Writer = Callable[[Path, Store, Iterable[_Part]], int]


def _writer(path: Path, guard: bool) -> _Writer:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
        suffixes.pop()
        compressed = True
    else:
        compressed = False
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".csv", ".tsv"):
        delimiter = "," if suffix == ".csv" else "\t"
        return lambda *given: _write_csv(*given, delimiter=delimiter, guard=guard)
    writers: dict[str, tuple[_Writer, str]] = {
        ".npz": (_write_npz, "numpy"),
        ".parquet": (_write_parquet, "pyarrow"),
        ".h5": (_write_hdf5, "h5py"),
        ".hdf5": (_write_hdf5, "h5py"),
    }
    if suffix not in writers or compressed:
        raise UsageError(
            f"{path.name}: cannot tell the format; known are .csv, .tsv (also .gz, .bz2, .xz,"
            " .zst), .parquet, .npz, .h5"
        )
    writer, package = writers[suffix]
    try:
        __import__(package)
    except ImportError as error:
        raise UsageError(
            f"{suffix} needs {package} ({error}): pip install 'virnuc_dask[export]'"
        ) from error
    return writer


def _parts(store: Store) -> Iterator[_Part]:
    present, lengths = store.present(), store.lengths()
    for chunk in range(store.chunk_count):
        rows = store.rows(chunk)
        count = rows.stop - rows.start
        if present[chunk]:
            try:
                codes, embedding = store.read_chunk(chunk)
            except (ValueError, RuntimeError) as error:
                raise StoreError(
                    f"{store.path}: chunk {chunk} is damaged ({error}); `verify --repair` removes"
                    " it, `resume` computes it again"
                ) from error
        else:
            codes = np.full(count, Status.PENDING, np.uint8)
            embedding = np.full((count, store.dimension), np.nan, np.float32)
        states = [Status(code).meaning for code in codes.tolist()]
        yield _Part(rows.start, store.read_ids(chunk), lengths[rows], states, embedding)


def _write_csv(
    path: Path, store: Store, parts: Iterable[_Part], *, delimiter: str, guard: bool
) -> int:
    from xopen import xopen

    written = 0
    with xopen(path, "wt", newline="") as file:
        table = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        features = [f"feature_{number}" for number in range(store.dimension)]
        table.writerow(["sequence_id", "length", "status", *features])
        empty = [""] * store.dimension
        for part in parts:
            for name, length, state, values in zip(
                part.ids, part.lengths.tolist(), part.states, part.embedding, strict=True
            ):
                if guard and name.startswith(_FORMULA):
                    name = "'" + name
                # As short as gives the same number back, in the store's own precision.
                cells = empty if np.isnan(values).all() else map(str, values)
                table.writerow([name, length, state, *cells])
            written += len(part.ids)
    return written


def _write_parquet(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    import pyarrow
    from pyarrow import parquet

    dtype = pyarrow.from_numpy_dtype(store.array("embedding").dtype)
    schema = pyarrow.schema(
        [
            ("sequence_id", pyarrow.string()),
            ("length", pyarrow.int32()),
            ("status", pyarrow.string()),
            ("embedding", pyarrow.list_(dtype, store.dimension)),
        ]
    )
    written = 0
    with parquet.ParquetWriter(path, schema) as table:
        for part in parts:
            lists = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(part.embedding.ravel()),
                store.dimension,
                mask=pyarrow.array(np.isnan(part.embedding).all(1)),
            )
            columns = [part.ids, part.lengths, part.states, lists]
            table.write_table(pyarrow.table(columns, schema=schema))
            written += len(part.ids)
    return written


def _write_npz(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    shape = (store.records, store.dimension)
    ids: list[str] = []
    states: list[str] = []
    with zipfile.ZipFile(path, "w") as archive:
        with _array_in(archive, "embedding", shape, store.array("embedding").dtype) as file:
            for part in parts:
                file.write(np.ascontiguousarray(part.embedding))
                ids += part.ids
                states += part.states
        # Of fixed width, which takes no pickle to read.
        for name, values in (
            ("sequence_id", np.array(ids, np.str_)),
            ("length", store.lengths()),
            ("status", np.array(states, np.str_)),
        ):
            with _array_in(archive, name, values.shape, values.dtype) as file:
                file.write(values)
    return len(ids)


@contextmanager
def _array_in(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[Any]:
    """A file in an archive of arrays, after the header; the values are to follow."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        description = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_2_0(
            file, {"descr": description, "fortran_order": False, "shape": shape}
        )
        yield file


def _write_hdf5(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    import h5py

    written = 0
    with h5py.File(path, "w") as file:
        for part in parts:
            for number, name in enumerate(part.ids):
                values = part.embedding[number]
                if np.isnan(values).all():
                    continue
                # A slash would make groups of it, a lone dot is the group itself, and what is
                # longer than a page is refused.
                key = name.replace("/", "_").replace(".", "_")[:_LONGEST_KEY]
                if key in file:
                    key = f"{key}#{part.first + number}"
                dataset = file.create_dataset(key, data=values)
                dataset.attrs["sequence_id"] = name
                dataset.attrs["row"] = part.first + number
                dataset.attrs["status"] = part.states[number]
                written += 1
    return written
