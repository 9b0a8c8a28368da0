"""Drawings of maps as PNG or as HTML that needs no network."""

from __future__ import annotations

import warnings
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.outputs import check_out, whole_file
from virnuc_dask.analysis.points import MOST_POINTS, NONE, Points, draw_points
from virnuc_dask.store.store import Store

DRAWINGS = (".html", ".png")
# Okabe and Ito's colours, distinct for any kind of colour vision (jfly.uni-koeln.de, 2008), in an
# order in which neighbours also differ in lightness. Paul Tol's wine replaces their yellow, which
# is not visible on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#000000")
_GREY = "#999999"
_LONGEST_LABEL = 20
_ALPHA, _DIMMED = 0.75, 0.12
# How many of plasma's 256 colours are used. They differ in lightness for any kind of colour vision;
# the others, up to yellow, are too light on white.
_DARK_COLOURS = 160
_SMALL, _LARGE, _MANY = 5, 8, 3000
_DPI = 150

# This code compares the texts of rows. It never shows them as HTML.
_SEARCH = """
const text = cb_obj.value_input.trim().toLowerCase()
const ids = all.data.id, descriptions = all.data.description
const rows = []
if (text)
  for (let i = 0; i < ids.length; i++)
    if (ids[i].toLowerCase().includes(text) || descriptions[i].toLowerCase().includes(text))
      rows.push(i)
const data = {}
for (const name of Object.keys(found.data))
  data[name] = rows.map((row) => all.data[name][row])
found.data = data
for (const renderer of renderers) {
  renderer.glyph.fill_alpha = {value: text ? dimmed : alpha}
}
count.text = text ? `${rows.length} of ${ids.length} drawn rows match` : ""
"""

_PAGE = """
{% block preamble %}<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { margin: 8px; }</style>{% endblock %}
"""


def draw_map(
    store: str | Path,
    name: str = "pca",
    out: str | Path = "map.html",
    *,
    colour: str = "length",
    points: int = MOST_POINTS,
    random_state: int = 0,
    force: bool = False,
) -> int:
    """Draw a map from `make_map`.

    Parameters
    ----------
    store : path
    name : str
        Name of the map, without ``map_``.
    out : path
        ``.html``: one file that needs no network, with zoom, hover and search.
        ``.png``: a picture.
    colour : str
        ``length``, ``source`` (the input file), ``frame``, ``status``, ``score_NAME``,
        ``cluster_NAME``, or a ``.tsv`` file of identifiers and labels as in `annotate`. Labels are
        categories, unless they are all numbers with more than twelve different values. Each of the
        eight most frequent categories has its own colour; the others are grey.
    points : int
        Most rows to draw; of more rows, a random sample.
    random_state : int
        Seed of that sample.
    force : bool
        Replace `out`.

    Returns
    -------
    int
        Number of drawn rows.

    Raises
    ------
    UsageError
        The map does not exist, `colour` is not valid, or `out` exists or cannot be written.
    NotAStoreError, StoreError, OSError
    """
    path = check_out(out, DRAWINGS, force=force)
    drawn = draw_points(Store(store), name, colour=colour, points=points, random_state=random_state)
    write_drawing(drawn, path, force=force)
    return len(drawn.ids)


def write_drawing(points: Points, out: str | Path, *, force: bool = False) -> None:
    """Write points as HTML or PNG; see `draw_map`."""
    path = check_out(out, DRAWINGS, force=force)
    write = _write_html if path.suffix.lower() == ".html" else _write_png
    with whole_file(path) as unfinished:
        write(points, unfinished)


def scatter(points: Points) -> Any:
    """Points as a Bokeh model with a title, a search box and hover texts.

    Parameters
    ----------
    points : Points

    Returns
    -------
    bokeh.models.Column
    """
    from bokeh.layouts import column
    from bokeh.models import ColumnDataSource, CustomJS
    from bokeh.models.widgets import Div, TextInput
    from bokeh.plotting import figure

    columns: dict[str, Any] = {
        "x": points.xy[:, 0],
        "y": points.xy[:, 1],
        "id": points.ids,
        "description": points.descriptions,
        "length": points.lengths,
        "value": points.values,
    }
    source = ColumnDataSource(columns)
    found = ColumnDataSource({name: [] for name in columns})
    plot = figure(
        height=560,
        # Axes of one scale, as in the PNG, would leave a third of a wide window empty.
        sizing_mode="stretch_width",
        output_backend="webgl",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_scroll="wheel_zoom",
        x_axis_label=points.axes[0],
        y_axis_label=points.axes[1],
    )
    plot.toolbar.logo = None
    plot.grid.grid_line_alpha = 0.4
    drawn = (
        _categories(plot, source, points) if points.categories else _numbers(plot, source, points)
    )
    rings = plot.scatter(
        "x", "y", source=found, size=13, fill_color=None, line_color="black", line_width=1.5
    )
    plot.add_tools(_hover(points, [*drawn, rings]))
    count = Div(text="", disable_math=True, name="count", min_height=20)
    search = TextInput(
        placeholder="Search identifiers and descriptions",
        name="search",
        width_policy="max",
        max_width=360,
    )
    code = CustomJS(
        args={
            "all": source,
            "found": found,
            "count": count,
            "renderers": drawn,
            "alpha": _ALPHA,
            "dimmed": _DIMMED,
        },
        code=_SEARCH,
    )
    search.js_on_change("value_input", code)
    return column(
        Div(text=_heading(points), disable_math=True, sizing_mode="stretch_width"),
        search,
        count,
        plot,
        sizing_mode="stretch_width",
    )


def _heading(points: Points) -> str:
    lines = [f"<b style='font-size:1.2em'>{escape(points.title)}</b>", escape(points.subtitle)]
    if points.warning:
        lines += [
            f"<b style='color:#B00000'>{escape(line)}</b>" for line in points.warning.splitlines()
        ]
    return "<br>".join(lines)


def _size(points: Points) -> int:
    return _LARGE if len(points.ids) <= _MANY else _SMALL


def _numbers(plot: Any, source: Any, points: Points) -> list[Any]:
    from bokeh.models import LinearColorMapper, LogColorMapper, LogTicker, NumeralTickFormatter
    from bokeh.models.annotations import ColorBar

    low, high = _span(points)
    mapper = (LogColorMapper if points.is_logarithmic else LinearColorMapper)(
        palette=_scale(), low=low, high=high, nan_color=_GREY
    )
    renderer = plot.scatter(
        "x",
        "y",
        source=source,
        size=_size(points),
        fill_color={"field": "value", "transform": mapper},
        fill_alpha=_ALPHA,
        line_color=None,
    )
    bar = ColorBar(color_mapper=mapper, title=_plain(points.colour), height=10, padding=6)
    if points.is_logarithmic:
        bar.ticker = LogTicker(mantissas=[1, 2, 5])
        bar.formatter = NumeralTickFormatter(format="0,0")
    plot.add_layout(bar, "below")
    return [renderer]


def _scale() -> list[str]:
    """Colours for numbers, from low to high, all visible on white."""
    from bokeh.palettes import Plasma256

    return list(Plasma256[:_DARK_COLOURS])


def _categories(plot: Any, source: Any, points: Points) -> list[Any]:
    """One renderer per category, so that a click in the legend hides it."""
    from bokeh.models import CDSView, IndexFilter
    from bokeh.models.annotations import Legend, LegendItem

    groups = _groups(points)
    renderers = [
        plot.scatter(
            "x",
            "y",
            source=source,
            view=CDSView(filter=IndexFilter(rows.tolist())),
            size=_size(points),
            fill_color=colour,
            fill_alpha=_ALPHA,
            line_color=None,
        )
        for _, colour, rows in reversed(groups)  # the grey points are below the others
    ][::-1]
    labels = [label for label, _, _ in groups]
    legend = Legend(
        items=[
            LegendItem(label={"value": label}, renderers=[renderer])
            for label, renderer in zip(labels, renderers, strict=True)
        ],
        title=f"{_plain(points.colour)} (click to hide)",
        click_policy="hide",
        orientation="horizontal",
        ncols=2 if max(map(len, labels)) > 12 else 3,
        location="top_left",
        label_text_font_size="8pt",
        border_line_color=None,
    )
    plot.add_layout(legend, "below")
    return renderers


def _groups(points: Points) -> list[tuple[str, str, NDArray[np.intp]]]:
    """Label, colour and points of each category; the last, in grey, has all the others."""
    values = np.array(points.values, object)
    own = [each for each in points.categories if each not in NONE]
    if len(own) > len(_COLOURS):
        counts = {each: int((values == each).sum()) for each in own}
        most = set(sorted(own, key=lambda each: -counts[each])[: len(_COLOURS)])
        own = [each for each in own if each in most]
    groups = []
    rest = np.ones(len(values), np.bool_)
    for label, colour in zip(own, _COLOURS, strict=False):
        is_this = values == label
        rest &= ~is_this
        groups.append((f"{_plain(label)} ({is_this.sum():,})", colour, np.flatnonzero(is_this)))
    if rest.any():
        left = [each for each in points.categories if each not in own]
        name = left[0] if len(left) == 1 else f"{len(left):,} others"
        groups.append((f"{_plain(name)} ({rest.sum():,})", _GREY, np.flatnonzero(rest)))
    return groups


def _plain(text: str) -> str:
    """Short text for a canvas. Bokeh reads two dollar signs as the start of a formula."""
    text = text.replace("$$", "$ $")
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _span(points: Points) -> tuple[float, float]:
    values = np.asarray(points.values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return (1, 10) if points.is_logarithmic else (0, 1)
    low, high = float(values.min()), float(values.max())
    if points.is_logarithmic:
        low = max(low, 1)
    return (low, high) if high > low else (low, low + 1)


def _hover(points: Points, renderers: list[Any]) -> Any:
    from bokeh.models import HoverTool

    # Bokeh shows values as text, unless a column is marked as safe HTML.
    hints = [
        ("id", "@id"),
        ("description", "@description"),
        ("length", "@length residues"),
        (_plain(points.colour).replace("@", "(at)"), "@value"),
    ]
    return HoverTool(tooltips=hints, renderers=renderers)


def _write_html(points: Points, path: Path) -> None:
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    page = file_html(scatter(points), INLINE, title=points.title, template=_PAGE)
    path.write_text(page, encoding="utf-8")


# --- PNG -----------------------------------------------------------------------------------------


def _write_png(points: Points, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # Do not use pyplot, which keeps figures in memory and may need a display.
    drawing = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    how: dict[str, Any] = {"s": _size(points) ** 2 / 2, "alpha": _ALPHA, "linewidths": 0}
    x, y = points.xy.T
    if points.categories:
        for order, (label, colour, rows) in enumerate(_groups(points)):
            axes.scatter(x[rows], y[rows], c=colour, label=label, zorder=2 - order / 100, **how)
        legend = axes.legend(
            title=_plain(points.colour), fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
        )
        texts = [*legend.get_texts(), legend.get_title()]
    else:
        low, high = _span(points)
        norm = (LogNorm if points.is_logarithmic else Normalize)(low, high)
        values = np.asarray(points.values, np.float64)
        is_number = np.isfinite(values)
        axes.scatter(x[~is_number], y[~is_number], c=_GREY, **how)
        dots = axes.scatter(
            x[is_number],
            y[is_number],
            c=values[is_number],
            cmap=ListedColormap(_scale()),
            norm=norm,
            **how,
        )
        bar = drawing.colorbar(dots, ax=axes, shrink=0.7)
        if bar.solids:
            bar.solids.set_alpha(1)
        if points.is_logarithmic:
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
        texts = [bar.ax.yaxis.label]
        bar.set_label(_plain(points.colour))
    axes.set_xlabel(points.axes[0])
    axes.set_ylabel(points.axes[1])
    axes.set_aspect("equal", adjustable="datalim")
    texts += [axes.set_title(f"{points.title}\n{points.subtitle}", fontsize=9, wrap=True)]
    if points.warning:
        drawing.suptitle(
            "\n".join(fill(line, 90) for line in points.warning.splitlines()),
            color="#B00000",
            fontsize=9,
        )
    for text in texts:
        text.set_parse_math(False)  # names are not formulas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        drawing.savefig(path, dpi=_DPI)
