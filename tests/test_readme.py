"""Every command and every line of Python in the README and in docs/, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import faults
import pytest
from conftest import ROOT, VIRAL_PROTEINS, tree
from harness import assert_ledger
from models import random_network, save_network

import virnuc_dask
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.store.store import Store

pytestmark = pytest.mark.slow  # blocks need what earlier ones have made

# In the order in which the site has them: README first, whose stores the pages use.
NAV = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in NAV if name != "results.md")]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```(sh|python)\n(.*?)^```$", page.read_text(), re.M | re.DOTALL)
]
# These set up an environment and are what CI itself consists of (.ci/run).
BY_CI = {f"python3 start.py {task}\n" for task in ("demo", "test", "check")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory, with random weights of a small model where a download would be."""
    path = tmp_path_factory.mktemp("reader")
    (path / "examples").symlink_to(ROOT / "examples")
    cache = path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_network(random_network(2, 64, 4), cache / "esm2_t6_8M_UR50D.pt")
    return path


def test_every_page_is_in_the_order() -> None:
    pages = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert pages == set(NAV)


def test_ci_runs_what_is_not_run_here() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert {code for _, code in BLOCKS} >= BY_CI
    assert all(code.strip() in ci for code in BY_CI)


def check_attached(folder: Path) -> None:
    """The cluster is alive and empty, and the run has lost nothing with the worker that it lost."""
    with connect(str(folder / "scheduler.json")) as client:
        client.wait_for_workers(2, timeout=120)
        assert not any(client.processing().values())
        assert not client.run_on_scheduler(
            lambda dask_scheduler: [key for key in dask_scheduler.tasks if "embed" in str(key)]
        )
    telemetry = (folder / "attached.zarr.telemetry.jsonl").read_text().splitlines()
    seen = [json.loads(line) for line in telemetry]
    assert [event["event"] for event in seen].count("worker_lost") == 1
    done = [event["chunk"] for event in seen if event["event"] == "chunk_done"]
    assert sorted(done) == list(range(10))
    whole = folder / "whole.zarr"
    virnuc_dask.run(VIRAL_PROTEINS, whole, model="demo", rows_per_chunk=32)
    # What the killed was writing, if it was.
    virnuc_dask.verify(folder / "attached.zarr", repair=True)
    assert_ledger(Store(folder / "attached.zarr"), Store(whole))
    before = tree(folder / "attached.zarr")
    assert virnuc_dask.resume(folder / "attached.zarr").computed_chunks == 0
    assert tree(folder / "attached.zarr") == before


def await_lost_worker(folder: Path, process: subprocess.Popen[str]) -> None:
    telemetry = folder / "attached.zarr.telemetry.jsonl"
    while not (telemetry.exists() and "worker_lost" in telemetry.read_text()):
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("language", "code"), [block for block in BLOCKS if block[1] not in BY_CI])
def test_block_runs(
    language: str,
    code: str,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = request.getfixturevalue("s3").env if "s3://" in code else os.environ
    if language == "python":
        (folder / "script.py").write_text(code)
        command = [sys.executable, "script.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", code]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A run that loses a worker is not over before that.
    is_attached, table = "--cluster scheduler.json" in code, folder / "faults.json"
    held = faults.holding(monkeypatch, table, faults.motif_of(VIRAL_PROTEINS))
    with held if is_attached else nullcontext():
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "PATH": programs, "TORCH_HOME": str(folder / "torch")},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        if is_attached:
            await_lost_worker(folder, process)
            faults.release(table)
        assert process.wait(timeout=800) == 0
        if is_attached:
            check_attached(folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the scheduler and workers it left behind
    if language == "python":
        assert process.stdout is not None
        said = process.stdout.read()
        # The shape of two embeddings, or of their mean.
        if ".shape" in code:
            assert "(2, 64)" in said or "(64,)" in said
        assert said or "print(" not in code
