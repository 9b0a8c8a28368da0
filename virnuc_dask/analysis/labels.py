"""Annotation of rows with the labels of their nearest labelled rows, and its accuracy.

Littmann et al. 2021, "Embeddings from deep learning transfer GO annotations beyond homology",
Scientific Reports 11, 1160 (goPredSim).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import Progress, thread_count
from virnuc_dask.analysis.compatibility import note_on_lengths
from virnuc_dask.analysis.neighbours import check_search, search
from virnuc_dask.analysis.rows import (
    embedded_rows,
    file_names,
    known_names,
    pending_note,
    pending_rows,
    sequence_digests,
    source_numbers,
    states,
    taken,
)
from virnuc_dask.analysis.samples import joined
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.inputs.records import decoded_header
from virnuc_dask.settings import Metric
from virnuc_dask.store.store import SEQUENCES_PER_CHUNK, Store
from virnuc_dask.text import counted, printable

# Separates the labels of one row, as in GO annotation files.
SEPARATOR = "|"
# Instead of a file: the input file of each row is its label.
SOURCE = "source"
_RELIABILITY_SCALE = 0.5
_SHARES = (0.5, 0.25, 0.1)
_NAMED = 3


# --- annotation ----------------------------------------------------------------------------------


def annotate(
    store: str | Path,
    labels: str | Path,
    *,
    reference: str | Path | None = None,
    k: int = 1,
    metric: Metric = "cosine",
    centre: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Any:
    """Give each embedded row of a store the label of the nearest labelled rows of a reference.

    The reliability of a label is goPredSim's reliability index. Among the k nearest labelled rows,
    it sums the similarities of those with the label, and divides by k. The similarity is the
    cosine, or 0 if that is negative; for a euclidean distance d it is 0.5 / (0.5 + d). So the
    reliability is between 0 and 1. It is 1 if all k neighbours have the label and equal the query.
    Whether 0.7 is high depends on model and labels; `leave_one_out` measures the accuracy.

    Parameters
    ----------
    store : path
        Its rows get labels.
    labels : path or 'source'
        The word ``source``: the input file of each row of the reference is its label. Or a text
        file. Each line has an identifier, a tab and a label; more columns are ignored. An
        identifier on several lines has several labels. The first line is a header if the reference
        lacks its identifier. For translated reads and tiles, an identifier may also be the
        ``read_id`` of a read or protein. All its rows then get its labels, except rows with their
        own identifier in the file.
    reference : path, optional
        A store with the labelled rows and with the same weights, layer, pooling and precision.
        Default: `store`. A row is not its own neighbour. Rows without a label or an embedding are
        not neighbours.
    k : int
        Neighbours per row.
    metric : {'cosine', 'euclidean'}
    centre : bool
        Subtract the mean of all embedded rows of the reference first; cosine only.
    workers : int, optional
        Threads. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks read so far and their total.
    client : distributed.Client, optional
        Search on the workers of this client. Default: threads of this process.

    Returns
    -------
    xarray.Dataset
        Dimension ``query``: all embedded rows of `store`. ``label`` (str): the most reliable label;
        ties go to the label of the nearer neighbour, then to the alphabetically first label.
        ``reliability`` (float32, from 0 to 1). ``labels`` (str): all labels of the k neighbours,
        separated by ``|``, the most reliable first. For the nearest neighbour with ``label``:
        ``row`` (int64), ``sequence_id``, ``description`` (if the reference has it), ``length``
        (int32, residues), ``status`` (str) and ``similarity`` or ``distance`` (float32). A query
        without a labelled neighbour has empty texts, reliability 0, row and length -1, and NaN.
        Coordinates: ``query_row`` (int64) and ``query_id``. The attributes ``note`` and
        ``comment``, if present, are reasons to doubt the result. The Dataset is in memory; use
        `annotate_in_parts` if it does not fit.

    Raises
    ------
    UsageError
        A line of the labels is malformed, no label belongs to an embedded row of the reference, the
        stores are not comparable, or `k` or `metric` is not valid.
    StoreError
        A chunk is damaged, or an embedded row is not finite.
    NotAStoreError
    """
    import xarray

    parts = annotate_in_parts(
        store,
        labels,
        reference=reference,
        k=k,
        metric=metric,
        centre=centre,
        workers=workers,
        progress=progress,
        client=client,
    )
    return xarray.concat(list(parts), "query", combine_attrs="override")


def annotate_in_parts(
    store: str | Path,
    labels: str | Path,
    *,
    reference: str | Path | None = None,
    k: int = 1,
    metric: Metric = "cosine",
    centre: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> Iterator[Any]:
    """Like `annotate`, but yield a Dataset for each few thousand rows."""
    source = Store(store)
    searched = source if reference is None else Store(reference)
    check_search(searched, source, k, metric)
    threads = thread_count(workers)
    known = _read_labels(labels, searched)
    rows = embedded_rows(source)
    if not len(rows):
        raise UsageError(f"{source.path} has no embedded row yet")
    pending = dict.fromkeys(map(pending_note, (source, searched)))
    notes = [*pending, note_on_lengths(searched, source), known.note]
    note = "; ".join(note for note in notes if note)
    attributes = {
        **({"note": note} if note else {}),
        **searched.model.comment(),
        "k": k,
        "metric": metric,
        "centred": int(centre and metric == "cosine"),
        "store": str(source.path),
        "reference": str(searched.path),
        "labelled_rows": int(known.is_labelled.sum()),
    }
    found = search(
        searched,
        source,
        rows,
        k=k,
        metric=metric,
        centre=centre,
        threads=threads,
        among=known.is_labelled,
        progress=progress,
        client=client,
    )
    first = 0
    for scores, neighbours, _ in found:
        part = rows[first : first + len(scores)]
        first += len(scores)
        votes = _pooled(known, scores, neighbours, k, metric)
        yield _dataset(source, part, searched, known, votes, scores, neighbours, metric, attributes)


# --- leave-one-out -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelAccuracy:
    """Counts of correct and all predictions of one label.

    Attributes
    ----------
    label : str
    support : int
        Rows with this label.
    predicted : int
        Rows for which it was predicted.
    correct : int
        Rows with this label for which it was predicted.
    """

    label: str
    support: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """Fraction of the predictions that are correct; None without predictions."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float:
        """Fraction of the rows with the label for which it was predicted."""
        return self.correct / self.support


@dataclass(frozen=True, slots=True)
class ReliableShare:
    """Accuracy of the most reliable predictions alone.

    Attributes
    ----------
    share : float
        Fraction of all rows; ties in reliability make it larger.
    reliability : float
        Lowest reliability among them.
    accuracy : float
    """

    share: float
    reliability: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Accuracy of the labels that rows get from the other rows.

    Attributes
    ----------
    rows : int
        Labelled rows with an embedding.
    correct : int
        Rows with a correct prediction.
    unanswered : int
        Rows without a neighbour, because all labelled rows are in their own group.
    copies : int
        Rows that share their sequence, read or protein with other labelled rows. Such rows do not
        count as neighbours of each other.
    labels : list of LabelAccuracy
        The most frequent label first.
    reliable : list of ReliableShare
        The most reliable half, quarter and tenth.
    about : dict
        Settings, ``pending`` (rows of the reference that are not embedded yet), and reasons to
        doubt the result.
    """

    rows: int
    correct: int
    unanswered: int
    copies: int
    labels: list[LabelAccuracy]
    reliable: list[ReliableShare]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Fraction of all rows with a correct prediction."""
        return self.correct / self.rows

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over all labels."""
        return sum(each.recall for each in self.labels) / len(self.labels)

    @property
    def baseline(self) -> float:
        """Accuracy of always predicting the most frequent label."""
        return self.labels[0].support / self.rows

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return {
            "rows": self.rows,
            "correct": self.correct,
            "unanswered": self.unanswered,
            "copies": self.copies,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "baseline": self.baseline,
            "labels": [
                asdict(each) | {"precision": each.precision, "recall": each.recall}
                for each in self.labels
            ],
            "reliable": [asdict(each) for each in self.reliable],
            **self.about,
        }


def leave_one_out(
    reference: str | Path,
    labels: str | Path,
    *,
    k: int = 1,
    metric: Metric = "cosine",
    centre: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> LeaveOneOut:
    """Annotate each labelled row of a reference from the other rows, and measure the accuracy.

    Rows with the same encoded sequence do not count as neighbours of each other. A copy has the
    same embedding and mostly the same label, which tells nothing about other proteins. The same
    holds for frames and windows of one read, and for tiles of one protein. Rows that are linked
    through other rows form one group, as in `train`. Close relatives remain neighbours. So the
    accuracy holds for queries with relatives as close as these in the reference.

    Parameters
    ----------
    reference, labels, k, metric, centre, workers, progress, client
        As in `annotate`.

    Returns
    -------
    LeaveOneOut

    Raises
    ------
    UsageError, StoreError, NotAStoreError
        As in `annotate`.
    """
    store = Store(reference)
    check_search(store, store, k, metric)
    threads = thread_count(workers)
    pending = pending_rows(store)
    known = _read_labels(labels, store)
    note = "; ".join(note for note in (pending_note(store, pending), known.note) if note)
    rows = np.flatnonzero(known.is_labelled)
    groups = _groups(store, rows)
    found = search(
        store,
        store,
        rows,
        k=k,
        metric=metric,
        centre=centre,
        threads=threads,
        among=known.is_labelled,
        groups=groups,
        progress=progress,
        client=client,
    )
    names = len(known.names)
    support, predicted, correct = (np.zeros(names, np.int64) for _ in range(3))
    reliability, is_correct = np.empty(len(rows), np.float32), np.zeros(len(rows), np.bool_)
    unanswered, first = 0, 0
    for scores, neighbours, _ in found:
        span = slice(first, first + len(scores))
        first, part = span.stop, rows[span]
        best = _best(_pooled(known, scores, neighbours, k, metric), len(part))
        answered = best.label >= 0
        unanswered += int((~answered).sum())
        query, label = known.of(part)
        support += np.bincount(label, minlength=names)
        predicted += np.bincount(best.label[answered], minlength=names)
        is_right = best.label[query] == label
        correct += np.bincount(label[is_right], minlength=names)
        is_correct[span][query[is_right]] = True
        reliability[span] = best.reliability
    sizes = np.unique(groups[rows], return_counts=True)[1]
    order = [int(code) for code in np.argsort(-support, kind="stable") if support[code]]
    return LeaveOneOut(
        len(rows),
        int(correct.sum()),
        unanswered,
        int(sizes[sizes > 1].sum()),
        [
            LabelAccuracy(
                known.names[code], int(support[code]), int(predicted[code]), int(correct[code])
            )
            for code in order
        ],
        [_reliable_share(share, reliability, is_correct) for share in _SHARES],
        {
            "k": k,
            "metric": metric,
            "centred": centre and metric == "cosine",
            "reference": str(store.path),
            "pending": pending,
            **({"note": note} if note else {}),
            **store.model.comment(),
        },
    )


def _reliable_share(
    share: float, reliability: NDArray[np.float32], is_correct: NDArray[np.bool_]
) -> ReliableShare:
    least = np.quantile(reliability, 1 - share, method="higher")
    among = reliability >= least
    return ReliableShare(float(among.mean()), float(least), float(is_correct[among].mean()))


def _groups(store: Store, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups of rows with a common sequence, read or protein, shape (records,); else -1."""
    sequences: list[bytes] = []
    reads = np.full(len(rows), -1)
    chunks, positions = np.unique(rows // store.identity.rows_per_chunk, return_index=True)
    for chunk, part in zip(chunks.tolist(), np.split(rows, positions[1:]), strict=True):
        start = store.rows(chunk).start
        if "read" in store.names:
            here = slice(len(sequences), len(sequences) + len(part))
            with store.reading("`read`"):
                reads[here] = np.asarray(store.array("read")[store.rows(chunk)])[part - start]
        sequences += sequence_digests(store, chunk, (part - start).tolist())
    groups = np.full(store.records, -1, np.int64)
    groups[rows] = joined(sequences, reads)
    return groups


# --- labels of rows ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Labels:
    """Labels of a store's rows.

    Attributes
    ----------
    names : list of str
        All labels, in alphabetical order.
    bounds : ndarray, int64, shape (records + 1,)
        Row i has the labels ``codes[bounds[i]:bounds[i + 1]]``.
    codes : ndarray, int64
        Indices into `names`.
    is_labelled : ndarray, bool, shape (records,)
        Rows with a label and an embedding.
    note : str
        Warning about identifiers or rows that are missing; empty if there are none.
    """

    names: list[str]
    bounds: NDArray[np.int64]
    codes: NDArray[np.int64]
    is_labelled: NDArray[np.bool_]
    note: str

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a position in `rows` and a label's index; row -1 has no label."""
        counts = np.where(rows >= 0, self.bounds[rows + 1] - self.bounds[rows], 0)
        where = np.repeat(np.arange(len(rows)), counts)
        ends = np.cumsum(counts)
        within = np.arange(len(where)) - np.repeat(ends - counts, counts)
        return where, self.codes[self.bounds[rows[where]] + within]


def _input_files(store: Store) -> _Labels:
    """The input file of each row as its label."""
    if "source" not in store.names:
        raise UsageError(f"{store.path}: this store does not know which file a row is from")
    files = file_names(store)
    names = sorted(files)
    codes = np.array([names.index(file) for file in files])[source_numbers(store)]
    is_labelled = np.zeros(store.records, np.bool_)
    is_labelled[embedded_rows(store)] = True
    if not is_labelled.any():
        raise UsageError(f"{store.path} has no embedded row yet")
    return _Labels(names, np.arange(store.records + 1), codes, is_labelled, "")


def _read_labels(path: str | Path, store: Store) -> _Labels:
    if str(path) == SOURCE:
        return _input_files(store)
    lines = read_lines(path)
    numbers = {name: code for code, name in enumerate(sorted({label for _, label in lines}))}
    labels: dict[str, list[int]] = {}
    for name, label in lines:
        of_name = labels.setdefault(name, [])
        if numbers[label] not in of_name:
            of_name.append(numbers[label])
    matched: set[str] = set()
    counts = np.zeros(store.records + 1, np.int64)
    codes: list[int] = []
    for first in range(0, store.records, SEQUENCES_PER_CHUNK):
        rows = known_names(store, slice(first, first + SEQUENCES_PER_CHUNK))
        for row, names in enumerate(rows, first):
            known = [name for name in names if name in labels]
            if known:
                matched.update(known)
                of_row = labels[known[0]]
                counts[row + 1] = len(of_row)
                codes += of_row
    if not matched:
        raise UsageError(
            f"{path}: none of its {len(labels):,} identifiers is in {store.path}; for example, the"
            f" file has {printable(lines[-1][0])!r} and the store {printable(rows[0][0])!r}"
        )
    is_labelled = np.zeros(store.records, np.bool_)
    is_labelled[embedded_rows(store)] = True
    is_labelled &= counts[1:] > 0
    without = int((counts > 0).sum() - is_labelled.sum())
    if not is_labelled.any():
        raise UsageError(
            f"{store.path}: none of the {without:,} labelled rows has an embedding;"
            " `virnuc-dask resume` computes missing rows"
        )
    unmatched = [name for name in labels if name not in matched]
    if unmatched[:1] == [lines[0][0]]:  # a header
        del unmatched[0]
    notes = []
    if unmatched:
        examples = ", ".join(map(printable, unmatched[:_NAMED]))
        dots = ", ..." if len(unmatched) > _NAMED else ""
        notes.append(
            f"{path} has {counted(len(unmatched), 'identifier')} not in {store.path} ({examples}"
            f"{dots})"
        )
    if without:
        notes.append(f"{store.path} has {counted(without, 'labelled row')} without an embedding")
    return _Labels(
        list(numbers), np.cumsum(counts), np.array(codes, np.int64), is_labelled, "; ".join(notes)
    )


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """Identifier and label from each line of a file.

    Raises
    ------
    UsageError
        The file cannot be read or has no lines, or a line has no tab, no identifier, no label, or
        a label with ``|``.
    """
    lines: list[tuple[str, str]] = []
    try:
        # Headers may contain bytes that are not UTF-8, so this file may too.
        with open(expanded(path), "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if not text.strip():
                    continue
                name, *others = (_text(part) for part in text.split(b"\t"))
                if not others:
                    raise UsageError(f"{path}, line {number}: no tab; {_LINE_FORMAT}")
                if not (name and others[0]):
                    missing = "label" if name else "identifier"
                    raise UsageError(
                        f"{path}, line {number}: the {missing} is empty; {_LINE_FORMAT}"
                    )
                if SEPARATOR in others[0]:
                    raise UsageError(
                        f"{path}, line {number}: {SEPARATOR!r} in a label; give several labels of"
                        " an identifier on several lines"
                    )
                lines.append((name, others[0]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not lines:
        raise UsageError(f"{path}: no lines; {_LINE_FORMAT}")
    return lines


def _text(part: bytes) -> str:
    return decoded_header(part.decode("utf-8", "surrogateescape")).strip()


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_FORMAT = "each line needs an identifier, a tab and a label"


# --- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Votes:
    """Labels from the neighbours, by query, the most reliable first; shape (votes,) each.

    Attributes
    ----------
    query : ndarray, int64
        Position in the batch.
    label : ndarray, int64
    reliability : ndarray, float64
    rank : ndarray, int64
        Rank of the nearest neighbour with the label, from 0.
    """

    query: NDArray[np.int64]
    label: NDArray[np.int64]
    reliability: NDArray[np.float64]
    rank: NDArray[np.int64]


def _pooled(
    known: _Labels,
    scores: NDArray[np.float32],
    neighbours: NDArray[np.int64],
    k: int,
    metric: Metric,
) -> _Votes:
    where, label = known.of(neighbours.ravel())
    query, rank = np.divmod(where, neighbours.shape[1])
    similarity = _similarity(scores.ravel()[where].astype(np.float64), metric)
    pairs, vote = np.unique(query * len(known.names) + label, return_inverse=True)
    reliability = np.bincount(vote, similarity, len(pairs)) / k
    nearest = np.full(len(pairs), k)
    np.minimum.at(nearest, vote, rank)
    query, label = np.divmod(pairs, len(known.names))
    order = np.lexsort((label, nearest, -reliability, query))
    return _Votes(query[order], label[order], reliability[order], nearest[order])


def _similarity(scores: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """Similarity from 0 to 1, from the cosine or the distance times -1."""
    if metric == "cosine":
        return np.maximum(scores, 0)
    return _RELIABILITY_SCALE / (_RELIABILITY_SCALE - scores)


@dataclass(frozen=True, slots=True)
class _Best:
    """The most reliable label of each query, shape (queries,); -1, 0 and -1 without one."""

    label: NDArray[np.int64]
    reliability: NDArray[np.float32]
    rank: NDArray[np.int64]


def _best(votes: _Votes, queries: int) -> _Best:
    best = _Best(np.full(queries, -1), np.zeros(queries, np.float32), np.full(queries, -1))
    query, first = np.unique(votes.query, return_index=True)
    best.label[query] = votes.label[first]
    best.reliability[query] = votes.reliability[first]
    best.rank[query] = votes.rank[first]
    return best


def _dataset(
    source: Store,
    rows: NDArray[np.int64],
    searched: Store,
    known: _Labels,
    votes: _Votes,
    scores: NDArray[np.float32],
    neighbours: NDArray[np.int64],
    metric: Metric,
    attributes: dict[str, Any],
) -> Any:
    import xarray

    best = _best(votes, len(rows))
    names = np.array([*known.names, ""], object)  # the last is number -1
    joined = np.full(len(rows), "", object)
    queries, firsts = np.unique(votes.query, return_index=True)
    for query, labels in zip(queries, np.split(names[votes.label], firsts[1:]), strict=True):
        joined[query] = SEPARATOR.join(labels)
    each = np.arange(len(rows))
    is_none = best.rank < 0
    nearest = np.where(is_none, -1, neighbours[each, best.rank])
    score = np.where(is_none, np.float32(np.nan), scores[each, best.rank])
    texts = [name for name in ("sequence_id", "description") if name in searched.names]
    return xarray.Dataset(
        {
            "label": ("query", names[best.label]),
            "reliability": ("query", best.reliability),
            "labels": ("query", joined),
            "row": ("query", nearest),
            **{name: ("query", taken(searched, name, nearest)) for name in texts},
            "length": ("query", taken(searched, "length", nearest), {"units": "residues"}),
            "status": ("query", states(searched, nearest)),
            **(
                {"similarity": ("query", score)}
                if metric == "cosine"
                else {"distance": ("query", -score)}
            ),
        },
        {
            "query_row": ("query", rows),
            "query_id": ("query", taken(source, "sequence_id", rows)),
        },
        attributes,
    )
