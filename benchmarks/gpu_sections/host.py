"""What the host does for one chunk whose layers return at once, with real launches and copies."""

from __future__ import annotations

from benchmarks.gpu_sections.report import Options, Report, run_section
from benchmarks.host import COLUMNS, measured


def main(report: Report, options: Options) -> None:
    """Measure chunks of 139,000 residues for 650M."""
    add = report.table("A chunk of 139,000 residues, D = 1,280", *COLUMNS)
    for row in measured(options.device, 1280, 5 if options.dry_run else 20):
        add(*row)


if __name__ == "__main__":
    run_section(main)
