"""Scores of a store's rows from a classifier, and tables of scored rows or reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import Progress, fill, thread_count
from virnuc_dask.analysis.classifier import Classifier, load_classifier, version_note
from virnuc_dask.analysis.compatibility import (
    check_comparable,
    length_note,
    median_length,
    named_model,
    what_must_agree,
)
from virnuc_dask.analysis.rows import meanings, pending_note, sequence_digests, taken
from virnuc_dask.analysis.tables import Columns, check_table, write_rows
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.settings import CONSENSUS, Consensus
from virnuc_dask.store.results import RESULT, Result, keep_result
from virnuc_dask.store.store import SEQUENCES_PER_CHUNK, Store

# Columns of a table of rows. The store may lack some of them.
_ROW_TYPES = {
    "sequence_id": "string",
    "row": "int64",
    "score": "float32",
    "class": "string",
    "trained_on": "int8",
    "length": "int32",
    "status": "string",
    "read_id": "string",
    "window": "int32",
    "frame": "int8",
    "start": "int64",
    "description": "string",
}
_READ_TYPES = {
    "read_id": "string",
    "read": "int64",
    "score": "float32",
    "class": "string",
    "rows": "int64",
    "trained_rows": "int64",
    "best_row": "int64",
    "best_sequence_id": "string",
    "best_frame": "int8",
}
_BY_RULE = {"other_score": "float32"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """Result of `predict`.

    Attributes
    ----------
    store, name : str
        Path of the store, and name of its new array, ``score_NAME``.
    classes : tuple of two str
        Scores are probabilities of the first class.
    computed_chunks : int
        Chunks that this call computed; the others existed before.
    scored : int
        Rows with a score.
    first : int
        Rows with a score of 0.5 or more.
    pending, quarantined : int
        Rows without a score: not yet embedded, and quarantined.
    out : str, optional
        Path of the table.
    lines, first_lines : int, optional
        Lines of the table without its header, and lines of the first class.
    reads : int, optional
        Reads of the input, including reads without a row; only for a table of reads.
    notes : list of str
        Reasons for doubt.
    comment : str, optional
        Warning about random weights.
    """

    store: str
    name: str
    classes: tuple[str, str]
    computed_chunks: int
    scored: int
    first: int
    pending: int
    quarantined: int
    out: str | None = None
    lines: int | None = None
    first_lines: int | None = None
    reads: int | None = None
    notes: list[str] = field(default_factory=list)
    comment: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def predict(
    store: str | Path,
    classifier: str | Path,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    consensus: Consensus | None = None,
    guard: bool = True,
    replace: bool = False,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Prediction:
    """Score all embedded rows of a store with a classifier from `train`.

    Scores are probabilities of the classifier's first class. The store keeps them in the array
    ``score_NAME``, float32, shape (records,), NaN without an embedding; `open_store` and `export`
    include it. Scores are written chunk by chunk. After a kill, or when more rows are embedded, the
    same call again computes only missing scores. Memory holds one chunk per thread, and about
    65,536 rows of the table.

    Parameters
    ----------
    store : path
        A store with the weights, layer, pooling and precision of the classifier. A run may still
        fill it.
    classifier : path
        A file from `train`. It is read without pickle, and no code in it is run.
    name : str, optional
        Name of the result. Default: the name of the classifier's file without its suffix.
    out : path, optional
        A table, ``.tsv`` or ``.parquet``, of the rows with a score: ``sequence_id``, ``row``,
        ``score``, ``class``, ``trained_on`` (1 if the classifier was trained on the same sequence,
        else 0), ``length``, ``status``, for translated rows ``read_id``, ``window``,
        ``frame``, ``start``, and ``description``.
    consensus : str, optional
        ``max``, ``mean`` or ``virnucpro``. For a store of translated reads, or of tiles of
        proteins: write one line per read or protein with a score. A read is left out while one of
        its rows is not embedded yet, because a verdict from some of its frames may change.
        Columns: ``read_id``; ``read``, its number; ``score``, the maximum or mean over its rows;
        ``class``; ``rows``, their number; ``trained_rows``, the number of those with a sequence
        that the classifier was trained on; and, for the row with the largest score, ``best_row``,
        ``best_sequence_id`` and, for translated reads, ``best_frame``.
        ``virnucpro`` is the rule of that program. A read belongs to the first class if the largest
        probability of this class, over frames and windows, is at least the largest probability of
        the second class. ``score`` and ``other_score`` are these two, and ``class`` is the name of
        the winner.
    guard : bool
        In TSV, put an apostrophe before names that a spreadsheet reads as formulas.
    replace : bool
        Replace a result of this name that another classifier computed.
    force : bool
        Replace `out` if it exists. Scores that the store keeps are not computed again.
    workers : int, optional
        Threads. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks done so far and their total.
    client : distributed.Client, optional
        Compute on the workers of this client. Default: threads of this process.

    Returns
    -------
    Prediction

    Raises
    ------
    UsageError
        The file is not a classifier, or contains types that are not trusted; the classifier does
        not fit the store; another classifier computed the existing result; or `name`, `consensus`
        or `out` is not valid.
    StoreError
        A chunk is damaged.
    NotAStoreError
    """
    found, opened = load_classifier(classifier), Store(store)
    threads = thread_count(workers)
    check_comparable(
        what_must_agree(opened.identity),
        found.about["model"],
        f"{opened.path} has other embeddings than the training data of {classifier}",
        (named_model(opened), f"{classifier}: {found.described_model()}"),
    )
    if opened.dimension != found.about["model"]["dimension"]:
        raise UsageError(f"{classifier} is not for embeddings of {opened.dimension:,} features")
    _check_table(opened, out, consensus, force)
    about = {name: found.about[name] for name in ("kind", "classes")}
    about |= {"classifier": found.digest()}
    result = keep_result(
        opened,
        "score",
        name or _name_of(classifier),
        about,
        details=lambda: _details(found, opened, Path(expanded(classifier)).name),
        replace=replace,
    )
    computed = fill(result, found, workers=threads, client=client, progress=progress)
    scored, first = _counts(result)
    done = opened.rows_in(np.flatnonzero(result.present()))
    pending = opened.records - done
    notes = [pending_note(opened, pending), *doubts(result), version_note(found)]
    if pending and consensus:
        notes.insert(1, "reads with such rows are not in the table yet")
    lines = first_lines = None
    if out is not None:
        lines, first_lines = _write(result, found, out, consensus, guard, force)
    return Prediction(
        store=str(opened.path),
        name=result.name,
        classes=found.classes,
        computed_chunks=computed,
        scored=scored,
        first=first,
        pending=pending,
        quarantined=done - scored,
        out=None if out is None else str(out),
        lines=lines,
        first_lines=first_lines,
        reads=opened.array("read_id").shape[0] if consensus else None,
        notes=[note for note in notes if note],
        **opened.model.comment(),
    )


def _name_of(classifier: str | Path) -> str:
    name = Path(expanded(classifier)).stem
    if not RESULT.fullmatch(f"score_{name}"):
        raise UsageError(
            f"{name[:80]!r}, from the classifier's file, is not a valid name of a result; give"
            " --name with letters, digits and _ only"
        )
    return name


def _check_table(
    store: Store, out: str | Path | None, consensus: Consensus | None, force: bool
) -> None:
    if consensus is not None:
        if consensus not in CONSENSUS:
            raise UsageError(f"consensus must be one of {', '.join(CONSENSUS)}, not {consensus!r}")
        if out is None:
            raise UsageError("a consensus needs a table; give its file with --out")
        if "read" not in store.names:
            raise UsageError(
                f"{store.path}: --consensus needs rows that were translated from reads, or tiles"
            )
    if out is not None:
        check_table(out, force=force, kept="scores")


def _details(classifier: Classifier, store: Store, name: str) -> dict[str, Any]:
    """Details of new scores: reasons for doubt, without the folders of this machine."""
    trained = sum(int(_trained_on(classifier, store, n).sum()) for n in range(store.chunk_count))
    auroc = classifier.held_out_auroc
    notes = []
    if trained:
        notes.append(
            f"{name} was trained on {trained:,} of these {store.records:,} rows, whose scores are"
            " too good"
        )
    if auroc is not None:
        notes.append(f"AUROC of {name} on held-out rows of its training data: {auroc:.3f}")
    note = length_note(
        median_length(store),
        Path(str(store.path)).name,
        float(classifier.about["median_length"]),
        f"the training data of {name}",
    )
    if note:
        notes.append(f"{note}, and train a classifier on them")
    return {"held_out_auroc": auroc, "trained_rows": trained, "notes": notes}


def doubts(score: Result) -> list[str]:
    """Reasons to doubt scores, which were kept with them."""
    notes = score.details.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def _trained_on(classifier: Classifier, store: Store, chunk: int) -> NDArray[np.bool_]:
    """Which rows of a chunk have a sequence that the classifier was trained on."""
    span = store.rows(chunk)
    digests = sequence_digests(store, chunk, range(span.stop - span.start))
    return classifier.was_trained_on(digests)


def _parts(result: Result) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Rows and their scores, in whole chunks, about 65,536 rows at a time."""
    store = result.store
    per_chunk = store.identity.rows_per_chunk
    step = max(1, SEQUENCES_PER_CHUNK // per_chunk) * per_chunk
    for first in range(0, store.records, step):
        rows = slice(first, min(first + step, store.records))
        yield rows, result.read(rows)


def _counts(result: Result) -> tuple[int, int]:
    """Number of rows with a score, and of scores of 0.5 or more."""
    scored = first = 0
    for _, score in _parts(result):
        scored += int(np.isfinite(score).sum())
        first += int((score >= 0.5).sum())
    return scored, first


# --- tables --------------------------------------------------------------------------------------


def _write(
    result: Result,
    classifier: Classifier,
    out: str | Path,
    consensus: Consensus | None,
    guard: bool,
    force: bool,
) -> tuple[int, int]:
    """Write a table; return its number of lines, and of lines of the first class."""
    store = result.store
    types = {
        name: kind
        for name, kind in _ROW_TYPES.items()
        if name in ("row", "score", "class", "trained_on", "status") or name in store.names
    }
    parts = _of_rows(result, classifier)
    if consensus is not None:
        types = _READ_TYPES | (_BY_RULE if consensus == "virnucpro" else {})
        if "frame" not in store.names:
            del types["best_frame"]
        parts = _of_reads(result, consensus, classifier)
    about = {
        "name": result.name,
        "consensus": consensus or "none",
        "classes": ", ".join(classifier.classes),
        "classifier": result.about["classifier"],
        **store.model.comment(),
    }
    first = 0

    def counted() -> Iterator[Columns]:
        nonlocal first
        for columns in parts:
            first += columns["class"].count(classifier.classes[0])
            yield columns

    return write_rows(counted(), types, out, about=about, guard=guard, force=force), first


def _of_rows(result: Result, classifier: Classifier) -> Iterator[Columns]:
    for rows, score in _parts(result):
        has_score = np.isfinite(score)
        if has_score.any():
            with result.store.reading("metadata of rows"):
                columns = result.store.read_columns(rows)
                columns["status"] = meanings(np.asarray(result.store.array("status")[rows]))
            columns |= {"row": np.arange(rows.start, rows.stop), "score": score}
            columns["class"] = np.where(score >= 0.5, *classifier.classes).astype(object)
            columns["trained_on"] = _trained_rows(classifier, result.store, rows).astype(np.int8)
            yield {name: _listed(values[has_score]) for name, values in columns.items()}


def _trained_rows(classifier: Classifier, store: Store, rows: slice) -> NDArray[np.bool_]:
    """Like `_trained_on`, for rows of whole chunks."""
    per_chunk = store.identity.rows_per_chunk
    chunks = range(rows.start // per_chunk, -(-rows.stop // per_chunk))
    return np.concatenate([_trained_on(classifier, store, chunk) for chunk in chunks])


def _listed(values: NDArray[Any]) -> list[Any]:
    # Scalars stay float32, so that they print as the shortest exact text.
    return list(values) if values.dtype.kind == "f" else values.tolist()


_OF_A_READ = ("read", "read_id", "sequence_id", "frame")


def _of_reads(result: Result, consensus: Consensus, classifier: Classifier) -> Iterator[Columns]:
    """Lines of whole reads; the last read of a part may continue in the next part."""
    carried: dict[str, NDArray[Any]] | None = None
    unfinished = _unfinished_reads(result)
    for rows, score in _parts(result):
        is_used = np.isfinite(score)
        if not is_used.any():
            continue
        with result.store.reading("metadata of rows"):
            known = result.store.read_columns(rows)
        is_used &= ~np.isin(known["read"], unfinished)
        if not is_used.any():
            continue
        part = {name: known[name][is_used] for name in _OF_A_READ if name in known}
        part |= {"row": np.arange(rows.start, rows.stop)[is_used], "score": score[is_used]}
        part["trained_on"] = _trained_rows(classifier, result.store, rows)[is_used]
        if carried is not None:
            part = {name: np.concatenate([carried[name], part[name]]) for name in part}
        last = int(np.searchsorted(part["read"], part["read"][-1]))
        carried = {name: values[last:] for name, values in part.items()}
        if last:
            whole = {name: values[:last] for name, values in part.items()}
            yield _by_read(whole, consensus, classifier.classes)
    if carried is not None:
        yield _by_read(carried, consensus, classifier.classes)


def _unfinished_reads(result: Result) -> NDArray[np.int64]:
    """Numbers of the reads that may have rows both in and outside chunks without scores."""
    spans = [result.store.rows(chunk) for chunk in np.flatnonzero(~result.present()).tolist()]
    # The rows of a read are consecutive, so it has the first or the last row of such a chunk.
    edges = [row for span in spans for row in (span.start, span.stop - 1)]
    return np.unique(taken(result.store, "read", np.array(edges, np.int64)))


def _by_read(
    part: dict[str, NDArray[Any]], consensus: Consensus, classes: tuple[str, str]
) -> Columns:
    """One line per read; the rows of a read are consecutive."""
    score, read = part["score"], part["read"]
    firsts = np.flatnonzero(np.diff(read, prepend=read[0] - 1))
    counts = np.diff(np.append(firsts, len(read)))
    # Order by read, then by score, the largest first, then by row.
    best = np.lexsort((part["row"], -score, read))[firsts]
    found = score[best]
    if consensus == "mean":
        found = (np.add.reduceat(score.astype(np.float64), firsts) / counts).astype(np.float32)
    columns = {
        "read_id": part["read_id"][best],
        "read": read[best],
        "score": found,
        "rows": counts,
        "trained_rows": np.add.reduceat(part["trained_on"].astype(np.int64), firsts),
        "best_row": part["row"][best],
        "best_sequence_id": part["sequence_id"][best],
    }
    if "frame" in part:
        columns["best_frame"] = part["frame"][best]
    is_first = found >= 0.5
    if consensus == "virnucpro":
        other = 1 - np.minimum.reduceat(score.astype(np.float64), firsts)
        columns["other_score"] = other.astype(np.float32)
        is_first = found >= other
    columns["class"] = np.where(is_first, *classes).astype(object)
    return {name: _listed(values) for name, values in columns.items()}
