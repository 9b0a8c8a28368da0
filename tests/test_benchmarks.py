"""The benchmarks still run, on few rows: a figure can be measured again."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

WHAT = ("open", "by-read", "map", "map-peer", "cluster", "cluster-peer", "export", "predict")


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.slow
def test_analysis(what: str) -> None:
    shape = ("--rows", "20000", "--dimension", "16")
    command = [sys.executable, "-m", "benchmarks.analysis", what, *shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " s | " in done.stdout


@pytest.mark.slow
def test_nearest() -> None:
    shape = ("--rows", "20000", "--dimension", "16", "--repeats", "1")
    command = [sys.executable, "-m", "benchmarks.nearest", *shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("100.0000%") == 2


@pytest.mark.slow
def test_host() -> None:
    command = [sys.executable, "-m", "benchmarks.host", "--features", "64", "--turns", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 35 long, in windows |") == 4
