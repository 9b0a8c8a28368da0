"""Labels from the nearest labelled rows, and how often that is right.

Littmann et al. 2021, "Embeddings from deep learning transfer GO annotations beyond homology",
Scientific Reports 11, 1160 (goPredSim).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.comparable import note_on_lengths
from virnuc_dask.analysis.neighbours import check_search, search
from virnuc_dask.analysis.passes import Progress, thread_count
from virnuc_dask.analysis.rows import embedded_rows, taken
from virnuc_dask.analysis.samples import joined
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.inputs.records import decoded_header
from virnuc_dask.settings import Metric
from virnuc_dask.store.store import SEQUENCES_PER_CHUNK, Store
from virnuc_dask.text import counted, printable

# Between the labels of one row; GO annotation files use it too.
SEPARATOR = "|"
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

    The reliability of a label is, over the k nearest labelled rows, the sum of the similarities of
    those that carry the label, divided by k (goPredSim's reliability index). The similarity is the
    cosine, or 0 if it is negative; or, of a euclidean distance d, 0.5 / (0.5 + d). So it is from 0
    to 1, and 1 if all k neighbours carry the label and are equal to the query. Whether 0.7 is much
    depends on model and labels: `leave_one_out` says how often labels are right.

    Parameters
    ----------
    store : path
        Whose rows get labels.
    labels : path
        A text file with lines of an identifier, a tab and a label. Further columns are ignored. An
        identifier on several lines has several labels. A first line whose identifier the reference
        lacks is taken for a header. Of translated reads, and of tiles, an identifier may also be
        that of a read or protein, ``read_id``: its labels are those of all its rows, but for rows
        whose own identifier is in the file.
    reference : path, optional
        A store of the same weights, layer, pooling and precision, with the rows that the labels
        are of. Default: `store`. A row is no neighbour of itself. Rows without a label or without
        an embedding take no part.
    k : int
        Neighbours of each row.
    metric : {'cosine', 'euclidean'}
    centre : bool
        Subtract the mean of all embedded rows of the reference first; for the cosine.
    workers : int, optional
        Threads. Default: one for each core, at most 16.
    progress : callable, optional
        Called with the chunks read so far and how many will be.
    client : distributed.Client, optional
        Whose workers search; default: threads of this process.

    Returns
    -------
    xarray.Dataset
        Dimension ``query``: all embedded rows of `store`. ``label`` (str), the most reliable label;
        of equally reliable ones that of the nearer neighbour, then the alphabetically first.
        ``reliability`` (float32, from 0 to 1). ``labels`` (str), all labels of the k neighbours
        with ``|`` between them, the most reliable first. Of the nearest neighbour that carries
        ``label``: ``row`` (int64), ``sequence_id``, ``description`` (if the reference has it),
        ``length`` (int32, residues) and ``similarity`` or ``distance`` (float32). Where no labelled
        row is left: empty texts, 0, row and length -1, NaN. Coordinates ``query_row`` (int64) and
        ``query_id``. The attributes ``note`` and ``comment``, if they are there, are reasons to
        doubt the result. It is in memory; `annotate_in_parts` is for what does not fit.

    Raises
    ------
    UsageError
        A line of the labels is malformed, no label is of an embedded row of the reference, the
        stores are not comparable, or `k` or `metric` makes no sense.
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
    """As `annotate`, but some thousand rows at a time, each time a Dataset."""
    source = Store(store)
    searched = source if reference is None else Store(reference)
    check_search(searched, source, k, metric)
    threads = thread_count(workers)
    known = _read_labels(labels, searched)
    rows = embedded_rows(source)
    if not len(rows):
        raise UsageError(f"{source.path} has no embedded row yet")
    notes = [note_on_lengths(searched, source), known.note]
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
    for scores, neighbours in found:
        part = rows[first : first + len(scores)]
        first += len(scores)
        votes = _pooled(known, scores, neighbours, k, metric)
        yield _dataset(source, part, searched, known, votes, scores, neighbours, metric, attributes)


# --- leave-one-out -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelAccuracy:
    """How often one label was found, and found rightly.

    Attributes
    ----------
    label : str
    support : int
        Rows that carry it.
    predicted : int
        Rows that were given it.
    correct : int
        Rows that carry it and were given it.
    """

    label: str
    support: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """Of the rows that were given the label, those that carry it; None if there are none."""
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float:
        """Of the rows that carry the label, those that were given it."""
        return self.correct / self.support


@dataclass(frozen=True, slots=True)
class ReliableShare:
    """Accuracy of the most reliable labels alone.

    Attributes
    ----------
    share : float
        Of all rows; more if several have the same reliability.
    reliability : float
        The least among them.
    accuracy : float
    """

    share: float
    reliability: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """How often the labels of other rows are right.

    Attributes
    ----------
    rows : int
        Labelled rows with an embedding.
    correct : int
        Rows that were given a label that they carry.
    unanswered : int
        Rows with no neighbour, since no labelled row is outside of their group.
    copies : int
        Rows whose sequence, read or protein another labelled row has too; these were no neighbours
        of each other.
    labels : list of LabelAccuracy
        The most frequent first.
    reliable : list of ReliableShare
        The most reliable half, quarter and tenth.
    about : dict
        What it was computed by, and reasons to doubt it.
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
        """Of all rows, those that were given a label that they carry."""
        return self.correct / self.rows

    @property
    def balanced_accuracy(self) -> float:
        """The mean over labels of the recall."""
        return sum(each.recall for each in self.labels) / len(self.labels)

    @property
    def baseline(self) -> float:
        """Accuracy of whoever always says the most frequent label."""
        return self.labels[0].support / self.rows

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
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
    """Annotate each labelled row of a reference by the others, and count how often that is right.

    Rows with the same sequence, as far as it was encoded, are no neighbours of each other: a copy
    has the same embedding and mostly the same label, which says nothing of other proteins. Nor are
    frames and windows of one read, or tiles of one protein. Rows that are joined through others
    are one group, as they are where a classifier is measured. Close
    relatives remain, so the accuracy is that of queries that have relatives in the reference as
    close as these have.

    Parameters
    ----------
    reference, labels, k, metric, centre, workers, progress, client
        As of `annotate`.

    Returns
    -------
    LeaveOneOut

    Raises
    ------
    UsageError, StoreError, NotAStoreError
        As `annotate`.
    """
    store = Store(reference)
    check_search(store, store, k, metric)
    threads = thread_count(workers)
    known = _read_labels(labels, store)
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
    for scores, neighbours in found:
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
            **({"note": known.note} if known.note else {}),
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
    """Group of some rows, of one sequence, read or protein, shape (records,); -1 for the rest."""
    sequences: list[bytes] = []
    reads = np.full(len(rows), -1)
    chunks, positions = np.unique(rows // store.identity.rows_per_chunk, return_index=True)
    for chunk, part in zip(chunks.tolist(), np.split(rows, positions[1:]), strict=True):
        lengths, residues = store.read_rows(chunk)
        ends = np.cumsum(lengths, dtype=np.int64)
        encoded = store.encoded(lengths)
        start = store.rows(chunk).start
        if "read" in store.names:
            here = slice(len(sequences), len(sequences) + len(part))
            with store.reading("`read`"):
                reads[here] = np.asarray(store.array("read")[store.rows(chunk)])[part - start]
        for row in part.tolist():
            begin = int(ends[row - start] - lengths[row - start])
            sequence = residues[begin : begin + int(encoded[row - start])].tobytes()
            sequences.append(blake2b(sequence, digest_size=16).digest())
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
        Labels of row i are ``codes[bounds[i]:bounds[i + 1]]``.
    codes : ndarray, int64
        Numbers into `names`.
    is_labelled : ndarray, bool, shape (records,)
        Rows with a label and an embedding.
    note : str
        What the file says of rows that are not there; empty if nothing.
    """

    names: list[str]
    bounds: NDArray[np.int64]
    codes: NDArray[np.int64]
    is_labelled: NDArray[np.bool_]
    note: str

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a position in `rows` and a label's number; no label of row -1."""
        counts = np.where(rows >= 0, self.bounds[rows + 1] - self.bounds[rows], 0)
        where = np.repeat(np.arange(len(rows)), counts)
        ends = np.cumsum(counts)
        within = np.arange(len(where)) - np.repeat(ends - counts, counts)
        return where, self.codes[self.bounds[rows[where]] + within]


def _read_labels(path: str | Path, store: Store) -> _Labels:
    lines = read_lines(path)
    numbers = {name: code for code, name in enumerate(sorted({label for _, label in lines}))}
    wanted: dict[str, list[int]] = {}
    for name, label in lines:
        of_name = wanted.setdefault(name, [])
        if numbers[label] not in of_name:
            of_name.append(numbers[label])
    matched: set[str] = set()
    counts = np.zeros(store.records + 1, np.int64)
    codes: list[int] = []
    for first in range(0, store.records, SEQUENCES_PER_CHUNK):
        ids, read_ids = _identifiers(store, slice(first, first + SEQUENCES_PER_CHUNK))
        for row, names in enumerate(zip(ids, read_ids, strict=True), first):
            known = [name for name in names if name in wanted]
            if known:
                matched.update(known)
                found = wanted[known[0]]
                counts[row + 1] = len(found)
                codes += found
    if not matched:
        raise UsageError(
            f"{path}: none of its {len(wanted):,} identifiers is in {store.path}; it has, for"
            f" example, {printable(lines[-1][0])!r}, and the store {printable(ids[0])!r}"
        )
    is_labelled = np.zeros(store.records, np.bool_)
    is_labelled[embedded_rows(store)] = True
    is_labelled &= counts[1:] > 0
    without = int((counts > 0).sum() - is_labelled.sum())
    if not is_labelled.any():
        raise UsageError(
            f"{store.path}: none of the {without:,} labelled rows has an embedding;"
            " `virnuc-dask resume` computes what is missing"
        )
    unmatched = [name for name in wanted if name not in matched]
    if unmatched[:1] == [lines[0][0]]:  # a header
        del unmatched[0]
    notes = []
    if unmatched:
        examples = ", ".join(map(printable, unmatched[:_NAMED]))
        dots = ", ..." if len(unmatched) > _NAMED else ""
        notes.append(
            f"{counted(len(unmatched), 'identifier')} of {path} not in {store.path} ({examples}"
            f"{dots})"
        )
    if without:
        notes.append(f"{counted(without, 'labelled row')} of {store.path} without an embedding")
    return _Labels(
        list(numbers), np.cumsum(counts), np.array(codes, np.int64), is_labelled, "; ".join(notes)
    )


def _identifiers(store: Store, rows: slice) -> tuple[list[str], list[str]]:
    """Those of rows, and of the reads or proteins that they are of; the former again without."""
    with store.reading("`sequence_id`"):
        ids = store.array("sequence_id")[rows].tolist()
    if "read_id" not in store.names:
        return ids, ids
    with store.reading("`read_id`"):
        numbers, which = np.unique(np.asarray(store.array("read")[rows]), return_inverse=True)
        return ids, store.array("read_id").oindex[numbers][which].tolist()


def read_lines(path: str | Path) -> list[tuple[str, str]]:
    """Identifier and label of each line of a file.

    Raises
    ------
    UsageError
        It cannot be read, or a line has no tab, no identifier or no label.
    """
    lines: list[tuple[str, str]] = []
    try:
        # A header may have bytes that are no UTF-8; so the same may be here.
        with open(expanded(path), "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if not text.strip():
                    continue
                name, *others = (_text(part) for part in text.split(b"\t"))
                if not others:
                    raise UsageError(f"{path}, line {number}: no tab; {_WANTED}")
                if not (name and others[0]):
                    missing = "label" if name else "identifier"
                    raise UsageError(f"{path}, line {number}: the {missing} is empty; {_WANTED}")
                if SEPARATOR in others[0]:
                    raise UsageError(
                        f"{path}, line {number}: {SEPARATOR!r} in a label; an identifier with"
                        " several labels has several lines"
                    )
                lines.append((name, others[0]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not lines:
        raise UsageError(f"{path}: no line; {_WANTED}")
    return lines


def _text(part: bytes) -> str:
    return decoded_header(part.decode("utf-8", "surrogateescape")).strip()


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WANTED = "each line is an identifier, a tab and a label"


# --- pooling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Votes:
    """What the neighbours say, by query, the most reliable label of each first; shape (votes,).

    Attributes
    ----------
    query : ndarray, int64
        Number in the batch.
    label : ndarray, int64
    reliability : ndarray, float64
    rank : ndarray, int64
        Of the nearest neighbour that carries the label, from 0.
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
    """From 0 to 1, of the cosine or of the distance times -1."""
    if metric == "cosine":
        return np.maximum(scores, 0)
    return _RELIABILITY_SCALE / (_RELIABILITY_SCALE - scores)


@dataclass(frozen=True, slots=True)
class _Best:
    """The most reliable label of each query, shape (queries,): -1, 0 and -1 where there is none."""

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
