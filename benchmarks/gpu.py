"""All that only a GPU can show, in the minutes for which one can be had.

    python -m benchmarks.gpu --out results                        # 12 minutes, all sections
    python -m benchmarks.gpu --out results --only equal,memory --minutes 2
    python -m benchmarks.gpu --out results --dry-run              # on a CPU, with tiny models

Each section is a process of its own with a limit of its own. One that fails or hangs costs only
itself. After each section these files are complete in the output folder: `NAME.json` for each
section so far, `summary.md` to paste into RESULTS.md, and `log` with what the sections printed.
Exit code: 0 if all sections are complete, 1 if not, 2 if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

ROOT = Path(__file__).parents[1]
# A section that is late gets this much longer before it is killed.
GRACE_S = 10.0
# A section's part of the log is cut down to this, so that all of it can be copied.
LOG_BYTES = 2 * 2**20
# Each process of a section has this in its environment, whatever its session or parent.
MARK = "VIRNUC_GPU_SECTION"
_KILL_S = 2.0
_PROBE_S = 90.0


@dataclass(frozen=True)
class Section:
    """What is started, and its share of the time.

    Attributes
    ----------
    command : sequence of str
        Gets ``--seconds S --report FILE --began T`` and, in a dry run, ``--dry-run``.
    weight : float
    """

    command: Sequence[str]
    weight: float


@dataclass(frozen=True)
class Outcome:
    """What became of a section.

    Attributes
    ----------
    name : str
    complete : bool
    status : str
        In words.
    report : dict, optional
        What the section wrote, also if it was cut off; None if there is nothing readable.
    """

    name: str
    complete: bool
    status: str
    report: dict[str, Any] | None = None


def _module(name: str, weight: float) -> Section:
    return Section([sys.executable, "-m", f"benchmarks.gpu_sections.{name}"], weight)


# The most important first: what is late is cut off. The weights are about the seconds that each
# takes on an H200 (benchmarks/RESULTS.md).
SECTIONS = {
    "equal": _module("equal", 30),
    "kernels": _module("kernels", 30),
    "speed": _module("speed", 130),
    "cluster": _module("cluster", 190),
    "large": _module("large", 80),
    "memory": _module("memory", 20),
    "host": _module("host", 20),
    "tests": _module("tests", 160),
    "threads": _module("threads", 45),
}


def main() -> int:
    """Run the sections that the command line names."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="of all together (12; a dry run: 4.5)")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    if not arguments.dry_run and (problem := _device_problem()):
        print(f"{problem}. --dry-run tries the sections on a CPU.", file=sys.stderr)
        return 2
    minutes = arguments.minutes or (4.5 if arguments.dry_run else 12)
    return run_all(
        {name: section for name, section in SECTIONS.items() if name in chosen},
        minutes - (time.monotonic() - began) / 60,
        arguments.out,
        arguments.dry_run,
    )


def run_all(
    sections: Mapping[str, Section],
    minutes: float,
    out: Path,
    dry_run: bool,
    *,
    grace_s: float = GRACE_S,
) -> int:
    """Run sections one after another; what one leaves of its time goes to those after it.

    Parameters
    ----------
    sections : mapping of str to Section
        In order.
    minutes : float
        All of it ends by then.
    out : Path
        Folder for the results; made if it is not there.
    dry_run : bool
    grace_s : float
        How long a section may outlast its limit, if the minutes allow it.

    Returns
    -------
    int
        0 if all sections are complete, else 1.
    """
    end = time.monotonic() + 60 * minutes - _KILL_S
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log").write_bytes(b"")
    for name in sections:
        (out / f"{name}.json").unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    weight = sum(section.weight for section in sections.values())
    with (
        tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder,
        _signals() as received,
    ):
        _replace(out / "summary.md", summary([], list(sections)))
        for name, section in sections.items():
            seconds = (end - grace_s - time.monotonic()) * section.weight / weight
            weight -= section.weight
            if received or seconds <= 0:
                why = f"stopped by {received[0].name}" if received else "no time was left"
                outcome = Outcome(name, False, f"not run: {why}")
            else:
                running = _Running(name, section, out, dry_run, seconds, folder)
                outcome = running.finish(min(running.began + seconds + grace_s, end), received)
            outcomes.append(outcome)
            waiting = list(sections)[len(outcomes) :]
            _replace(out / "summary.md", summary(outcomes, waiting))
            print(_as_markdown(outcome), flush=True)
    return 0 if all(outcome.complete for outcome in outcomes) else 1


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """SIGTERM and SIGINT are noted in the list instead of ending this process."""
    received: list[signal.Signals] = []

    def note(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Running:
    """A section's processes, from the start to the last one's end."""

    def __init__(
        self, name: str, section: Section, out: Path, dry_run: bool, seconds: float, folder: str
    ) -> None:
        self._name, self._path, self._log = name, out / f"{name}.json", out / "log"
        self.began, self._mark = time.monotonic(), uuid4().hex
        with self._log.open("a") as log:
            log.write(f"\n===== {name}, {seconds:.0f} s =====\n")
        self._log_start = self._log.stat().st_size
        command = [*section.command, "--seconds", f"{seconds:.1f}", "--report", str(self._path)]
        command += ["--began", str(self.began), *(["--dry-run"] if dry_run else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        changed = {MARK: self._mark, "TMPDIR": folder, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | changed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, limit: float, received: Sequence[signal.Signals]) -> Outcome:
        """Wait until it ends, is due to end or a signal is received; leave no process behind."""
        late = False
        while not (late or received or self._ended()):
            late = time.monotonic() > limit
        seconds = time.monotonic() - self.began
        code = self._process.poll()
        self._kill()
        report, problem = read_report(self._path)
        self._path.with_suffix(".partial").unlink(missing_ok=True)
        last_line = self._trim_log()
        complete = code == 0 and report is not None and bool(report["complete"])
        if complete:
            status = f"complete, {seconds:.0f} s"
        elif code is not None:
            how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
            last = f": {last_line}" if code and last_line else ""
            status = f"failed after {seconds:.0f} s with {how}{last}"
            if not code and not problem:
                status = f"failed: ended after {seconds:.0f} s without a complete report"
        else:
            by = f" by {received[0].name}" if received else ""
            status = f"cut off{by} after {seconds:.0f} s"
        return Outcome(self._name, complete, f"{status}; {problem}" if problem else status, report)

    def _ended(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        return self._process.returncode is not None

    def _kill(self) -> None:
        """End the section and all that it started, in whichever session and with any parent."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGSTOP)  # so that nothing more is started
        until = time.monotonic() + _KILL_S
        while left := self._processes():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=0.2)
            if time.monotonic() > until:
                break
        with suppress(subprocess.TimeoutExpired):  # one may hang in a driver's call
            self._process.wait(0.5)

    def _processes(self) -> list[psutil.Process]:
        found: set[psutil.Process] = set()
        with suppress(psutil.Error):
            if self._process.poll() is None:
                mine = psutil.Process(self._process.pid)
                found |= {mine, *mine.children(recursive=True)}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark:
                    found.add(process)
        return [p for p in found if _lives(p)]

    def _trim_log(self) -> str:
        """Leave the beginning and the end of a long log; give its last line."""
        with self._log.open("r+b") as log:
            size = log.seek(0, os.SEEK_END) - self._log_start
            if size > LOG_BYTES:
                log.seek(-LOG_BYTES // 2, os.SEEK_END)
                tail = log.read()
                log.seek(self._log_start + LOG_BYTES // 2)
                log.write(b"\n[...]\n" + tail)
                log.truncate()
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- what the sections wrote ---


def read_report(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Read a section's file.

    Returns
    -------
    report : dict or None
    problem : str
        Why there is none; else empty.
    """
    try:
        report = json.loads(path.read_bytes())
        fits = (
            isinstance(report["complete"], bool)
            and isinstance(report["figures"], dict)
            and isinstance(report["versions"], dict)
            and all(isinstance(note, str) for note in report["notes"])
            and all(
                isinstance(table["title"], str)
                and all(len(row) == len(table["columns"]) for row in table["rows"])
                for table in report["tables"]
            )
        )
    except FileNotFoundError:
        return None, "it wrote no report"
    except (OSError, ValueError) as error:
        return None, f"its report cannot be read: {error}"
    except (LookupError, TypeError):
        fits = False
    return (report, "") if fits else (None, "its report is not in a report's form")


def summary(outcomes: Sequence[Outcome], waiting: Sequence[str] = ()) -> str:
    """Everything so far as Markdown, with a heading of RESULTS.md's kind."""
    reports = [outcome.report for outcome in outcomes if outcome.report]
    device = next((str(report["device"]) for report in reports if report.get("device")), "unknown")
    versions: dict[str, Any] = {}
    for report in reports:
        versions |= report["versions"]
    lines = [
        f"## {date.today().isoformat()}: {device}",
        "",
        f"`{shlex.join(_command())}`. "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        "| section | outcome |",
        "|---|---|",
        *(f"| {outcome.name} | {_cell(outcome.status)} |" for outcome in outcomes),
        *(f"| {name} | waiting |" for name in waiting),
        "",
    ]
    return "\n".join([*lines, *map(_as_markdown, outcomes)])


def _command() -> list[str]:
    return ["python", "-m", "benchmarks.gpu", *sys.argv[1:]]


def _as_markdown(outcome: Outcome) -> str:
    lines = [f"### {outcome.name}: {_cell(outcome.status)}", ""]
    report = outcome.report or {"figures": {}, "tables": [], "notes": []}
    for table in report["tables"]:
        lines += _table(f"{table['title']}:", table["columns"], table["rows"])
    if report["notes"]:
        lines += [*(f"- {' '.join(note.split())}" for note in report["notes"]), ""]
    if report["figures"]:
        lines += _table("Figures:", ["figure", "value"], list(report["figures"].items()))
    return "\n".join(lines)


def _table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        title,
        "",
        f"| {' | '.join(map(_cell, columns))} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        "",
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return (text if len(text) <= 300 else f"{text[:300]} ...").replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _device_problem() -> str | None:
    """Why there is nothing to measure; asked in another process, as this one is without torch."""
    code = "import torch; print(torch.cuda.is_available(), torch.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"torch does not say within {_PROBE_S:.0f} s whether there is a CUDA device"
    answer = done.stdout.split()
    if done.returncode or not answer:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"torch cannot be asked for a CUDA device: {last}"
    return None if answer[0] == "True" else f"torch {answer[1]} finds no CUDA device"


if __name__ == "__main__":
    sys.exit(main())
