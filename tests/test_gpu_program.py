"""The program for GPUs: sections that break, and what the others leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # `benchmarks` is a folder of the repository and not installed

from benchmarks.gpu import LOG_BYTES, Outcome, Section, run_all, summary
from benchmarks.gpu_sections import tests
from benchmarks.gpu_sections.report import Options, Report

# As run_section does, without torch: `report` is ready, and so are the arguments.
BEGINNING = """
import argparse, os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu_sections.report import Report
parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, required=True)
parser.add_argument("--report", type=Path, required=True)
parser.add_argument("--began", type=float, required=True)
parser.add_argument("--dry-run", action="store_true")
arguments = parser.parse_args()

def begin():
    return Report(arguments.report, arguments.report.stem, "a device | of tests")

"""

GOOD = """
report = begin()
report.table("Squares", "n", "n squared")(3, 9.0)
report.figure("seconds", arguments.seconds)
report.note("all is well")
report.finish()
"""
RAISES = """
report = begin()
row = report.table("Halves", "n")
row("first half")
raise ValueError("after half of its rows")
"""
# It and its child, in a session of its own and with another parent, hang.
HANGS = """
report = begin()
report.table("Halves", "n")("before it hung")
child = [sys.executable, "-c", "import time; print('child hangs', flush=True); time.sleep(999)"]
middle = f"import subprocess; subprocess.Popen({child!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", middle])
subprocess.Popen(child, start_new_session=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hangs", flush=True)
time.sleep(999)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
BROKEN_JSON = """
begin().finish()
arguments.report.write_text('{"section": "broken", "tab')
"""
NO_REPORT = """
arguments.report.write_text('[1, {"tables": 3}]')
"""
ORPHAN = """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"], start_new_session=True)
report = begin()
report.finish()
"""


def section(code: str, weight: float = 1) -> Section:
    return Section([sys.executable, "-c", BEGINNING + textwrap.dedent(code)], weight)


def started_with(mark: str) -> list[int]:
    """Processes that have it in their environment and still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mark = f"GPU_PROGRAM_TEST_{uuid4().hex}"
    monkeypatch.setenv(mark, "1")
    yield
    assert started_with(mark) == []


def load(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.slow
def test_broken_sections_cost_only_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "raises": section(RAISES, 10),
        "one": section(GOOD, 10),
        "hangs": section(HANGS, 8),
        "two": section(GOOD, 10),
        "killed": section(KILLED, 10),
        "broken": section(BROKEN_JSON, 10),
        "odd": section(NO_REPORT, 10),
        "three": section(GOOD, 10),
    }
    began = time.monotonic()
    assert run_all(sections, 2, tmp_path, True, grace_s=1) == 1
    assert time.monotonic() - began < 2 * 60
    for name in ("one", "two", "three"):
        assert load(tmp_path, name)["complete"]
    for name in ("raises", "hangs"):
        report = load(tmp_path, name)
        assert (report["complete"], len(report["tables"][0]["rows"])) == (False, 1)
    text = (tmp_path / "summary.md").read_text()
    status = dict(line[4:].split(": ", 1) for line in text.splitlines() if line.startswith("### "))
    assert list(status) == list(sections)
    for name in ("one", "two", "three"):
        assert status[name].startswith("complete")
    assert "exit code 1: ValueError: after half of its rows" in status["raises"]
    assert status["hangs"].startswith("cut off after")
    assert "killed by SIGKILL" in status["killed"]
    assert "it wrote no report" in status["killed"]
    assert "its report cannot be read" in status["broken"]
    assert "not in a report's form" in status["odd"]
    assert text.count("| 3 | 9 |") == 3
    assert text.count("- all is well") == 3
    assert "| first half |" in text
    assert "| before it hung |" in text
    assert text.startswith("## ")
    assert "a device | of tests" in text.splitlines()[0]
    assert "| 3 | 9 |" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{n}.json" for n in sections if n != "killed"} | {"summary.md", "log"}
    assert "child hangs" in (tmp_path / "log").read_text()


def test_what_a_section_leaves_of_its_time_goes_to_the_others(tmp_path: Path) -> None:
    sections = {"short": section(GOOD), "long": section(GOOD, 3)}
    assert run_all(sections, 2, tmp_path, True, grace_s=10) == 0
    short, long = (load(tmp_path, name)["figures"]["seconds"] for name in sections)
    # Of 120 s less the grace and what an end takes, 108, a quarter and then all that is left.
    assert 20 < short <= 27
    assert long > 81


def test_orphans_of_a_complete_section_are_ended(tmp_path: Path) -> None:
    assert run_all({"orphan": section(ORPHAN)}, 1, tmp_path, True) == 0  # and the fixture's check


def test_no_time_is_left(tmp_path: Path) -> None:
    assert run_all({"one": section(GOOD)}, 0.01, tmp_path, True) == 1
    assert "not run: no time was left" in (tmp_path / "summary.md").read_text()


def test_a_report_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert run_all({"one": section(GOOD)}, 1, tmp_path, True) == 0
    assert run_all({"one": section(KILLED)}, 1, tmp_path, True) == 1
    assert "it wrote no report" in (tmp_path / "summary.md").read_text()


def test_a_long_log_keeps_both_ends(tmp_path: Path) -> None:
    code = f"print('the first'); print('x' * {2 * LOG_BYTES}); print('the last'); sys.exit(3)"
    assert run_all({"one": section(code)}, 1, tmp_path, True) == 1
    log = (tmp_path / "log").read_text()
    assert len(log) < 1.1 * LOG_BYTES
    assert "the first\n" in log
    assert log.endswith("the last\n")
    assert "exit code 3: the last" in (tmp_path / "summary.md").read_text()


RUNNER = """
import sys
from pathlib import Path
from benchmarks.gpu import Section, run_all
good, hangs = (Section([sys.executable, "-c", code], 1) for code in sys.argv[2:])
sys.exit(run_all({"one": good, "hangs": hangs, "last": good}, 5, Path(sys.argv[1]), True))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_summary(number: signal.Signals, tmp_path: Path) -> None:
    codes = [BEGINNING + textwrap.dedent(code) for code in (GOOD, HANGS)]
    command = [sys.executable, "-c", RUNNER, str(tmp_path), *codes]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        log = tmp_path / "log"
        while process.poll() is None and not (log.exists() and "\nhangs" in log.read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate()
    assert process.returncode == 1
    text = (tmp_path / "summary.md").read_text()
    assert "### one: complete" in text
    assert f"### hangs: cut off by {number.name} after" in text
    assert "| before it hung |" in text
    assert f"### last: not run: stopped by {number.name}" in text
    assert "### one: complete" in out


def test_odd_values_become_cells() -> None:
    report = {
        "device": "D",
        "versions": {"torch": "2"},
        "figures": {"list": [1, 2], "large": 123456.7, "none": None, "is": True},
        "tables": [{"title": "T", "columns": ["a|b"], "rows": [["one\ntwo"], [float("nan")]]}],
        "notes": ["of\ntwo lines"],
    }
    text = summary([Outcome("one", True, "complete", report)], ["two"])
    for line in (
        "| two | waiting |",
        "| list | [1, 2] |",
        "| large | 123,457 |",
        "| none |  |",
        "| is | yes |",
        "| a\\|b |",
        "| one two |",
        "| nan |",
        "- of two lines",
    ):
        assert line in text.splitlines()


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "finds no CUDA device. --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


MIXED = """
import pytest
@GPU
def test_good(): pass
@GPU
def test_bad(): assert 1 == 2, "one is not two"
@GPU
def test_left_out(): pytest.skip("no such device")
def test_of_something_else(): raise ValueError
""".replace("@GPU", "@pytest.mark." + "gpu")  # none of these is a test of this module


@pytest.mark.slow
def test_each_test_has_its_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_mixed.py").write_text(MIXED)
    (tmp_path / "tests" / "test_other.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(tests, "ROOT", tmp_path)
    report = Report(tmp_path / "tests.json", "tests", "a device")
    with pytest.raises(AssertionError, match="pytest ended with 1, 3 tests"):
        tests.main(report, Options(120, dry_run=True))
    found = load(tmp_path, "tests")
    outcomes = [row[:2] for row in found["tables"][0]["rows"]]
    assert outcomes == [
        ["tests.test_mixed.test_good", "passed"],
        ["tests.test_mixed.test_bad", "failed"],
        ["tests.test_mixed.test_left_out", "skipped"],
    ]
    assert "AssertionError: one is not two" in found["notes"][0]
    assert found["notes"][1] == "1 skipped: no such device"


@pytest.mark.slow
def test_a_dry_run_of_two_sections(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "equal,memory"]
    done = subprocess.run(
        [*command, "--minutes", "4", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "summary.md").read_text()
    assert "CPU (dry run)" in text.splitlines()[0]
    assert "### equal: complete" in text
    assert "### memory: complete" in text
    assert "| 2, 64, 4 | float32 | max |" in text
    assert "(the errors are injected)" in text
