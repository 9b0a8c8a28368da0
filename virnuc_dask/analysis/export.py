"""Export of a store's rows for other programs. A partial file never appears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial as bind
from pathlib import Path
from uuid import uuid4

from virnuc_dask.analysis.anndata_files import is_annotated, write_h5ad, write_zarr
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
from virnuc_dask.store.chunk_checks import check_sequences
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
    """Export a store's rows, in their order, to one file.

    The columns are `sequence_id`, `length`, `status`, `description`, `source`, and the embedding,
    in the precision of the store. Translated rows also have `read_id` (the name of the read),
    `read`, `window`, `frame` and `start`; tiles of proteins have `read_id`, `read` and `start`.

    JSON text describes the model, weights, layer, pooling, precision and versions. Its name is
    ``virnuc_dask`` in Parquet's schema, HDF5's root and AnnData's `uns`, and as an array in NumPy's
    archive. For CSV and TSV it is a separate file, ``OUT.json``.

    Memory holds 16 MB of embeddings, or one chunk, at a time. AnnData needs about 20 bytes more
    for each row of the store, and 4 for each cluster_NAME.

    Parameters
    ----------
    store : path
    out : path
        The suffix selects the format.

        ``.csv`` and ``.tsv``, also with ``.gz``, ``.bz2``, ``.xz`` or ``.zst``: one line per row
        and one column per feature; cells are empty without an embedding.

        ``.parquet``: the embedding is one column of fixed-size lists, null without an embedding.

        ``.npz``: one array per column except `description`; NaN without an embedding.

        ``.h5``: one dataset per row with an embedding. The other columns are its attributes, unless
        they are longer than 32 KiB. Its name is the identifier with ``_`` for each slash, plus
        ``#`` and the row number if the name is taken.

        ``.h5ad`` and ``.zarr`` (a directory in Zarr format 3, for anndata from 0.12 on): AnnData
        with embeddings in `X`, NaN without an embedding, and the other columns in `obs`. The index
        is the identifiers, plus ``#`` and the row number for repeated ones. Status and clusters are
        categorical.

        A row without a cluster has an empty cell, null or NaN; in ``.npz`` and ``.h5`` it has -1.
    partial : bool
        Also export a store that is not complete.
    guard : bool
        In CSV and TSV, put an apostrophe before names that a spreadsheet reads as formulas.
    matrix : bool
        In ``.h5``, write one dataset per column instead of one per row. `embedding` then has shape
        (n, D), NaN without an embedding.
    force : bool
        Replace `out`, and ``OUT.json``, once the new ones are complete. Only a file is replaced;
        for ``.zarr``, only a directory that contains AnnData and nothing else.
    progress : callable, optional
        Called with the number of rows written so far and their total.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    UsageError
        The suffix is not known or its package is not installed; `out` or ``OUT.json`` exists or,
        with `force`, may not be replaced; `out` is a URL; `matrix` does not fit the format; or an
        identifier is too long for NumPy.
    StoreError
        The store is damaged or not complete.
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
            " computes them; --partial exports the rows that exist"
        )
    if problem := check_sequences(opened):
        raise StoreError(f"{store}: {problem}; run again from the input into another store")
    # Do not add to the final name, which may already have the maximum length.
    unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
    described = unfinished.with_suffix(".json")
    try:
        rows = write(unfinished, opened, _counted(opened, progress))
        if beside:
            described.write_text(about(opened) + "\n")
            sync(described)
        # Only a file that survives a power cut may get the final name.
        (sync_tree if unfinished.is_dir() else sync)(unfinished)
        _check_free(targets, force=force)  # another process may have created one
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
    """The JSON file for CSV and TSV, which cannot contain the description."""
    is_text = _format(path)[0] in _DELIMITERS
    return path.with_name(f"{path.name}.json") if is_text else None


def _format(path: Path) -> tuple[str, str | None]:
    """Suffix of the format, and the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    return "".join(suffixes[-2:-1] if compression else suffixes[-1:]), compression


def _writer(out: str, *, guard: bool, matrix: bool) -> Writer:
    if "://" in out:
        raise UsageError(f"{out}: an export must be a file on this machine")
    suffix, compression = _format(Path(out))
    if matrix and suffix not in _HDF5:
        raise UsageError(f"{out}: --matrix is for .h5 only")
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
    """Refuse targets that exist or must not be replaced, such as links and stores."""
    for target in filter(os.path.lexists, targets):
        if not force:
            raise UsageError(f"{target} exists; give another name, or --force, which replaces it")
        if _format(target)[0] == _DIRECTORY:
            if not is_annotated(target):
                raise UsageError(
                    f"{target} is not replaced: it is not a directory with AnnData and nothing else"
                )
        elif target.is_symlink() or not target.is_file():
            raise UsageError(f"{target} is not replaced: it is not a regular file")
        elif target.suffix == ".json" and not is_about(target):
            raise UsageError(f"{target} is not replaced: it does not belong to an export")


def _counted(store: Store, progress: Progress | None) -> Iterator[Part]:
    for part in read_parts(store):
        yield part
        if progress:
            progress(part.first + len(part.codes), store.records)


def _publish(unfinished: Path, path: Path, described: Path, beside: Path | None) -> None:
    """Move an export to its final name, and remove the old one.

    One step replaces a file. It cannot replace a directory, or a table together with its JSON file,
    so the old directory or the old JSON file is first moved aside.
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
        # An error here would hide the error that ended the export.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
