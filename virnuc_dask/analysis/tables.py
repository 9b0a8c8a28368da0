"""Tables of results for other programs, as TSV or Parquet.

A missing number is an empty cell in TSV and null in Parquet. A missing text is empty in both.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from virnuc_dask.analysis.formats import guarded, require
from virnuc_dask.analysis.outputs import check_out, whole_file
from virnuc_dask.text import printable

# Values of some lines, by column name.
Columns = Mapping[str, Any]

_SUFFIXES = (".tsv", ".parquet")
_TEXT = "string"
_FLOATS = ("float32", "float64")
_TYPES = {
    "query": _TEXT,
    "query_row": "int64",
    "rank": "int64",
    "neighbour": _TEXT,
    "row": "int64",
    "similarity": "float32",
    "distance": "float32",
    "length": "int32",
    "status": _TEXT,
    "description": _TEXT,
    "label": _TEXT,
    "labels": _TEXT,
    "reliability": "float32",
}


def write_table(
    found: Any, out: str | Path | IO[str], *, guard: bool = True, force: bool = False
) -> int:
    """Write neighbours as a table, one per line.

    The columns are ``query``, ``query_row``, ``rank`` from 1, ``neighbour``, ``row``,
    ``similarity`` or ``distance``, and the neighbour's ``length`` in residues, ``status`` and
    ``description``. A query with fewer than k neighbours has fewer lines. Queries that are vectors
    have no name and no row.

    Parameters
    ----------
    found : xarray.Dataset
        Neighbours from `nearest`.
    out : path or text file
        A new file, ``.tsv`` or ``.parquet``, or an open file for TSV. A terminal gets aligned
        columns with four decimals, and no control characters.
    guard : bool
        In TSV, put an apostrophe before names that a spreadsheet reads as formulas.
    force : bool
        Replace an existing file once the new one is complete.

    Returns
    -------
    int
        Number of lines without the header.

    Raises
    ------
    UsageError
        As in `check_table`.
    OSError
        The file cannot be written.
    """
    columns = _columns(found)
    types = {name: _TYPES[name] for name in columns}
    return write_rows([columns], types, out, about=found.attrs, guard=guard, force=force)


def write_annotations(
    parts: Iterable[Any], out: str | Path | IO[str], *, guard: bool = True, force: bool = False
) -> int:
    """Write annotations as a table, one row per line, part by part.

    The columns are ``query``, ``query_row``, ``label``, ``reliability``, ``labels``,
    ``neighbour``, ``row``, ``similarity`` or ``distance``, ``length``, ``status`` and
    ``description``. A row without a neighbour has reliability 0 and no other values.

    Parameters
    ----------
    parts : iterable of xarray.Dataset
        Parts from `annotate_in_parts`, at least one.
    out, guard, force
        As in `write_table`.

    Returns
    -------
    int
        Number of lines without the header.

    Raises
    ------
    UsageError, OSError
        As in `write_table`.
    """
    rest = iter(parts)
    first = next(rest)
    types = {name: _TYPES[name] for name in _annotated(first)}
    columns = map(_annotated, chain([first], rest))
    return write_rows(columns, types, out, about=first.attrs, guard=guard, force=force)


def write_rows(
    parts: Iterable[Columns],
    types: Mapping[str, str],
    out: str | Path | IO[str],
    *,
    about: Mapping[str, Any],
    guard: bool = True,
    force: bool = False,
) -> int:
    """Write a table part by part, with only one part in memory.

    Parameters
    ----------
    parts : iterable of mapping
        Values of some lines, a list or array per column. None and NaN are missing numbers; a
        missing text is empty.
    types : mapping of str to str
        Columns and their Parquet types, by pyarrow's names.
    out : path or text file
        A file, ``.tsv`` or ``.parquet``, or an open file for TSV. A terminal gets aligned columns
        with four decimals, and no control characters.
    about : mapping
        Description of the table, for the metadata of Parquet's schema.
    guard : bool
        In TSV, put an apostrophe before names that a spreadsheet reads as formulas.
    force : bool
        Replace an existing file once the new one is complete.

    Returns
    -------
    int
        Number of lines without the header.

    Raises
    ------
    UsageError
        As in `check_table`.
    OSError
        The file cannot be written.
    """
    lines = 0
    with ExitStack() as stack:
        if isinstance(out, str | Path):
            path = stack.enter_context(whole_file(check_table(out, force=force)))
            write = stack.enter_context(_writer(path, types, about, guard))
        else:
            write = _shown(out, types) if out.isatty() else _tsv_writer(out, types, guard)
        for columns in parts:
            write({name: _without_nan(columns[name], kind) for name, kind in types.items()})
            lines += len(next(iter(columns.values())))
    return lines


def check_table(out: str | Path, *, force: bool = False, kept: str = "") -> Path:
    """Check that a table can be written, before a search that may take long; return its path.

    Parameters
    ----------
    out : path
    force, kept
        As in `check_out`.

    Raises
    ------
    UsageError
        It is a URL, its suffix is not known, pyarrow is not installed, the file exists, or its
        directory does not exist or is not writable.
    """
    path = check_out(out, _SUFFIXES, force=force, kept=kept)
    if path.suffix.lower() == ".parquet":
        require("pyarrow", ".parquet")
    return path


def _without_nan(values: Any, kind: str) -> Any:
    """Replace NaN, which only floats have, by None."""
    return [None if value != value else value for value in values] if kind in _FLOATS else values


def none_below_zero(numbers: Iterable[int]) -> list[int | None]:
    """Row numbers and lengths as cells; -1, which means no row, becomes None."""
    return [None if number < 0 else number for number in numbers]


def _columns(found: Any) -> dict[str, list[Any]]:
    score = "similarity" if "similarity" in found else "distance"
    query, rank = np.nonzero(found.row.values >= 0)
    columns = {
        "query": found.query_id.values[query].tolist(),
        "query_row": none_below_zero(found.query_row.values[query].tolist()),
        "rank": (rank + 1).tolist(),
        "neighbour": found.sequence_id.values[query, rank].tolist(),
        "row": found.row.values[query, rank].tolist(),
        # Scalars stay float32, so that they print as the shortest exact text.
        score: list(found[score].values[query, rank]),
        "length": found.length.values[query, rank].tolist(),
        "status": found.status.values[query, rank].tolist(),
    }
    if "description" in found:
        columns["description"] = found.description.values[query, rank].tolist()
    return columns


def _annotated(part: Any) -> Columns:
    score = "similarity" if "similarity" in part else "distance"
    names = ["label", "reliability", "labels", "sequence_id", "row"]
    names += [score, "length", "status", "description"]
    columns = {
        "query": part.query_id.values.tolist(),
        "query_row": part.query_row.values.tolist(),
    }
    for name in filter(part.__contains__, names):
        values = part[name].values
        # Scalars stay float32, so that they print as the shortest exact text.
        cells = list(values) if values.dtype == np.float32 else values.tolist()
        if name in ("row", "length"):
            cells = none_below_zero(cells)
        columns["neighbour" if name == "sequence_id" else name] = cells
    return columns


@contextmanager
def _writer(
    path: Path, types: Mapping[str, str], about: Mapping[str, Any], guard: bool
) -> Iterator[Callable[[Columns], None]]:
    if path.suffix.lower() == ".tsv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            yield _tsv_writer(file, types, guard)
        return
    import pyarrow
    from pyarrow import parquet

    # The types must be given, because a table without lines does not show them.
    schema = pyarrow.schema(
        [(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()],
        {name: str(value) for name, value in about.items()},
    )
    # Open the file here, because pyarrow accepts only names in UTF-8.
    with open(path, "wb") as sink, parquet.ParquetWriter(sink, schema) as table:
        yield lambda columns: table.write_table(
            pyarrow.table({name: list(columns[name]) for name in types}, schema=schema)
        )


def _shown(terminal: IO[str], types: Mapping[str, str]) -> Callable[[Columns], None]:
    """Aligned columns for people, without control characters and with four decimals."""
    widths = {name: len(name) for name in types}
    is_first = True

    def shown(value: Any, kind: str) -> str:
        if value is None:
            return ""
        text = f"{value:.4f}" if kind in _FLOATS else str(value)
        return printable(text, len(text))

    def write(columns: Columns) -> None:
        nonlocal is_first
        cells = {
            name: [shown(value, kind) for value in columns[name]] for name, kind in types.items()
        }
        for name, texts in cells.items():
            widths[name] = max(widths[name], *map(len, texts)) if texts else widths[name]
        lines = [*([tuple(types)] if is_first else []), *zip(*cells.values(), strict=True)]
        is_first = False
        for line in lines:
            padded = (
                f"{cell:<{width}}" if types[name] == _TEXT else f"{cell:>{width}}"
                for cell, (name, width) in zip(line, widths.items(), strict=True)
            )
            terminal.write("  ".join(padded).rstrip() + "\n")

    return write


def _tsv_writer(file: IO[str], types: Mapping[str, str], guard: bool) -> Callable[[Columns], None]:
    # The writer quotes cells that contain a tab, a line end or a quote.
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(types)

    def write(columns: Columns) -> None:
        cells = (
            map(guarded, columns[name]) if guard and kind == _TEXT else columns[name]
            for name, kind in types.items()
        )
        writer.writerows(zip(*cells, strict=True))

    return write
