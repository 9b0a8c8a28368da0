"""How long it takes to look at large stores, and how much memory.

    python -m benchmarks.analysis open [--rows 10000000]
    python -m benchmarks.analysis by-read [--rows 1500000 --dimension 1280]
    python -m benchmarks.analysis predict [--rows 1000000 --dimension 1280]     (or predict-mlp)
    python -m benchmarks.analysis map|map-peer|cluster|cluster-peer|export [--keep --folder FOLDER]

Stores are of random vectors (`benchmarks.stores`), in a temporary folder or in `--folder`. Peaks
are of the whole process, which has imported all that it needs. `--keep` leaves the store in
`--folder` for the next measure.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import virnuc_dask
from benchmarks.stores import random_store
from virnuc_dask.analysis.classifier import Classifier, save_classifier, versions
from virnuc_dask.analysis.compatibility import what_must_agree
from virnuc_dask.analysis.training import new_pipeline
from virnuc_dask.store.store import Store


def peak() -> int:
    """MiB that this process has had at most."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) >> 10


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long it took."""
    started = time.perf_counter()
    yield
    print(f"| {what} | {time.perf_counter() - started:.2f} s | {peak():,} MiB |", flush=True)


def measure_open(folder: Path, rows: int, dimension: int) -> None:
    """Open a store whose rows are all pending, and find rows by their identifiers."""
    path = random_store(folder / "open.zarr", rows, dimension, filled=False).path
    virnuc_dask.open_store(path)  # imports
    with timed("open_store"):
        data = virnuc_dask.open_store(path)
    with timed("its embedded, read"):
        assert not data.embedded.values.any()
    with timed("its identifiers, read"):
        names = data.sequence_id.values
    chosen = names[rows // 3]
    del names
    with timed('set_xindex("sequence_id")'):
        indexed = data.set_xindex("sequence_id")
    for when in ("first", "second"):
        with timed(f"sel of one row, {when} time"):
            assert indexed.sel(sequence_id=chosen).length == 30


def measure_by_read(folder: Path, rows: int, dimension: int) -> None:
    """Means by read, chunk by chunk, as somebody does who keeps only a part of each."""
    path = random_store(folder / "reads.zarr", rows, dimension, rows_per_read=2).path
    data = virnuc_dask.open_store(path)
    with timed("by_read"):
        reads = virnuc_dask.by_read(data)
    print(f"{reads.sizes['read']:,} reads")
    with timed("its embedding, one feature of each read kept"):
        found = reads.embedding[:, 0].values
    with timed("its embedding, sums of all features"):
        sums = reads.embedding.sum("feature").values
    assert np.isfinite(found).all()
    assert np.isfinite(sums).all()


def measure_predict(folder: Path, rows: int, dimension: int, kind: str = "logistic") -> None:
    """Score all rows, and the same by a plain loop over chunks."""
    store = random_store(folder / "scores.zarr", rows, dimension)
    random = np.random.default_rng(1)
    features = random.standard_normal((2000, dimension), np.float32)
    pipeline = new_pipeline(kind, 0, early_stopping=False).fit(features, features[:, 0] > 0)
    model = what_must_agree(store.identity) | {"dimension": dimension}
    about = {"kind": kind, "classes": ["viral", "other"], "model": model, "median_length": 30.0}
    digests = np.sort(random.integers(2**64, size=200_000, dtype=np.uint64))
    classifier = Classifier(pipeline, about | {"versions": versions()}, digests)
    save_classifier(classifier, folder / "c.skops")
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    print(f"store of {size / 1e9:.2f} GB")
    with timed(f"predict, {kind}"):
        found = virnuc_dask.predict(store.path, folder / "c.skops", name="a")
    assert found.scored == rows
    with timed("predict again: nothing to compute"):
        virnuc_dask.predict(store.path, folder / "c.skops", name="a")
    with timed("a table of all rows, TSV"):
        virnuc_dask.predict(store.path, folder / "c.skops", name="a", out=folder / "t.tsv")
    scores = np.empty(rows, np.float32)
    with timed("a plain loop: read a chunk, predict_proba, keep"):
        for chunk in range(store.chunk_count):
            embedding = store.read_chunk(chunk)[1].astype(np.float32)
            scores[store.rows(chunk)] = pipeline.predict_proba(embedding)[:, 1]
    kept = virnuc_dask.open_store(store.path).score_a.values
    np.testing.assert_allclose(kept, scores, rtol=1e-2, atol=1e-3)


def measure_map(folder: Path, rows: int, dimension: int) -> None:
    """A PCA of all rows; again, when nothing is left to do; and a drawing."""
    path = _embedded(folder, rows, dimension)
    with timed("make_map, PCA"):
        virnuc_dask.make_map(path, replace=True, refit=True)
    with timed("make_map again"):
        assert virnuc_dask.make_map(path).computed_chunks == 0
    with TemporaryDirectory() as drawings, timed("draw_map, HTML of 20,000 rows"):
        virnuc_dask.draw_map(path, out=Path(drawings) / "map.html")


def measure_map_peer(folder: Path, rows: int, dimension: int) -> None:
    """The same by scikit-learn, a batch a chunk: fitted in one pass, applied in another."""
    from sklearn.decomposition import IncrementalPCA

    store = Store(_embedded(folder, rows, dimension))
    model = IncrementalPCA(n_components=2)
    with timed("IncrementalPCA, partial_fit"):
        for chunk in range(store.chunk_count):
            model.partial_fit(store.read_chunk(chunk)[1].astype(np.float32))
    with timed("IncrementalPCA, transform"):
        for chunk in range(store.chunk_count):
            model.transform(store.read_chunk(chunk)[1].astype(np.float32))


def measure_cluster(folder: Path, rows: int, dimension: int) -> None:
    """Eight clusters of all rows, and again."""
    path = _embedded(folder, rows, dimension)
    with timed("make_clusters"):
        virnuc_dask.make_clusters(path, replace=True, refit=True)
    with timed("make_clusters again"):
        assert virnuc_dask.make_clusters(path).computed_chunks == 0


def measure_cluster_peer(folder: Path, rows: int, dimension: int) -> None:
    """The same by scikit-learn, a batch a chunk, one epoch."""
    from sklearn.cluster import MiniBatchKMeans

    store = Store(_embedded(folder, rows, dimension))
    model = MiniBatchKMeans(8, random_state=0)
    with timed("MiniBatchKMeans, partial_fit, one epoch"):
        for chunk in range(store.chunk_count):
            model.partial_fit(store.read_chunk(chunk)[1].astype(np.float32))
    with timed("MiniBatchKMeans, predict"):
        for chunk in range(store.chunk_count):
            model.predict(store.read_chunk(chunk)[1].astype(np.float32))


def measure_export(folder: Path, rows: int, dimension: int) -> None:
    """All rows in the formats that hold them best."""
    path = _embedded(folder, rows, dimension)
    for name in ("x.h5ad", "x.parquet"):
        with TemporaryDirectory(dir=folder) as exports, timed(f"export, {name[1:]}"):
            virnuc_dask.export(path, Path(exports) / name)


def _embedded(folder: Path, rows: int, dimension: int) -> Path:
    """A store of random vectors, made in a process of its own, which has its own peak."""
    path = folder / f"embedded-{rows}-{dimension}.zarr"
    if not path.exists():
        making = get_context("spawn").Process(target=random_store, args=(path, rows, dimension))
        making.start()
        making.join()
    return path


MEASURES: dict[str, tuple[Callable[..., None], int]] = {
    "open": (measure_open, 10_000_000),
    "by-read": (measure_by_read, 1_500_000),
    "map": (measure_map, 1_000_000),
    "map-peer": (measure_map_peer, 1_000_000),
    "cluster": (measure_cluster, 1_000_000),
    "cluster-peer": (measure_cluster_peer, 1_000_000),
    "export": (measure_export, 1_000_000),
    "predict": (measure_predict, 1_000_000),
    "predict-mlp": (partial(measure_predict, kind="mlp"), 1_000_000),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dimension", type=int, default=1280)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    chosen: Any = parser.parse_args()
    measure, rows = MEASURES[chosen.what]
    with (
        nullcontext(chosen.folder) if chosen.keep else TemporaryDirectory(dir=chosen.folder)
    ) as folder:
        print("| what | took | peak so far |\n|---|---|---|")
        measure(Path(folder), chosen.rows or rows, chosen.dimension)


if __name__ == "__main__":
    main()
