"""Workflow engines run the examples, are killed with all that they have started, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import numpy as np
import psutil
import pytest
from clusters import started_cluster
from conftest import EXAMPLES, Cli, Maker, tree
from engines import CWLTOOL, SNAKEMAKE, programs_of
from harness import (
    assert_ledger,
    await_end,
    clear_partial_files_of_the_killed,
    finished_chunks,
)
from nursery import wait_for

from virnuc_dask.store.store import Store

pytestmark = pytest.mark.slow


def snakemake(programs: Path, proteins: Path) -> list[str]:
    snakefile = ["--snakefile", str(EXAMPLES / "Snakefile"), "--cores", "2"]
    config = [f"proteins={proteins}", "model=demo", "options=--rows-per-chunk 10 --grace 5"]
    return [f"{programs}/snakemake", *snakefile, "--config", *config]


def cwltool(programs: Path, proteins: Path) -> list[str]:
    # For the faults, which are injected by variables.
    tool = ["--preserve-entire-environment", str(EXAMPLES / "embed.cwl")]
    inputs = ["--proteins", str(proteins), "--folder", ".", "--model", "demo"]
    inputs += ["--rows_per_chunk", "10", "--workers", "1"]
    return [f"{programs}/cwltool", *tool, *inputs]


@dataclass
class Workflow:
    """An engine's command, and the folder in which it runs and makes the store."""

    command: list[str]
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / "embeddings.zarr"

    def start(self, *more: str) -> subprocess.Popen[str]:
        self.started.append(start([*self.command, *more], self.folder))
        return self.started[-1]

    @property
    def is_cwl(self) -> bool:
        return self.command[0].endswith("/cwltool")

    def unlock(self) -> None:
        """Remove the lock that an engine leaves if it is killed."""
        if not self.is_cwl:
            self.run("--unlock")

    def end(self) -> None:
        """Leave nothing running, however a test ended."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, *more: str) -> str:
        process = self.start(*more)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
        return said

    def starts(self) -> list[dict[str, Any]]:
        """What each run of the store said when it began."""
        lines = Path(f"{self.path}.telemetry.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "run_started"]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    # `virnuc-dask` is found as after `. .venv/bin/activate`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


Engine = Callable[[Path], Workflow]


ENGINES = {"snakemake": (SNAKEMAKE, snakemake), "cwltool": (CWLTOOL, cwltool)}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    package, command = request.param
    programs = programs_of(package, request.config.cache)
    (folder := tmp_path / "workflow").mkdir()

    def make(proteins: Path) -> Workflow:
        workflow = Workflow(command(programs, proteins), folder)
        request.addfinalizer(workflow.end)
        return workflow

    return make


@pytest.mark.parametrize(
    ("number", "engine"),
    [(signal.SIGKILL, ENGINES["snakemake"]), (signal.SIGTERM, ENGINES["cwltool"])],
    indirect=["engine"],
    ids=["snakemake, SIGKILL", "cwltool, SIGTERM"],
)
def test_a_workflow_that_was_killed_with_its_job_goes_on(
    number: signal.Signals,
    engine: Engine,
    some_proteins: Path,
    make_store: Maker,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow = engine(some_proteins)
    process = start_without_end(workflow, some_proteins, tmp_path, monkeypatch)
    store = Store(workflow.path)
    wait_for(lambda: store.present().any())
    started = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    os.killpg(process.pid, number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0, said
    await_end(started, seconds=60)
    present = np.flatnonzero(store.present())
    assert 0 < len(present) < store.chunk_count
    before = finished_chunks(store)

    if number == signal.SIGKILL:
        workflow.unlock()
    workflow.run()
    assert [event["present_chunks"] for event in workflow.starts()] == [0, len(present)]
    assert before.items() <= tree(store.path).items()
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, make_store(some_proteins, rows_per_chunk=10, repr_layer=None))
    assert cli("verify", store.path).returncode == 0

    whole = tree(store.path)
    said = workflow.run()
    assert workflow.is_cwl or "Nothing to be done" in said
    assert tree(store.path) == whole


def test_a_workflow_goes_on_beside_the_job_of_one_that_was_killed(
    engine: Engine,
    some_proteins: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow = engine(some_proteins)
    process = start_without_end(workflow, some_proteins, tmp_path, monkeypatch)
    store = Store(workflow.path)
    # The other thread of the worker that hangs may have a chunk, which waits.
    wait_for(lambda: store.present().sum() >= store.chunk_count - 2)
    (job,) = psutil.Process(process.pid).children()
    before, present = finished_chunks(store), int(store.present().sum())
    process.kill()
    process.wait()

    workflow.unlock()
    workflow.run()
    assert job.is_running()
    assert workflow.starts()[-1]["present_chunks"] >= present
    assert before.items() <= tree(store.path).items()
    assert cli("verify", store.path).returncode == 0


def start_without_end(
    workflow: Workflow, proteins: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[str]:
    """Start a workflow whose last chunk hangs, so that the run cannot be over before a kill."""
    motif, table = faults.motif_of(proteins), folder / "faults.json"
    table.write_text(json.dumps({motif: "hang"}))
    with monkeypatch.context() as patch:
        faults.arm(patch, table)
        process = workflow.start()
    faults.await_met(table, motif)
    return process


def test_a_workflow_is_complete_with_quarantined_rows_and_fails_if_its_input_is_another(
    engine: Engine, awkward: Path, cli: Cli
) -> None:
    workflow = engine(awkward)
    workflow.run()
    assert cli("status", workflow.path, "--rows").returncode == 3
    whole = tree(workflow.path)
    awkward.write_text(">another\nMKTAYIAKQR\n")
    assert workflow.start().wait(timeout=120) != 0
    assert tree(workflow.path) == whole


@pytest.mark.parametrize("engine", [ENGINES["snakemake"]], indirect=True, ids=["snakemake"])
def test_a_workflow_of_reads_on_a_running_scheduler(engine: Engine, tmp_path: Path) -> None:
    workflow = engine(reads := tmp_path / "reads.fa")
    reads.write_text("".join(f">{number}\n{'ATGGCC' * 10}\n" for number in range(8)))
    with started_cluster(tmp_path) as file:
        workflow.run(f"cluster={file}", "options=--translate six-frame")
    store = Store(workflow.path)
    assert store.present().all()
    assert str(store.identity.translation).startswith("six-frame")


@pytest.mark.parametrize("engine", [ENGINES["cwltool"]], indirect=True, ids=["cwltool"])
def test_a_tool_of_reads(engine: Engine, tmp_path: Path) -> None:
    workflow = engine(reads := tmp_path / "reads.fa")
    reads.write_text("".join(f">{number}\n{'ATGGCC' * 10}\n" for number in range(8)))
    workflow.run("--cluster", "local", "--translate", "six-frame")
    assert str(Store(workflow.path).identity.translation).startswith("six-frame")


def nextflow_commands(**values: object) -> list[list[str]]:
    """What Nextflow would run, process by process."""
    text = (EXAMPLES / "main.nf").read_text()
    options = "--cluster 'local' --workers 1 "
    for name, value in (values | {"options": options, "model": "demo"}).items():
        text = text.replace(f"${{{name}}}", str(value))
    scripts = re.findall(r'"""\n(.*?)"""', text, re.DOTALL)
    return [
        ["bash", "-ue", "-c", script.replace("\\\\", "\\").replace("\\$", "$")]
        for script in scripts
    ]


@pytest.mark.parametrize(("code", "end"), [(0, 0), (2, 2), (3, 0), (4, 4), (143, 143)])
def test_nextflow_sees_how_a_run_ended(code: int, end: int, tmp_path: Path) -> None:
    """It tries again what can go on. A stand-in takes the place of the program."""
    program = tmp_path / "virnuc-dask"
    program.write_text(f"#!/bin/sh\n[ $1 = status ] || exit {code}\n")
    program.chmod(0o755)
    command, _ = nextflow_commands(proteins="a.faa", store="a.zarr")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, check=False)
    assert done.returncode == end


def test_the_commands_of_the_nextflow_processes(awkward: Path, tmp_path: Path, cli: Cli) -> None:
    for attempt in ("first", "second"):  # each in an empty folder
        (folder := tmp_path / attempt).mkdir()
        for command in nextflow_commands(proteins=awkward, store=tmp_path / "a.zarr"):
            process = start(command, folder)
            assert process.wait(timeout=120) == 0, process.communicate()
        summary = json.loads((folder / "embeddings.json").read_text())
        assert summary["missing"] == []
        assert (folder / "embeddings.parquet").is_file()
