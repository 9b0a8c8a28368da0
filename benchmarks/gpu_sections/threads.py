"""How busy one GPU is with 1, 2 and 3 chunks in its worker at once.

One worker, which keeps the model: how many chunks it has at once is what `in_flight` says. Turn
by turn, each on a new copy of the same store.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import virnuc_dask
from benchmarks.gpu_sections.report import Options, Report, run_section
from benchmarks.gpu_sections.runs import (
    ROWS_PER_READ,
    TOKENS_PER_ROW,
    DeviceWatch,
    Timeline,
    share,
    tokens_of,
    watts,
    workplace,
    write_reads,
)
from virnuc_dask import RunConfig
from virnuc_dask.runtime import local
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings, Translation

# Default first: if time is short, it is there.
CHUNKS = (3, 1, 2)
# Of a turn, as a share of the section's time.
_SHARE = 0.075
_TOKENS_PER_S = 370_000
_DRY_READS, _DRY_ROWS_PER_CHUNK = 800, 32
_MOST_ROUNDS = 3


def main(report: Report, options: Options) -> None:
    """Take turns until the time is over."""
    # On cores a worker has fewer threads than are tried here.
    local.THREADS_PER_WORKER = max(CHUNKS)
    local.THREADS_PER_GPU = max(CHUNKS)
    kind = "local" if options.dry_run else "local-cuda"
    with workplace(report, options) as (folder, weights):
        empty = _store(folder, weights, options)
        found: dict[int, list[Turn]] = {chunks: [] for chunks in sorted(CHUNKS)}
        with connect(kind, 1) as client, DeviceWatch() as device:

            def take(chunks: int, shard: str | None = None) -> tuple[Timeline, Turn]:
                path = folder / "turn.zarr"
                shutil.copytree(empty, path)
                config = RunConfig(device=options.device, in_flight=chunks, shard=shard)
                seen = Timeline()
                virnuc_dask.resume(path, client=client, config=config, listener=seen)
                shutil.rmtree(path)
                return seen, Turn.of(seen, device)

            # It loads the model, and whatever the first chunks take longer for.
            warm, _ = take(max(CHUNKS), "1/3")
            loading = warm.of("workers_checked")[0]["seconds"] if warm.of("workers_checked") else 0
            report.figure("model_load_s", round(loading, 2))
            longest = 0.0
            for chunks in _order():
                before = options.left()
                if before < longest + 4:
                    break
                _, turn = take(chunks)
                found[chunks].append(turn)
                longest = max(longest, before - options.left())
    _write(report, found)
    if missing := [chunks for chunks, turns in found.items() if not turns]:
        raise RuntimeError(f"no time for {missing} chunks at once")


def _order() -> list[int]:
    """Rounds, every second of them backwards: what drifts meanwhile hits all alike."""
    rounds = [CHUNKS if number % 2 == 0 else CHUNKS[::-1] for number in range(_MOST_ROUNDS)]
    return [chunks for order in rounds for chunks in order]


def _store(folder: Path, weights: Path, options: Options) -> Path:
    """A store of reads of which nothing is computed yet."""
    tokens = _SHARE * options.seconds * _TOKENS_PER_S
    number = _DRY_READS if options.dry_run else int(tokens / TOKENS_PER_ROW / ROWS_PER_READ)
    settings = Settings(
        model=str(weights),
        translation=Translation(),
        rows_per_chunk=_DRY_ROWS_PER_CHUNK if options.dry_run else None,
    )
    reads, path = write_reads(folder / "reads.fa", number), folder / "empty.zarr"
    prepare(reads, path, settings, lambda _event: None, options.device)
    return path


@dataclass(frozen=True)
class Turn:
    """What one run took, over all of its time and from its first chunk's end to its last's.

    Attributes
    ----------
    sequences_per_s, tokens_per_s : float
        All of its time.
    steady : float
        Sequences/s once the first chunk was done.
    busy : float
        Share of the worker's time that was computing, by the run's own summary.
    device, power : float, optional
        By NVML, once the first chunk was done: share that was busy, watts.
    parts : dict of str to float
        Seconds of a chunk, by part.
    """

    sequences_per_s: float
    tokens_per_s: float
    steady: float
    busy: float
    device: float | None
    power: float | None
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seen: Timeline, device: DeviceWatch) -> Turn:
        """Of a run's events."""
        summary, steady, done = seen.summary(), seen.steady(), seen.computed()
        if steady is None or summary["missing"]:
            raise RuntimeError(f"a run with {len(done)} chunks done, {summary['missing']} missing")
        seconds = summary["seconds"]
        return cls(
            summary["computed_rows"] / seconds,
            tokens_of([event for _, event in done]) / seconds,
            steady.rows / steady.seconds,
            summary["busy"],
            device.busy(steady.since, steady.until),
            device.power(steady.since, steady.until),
            {part: value / len(done) for part, value in seen.took().items()},
        )


def _write(report: Report, found: dict[int, list[Turn]]) -> None:
    row = report.table(
        "chunks at once in one worker; medians of turns",
        "chunks",
        "turns",
        "sequences/s",
        "once the first is done",
        "tokens/s",
        "busy, of the summary",
        "busy, by NVML",
        "power",
    )
    parts = report.table("seconds of a chunk", "chunks", "read", "wait", "compute", "write")
    for chunks, turns in found.items():
        if not turns:
            continue
        devices = [turn.device for turn in turns if turn.device is not None]
        powers = [turn.power for turn in turns if turn.power is not None]
        rate = median(turn.sequences_per_s for turn in turns)
        steady = median(turn.steady for turn in turns)
        busy = median(turn.busy for turn in turns)
        device = median(devices) if devices else None
        row(
            chunks,
            len(turns),
            f"{rate:,.0f}",
            f"{steady:,.0f}",
            f"{median(turn.tokens_per_s for turn in turns):,.0f}",
            share(busy),
            share(device),
            watts(median(powers) if powers else None),
        )
        parts(chunks, *(f"{fmean(t.parts[part] for t in turns):.3f}" for part in turns[0].parts))
        report.figure(f"sequences_per_s_{chunks}", [turn.sequences_per_s for turn in turns])
        report.figure(f"steady_sequences_per_s_{chunks}", [turn.steady for turn in turns])
        report.figure(f"summary_busy_{chunks}", busy)
        report.figure(f"nvml_busy_{chunks}", device)


if __name__ == "__main__":
    run_section(main)
