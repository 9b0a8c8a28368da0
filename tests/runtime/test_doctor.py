"""What `doctor` finds on this machine, and on others that are less well."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Cli
from models import random_network, save_network

from virnuc_dask import __version__
from virnuc_dask.runtime import doctor
from virnuc_dask.runtime.doctor import Finding, examine


def found(stdout: str) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in map(json.loads, stdout.splitlines())}


def test_all_that_a_run_needs_is_here(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    assert f"ok  program           virnuc-dask {__version__}, Python 3." in done.stdout
    assert "\nno  " not in done.stdout
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    names = ["program", "packages", "fair-esm", "processor", "GPU", "extras"]
    folders = ["temporary folder", "folder for stores", "cache"]
    assert [each for each in found(done.stdout) if each != "local-cuda"] == [
        *names,
        *folders,
        "models",
    ]
    assert "torch 2." in found(done.stdout)["packages"]["found"]


def test_it_says_what_is_missing_and_what_to_do(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "esm.py").write_text("raise SystemExit('not the package you want')")
    (tmp_path / "file").write_text("")
    paths = f"{tmp_path / 'other'}{os.pathsep}{ROOT}"
    more = {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "file"), "PATH": os.defpath}
    done = cli("doctor", "--json", env=os.environ | more)
    assert done.returncode == 4, done.stderr
    said = found(done.stdout)
    assert said["fair-esm"]["mark"] == "no"
    assert "rename it" in said["fair-esm"]["advice"]
    assert said["cache"]["mark"] == "--"
    assert "cannot be written" in said["cache"]["found"]
    assert "XDG_CACHE_HOME" in said["cache"]["advice"]
    assert "\nno  fair-esm          cannot be used\n" in cli("doctor", env=os.environ | more).stdout


def test_downloaded_models_are_named(cli: Cli, tmp_path: Path) -> None:
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    save_network(random_network(1, 320, 20), cache / "esm2_t6_8M_UR50D.pt")
    done = cli("doctor", "--json", env=os.environ | {"TORCH_HOME": str(tmp_path / "torch")})
    assert f"esm2_t6_8M_UR50D (5 MiB), in {cache}" == found(done.stdout)["models"]["found"]


def test_little_room_and_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk and a machine without any temporary folder are made up."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 2**20))

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    said = {finding.name: finding for finding in examine()}
    assert "0.0 GiB free" in said["folder for stores"].found
    assert said["folder for stores"].mark == "--"
    assert said["temporary folder"].mark == "no"


def test_the_folder_for_stores(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {finding.name: finding for finding in examine(tmp_path)}
    assert said["folder for stores"].mark == "ok"
    assert str(tmp_path) in said["folder for stores"].found
    assert os.listdir(tmp_path) == []
    absent = found(cli("doctor", "absent", "--json").stdout)["folder for stores"]
    assert absent["mark"] == "no"
    assert "absent, cannot be written: No such file" in absent["found"]

    def no_locks(descriptor: int, operation: int) -> None:  # as on some network disks
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", no_locks)
    said = {finding.name: finding for finding in examine(tmp_path)}
    assert "no locks (flock)" in said["folder for stores"].found


def test_packages_that_are_missing_or_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["zarr>=3", "absent>=1", "no; extra == 'x'"]
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    said = {finding.name: finding for finding in examine()}
    assert said["packages"].advice == "missing: absent; pip install absent"
    assert said["packages"].mark == said["torch and dask"].mark == "no"
    assert "import of torch halted" in said["torch and dask"].found


def test_a_cache_into_which_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = {finding.name: finding for finding in examine()}
    assert (said["cache"].mark, list(tmp_path.iterdir())) == ("ok", [])  # and none was made
    (tmp_path / "virnuc_dask").mkdir()
    (tmp_path / "virnuc_dask").chmod(0o775)
    said = {finding.name: finding for finding in examine()}
    assert said["cache"].mark == "--"
    assert "chmod 700" in said["cache"].advice


@pytest.mark.parametrize(
    ("advice", "is_needed", "mark"), [("", True, "ok"), ("x", True, "no"), ("x", False, "--")]
)
def test_the_mark(advice: str, is_needed: bool, mark: str) -> None:
    assert Finding("a", "b", advice, is_needed).mark == mark


@pytest.mark.gpu
def test_a_gpu_is_named_and_its_kernels_tried() -> None:
    (first, *_) = [finding for finding in examine() if finding.name == "GPU"]
    assert "GiB, CUDA" in first.found
    assert first.mark == "ok"
