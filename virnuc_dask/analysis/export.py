"""A store's rows for other programs: one file, whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial as bind
from pathlib import Path
from uuid import uuid4

from virnuc_dask.analysis.annotated import is_annotated, write_h5ad, write_zarr
from virnuc_dask.analysis.formats import (
    Part,
    Writer,
    about,
    is_about,
    read_parts,
    require,
    write_csv,
    write_hdf5_matrix,
    write_hdf5_rows,
    write_npz,
    write_parquet,
)
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.files import expanded, sync, sync_tree
from virnuc_dask.store.checks import check_sequences
from virnuc_dask.store.store import Store

_COMPRESSED = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HDF5 = (".h5", ".hdf5")
_DIRECTORY = ".zarr"
Progress = Callable[[int, int], None]


def export(
    store: str | Path,
    out: str | Path,
    *,
    partial: bool = False,
    guard: bool = True,
    matrix: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a store's rows, in their order, into one file.

    Columns are `sequence_id`, `length`, `status`, `description`, `source`, of translated rows
    `read_id`, the name of the read, and `read`, `window`, `frame` and `start`, of tiles of proteins
    `read_id`, `read` and `start`, and the embedding, in the precision of the store. What they are,
    model, weights, layer, pooling, precision and versions, is JSON text: in Parquet's schema,
    HDF5's root and AnnData's `uns` under ``virnuc_dask``, in NumPy's archive an array of that name,
    and beside CSV and TSV a file, ``OUT.json``. Rows go through memory in parts of 16 MB of
    embeddings, or one chunk; AnnData takes about 20 bytes more for each row of all, and 4 for each
    cluster_NAME.

    Parameters
    ----------
    store : path
    out : path
        Its suffix says how. ``.csv`` and ``.tsv``, also with ``.gz``, ``.bz2``, ``.xz`` or
        ``.zst``: a line for each row and a column for each feature, empty without an embedding.
        ``.parquet``: the embedding is one column of lists of fixed size, null without. ``.npz``:
        an array for each column but `description`, NaN without an embedding. ``.h5``: a dataset for
        each row with an embedding, its other columns as attributes, unless they are longer than 32
        KiB; it is named by the identifier, with ``_`` for a slash, and ``#`` and the row's number
        behind it where that name is taken. ``.h5ad``, and ``.zarr``, a directory in Zarr's format
        3: AnnData with embeddings as `X`, NaN without, and all else as `obs`, whose index is the
        identifiers, with ``#`` and the row's number behind those that were there before. States and
        clusters are categorical there. anndata reads the latter from 0.12 on. In all of them a row
        without a cluster has none: an empty cell, null or NaN; in ``.npz`` and ``.h5`` it is -1.
    partial : bool
        Also of a store that is not complete.
    guard : bool
        In CSV and TSV, put an apostrophe before a name that a spreadsheet would compute.
    matrix : bool
        In ``.h5``, a dataset for each column, such as `embedding`, shape (n, D), NaN without an
        embedding, instead of one for each row.
    force : bool
        Replace `out`, and the file beside it, once the new one is whole: only a file, or for
        ``.zarr`` a directory that is AnnData and nothing else.
    progress : callable, optional
        Called with the rows written and their total.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    UsageError
        The suffix is not known, the package for it is not there, `out` or the file beside it
        exists or, with `force`, is nothing that may be replaced, `out` is a URL, `matrix` is not
        for it, or an identifier is too long for NumPy.
    StoreError
        The store is not complete, or damaged.
    OSError
        `out` cannot be written.
    """
    opened, path = Store(store), Path(expanded(out))
    write = _writer(str(out), guard=guard, matrix=matrix)
    beside = _beside(path)
    targets = [path, beside] if beside else [path]
    _check_free(targets, force=force)
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
    described = unfinished.with_suffix(".json")
    try:
        rows = write(unfinished, opened, _counted(opened, progress))
        if beside:
            described.write_text(about(opened) + "\n")
            sync(described)
        # Its name is for what survives a power cut.
        (sync_tree if unfinished.is_dir() else sync)(unfinished)
        _check_free(targets, force=force)  # another may be there by now
        _publish(unfinished, path, described, beside)
    except OSError as error:
        file = error.filename and Path(error.filename)
        if file and not {unfinished, described} & {file, *file.parents}:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        _remove(unfinished)
        _remove(described)
    return rows


def _beside(path: Path) -> Path | None:
    """The file that says what a table of text is, which has no place for it."""
    is_text = _format(path)[0] in _DELIMITERS
    return path.with_name(f"{path.name}.json") if is_text else None


def _format(path: Path) -> tuple[str, str | None]:
    """The suffix that names the format, and the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    return "".join(suffixes[-2:-1] if compression else suffixes[-1:]), compression


def _writer(out: str, *, guard: bool, matrix: bool) -> Writer:
    if "://" in out:
        raise UsageError(f"{out}: exports go into a file on this machine")
    suffix, compression = _format(Path(out))
    if matrix and suffix not in _HDF5:
        raise UsageError(f"{out}: --matrix is for .h5")
    if suffix in _DELIMITERS:
        delimiter = _DELIMITERS[suffix]
        return bind(write_csv, delimiter=delimiter, compression=compression, guard=guard)
    hdf5 = write_hdf5_matrix if matrix else write_hdf5_rows
    writers: dict[str, tuple[Writer, str]] = {
        ".npz": (write_npz, "numpy"),
        ".parquet": (write_parquet, "pyarrow"),
        **dict.fromkeys(_HDF5, (hdf5, "h5py")),
        ".h5ad": (write_h5ad, "h5py"),
        _DIRECTORY: (write_zarr, "zarr"),
    }
    if suffix not in writers or compression:
        raise UsageError(
            f"{out}: cannot tell the format; known are .csv and .tsv (also .gz, .bz2, .xz, .zst),"
            " .parquet, .npz, .h5, .h5ad, .zarr"
        )
    writer, package = writers[suffix]
    require(package, suffix)
    return writer


def _check_free(targets: list[Path], *, force: bool) -> None:
    """Whether an export may be put somewhere. A link is never replaced, nor a store."""
    for target in filter(os.path.lexists, targets):
        if not force:
            raise UsageError(f"{target} exists; give another name, or --force, which replaces it")
        if _format(target)[0] == _DIRECTORY:
            if not is_annotated(target):
                raise UsageError(
                    f"{target} is not replaced: it is no directory that is AnnData and nothing else"
                )
        elif target.is_symlink() or not target.is_file():
            raise UsageError(f"{target} is not replaced: it is no file")
        elif target.suffix == ".json" and not is_about(target):
            raise UsageError(f"{target} is not replaced: it is not of an export")


def _counted(store: Store, progress: Progress | None) -> Iterator[Part]:
    for part in read_parts(store):
        yield part
        if progress:
            progress(part.first + len(part.codes), store.records)


def _publish(unfinished: Path, path: Path, described: Path, beside: Path | None) -> None:
    """Give an export its name, and remove what it replaces.

    A file is replaced in one step. A directory cannot be, nor can a table together with the file
    beside it: the old directory, or the old file beside, is set aside first.
    """
    old = beside or path
    is_aside = old.is_dir() or (beside is not None and beside.exists())
    aside = unfinished.with_suffix(".old")
    try:
        if is_aside:
            old.rename(aside)
        unfinished.rename(path)
    except BaseException:
        if os.path.lexists(aside) and os.path.lexists(unfinished):
            aside.rename(old)
        raise
    if beside:
        described.rename(beside)
    sync(path.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        # An error here would hide the one that ended the export.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
