"""Clusters of our own and of others: what listens, TLS, and workers that do not fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Cli, Maker
from dask.system import CPU_COUNT

import virnuc_dask
from virnuc_dask import __version__, integrity
from virnuc_dask.cluster import connect
from virnuc_dask.errors import UsageError


@contextmanager
def dask_cluster(folder: Path, *options: str, **environment: Any) -> Iterator[Path]:
    """A scheduler and a worker, each started by hand; the environment is the worker's."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["worker", "--nthreads", "1", "--no-dashboard"]
    processes = [
        subprocess.Popen(
            [*dask, *command, "--scheduler-file", str(file), *options],
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **more,
        )
        for command, more in ((scheduler, {}), (worker, environment))
    ]
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        yield file
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_cores_and_keep_their_memory(workers: int) -> None:
    def look() -> tuple[int, str]:
        import torch

        return torch.get_num_threads(), Path("/proc/self/environ").read_text()

    with connect("local", workers=workers) as client:
        found = client.run(look)
    assert len(found) == workers
    for threads, environment in found.values():
        assert threads == max(1, CPU_COUNT // workers)
        # As the process was started with: later is too late for malloc.
        assert "MALLOC_TRIM_THRESHOLD_=1073741824" in environment
        assert "MALLOC_MMAP_THRESHOLD_=33554432" in environment


def test_nothing_listens_beyond_loopback() -> None:
    with connect("local", workers=1):
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = [
            connection.laddr.ip
            for process in ours
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem"
    try:
        subprocess.run(
            ["openssl", *request.split(), "-out", "cert.pem"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("needs the openssl command to make a certificate")
    return folder


def test_tls_works_and_nothing_goes_without_it(
    certificate: Path, cli: Cli, awkward: Path, tmp_path: Path
) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    tls = ("--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key)
    with dask_cluster(tmp_path, "--protocol", "tls", *tls) as file:
        common = ("run", awkward, "out.zarr", "--repr-layer", 0, "--cluster", file)
        refused = cli(*common)
        assert refused.returncode == 2
        assert "TLS" in refused.stderr
        assert "Traceback" not in refused.stderr
        absent = cli(*common, "--tls-ca-file", "absent.pem")
        assert absent.returncode == 2
        assert "absent.pem: no such file" in absent.stderr
        done = cli(*common, *tls)
        assert done.returncode == 3, done.stderr
    assert virnuc_dask.verify(tmp_path / "out.zarr").exit_code == 0


def test_a_worker_with_another_version_is_refused(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, embed=False)
    other = store.path.parent / "other"
    shutil.copytree(ROOT / "virnuc_dask", other / "virnuc_dask")
    init = other / "virnuc_dask" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"0.0.7"'))
    with (
        dask_cluster(store.path.parent, env={"PYTHONPATH": str(other)}) as file,
        connect(str(file)) as client,
    ):
        with pytest.raises(UsageError, match=rf"has virnuc_dask 0\.0\.7, this run {__version__}"):
            virnuc_dask.resume(store.path, client=client)
        assert len(client.nthreads()) == 1  # left as it was, and with nothing to do
        assert not any(client.processing().values())
    assert not store.present().any()


def test_workers_can_verify(make_store: Maker, peptides: Path, client: Any) -> None:
    store = make_store(peptides)
    damaged = store.path / "embedding" / "c.3.0"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    here, there = virnuc_dask.verify(store.path), virnuc_dask.verify(store.path, client=client)
    assert here == there
    assert list(there.bad) == [3]
    assert there.checked == store.chunk_count
    # It was they who read: a chunk's check is a task of its module.
    assert client.run(lambda: integrity.__name__ in sys.modules)
