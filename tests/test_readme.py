"""Every command and every line of Python in the README, as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from models import random_network, save_network

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# These set up an environment and are what CI itself consists of (.ci/run).
BY_CI = {f"python3 start.py {task}\n" for task in ("demo", "test", "check")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory, with random weights where a download would put them."""
    path = tmp_path_factory.mktemp("reader")
    (path / "examples").symlink_to(ROOT / "examples")
    cache = path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_network(random_network(6, 320, 20), cache / "esm2_t6_8M_UR50D.pt")
    return path


def test_ci_runs_what_is_not_run_here() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert {code for _, code in BLOCKS} >= BY_CI
    assert all(code in ci for code in BY_CI)


@pytest.mark.parametrize(("language", "code"), [block for block in BLOCKS if block[1] not in BY_CI])
def test_block_runs(language: str, code: str, folder: Path) -> None:
    if language == "python":
        (folder / "script.py").write_text(code)
        command = [sys.executable, "script.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", code]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": programs, "TORCH_HOME": str(folder / "torch")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=200) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the scheduler and workers it left behind
    if language == "python":
        assert process.stdout is not None
        assert "(2, 64)" in process.stdout.read()
