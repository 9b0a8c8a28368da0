"""The examples for clusters that are not here: what can be known of them without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLES

from virnuc_dask.cli import main


def test_kubernetes_runs_commands_that_exist() -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == [
        "Service",
        "Deployment",
        "Deployment",
        "Job",
    ]
    pods = [document["spec"]["template"]["spec"] for document in documents[1:]]
    commands = [pod["containers"][0]["command"] for pod in pods]
    for _, kind, *arguments in commands[:2]:
        help_text = subprocess.check_output(
            [sys.executable, "-m", "dask", kind, "--help"], text=True
        )
        assert all(a in help_text for a in arguments if a.startswith("--"))
    program, command, *arguments = commands[2]
    assert program == "virnuc-dask"
    context = main.commands[command].make_context(command, [*arguments])
    assert context.params["cluster"] == arguments[-3].removeprefix("--cluster=")
    assert context.params["inputs"] == ("/data/reads.faa",)


def test_the_slurm_array_gives_each_task_its_shard(tmp_path: Path) -> None:
    """With a stand-in for the program that says how it was called: SLURM cannot be had here."""
    stand_in = tmp_path / "virnuc-dask"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    said = subprocess.check_output(
        ["bash", str(EXAMPLES / "slurm_array.sh"), "in put.faa", "out.zarr"],
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        text=True,
    )
    program, *arguments = said.split()
    assert program == "run"
    context = main.commands["run"].make_context("run", ["a.faa", *arguments[2:]])
    assert (context.params["cluster"], context.params["shard"]) == ("local-cuda", "slurm")


def test_dask_jobqueue_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import slurm_dask

    with slurm_dask.make_cluster() as cluster:
        script = cluster.job_script()
    assert "#SBATCH --gres=gpu:1" in script
    assert "tls://" in script
    assert "--nthreads 3" in script
    assert "MALLOC_TRIM_THRESHOLD_" in script
