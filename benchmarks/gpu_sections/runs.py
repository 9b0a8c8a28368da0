"""What the sections share that have whole runs: weights, reads, commands, and what is watched."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import numpy as np
import psutil

from benchmarks.gpu_sections.report import Options, Report
from virnuc_dask.runtime.events import Event

ROOT = Path(__file__).parents[2]
GENOME = ROOT / "examples" / "lambda_virus.fa.gz"
READ_LENGTH, ERRORS = 150, 0.01
# What the genome's reads of that length give by `--translate six-frame`.
ROWS_PER_READ, TOKENS_PER_ROW = 1.52, 51.3
# Layers, features and heads: of ESM-2 650M and 3B, and of something tiny.
SHAPE, LARGE_SHAPE, TINY_SHAPE = (33, 1280, 20), (36, 2560, 40), (2, 64, 4)
_ENOUGH_IN_MEMORY = 8 * 2**30
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")
_PARTS = ("read_s", "wait_s", "compute_s", "write_s")


# --- what is computed ---


@contextmanager
def workplace(
    report: Report, options: Options, shape: tuple[int, int, int] = SHAPE
) -> Iterator[tuple[Path, Path]]:
    """A folder that is removed afterwards, and the weights, which stay for the next section."""
    # Also when the section is told to end: everything that was started ends with it.
    signal.signal(signal.SIGTERM, _leave)
    base = _base()
    weights = _weights(base, options, report, TINY_SHAPE if options.dry_run else shape)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        report.note(f"weights and stores in {base.parent}")
        yield Path(folder), weights


def write_reads(path: Path, number: int, seed: int = 1) -> Path:
    """Reads of phage lambda as FASTA: half of them of the other strand, 1 % of letters wrong."""
    with gzip.open(GENOME, "rt") as file:
        letters = "".join(line.strip() for line in file if not line.startswith(">"))
    genome = np.frombuffer(letters.upper().encode(), np.uint8)
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(genome) - READ_LENGTH + 1, number)
    reads = genome[starts[:, None] + np.arange(READ_LENGTH)]
    wrong = random.random(reads.shape) < ERRORS
    reads[wrong] = random.choice(np.frombuffer(b"ACGT", np.uint8), int(wrong.sum()))
    with path.open("wb") as out:
        for count, read in enumerate(map(bytes, reads)):
            chosen = read.translate(_COMPLEMENT)[::-1] if count % 2 else read
            out.write(b">read%d\n%s\n" % (count, chosen))
    return path


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _base() -> Path:
    memory = Path("/dev/shm")  # noqa: S108  # a folder of this user's own is made in it
    in_memory = memory.is_dir() and shutil.disk_usage(memory).free > _ENOUGH_IN_MEMORY
    parent = memory if in_memory else Path(tempfile.gettempdir())
    base = parent / f"virnuc_dask-gpu-benchmark-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} is somebody else's")
    return base


def _weights(base: Path, options: Options, report: Report, shape: tuple[int, int, int]) -> Path:
    """Random weights of ESM-2's layout, matrices in float16; made by the first who asks."""
    layers, dimension, heads = shape
    path = base / f"random-{layers}-{dimension}-{heads}.pt"
    if path.is_file():
        return path
    import torch

    from tests.support.models import checkpoint_data, random_network

    began = time.monotonic()
    with torch.device(options.device):
        network = random_network(layers, dimension, heads)
    data = checkpoint_data(network)
    data["model"] = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).cpu()
        for name, tensor in data["model"].items()
    }
    del network
    if options.device == "cuda":
        torch.cuda.empty_cache()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(data, partial)
    os.replace(partial, path)
    report.note(f"made weights of {layers} layers in {time.monotonic() - began:.1f} s")
    return path


# --- what is seen of a run ---


class Timeline:
    """A run's events as plain values, each with the time at which it came.

    Attributes
    ----------
    events : list of (float, dict)
        Times by `time.monotonic`.
    """

    def __init__(self) -> None:
        self.events: list[tuple[float, dict[str, Any]]] = []

    def __call__(self, event: Event) -> None:
        """Take an event of a run in this process."""
        self.add(event.to_json())

    def add(self, event: dict[str, Any]) -> None:
        """Take an event."""
        self.events.append((time.monotonic(), event))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for _, event in self.events if event["event"] == kind]

    def first(self, kind: str) -> float | None:
        """When the first of a kind came, if any did."""
        return next((at for at, event in self.events if event["event"] == kind), None)

    def computed(self) -> list[tuple[float, dict[str, Any]]]:
        """Chunks that this run computed, in the order in which they were done."""
        return [
            (at, event)
            for at, event in self.events
            if event["event"] == "chunk_done" and event["computed"]
        ]

    def summary(self) -> dict[str, Any]:
        """How the run ended; empty if it did not say."""
        found = self.of("run_summary")
        return found[-1] if found else {}

    def steady(self) -> Steady | None:
        """From the first chunk that was done to the last; None if there are not three."""
        chunks = self.computed()
        if len(chunks) < 3:
            return None
        (since, _), (until, _) = chunks[0], chunks[-1]
        later = [event for _, event in chunks[1:]]
        rows = sum(event["rows"] for event in later)
        return Steady(since, until, len(later), rows, tokens_of(later))

    def took(self) -> dict[str, float]:
        """Seconds of all computed chunks: ``read_s``, ``wait_s``, ``compute_s``, ``write_s``."""
        return {part: sum(event[part] for _, event in self.computed()) for part in _PARTS}


@dataclass(frozen=True)
class Steady:
    """What was done from one time to another, by `time.monotonic`."""

    since: float
    until: float
    chunks: int
    rows: int
    tokens: int

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.until - self.since


def tokens_of(chunks: list[dict[str, Any]]) -> int:
    """Tokens of chunks in which no sequence is cut: two for each row beside its residues."""
    return sum(event["residues"] + 2 * event["rows"] for event in chunks)


class Command:
    """A command of `python -m virnuc_dask` in a process group of its own, and its memory.

    Iterate over it for its events, as they come. Leaving the context kills whatever is left of it.

    Parameters
    ----------
    *arguments : object
        Of the command, with ``--json`` added.
    limit_s : float
        After so many seconds it is killed.

    Attributes
    ----------
    timeline : Timeline
    began : float
        By `time.monotonic`.
    coordinator_rss, worker_rss : int
        The most bytes of the process itself, and of any other that it has started.
    descendants : dict of int to psutil.Process
        All that were seen, by their numbers.
    """

    def __init__(self, *arguments: object, limit_s: float) -> None:
        self.timeline = Timeline()
        self.coordinator_rss = self.worker_rss = 0
        self.descendants: dict[int, psutil.Process] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the command
        self._over = threading.Event()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "virnuc_dask", *map(str, arguments), "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._watch = threading.Thread(target=self._look, args=(max(1.0, limit_s),), daemon=True)

    def __enter__(self) -> Command:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()
        self.kill()
        self.process.wait()
        self._errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a killed process may leave half a line
                self.timeline.add(json.loads(line))
                yield self.timeline.events[-1][1]

    def finish(self) -> int:
        """Read its events to the end, and return the exit code."""
        for _ in self:
            pass
        return self.process.wait(timeout=60)

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:].strip()

    def kill_coordinator(self) -> None:
        """Kill the command's own process and nothing else."""
        self._see()
        self.process.send_signal(signal.SIGKILL)

    def await_end_of_all(self, patience: float = 20.0) -> int:
        """How many of the processes that it has started are left, at last."""
        until = time.monotonic() + patience
        while left := sum(map(_is_alive, self.descendants.values())):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return left

    def kill(self) -> None:
        """End the command and all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in self.descendants.values():
            with suppress(psutil.NoSuchProcess):  # also if its number is another's by now
                process.kill()

    def _look(self, limit_s: float) -> None:
        while not self._over.wait(1.0):  # oftener, and it would be a load of its own
            self._see()
            if time.monotonic() > self.began + limit_s:
                self.kill()
                return

    def _see(self) -> None:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            self.coordinator_rss = max(self.coordinator_rss, own.memory_info().rss)
            for child in own.children(recursive=True):
                self.descendants.setdefault(child.pid, child)
                with suppress(psutil.NoSuchProcess):
                    self.worker_rss = max(self.worker_rss, child.memory_info().rss)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- what is seen of the device ---


@dataclass(frozen=True)
class Sample:
    """What NVML says at a time, by `time.monotonic`.

    Attributes
    ----------
    at : float
    busy : float
        Share of NVML's last period, a sixth of a second to a second, in which a kernel ran.
    power : float
        Watts.
    memory : int
        Bytes in use, of all processes.
    clock : int
        Of the multiprocessors, MHz.
    """

    at: float
    busy: float
    power: float
    memory: int
    clock: int


class DeviceWatch:
    """Samples the first visible GPU in a thread. Without NVML there are no samples.

    Parameters
    ----------
    every_s : float
        Seconds from one sample to the next.

    Attributes
    ----------
    samples : list of Sample
    """

    def __init__(self, every_s: float = 0.05) -> None:
        self.samples: list[Sample] = []
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeviceWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def between(self, since: float, until: float) -> list[Sample]:
        """Samples of that time."""
        return [sample for sample in self.samples if since <= sample.at <= until]

    def busy(self, since: float, until: float) -> float | None:
        """Share of that time in which the device was busy."""
        chosen = self.between(since, until)
        return fmean(sample.busy for sample in chosen) if chosen else None

    def power(self, since: float, until: float) -> float | None:
        """Mean watts of that time."""
        chosen = self.between(since, until)
        return fmean(sample.power for sample in chosen) if chosen else None

    def memory(self, since: float, until: float) -> int | None:
        """The most bytes in that time."""
        return max((sample.memory for sample in self.between(since, until)), default=None)

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:
            print(f"the device cannot be watched: {error}", flush=True)
            return
        try:
            device = _nvml_device(pynvml)
            while not self._over.wait(self._every_s):
                self.samples.append(
                    Sample(
                        time.monotonic(),
                        pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
                        pynvml.nvmlDeviceGetPowerUsage(device) / 1000,
                        int(pynvml.nvmlDeviceGetMemoryInfo(device).used),
                        pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM),
                    )
                )
        except pynvml.NVMLError as error:  # a part of a card has no utilisation of its own
            print(f"the device cannot be watched: {error}", flush=True)
        finally:
            pynvml.nvmlShutdown()


def _nvml_device(pynvml: Any) -> Any:
    import torch

    try:
        uuid = torch.cuda.get_device_properties(0).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (AttributeError, pynvml.NVMLError):
        return pynvml.nvmlDeviceGetHandleByIndex(0)


# --- how it is written ---


def share(value: float | None) -> str:
    """As per cent, or a dash if it could not be had."""
    return "-" if value is None else f"{value:.1%}"


def watts(value: float | None) -> str:
    """As watts, or a dash."""
    return f"{value:.0f} W" if value else "-"  # some cards say 0 of what they do not measure


def mebibytes(value: float | None) -> str:
    """As MiB, or a dash."""
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"
