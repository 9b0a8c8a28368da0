"""Programs whose packages do not fit into the project's own environment.

Each gets an environment of its own under pytest's cache, which is made once and kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

SNAKEMAKE = "snakemake==9.27.1"
CWLTOOL = "cwltool==3.3.20260925135507"
SPYTHON = "spython==0.3.14"
RATTLER_BUILD = "py-rattler-build==0.73.0"


def programs_of(package: str, cache: pytest.Cache) -> Path:
    """The folder of an environment's programs, or a skip where pip's index cannot be reached."""
    home = cache.mkdir("engines") / package
    with FileLock(f"{home}.lock"):
        if not (home / "installed").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
            pip = [sys.executable, "-m", "pip", "--python", home, "install", "--quiet"]
            pip += ["--retries", "1", "--no-compile"]  # of thousands of modules few are used
            done = subprocess.run([*pip, package], stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode and "connection" in done.stderr:
                pytest.skip(f"{package} cannot be installed: {done.stderr.splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
            (home / "installed").touch()
    return home / "bin"
