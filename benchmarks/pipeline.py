"""What the pipeline costs beside the bare encoder loop, measured together, turn by turn.

    python -m benchmarks.pipeline

The work is the examples' real sequences through ESM-2 8M with random weights, which cost the same
as trained ones. *Bare*: as many processes as there are workers, each with the encoder in memory
and its share of the chunks, reading and writing nothing. *Run*: `virnuc_dask.run`, from the first
chunk's submission to the last report: loading the model, the store, Dask, and the idle end, when
one worker has nothing left. Starting the workers, a few seconds once, is in neither. Prints a
Markdown table; figures that matter go into RESULTS.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch

from tests.models import random_network, save_network
from virnuc_dask import run
from virnuc_dask.config import ModelSpec, Settings
from virnuc_dask.embed import embed_rows
from virnuc_dask.encoder import load_encoder
from virnuc_dask.prepare import prepare
from virnuc_dask.store import Store

EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows-per-chunk", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights, peptides = work / "esm2_8m_random.pt", work / "orfs.faa"
        save_network(random_network(6, 320, 20), weights)
        with peptides.open("w") as file:
            script = [sys.executable, EXAMPLES / "lambda_orfs.py", EXAMPLES / "lambda_virus.fa.gz"]
            subprocess.run(script, stdout=file, check=True)
        inputs = [peptides, EXAMPLES / "viral_proteins.faa.gz"]
        settings = Settings(model=str(weights), rows_per_chunk=arguments.rows_per_chunk)
        store, model = prepare(inputs, work / "bare.zarr", settings, lambda _event: None)

        bare, whole, peaks = [], [], []
        for number in range(arguments.repeats):
            bare.append(store.records / bare_loop(store, model, arguments.workers))
            with PeakMemory() as peak:
                summary = run(
                    inputs,
                    work / f"run{number}.zarr",
                    model=str(weights),
                    workers=arguments.workers,
                    rows_per_chunk=arguments.rows_per_chunk,
                )
            assert summary.complete
            whole.append(summary.computed_rows / summary.seconds)
            peaks.append(peak)
        done = work / "run0.zarr"
        size = sum(f.stat().st_size for f in (done / "embedding").iterdir())
        everything = sum(f.stat().st_size for f in done.rglob("*") if f.is_file())

        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__},")
        print(f"{store.records} sequences, {summary.computed_residues} residues, ESM-2 8M float32,")
        print(
            f"{arguments.workers} workers, {store.chunk_count} chunks, {arguments.repeats} turns\n"
        )
        rows = [
            ("bare encoder loop, sequences/s", f"{median(bare):.1f}"),
            ("run, sequences/s", f"{median(whole):.1f}"),
            ("run / bare", ratio(whole, bare)),
            ("store, bytes per row", f"{everything / store.records:,.0f}"),
            ("embedding, bytes per row", f"{size / store.records:,.0f} of {4 * model.dimension:,}"),
            ("peak RSS of the coordinator", f"{max(p.own for p in peaks) / 2**20:,.0f} MiB"),
            ("peak RSS of a worker", f"{max(p.child for p in peaks) / 2**20:,.0f} MiB"),
            (f"resume scan, {store.chunk_count} chunks", f"{scan_ms(Store(done)):.2f} ms"),
            ("resume scan, 100,000 chunks", f"{scan_ms(large_store(work)):.0f} ms"),
        ]
        print("| what | measured |\n|---|---|")
        for name, value in rows:
            print(f"| {name} | {value} |")


def ratio(ours: list[float], peers: list[float]) -> str:
    """Median and range of the turns' ratios."""
    ratios = [ours / peer for ours, peer in zip(ours, peers, strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def bare_loop(store: Store, model: ModelSpec, workers: int) -> float:
    """Seconds until the last of so many processes has encoded its share of the chunks."""
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(workers), context.Queue()
    shares = [list(range(first, store.chunk_count, workers)) for first in range(workers)]
    processes = [
        context.Process(target=_encode, args=(store.path, share, model, workers, ready, times))
        for share in shares
    ]
    for process in processes:
        process.start()
    seconds = [times.get() for _ in processes]
    for process in processes:
        process.join()
    return float(max(seconds))


def _encode(
    path: Path,
    chunks: list[int],
    model: ModelSpec,
    workers: int,
    ready: Barrier,
    times: Queue[float],
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    store, encoder = Store(path), load_encoder(model.reference)
    rows = [store.read_rows(chunk) for chunk in chunks]
    encoder.encode(["MKTAYIAKQR"])
    ready.wait()
    started = time.perf_counter()
    for lengths, residues in rows:
        embed_rows(encoder, lengths, residues, store.identity)
    times.put(time.perf_counter() - started)


class PeakMemory:
    """Largest resident size of this process and of any descendant, sampled."""

    def __enter__(self) -> PeakMemory:
        self.own = self.child = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(1.0):  # oftener, and it would be a load of its own
            self.own = max(self.own, me.memory_info().rss)
            for child in me.children(recursive=True):
                try:
                    self.child = max(self.child, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def large_store(work: Path) -> Store:
    """A store of 100,000 chunks of one row, all of them there as far as a scan can tell."""
    path = work / "many.faa"
    with path.open("w") as file:
        file.writelines(f">{number}\nMK\n" for number in range(100_000))
    settings = Settings(rows_per_chunk=1, repr_layer=0)
    store, _ = prepare(path, work / "many.zarr", settings, lambda _event: None)
    for number in range(store.chunk_count):
        (store.path / "status" / f"c.{number}").write_bytes(bytes(20))
        (store.path / "embedding" / f"c.{number}.0").write_bytes(bytes(20))
    assert store.present().all()
    return store


def scan_ms(store: Store) -> float:
    """Milliseconds to find out what is missing; best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        np.flatnonzero(~store.present())
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


if __name__ == "__main__":
    main()
