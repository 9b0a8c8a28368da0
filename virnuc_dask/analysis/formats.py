"""Writers of CSV, Parquet, NumPy and HDF5 for exports, part by part."""

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
from virnuc_dask.standard_streams import Descriptor
from virnuc_dask.store.results import Result, results_of
from virnuc_dask.store.store import ATTRIBUTE, SEQUENCES_PER_CHUNK, Store, is_embedded

# Spreadsheets read cells with these first characters as formulas. See OWASP, "CSV injection".
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Columns with text from input files.
_NAMES = ("sequence_id", "read_id", "description", "source")
# In NumPy arrays of text, each row is as wide as the longest.
_LONGEST_IN_NPZ = 1000
# HDF5 attributes hold at most 64 KiB.
_LONGEST_IN_ATTRIBUTE = 2**15
# Bytes of embeddings in memory at a time.
_PART_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows.

    Attributes
    ----------
    first : int
        Number of the first row.
    columns : dict of str to ndarray, each of shape (n,)
        All columns except the embedding; text uses NumPy's StringDType.
    codes : ndarray, uint8, shape (n,)
        Numeric codes of the column `status`.
    has_embedding : ndarray, bool, shape (n,)
    embedding : ndarray, float, shape (n, D)
        NaN without an embedding.
    maps : dict of str to ndarray, float32, each of shape (n, 2)
        Maps by name, without ``map_``; NaN without a value. `columns` contains them too, as
        ``map_NAME_1`` and ``map_NAME_2``.
    """

    first: int
    columns: dict[str, NDArray[Any]]
    codes: NDArray[np.uint8]
    has_embedding: NDArray[np.bool_]
    embedding: NDArray[np.floating[Any]]
    maps: dict[str, NDArray[np.float32]]


def require(package: str, suffix: str) -> None:
    """Check that the package for a format is installed.

    Raises
    ------
    UsageError
        It is not.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise UsageError(f"{suffix} needs {package} ({error}): pip install {package}") from error


Writer = Callable[[Path, Store, Iterable[Part]], int]


def rows_per_part(store: Store) -> int:
    """Rows per part: whole chunks of the store, about 16 MB of embeddings."""
    per_chunk = store.identity.rows_per_chunk
    row_bytes: int = store.dimension * store.array("embedding").dtype.itemsize
    rows = min(_PART_BYTES // row_bytes, SEQUENCES_PER_CHUNK)
    return max(1, rows // per_chunk) * per_chunk


def read_parts(store: Store) -> Iterator[Part]:
    """All rows of a store in order, as parts.

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
            # It was removed after the check above, or has damage that no checksum shows.
            raise StoreError(f"{store.path}: chunk {chunk} is gone or damaged; `verify` checks it")
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
    """Description of an export's rows, as JSON text."""
    return json.dumps({**store.about(), "exported_by": f"virnuc_dask {__version__}"})


def is_about(path: Path) -> bool:
    """Whether a file is the JSON file of an exported table."""
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
    """Write one line per row; see `export`."""
    from xopen import xopen

    nothing = [""] * store.dimension
    # threads=0 avoids a helper process, so that errors are raised here, with their number.
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
                # str() of a scalar in the store's precision gives the shortest exact text.
                values = map(str, part.embedding[row]) if part.has_embedding[row] else nothing
                file.write(delimiter.join([*others, *values]) + "\n")
    return store.records


def is_cluster(name: str) -> bool:
    """Whether a column contains cluster numbers, -1 for rows without a cluster."""
    return name.startswith("cluster_")


def _cells(name: str, values: NDArray[Any]) -> list[Any]:
    cells: list[Any] = values.tolist()
    return [None if cell < 0 else cell for cell in cells] if is_cluster(name) else cells


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)  # NaN becomes empty


def guarded(name: str) -> str:
    """Put an apostrophe before a name that a spreadsheet reads as a formula."""
    return "'" + name if name.startswith(_FORMULA) else name


def _quoted(name: str, guard: bool) -> str:
    """A name as a quoted cell, because a spreadsheet may use another separator."""
    if guard:
        name = guarded(name)
    return '"' + name.replace('"', '""') + '"'


# --- Parquet -------------------------------------------------------------------------------------


def write_parquet(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write one row group per part; see `export`."""
    import pyarrow
    from pyarrow import parquet

    table = None
    with ExitStack() as stack:
        # Open the file here, because pyarrow accepts only names in UTF-8.
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
                # Dictionaries and ranges do not help here, because embeddings rarely repeat values.
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
    """Numbers as an Arrow array; null for missing values."""
    import pyarrow

    if is_cluster(name):
        return pyarrow.array(values, mask=values < 0)
    return pyarrow.array(values, from_pandas=True)


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether a data type is NumPy's StringDType."""
    return isinstance(dtype, np.dtypes.StringDType)


# --- NumPy ---------------------------------------------------------------------------------------


def write_npz(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write one array per column; see `export`."""
    dtypes: dict[str, np.dtype[Any]] = {}
    spools: dict[str, Any] = {}
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path, "w"))
        shape = (store.records, store.dimension)
        with _array_in(archive, "embedding", shape, store.array("embedding").dtype) as file:
            for part in parts:
                if not part.first:
                    dtypes = _in_numpy(store, part)
                    # An archive can write only one array at a time.
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
    """Data types of the columns. Text has a fixed width, so that no pickle is needed."""
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
                f"an identifier has {widths[name]:,} letters, and NumPy would need this width for"
                " each row; export to .parquet instead"
            )
    return {
        name: np.dtype(f"<U{max(1, widths[name])}") if name in widths else values.dtype
        for name, values in part.columns.items()
        # At the width of the longest, descriptions would be larger than the embeddings.
        if name != "description"
    }


@contextmanager
def _array_in(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[Any]:
    """An array file in an archive, open after its header; write the values to it."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        description = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_2_0(
            file, {"descr": description, "fortran_order": False, "shape": shape}
        )
        yield file


# --- HDF5 ----------------------------------------------------------------------------------------


class _Sink(Descriptor):
    """A file that HDF5 can always close; if it cannot, the process crashes at exit."""

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
    """Create an HDF5 file; also yield a function that raises any write error so far."""
    import h5py

    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w") as file:
            yield file, sink.check
        sink.check()


def write_hdf5_rows(path: Path, store: Store, parts: Iterable[Part]) -> int:
    """Write one dataset per row with an embedding; see `export`."""
    written = 0
    with hdf5(path) as (file, check):
        file.attrs[ATTRIBUTE] = about(store)
        for part in parts:
            columns = {name: values.tolist() for name, values in part.columns.items()}
            for number in np.flatnonzero(part.has_embedding).tolist():
                row = part.first + number
                # A slash would create groups, and a single dot names the group itself.
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
    """Write one dataset per column; see `export`."""
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
    """Create a dataset in a group; StringDType becomes HDF5 text of variable length."""
    import h5py

    kind = h5py.string_dtype() if is_text(dtype) else dtype
    return group.create_dataset(name, shape, kind)


def put(array: Any, first: int, values: NDArray[Any]) -> None:
    """Write values to an HDF5 or Zarr array from an index on, one chunk at a time.

    Zarr would write several chunks at once, and continue with the others after one has failed.
    """
    step = array.chunks[0] if array.chunks else max(1, len(values))
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        if is_text(piece.dtype):
            piece = piece.astype(object)  # all versions of h5py accept this
        array[first + start : first + start + len(piece)] = piece
