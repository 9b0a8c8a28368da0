"""Rows of a store in the formats of other programs: CSV, Parquet, NumPy and HDF5, part by part."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask import __version__
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.settings import Status
from virnuc_dask.store.results import Result, results_of
from virnuc_dask.store.store import ATTRIBUTE, SEQUENCES_PER_CHUNK, Store, is_embedded
from virnuc_dask.streams import Descriptor

# A cell that begins with one of these is a formula to a spreadsheet. See OWASP, "CSV injection".
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Columns of text that comes from outside.
_NAMES = ("sequence_id", "read_id", "description", "source")
# Arrays of text in NumPy give each row the room of the longest.
_LONGEST_IN_NPZ = 1000
# Attributes in HDF5 hold 64 KiB.
_LONGEST_IN_ATTRIBUTE = 2**15
# Of embeddings that are in memory at a time.
_PART_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that follow one another.

    Attributes
    ----------
    first : int
        Row number of the first.
    columns : dict of str to ndarray, each of shape (n,)
        All but the embedding; text is in NumPy's StringDType.
    codes : ndarray, uint8, shape (n,)
        The column `status` as numbers.
    has_embedding : ndarray, bool, shape (n,)
    embedding : ndarray, float, shape (n, D)
        NaN where there is none.
    maps : dict of str to ndarray, float32, each of shape (n, 2)
        Maps by their names, without ``map_``; NaN where there is no value. They are also in
        `columns`, as ``map_NAME_1`` and ``map_NAME_2``.
    """

    first: int
    columns: dict[str, NDArray[Any]]
    codes: NDArray[np.uint8]
    has_embedding: NDArray[np.bool_]
    embedding: NDArray[np.floating[Any]]
    maps: dict[str, NDArray[np.float32]]


def require(package: str, suffix: str) -> None:
    """Make sure that the package which writes a format is there.

    Raises
    ------
    UsageError
    """
    try:
        import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{suffix} needs {package} ({error}): pip install 'virnuc_dask[export]'"
        ) from error


Writer = Callable[[Path, Store, Iterable[Part]], int]


def rows_per_part(store: Store) -> int:
    """Rows that are in memory at a time: whole chunks of the store, some tens of megabytes."""
    per_chunk = store.identity.rows_per_chunk
    row_bytes: int = store.dimension * store.array("embedding").dtype.itemsize
    rows = min(_PART_BYTES // row_bytes, SEQUENCES_PER_CHUNK)
    return max(1, rows // per_chunk) * per_chunk


def read_parts(store: Store) -> Iterator[Part]:
    """All rows of a store, in their order.

    Raises
    ------
    StoreError
        A chunk is damaged, or the store cannot be read.
    """
    present = store.present()
    results = results_of(store)
    try:
        for first in range(0, store.records, rows_per_part(store)):
            yield _read_part(store, first, present, results)
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(f"{store.path}: cannot be read: {error}") from error


def _read_part(store: Store, first: int, present: NDArray[np.bool_], results: list[Result]) -> Part:
    rows = slice(first, min(first + rows_per_part(store), store.records))
    count, per_chunk = rows.stop - first, store.identity.rows_per_chunk
    codes = np.full(count, Status.PENDING, np.uint8)
    embedding = np.full((count, store.dimension), np.nan, store.array("embedding").dtype)
    for chunk in range(first // per_chunk, -(-rows.stop // per_chunk)):
        if not present[chunk]:
            continue
        span = store.rows(chunk)
        here = slice(span.start - first, span.stop - first)
        with store.reading(f"chunk {chunk}"):
            codes[here], embedding[here] = store.read_chunk(chunk)
        there = is_embedded(codes[here])
        if not (codes[here].all() and np.isfinite(embedding[here][there]).all()):
            # Removed since it was looked for, or damaged in a way that no checksum shows.
            raise StoreError(f"{store.path}: chunk {chunk} is gone or damaged; `verify` says more")
    has_embedding = is_embedded(codes)
    embedding[~has_embedding] = np.nan
    known, which = np.unique(codes, return_inverse=True)
    meanings = [Status(code).meaning for code in known.tolist()]
    ids, length, *origin = store.read_columns(rows).items()
    status = np.array(meanings, np.dtypes.StringDType())[which]
    columns = dict([ids, length, ("status", status), *origin])
    maps = {}
    for result in results:
        values = result.read(rows)
        if result.kind == "map":
            maps[result.name.removeprefix("map_")] = values
            columns |= {f"{result.name}_{axis + 1}": values[:, axis] for axis in range(2)}
        else:
            columns[result.name] = values
    return Part(first, columns, codes, has_embedding, embedding, maps)


def about(store: Store) -> str:
    """What the rows of an export are, as JSON text."""
    return json.dumps({**store.about(), "exported_by": f"virnuc_dask {__version__}"})


def is_about(path: Path) -> bool:
    """Whether a file is what stands beside an exported table."""
    try:
        return "exported_by" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        return False


# --- CSV -----------------------------------------------------------------------------------------


def write_csv(
    path: Path,
    store: Store,
    parts: Iterable[Part],
    *,
    delimiter: str,
    compression: str | None,
    guard: bool,
) -> int:
    """Write a line for each row; see `export`."""
    from xopen import xopen

    nothing = [""] * store.dimension
    # threads=0: no helper process, so that an error is raised here, with its number.
    with xopen(path, "wt", newline="", format=compression, threads=0) as file:
        for part in parts:
            if not part.first:
                features = (f"feature_{number}" for number in range(store.dimension))
                file.write(delimiter.join([*part.columns, *features]) + "\n")
            cells = [
                [_quoted(value, guard) if name in _NAMES else _text(value) for value in values]
                for name, values in ((n, _cells(n, v)) for n, v in part.columns.items())
            ]
            for row, others in enumerate(zip(*cells, strict=True)):
                # As short as gives the same number back, in the store's own precision.
                values = map(str, part.embedding[row]) if part.has_embedding[row] else nothing
                file.write(delimiter.join([*others, *values]) + "\n")
    return store.records


def is_cluster(name: str) -> bool:
    """Whether a column has numbers of clusters: -1 is a row without one."""
    return name.startswith("cluster_")


def _cells(name: str, values: NDArray[Any]) -> list[Any]:
    cells: list[Any] = values.tolist()
    return [None if cell < 0 else cell for cell in cells] if is_cluster(name) else cells


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)  # empty for NaN


def guarded(name: str) -> str:
    """A name that no spreadsheet computes: an apostrophe is put before a formula."""
    return "'" + name if name.startswith(_FORMULA) else name


def _quoted(name: str, guard: bool) -> str:
    """A name as a cell: in quotes always, as a spreadsheet may take another separator for its."""
    if guard:
        name = guarded(name)
    return '"' + name.replace('"', '""') + '"'


# --- Parquet -------------------------------------------------------------------------------------


def write_parquet(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write a row group for each part; see `export`."""
    import pyarrow
    from pyarrow import parquet

    table = None
    with ExitStack() as stack:
        # Not by its name, which pyarrow takes only in UTF-8.
        file = stack.enter_context(open(path, "wb"))
        for part in parts:
            columns = {
                name: pyarrow.array(values.tolist(), pyarrow.string())
                if is_text(values.dtype)
                else _arrow(name, values)
                for name, values in part.columns.items()
            }
            lists = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(part.embedding.ravel()),
                store.dimension,
                mask=pyarrow.array(~part.has_embedding),
            )
            rows = pyarrow.table({**columns, "embedding": lists})
            rows = rows.replace_schema_metadata({ATTRIBUTE: about(store)})
            if table is None:
                # Neither a dictionary nor a range helps with numbers of which no two are alike.
                table = stack.enter_context(
                    parquet.ParquetWriter(
                        file,
                        rows.schema,
                        use_dictionary=list(columns),
                        write_statistics=list(columns),
                    )
                )
            table.write_table(rows)
    return store.records


def _arrow(name: str, values: NDArray[Any]) -> Any:
    """Numbers in Arrow; null where there is none."""
    import pyarrow

    if is_cluster(name):
        return pyarrow.array(values, mask=values < 0)
    return pyarrow.array(values, from_pandas=True)


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether it is NumPy's type of text of any length."""
    return isinstance(dtype, np.dtypes.StringDType)


# --- NumPy ---------------------------------------------------------------------------------------


def write_npz(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write an array for each column; see `export`."""
    dtypes: dict[str, np.dtype[Any]] = {}
    spools: dict[str, Any] = {}
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        shape = (store.records, store.dimension)
        with _array_in(archive, "embedding", shape, store.array("embedding").dtype) as file:
            for part in parts:
                if not part.first:
                    dtypes = _in_numpy(store, part)
                    # An archive takes one array after another.
                    spools = {
                        name: stack.enter_context(TemporaryFile(dir=path.parent)) for name in dtypes
                    }
                file.write(part.embedding)
                for name, spool in spools.items():
                    spool.write(part.columns[name].astype(dtypes[name]))
        for name, spool in spools.items():
            spool.seek(0)
            with _array_in(archive, name, (store.records,), dtypes[name]) as file:
                shutil.copyfileobj(spool, file)
        text = np.array(about(store))
        with _array_in(archive, ATTRIBUTE, (), text.dtype) as file:
            file.write(text)
    return store.records


def _in_numpy(store: Store, part: Part) -> dict[str, np.dtype[Any]]:
    """Types of the columns. Text has a fixed width, which takes no pickle to read."""
    widths = {"status": max(len(state.meaning) for state in Status)}
    if "source" in part.columns:
        widths["source"] = max(map(len, ("", *store.files)))
    for name in ("sequence_id", "read_id"):
        if name not in part.columns:
            continue
        array = store.array(name)
        starts = range(0, array.shape[0], SEQUENCES_PER_CHUNK)
        pieces = (array[start : start + SEQUENCES_PER_CHUNK] for start in starts)
        widths[name] = max(1, *(int(np.strings.str_len(piece).max()) for piece in pieces))
        if widths[name] > _LONGEST_IN_NPZ:
            raise UsageError(
                f"an identifier of {widths[name]:,} letters: NumPy would give each row as much"
                " room; export to .parquet"
            )
    return {
        name: np.dtype(f"<U{max(1, widths[name])}") if name in widths else values.dtype
        for name, values in part.columns.items()
        # As wide as the longest for all rows, it would be larger than the embeddings.
        if name != "description"
    }


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


# --- HDF5 ----------------------------------------------------------------------------------------


class _Sink(Descriptor):
    """A file that HDF5 can always close: where it cannot, it crashes at the process's end."""

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return 0

    def check(self) -> None:
        if self.error:
            raise self.error


@contextmanager
def hdf5(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new HDF5 file, and a function that raises what was wrong with writing it so far."""
    import h5py

    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w") as file:
            yield file, sink.check
        sink.check()


def write_hdf5_rows(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write a dataset for each row that has an embedding; see `export`."""
    written = 0
    with hdf5(path) as (file, check):
        file.attrs[ATTRIBUTE] = about(store)
        for part in parts:
            columns = {name: values.tolist() for name, values in part.columns.items()}
            for number in np.flatnonzero(part.has_embedding).tolist():
                row = part.first + number
                # A slash would make groups of it, and a lone dot is the group itself.
                key = columns["sequence_id"][number].replace("/", "_")
                while key in ("", ".") or key in file:
                    key += f"#{row}"
                dataset = file.create_dataset(key, data=part.embedding[number])
                dataset.attrs["row"] = row
                for name, values in columns.items():
                    value = values[number]
                    if not isinstance(value, str) or len(value.encode()) <= _LONGEST_IN_ATTRIBUTE:
                        dataset.attrs[name] = value
                check()
                written += 1
    return written


def write_hdf5_matrix(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write a dataset for each column; see `export`."""
    with hdf5(path) as (file, check):
        file.attrs[ATTRIBUTE] = about(store)
        for part in parts:
            for name, values in {**part.columns, "embedding": part.embedding}.items():
                if not part.first:
                    hdf5_dataset(file, name, (store.records, *values.shape[1:]), values.dtype)
                put(file[name], part.first, values)
            check()
    return store.records


def hdf5_dataset(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new dataset in a group; StringDType becomes HDF5's text of variable length."""
    import h5py

    kind = h5py.string_dtype() if is_text(dtype) else dtype
    return group.create_dataset(name, shape, kind)


def put(array: Any, first: int, values: NDArray[Any]) -> None:
    """Write values into an array of HDF5 or Zarr, from an index on, one chunk of it at a time.

    Zarr would write several at once, and go on with the others after one has failed.
    """
    step = array.chunks[0] if array.chunks else max(1, len(values))
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        if is_text(piece.dtype):
            piece = piece.astype(object)  # what all versions of h5py take
        array[first + start : first + start + len(piece)] = piece
