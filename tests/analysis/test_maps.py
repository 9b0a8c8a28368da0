"""Maps: scikit-learn's PCA, the same after any kill, and drawings that a browser shows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, VIRAL_PROTEINS, Cli, Maker, tree
from numpy.typing import NDArray
from rows import all_rows, forget_headers, move_chunks
from sklearn.decomposition import PCA

import virnuc_dask
from virnuc_dask.analysis import chunk_passes, maps, plots, points
from virnuc_dask.analysis import rows as some
from virnuc_dask.analysis.chunk_passes import fill
from virnuc_dask.errors import NotAStoreError, StoreError, UsageError
from virnuc_dask.settings import RANDOM_WEIGHTS, Translation
from virnuc_dask.store.results import keep_result, open_result
from virnuc_dask.store.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def coordinates(store: Store, name: str = "map_pca") -> NDArray[np.float32]:
    return open_result(store, name).read(slice(None))


def expected(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates and parts of the variance, by scikit-learn."""
    model = PCA(2, svd_solver="full").fit(rows)
    return model.transform(rows), model.explained_variance_ratio_


# --- PCA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_as_scikit_learn(
    make_store: Maker, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_ROWS_PER_SUM", 64)
    store = make_store(VIRAL_PROTEINS, dtype=dtype)
    made = virnuc_dask.make_map(store.path)
    places, ratio = expected(all_rows(store)[1])
    np.testing.assert_allclose(coordinates(store), places, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.explained_variance_ratio, ratio, rtol=1e-6)
    assert (made.name, made.fitted_rows, made.computed_chunks) == ("map_pca", 300, 10)
    assert (made.note, made.comment) == (None, RANDOM_WEIGHTS)


@pytest.mark.slow
def test_no_threads_or_workers_change_it(make_store: Maker, client: Any) -> None:
    stores = [make_store(VIRAL_PROTEINS, f"{n}.zarr") for n in range(3)]
    for store, how in zip(
        stores, ({"workers": 1}, {"workers": 3}, {"client": client}), strict=True
    ):
        virnuc_dask.make_map(store.path, **how)
    first, *others = map(coordinates, stores)
    assert np.array_equal(first, others[0])
    np.testing.assert_allclose(others[1], first, rtol=1e-5, atol=1e-6)


def test_no_more_products_than_fit_are_on_workers(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    run = chunk_passes.Pool.run

    def seen(pool: chunk_passes.Pool, *arguments: Any) -> Any:
        widths.append(pool.width)
        return run(pool, *arguments)

    monkeypatch.setattr(chunk_passes.Pool, "run", seen)
    monkeypatch.setattr(maps, "_PRODUCT_BYTES", 2 * 8 * store.dimension**2)
    maps._fit_pca(store, 4, client, None)
    maps._fit_pca(store, 4, None, None)
    assert widths == [2, 2]


@pytest.mark.slow
def test_rows_that_come_later_come_into_the_same_map(make_store: Maker) -> None:
    store, whole = make_store(VIRAL_PROTEINS, embed=False), make_store(VIRAL_PROTEINS, "w.zarr")
    with pytest.raises(UsageError, match="has 0 embedded rows, too few"):
        virnuc_dask.make_map(store.path)
    move_chunks(store, whole, (0, 3, 4))
    assert virnuc_dask.make_map(store.path).computed_chunks == 3
    before = tree(store.path / "map_pca")
    model = PCA(2, svd_solver="full").fit(all_rows(whole)[1][[*range(32), *range(96, 160)]])
    move_chunks(store, whole, (1, 2, 5, 6, 7, 8, 9))
    made = virnuc_dask.make_map(store.path)
    assert (made.computed_chunks, made.fitted_rows) == (7, 96)
    assert "had 3 of the 10 chunks" in str(made.note)
    assert before.items() <= tree(store.path / "map_pca").items()
    places = model.transform(all_rows(whole)[1])
    np.testing.assert_allclose(coordinates(store), places, rtol=1e-4, atol=1e-5)
    made = virnuc_dask.make_map(store.path, refit=True)
    assert (made.computed_chunks, made.fitted_rows, made.note) == (10, 300, None)
    places = expected(all_rows(whole)[1])[0]
    np.testing.assert_allclose(coordinates(store), places, rtol=1e-4, atol=1e-5)


# Waits for its end once four chunks are there.
WAITS = """
import sys, time
import virnuc_dask
from virnuc_dask.store.results import Result

write, chunks = Result.write, []

def some(self, chunk, values):
    if len(chunks) == 4:
        time.sleep(600)
    write(self, chunk, values)
    chunks.append(chunk)

Result.write = some
virnuc_dask.make_map(sys.argv[1], workers=1)
"""


@pytest.mark.slow
def test_a_killed_one_goes_on(store: Store, make_store: Maker, cli: Cli) -> None:
    reference = make_store(VIRAL_PROTEINS, "reference.zarr")
    virnuc_dask.make_map(reference.path)
    script = [sys.executable, "-c", WAITS, str(store.path)]
    process = subprocess.Popen(script, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    # A file that is being written has a longer name.
    while len(list(store.path.glob("map_pca/c.[0-9].0"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert open_result(store, "map_pca").present().sum() == 4
    before = tree(store.path)
    again = cli("map", store.path)
    assert again.returncode == 0, again.stderr
    assert "6 chunks computed now" in again.stdout
    after = tree(store.path)
    assert before.items() <= after.items()  # not even written again
    assert np.array_equal(coordinates(store), coordinates(reference))
    assert "0 chunks computed now" in cli("map", store.path).stdout
    assert tree(store.path) == after
    assert virnuc_dask.verify(store.path).exit_code == 0


def test_quarantined_rows_have_no_place(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, max_residues=30)
    virnuc_dask.make_map(store.path)
    embedded = virnuc_dask.open_store(store.path).embedded.values
    assert 0 < embedded.sum() < store.records
    assert np.array_equal(np.isfinite(coordinates(store)).all(axis=1), embedded)
    places = expected(all_rows(store)[1][embedded])[0]
    np.testing.assert_allclose(coordinates(store)[embedded], places, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_makes_no_sense_is_refused(store: Store, tmp_path: Path) -> None:
    for wrong in (
        {"method": "tsne"},
        {"sample": 100},
        {"method": "umap", "sample": 3},
        {"random_state": -1},
        {"workers": 0},
        {"name": "a b"},
    ):
        with pytest.raises(UsageError):
            virnuc_dask.make_map(store.path, **wrong)
    with pytest.raises(NotAStoreError):
        virnuc_dask.make_map(tmp_path / "nowhere")
    virnuc_dask.make_map(store.path, "x")
    with pytest.raises(UsageError, match=r"`map_x` was made with other settings \(method, "):
        virnuc_dask.make_map(store.path, "x", method="umap")
    about = dict(open_result(store, "map_x").about)
    for damaged in ("AAAA", "!", 3, None):
        keep_result(store, "map", "x", about | {"mean": damaged}, replace=True)
        with pytest.raises(StoreError, match="`mean` of a result is damaged"):
            virnuc_dask.make_map(store.path, "x")


def test_a_row_that_is_not_finite_is_refused(store: Store) -> None:
    status, embedding = store.read_chunk(3)
    embedding = embedding.copy()
    embedding[5] = np.nan
    store.write_chunk(3, status, embedding)
    with pytest.raises(StoreError, match="not finite"):
        virnuc_dask.make_map(store.path)


# --- UMAP ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_umap_goes_on_in_the_same_map(make_store: Maker) -> None:
    from umap import UMAP

    store, whole = make_store(VIRAL_PROTEINS, embed=False), make_store(VIRAL_PROTEINS, "w.zarr")
    move_chunks(store, whole, range(7))
    made = virnuc_dask.make_map(store.path, method="umap", sample=150)
    assert (made.name, made.fitted_rows, made.computed_chunks) == ("map_umap", 150, 7)
    rows = all_rows(whole)[1].astype(np.float32)
    sampled = np.array(open_result(store, "map_umap").about["sampled_rows"])
    assert (np.diff(sampled) > 0).all()
    assert sampled.max() < 7 * 32
    # As umap-learn alone gives.
    distinct, which = np.unique(rows[sampled], axis=0, return_inverse=True)
    centred = distinct - distinct.mean(axis=0, dtype=np.float64).astype(np.float32)
    # To the last bit: what differs there has quite another map.
    centred /= np.sqrt(np.vecdot(centred, centred))[:, None]
    places = UMAP(random_state=0, n_jobs=1).fit_transform(centred)[which]
    np.testing.assert_allclose(coordinates(store, "map_umap")[sampled], places, atol=1e-4)
    before = tree(store.path / "map_umap")
    move_chunks(store, whole, (7, 8, 9))
    made = virnuc_dask.make_map(store.path, method="umap", sample=150)
    assert made.computed_chunks == 3
    assert before.items() <= tree(store.path / "map_umap").items()
    # The fit that was done again is the same: so are the chunks that it gives again.
    found = coordinates(store, "map_umap")
    assert np.isfinite(found).all()
    result = open_result(store, "map_umap")
    for chunk in (0, 8):
        result.remove_chunk(chunk)
    assert virnuc_dask.make_map(store.path, method="umap", sample=150).computed_chunks == 2
    assert np.array_equal(coordinates(store, "map_umap"), found)
    move_chunks(few := make_store(VIRAL_PROTEINS, "f.zarr", rows_per_chunk=5), few, (0,))
    for chunk in range(3, 60):
        few.remove_chunk(chunk)
    with pytest.raises(UsageError, match="15 different embedded rows; UMAP needs more than 15"):
        virnuc_dask.make_map(few.path, method="umap")


def test_without_umap_the_error_says_how_to_get_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UsageError, match="pip install umap-learn"):
        virnuc_dask.make_map(store.path, method="umap")


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_is_as_likely_to_have_any_row(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS, rows_per_chunk=30)
    monkeypatch.setattr(some, "_CHUNKS_OF_A_SAMPLE", 4)
    counts = np.zeros(300)
    for seed in range(400):
        rows, is_sample = some.random_rows(store, store.present(), 60, seed)
        assert is_sample
        assert len(np.unique(rows // 30)) <= 4
        assert len(rows) == len(np.unique(rows)) == 60
        counts[rows] += 1
    assert 50 < counts.min() <= counts.mean() == 80 <= counts.max() < 110
    again, _ = some.random_rows(store, store.present(), 60, 399)
    assert np.array_equal(again, rows)


def test_a_drawing_says_whether_it_is_a_sample(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS, rows_per_chunk=30)
    virnuc_dask.make_map(store.path)

    def said(count: int) -> str:
        return points.draw_points(store, "pca", points=count).subtitle

    assert said(300) == said(301) == "all 300 embedded rows"
    assert said(299) == "299 of 300 rows, drawn at random"
    monkeypatch.setattr(some, "_CHUNKS_OF_A_SAMPLE", 4)
    assert said(200) == "120 of 300 rows, drawn at random"


# --- drawings ------------------------------------------------------------------------------------

NASTY = "<img/src=x/onerror=document.body.id='owned'>"
NASTY_TEXT = "</script><script>document.body.id='owned'</script> $$x^2$$ {{x}} @id"


def browse(page: Path, script: str, tmp_path: Path) -> str:
    """The document as Chromium has it after a script; its console has no error."""
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM: what a browser shows of a map is not tested here")
    copy = tmp_path / "copy.html"
    wait = (
        f"const go = () => {{ if (!Bokeh.documents.length) return setTimeout(go, 50); {script} }}"
    )
    # The last one: there are others in Bokeh's own code.
    before, _, after = page.read_text().rpartition("</body>")
    text = f"{before}<script>{wait}; setTimeout(go, 500)</script></body>{after}"
    copy.write_text(text)
    profile = tmp_path / "profile"
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    options += " --disable-background-networking --disable-component-update --disable-sync"
    options += " --enable-logging=stderr --v=0 --dump-dom --virtual-time-budget=20000"
    done = subprocess.run(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", f"file://{copy}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert any("document idle" in line for line in said), done.stderr[-2000:]
    bad = ("Uncaught", "Error", "error", "Failed", "Refused")
    assert not [line for line in said if any(word in line for word in bad)]
    return done.stdout


LOOK = """
const doc = Bokeh.documents[0]
const search = doc.get_model_by_name("search")
search.value_input = "SECOND thing"
setTimeout(() => {
  const said = document.createElement("pre")
  const canvases = []
  const walk = (node) => {
    if (node.tagName == "CANVAS") canvases.push(node)
    for (const child of node.children) walk(child)
    if (node.shadowRoot) walk(node.shadowRoot)
  }
  walk(document.body)
  const drawn = canvases.filter((each) => {
    const context = each.getContext("2d")
    const data = context && each.width
      ? context.getImageData(0, 0, each.width, each.height).data : []
    return data.some((value, at) => at % 4 != 3 && value != 0 && value != 255)
  })
  said.id = "said"
  said.textContent = `${doc.get_model_by_name("count").text}; ${drawn.length > 0};`
    + ` ${document.body.id}; ${document.querySelectorAll("img").length} images`
  document.body.append(said)
}, 2000)
"""


@pytest.mark.slow
def test_a_browser_shows_it(make_store: Maker, tmp_path: Path) -> None:
    inputs = tmp_path / "nasty.faa"
    letters = ("MKTAY", "MKVLA", "MGIKQ", "MRRSS")
    inputs.write_text(
        f">{NASTY} {NASTY_TEXT}\n{letters[0]}\n>b Second thing\n{letters[1]}\n>c {NASTY_TEXT}\n"
        f"{letters[2]}\n>d a second thing\n{letters[3]}\n"
    )
    store = make_store(inputs)
    virnuc_dask.make_map(store.path)
    table = tmp_path / "labels.tsv"
    table.write_text(f"{NASTY}\t{NASTY_TEXT}\nb\tx$$\n")
    page = tmp_path / "map.html"
    assert virnuc_dask.draw_map(store.path, "pca", page, colour=str(table)) == 4
    text = page.read_text()
    assert NASTY not in text
    # Nothing is loaded from elsewhere.
    tags = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)
    assert len(tags) < 20_000
    assert not re.search(r"src\s*=|href\s*=|https?:", tags)
    assert text.count("document.body.id='owned'</script>") == 0
    assert RANDOM_WEIGHTS in text
    shown = browse(page, LOOK, tmp_path)
    assert '<pre id="said">2 of 4 drawn rows match; true; ; 0 images</pre>' in shown


@pytest.mark.slow
def test_colours(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    virnuc_dask.make_map(store.path)
    ids = all_rows(store)[0]
    fill(keep_result(store, "score", "x", {}), lambda rows: rows[:, 0])
    fill(keep_result(store, "cluster", "x", {}), lambda rows: np.arange(len(rows)) % 11)
    drawn = points.draw_points(store, "pca")
    assert (drawn.ids, drawn.is_logarithmic, drawn.categories) == (ids, True, [])
    assert np.array_equal(drawn.xy, coordinates(store))
    assert np.array_equal(drawn.values, store.lengths())
    assert drawn.subtitle == "all 300 embedded rows"
    assert drawn.title == "PCA of viral.zarr: demo, layer 0, mean pooling"
    assert drawn.warning == RANDOM_WEIGHTS
    assert "of variance)" in drawn.axes[1]
    scores = points.draw_points(store, "pca", colour="score_x").values
    assert np.array_equal(scores, all_rows(store)[1][:, 0].astype(np.float32))
    clusters = points.draw_points(store, "pca", colour="cluster_x")
    assert clusters.categories == [str(number) for number in range(11)]
    groups = plots._groups(clusters)
    assert [label for label, _, _ in groups][-1].startswith("3 others (")
    assert sum(len(rows) for _, _, rows in groups) == 300
    assert len({colour for _, colour, _ in groups}) == 9
    assert points.draw_points(store, "pca", colour="status").categories[0] == "embedded"
    sampled = points.draw_points(store, "pca", points=50, random_state=3)
    assert sampled.subtitle == "50 of 300 rows, drawn at random"
    where = [ids.index(name) for name in sampled.ids]
    assert np.array_equal(sampled.xy, coordinates(store)[where])
    assert points.draw_points(store, "pca", points=50, random_state=3).ids == sampled.ids
    file = tmp_path / "labels.tsv"
    file.write_text(
        "id\tgroup\textra\n"
        + "".join(f"{name}\t{'ab'[n > 9]}\t\n" for n, name in enumerate(ids[:30]))
    )
    labelled = points.draw_points(store, "pca", colour=str(file))
    assert labelled.values == ["a"] * 10 + ["b"] * 20 + ["no label"] * 270
    assert (labelled.colour, labelled.categories) == ("labels", ["no label", "b", "a"])
    file.write_text(f"{ids[0]}\ta\n{ids[0]}\tb\n")
    assert points.draw_points(store, "pca", colour=str(file)).values[0] == "a|b"
    file.write_text("id\tmass\n" + "".join(f"{name}\t{n / 2}\n" for n, name in enumerate(ids[:30])))
    numbers = np.asarray(points.draw_points(store, "pca", colour=str(file)).values)
    assert np.array_equal(numbers[:30], np.arange(30) / 2)
    assert np.isnan(numbers[30:]).all()


def contrast_with_white(colour: str) -> float:
    """By WCAG 2; 1 is white itself."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (red, green, blue)
    ]
    return 1.05 / (0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def test_no_colour_is_lost_on_white() -> None:
    scale = [contrast_with_white(colour) for colour in plots._scale()]
    assert min(scale) > 3
    # The lightness alone tells which number is larger, so that nobody needs the hue.
    assert scale == sorted(scale, reverse=True)
    assert min(map(contrast_with_white, plots._COLOURS)) > 2


def test_only_colours_that_a_store_has_are_named(store: Store) -> None:
    fill(keep_result(store, "cluster", "x", {}), lambda rows: np.zeros(len(rows)))
    with pytest.raises(
        UsageError, match=r"'none': give length, source, status, cluster_x, or a \.tsv file"
    ):
        points.check_colour(store, "none")


def test_input_files_have_colours(make_store: Maker, tmp_path: Path) -> None:
    files = [tmp_path / "x" / "a.faa", tmp_path / "b.faa"]
    for count, file in enumerate(files, 5):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f">{n}\nMKTAYIAKQR{'ACDEFGH'[n]}\n" for n in range(count)))
    store = make_store(files)
    virnuc_dask.make_map(store.path)
    drawn = points.draw_points(store, "pca", colour="source")
    assert drawn.values == ["a.faa"] * 5 + ["b.faa"] * 6
    assert drawn.categories == ["a.faa", "b.faa"]
    # Files of one name get numbers, not their folders.
    files[1] = files[1].rename(tmp_path / "a.faa")
    store = make_store(files, "same.zarr")
    virnuc_dask.make_map(store.path)
    drawn = points.draw_points(store, "pca", colour="source")
    assert drawn.values == ["a.faa (1)"] * 5 + ["a.faa (2)"] * 6
    store.array("source")[:] = 2
    with pytest.raises(StoreError, match="`source` is damaged"):
        points.draw_points(store, "pca", colour="source")


def test_a_store_that_knows_no_sources(store: Store) -> None:
    forget_headers(store)
    old = Store(store.path)
    with pytest.raises(UsageError, match=r"'source': give length, status, or a \.tsv file"):
        points.check_colour(old, "source")


def test_scores_of_training_rows_are_warned_of(store: Store, tmp_path: Path) -> None:
    virnuc_dask.make_map(store.path)
    notes = ["it was trained on these rows", "<b>it is for longer ones</b>"]
    for name, known in (("virus", {"notes": notes}), ("other", {"notes": 7}), ("old", {})):
        result = keep_result(store, "score", name, {}, details=lambda known=known: known)
        fill(result, lambda rows: np.full(len(rows), 0.5))
    drawn = points.draw_points(store, "pca", colour="score_virus")
    assert (drawn.warning or "").splitlines() == [RANDOM_WEIGHTS, *notes]
    plots.write_drawing(drawn, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert page.count("#B00000") == 3
    assert "<b>it is" not in page
    assert points.draw_points(store, "pca", colour="score_old").warning == RANDOM_WEIGHTS
    assert points.draw_points(store, "pca", colour="score_other").warning == RANDOM_WEIGHTS


def test_rows_without_a_label_are_grey_and_below(store: Store, tmp_path: Path) -> None:
    virnuc_dask.make_map(store.path)
    ids = virnuc_dask.open_store(store.path).sequence_id.values
    labels = tmp_path / "labels.tsv"
    labels.write_text(f"{ids[7]}\tE2\n")
    groups = plots._groups(points.draw_points(store, "pca", colour=str(labels)))
    assert [(label, colour) for label, colour, _ in groups] == [
        ("E2 (1)", plots._COLOURS[0]),
        ("no label (299)", plots._GREY),
    ]
    labels.write_text(f"{ids[7]}!\tE2\n")
    with pytest.raises(UsageError, match=re.escape(f"the file has '{ids[7]}!' and the store '")):
        points.draw_points(store, "pca", colour=str(labels))


def test_colours_that_are_none_are_refused(store: Store, tmp_path: Path) -> None:
    virnuc_dask.make_map(store.path)
    file = tmp_path / "labels.tsv"
    for text, problem in (
        ("", "no lines"),
        ("id\tlabel\nx\n", "line 2: no tab"),
        ("id\tlabel\nnobody\ta\n", "none of its identifiers"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=problem):
            virnuc_dask.draw_map(store.path, out=tmp_path / "x.png", colour=str(file))
    file.write_bytes(b"id\tlabel\n\xff\t\xff\n")
    for wrong in (str(file), str(tmp_path / "none.tsv"), "frame", "size", "score_x", "map_pca"):
        with pytest.raises(UsageError):
            virnuc_dask.draw_map(store.path, out=tmp_path / "x.png", colour=wrong)
    with pytest.raises(UsageError, match="has no `map_y`"):
        virnuc_dask.draw_map(store.path, "y", tmp_path / "x.png")
    assert not list(tmp_path.glob("*.png"))


def test_frames_have_colours(make_store: Maker) -> None:
    genome = ROOT / "examples" / "lambda_virus.fa.gz"
    store = make_store(genome, translation=Translation("orf", min_residues=200))
    with pytest.raises(UsageError, match="give length, source, frame, status, or a"):
        points.check_colour(store, "none")
    virnuc_dask.make_map(store.path)
    frames = points.draw_points(store, "pca", colour="frame")
    assert "-1" in frames.categories
    assert set(frames.categories) <= {"-3", "-2", "-1", "+1", "+2", "+3"}
    assert frames.values == [f"{frame:+d}" for frame in store.array("frame")[:].tolist()]


@pytest.mark.slow
def test_the_command(cli_here: Cli, store: Store, tmp_path: Path) -> None:
    done = cli_here("map", store.path, "--out", "map.html", "--png", "map.png", "--points", 100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"comment: {RANDOM_WEIGHTS}\n"
    assert "map_pca in" in done.stdout
    assert "fitted to 300 rows; its axes explain" in done.stdout
    assert "100 rows in map.png" in done.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "map.html").stat().st_size > 1_000_000
    before = tree(tmp_path)
    for arguments in (
        ("--colour", "status"),
        ("--out", "map.html"),
        ("--out", "map.pdf"),
        ("--png", "other.html"),
        ("--out", "no/map.html"),
        ("--out", "new.html", "--colour", "none"),
        ("--colour", "none"),
        ("--out", "new.png", "--png", "../" + tmp_path.name + "/new.png"),
        ("--sample", 5),
        ("--method", "umap", "--name", "pca"),
    ):
        refused = cli_here("map", store.path, *arguments)
        assert (refused.returncode, refused.stdout) == (2, ""), (arguments, refused.stderr)
    assert tree(tmp_path) == before
    done = cli_here("map", store.path, "--out", "map.png")
    assert "--force, which replaces it; coordinates that the store keeps are not" in done.stderr
    done = cli_here("map", store.path, "--out", "map.png", "--force")
    assert done.returncode == 0, done.stderr
    assert "0 chunks computed now" in done.stdout
    # In this process, where UMAP may be compiled already.
    other = ["map", str(store.path), "--method", "umap", "--name", "pca", "--sample", "50"]
    refused = cli_here(*other, "--out", "map.png", "--force")
    assert (refused.returncode, "other settings" in refused.stderr) == (2, True)
    replaced = cli_here(*other, "--replace")
    assert replaced.returncode == 0, replaced.stderr
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_memory_does_not_depend_on_blocks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    virnuc_dask.make_map(store.path)
    found = coordinates(store)
    monkeypatch.setattr(chunk_passes, "_VALUES_PER_BLOCK", 64 * 7)
    monkeypatch.setattr(maps, "_PRODUCT_BYTES", 1)
    virnuc_dask.make_map(store.path, "other")
    np.testing.assert_allclose(coordinates(store, "map_other"), found, rtol=1e-5, atol=1e-6)
