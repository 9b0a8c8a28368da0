"""The page about a store: what it says, of hostile names too, and what a browser makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import matplotlib.image
import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker
from models import random_network, save_network
from rows import forget_headers
from s3 import BUCKET
from sklearn.decomposition import PCA

import virnuc_dask
from virnuc_dask.analysis import report as report_module
from virnuc_dask.analysis.chunk_passes import fill
from virnuc_dask.errors import UsageError
from virnuc_dask.store import bucket
from virnuc_dask.store.location import location_of
from virnuc_dask.store.results import keep_result, open_result
from virnuc_dask.store.store import Store

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img/src=x/onerror=alert(1)>',
    "{{7*7}}",
    "]]></style></title><svg/onload=alert(1)>",
    "a\x1b[31m\u202etxt",
    "x" * 300,
    "&lt;b&gt;",
]
_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """What is on a page; tags must be closed in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]

    def points(self) -> int:
        """Marks of the map, its key left out."""
        svg = self.html.partition('class="large"')[2].partition("</svg>")[0]
        return len(re.findall(r"<title>", svg))


def written(store: Store, name: str = "out.html", **options: Any) -> Page:
    return Page(virnuc_dask.report(store.path, store.path.with_name(name), **options))


def check_accessible(page: Page) -> None:
    """Nothing is loaded or run; headings, labels and anchors are as they should be."""
    allowed = {"href": r"#[a-z]+|data:,", "src": "", "style": ""}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert re.fullmatch(allowed.get(name, ".*"), value or "", re.DOTALL)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "img", "use"}
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for svg in page.of("svg"):
        assert svg.get("aria-hidden") or (
            svg["role"] == "img" and (svg.get("aria-label") or svg["aria-labelledby"] in ids)
        )
    for link in page.of("a"):
        assert str(link["href"])[1:] in ids
    for region in page.of("section"):
        assert region["aria-labelledby"] in ids
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))


@pytest.mark.slow
def test_it_says_what_a_store_is(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    page = written(store)
    check_accessible(page)
    lengths, residues = store.lengths(), store.array("residues")[:].tobytes().decode()
    others = sum(letter not in report_module._SWISS_PROT for letter in residues)
    for said in (
        "Random weights: these embeddings mean nothing",
        store.identity.weights_sha256,
        store.identity.input_sha256,
        "300 sequences. 300 rows are embedded with demo",
        "10 of 10 chunks of 32 rows are done",
        f"Median {np.median(lengths):,.0f}",
        f"{lengths.sum():,} residues; {100 * others / len(residues):.2f} % are other",
        "300 of 300 embedded rows, by PCA",
    ):
        assert said in page.text
    assert "Not complete" not in page.text
    rows = virnuc_dask.open_store(store.path).embedding.values.astype(np.float64)
    for share in PCA(2).fit(rows).explained_variance_ratio_:
        assert f"({share:.1%} of variance)" in page.text
    assert page.points() == 300
    # Every sequence is in a bar, or is said not to be.
    histogram = report_module._length_chart(lengths, 1022)
    assert sum(histogram.counts) + histogram.beyond == 300
    again = written(store, "again.html")
    assert re.sub("Written .* UTC", "", again.html) == re.sub("Written .* UTC", "", page.html)


def test_composition_is_in_percent(make_store: Maker, tmp_path: Path) -> None:
    (tmp_path / "a.faa").write_text(">a\nAAAW\n>b\nXXWL\n")
    page = written(make_store(tmp_path / "a.faa"))
    for said in ("A: 37.50 % here", "W: 25.00 % here", "L: 12.50 % here", "C: 0.00 % here"):
        assert said in page.text
    assert "A: 8.25 % in Swiss-Prot" in page.text
    assert "8 residues; 25.00 % are other letters" in page.text
    assert "fewer than three embedded rows" in page.text
    assert sum(report_module._SWISS_PROT.values()) == pytest.approx(100, abs=0.2)


def hostile_store(make_store: Maker, tmp_path: Path) -> Store:
    file = tmp_path / "a<b>.faa"
    letters = "ACDEFGHIKLMN"
    file.write_text(
        "".join(
            f">{name} {name}\nMKTAY{letters[n]}\n>{name}\nMKT1\n" for n, name in enumerate(HOSTILE)
        )
    )
    return hostile_results(make_store(file, rows_per_chunk=4))


def hostile_results(store: Store) -> Store:
    fill(keep_result(store, "score", "x", {"by": HOSTILE[0]}), score)
    fill(keep_result(store, "map", "x", {HOSTILE[1]: "by"}), lambda rows: rows[:, :2])
    return store


def score(rows: Any) -> Any:
    return 1 / (1 + np.exp(-30 * rows[:, 0]))


def test_names_are_no_markup(make_store: Maker, tmp_path: Path) -> None:
    store = hostile_store(make_store, tmp_path)
    for query in HOSTILE[:2]:
        name = virnuc_dask.open_store(store.path).sequence_id.values
        rows = [row for row in range(len(name)) if name[row] == query]
        assert len(rows) == 2
    page = written(store, query=None)
    check_accessible(page)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "<script>" not in page.html
    assert "{{7*7}}" in page.text
    assert "\x1b" not in page.html
    assert "\u202e" not in page.html
    assert "7 invalid" not in page.text
    assert "7 in all." in page.text
    assert "a<b>.faa" in page.text
    assert "x" * 121 not in page.text


@pytest.mark.slow
def test_results_are_shown(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    about = {"classifier": "a test", "classes": ["viral", "other"], "share": 0.123456}
    fill(keep_result(store, "score", "virus", about), score)
    fill(keep_result(store, "map", "umap", {"neighbours": 15}), lambda rows: rows[:, :2])
    data = virnuc_dask.open_store(store.path).load()
    ids = data.sequence_id.values
    page = written(store, query=ids[3])
    check_accessible(page)
    found = virnuc_dask.nearest(store.path, ids[3])
    for name, similarity in zip(
        found.sequence_id.values[0], found.similarity.values[0], strict=True
    ):
        assert f"{name} " in page.text
        assert f"{similarity:.3f}" in page.text
    assert "by the result map_umap" in page.text
    assert "neighbours 15" in page.text
    top = np.argsort(-data.score_virus.values, kind="stable")[:20]
    section = page.text.partition("Histogram of score_virus")[2]
    assert "classes viral, other" in section
    assert "share 0.1235" in section
    assert "The highest. identifier score" in section
    for row in top:
        text = data.description.values[row][:120]
        assert (
            f"{ids[row]} {text} {data.score_virus.values[row]:.3f}".split()
            == (section[section.index(ids[row]) :].split()[: len(text.split()) + 2])
        )
    counts = np.histogram(data.score_virus.values, np.linspace(0, 1, 21))[0]
    assert f"0.5 to 0.55: {counts[10]}" in section


def test_reads_have_the_mean_of_their_rows(make_store: Maker, tmp_path: Path) -> None:
    (tmp_path / "reads.fna").write_text(
        ">one\nATGGCTAAAGGTCTGGAAACCGTTATGGCTAAAGGTCTGGAAACCGTT\n"
        ">two\nATGTGGTGGTGTCATCATCATAAACGTATGTGGTGGTGTCATCATCAT\n"
        ">too_short\nATG\n"
    )
    store = make_store(
        tmp_path / "reads.fna",
        translation=virnuc_dask.Translation(min_residues=5),
    )
    fill(keep_result(store, "score", "virus", {}), score)
    data = virnuc_dask.open_store(store.path).load()
    page = written(store)
    check_accessible(page)
    assert f"{store.records} frames of 2 of 3 reads. {store.records} rows are embedded" in page.text
    text = page.text.partition("Histogram of score_virus by read")[2]
    means = []
    for read, name in enumerate(data.read_id.values[:2]):
        mine = data.score_virus.values[data.read.values == read]
        means.append(mine.astype(float).mean())
        assert f"{name} {means[-1]:.3f} {len(mine)}" in text
    first = sum(mean >= 0.5 for mean in means)
    assert f"Mean scores of 2 reads; {first} of them are 0.5 or more" in text
    counts = np.histogram(means, np.linspace(0, 1, 21))[0]
    for number in np.flatnonzero(counts):
        assert f"{number / 20:g} to {(number + 1) / 20:g}: {counts[number]}" in text
    assert "The highest, each read by the mean of its rows. read score rows" in text


@pytest.mark.slow
def test_tiles_have_the_mean_of_their_proteins(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, tiling=virnuc_dask.Tiling(400, 300))
    fill(keep_result(store, "score", "virus", {}), score)
    text = written(store).text
    assert f"{store.records} tiles of 300 of 300 proteins. " in text
    assert "Mean scores of 300 proteins" in text
    assert "The highest, each protein by the mean of its rows. protein score rows" in text


@pytest.mark.slow
def test_clusters_are_shown(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    assert "Clusters" not in written(store).text
    virnuc_dask.make_clusters(store.path, "families", n_clusters=3)
    fill(keep_result(store, "cluster", "many", {}), lambda rows: np.arange(len(rows)))
    open_result(store, "cluster_many").remove_chunk(9)
    sizes = np.bincount(open_result(store, "cluster_families").array[:])
    page = written(store, force=True)
    check_accessible(page)
    section = page.text.partition("Clusters cluster_families")[2]
    assert "300 rows in 3 clusters." in section
    for number, size in enumerate(sizes):
        assert f"{number} {size} {size / 300:.1%}" in section
    assert "n clusters 3" in section
    assert "288 rows in 32 clusters; the 20 largest." in section


@pytest.mark.slow
def test_scores_of_training_rows_are_warned_of(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    about = {"classes": ["viral", "other"]}
    warning = "it was trained on <i>these</i> rows"
    details = {"notes": [warning]}
    fill(keep_result(store, "score", "virus", about, details=lambda: details), score)
    page = written(store)
    check_accessible(page)
    assert warning in page.text
    assert escape(warning) in page.html
    scores = open_result(store, "score_virus").array[:]
    assert f"{(scores >= 0.5).sum()} of them are called viral (0.5 or more)" in page.text
    best = int(np.argmax(scores))
    assert str(store.array("description")[best]) in page.text.partition("The highest.")[2]
    fill(keep_result(store, "score", "virus", {}, replace=True), score)
    assert warning not in written(store, force=True).text


@pytest.mark.slow
def test_the_page_names_no_folder(make_store: Maker, tmp_path: Path) -> None:
    weights = tmp_path / "models" / "mine.pt"
    weights.parent.mkdir()
    save_network(random_network(2, 64, 4), weights)
    inputs = [tmp_path / folder / "a.faa" for folder in ("x", "y")]
    for number, file in enumerate(inputs):
        file.parent.mkdir()
        file.write_text(f">{number}\nMKTAYIAKQR\n>{number}b\nMKVLA\n")
    store = make_store(inputs, model=str(weights))
    page = written(store)
    assert "embedded with mine.pt" in page.text
    assert "Input a.faa (1), a.faa (2)" in page.text
    assert "colours show input file" in page.text
    assert "a.faa (2) (2)" in page.text
    assert str(tmp_path) not in page.html
    # An older store knows its inputs only from what is said of its origin.
    forget_headers(store)
    assert "Input a.faa (1), a.faa (2)" in written(Store(store.path), force=True).text


def colours_of(page: Page) -> list[str]:
    """Names in the map's key."""
    key = page.text.partition("Scatter plot")[2].partition("embedded rows")[0]
    return re.findall(r"(cluster \d+|[a-z]+ clusters?|\d\.\d to \d\.\d|no score|residues) \(", key)


@pytest.mark.slow
def test_the_map_is_coloured_by_what_says_most(make_store: Maker, tmp_path: Path) -> None:
    store = make_store(VIRAL_PROTEINS)
    page = written(store)
    assert "colours show length" in page.text
    assert colours_of(page) == ["residues"] * 4
    fill(keep_result(store, "cluster", "x", {}), lambda rows: np.arange(len(rows)) % 7)
    open_result(store, "cluster_x").remove_chunk(3)
    page = written(store, force=True)
    assert "colours show cluster_x" in page.text
    clusters = [f"cluster {number}" for number in range(5)]
    assert colours_of(page) == [*clusters, "other clusters", "no cluster"]
    assert "no cluster (32)" in page.text
    fill(keep_result(store, "score", "x", {}), score)
    values = open_result(store, "score_x").array[:]
    open_result(store, "score_x").remove_chunk(0)
    page = written(store, force=True)
    assert "colours show score_x" in page.text
    assert "no score (32)" in page.text
    parts = np.bincount(np.clip(values[32:] * 5, 0, 4).astype(int), minlength=5)
    for number in np.flatnonzero(parts):
        assert f"{number / 5:.1f} to {(number + 1) / 5:.1f} ({parts[number]})" in page.text
    two = [tmp_path / f"{name}.faa" for name in "ab"]
    for name, letters in zip(two, ("MKTAY", "MLLIV"), strict=True):
        name.write_text("".join(f">{n}\n{letters[:n]}\n" for n in range(2, 6)))
    page = written(make_store(two, "two.zarr"), force=True)
    assert "colours show input file" in page.text
    assert "a.faa (4)" in page.text


def test_a_store_that_is_filling(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    page = written(store)
    check_accessible(page)
    assert "Not complete: 0 of 10 chunks are done" in page.text
    assert "fewer than three embedded rows" in page.text
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store.write_chunk(3, *whole.read_chunk(3))
    page = written(store, force=True)
    assert "300 sequences. 32 rows are embedded" in page.text
    assert page.points() == 32


def test_of_many_rows_a_sample_is_drawn(make_store: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(VIRAL_PROTEINS)
    monkeypatch.setattr(report_module, "_POINTS", 50)
    monkeypatch.setattr(report_module, "_CHUNKS_SAMPLED", 4)
    page = written(store)
    assert page.points() == 50
    assert "50 of 300 embedded rows, a random sample" in page.text


def test_telemetry(make_store: Maker, tmp_path: Path) -> None:
    """Speed is that of the runs' own summaries; of a killed run, of what is known."""
    store = make_store(VIRAL_PROTEINS)
    done = {"run": "a", "event": "chunk_done", "computed": True, "rows": 32, "residues": 3200}
    took = {"read_s": 1.0, "wait_s": 2.0, "compute_s": 6.0, "write_s": 1.0, "memory": 2**30}
    lines = [
        json.dumps(done | took | {"time": f"2026-01-01T00:0{minute}:00+00:00"})
        for minute in range(5)
    ]
    before = {"run": "a", "event": "workers_changed", "time": "2025-12-31T23:59:20+00:00"}
    lines.insert(0, json.dumps(before))
    # What happens before the first chunk is done is no start.
    failed = {"event": "chunk_failed", "time": "2025-12-31T23:59:50+00:00"}
    lines.insert(1, json.dumps(before | failed))
    # A second run beside it, from 00:03:20 to 00:04:40; its end comes later.
    second = {"run": "b", "time": "2026-01-01T00:04:40+00:00"}
    lines.append(json.dumps(done | took | second))
    ended = {"event": "run_summary", "seconds": 80, "busy": 0.75}
    lines.append(json.dumps(second | ended | {"time": "2026-01-01T00:04:50+00:00"}))
    wrong = ({"seconds": "NaN"}, {"seconds": 1e308}, {"seconds": -1}, {"busy": 7})
    lines += [json.dumps(second | ended | each) for each in wrong]
    lines += ['{"run": "a", "event": "chu', "[]", json.dumps(done), "\0", "[" * 10_000]
    lines.append(json.dumps({"run": "<b>", "event": "worker_lost", "time": "now"}))
    lines.append(json.dumps(done | took | {"time": "x", "rows": "NaN"}))
    (tmp_path / f"{store.path.name}.telemetry.jsonl").write_text("\n".join(lines))
    page = written(store)
    check_accessible(page)
    for said in (
        "6 chunks with 192 rows, computed by 2 runs in 5 min 20 s",
        "0.6 sequences and 60 residues a second",
        "75 % of the workers' time was computing",
        "1,024 MiB of memory",
        "1 worker was lost",
        "computing: 60.0%, 36 s",
        "minutes since the first chunk",
    ):
        assert said in page.text
    empty = tmp_path / "empty"
    empty.write_text("")
    assert "residues a second" not in written(store, telemetry=empty, force=True).text


@pytest.mark.slow
def test_telemetry_that_cannot_be_read_is_said(
    make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_text("")
    written(store, telemetry="~/mine.jsonl")
    for wrong in ("~/typo.jsonl", tmp_path):
        with pytest.raises(UsageError, match="telemetry cannot be read"):
            written(store, "no.html", telemetry=wrong)
    usual = tmp_path / f"{store.path.name}.telemetry.jsonl"
    written(store, "without.html")
    usual.mkdir()
    with pytest.raises(UsageError, match=r"telemetry\.jsonl: this telemetry cannot be read"):
        written(store, "no.html")
    assert not (tmp_path / "no.html").exists()


@pytest.mark.slow
def test_the_map_that_has_most_is_shown(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, tiling=virnuc_dask.Tiling(400, 300))
    keep_result(store, "map", "a", {"none": 1})
    page = written(store)
    assert "embedded rows, by PCA" in page.text
    assert f"Tiling {store.identity.tiling}" in page.text
    virnuc_dask.make_map(store.path, "b")
    virnuc_dask.make_map(store.path, "c")
    open_result(store, "map_b").remove_chunk(2)
    page = written(store, force=True)
    assert "by the result map_c" in page.text
    assert "method pca" in page.text
    about = open_result(store, "map_c").about
    for name in ("mean", "axes"):
        assert about[name][:20] not in page.html


@pytest.mark.slow
def test_what_cannot_be_written_is_said_first(
    make_store: Maker, tmp_path: Path, cli_here: Cli
) -> None:
    store = make_store(VIRAL_PROTEINS)
    done = cli_here("report", store.path, "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"page\.html \(\d+ kB\)\n", done.stdout)
    assert (tmp_path / "page.html").stat().st_size < 300_000
    done = cli_here("report", store.path, "page.html")
    assert (done.returncode, "exists; give another name, or --force" in done.stderr) == (2, True)
    (tmp_path / "page.html").write_text("mine")
    done = cli_here("report", store.path, "page.html", "--force", "--query", "none")
    assert (done.returncode, "no record has the identifier none" in done.stderr) == (2, True)
    assert (tmp_path / "page.html").read_text() == "mine"
    for out, problem in (("a.pdf", "known are .html"), ("no/a.html", "not a writable directory")):
        with pytest.raises(UsageError, match=problem):
            virnuc_dask.report(store.path, tmp_path / out)
    assert not list(tmp_path.glob(".*.html"))


@pytest.mark.slow
def test_in_an_object_store(make_store: Maker, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()
    store = make_store(VIRAL_PROTEINS)
    url = f"s3://{BUCKET}/{uuid4().hex}/report.zarr"
    assert location_of(url).publish(store.path)
    here = written(store)
    there = Page(virnuc_dask.report(url, store.path.with_name("there.html")))
    for tag in ("circle", "rect", "path"):
        assert here.of(tag) == there.of(tag)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
FLAGS += " --disable-background-networking --disable-component-update --disable-sync"
FLAGS += " --hide-scrollbars --enable-logging=stderr"


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    profile = folder / uuid4().hex
    profile.mkdir()
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", *arguments]
    environment = os.environ | {"HOME": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=environment
    )


# How wide the page is, and which words of its charts are not within their chart.
MEASURE = """
const wide = document.documentElement.scrollWidth
const outside = [...document.querySelectorAll("svg text")].filter((each) => {
  const inner = each.getBoundingClientRect(), outer = each.ownerSVGElement.getBoundingClientRect()
  return inner.left < outer.left - 0.5 || inner.right > outer.right + 0.5
}).map((each) => each.textContent)
"""


@pytest.mark.skipif(not CHROMIUM, reason="NOT TESTED IN A BROWSER: there is no chromium here")
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.slow
def test_a_browser_shows_it(width: int, make_store: Maker, tmp_path: Path) -> None:
    store = hostile_store(make_store, tmp_path)
    # Long and short numbers at the ends of the axes.
    long = "".join(f">{n} {n}\nM{'KT' * (500 + n)}\n" for n in range(9))
    (tmp_path / "a<b>.faa").write_text((tmp_path / "a<b>.faa").read_text() + long)
    shutil.rmtree(store.path)
    store = hostile_results(make_store(tmp_path / "a<b>.faa", rows_per_chunk=4))
    virnuc_dask.make_clusters(store.path, n_clusters=2)
    done = {"run": "a", "event": "chunk_done", "computed": True, "rows": 1_000_000, "residues": 1}
    done |= dict.fromkeys(("read_s", "wait_s", "compute_s", "write_s", "memory"), 1.0)
    lines = [json.dumps(done | {"time": f"2026-01-01T00:0{n}:00+00:00"}) for n in range(9)]
    telemetry = tmp_path / "telemetry.jsonl"
    telemetry.write_text("\n".join(lines))
    path = virnuc_dask.report(store.path, tmp_path / "page.html", telemetry=telemetry)
    size = f"--window-size={width},3000"
    picture = tmp_path / "page.png"
    done = browse(tmp_path, size, f"--screenshot={picture}", path.as_uri())
    assert "CONSOLE" not in done.stderr
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (3000, width)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
    # A script, in a copy that allows it, measures whether anything is wider than the frame. No
    # window is as narrow as a phone.
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    script = f"{MEASURE}; parent.document.title = 'width ' + wide + ' outside ' + outside"
    copy = copy.replace("</body>", f"<script>{script}</script></body>")
    frame = f'<iframe srcdoc="{escape(copy)}" style="width: {width}px; border: 0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    shown = browse(tmp_path, "--dump-dom", (tmp_path / "frame.html").as_uri()).stdout
    found = re.findall("<title>width ([0-9]+) outside (.*)</title>", shown)
    assert len(found) == 1
    # Beside it is a scroll bar.
    assert width - 20 <= int(found[0][0]) <= width
    # No label of an axis is cut off.
    assert found[0][1] == ""
    # The page itself allows none.
    run = path.read_text().replace("</body>", f"<script>{script}</script></body>")
    (tmp_path / "run.html").write_text(run)
    done = browse(tmp_path, size, "--dump-dom", (tmp_path / "run.html").as_uri())
    assert "<title>width" not in done.stdout
    assert "Content Security Policy" in done.stderr
