"""Analysis commands. They work on complete stores and on stores that a run still fills."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from virnuc_dask.cli.interrupts import cleaning_up
from virnuc_dask.settings import CLASSIFIERS, CONSENSUS, METRICS
from virnuc_dask.text import counted, printable

if TYPE_CHECKING:
    from virnuc_dask.analysis.labels import LeaveOneOut

# --- options that several commands share ---------------------------------------------------------

_force = click.option("--force", is_flag=True, help="Replace OUT once the new file is complete.")
_guard = click.option(
    "--guard/--no-guard",
    default=True,
    help="In CSV and TSV, put an apostrophe before names that a spreadsheet reads as formulas.",
    show_default=True,
)
_metric = click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="cosine",
    show_default=True,
    help="Compare directions of embeddings, or their distances.",
)
_out_table = click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write a .tsv or .parquet file.  [default: standard output]",
)
_workers = click.option(
    "--workers", type=click.IntRange(1), help="Threads.  [default: one per core, at most 16]"
)
_seed = click.option(
    "--random-state",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of random choices: the same seed, the same result.",
)
_refit = click.option("--refit", is_flag=True, help="Fit again to all rows embedded now.")


# --- the commands --------------------------------------------------------------------------------


@click.command()
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--partial", is_flag=True, help="Also export a store that is not complete.")
@_guard
@click.option(
    "--matrix", is_flag=True, help="In HDF5, write one matrix instead of one dataset per row."
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT, and OUT.json beside a table, once the new files are complete.",
)
def export(store: str, out: Path, **options: bool) -> None:
    """Export STORE's rows to OUT.csv, .tsv, .parquet, .npz, .h5, .h5ad, or .zarr (AnnData)."""
    import logging

    from virnuc_dask.analysis.export import export as write
    from virnuc_dask.store.store import Store

    # Zarr writes several files at once: one error is reported, asyncio would log the others.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with cleaning_up():
        rows = write(store, out, progress=chunk_counter("wrote", "rows"), **options)
    _say_doubts([], Store(store).model.comment().get("comment"))
    print(f"{rows:,} rows in {out}")


@click.command()
@click.argument("store")
@click.option(
    "--query",
    "queries",
    multiple=True,
    metavar="ID",
    help="Identifier of a row of STORE, or of --query-store if given; that of a read or tiled"
    " protein stands for all its rows; repeatable.  [default: all rows of --query-store]",
)
@click.option(
    "--query-store", help="Another store with the same weights, layer, pooling and precision."
)
@click.option("--index", help="Index of STORE from `index`, for a fast approximate search.")
@click.option(
    "--k", type=click.IntRange(1), default=10, show_default=True, help="Neighbours per query."
)
@_metric
@click.option(
    "--centre/--no-centre",
    default=True,
    show_default=True,
    help="Subtract the mean of STORE's rows first; cosine only.",
)
@_workers
@_out_table
@_force
@_guard
def nearest(
    store: str,
    queries: tuple[str, ...],
    query_store: str | None,
    out: Path | None,
    force: bool,
    guard: bool,
    **options: Any,
) -> None:
    """Find the rows of STORE with the embeddings nearest to each query.

    One line per neighbour: query, query_row, rank, neighbour, row, similarity, length, status,
    description. A terminal gets aligned columns, a pipe gets TSV.
    """
    from virnuc_dask.analysis.neighbours import nearest as search
    from virnuc_dask.analysis.neighbours import random_pairs
    from virnuc_dask.analysis.tables import check_table, write_table

    if out:
        check_table(out, force=force)
    progress = chunk_counter("searched", "chunks")
    ids = list(queries) or None
    neighbours = search(store, ids, query_store=query_store, progress=progress, **options)
    _say_attrs(neighbours.attrs)
    if random := random_pairs(neighbours.attrs):
        print(f"for comparison: {random}", file=sys.stderr)
    with cleaning_up():
        lines = write_table(neighbours, out or sys.stdout, guard=guard, force=force)
    if out:
        print(f"{lines:,} neighbours in {out}")


@click.command("index")
@click.argument("store")
@click.argument("out", required=False)
@_seed
@click.option("--refit", is_flag=True, help="Learn the lists again from all rows embedded now.")
@_workers
@click.option("--force", is_flag=True, help="Replace a damaged index, or one of another store.")
def index_(store: str, out: str | None, **options: Any) -> None:
    """Build an approximate index of STORE's rows for `nearest --index`, or add missing rows.

    OUT is a directory; default: STORE.faiss. It takes one byte per feature of each row.
    """
    from virnuc_dask.analysis.approximate import build_index

    with cleaning_up():
        path = build_index(store, out, progress=chunk_counter("added", "chunks"), **options)
    print(f"index in {path}")


@click.command()
@click.argument("store")
@click.option(
    "--labels",
    required=True,
    metavar="FILE",
    help="Text file; each line: identifier, tab, label. The identifier of a read or tiled protein"
    " labels all its rows. Several lines give several labels. Or the word source: each row has the"
    " name of its input file.",
)
@click.option(
    "--reference", help="Store with the labelled rows and the same weights.  [default: STORE]"
)
@click.option(
    "--k", type=click.IntRange(1), default=1, show_default=True, help="Neighbours per row."
)
@_metric
@click.option(
    "--centre/--no-centre",
    default=True,
    show_default=True,
    help="Subtract the mean of the reference's rows first; cosine only.",
)
@click.option(
    "--leave-one-out",
    "is_leave_one_out",
    is_flag=True,
    help="Annotate each labelled row of the reference from the others, and report the accuracy.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --leave-one-out.")
@_workers
@_out_table
@_force
@_guard
def annotate(
    store: str,
    labels: str,
    reference: str | None,
    is_leave_one_out: bool,
    as_json: bool,
    out: Path | None,
    force: bool,
    guard: bool,
    **options: Any,
) -> None:
    """Give each row of STORE the label of the nearest labelled row of a reference.

    A row is not its own neighbour. One line per row: query, query_row, label, reliability from 0
    to 1, all labels of the k neighbours. Then, for the nearest neighbour with the label:
    identifier, row, similarity, length, status, description. A terminal gets aligned columns, a
    pipe gets TSV.
    """
    from virnuc_dask.analysis import labels as analysis
    from virnuc_dask.analysis.tables import check_table, write_annotations

    if is_leave_one_out and out:
        raise click.UsageError(
            "--leave-one-out prints counts and takes no --out; without it, annotate writes the"
            " label of each row, which is not a neighbour of itself"
        )
    if as_json and not is_leave_one_out:
        raise click.UsageError("--json works only with --leave-one-out; --out can write Parquet")
    if out:
        check_table(out, force=force)
    progress = None if as_json else chunk_counter("searched", "chunks")
    if is_leave_one_out:
        accuracy = analysis.leave_one_out(reference or store, labels, progress=progress, **options)
        if as_json:
            print(json.dumps(accuracy.to_json()))
        else:
            _show_accuracy(accuracy)
        return
    parts = analysis.annotate_in_parts(
        store, labels, reference=reference, progress=progress, **options
    )
    with cleaning_up():
        first = next(parts)
        _say_attrs(first.attrs)
        lines = write_annotations(
            chain([first], parts), out or sys.stdout, guard=guard, force=force
        )
    if out:
        print(f"{lines:,} rows in {out}")


def _show_accuracy(found: LeaveOneOut) -> None:
    _say_attrs(found.about)
    print(f"{'label':<32} {'rows':>9} {'given':>9} {'correct':>9} {'precision':>9} {'recall':>7}")
    for each in found.labels:
        precision = "-" if each.precision is None else f"{each.precision:.1%}"
        print(
            f"{printable(each.label, 32):<32} {each.support:>9,} {each.predicted:>9,}"
            f" {each.correct:>9,} {precision:>9} {each.recall:>7.1%}"
        )
    print(
        f"{found.correct:,} of {found.rows:,} rows correct: accuracy {found.accuracy:.1%}, balanced"
        f" {found.balanced_accuracy:.1%}; always the most frequent label: {found.baseline:.1%}"
    )
    for part in found.reliable:
        print(
            f"the most reliable {part.share:.0%} (at least {part.reliability:.3f}):"
            f" accuracy {part.accuracy:.1%}"
        )
    if found.copies:
        print(
            f"{found.copies:,} rows share a sequence, read or protein with other rows; such rows"
            " do not count as neighbours of each other"
        )
    if found.unanswered:
        print(f"{found.unanswered:,} rows had no neighbour")


@click.command("map")
@click.argument("store")
@click.option("--name", help="Save the map in STORE as map_NAME.  [default: the method]")
@click.option(
    "--method",
    type=click.Choice(("pca", "umap")),
    default="pca",
    show_default=True,
    help="umap runs in one thread and ignores --workers.",
)
@click.option("--sample", type=int, help="Rows to fit UMAP to.  [default: 10,000]")
@_seed
@click.option(
    "--out", type=click.Path(path_type=Path), help="Draw the map in a .html or .png file."
)
@click.option("--png", type=click.Path(path_type=Path), help="Also draw the map in a .png file.")
@click.option(
    "--colour",
    help="length, source (the input file), frame, status, score_NAME, cluster_NAME, or a .tsv file"
    " of labels as for annotate (each line: identifier, tab, label).  [default: length]",
)
@click.option(
    "--points",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="Most rows to draw; of more rows, a random sample.",
)
@_refit
@click.option(
    "--replace",
    is_flag=True,
    help="Replace a map of this name that was made with other settings.",
)
@click.option("--force", is_flag=True, help="Replace OUT and PNG once the new files are complete.")
@_workers
def map_(
    store: str,
    out: Path | None,
    png: Path | None,
    colour: str | None,
    points: int,
    force: bool,
    random_state: int,
    **options: Any,
) -> None:
    """Project the embeddings of STORE to two dimensions by PCA or UMAP, and draw the map.

    STORE keeps the coordinates. Run the same command again, with --force if OUT exists, to compute
    only the missing ones.
    """
    from virnuc_dask.analysis.maps import make_map
    from virnuc_dask.analysis.outputs import check_out
    from virnuc_dask.analysis.plots import DRAWINGS, write_drawing
    from virnuc_dask.analysis.points import check_colour, draw_points
    from virnuc_dask.store.store import Store

    drawings = []
    for file, known in ((out, DRAWINGS), (png, DRAWINGS[1:])):
        if file:
            drawings.append(check_out(file, known, force=force, kept="coordinates"))
    if len({path.resolve() for path in drawings}) < len(drawings):
        raise click.UsageError(
            f"--out and --png name the same file, {drawings[0]}; leave out --png"
        )
    if colour and not drawings:
        raise click.UsageError("--colour needs a drawing: give --out or --png")
    colour = colour or "length"
    check_colour(Store(store), colour)
    progress = chunk_counter("mapped", "chunks")
    made = make_map(store, random_state=random_state, progress=progress, **options)
    _say_doubts([made.note] if made.note else [], made.comment)
    ratio = made.explained_variance_ratio
    explained = (
        f"; its axes explain {ratio[0]:.1%} and {ratio[1]:.1%} of the variance" if ratio else ""
    )
    print(
        f"{made.name} in {store}, fitted to {made.fitted_rows:,} rows{explained};"
        f" {counted(made.computed_chunks, 'chunk')} computed now"
    )
    if not drawings:
        return
    shown = draw_points(
        Store(store),
        made.name.removeprefix("map_"),
        colour=colour,
        points=points,
        random_state=random_state,
    )
    with cleaning_up():
        for file in drawings:
            write_drawing(shown, file, force=force)
            print(f"{len(shown.ids):,} rows in {file}")


@click.command()
@click.argument("store")
@click.option(
    "--name",
    default="kmeans",
    show_default=True,
    help="Save the clusters in STORE as cluster_NAME.",
)
@click.option(
    "--n-clusters",
    type=click.IntRange(2),
    default=8,
    show_default=True,
    help="Number of clusters.",
)
@_metric
@_seed
@_out_table
@_guard
@_refit
@click.option(
    "--replace",
    is_flag=True,
    help="Replace clusters of this name that were made with other settings.",
)
@_force
@_workers
def cluster(store: str, out: Path | None, guard: bool, force: bool, **options: Any) -> None:
    """Cluster similar rows of STORE by k-means.

    One line per cluster: number, size, the row nearest to the centre and its similarity or
    distance, silhouette, length, description. The fit numbers clusters by size, the largest first.
    STORE keeps the cluster of each row. Run the same command again, with --force if OUT exists, to
    assign only new rows, to the same centres.
    """
    from virnuc_dask.analysis.clusters import make_clusters, write_clusters
    from virnuc_dask.analysis.tables import check_table

    if out:
        check_table(out, force=force, kept="labels")
    progress = chunk_counter("read", "chunks")
    clusters = make_clusters(store, progress=progress, **options)
    _say_doubts([clusters.note] if clusters.note else [], clusters.comment)
    print(
        f"{clusters.name} in {store}, fitted to {clusters.fitted_rows:,} rows; silhouette"
        f" {clusters.silhouette:.2f} (1: well separated, 0: not at all);"
        f" {counted(clusters.computed_chunks, 'chunk')} labelled now",
        file=sys.stderr,
    )
    with cleaning_up():
        write_clusters(clusters, out or sys.stdout, guard=guard, force=force)
    if out:
        print(f"{counted(len(clusters.sizes), 'cluster')} in {out}")


@click.command()
@click.option("--viral", required=True, metavar="STORE", help="Rows of the class to find.")
@click.option("--other", required=True, metavar="STORE", help="Rows of the other class.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Write the classifier to this .skops file.",
)
@click.option(
    "--kind",
    type=click.Choice(CLASSIFIERS),
    default="logistic",
    show_default=True,
    help="Logistic regression, or a network with a hidden layer.",
)
@click.option(
    "--test-size",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.25,
    show_default=True,
    help="Fraction of the sequences, or reads, to hold out.",
)
@click.option(
    "--max-rows",
    type=click.IntRange(2),
    default=100_000,
    show_default=True,
    help="Most rows per class; of more rows, a random sample.",
)
@_seed
@_workers
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def train(viral: str, other: str, out: Path, as_json: bool, **options: Any) -> None:
    """Train a classifier on the embeddings of two stores, and test it on held-out rows.

    Identical sequences stay on the same side of the split, and so do all frames of a read. The
    report compares the classifier with one that uses only amino-acid composition.
    """
    from virnuc_dask.analysis.training import train as fit

    with cleaning_up():
        made = fit(viral, other, out, progress=chunk_counter("read", "chunks"), **options)
    _say_doubts(made.notes, made.comment)
    if as_json:
        print(json.dumps(made.to_json()))
        return
    print(*made.lines(), "", f"classifier in {out}", sep="\n")


@click.command()
@click.argument("store")
@click.option(
    "--classifier",
    required=True,
    type=click.Path(path_type=Path),
    help="A file from `train`. It is loaded without running code.",
)
@click.option(
    "--name", help="Save the scores as score_NAME.  [default: name of the classifier's file]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the scores to a .tsv or .parquet file."
)
@click.option(
    "--consensus",
    type=click.Choice(CONSENSUS),
    help="Write one line per read, or per tiled protein, in the table. One that has a row not yet"
    " embedded is left out.",
)
@_guard
@_workers
@click.option(
    "--replace",
    is_flag=True,
    help="Replace scores of this name that another classifier computed.",
)
@_force
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def predict(store: str, as_json: bool, **options: Any) -> None:
    """Score the rows of STORE with a classifier.

    STORE keeps the scores as score_NAME. Run the same command again, with --force if OUT exists, to
    compute only missing scores.
    """
    from virnuc_dask.analysis.prediction import predict as score

    with cleaning_up():
        found = score(store, progress=chunk_counter("scored", "chunks"), **options)
    _say_doubts(found.notes, found.comment)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    print(
        f"{found.name}: {found.scored:,} rows scored, {found.first:,} of them called"
        f" {found.classes[0]} (0.5 or more); {counted(found.computed_chunks, 'chunk')} computed now"
    )
    if found.pending or found.quarantined:
        print(
            f"no score: {found.pending:,} rows not yet embedded, {found.quarantined:,} quarantined"
        )
    if found.out:
        if found.reads is None:
            print(f"{counted(found.lines or 0, 'row')} in {found.out}")
        else:
            print(
                f"{found.lines:,} of {counted(found.reads, 'record')} in {found.out},"
                f" {found.first_lines:,} of them called {found.classes[0]}"
            )


@click.command()
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--query", metavar="ID", help="Show the nearest neighbours of this row.")
@click.option(
    "--telemetry",
    type=click.Path(path_type=Path),
    help="Telemetry file of the runs.  [default: STORE.telemetry.jsonl, if it exists]",
)
@_force
def report(store: str, out: Path, **options: Any) -> None:
    """Write OUT.html, a self-contained page about STORE. A run may still fill STORE.

    It shows settings, row status, chunks, lengths, composition, speed, a map and scores.
    """
    from virnuc_dask.analysis.report import report as write

    with cleaning_up():
        path = write(store, out, **options)
    print(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


COMMANDS = (export, nearest, index_, annotate, map_, cluster, train, predict, report)


def _say_attrs(about: dict[str, Any]) -> None:
    _say_doubts([about["note"]] if "note" in about else [], about.get("comment"))


def _say_doubts(notes: list[str], comment: str | None) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if comment:
        print(f"comment: {comment}", file=sys.stderr)


def chunk_counter(verb: str, noun: str) -> Callable[[int, int], None] | None:
    """Progress line on a terminal; None if standard error is not a terminal."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{verb} {done:,} of {total:,} {noun}", end=end, file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else None
