"""The tests that need a GPU, each with its outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_sections.report import Options, Report, run_section

ROOT = Path(__file__).parents[2]
# Lines of a failure's message that are kept.
LINES = 12


def main(report: Report, options: Options) -> None:
    """Run them; raise if any failed, or if none could be run."""
    table = report.table("Tests that need a GPU", "test", "outcome", "seconds")
    files = gpu_test_files(ROOT / "tests")
    report.figure("files", [str(file.relative_to(ROOT)) for file in files])
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", *map(str, files), "-m", "gpu", "-v", "-ra"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        # Without --strict-config, which refuses the settings of plugins that are not there.
        command += ["-o", "addopts=", f"--junitxml={junit}", f"--basetemp={folder}/tests"]
        if find_spec("pytest_timeout"):
            # One that hangs must not cost those after it, nor what pytest writes at its end.
            command.append(f"--timeout={max(5.0, 0.8 * options.left()):.0f}")
        process = subprocess.Popen(command, cwd=ROOT, env=_environment())
        late = False
        try:
            code = process.wait(max(1.0, options.left() - 4))
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)  # upon which it writes what it has
            try:
                code = process.wait(4)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        results = read_junit(junit) if junit.exists() else []
    for result in results:
        table(result.test, result.outcome, result.seconds)
        if result.outcome in {"failed", "error"}:
            report.note(f"{result.test}: {result.message}")
    for reason in sorted({r.message for r in results if r.outcome == "skipped"}):
        count = sum(r.message == reason for r in results)
        report.note(f"{count} skipped: {reason}")
    for outcome in ("passed", "failed", "error", "skipped"):
        report.figure(outcome, sum(result.outcome == outcome for result in results))
    if late:
        raise TimeoutError("pytest was not done in time; the log says how far it was")
    if code != 0 or not results:
        raise AssertionError(f"pytest ended with {code}, {len(results)} tests")


@dataclass(frozen=True)
class Result:
    """A test's outcome: ``passed``, ``failed``, ``error`` or ``skipped``."""

    test: str
    outcome: str
    seconds: float
    message: str = ""


def gpu_test_files(folder: Path) -> list[Path]:
    """Modules that have such a test. Others may need packages that are not there.

    The tests of whole clusters take longest, and come last.
    """
    files = [file for file in folder.rglob("test_*.py") if "mark.gpu" in file.read_text()]
    return sorted(files, key=lambda file: (file.name == "test_cluster.py", file))


def read_junit(path: Path) -> list[Result]:
    """Read what pytest's ``--junitxml`` wrote."""
    results = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):  # noqa: S314  # our own file
        if not case.get("name"):  # the one that was interrupted
            continue
        outcome, message = "passed", ""
        for child in case:
            if child.tag in {"failure", "error", "skipped"}:
                outcome = "failed" if child.tag == "failure" else child.tag
                text = child.get("message", "") if outcome == "skipped" else (child.text or "")
                message = "\n".join(text.strip().splitlines()[-LINES:])
        name = ".".join(filter(None, [case.get("classname"), case.get("name")]))
        results.append(Result(name, outcome, float(case.get("time", 0)), message))
    return results


def _environment() -> dict[str, str]:
    # Tests start programs in other folders, which must find this package as it is here.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


if __name__ == "__main__":
    run_section(main)
