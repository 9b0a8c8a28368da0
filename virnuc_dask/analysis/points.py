"""Data of a map drawing: some rows of the map, with their metadata and colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.labels import SEPARATOR, read_lines
from virnuc_dask.analysis.prediction import doubts
from virnuc_dask.analysis.rows import (
    file_names,
    known_names,
    random_rows,
    source_numbers,
    states,
    taken,
)
from virnuc_dask.analysis.stored_fits import check_seed
from virnuc_dask.errors import UsageError
from virnuc_dask.store.results import RESULT, Result, open_result, result_names
from virnuc_dask.store.store import Store
from virnuc_dask.text import printable

MOST_POINTS = 20_000
_COLUMNS = ("length", "source", "frame", "status")
_LABELS = ".tsv"
_UNLABELLED, _UNCLUSTERED = "no label", "no cluster yet"
# Categories that are the absence of one.
NONE = (_UNLABELLED, _UNCLUSTERED)
_LONGEST_TEXT = 200


@dataclass(frozen=True, slots=True)
class Points:
    """Rows of a map to draw. Texts come from files as they are, so drawings must escape them.

    Attributes
    ----------
    title, subtitle : str
        Method, store and model; number of drawn rows and of all rows.
    warning : str, optional
        Random weights, and reasons to doubt scores, one per line.
    axes : tuple of str
        Names of both axes.
    xy : ndarray, float32, shape (n, 2)
    ids, descriptions : list of str
    lengths : ndarray, int32, shape (n,)
        Residues.
    colour : str
        What the colours show.
    values : ndarray, float64, shape (n,), or list of str
        Numbers, NaN if missing, or categories.
    categories : list of str
        All categories in `values`, in display order; empty for numbers.
    is_logarithmic : bool
        Whether the colour scale of the numbers is logarithmic.
    """

    title: str
    subtitle: str
    warning: str | None
    axes: tuple[str, str]
    xy: NDArray[np.float32]
    ids: list[str]
    descriptions: list[str]
    lengths: NDArray[np.int32]
    colour: str
    values: NDArray[np.float64] | list[str]
    categories: list[str]
    is_logarithmic: bool = False


def check_colour(store: Store, colour: str) -> None:
    """Check that a store's rows can be coloured this way, before any long work.

    Raises
    ------
    UsageError
        They cannot.
    """
    if colour == "frame" and not store.identity.translation:
        raise UsageError(f"{store.path}: rows have no frame, because they were not translated")
    columns = [name for name in _COLUMNS if name in store.names]
    if colour in columns:
        return
    if RESULT.fullmatch(colour) and not colour.startswith("map_"):
        open_result(store, colour)
    elif colour.lower().endswith(_LABELS):
        read_lines(colour)
    else:
        results = [name for name in result_names(store) if not name.startswith("map_")]
        known = ", ".join([*columns, *results])
        raise UsageError(f"cannot colour by {colour!r}: give {known}, or a {_LABELS} file")


def draw_points(
    store: Store,
    name: str,
    *,
    colour: str = "length",
    points: int = MOST_POINTS,
    random_state: int = 0,
) -> Points:
    """Rows of a map, all or a random sample, with their metadata and colours.

    Parameters
    ----------
    store : Store
    name : str
        Name of the map, without ``map_``.
    colour : str
        As in `draw_map`.
    points : int
        Most rows to draw.
    random_state : int
        Seed of the sample.

    Returns
    -------
    Points

    Raises
    ------
    UsageError
        The map does not exist or is empty, or `colour` is not valid.
    StoreError
        A chunk is damaged.
    """
    if points < 1:
        raise UsageError(f"points must be at least 1, not {points}")
    check_seed(random_state)
    check_colour(store, colour)
    result = open_result(store, f"map_{name}")
    present = store.present() & result.present()
    rows, is_sample = random_rows(store, present, points, random_state)
    if not len(rows):
        raise UsageError(
            f"{store.path}: `{result.name}` has no row yet; `virnuc-dask map` computes it"
        )
    texts = {
        text: [str(value)[:_LONGEST_TEXT] for value in taken(store, text, rows)]
        for text in ("sequence_id", "description")
        if text in store.names
    }
    return Points(
        _title(store, result),
        _subtitle(store, len(rows), present, is_sample),
        _warning(store, colour),
        axes(result),
        _of_result(result, rows),
        texts["sequence_id"],
        texts.get("description", [""] * len(rows)),
        taken(store, "length", rows),
        *_colours(store, colour, rows),
    )


def _title(store: Store, result: Result) -> str:
    method = str(result.about.get("method", "map")).upper()
    name = printable(str(store.path).rstrip("/").rpartition("/")[2], _LONGEST_TEXT)
    how = f"layer {store.model.repr_layer}, {store.model.pooling} pooling"
    return f"{method} of {name}: {printable(store.model.name, _LONGEST_TEXT)}, {how}"


def _subtitle(store: Store, drawn: int, present: NDArray[np.bool_], is_sample: bool) -> str:
    text = f"all {drawn:,} embedded rows"
    if is_sample:
        rows = store.rows_in(np.flatnonzero(present))
        text = f"{drawn:,} of {rows:,} rows, drawn at random"
    missing = int((~present).sum())
    return text + (f"; {missing:,} of {store.chunk_count:,} chunks are missing" if missing else "")


def _warning(store: Store, colour: str) -> str | None:
    warnings = [store.model.comment().get("comment")]
    if RESULT.fullmatch(colour) and colour.startswith("score_"):
        warnings += doubts(open_result(store, colour))
    return "\n".join(filter(None, warnings)) or None


def axes(result: Result) -> tuple[str, str]:
    """Names of the axes of a map."""
    ratio = result.about.get("explained_variance_ratio")
    if isinstance(ratio, list) and len(ratio) == 2:
        first, second = (
            f"PC {n} ({float(part):.1%} of variance)" for n, part in enumerate(ratio, 1)
        )
        return first, second
    name = str(result.about.get("method", "axis")).upper()
    return f"{name} 1", f"{name} 2"


def _of_result(result: Result, rows: NDArray[np.int64]) -> NDArray[Any]:
    with result.store.reading(f"`{result.name}`"):
        return np.asarray(result.array.oindex[rows])


# --- colours -------------------------------------------------------------------------------------

_Colours = tuple[str, NDArray[np.float64] | list[str], list[str], bool]


def _colours(store: Store, colour: str, rows: NDArray[np.int64]) -> _Colours:
    """Name, values and categories of the colours, and whether the scale is logarithmic."""
    if colour == "length":
        return "length in residues", taken(store, colour, rows).astype(np.float64), [], True
    if colour == "status":
        return _categories(colour, states(store, rows).tolist())
    if colour == "source":
        names = file_names(store)  # in the order of the input
        return "input file", [names[n] for n in source_numbers(store, rows)], names, False
    if colour == "frame":
        numbers = taken(store, colour, rows).tolist()
        named = [f"{number:+d}" for number in numbers]
        return colour, named, [f"{number:+d}" for number in sorted(set(numbers))], False
    if RESULT.fullmatch(colour):
        values = _of_result(open_result(store, colour), rows)
        if colour.startswith("score_"):
            return colour, values.astype(np.float64), [], False
        numbers = values.tolist()
        named = [_cluster(number) for number in numbers]
        return colour, named, [_cluster(number) for number in sorted(set(numbers))], False
    names_of_rows = known_names(store, rows)
    labels: dict[str, str] = {}
    lines = read_lines(colour)
    for name, label in lines:
        labels[name] = f"{labels[name]}{SEPARATOR}{label}" if name in labels else label
    named = [
        next((labels[name] for name in names if name in labels), "") for names in names_of_rows
    ]
    if not any(named):
        file_has, store_has = printable(lines[-1][0]), printable(names_of_rows[0][0])
        raise UsageError(
            f"{colour}: none of its identifiers belongs to a drawn row; for example, the file has"
            f" {file_has!r} and the store {store_has!r}"
        )
    name = Path(colour).stem[:_LONGEST_TEXT]
    numbers = [_number(label) for label in named]
    if all(number is not None for number in numbers) and len({*named} - {""}) > len(_FEW):
        return name, np.array(numbers, np.float64), [], False
    return _categories(name, [label or _UNLABELLED for label in named])


# More different numbers than this form a scale; fewer are categories.
_FEW = range(12)


def _categories(name: str, values: list[str]) -> _Colours:
    """Categories, the most frequent first, then by name."""
    known, counts = np.unique(np.array(values, object).astype(str), return_counts=True)
    order = sorted(zip((-counts).tolist(), known.tolist(), strict=True))
    return name, values, [each for _, each in order], False


def _cluster(number: int) -> str:
    return str(number) if number >= 0 else _UNCLUSTERED


def _number(label: str) -> float | None:
    """The finite number in a label; NaN for an empty label, None for any other text."""
    try:
        value = float(label or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) or not label else None
