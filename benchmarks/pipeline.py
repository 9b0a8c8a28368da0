"""What the pipeline costs beside the bare encoder loop, and how it grows; measured turn by turn.

    python -m benchmarks.pipeline bare       beside the bare encoder loop, same work, same run
    python -m benchmarks.pipeline workers    one worker against two, of one thread each
    python -m benchmarks.pipeline chunks     100,000 chunks of nothing: Dask, coordinator, memory
    python -m benchmarks.pipeline scan       resume and status of 100,000 present chunks

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import SimpleQueue
from statistics import median

import dask
import numpy as np
import psutil
import torch
from distributed import Client, Future, LocalCluster

from tests.support.models import random_network, save_network
from virnuc_dask import resume, run
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.runtime import chunk_window, events
from virnuc_dask.runtime.embed import ChunkReport, embed_chunk, embed_rows
from virnuc_dask.runtime.embed import Rows as EmbeddedRows
from virnuc_dask.runtime.local import LESS_PROFILING, MALLOC, THREADS_PER_WORKER
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.runtime.workers import run_chunk
from virnuc_dask.settings import Identity, ModelSpec, Settings
from virnuc_dask.store.store import Store

Rows = list[tuple[str, str]]
EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows-per-chunk", type=int, default=256)
    parser.add_argument("--passes", type=int, default=8, help="how often the sequences are read")
    parser.add_argument("--chunks", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = PARTS[arguments.part](Path(folder), arguments)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def real_work(folder: Path, passes: int) -> tuple[Path, list[Path]]:
    """Random weights of ESM-2 8M, and 1,677 real sequences, read so many times."""
    weights, peptides = folder / "esm2_8m_random.pt", folder / "orfs.faa"
    save_network(random_network(6, 320, 20), weights)
    with peptides.open("w") as file:
        script = [sys.executable, EXAMPLES / "lambda_orfs.py", EXAMPLES / "lambda_virus.fa.gz"]
        subprocess.run(script, stdout=file, check=True)
    return weights, [peptides, EXAMPLES / "viral_proteins.faa.gz"] * passes


# --- beside the bare encoder loop ---


def beside_bare(folder: Path, arguments: argparse.Namespace) -> Rows:
    """The run against the loop, in turns."""
    weights, inputs = real_work(folder, arguments.passes)
    settings = Settings(model=str(weights), rows_per_chunk=arguments.rows_per_chunk)
    store, model = prepare(inputs, folder / "bare.zarr", settings, lambda _event: None)
    bare, whole, peaks = [], [], []
    for number in range(arguments.repeats):
        bare.append(store.records / bare_loop(store, model, arguments.workers))
        with PeakMemory() as peak:
            summary = run(
                inputs,
                folder / f"run{number}.zarr",
                model=str(weights),
                workers=arguments.workers,
                rows_per_chunk=arguments.rows_per_chunk,
            )
        assert summary.complete
        whole.append(summary.computed_rows / summary.seconds)
        peaks.append(peak)
    done = folder / "run0.zarr"
    size = sum(f.stat().st_size for f in (done / "embedding").iterdir())
    everything = sum(f.stat().st_size for f in done.rglob("*") if f.is_file())
    return [
        ("sequences, residues", f"{store.records:,}, {summary.computed_residues:,}"),
        ("workers, chunks, turns", f"{arguments.workers}, {store.chunk_count}, {len(bare)}"),
        ("seconds a run", f"{summary.seconds:.0f}"),
        ("bare encoder loop, sequences/s", f"{median(bare):.1f}"),
        ("run, sequences/s", f"{median(whole):.1f}"),
        ("run / bare", ratio(whole, bare)),
        ("share of the workers' time that was computing", f"{summary.busy:.0%}"),
        ("store, bytes per row", f"{everything / store.records:,.0f}"),
        ("embedding, bytes per row", f"{size / store.records:,.0f} of {4 * model.dimension:,}"),
        ("peak RSS of the coordinator", f"{max(p.own for p in peaks) / 2**20:,.0f} MiB"),
        ("peak RSS of a worker", f"{max(p.child for p in peaks) / 2**20:,.0f} MiB"),
    ]


def ratio(ours: list[float], peers: list[float]) -> str:
    """Median and range of the turns' ratios."""
    ratios = [ours / peer for ours, peer in zip(ours, peers, strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def bare_loop(store: Store, model: ModelSpec, workers: int, threads: int = 0) -> float:
    """Seconds until the last of so many processes has encoded its share of the chunks."""
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(workers), context.Queue()
    shares = [list(range(first, store.chunk_count, workers)) for first in range(workers)]
    processes = [
        context.Process(target=_encode, args=(store.path, share, model, threads, ready, times))
        for share in shares
    ]
    # With malloc's settings of workers, of which the encoder is faster.
    os.environ.update({name.rpartition(".")[2]: value for name, value in MALLOC.items()})
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
    threads: int,
    ready: Barrier,
    times: Queue[float],
) -> None:
    torch.set_num_threads(threads)
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


# --- workers ---


def more_workers(folder: Path, arguments: argparse.Namespace) -> Rows:
    """One worker and two, of one thread each, whatever the cores."""
    weights, inputs = real_work(folder, arguments.passes)
    settings = Settings(model=str(weights), rows_per_chunk=arguments.rows_per_chunk)
    store, model = prepare(inputs, folder / "bare.zarr", settings, lambda _event: None)
    rates: dict[int, list[float]] = {1: [], 2: []}
    bare: dict[int, list[float]] = {1: [], 2: []}
    for number in range(arguments.repeats):
        for workers, found in rates.items():
            bare[workers].append(store.records / bare_loop(store, model, workers, threads=1))
            with dask_workers(workers) as client:
                summary = run(
                    inputs,
                    folder / f"{number}-{workers}.zarr",
                    model=str(weights),
                    client=client,
                    rows_per_chunk=arguments.rows_per_chunk,
                )
            assert summary.complete
            found.append(summary.computed_rows / summary.seconds)
    return [
        ("turns, chunks", f"{arguments.repeats}, {summary.chunks}"),
        *((f"{n} worker(s), sequences/s", f"{median(found):.1f}") for n, found in rates.items()),
        ("two / one", ratio(rates[2], rates[1])),
        ("two / one, bare encoder loop: what the machine has", ratio(bare[2], bare[1])),
    ]


@contextmanager
def dask_workers(count: int) -> Iterator[Client]:
    """Workers that compute with one thread, and have the model in memory before they are timed."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (
        dask.config.set({**MALLOC, **LESS_PROFILING}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=THREADS_PER_WORKER,
            memory_limit=0,
            env=threads,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(count, timeout=60)
        yield client


# --- chunks ---


def many_chunks(folder: Path, arguments: argparse.Namespace) -> Rows:
    """Chunks of one row that cost nothing: all that is left is Dask and the coordinator."""
    rows: Rows = []
    for name, task, chunks in (
        ("nothing", no_task, arguments.chunks),
        ("read and write, no encoder", no_encoder, arguments.chunks // 10),
    ):
        store = one_row_chunks(folder / f"{chunks}", chunks)
        rows.append((f"{name}: chunks", f"{chunks:,}"))
        chunk_window.run_chunk = partial(run_chunk, embed=task)  # type: ignore[assignment]
        watch = _Watch()
        summary = resume(store.path, workers=2, listener=watch)
        assert summary.computed_chunks == store.chunk_count
        rows += [
            (f"{name}: ms per chunk", f"{1000 * summary.seconds / store.chunk_count:.2f}"),
            (f"{name}: first result after", f"{watch.first - watch.ready:.2f} s"),
            # A local scheduler is a thread of the coordinator's process.
            (f"{name}: coordinator and scheduler, first to last result", watch.memory()),
        ]
    # In the end: what it leaves of free memory in this process would hide the runs' growth.
    alone = window_of_nothing(arguments.chunks)
    return [*rows, ("tasks of nothing by Dask alone: ms per task", f"{alone:.2f}")]


def window_of_nothing(tasks: int) -> float:
    """Milliseconds for each of so many tasks of nothing, as many at a time as a run's chunks."""
    done: SimpleQueue[Future] = SimpleQueue()
    nothing = dask.delayed(abs, pure=False)
    with dask_workers(2) as client:
        at_once = min(tasks, sum(client.nthreads().values()))
        began = time.monotonic()
        for number in range(tasks):
            if number >= at_once:
                done.get().release()
            task = nothing(number, dask_key_name=f"nothing-{number}")
            future = client.compute(task, optimize_graph=False, traverse=False)
            future.add_done_callback(done.put)
        for _ in range(at_once):
            done.get().release()
        return 1000 * (time.monotonic() - began) / tasks


class _Watch:
    """Listens for when workers are ready and the first result is there, and to memory since."""

    def __init__(self) -> None:
        self.ready = self.first = 0.0
        self._rss: list[int] = []

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.WorkersChanged):
            self.ready = self.ready or time.monotonic()
        elif isinstance(event, events.ChunkDone):
            self.first = self.first or time.monotonic()
            if event.chunk % 1000 == 0 or not self._rss:
                self._rss.append(psutil.Process().memory_info().rss)

    def memory(self) -> str:
        """RSS at the first result, and the most since."""
        return f"{self._rss[0] / 2**20:.0f} to {max(self._rss) / 2**20:.0f} MiB"


def no_task(path: str, chunk: int, *_: object, **__: object) -> ChunkReport:
    """Says that it did something."""
    return ChunkReport(chunk, 1, {"embedded": 1}, True)


def no_encoder(
    path: str, chunk: int, identity: Identity, model: ModelSpec, device: str, store_id: str
) -> ChunkReport:
    """The task, but for the encoder: rows of ones."""

    def embed(*_: object) -> EmbeddedRows:
        return EmbeddedRows(np.ones(1, np.uint8), np.ones((1, model.dimension), np.float32), None)

    return embed_chunk(path, chunk, identity, model, device, embed, store_id)


def scan(folder: Path, _: argparse.Namespace) -> Rows:
    """What is missing of 100,000 chunks that are all there, as far as a scan can tell."""
    store = one_row_chunks(folder, 100_000)
    for number in range(store.chunk_count):
        (store.path / "status" / f"c.{number}").write_bytes(bytes(20))
        (store.path / "embedding" / f"c.{number}.0").write_bytes(bytes(20))
    assert store.present().all()
    command = [sys.executable, "-m", "virnuc_dask", "status", str(store.path)]
    return [
        ("resume scan, 100,000 chunks", f"{milliseconds(store.present):.0f} ms"),
        (
            "status as a command, 100,000 chunks",
            f"{milliseconds(lambda: subprocess.check_output(command)):.0f} ms",
        ),
    ]


def one_row_chunks(folder: Path, chunks: int) -> Store:
    """A store of chunks of one row."""
    folder.mkdir(exist_ok=True)
    path = folder / "many.faa"
    with path.open("w") as file:
        file.writelines(f">{number}\nMK\n" for number in range(chunks))
    settings = Settings("demo", rows_per_chunk=1, repr_layer=0)
    store, _ = prepare(path, folder / "many.zarr", settings, lambda _event: None)
    return store


def milliseconds(call: Callable[[], object]) -> float:
    """Best of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


PARTS = {
    "bare": beside_bare,
    "workers": more_workers,
    "chunks": many_chunks,
    "scan": scan,
}


if __name__ == "__main__":
    main()
