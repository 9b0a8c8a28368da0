"""`virnuc_dask run --cluster local-cuda` end to end, and what becomes of it under SIGKILL.

The command is the real one, on reads in six frames. First an input that takes a while, for speed
and for how busy the device is; then, on the first part of it, a killed coordinator and a killed
worker. Rows are compared with those of the first run, which nothing disturbed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import virnuc_dask
from benchmarks.gpu_sections.report import Options, Report, run_section
from benchmarks.gpu_sections.runs import (
    ROOT,
    ROWS_PER_READ,
    TOKENS_PER_ROW,
    Command,
    DeviceWatch,
    Timeline,
    mebibytes,
    share,
    tokens_of,
    watts,
    workplace,
    write_reads,
)
from virnuc_dask.store.store import Store

# Computing of the first run: a share of the section's time, but not more than so many seconds.
_SHARE, _MOST_S = 0.12, 25.0
_TOKENS_PER_S = 370_000.0
# Computing of each of the others, and chunks that they have at least.
_FAULTS_S, _LEAST_CHUNKS = 5.0, 9
_DRY_READS, _DRY_ROWS_PER_CHUNK = 2_000, 32
# Rows that are not the same bits may be so far apart, as a share of their length.
_CLOSE = 0.01
_SAMPLE = 50


def main(report: Report, options: Options) -> None:
    """Measure a run, and kill others."""
    facts = Facts(report)
    with workplace(report, options) as (folder, weights):
        setup = Setup(report, options, facts, folder, weights)
        whole = whole_run(setup, min(_MOST_S, _SHARE * options.seconds), _TOKENS_PER_S)
        if whole is None:
            raise RuntimeError("the first run did not complete: " + "; ".join(facts.broken))
        if killed := kill_and_resume(setup, whole):
            # Both at once: one needs the device, the other cores.
            with sample_verified(setup, killed):
                kill_worker(setup, whole)
    if facts.broken:
        raise RuntimeError("did not hold: " + "; ".join(facts.broken))


class Facts:
    """The ledger: what had to hold, and whether it did."""

    def __init__(self, report: Report) -> None:
        self._row = report.table("run, kill, resume: the ledger", "fact", "held", "detail")
        self._lock = threading.Lock()
        self.broken: list[str] = []

    def add(self, fact: str, held: bool, detail: object = "") -> bool:
        """Write down a fact, and return whether it held."""
        with self._lock:
            self._row(fact, "yes" if held else "NO", str(detail))
            if not held:
                self.broken.append(f"{fact} ({detail})" if detail else fact)
        return held


@dataclass(frozen=True)
class Setup:
    """What all runs of this section have in common."""

    report: Report
    options: Options
    facts: Facts
    folder: Path
    weights: Path
    seen: dict[str, float] = field(default_factory=dict)

    def command(self, *arguments: object) -> Command:
        """A command on one worker, which ends with the section's time."""
        cluster = "local" if self.options.dry_run else "local-cuda"
        where = ("--cluster", cluster, "--workers", 1)
        return Command(*arguments, *where, limit_s=self.options.left())

    def run(self, reads: Path, store: Path, rows_per_chunk: int | None) -> Command:
        """The command that every store here is made by."""
        chunks = ("--rows-per-chunk", rows_per_chunk) if rows_per_chunk else ()
        settings = ("--model", self.weights, "--translate", "six-frame", *chunks)
        return self.command("run", reads, store, *settings)

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for a step; otherwise a note that it is left out."""
        if self.options.left() >= seconds:
            return True
        left = self.options.left()
        self.report.note(f"left out, {left:.0f} s of {seconds:.0f} s are left: {what}")
        return False


@dataclass(frozen=True)
class Whole:
    """The run that nothing disturbed, and the input of the others: its first reads."""

    store: Store
    start_s: float
    reads: Path
    faults_s: float

    @property
    def rows_per_chunk(self) -> int:
        """Of its store."""
        return int(self.store.identity.rows_per_chunk)


# --- the run that is measured ---


def whole_run(setup: Setup, seconds: float, tokens_per_s: float) -> Whole | None:
    """Run the command on the whole input, and write down all that it takes.

    Parameters
    ----------
    setup : Setup
    seconds : float
        About how long it is to compute.
    tokens_per_s : float
        About how fast.
    """
    options, report = setup.options, setup.report
    number = _DRY_READS if options.dry_run else _reads(seconds * tokens_per_s)
    reads = write_reads(setup.folder / "reads.fa", number)
    path = setup.folder / "whole.zarr"
    rows_per_chunk = _DRY_ROWS_PER_CHUNK if options.dry_run else None
    with DeviceWatch() as device, setup.run(reads, path, rows_per_chunk) as command:
        code = command.finish()
        ended = time.monotonic()
        if not setup.facts.add("an undisturbed run ends complete", code == 0, f"exit code {code}"):
            report.note(command.said())
            return None
    seen = command.timeline
    start_s = _starting(report, command, ended)
    measured = _speed(report, command, device)
    _parts(report, seen)
    store = Store(path)
    report.figure("rows_per_chunk", store.identity.rows_per_chunk)
    report.figure("precision", store.identity.precision)
    wanted = _FAULTS_S * measured
    least = _LEAST_CHUNKS * int(store.identity.rows_per_chunk) * TOKENS_PER_ROW
    first = number // 4 if options.dry_run else min(number, _reads(max(wanted, least)))
    faults_s = first * ROWS_PER_READ * TOKENS_PER_ROW / measured
    # The same seed draws other reads if there are fewer of them: these are the file's first lines.
    some = setup.folder / "some.fa"
    lines = reads.read_bytes().split(b"\n", 2 * first)
    some.write_bytes(b"\n".join(lines[: 2 * first]) + b"\n")
    return Whole(store, start_s, some, faults_s)


def _reads(tokens: float) -> int:
    return int(tokens / TOKENS_PER_ROW / ROWS_PER_READ)


def _starting(report: Report, command: Command, ended: float) -> float:
    """Where the time goes before the first chunk is done; returns the seconds until then."""
    seen, row = command.timeline, report.table("a run's start", "until", "seconds since the start")

    def since(kind: str) -> float:
        at = seen.first(kind)
        return 0.0 if at is None else at - command.began

    steps = [("the input is being read (Python, imports)", since("reading"))]
    steps.append(("the input is in the store, the weights' digest known", since("run_started")))
    loaded = 0.0
    for checked in seen.of("workers_checked"):
        loaded = float(checked["seconds"])
        steps.append(("the cluster has started", since("workers_checked") - loaded))
        steps.append(("the worker has the model", since("workers_checked")))
    steps.append(("the first chunk is done", since("chunk_done")))
    steps.append(("the last chunk is done", seen.computed()[-1][0] - command.began))
    steps.append(("the command has ended", ended - command.began))
    for step, seconds in steps:
        row(step, f"{seconds:.2f}")
    report.figure("first_chunk_s", round(since("chunk_done"), 2))
    report.figure("model_load_s", round(loaded, 2))
    report.figure("command_s", round(ended - command.began, 2))
    return since("chunk_done")


def _speed(report: Report, command: Command, device: DeviceWatch) -> float:
    """How fast it was and how busy the device; returns tokens/s of the steady state."""
    seen, row = command.timeline, report.table("a run", "what", "measured")
    summary, steady = seen.summary(), seen.steady()
    chunks = [event for _, event in seen.computed()]
    rows, tokens, seconds = summary["computed_rows"], tokens_of(chunks), summary["seconds"]
    row("reads in; sequences, tokens, chunks", _of_input(seen, rows, tokens, len(chunks)))
    row("computing, seconds", f"{seconds:.2f}")
    row("sequences/s, tokens/s", f"{rows / seconds:,.0f}, {tokens / seconds:,.0f}")
    figures: dict[str, Any] = {
        "sequences_per_s": rows / seconds,
        "tokens_per_s": tokens / seconds,
        "summary_busy": summary["busy"],
    }
    rate = tokens / seconds
    if steady is not None:
        rate = steady.tokens / steady.seconds
        row(
            "from the first chunk's end to the last's: sequences/s, tokens/s",
            f"{steady.rows / steady.seconds:,.0f}, {rate:,.0f}",
        )
        span = (steady.since, steady.until)
        figures |= {
            "steady_sequences_per_s": steady.rows / steady.seconds,
            "steady_tokens_per_s": rate,
            "nvml_busy": device.busy(*span),
            "power_w": device.power(*span),
            "device_memory": device.memory(*span),
            "nvml_samples": len(device.between(*span)),
        }
        row("the same time: device busy, by NVML", share(figures["nvml_busy"]))
        row("the same time: mean power", watts(figures["power_w"]))
        row("the same time: most device memory", mebibytes(figures["device_memory"]))
    row("workers' time that was computing, of the summary", share(summary["busy"]))
    fill = [event["fill"] for event in chunks]
    row("tokens of batches, as a share of their room", share(sum(fill) / len(fill)))
    row("device memory of the worker's tensors, most", mebibytes(summary["memory"]))
    row("peak RSS of the coordinator", mebibytes(command.coordinator_rss))
    row("peak RSS of another process", mebibytes(command.worker_rss))
    figures |= {"coordinator_rss": command.coordinator_rss, "worker_rss": command.worker_rss}
    for name, value in figures.items():
        report.figure(name, value)
    return rate


def _of_input(seen: Timeline, rows: int, tokens: int, chunks: int) -> str:
    reads = seen.of("input_read")[0]["reads"]
    return f"{reads:,}; {rows:,}, {tokens:,}, {chunks:,}"


def _parts(report: Report, seen: Timeline) -> None:
    """What its chunks took, part by part."""
    row = report.table("chunks of that run", "part", "seconds in all", "seconds a chunk")
    took, chunks = seen.took(), len(seen.computed())
    for part, seconds in took.items():
        row(part.removesuffix("_s"), f"{seconds:.2f}", f"{seconds / chunks:.3f}")
        report.figure(f"chunk_{part}", seconds / chunks)


# --- the coordinator is killed ---


def kill_and_resume(setup: Setup, whole: Whole) -> Store | None:
    """Kill a coordinator in the middle, and give the same command again, twice.

    If there is no time to kill a worker of another run, one of the second is killed.
    """
    # Both of its starts, its checks, and the third command, which starts no worker.
    if not setup.fits("a killed coordinator", 2 * whole.start_s + whole.faults_s + 12):
        return None
    facts, path = setup.facts, setup.folder / "killed.zarr"
    with setup.run(whole.reads, path, whole.rows_per_chunk) as first:
        killed = _kill_after_a_third(first)
        code = first.process.wait(timeout=60)
        left = first.await_end_of_all()
        gone = time.monotonic() - killed
    store = Store(path)
    present = store.present()
    partial = virnuc_dask.verify(path, repair=True)
    # A chunk whose worker was killed between its two files is unfinished, not damaged.
    damaged = [chunk for chunk in partial.bad if present[chunk]]
    done = np.flatnonzero(store.present()).tolist()
    facts.add(
        "the coordinator is killed in the middle",
        code == -signal.SIGKILL and 0 < len(done) < store.chunk_count,
        f"exit code {code}, {len(done)} of {store.chunk_count} chunks done",
    )
    facts.add(
        "no worker outlives it",
        not left and bool(first.descendants),
        f"{len(first.descendants) - left} of {len(first.descendants)} gone after {gone:.1f} s",
    )
    facts.add(
        "it leaves no damaged chunk, and nothing but unfinished files",
        not damaged and all(name.endswith(".partial") for name in partial.leftovers),
        f"{len(partial.leftovers)} unfinished files, {len(partial.bad)} unfinished chunks",
    )
    before = finished_files(store)
    with setup.run(whole.reads, path, whole.rows_per_chunk) as second:
        if setup.options.left() < 3 * whole.start_s + 2 * whole.faults_s + 15:
            setup.report.note("a worker of the resumed run is killed: no time for a run of its own")
            follow_a_death(setup, second)
        else:
            second.finish()
        code = second.process.wait(timeout=60)
        facts.add("the same command ends complete", code == 0, f"exit code {code} {second.said()}")
    # One that a killed worker wrote, and did not report, is found done by the next.
    reported = [event["chunk"] for event in second.timeline.of("chunk_done")]
    computed = len(second.timeline.computed())
    facts.add(
        "it computes the missing chunks and no other",
        sorted([*done, *reported]) == list(range(store.chunk_count)),
        f"{len(done)} + {computed} of {store.chunk_count}",
    )
    after = finished_files(store)
    facts.add(
        "finished chunks are not touched: inode, time, bytes",
        bool(before) and all(after.get(name) == seen for name, seen in before.items()),
        f"{len(before)} files",
    )
    with setup.command("resume", path) as third:
        code = third.finish()
    chunks = len(third.timeline.of("chunk_done"))
    facts.add(
        "once more, nothing is computed",
        code == 0 and chunks == 0 and finished_files(store) == after,
        f"exit code {code}, {chunks} chunks",
    )
    check_ledger(facts, "killed and resumed", second.timeline, store, whole)
    return store


def _kill_after_a_third(command: Command) -> float:
    """Kill the coordinator once a third of the chunks are done; returns when that was."""
    killed = time.monotonic()
    chunks = 0
    for event in command:
        if event["event"] == "run_started":
            chunks = event["chunks"]
        if len(command.timeline.computed()) == max(1, chunks // 3) and _is_done(event):
            command.kill_coordinator()
            killed = time.monotonic()
    return killed


def _is_done(event: dict[str, Any]) -> bool:
    return event["event"] == "chunk_done" and bool(event["computed"])


def finished_files(store: Store) -> dict[str, tuple[int, int, bytes]]:
    """Files of the chunks that are done: inode, modification time, content."""
    names = {name for chunk in np.flatnonzero(store.present()) for name in store.keys(int(chunk))}
    found = {}
    for name in sorted(names):
        file = Path(store.path, name)
        if file.is_file():
            stat = file.stat()
            found[name] = stat.st_ino, stat.st_mtime_ns, file.read_bytes()
    return found


def check_ledger(facts: Facts, which: str, seen: Timeline, store: Store, whole: Whole) -> None:
    """Every row is in exactly one state, and is what the undisturbed run has."""
    counts = dict(seen.summary().get("counts", {}))
    facts.add(
        f"{which}: counts of states add up to the rows",
        sum(counts.values()) == store.records and not counts.get("pending"),
        f"{counts} of {store.records:,}",
    )
    report = virnuc_dask.verify(store.path)
    facts.add(
        f"{which}: every chunk is there and decodes",
        (report.checked, report.missing, report.bad) == (store.chunk_count, 0, {})
        and report.sequences is None,
        f"{report.checked} chunks, {report.missing} missing, {len(report.bad)} bad",
    )
    data, expected = virnuc_dask.open_store(store.path), virnuc_dask.open_store(whole.store.path)
    rows = store.records
    facts.add(
        f"{which}: the same rows in the same states",
        bool((data.status.values != 0).all())
        and np.array_equal(data.status.values, expected.status[:rows].values)
        and list(data.sequence_id.values) == list(expected.sequence_id[:rows].values),
        f"{rows:,} rows",
    )
    # The undisturbed run has longer input: its chunks are the same, but for the last here.
    full = rows // whole.rows_per_chunk * whole.rows_per_chunk
    found, wanted = data.embedding.values, expected.embedding[:rows].values
    same = np.array_equal(found[:full], wanted[:full], equal_nan=True)
    difference = np.abs(found.astype(np.float32) - wanted)
    apart = np.linalg.norm(difference, axis=1) / np.linalg.norm(wanted, axis=1)
    last = "" if full == rows else f"; {rows - full} of a shorter chunk {apart[full:].max():.2g}"
    facts.add(
        f"{which}: rows are those of an undisturbed run",
        bool(apart.max() <= _CLOSE),
        f"{full:,} rows "
        + ("bitwise" if same else f"{apart[:full].max():.2g} apart, largest {difference.max():.2g}")
        + last,
    )


# --- a worker is killed ---


def kill_worker(setup: Setup, whole: Whole) -> None:
    """Kill the worker of another run after its first chunk."""
    if "worker_replaced_s" in setup.seen:
        return  # done on the way
    if not setup.fits("a killed worker", 2 * whole.start_s + whole.faults_s + 5):
        return
    path = setup.folder / "worker.zarr"
    with setup.run(whole.reads, path, whole.rows_per_chunk) as command:
        follow_a_death(setup, command)
        code = command.process.wait(timeout=60)
        said = command.said()
    if setup.facts.add("that run ends complete", code == 0, f"exit code {code} {said}"):
        check_ledger(setup.facts, "worker killed", command.timeline, Store(path), whole)


def follow_a_death(setup: Setup, command: Command) -> None:
    """Kill the worker after its first chunk, and see that another takes its place."""
    victim, died, back = 0, 0.0, 0.0
    for event in command:
        if event["event"] == "chunk_done" and not victim:
            victim, died = event["pid"], time.monotonic()
            os.kill(victim, signal.SIGKILL)
        elif event["event"] == "chunk_done" and event["pid"] != victim:
            back = back or time.monotonic()
    seen, facts = command.timeline, setup.facts
    lost, summary = seen.of("worker_lost"), seen.summary()
    facts.add(
        "a worker is killed, and that is noticed",
        bool(victim) and len(lost) == summary.get("workers_lost") == 1,
        f"{len(lost)} lost, with {sum(len(event['chunks']) for event in lost)} chunks on it",
    )
    facts.add(
        "another process takes its place",
        back > died > 0,
        f"its first chunk is done after {back - died:.1f} s",
    )
    setup.seen["worker_replaced_s"] = round(back - died, 2)
    setup.report.figure("worker_replaced_s", round(back - died, 2))


# --- a sample is computed again ---


@contextmanager
def sample_verified(setup: Setup, store: Store) -> Iterator[None]:
    """Meanwhile, the command `verify --sample`, on cores and in float32."""
    if not setup.fits("verify --sample", 15):
        yield
        return
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "virnuc_dask", "verify", store.path, "--sample", str(_SAMPLE)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield
        said, _ = process.communicate(timeout=max(1.0, setup.options.left()))
    except subprocess.TimeoutExpired:
        setup.report.note("left out, no time is left: the end of verify --sample")
        return
    finally:
        process.kill()
        process.wait()
    lines = said.strip().splitlines()
    setup.report.note(
        f"verify --sample {_SAMPLE}, {time.monotonic() - began:.0f} s: {' / '.join(lines)}"
    )
    setup.facts.add(
        f"verify --sample {_SAMPLE} finds the store good",
        process.returncode == 0,
        f"exit code {process.returncode}; {lines[-1] if lines else ''}",
    )


if __name__ == "__main__":
    run_section(main)
