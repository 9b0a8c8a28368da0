"""A store's rows for other programs: CSV, Parquet, NumPy or HDF5, one chunk in memory at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial as bind
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from virnuc_dask import __version__
from virnuc_dask.config import Status
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.files import expanded, sync
from virnuc_dask.integrity import check_sequences
from virnuc_dask.store import ATTRIBUTE, TRANSLATED, Store
from virnuc_dask.streams import Descriptor

# A cell that begins with one of these is a formula to a spreadsheet. See OWASP, "CSV injection".
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_COMPRESSED = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Arrays of text in NumPy give each row the room of the longest.
_LONGEST_IN_NPZ = 1000


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one chunk.

    Attributes
    ----------
    first : int
        Row number of the first.
    columns : dict of str to list
        All but the embedding.
    has_embedding : ndarray, bool, shape (n,)
    embedding : ndarray, shape (n, D)
    """

    first: int
    columns: dict[str, list[Any]]
    has_embedding: NDArray[np.bool_]
    embedding: NDArray[np.floating[Any]]


def export(store: str | Path, out: str | Path, *, partial: bool = False, guard: bool = True) -> int:
    """Write a store's rows, in their order, into one file.

    Columns are `sequence_id`, `length`, `status`, of translated rows `read`, `window`, `frame` and
    `start`, and the embedding. What they are, model, weights, layer, pooling, precision and
    versions, is JSON text: in Parquet's schema and HDF5's root under ``virnuc_dask``, in NumPy's
    archive an array of that name, and beside CSV and TSV a file, ``OUT.json``.

    Parameters
    ----------
    store : path
    out : path
        Its suffix says how. ``.csv`` and ``.tsv``, also with ``.gz``, ``.bz2``, ``.xz`` or
        ``.zst``: a line for each row and a column for each feature, empty without an embedding.
        ``.parquet``: the embedding is one column of lists, null without. ``.npz``: an array for
        each column, NaN without an embedding. ``.h5``: a dataset for each row with an embedding,
        its other columns as attributes; it is named by the identifier, with ``_`` for a slash,
        and ``#`` and the row's number behind it where that name is taken.
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
        The suffix is not known, the package for it is not there, `out` or the file beside it
        exists, `out` is a URL, or an identifier is too long for NumPy.
    StoreError
        The store is not complete, or damaged.
    OSError
        `out` cannot be written.
    """
    opened, path = Store(store), Path(expanded(out))
    write = _writer(str(out), guard)
    beside = _beside(path)
    for file in (path, beside):
        if file and file.exists():
            raise UsageError(f"{file} exists; give another name, or remove it")
    missing = int((~opened.present()).sum())
    if missing and not partial:
        raise StoreError(
            f"{store} lacks {missing:,} of {opened.chunk_count:,} chunks: `virnuc-dask resume`"
            " computes them, --partial exports what is there"
        )
    if problem := check_sequences(opened):
        raise StoreError(f"{store}: {problem}; run again from the input, into another store")
    # Not with all of its name, which may be as long as a name can be.
    unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
    about = unfinished.with_suffix(".json")
    rubbish = {unfinished, about}
    try:
        rows = write(unfinished, opened, _read(opened))
        if beside:
            about.write_text(_about(opened) + "\n")
            sync(about)
        # Its name is for what survives a power cut.
        sync(unfinished)
        if beside:
            about.rename(beside)
            rubbish.add(beside)
        unfinished.rename(path)
        rubbish.discard(beside or path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (unfinished, about):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        for file in rubbish:
            file.unlink(missing_ok=True)
    return rows


def guarded(name: str) -> str:
    """An identifier that no spreadsheet computes: an apostrophe is put before a formula."""
    return "'" + name if name.startswith(_FORMULA) else name


def _beside(path: Path) -> Path | None:
    """The file that says what a table of text is, which has no place for it."""
    is_text = _format(path)[0] in _DELIMITERS
    return path.with_name(f"{path.name}.json") if is_text else None


def _format(path: Path) -> tuple[str, str | None]:
    """The suffix that names the format, and the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    return "".join(suffixes[-2:-1] if compression else suffixes[-1:]), compression


def _about(store: Store) -> str:
    """What the rows of an export are, as JSON text."""
    return json.dumps({**store.about(), "exported_by": f"virnuc_dask {__version__}"})


_Writer = Callable[[Path, Store, Iterable[_Part]], int]


def _writer(out: str, guard: bool) -> _Writer:
    if "://" in out:
        raise UsageError(f"{out}: exports go into a file on this machine")
    suffix, compression = _format(Path(out))
    if suffix in _DELIMITERS:
        delimiter = _DELIMITERS[suffix]
        return bind(_write_csv, delimiter=delimiter, compression=compression, guard=guard)
    writers: dict[str, tuple[_Writer, str]] = {
        ".npz": (_write_npz, "numpy"),
        ".parquet": (_write_parquet, "pyarrow"),
        ".h5": (_write_hdf5, "h5py"),
        ".hdf5": (_write_hdf5, "h5py"),
    }
    if suffix not in writers or compression:
        raise UsageError(
            f"{out}: cannot tell the format; known are .csv and .tsv (also .gz, .bz2, .xz, .zst),"
            " .parquet, .npz, .h5"
        )
    writer, package = writers[suffix]
    require(package, suffix)
    return writer


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


def _read(store: Store) -> Iterator[_Part]:
    try:
        yield from _parts(store)
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(f"{store.path}: cannot be read: {error}") from error


def _parts(store: Store) -> Iterator[_Part]:
    present, lengths = store.present(), store.lengths()
    origins = TRANSLATED[1:] if store.identity.translation else ()
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
            embedding = np.full((count, store.dimension), np.nan, store.array("embedding").dtype)
        states = [Status(code) for code in codes.tolist()]
        columns = {
            "sequence_id": store.read_ids(chunk),
            "length": lengths[rows].tolist(),
            "status": [state.meaning for state in states],
            **{name: np.asarray(store.array(name)[rows]).tolist() for name in origins},
        }
        done = [state != Status.PENDING and not state.quarantined for state in states]
        yield _Part(rows.start, columns, np.array(done), embedding)


def _write_csv(
    path: Path,
    store: Store,
    parts: Iterable[_Part],
    *,
    delimiter: str,
    compression: str | None,
    guard: bool,
) -> int:
    from xopen import xopen

    written = 0
    # threads=0: no helper process, so that an error is raised here, with its number.
    with xopen(path, "wt", newline="", format=compression, threads=0) as file:
        for part in parts:
            if not written:
                features = (f"feature_{number}" for number in range(store.dimension))
                file.write(delimiter.join([*part.columns, *features]) + "\n")
            ids, *others = part.columns.values()
            for row, name in enumerate(ids):
                if guard:
                    name = guarded(name)
                # In quotes always: a spreadsheet may take another separator for its own.
                cells = ['"' + name.replace('"', '""') + '"', *(str(o[row]) for o in others)]
                # As short as gives the same number back, in the store's own precision.
                values = part.embedding[row] if part.has_embedding[row] else [""] * store.dimension
                file.write(delimiter.join([*cells, *map(str, values)]) + "\n")
            written += len(ids)
    return written


def _write_parquet(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    import pyarrow
    from pyarrow import parquet

    written = 0
    table = None
    with ExitStack() as stack:
        # Not by its name, which pyarrow takes only in UTF-8.
        file = stack.enter_context(open(path, "wb"))
        for part in parts:
            lists = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(part.embedding.ravel()),
                store.dimension,
                mask=pyarrow.array(~part.has_embedding),
            )
            rows = pyarrow.table({**part.columns, "embedding": lists})
            rows = rows.replace_schema_metadata({ATTRIBUTE: _about(store)})
            if table is None:
                table = stack.enter_context(parquet.ParquetWriter(file, rows.schema))
            table.write_table(rows)
            written += rows.num_rows
    return written


def _write_npz(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    longest = max(len(name) for chunk in range(store.chunk_count) for name in store.read_ids(chunk))
    if longest > _LONGEST_IN_NPZ:
        raise UsageError(
            f"an identifier of {longest:,} letters: NumPy would give each row as much room; export"
            " to .parquet"
        )
    others: dict[str, list[NDArray[Any]]] = {}
    with zipfile.ZipFile(path, "w") as archive:
        shape = (store.records, store.dimension)
        with _array_in(archive, "embedding", shape, store.array("embedding").dtype) as file:
            for part in parts:
                file.write(np.where(part.has_embedding[:, None], part.embedding, np.nan))
                for name, values in part.columns.items():
                    others.setdefault(name, []).append(np.array(values))
        others[ATTRIBUTE] = [np.array(_about(store))]
        for name, pieces in others.items():
            # Text of fixed width, which takes no pickle to read.
            whole = np.concatenate(pieces) if pieces[0].ndim else pieces[0]
            with _array_in(archive, name, whole.shape, whole.dtype) as file:
                file.write(whole)
    return store.records


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


def _write_hdf5(path: Path, store: Store, parts: Iterable[_Part]) -> int:
    import h5py

    written = 0
    with _Sink(path, "w+") as sink, h5py.File(sink, "w") as file:
        file.attrs[ATTRIBUTE] = _about(store)
        for part in parts:
            for number in np.flatnonzero(part.has_embedding).tolist():
                row = part.first + number
                # A slash would make groups of it, and a lone dot is the group itself.
                key = part.columns["sequence_id"][number].replace("/", "_")
                while key in ("", ".") or key in file:
                    key += f"#{row}"
                dataset = file.create_dataset(key, data=part.embedding[number])
                dataset.attrs["row"] = row
                for name, values in part.columns.items():
                    dataset.attrs[name] = values[number]
                sink.check()
                written += 1
    sink.check()
    return written
