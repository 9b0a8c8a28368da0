"""What a section writes down, and how it is started."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """What a section is told.

    Attributes
    ----------
    seconds : float
        Time that the section may take; the program ends it soon after.
    dry_run : bool
        Everything on a CPU, with tiny models: only to see that it runs.
    began : float
        When its process was started, by `time.monotonic`: imports count too.
    """

    seconds: float
    dry_run: bool
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """The torch device that is measured."""
        return "cpu" if self.dry_run else "cuda"

    def left(self) -> float:
        """Seconds that are left to the section."""
        return self.seconds - (time.monotonic() - self.began)


class Report:
    """A section's results. Its file is complete after each call, whatever happens next.

    Parameters
    ----------
    path : Path
        JSON file: ``section``, ``device``, ``versions``, ``complete``, ``seconds``, ``figures``,
        ``tables``, ``notes``.
    section, device : str
    """

    def __init__(self, path: Path, section: str, device: str) -> None:
        self._path, self._began = path, time.monotonic()
        self._data: dict[str, Any] = {
            "section": section,
            "device": device,
            "versions": _versions(),
            "complete": False,
            "seconds": 0.0,
            "figures": {},
            "tables": [],
            "notes": [],
        }
        self._save()

    def figure(self, name: str, value: Any) -> None:
        """Record one named value, for whoever reads the JSON and for the summary."""
        self._data["figures"][name] = value
        self._save()

    def table(self, title: str, *columns: str) -> Callable[..., None]:
        """Begin a table; call the result with the cells of each row."""
        rows: list[list[Any]] = []
        self._data["tables"].append({"title": title, "columns": list(columns), "rows": rows})

        def add(*cells: Any) -> None:
            if len(cells) != len(columns):
                raise ValueError(f"{title}: {len(cells)} cells for {len(columns)} columns")
            rows.append(list(cells))
            print(f"{title}: {' | '.join(map(str, cells))}", flush=True)
            self._save()

        return add

    def note(self, text: str) -> None:
        """Record a remark."""
        self._data["notes"].append(text)
        print(text, flush=True)
        self._save()

    def finish(self) -> None:
        """Mark the section as complete."""
        self._data["complete"] = True
        self._save()

    def _save(self) -> None:
        self._data["seconds"] = round(time.monotonic() - self._began, 1)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._data, indent=1, default=_plain))
        os.replace(partial, self._path)


def run_section(section: Callable[[Report, Options], None]) -> None:
    """Run a section with the command line that `benchmarks.gpu` gives it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--began", type=float, default=time.monotonic())
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    report = Report(arguments.report, arguments.report.stem, _device_name(arguments.dry_run))
    section(report, Options(arguments.seconds, arguments.dry_run, arguments.began))
    report.finish()


def _plain(value: Any) -> Any:
    """A value of NumPy's or torch's as a number; anything else as text."""
    return value.item() if getattr(value, "size", None) == 1 else str(value)


def _device_name(dry_run: bool) -> str:
    import torch

    return "CPU (dry run)" if dry_run else torch.cuda.get_device_name()


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "dask", "distributed", "dask-cuda", "zarr", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
