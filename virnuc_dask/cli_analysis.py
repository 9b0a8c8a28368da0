"""The commands of analysis: what people do with a store that is there, or still filling."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from virnuc_dask.config import METRICS
from virnuc_dask.interrupts import cleaning_up


@click.command()
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--partial", is_flag=True, help="Also of a store that is not complete.")
@click.option(
    "--guard/--no-guard",
    default=True,
    help="In CSV and TSV, an apostrophe before names that a spreadsheet would compute.",
    show_default=True,
)
@click.option("--matrix", is_flag=True, help="In HDF5, one matrix instead of a dataset a row.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT, and OUT.json beside a table, once the new one is whole.",
)
def export(store: str, out: Path, **options: bool) -> None:
    """Write STORE's rows into OUT.csv, .tsv, .parquet, .npz, .h5, .h5ad, or .zarr (AnnData)."""
    from virnuc_dask.analysis.export import export as write

    with cleaning_up():
        rows = write(store, out, progress=chunk_counter("wrote", "rows"), **options)
    print(f"{rows:,} rows in {out}")


@click.command()
@click.argument("store")
@click.option(
    "--query",
    "queries",
    multiple=True,
    metavar="ID",
    help="Of a row of STORE, or of --query-store; may be given several times.  [default: all rows"
    " of --query-store]",
)
@click.option("--query-store", help="Another store, of the same weights, layer and pooling.")
@click.option("--k", type=click.IntRange(1), default=10, show_default=True, help="Neighbours each.")
@click.option("--metric", type=click.Choice(METRICS), default="cosine", show_default=True)
@click.option(
    "--centre/--no-centre",
    default=True,
    show_default=True,
    help="Subtract the mean of STORE's rows first; for the cosine.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Threads.  [default: one a core, at most 16]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A .tsv or .parquet file.  [default: TSV to standard output]",
)
@click.option(
    "--guard/--no-guard",
    default=True,
    help="In TSV, an apostrophe before names that a spreadsheet would compute.",
    show_default=True,
)
def nearest(
    store: str,
    queries: tuple[str, ...],
    query_store: str | None,
    out: Path | None,
    guard: bool,
    **options: Any,
) -> None:
    """Find the rows of STORE whose embeddings are nearest to those of each query.

    A line for each neighbour: query, rank, neighbour, row, similarity, length, description.
    """
    from virnuc_dask.analysis.neighbours import nearest as search
    from virnuc_dask.analysis.tables import check_table, write_table

    if out:
        check_table(out)
    progress = chunk_counter("searched", "chunks")
    ids = list(queries) or None
    found = search(store, ids, query_store=query_store, progress=progress, **options)
    for name in ("note", "comment"):
        if name in found.attrs:
            print(f"{name}: {found.attrs[name]}", file=sys.stderr)
    with cleaning_up():
        lines = write_table(found, out or sys.stdout, guard=guard)
    if out:
        print(f"{lines:,} neighbours in {out}")


COMMANDS = (export, nearest)


def chunk_counter(verb: str, noun: str) -> Callable[[int, int], None] | None:
    """A line on a terminal that says how far something is."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{verb} {done:,} of {total:,} {noun}", end=end, file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None
