"""Self-contained HTML page about a store, for people."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.chunk_passes import as_float32, check_finite
from virnuc_dask.analysis.neighbours import nearest, random_pairs
from virnuc_dask.analysis.outputs import check_out, whole_file
from virnuc_dask.analysis.points import axes
from virnuc_dask.analysis.prediction import doubts
from virnuc_dask.analysis.rows import file_names, source_numbers, taken
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.settings import Status
from virnuc_dask.store.results import Kind, Result, open_result, result_names
from virnuc_dask.store.status import quarantined, row_states
from virnuc_dask.store.store import (
    RESIDUES_PER_STORED_CHUNK,
    SEQUENCES_PER_CHUNK,
    Store,
    is_embedded,
)
from virnuc_dask.text import counted, duration, printable, rate

TEMPLATE = Path(__file__).with_name("report.html")

# Percent of residues. UniProtKB/Swiss-Prot release 2013_04, release statistics.
_LETTERS = "ARNDCQEGHILKMFPSTWYV"
_PERCENT = [8.25, 5.53, 4.06, 5.45, 1.37, 3.93, 6.75, 7.07, 2.27, 5.96]
_PERCENT += [9.66, 5.84, 2.42, 3.86, 4.70, 6.56, 5.34, 1.08, 2.92, 6.87]
_SWISS_PROT = dict(zip(_LETTERS, _PERCENT, strict=True))
_POINTS = 2000
_CHUNKS_SAMPLED = 64
_RESIDUE_CHUNKS_SAMPLED = 8
_BARS = 24
_CELLS = 256
_LISTED = 20
_NEIGHBOURS = 10
# Okabe and Ito's colours, distinct for the colour-blind; each also has its own shape.
_SERIES = (
    ("#0072b2", "circle"),
    ("#d55e00", "square"),
    ("#009e73", "triangle"),
    ("#cc79a7", "diamond"),
    ("#56b4e9", "cross"),
    ("#000000", "ring"),
)
# Colours of matplotlib's plasma, from low to high, without the light end.
_SCALE = (
    ("#0d0887", "circle"),
    ("#5302a3", "square"),
    ("#8b0aa5", "triangle"),
    ("#b83289", "diamond"),
    ("#db5c68", "cross"),
)
_OTHERS = ("#767676", "circle")
_NONE = ("#767676", "ring")
_CLUSTERS_COLOURED = 5


def report(
    store: str | Path,
    out: str | Path,
    *,
    query: str | None = None,
    telemetry: str | Path | None = None,
    force: bool = False,
    random_state: int = 0,
) -> Path:
    """Write a page about a store: settings, progress and content, also while a run fills it.

    The page contains no script and loads nothing. Status, lengths, clusters and scores cover all
    rows. Residues and the points of the map are samples; the page shows their sizes. So a store of
    a million rows takes seconds, and memory holds one chunk of embeddings. The map is coloured by
    the first of these that the store has: score, clusters, input files, lengths.

    Parameters
    ----------
    store : path
    out : path
        A new ``.html`` file.
    query : str, optional
        Identifier of a row; the page then shows its nearest neighbours. Of a read or tiled protein,
        it shows those of the first row.
    telemetry : path, optional
        Telemetry file of the runs. Default: ``STORE.telemetry.jsonl``, if it exists.
    force : bool
        Replace an existing file once the new one is complete.
    random_state : int
        Seed of the samples.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    UsageError
        `out` exists or is not an ``.html`` file, `query` is not an embedded row, or `telemetry`
        cannot be read.
    StoreError
        A chunk is damaged.
    NotAStoreError
    OSError
        The page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    path = check_out(out, (".html", ".htm"), force=force)
    opened = Store(store)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["shown"] = lambda text: printable(str(text), 120)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = page.render(_facts(opened, query, telemetry, np.random.default_rng(random_state)))
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
    return path


def _facts(
    store: Store, query: str | None, telemetry: str | Path | None, random: np.random.Generator
) -> dict[str, Any]:
    # Do this first, to report an unknown identifier or a missing file at once.
    neighbours = _neighbours(store, query) if query else None
    speed = _telemetry(store, telemetry)
    present = store.present()
    lengths = store.lengths()
    states = row_states(store.path)
    quarantine = sum(states.get(state.meaning, 0) for state in Status if state.quarantined)
    return {
        "name": Path(str(store.path)).name,
        "store": store,
        "model": store.model.name,
        "has_random_weights": store.model.has_random_weights,
        "provenance": store.provenance,
        "about": list(_about(store)),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "states": list(states.items()),
        "rows": _described_rows(store),
        "done": store.rows_in(np.flatnonzero(present)),
        "embedded": sum(states.get(s.meaning, 0) for s in Status if 0 < s < 16),
        "chunks_done": int(present.sum()),
        "cells": _cells(present),
        "lengths": _length_chart(lengths, store.identity.max_residues),
        "length_facts": _length_facts(lengths),
        "composition": _composition(store),
        "telemetry": speed,
        "quarantine": quarantine,
        "quarantined": list(islice(quarantined(store.path), _LISTED)) if quarantine else [],
        "map": _map(store, present, random),
        "query": neighbours and neighbours["query"],
        "neighbours": neighbours,
        "clusters": [_clusters(store, result) for result in _results(store, "cluster")],
        "scores": [_score(store, result) for result in _results(store, "score")],
    }


# --- about ---------------------------------------------------------------------------------------


def _described_rows(store: Store) -> str:
    """How many rows there are, and of how many reads or proteins, which may have none."""
    if "read" not in store.names:
        return counted(store.records, "sequence")
    some, last = 0, -1
    for first in range(0, store.records, SEQUENCES_PER_CHUNK):
        with store.reading("`read`"):
            read = np.asarray(store.array("read")[first : first + SEQUENCES_PER_CHUNK])
        some += int((np.diff(read, prepend=last) != 0).sum())  # the rows of a read are consecutive
        last = int(read[-1])
    of, row = ("reads", "frame") if store.identity.translation else ("proteins", "tile")
    every = store.array("read_id").shape[0]
    return f"{counted(store.records, row)} of {some:,} of {every:,} {of}"


def _about(store: Store) -> Iterator[tuple[str, str]]:
    identity, provenance = store.identity, store.provenance
    # The page may be sent to others, so it names files without the folders of this machine.
    yield "Model", store.model.name
    yield "SHA-256 of the weights", identity.weights_sha256
    yield "Layer", str(identity.repr_layer)
    yield "Pooling", identity.pooling
    yield "Features", f"{store.dimension:,}, stored as {identity.dtype}"
    yield "Precision", f"{identity.precision} on {store.device or 'an unknown device'}"
    yield "Long sequences", f"{identity.long}, over {identity.max_residues:,} residues"
    if identity.translation:
        yield "Translation", str(identity.translation)
    if identity.tiling:
        yield "Tiling", str(identity.tiling)
    yield "Input", ", ".join(file_names(store))
    yield "SHA-256 of the input", identity.input_sha256
    yield "Made", str(provenance.get("created", "unknown")).replace("T", " ")
    versions = provenance.get("versions", {})
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _cells(present: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Cells for chunks in order; a cell is one chunk, or several if there are many."""
    count = min(len(present), _CELLS)
    edges = np.linspace(0, len(present), count + 1).astype(int)
    return [
        {
            "share": float(present[a:b].mean()),
            "title": f"chunk {a:,}" if b == a + 1 else f"chunks {a:,} to {b - 1:,}",
        }
        for a, b in pairwise(edges.tolist())
    ]


# --- charts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram.

    Attributes
    ----------
    edges : list of float
    counts : list of int
        One fewer than `edges`.
    ticks : list of float
        Round numbers on the axis.
    beyond : int
        Values above the last edge, which are not drawn.
    """

    edges: list[float]
    counts: list[int]
    ticks: list[float]
    beyond: int = 0

    @property
    def most(self) -> int:
        """The highest count, at least 1."""
        return max(1, *self.counts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    if not high > low:
        return [low]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _length_chart(lengths: NDArray[np.int32], longest: int) -> Bars:
    # Leave out the longest percent, which would leave no room for the others.
    high = max(float(np.quantile(lengths, 0.99)), 1.0) + 1
    step = max(1, math.ceil(high / _BARS))
    edges = np.arange(0, step * _BARS + 1, step)
    edges = edges[: np.searchsorted(edges, high) + 1]
    counts = np.histogram(lengths, edges)[0]
    # NumPy's last bin includes its upper edge, so only longer sequences are beyond.
    return Bars(
        edges.astype(float).tolist(),
        counts.tolist(),
        _ticks(0, float(edges[-1])),
        int((lengths > edges[-1]).sum()),
    )


def _length_facts(lengths: NDArray[np.int32]) -> list[tuple[str, str]]:
    low, median, high = np.quantile(lengths, [0, 0.5, 1])
    return [
        ("Shortest", f"{low:,.0f}"),
        ("Median", f"{median:,.0f}"),
        ("Mean", f"{lengths.mean():,.1f}"),
        ("Longest", f"{high:,.0f}"),
        ("Residues in all", f"{lengths.sum(dtype=np.int64):,}"),
    ]


def _composition(store: Store) -> dict[str, Any]:
    array = store.array("residues")
    firsts = list(range(0, array.shape[0], RESIDUES_PER_STORED_CHUNK))
    step = -(-len(firsts) // _RESIDUE_CHUNKS_SAMPLED) if firsts else 1
    counts = np.zeros(256, np.int64)
    with store.reading("`residues`"):
        for first in firsts[::step]:
            part = np.asarray(array[first : first + RESIDUES_PER_STORED_CHUNK])
            counts += np.bincount(part, minlength=256)
    total = int(counts.sum())
    known = {letter: int(counts[ord(letter)]) for letter in _SWISS_PROT}
    others = total - sum(known.values())
    bars: list[dict[str, Any]] = [
        {"letter": letter, "here": 100 * known[letter] / max(total, 1), "there": there}
        for letter, there in sorted(_SWISS_PROT.items())
    ]
    most = max(max(bar["here"], bar["there"]) for bar in bars)
    return {
        "bars": bars,
        "most": most,
        "ticks": _ticks(0, most),
        "residues": total,
        "all": len(firsts[::step]) == len(firsts),
        "others": others / max(total, 1),
    }


# --- telemetry -----------------------------------------------------------------------------------

_PHASES = {
    "read_s": "reading",
    "wait_s": "waiting for its turn",
    "compute_s": "computing",
    "write_s": "writing",
}
_BEFORE_CHUNKS = ("run_started", "workers_changed", "workers_checked")
_LONGEST_RUN_S = 1e9


def _telemetry(store: Store, path: str | Path | None) -> dict[str, Any] | None:
    """Speed of the runs, from the readable lines of the telemetry; None without any."""
    is_given = path is not None
    if path is None:
        if "://" in str(store.path):
            return None
        path = f"{store.path}.telemetry.jsonl"
    ends: list[tuple[float, float, float]] = []
    phases = dict.fromkeys(_PHASES, 0.0)
    # For each run, when its workers were ready, and when it computed.
    before: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    busy: list[tuple[float, float]] = []
    memory, lost = 0.0, 0
    try:
        with open(expanded(path), encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    event = json.loads(line)
                    run, kind = str(event["run"]), event["event"]
                    if kind == "store_to_be_replaced":  # what came before is of another store
                        for of_runs in (ends, before, spans, busy):
                            of_runs.clear()
                        phases, memory, lost = dict.fromkeys(_PHASES, 0.0), 0.0, 0
                    lost += kind == "worker_lost"
                    time = datetime.fromisoformat(event["time"]).timestamp()
                    if kind == "run_summary" and run in spans:
                        numbers = [float(event["seconds"]), float(event["busy"] or 0)]
                        if not (0 <= numbers[0] < _LONGEST_RUN_S and 0 <= numbers[1] <= 1):
                            continue
                    elif kind == "chunk_done" and event["computed"]:
                        numbers = [float(event[name]) for name in ("rows", "residues", *_PHASES)]
                        memory = max(memory, float(event["memory"]))
                    else:
                        if kind in _BEFORE_CHUNKS and run not in spans:
                            before[run] = time
                        continue
                except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                    continue  # a killed run leaves an incomplete line
                if not all(map(math.isfinite, numbers)):
                    continue
                if kind == "run_summary":
                    spans[run] = (spans[run][1] - numbers[0], spans[run][1])
                    busy.append((numbers[0], numbers[1]))
                    continue
                ends.append((time, numbers[0], numbers[1]))
                spans[run] = (spans[run][0] if run in spans else before.get(run, time), time)
                for name, seconds in zip(_PHASES, numbers[2:], strict=True):
                    phases[name] += seconds
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not is_given:
            return None
        raise UsageError(
            f"{path}: this telemetry cannot be read: {error.strerror or error}"
        ) from error
    if not ends:
        return None
    times, rows, residues = np.array(sorted(ends)).T
    seconds = _covered(spans.values())
    summarised = sum(seconds for seconds, _ in busy)
    spent = sum(phases.values())
    return {
        "runs": len(spans),
        "chunks": len(ends),
        "rows": int(rows.sum()),
        "lost": lost,
        "memory": f"{memory / 2**20:,.0f} MiB",
        "span": duration(seconds) if seconds else None,
        "rate": rate(rows.sum() / seconds) if seconds else None,
        "residue_rate": rate(residues.sum() / seconds) if seconds else None,
        "busy": sum(math.prod(each) for each in busy) / summarised if summarised else None,
        "line": _cumulative(times, rows),
        "phases": [
            {"name": _PHASES[name], "share": seconds / max(spent, 1e-9), "took": duration(seconds)}
            for name, seconds in phases.items()
        ],
    }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of these spans, since runs may share a store."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def _cumulative(times: NDArray[np.float64], rows: NDArray[np.float64]) -> dict[str, Any] | None:
    """Rows done over hours or minutes, at most 200 points from 0 to 1."""
    span = float(times[-1] - times[0])
    if len(times) < 3 or not span:
        return None
    done = np.cumsum(rows)
    some = np.unique(np.linspace(0, len(times) - 1, min(len(times), 200)).astype(int))
    x, y = (times[some] - times[0]) / span, done[some] / done[-1]
    unit, name = next(pair for pair in _UNITS if span >= 2 * pair[0] or pair[0] == 1)
    return {
        "points": [(round(float(a), 4), round(float(b), 4)) for a, b in zip(x, y, strict=True)],
        "x_ticks": [(tick * unit / span, f"{tick:g}") for tick in _ticks(0, span / unit)],
        "y_ticks": [(tick / done[-1], f"{tick:,.0f}") for tick in _ticks(0, float(done[-1]))],
        "unit": name,
    }


_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


# --- results -------------------------------------------------------------------------------------

# Numbers of a fit, which are not for people.
_NUMBERS = ("mean", "axes", "origin", "centres", "sampled_rows")
_TITLES = {
    "classifier": "SHA-256 of the classifier",
    "explained_variance_ratio": "shares of the variance",
}


def _results(store: Store, kind: Kind) -> list[Result]:
    return [open_result(store, name) for name in result_names(store) if name.startswith(f"{kind}_")]


def _fullest(store: Store, kind: Kind, present: NDArray[np.bool_]) -> Result | None:
    """The result with the most of these chunks, or the first of several; None without any."""
    results = _results(store, kind)
    counts = [int((present & each.present()).sum()) for each in results]
    most = max(counts, default=0)
    return results[counts.index(most)] if most else None


def _listed(result: Result) -> list[tuple[str, str]]:
    """Settings of a result, for people."""
    return [
        (_TITLES.get(key, key.replace("_", " ")), _as_text(value))
        for key, value in result.about.items()
        if key not in _NUMBERS
    ]


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- the map -------------------------------------------------------------------------------------


def _map(
    store: Store, present: NDArray[np.bool_], random: np.random.Generator
) -> dict[str, Any] | None:
    """Points of a sample, from the most complete map in the store or else from a PCA."""
    result = _fullest(store, "map", present)
    if result:
        present = present & result.present()
    rows, values = _sample(store, np.flatnonzero(present), random, result)
    if len(rows) < 3:
        return None
    facts: dict[str, Any] = {"method": f"the result {result.name}" if result else "PCA"}
    if result:
        points = values.astype(np.float64)
        facts["about"] = _listed(result)
        facts["axes"] = axes(result)
    else:
        points, explained = _principal(values)
        facts["about"] = []
        facts["axes"] = tuple(
            f"PC {number} ({share:.1%} of variance)" for number, share in enumerate(explained, 1)
        )
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1)
    colour, group, series = _colouring(store, present, rows)
    ids, lengths = taken(store, "sequence_id", rows), taken(store, "length", rows)
    dots = [
        {
            "x": float(x),
            "y": float(y),
            "series": int(number),
            "title": f"{printable(str(name), 60)}, {length:,} residues",
        }
        for (x, y), number, name, length in zip(scaled, group, ids, lengths, strict=True)
    ]
    return facts | {"dots": dots, "series": series, "colour": colour}


def _sample(
    store: Store, chunks: NDArray[np.int64], random: np.random.Generator, result: Result | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A sample of embedded rows, and their embeddings or their values in a result."""
    # If chunks are small, take more of them.
    most = max(_CHUNKS_SAMPLED, 2 * _POINTS // store.identity.rows_per_chunk)
    some = np.sort(random.permutation(chunks)[:most]).tolist()
    each = -(-_POINTS // max(1, len(some)))
    rows: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float32]] = []
    for chunk in some:
        with store.reading(f"chunk {chunk}"):
            status = store.read_status(chunk)
            drawn = np.flatnonzero(is_embedded(status))
            drawn = np.sort(random.permutation(drawn)[:each])
            span = store.rows(chunk)
            if result:
                part = result.read(span)[drawn]
            else:
                part = as_float32(store.read_chunk(chunk)[1][drawn])
        check_finite(store, part)
        rows.append(span.start + drawn)
        values.append(part)
    if not rows:
        return np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
    # Rounding up gives at most one row too many per chunk.
    keep = np.sort(random.permutation(sum(map(len, rows)))[:_POINTS])
    return np.concatenate(rows)[keep], np.concatenate(values)[keep]


def _principal(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], list[float]]:
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="randomized", random_state=0)
    points = pca.fit_transform(values.astype(np.float64))
    return points, [float(share) for share in np.nan_to_num(pca.explained_variance_ratio_)]


# Series number of each row, and names and marks of the series.
_Groups = tuple[NDArray[np.int64], list[tuple[str, tuple[str, str]]]]


def _colouring(
    store: Store, present: NDArray[np.bool_], rows: NDArray[np.int64]
) -> tuple[str, NDArray[np.int64], list[dict[str, Any]]]:
    """Colours of rows by the first of: score, cluster, input file, length."""
    if score := _fullest(store, "score", present):
        colour, (group, marked) = score.name, _by_score(score.read(rows))
    elif cluster := _fullest(store, "cluster", present):
        colour, (group, marked) = cluster.name, _by_cluster(cluster.read(rows))
    elif 1 < len(store.files) <= len(_SERIES):
        colour, (group, marked) = "input file", _by_file(store, rows)
    else:
        colour, (group, marked) = "length", _by_length(taken(store, "length", rows))
    series = [
        {"name": name, "colour": ink, "shape": shape, "count": int((group == number).sum())}
        for number, (name, (ink, shape)) in enumerate(marked)
    ]
    return colour, group, series


def _by_score(values: NDArray[np.float32]) -> _Groups:
    """Five groups of equal width."""
    count = len(_SCALE)
    is_scored = np.isfinite(values)
    part = np.clip(np.where(is_scored, values, 0) * count, 0, count - 1).astype(np.int64)
    names = [f"{n / count:.1f} to {(n + 1) / count:.1f}" for n in range(count)]
    marked = [*zip(names, _SCALE, strict=True), ("no score", _NONE)]
    return np.where(is_scored, part, count), marked


def _by_cluster(values: NDArray[np.int32]) -> _Groups:
    """The largest clusters, all other clusters, and rows without a cluster."""
    numbers, counts = np.unique(values[values >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_CLUSTERS_COLOURED]
    largest = np.sort(numbers[order]).tolist()
    group = np.where(values < 0, len(largest) + 1, len(largest))
    for position, number in enumerate(largest):
        group[values == number] = position
    names = [f"cluster {number}" for number in largest]
    marked = [*zip(names, _SERIES, strict=False), ("other clusters", _OTHERS)]
    return group.astype(np.int64), [*marked, ("no cluster", _NONE)]


def _by_file(store: Store, rows: NDArray[np.int64]) -> _Groups:
    return source_numbers(store, rows), list(zip(file_names(store), _SERIES, strict=False))


def _by_length(lengths: NDArray[np.int32]) -> _Groups:
    """Four groups of equal size."""
    cuts = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]).astype(int))
    bounds = [0, *cuts.tolist()]
    names = [f"{a + 1:,} to {b:,} residues" for a, b in pairwise(bounds)]
    names.append(f"over {bounds[-1]:,} residues")
    return np.searchsorted(cuts, lengths, side="left"), list(zip(names, _SCALE, strict=False))


# --- neighbours, clusters and scores -------------------------------------------------------------


def _neighbours(store: Store, query: str) -> dict[str, Any]:
    hits = nearest(store.path, query, k=_NEIGHBOURS).isel(query=0)
    rows = [
        {
            "id": str(hits.sequence_id.values[rank]),
            "similarity": f"{hits.similarity.values[rank]:.3f}",
            "length": int(hits.length.values[rank]),
            "description": str(hits.description.values[rank]) if "description" in hits else "",
        }
        for rank in np.flatnonzero(hits.row.values >= 0).tolist()
    ]
    return {"query": hits.query_id.item(), "rows": rows, "random": random_pairs(hits.attrs)}


def _clusters(store: Store, result: Result) -> dict[str, Any]:
    """Number of rows in each cluster, the largest first, counted chunk by chunk."""
    sizes: Counter[int] = Counter()
    for chunk in np.flatnonzero(result.present()).tolist():
        numbers, counts = np.unique(result.read(store.rows(chunk)), return_counts=True)
        sizes.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    del sizes[-1]  # rows without an embedding
    rows = sizes.total()
    order = sorted(sizes, key=lambda number: (-sizes[number], number))
    return {
        "name": result.name,
        "about": _listed(result),
        "rows": rows,
        "count": len(order),
        "largest": [
            {"number": number, "rows": sizes[number], "share": sizes[number] / rows}
            for number in order[:_LISTED]
        ],
    }


def _score(store: Store, result: Result) -> dict[str, Any]:
    """Histogram of all scores, and the reads or rows with the highest scores.

    The score of a read, or of a tiled protein, is the mean over its rows.
    """
    counts, total, first = np.zeros(_SCORE_BARS, np.int64), 0, 0
    has_reads = "read" in store.names
    reads = store.array("read_id").shape[0] if has_reads else 0
    sums, of_read = np.zeros(reads), np.zeros(reads, np.int64)
    best = (np.zeros(0), np.zeros(0, np.int64))
    for chunk in np.flatnonzero(result.present()).tolist():
        span = store.rows(chunk)
        values = result.read(span).astype(np.float64)
        rows = np.flatnonzero(np.isfinite(values))
        values = values[rows]
        counts += _score_counts(values)
        total += len(rows)
        first += int((values >= 0.5).sum())
        if has_reads:
            with store.reading("`read`"):
                read = np.asarray(store.array("read")[span])[rows]
            np.add.at(sums, read, values)
            np.add.at(of_read, read, 1)
        else:
            best = _highest(
                np.concatenate([best[0], values]), np.concatenate([best[1], span.start + rows])
            )
    means = np.zeros(0)
    if has_reads:
        scored = np.flatnonzero(of_read)
        means = sums[scored] / of_read[scored]
        best = _highest(means, scored)
    names = _read_ids(store, best[1]) if has_reads else taken(store, "sequence_id", best[1])
    has_texts = not has_reads and "description" in store.names
    texts = taken(store, "description", best[1]) if has_texts else [""] * len(names)
    return {
        "name": result.name,
        "about": _listed(result),
        "bars": _score_bars(counts),
        "warnings": doubts(result),
        "class": _first_class(result),
        "rows": total,
        "first": first,
        "unit": ("read" if store.identity.translation else "protein") if has_reads else None,
        "read_bars": _score_bars(_score_counts(means)),
        "reads": len(means),
        "first_reads": int((means >= 0.5).sum()),
        "top": [
            {
                "id": str(name),
                "description": str(text),
                "score": f"{value:.3f}",
                "rows": int(of_read[number]) if has_reads else 1,
            }
            for name, text, value, number in zip(
                names, texts, best[0], best[1].tolist(), strict=True
            )
        ],
    }


def _first_class(result: Result) -> str:
    """Name of the class that high scores stand for."""
    classes = result.about.get("classes")
    return str(classes[0]) if isinstance(classes, list) and classes else "the first class"


_SCORE_BARS = 20
_SCORE_EDGES = np.linspace(0, 1, _SCORE_BARS + 1)


def _score_counts(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.histogram(np.clip(values, 0, 1), _SCORE_EDGES)[0].astype(np.int64)


def _score_bars(counts: NDArray[np.int64]) -> Bars:
    return Bars(_SCORE_EDGES.tolist(), counts.tolist(), [0, 0.25, 0.5, 0.75, 1])


def _highest(
    values: NDArray[np.float64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    order = np.lexsort((numbers, -values))[:_LISTED]
    return values[order], numbers[order]


def _read_ids(store: Store, reads: NDArray[np.int64]) -> list[str]:
    unique, where = np.unique(reads, return_inverse=True)
    with store.reading("`read_id`"):
        names = np.asarray(store.array("read_id").oindex[unique])
    return [str(name) for name in names[where]]
