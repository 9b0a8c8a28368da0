"""Neighbours as a table, for other programs: TSV or Parquet."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

from virnuc_dask.analysis.formats import guarded, require
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync
from virnuc_dask.streams import printable


def write_table(found: Any, out: str | Path | IO[str], *, guard: bool = True) -> int:
    """Write neighbours as a table, one in a line.

    The columns are ``query``, ``rank`` from 1, ``neighbour``, ``row``, ``similarity`` or
    ``distance``, and the neighbour's ``length`` in residues and ``description``. Where a query has
    fewer neighbours than were asked for, it has fewer lines.

    Parameters
    ----------
    found : xarray.Dataset
        What `nearest` returns.
    out : path or text file
        A new file, ``.tsv`` or ``.parquet``; or an open file, for TSV. On a terminal control
        characters are replaced.
    guard : bool
        In TSV, put an apostrophe before a name that a spreadsheet would compute.

    Returns
    -------
    int
        Lines without the header.

    Raises
    ------
    UsageError
        As `check_table`.
    OSError
        The file cannot be written.
    """
    columns = _columns(found)
    if not isinstance(out, str | Path):
        _write_tsv(columns, out, guard)
        return len(columns["row"])
    path = check_table(out)
    # Not with all of its name, which may be as long as a name can be.
    unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        if path.suffix.lower() == ".tsv":
            with open(unfinished, "w", encoding="utf-8", newline="") as file:
                _write_tsv(columns, file, guard)
        else:
            _write_parquet(columns, found.attrs, unfinished)
        # Its name is for what survives a power cut.
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return len(columns["row"])


def check_table(out: str | Path) -> Path:
    """The path of a table that can be written. To be asked before a search, which may take long.

    Raises
    ------
    UsageError
        It is a URL, its suffix is not known, pyarrow is not there, the file exists, or its
        directory does not.
    """
    if "://" in str(out):
        raise UsageError(f"{out}: tables go into a file on this machine")
    path = Path(expanded(out))
    if path.suffix.lower() not in (".tsv", ".parquet"):
        raise UsageError(f"{out}: cannot tell the format; known are .tsv and .parquet")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", ".parquet")
    if path.exists():
        raise UsageError(f"{path} exists; give another name, or remove it")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"{path}: {path.parent} is no directory that can be written to")
    return path


def _columns(found: Any) -> dict[str, list[Any]]:
    score = "similarity" if "similarity" in found else "distance"
    query, rank = np.nonzero(found.row.values >= 0)
    columns = {
        "query": found.query_id.values[query].tolist(),
        "rank": (rank + 1).tolist(),
        "neighbour": found.sequence_id.values[query, rank].tolist(),
        "row": found.row.values[query, rank].tolist(),
        # As short as gives the same number back.
        score: list(found[score].values[query, rank]),
        "length": found.length.values[query, rank].tolist(),
    }
    if "description" in found:
        columns["description"] = found.description.values[query, rank].tolist()
    return columns


def _write_tsv(columns: dict[str, list[Any]], file: IO[str], guard: bool) -> None:
    def shown(name: str) -> str:
        name = printable(name, len(name)) if file.isatty() else name
        return guarded(name) if guard else name

    texts = ("query", "neighbour", "description")
    names = {name: map(shown, columns[name]) for name in texts if name in columns}
    # Quotes are put around what would be taken for a tab, a line's end or a quote.
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(columns | names).values(), strict=True))


def _write_parquet(columns: dict[str, list[Any]], about: dict[str, Any], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    types = {"query": text, "neighbour": text, "description": text, "rank": number, "row": number}
    types["length"] = pyarrow.int32()
    # Said, as nothing tells in a table without a line.
    fields = [(name, types.get(name, pyarrow.float32())) for name in columns]
    table = pyarrow.table(columns, schema=pyarrow.schema(fields))
    table = table.replace_schema_metadata({name: str(value) for name, value in about.items()})
    # Not by its name, which pyarrow takes only in UTF-8.
    with open(path, "wb") as file:
        parquet.write_table(table, file)
