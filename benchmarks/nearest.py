"""How fast nearest rows are found, beside a plain loop and faiss, turn by turn in one run.

    pip install faiss-cpu
    python -m benchmarks.nearest [--rows 200000] [--dimension 1280] [--queries 100]

The rows are random float16 vectors around a common mean, written by the package's own writer. The
*plain loop* takes one chunk after the other from Zarr and has one thread: convert, norm, product,
the best of each chunk, merge; centred, it takes the mean in a loop of its own first. *First*: the
mean is not known yet. *faiss* is exact too (`IndexFlatIP`), on as many threads as there are cores;
it holds all rows in float32, so reading and adding them is counted apart. Each measurement is a
process of its own, imports not counted; its peak memory is counted with them. Queries are spread
over all chunks, so that whoever reads them reads all. *Processor* is time of all threads, which
other programs disturb least. Prints a Markdown table; figures that matter go into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.stores import random_store, row_name
from virnuc_dask.store.store import Store

K = 10
Turn = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=1280)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rows-per-chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, path = arguments.one
        print(json.dumps(WAYS[way](Path(path), arguments.queries)))
        return
    ways = [way for way in arguments.only if "faiss" not in way or find_spec("faiss")]
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "random.zarr")
        random_store(
            store, arguments.rows, arguments.dimension, rows_per_chunk=arguments.rows_per_chunk
        )
        for _ in range(arguments.repeats):
            for way in ways:
                turns[way].append(in_a_process(way, store, arguments.queries))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__};"
        f" {arguments.rows:,} x {arguments.dimension} float16, {arguments.queries} queries, k={K},"
        f" {arguments.repeats} turns\n"
    )
    print("| way | what | seconds | processor | times as fast as the loop | peak RSS, MiB |")
    print("|---|---|---|---|---|---|")
    for way, found in turns.items():
        peer = turns.get("plain loop, centred" if "centred" in way else "plain loop", [])
        peak = max(turn["peak"] for turn in found)
        for part in found[0]["seconds"]:
            seconds = [turn["seconds"][part] for turn in found]
            processor = median(turn["processor"][part] for turn in found)
            spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            loop = [next(iter(turn["seconds"].values())) for turn in peer]
            ratios = [one / other for one, other in zip(loop, seconds, strict=False)]
            ratio = f"{median(ratios):.2f}" if ratios else ""
            print(f"| {way} | {part} | {spread} | {processor:.2f} | {ratio} | {peak:,.0f} |")
    for kind in ("centred", ""):
        several = [f[0]["rows"] for way, f in turns.items() if ("centred" in way) == bool(kind)]
        if len(several) > 1:
            same = np.mean([np.mean(np.equal(one, several[0])) for one in several])
            print(f"\n{kind or 'not centred'}: the same neighbours in {same:.4%} of the places")


def in_a_process(way: str, store: Path, queries: int) -> Turn:
    """One measurement. The plain loop gets one thread."""
    command = [sys.executable, "-m", "benchmarks.nearest", "--queries", str(queries)]
    threads = {"OPENBLAS_NUM_THREADS": "1"} if "plain" in way else {}
    with tempfile.TemporaryDirectory() as cache:  # in which there is no mean yet
        environment = os.environ | threads | {"XDG_CACHE_HOME": cache}
        text = subprocess.check_output(
            [*command, "--one", way, str(store)], text=True, env=environment
        )
    found: Turn = json.loads(text)
    return found


def query_rows(store: Store, queries: int) -> list[int]:
    """Rows that are spread over the store."""
    return np.linspace(0, store.records - 1, queries).astype(int).tolist()


class Clock:
    """Seconds of the parts of one measurement, by the wall and of the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """From now on."""
        self._began = time.perf_counter(), time.process_time()

    def lap(self, part: str) -> None:
        """A part ends, and the next begins."""
        wall, processor = self._began
        self.seconds[part] = time.perf_counter() - wall
        self.processor[part] = time.process_time() - processor
        self.start()

    def turn(self, rows: Any) -> Turn:
        """What a process reports."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"rows": np.asarray(rows).tolist(), "peak": peak}
        return found | {"seconds": self.seconds, "processor": self.processor}


def plain(path: Path, queries: int, *, centre: bool) -> Turn:
    """A loop as one would write it."""
    store = Store(path)
    array, rows = store.array("embedding"), query_rows(store, queries)
    chunks = range(store.chunk_count)
    clock = Clock()
    mean = np.zeros(store.dimension, np.float32)
    if centre:
        total = np.zeros(store.dimension)
        for chunk in chunks:
            total += array[store.rows(chunk)].astype(np.float32).sum(axis=0)
        mean = (total / store.records).astype(np.float32)
    # Of each chunk at once: it is decoded whole in any case.
    parts = [[r for r in rows if s.start <= r < s.stop] for s in map(store.rows, chunks)]
    query = np.concatenate(
        [
            array[store.rows(c)][np.array(part) - store.rows(c).start]
            for c, part in zip(chunks, parts, strict=True)
            if part
        ]
    ).astype(np.float32)
    query -= mean
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    best = np.full((queries, K), -np.inf, np.float32)
    found = np.full((queries, K), -1)
    for chunk in range(store.chunk_count):
        span = store.rows(chunk)
        block = array[span].astype(np.float32)
        if centre:
            block -= mean
        scores = query @ block.T / np.linalg.norm(block, axis=1)
        for number, row in enumerate(rows):
            if span.start <= row < span.stop:
                scores[number, row - span.start] = -np.inf
        top = np.argpartition(scores, -K, axis=1)[:, -K:]
        both = np.hstack([best, np.take_along_axis(scores, top, axis=1)])
        where = np.hstack([found, top + span.start])
        order = np.argsort(-both, axis=1)[:, :K]
        best = np.take_along_axis(both, order, axis=1)
        found = np.take_along_axis(where, order, axis=1)
    clock.lap("all")
    return clock.turn(found)


def ours(path: Path, queries: int, *, centre: bool) -> Turn:
    """The package's own search, twice in one process."""
    from virnuc_dask import nearest

    ids = [row_name(row) for row in query_rows(Store(path), queries)]
    import_module("xarray")
    import_module("dask.array")  # the first xarray.Dataset of a process imports it
    clock = Clock()
    for turn in ("first", "second"):
        found = nearest(path, ids, k=K, centre=centre)
        clock.lap(turn)
    return clock.turn(found.row.values)


def faiss(path: Path, queries: int) -> Turn:
    """An exact index in memory."""
    import faiss

    store = Store(path)
    rows = query_rows(store, queries)
    clock = Clock()
    index = faiss.IndexFlatIP(store.dimension)
    for chunk in range(store.chunk_count):
        block = store.array("embedding")[store.rows(chunk)].astype(np.float32)
        faiss.normalize_L2(block)
        index.add(block)
    clock.lap("reading, adding")
    query = np.stack([index.reconstruct(row) for row in rows])
    # One more: the query itself is among them.
    _, found = index.search(query, K + 1)
    clock.lap("searching")
    others = [[row for row in found[i] if row != rows[i]][:K] for i in range(queries)]
    return clock.turn(others)


WAYS: dict[str, Callable[[Path, int], Turn]] = {
    "plain loop": lambda path, queries: plain(path, queries, centre=False),
    "nearest": lambda path, queries: ours(path, queries, centre=False),
    "plain loop, centred": lambda path, queries: plain(path, queries, centre=True),
    "nearest, centred": lambda path, queries: ours(path, queries, centre=True),
    "faiss": faiss,
}


if __name__ == "__main__":
    main()
