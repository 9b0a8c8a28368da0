"""`virnuc_dask run --cluster local-cuda` with 3B, end to end: how many frames of reads an hour.

As the first run of `cluster`, with a model that is five times as large.
"""

from __future__ import annotations

from benchmarks.gpu_sections.cluster import Facts, Setup, whole_run
from benchmarks.gpu_sections.report import Options, Report, run_section
from benchmarks.gpu_sections.runs import LARGE_SHAPE, workplace

# Computing: a share of the section's time, but not more than so many seconds.
_SHARE, _MOST_S = 0.3, 30.0
_TOKENS_PER_S = 110_000.0


def main(report: Report, options: Options) -> None:
    """Measure a run."""
    facts = Facts(report)
    with workplace(report, options, LARGE_SHAPE) as (folder, weights):
        try:
            setup = Setup(report, options, facts, folder, weights)
            whole_run(setup, min(_MOST_S, _SHARE * options.seconds), _TOKENS_PER_S)
        finally:
            if not options.dry_run:
                weights.unlink()  # 6 GB, which no other section wants
    if facts.broken:
        raise RuntimeError("did not hold: " + "; ".join(facts.broken))


if __name__ == "__main__":
    run_section(main)
