"""The examples for clusters that are not here: what can be known of them without one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLES, ROOT
from engines import SPYTHON, programs_of
from nursery import wait_for

from virnuc_dask.cli.main import main


@pytest.mark.slow
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
    words = shlex.split(commands[2][2].replace("\\\n", " "))
    context = main.commands["run"].make_context("run", words[2 : words.index("&")])
    assert context.params["cluster"] == "tcp://virnuc-scheduler:8786"
    assert context.params["inputs"] == ("/data/reads.faa",)


# What a Dockerfile should do otherwise, and a definition cannot.
LAX = ("DL3008", "DL3020", "DL3025")


@pytest.mark.slow
def test_the_apptainer_definition_is_read_and_its_shell_is_sound(
    pytestconfig: pytest.Config,
) -> None:
    """It cannot be built here: a Dockerfile is made of it, which hadolint checks."""
    definition = EXAMPLES / "apptainer.def"
    spython = programs_of(SPYTHON, pytestconfig.cache) / "spython"
    convert = ("recipe", "--parser", "singularity", "--writer", "docker", definition)
    dockerfile = subprocess.check_output([spython, *map(str, convert)], text=True)
    assert "FROM python:3.12-slim-bookworm" in dockerfile
    copied = re.findall(r"^ADD (\S+) (\S+)$", dockerfile, re.MULTILINE)
    assert len(copied) == 5
    assert all((ROOT / source).exists() for source, _ in copied)
    hadolint = Path(sys.executable).with_name("hadolint")
    lax = [option for rule in LAX for option in ("--ignore", rule)]
    command = [hadolint, "--failure-threshold", "warning", *lax, "-"]
    subprocess.run(command, input=dockerfile, text=True, check=True)


# After the trap there is no `$(...)`: bash 5.2 loses a signal that comes while it reads one.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $@" >> "$CALLS"
[ "$(basename "$0")" = virnuc-dask ] || exit 0
trap 'sleep 0.5; exit 143' TERM
touch "$CALLS.begun"
for ((i = ${SECONDS_TO_RUN:-0}; i > 0; i--)); do sleep 1 & wait $!; done
exit ${CODE:-0}
"""


def start(script: list[str], folder: Path, **more: str) -> subprocess.Popen[bytes]:
    """With stand-ins for the program and SLURM's, which cannot be had here."""
    for name in ("virnuc-dask", "scontrol"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(script, env={"PATH": path, "CALLS": str(folder / "calls"), **more})


def terminate_once_begun(
    process: subprocess.Popen[bytes], folder: Path, number: signal.Signals = signal.SIGTERM
) -> int:
    def traps() -> bool:  # the script sets its traps after it has started the program
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> number - 1 & 1)

    wait_for((folder / "calls.begun").exists)
    wait_for(traps)
    process.send_signal(number)
    return process.wait(timeout=30)


ARRAY = ["bash", str(EXAMPLES / "slurm_array.sh"), "in put.faa", "out.zarr"]


def test_the_slurm_array_gives_each_task_its_shard(tmp_path: Path) -> None:
    assert start(ARRAY, tmp_path, CODE="3").wait() == 0
    assert start(ARRAY, tmp_path, CODE="4").wait() == 4
    said, _ = (tmp_path / "calls").read_text().splitlines()
    words = said.removeprefix("virnuc-dask run in put.faa out.zarr ").split()
    context = main.commands["run"].make_context("run", ["a.faa", "out.zarr", *words])
    assert (context.params["cluster"], context.params["shard"]) == ("local-cuda", "slurm")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_slurm_array_is_queued_again_when_its_time_is_over(
    number: signal.Signals, tmp_path: Path
) -> None:
    """And not after SIGTERM, by which it is cancelled."""
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    process = start(ARRAY, tmp_path, SECONDS_TO_RUN="60", **ids)
    assert terminate_once_begun(process, tmp_path, number) == 143
    queued = "scontrol requeue 7_3" in (tmp_path / "calls").read_text().splitlines()
    assert queued == (number == signal.SIGUSR1)


@pytest.mark.parametrize(("code", "job"), [(0, 0), (3, 0), (4, 4)])
def test_the_kubernetes_job_is_done_when_the_store_is(code: int, job: int, tmp_path: Path) -> None:
    *_, document = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    script = document["spec"]["template"]["spec"]["containers"][0]["command"]
    assert start(script, tmp_path, CODE=str(code)).wait() == job
    (tmp_path / "calls.begun").unlink()
    process = start(script, tmp_path, SECONDS_TO_RUN="60")
    assert terminate_once_begun(process, tmp_path) == 143


def test_dask_jobqueue_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import slurm_dask

    with slurm_dask.make_cluster() as cluster:
        script = cluster.job_script()
        assert cluster.scheduler.local_directory.startswith(f"{tmp_path}/dask-scratch/")
    assert f"--local-directory {tmp_path}/dask-scratch" in script
    assert (tmp_path / "dask-scratch").stat().st_mode & 0o777 == 0o700
    assert "#SBATCH --gres=gpu:1" in script
    assert "tls://" in script
    assert "--nthreads 3" in script
    assert "MALLOC_TRIM_THRESHOLD_" in script
