"""Clusters of our own and of others: what listens, TLS, and workers that do not fit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import faults
import numpy as np
import psutil
import pytest
import torch
from clusters import started, started_cluster, worker
from conftest import ROOT, Cli, Maker
from dask.system import CPU_COUNT
from harness import (
    Run,
    assert_ledger,
    await_end,
    clear_partial_files_of_the_killed,
    finished_chunks,
)
from models import random_network, save_network

import virnuc_dask
from virnuc_dask import RunConfig, __version__
from virnuc_dask.encoder.weights import describe, load_checkpoint
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.runtime import dask_cluster, events, local, requirements
from virnuc_dask.runtime.dask_cluster import connect, resolve
from virnuc_dask.runtime.requirements import Requirements
from virnuc_dask.settings import Shard
from virnuc_dask.store import chunk_checks
from virnuc_dask.store.store import Store


def test_a_run_waits_for_its_scheduler_and_for_a_worker_and_says_so_at_once(
    make_store: Maker, tmp_path: Path
) -> None:
    """As in a job that starts all three with ``&``: the run may well be the first to be ready."""
    store = make_store(ROOT / "examples" / "esm_some_proteins.fasta", embed=False)
    file = tmp_path / "scheduler.json"
    scheduler = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with ExitStack() as stack:
        # Without a word of each there would be no scheduler or no worker.
        needed = [worker(file), started(file, *scheduler)]
        run = Run("resume", store.path, "--cluster", file)
        for event in run:
            if event["event"] == "waiting_for_workers":
                stack.enter_context(needed.pop())
        assert run.process.wait(timeout=60) == 0
    reasons = [event["reason"] for event in run.of("waiting_for_workers")]
    assert reasons == [f"there is no {file} yet", f"the scheduler at {file} has none"]


@pytest.mark.parametrize("for_what", ["a scheduler", "a worker"])
@pytest.mark.slow
def test_a_run_that_waits_ends_when_it_is_told_to(
    for_what: str, make_store: Maker, tmp_path: Path
) -> None:
    store = make_store(ROOT / "examples" / "esm_some_proteins.fasta", embed=False)
    file = tmp_path / "scheduler.json"
    with ExitStack() as stack:
        if for_what == "a worker":
            scheduler = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
            stack.enter_context(started(file, *scheduler))
        run = Run("resume", store.path, "--cluster", file, "--grace", 3_600)
        reason = "there is no" if for_what == "a scheduler" else "the scheduler at"
        for event in run:
            if event["event"] == "waiting_for_workers" and event["reason"].startswith(reason):
                run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=60) == 128 + signal.SIGTERM
    (summary,) = run.of("run_summary")
    assert (summary["interrupted"], summary["computed_chunks"]) == (signal.SIGTERM, 0)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_workers_have_loaded_torch_share_the_cores_and_keep_their_memory(workers: int) -> None:
    def look() -> tuple[bool, bool, int, int, str]:
        is_loaded = "torch" in sys.modules  # before anybody has asked for it
        import torch

        environment = Path("/proc/self/environ").read_text()
        threads = torch.get_num_threads()
        return is_loaded, gc.isenabled(), gc.get_freeze_count(), threads, environment

    with connect("local", workers=workers) as client:
        found = client.run(look)
    assert len(found) == workers
    for is_loaded, collects, frozen, threads, environment in found.values():
        assert is_loaded
        assert collects
        assert frozen > 10_000
        assert threads == max(1, CPU_COUNT // workers)
        # As the process was started with: later is too late for malloc.
        assert "MALLOC_TRIM_THRESHOLD_=1073741824" in environment
        assert "MALLOC_MMAP_THRESHOLD_=33554432" in environment


@pytest.mark.slow
def test_workers_import_nothing_from_the_working_directory(peptides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some folder"
    folder.mkdir()
    # Whatever lies about in the working directory is nobody's module.
    for name in ("pickle", "random", "esm", "zarr"):
        (folder / f"{name}.py").write_text("open('canary', 'w')")
    run = Run(
        *("run", peptides, tmp_path / "out.zarr"),
        *("--model=demo", "--repr-layer", 0, "--workers", 1),
        program=[str(Path(sys.executable).with_name("virnuc-dask"))],
        cwd=folder,
    )
    assert run.finish() == 0
    assert not (folder / "canary").exists()


@pytest.mark.slow
def test_gpus_that_are_not_there_are_a_clear_error(awkward: Path, tmp_path: Path, cli: Cli) -> None:
    refused = cli(
        *("run", awkward, "out.zarr", "--model=demo", "--cluster", "local-cuda"),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert refused.returncode == 2
    assert "--cluster local" in refused.stderr
    what = "torch finds no GPU" if find_spec("dask_cuda") else "pip install 'dask-cuda[cu13]'"
    assert what in refused.stderr
    assert "Traceback" not in refused.stderr
    # Said before the input is read.
    assert not (tmp_path / "out.zarr").exists()


def test_auto_is_what_there_is() -> None:
    assert resolve("tcp://127.0.0.1:8786") == "tcp://127.0.0.1:8786"
    if torch.cuda.is_available() and not find_spec("dask_cuda"):
        with pytest.raises(UsageError, match="needs dask-cuda"):
            resolve("auto")
    else:
        assert resolve("auto") == ("local-cuda" if torch.cuda.is_available() else "local")


@pytest.mark.slow
def test_a_device_that_is_not_there_is_said_before_any_chunk(
    awkward: Path, tmp_path: Path, cli: Cli
) -> None:
    refused = cli("run", awkward, "out.zarr", "--model=demo", "--device", "cuda:99")
    assert refused.returncode == 2
    assert "error: 1 of 1 workers cannot do this run; nothing was computed" in refused.stderr
    assert "cannot load the model on cuda:99" in refused.stderr
    assert not Store(tmp_path / "out.zarr").present().any()


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("dask_cuda") is None, reason="needs dask-cuda")
def test_gpus_embed_and_a_killed_worker_costs_nothing(peptides: Path, tmp_path: Path) -> None:
    seen: list[events.Event] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not any(
            isinstance(earlier, events.ChunkDone) for earlier in seen
        ):
            os.kill(event.pid, signal.SIGKILL)
        seen.append(event)

    settings = {"model": "demo", "precision": "float32", "rows_per_chunk": 64}
    path = tmp_path / "gpu.zarr"
    summary = virnuc_dask.run(peptides, path, cluster="local-cuda", listener=listen, **settings)
    assert (summary.exit_code, summary.workers_lost) == (0, 1)
    virnuc_dask.run(peptides, tmp_path / "cpu.zarr", **settings)
    found, expected = (
        virnuc_dask.open_store(tmp_path / f"{name}.zarr").embedding.values
        for name in ("gpu", "cpu")
    )
    assert np.abs(found - expected).max() <= 1e-4 * np.linalg.norm(expected, axis=1).max()


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("dask_cuda") is None, reason="needs dask-cuda")
def test_a_run_on_gpus_is_killed_and_the_same_command_goes_on(
    peptides: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out.zarr"
    command = ("--model=demo", "--cluster", "local-cuda", "--rows-per-chunk", 8)
    first = Run("run", peptides, path, *command)
    pids = set()
    for event in first:
        if event["event"] == "chunk_done":
            pids.add(event["pid"])
            first.process.send_signal(signal.SIGKILL)
    assert first.process.wait(timeout=60) == -signal.SIGKILL
    await_end(pids)
    store = Store(path)
    clear_partial_files_of_the_killed(store)
    done = np.flatnonzero(store.present()).tolist()
    assert 0 < len(done) < store.chunk_count
    before = finished_chunks(store)
    second = Run("run", peptides, path, *command)
    assert second.finish() == 0
    assert sorted([*done, *second.computed()]) == list(range(store.chunk_count))
    assert before.items() <= finished_chunks(store).items()
    assert virnuc_dask.resume(path, cluster="local-cuda").computed_chunks == 0
    assert Run("run", peptides, tmp_path / "whole.zarr", *command).finish() == 0
    assert_ledger(store, Store(tmp_path / "whole.zarr"))


@pytest.mark.skipif(find_spec("dask_cuda") is None, reason="needs dask-cuda")
def test_each_gpu_has_a_worker_and_a_killed_one_is_replaced(
    make_store: Maker, peptides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dask-cuda itself, on cores: that there are GPUs is made up, for they cannot always be had."""
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1", "2"])
    # dask-cuda's own, for tests on machines that lack them.
    for name in ("DASK_CUDA_TEST_SINGLE_GPU", "DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC"):
        monkeypatch.setenv(name, "1")
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    killed: list[int] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone) and not killed:
            os.kill(event.pid, signal.SIGKILL)
            killed.append(event.pid)

    with connect("local-cuda", 2) as client:
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["0,1", "1,0"]
        assert all(client.run(lambda: "torch" in sys.modules).values())
        assert set(client.nthreads().values()) == {3}
        config = RunConfig(device="cpu")
        summary = virnuc_dask.resume(store.path, client=client, config=config, listener=listen)
        assert (summary.exit_code, summary.workers_lost) == (0, 1)
        client.wait_for_workers(2, timeout=60)
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["0,1", "1,0"]
        assert killed[0] not in client.run(os.getpid).values()
        assert min(client.run(gc.get_freeze_count).values()) > 10_000
    clear_partial_files_of_the_killed(store)
    assert_ledger(store, whole)


def test_nothing_listens_beyond_loopback() -> None:
    with connect("local", workers=1, encodes=False) as client:
        assert not any(client.run(lambda: "torch" in sys.modules).values())
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = [
            connection.laddr.ip
            for process in ours
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_nobody_else_on_this_machine_may_run_code_on_our_workers(tmp_path: Path) -> None:
    """Other users reach loopback too. A process without the cluster's certificates is one."""
    attempts = """
import sys
from distributed import Client
from distributed.security import Security

address = sys.argv[1]
for address, security in (
    (address, Security.temporary()),
    (address.replace("tls://", "tcp://"), None),
):
    try:
        Client(address, security=security, timeout=2)
    except OSError as error:
        print(type(error).__name__)
"""
    with connect("local", workers=1) as client:
        for address in (client.scheduler.address, *client.nthreads()):
            assert address.startswith("tls://127.0.0.1:")
            command = [sys.executable, "-c", attempts, address]
            said = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
            assert len(said.splitlines()) == 2
        assert client.submit(os.getpid).result()


@pytest.mark.parametrize("taken", ["no", "a folder", "a link", "another user's"])
def test_nobody_else_can_exchange_the_folders_that_a_cluster_imports_from(
    taken: str, tmp_path: Path
) -> None:
    """Others may make Dask's folder for temporary files first, or ours."""
    shared, ours = tmp_path / "tmp", tmp_path / "tmp" / f"virnuc_dask-{os.geteuid()}"
    for folder in (shared, shared / "dask-scratch-space", tmp_path / "mine"):
        folder.mkdir()
        folder.chmod(0o1777)
    (tmp_path / "mine").chmod(0o700)
    if taken == "a link":
        ours.symlink_to(tmp_path / "mine")
    elif taken != "no":
        ours.mkdir()
        ours.chmod(0o700 if taken == "another user's" else 0o1777)
        if taken == "another user's":
            try:
                os.chown(ours, 65_534, -1)
            except PermissionError:
                pytest.skip("only root can give a folder away")
    script = """
from virnuc_dask.runtime.dask_cluster import connect

with connect("local", workers=1) as client:
    (path,) = client.run(lambda: __import__("sys").path).values()
    print(*path, *client.run_on_scheduler(lambda: __import__("sys").path), sep="\\n")
"""
    said = subprocess.check_output(
        [sys.executable, "-P", "-c", script],
        env=os.environ | {"TMPDIR": str(shared), "PYTHONPATH": str(ROOT)},
        text=True,
    )
    folders = [Path(name) for name in said.splitlines() if name.startswith(str(tmp_path))]
    assert {"worker", "scheduler"} <= {folder.name.partition("-")[0] for folder in folders}
    for folder in folders:
        private = shared / folder.relative_to(shared).parts[0]
        assert (private == ours) == (taken == "no")
    assert set(os.listdir(shared)) == {"dask-scratch-space", ours.name}


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


@pytest.mark.slow
def test_tls_works_and_nothing_goes_without_it(
    certificate: Path, cli: Cli, awkward: Path, tmp_path: Path
) -> None:
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    tls = ("--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key)
    with started_cluster(tmp_path, "--protocol", "tls", *tls) as file:
        common = ("run", awkward, "out.zarr", "--model=demo", "--repr-layer", 0, "--cluster", file)
        refused = cli(*common)
        assert refused.returncode == 2
        assert "TLS" in refused.stderr
        assert "Traceback" not in refused.stderr
        absent = cli(*common, "--tls-ca-file", "absent.pem")
        assert absent.returncode == 2
        address = json.loads(file.read_text())["address"]
        plain = cli(*common[:-1], address.replace("tls://", "tcp://"), *tls)
        assert "is not encrypted, but TLS files are given" in plain.stderr
        other = tmp_path / "other.pem"
        request = ["openssl", "genpkey", "-algorithm", "RSA", "-out", str(other)]
        subprocess.run(request, check=True, capture_output=True)
        unfit = cli(*common, "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", other)
        assert f"{other}: cannot be used together" in unfit.stderr
        plain_too = cli(*common[:-1], address.replace("tls://", "tcp://"))
        assert "Does it speak TLS (tls://)?" in plain_too.stderr
        assert plain_too.returncode == 4
        useless = cli(*common[:-2], *tls)
        assert "TLS files are for a running scheduler, not for --cluster local" in useless.stderr
        assert {plain.returncode, unfit.returncode, useless.returncode} == {2}
        assert not (tmp_path / "out.zarr").exists()
        assert "absent.pem: no such file" in absent.stderr
        done = cli(*common, *tls)
        assert done.returncode == 3, done.stderr
        assert cli("verify", "out.zarr", "--cluster", file, *tls).returncode == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[]", "not a scheduler file: no address in it"),
        (b"null", "not a scheduler file: no address in it"),
        (b"{}", "not a scheduler file: no address in it"),
        (b"no json", "not a scheduler file: Expecting value"),
        (b"\xff\xfe", "not a scheduler file: 'utf-8' codec"),
        (b'{"address": 5}', "no scheduler answers"),
        (b'{"address": "tcp://127.0.0.1:abc"}', "no scheduler answers"),
    ],
)
def test_a_scheduler_file_that_is_none_is_a_clear_error(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "scheduler.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"scheduler\.json: {problem}"), connect(str(file)):
        pass


def test_the_file_of_a_scheduler_that_was_killed_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "scheduler.json").write_text('{"address": "tcp://127.0.0.1:9"}')
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(VirnucError, match="that was killed leaves its file") as error,
        connect(str(file)),
    ):
        pass
    assert not isinstance(error.value, UsageError)  # it may be there the next time


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_what_says_nothing_may_be_a_scheduler_the_next_time(
    scheme: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "_GREETING_S", 1)
    cert, key = str(certificate / "cert.pem"), str(certificate / "key.pem")
    files = {"tls_ca_file": cert, "tls_cert": cert, "tls_key": key} if scheme == "tls" else {}
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
    ):
        address = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(VirnucError, match=r"says nothing|Timed out") as error,
            connect(address, config=RunConfig(**files)),
        ):
            pass
    assert not isinstance(error.value, UsageError)


def test_what_says_something_else_is_no_scheduler() -> None:
    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            while connection.recv(4096):  # closed with something unread, it would be a reset
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match="is no Dask scheduler"), connect(address):
            pass


@pytest.mark.slow
def test_a_run_that_waits_for_an_answer_ends_when_it_is_told_to(make_store: Maker) -> None:
    store = make_store(ROOT / "examples" / "esm_some_proteins.fasta", embed=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        run = Run("resume", store.path, "--cluster", address, "--grace", 3_600)
        connection, _ = silent.accept()
        with connection:
            run.process.send_signal(signal.SIGTERM)
            assert run.finish() == 128 + signal.SIGTERM
    (summary,) = run.of("run_summary")
    assert (summary["interrupted"], summary["computed_chunks"]) == (signal.SIGTERM, 0)


def test_a_cluster_is_asked_before_the_input_is_read_and_not_without_work(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    seen: list[type[events.Event]] = []
    arguments: dict[str, Any] = {
        "model": "demo",
        "repr_layer": 0,
        "cluster": str(tmp_path / "no such file"),
        "listener": lambda event: seen.append(type(event)),
    }
    with pytest.raises(UsageError, match="no such file"):
        virnuc_dask.run(awkward, tmp_path / "new.zarr", **arguments)
    assert seen == []
    assert os.listdir(tmp_path) == [awkward.name]
    store = make_store(awkward)
    assert virnuc_dask.run(awkward, store.path, **arguments).complete
    assert events.InputRead in seen


@pytest.mark.parametrize(
    ("options", "most"), [(("--nthreads", "32"), 3), (("--resources", "GPU=1"), 1)]
)
@pytest.mark.slow
def test_a_worker_gets_no_more_chunks_than_help_it(
    options: tuple[str, ...], most: int, make_store: Maker, peptides: Path, tmp_path: Path
) -> None:
    """Whatever its threads and resources: chunks that wait in it would die with it."""
    store = make_store(peptides, embed=False)
    with started_cluster(tmp_path, worker_options=options) as file, connect(str(file)) as watcher:
        found = []

        def listen(event: events.Event) -> None:
            if isinstance(event, events.ChunkDone):
                found.append(sum(map(len, watcher.processing().values())))

        assert virnuc_dask.resume(store.path, cluster=str(file), listener=listen).exit_code == 0
    assert (most > 1) <= max(found) <= most


@pytest.fixture
def slow(
    make_store: Maker, peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Store, Store, Path]:
    """Chunks of one row that take a worker a second, the same done, and the table that says so."""
    some = tmp_path / "some.faa"
    some.write_text("".join(peptides.read_text().splitlines(keepends=True)[:28]))
    whole = make_store(some, "whole.zarr", rows_per_chunk=1)
    store = make_store(some, embed=False, rows_per_chunk=1)
    table = tmp_path / "faults.json"
    table.write_text(json.dumps({"": "slow"}))
    faults.arm(monkeypatch, table)
    return store, whole, table


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_coordinator_that_is_killed_leaves_nothing_on_a_cluster(
    number: int, slow: tuple[Store, Store, Path], tmp_path: Path
) -> None:
    store, whole, table = slow
    with started_cluster(tmp_path) as file, connect(str(file)) as client:
        client.wait_for_workers(1)
        workers = set(client.nthreads())
        run = Run("resume", store.path, "--cluster", file)
        for event in run:
            if event["event"] == "chunk_done" and len(run.computed()) == 1:
                run.process.send_signal(number)
        assert run.process.wait(timeout=60) in (-number, 128 + number)
        before = finished_chunks(store)
        assert 0 < store.present().sum() < store.chunk_count
        nothing = tmp_path / "nothing.json"
        nothing.write_text("{}")
        nothing.replace(table)  # at once: the worker reads it
        deadline = time.monotonic() + 60
        while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
            assert time.monotonic() < deadline, "tasks stay on the scheduler"
            time.sleep(0.1)
        assert set(client.nthreads()) == workers
        again = Run("resume", store.path, "--cluster", file)
        assert again.finish() == 0
        assert Run("resume", store.path, "--cluster", file).finish() == 0
    assert before.items() <= finished_chunks(store).items()
    assert_ledger(store, whole)


@pytest.mark.slow
def test_a_hanging_worker_with_others_work_is_not_killed(
    make_store: Maker, peptides: Path, tmp_path: Path
) -> None:
    whole = make_store(peptides, "whole.zarr")
    store = make_store(peptides, embed=False)
    seen: list[events.Event] = []
    stopped: list[int] = []
    with started_cluster(tmp_path) as file, worker(file), connect(str(file)) as other:
        other.wait_for_workers(2)
        # What somebody else has computed, on either.
        theirs = [other.submit(pow, 2, n, workers=[w]) for n, w in enumerate(other.nthreads())]
        assert other.gather(theirs) == [1, 2]

        def listen(event: events.Event) -> None:
            seen.append(event)
            done = [event for event in seen if isinstance(event, events.ChunkDone)]
            if len(done) == 10 and not stopped:
                stopped.append(done[-1].pid)
                os.kill(done[-1].pid, signal.SIGSTOP)

        config = RunConfig(deadline_floor=4, deadline_first=60)
        try:
            summary = virnuc_dask.resume(
                store.path, cluster=str(file), config=config, listener=listen
            )
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        overdue = [event.replaced for event in seen if isinstance(event, events.ChunkOverdue)]
        assert overdue
        assert not any(overdue)
        assert (summary.exit_code, summary.workers_lost) == (0, 0)
        assert other.gather(theirs) == [1, 2]
        assert stopped[0] in other.run(os.getpid).values()
    assert_ledger(store, whole)


# --- workers that do not fit ---


@pytest.fixture
def other_version(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker that has another version of the package."""
    shutil.copytree(ROOT / "virnuc_dask", tmp_path / "other" / "virnuc_dask")
    init = tmp_path / "other" / "virnuc_dask" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"0.0.7"'))
    return os.environ | {"PYTHONPATH": str(tmp_path / "other")}


@pytest.fixture
def other_zarr(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker with another Zarr, by name only: its code is this one's."""
    (there := tmp_path / "other" / "zarr-3.0.1.dist-info").mkdir(parents=True)
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 3.0.1\n")
    return os.environ | {"PYTHONPATH": str(there.parent)}


def test_with_other_versions_nothing_is_opened(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(ROOT / "examples" / "esm_some_proteins.fasta", embed=False)
    spec = describe(load_checkpoint("demo"), repr_layer=0)
    needed = Requirements.here(store, spec, "cpu", is_local=False)
    theirs = tuple((name, "3.0.1" if name == "zarr" else there) for name, there in needed.versions)
    monkeypatch.delattr(requirements, "Store")
    (lack,) = requirements.shortcomings(replace(needed, versions=theirs))
    assert lack.startswith("zarr ")
    assert lack.endswith(", this run 3.0.1")


@pytest.mark.slow
def test_all_that_workers_lack_is_said_at_once_and_before_any_chunk(
    awkward: Path,
    tmp_path: Path,
    cli: Cli,
    other_version: dict[str, str],
    blinded: tuple[str, ...],
) -> None:
    save_network(random_network(2, 32, 4), tmp_path / "hidden" / "weights.pt")
    run = ("run", awkward, "hidden/out.zarr", "--model", "hidden/weights.pt")
    with (
        started_cluster(tmp_path, env=other_version) as file,
        worker(file, prefix=blinded),
        worker(file),
    ):
        with connect(str(file)) as client:
            client.wait_for_workers(3)
        refused = cli(*run, "--cluster", file)
        assert refused.returncode == 2
        head, *lacks = refused.stderr.splitlines()[-4:]
        assert head == "error: 2 of 3 workers cannot do this run; nothing was computed"
        store, model, version = sorted(line.split("  ")[2] for line in lacks)
        assert store == f"{tmp_path}/hidden/out.zarr: no store there"
        assert model.startswith(f"model '{tmp_path}/hidden/weights.pt': neither a file nor")
        assert version == f"virnuc_dask 0.0.7, this run {__version__}"
        # The user's cluster is as it was, and has nothing to do.
        with connect(str(file)) as client:
            assert len(client.nthreads()) == 3
            assert not any(client.processing().values())
    assert not Store(tmp_path / "hidden" / "out.zarr").present().any()
    assert not list((tmp_path / "hidden").rglob("*.partial"))


@pytest.mark.slow
def test_a_scheduler_without_the_package_is_told_before_any_chunk(
    awkward: Path, tmp_path: Path, cli: Cli
) -> None:
    """It unpickles tasks on their way."""
    (there := tmp_path / "bare" / "virnuc_dask").mkdir(parents=True)
    (there / "__init__.py").write_text("raise ImportError('no virnuc_dask here')")
    bare = os.environ | {"PYTHONPATH": str(there.parent)}
    with started_cluster(tmp_path, scheduler_env=bare) as file:
        refused = cli(
            "run", awkward, "out.zarr", "--model=demo", "--repr-layer", 0, "--cluster", file
        )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: the scheduler cannot run this work; it needs virnuc_dask too:"
        " ImportError: no virnuc_dask here"
    )
    assert not (tmp_path / "out.zarr").exists()  # the input was not read yet


@pytest.mark.parametrize(
    ("kind", "lack"),
    [
        ("other_zarr", f"zarr 3.0.1, this run {version('zarr')}"),
        ("other_esm", "the module esm at "),
    ],
)
@pytest.mark.slow
def test_an_unfit_worker_that_joins_later_is_left_alone(
    kind: str,
    lack: str,
    slow: tuple[Store, Store, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    environment = request.getfixturevalue(kind)
    store, whole, table = slow
    table.write_text(json.dumps({"": "hold"}))
    seen: list[events.Event] = []
    with ExitStack() as stack:
        file = stack.enter_context(started_cluster(tmp_path))

        def listen(event: events.Event) -> None:
            if isinstance(event, events.WorkersChecked):
                stack.enter_context(worker(file, env=os.environ | environment))
            if isinstance(event, events.WorkerUnfit):
                faults.release(table)  # before there was nothing done: it has not come too late
            seen.append(event)

        summary = virnuc_dask.resume(store.path, cluster=str(file), listener=listen)
        unfit = [event for event in seen if isinstance(event, events.WorkerUnfit)]
        ((found,),) = [event.lacks for event in unfit]
        assert found.startswith(lack)
        assert len({event.pid for event in seen if isinstance(event, events.ChunkDone)}) == 1
        assert (summary.exit_code, summary.retries) == (0, 0)
    assert_ledger(store, whole)


@pytest.mark.slow
def test_a_run_whose_last_fit_worker_is_gone_ends_with_a_clear_error(
    make_store: Maker,
    other_version: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    motif, table, source = "WWCWW", tmp_path / "faults.json", tmp_path / "in.faa"
    source.write_text(f">a\nM{motif}\n>b\nMKVA\n")
    table.write_text(json.dumps({motif: "hang"}))  # the run cannot be over before the loss
    store = make_store(source, embed=False)
    with ExitStack() as stack, monkeypatch.context() as patch:
        faults.arm(patch, table)
        file = stack.enter_context(started_cluster(tmp_path))

        def listen(event: events.Event) -> None:
            if isinstance(event, events.WorkersChecked):
                stack.enter_context(worker(file, env=os.environ | other_version))
            elif isinstance(event, events.WorkersChanged) and event.workers == 2:
                # Without its nanny, which would start another.
                (fit,) = (
                    process
                    for process in psutil.Process().children()
                    if "worker" in process.cmdline()
                    and str(tmp_path) not in process.environ().get("PYTHONPATH", "")
                )
                os.killpg(fit.pid, signal.SIGKILL)

        with pytest.raises(VirnucError, match=r"no worker is left .*\n.*virnuc_dask 0\.0\.7"):
            virnuc_dask.resume(store.path, cluster=str(file), listener=listen)
    assert virnuc_dask.resume(store.path, workers=1).exit_code == 0


@pytest.mark.slow
def test_a_worker_that_dies_when_it_is_asked_keeps_no_run_from_beginning(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = make_store(awkward, embed=False, rows_per_chunk=2)
    killed: list[int] = []
    seen: list[events.Event] = []
    with started_cluster(tmp_path) as file:
        with connect(str(file)) as client:
            client.wait_for_workers(1)
            (pid,) = client.run(os.getpid).values()

        def kill() -> None:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

        killer = threading.Thread(target=kill)
        killer.start()
        began = time.monotonic()
        virnuc_dask.resume(store.path, cluster=str(file), listener=seen.append)
        killer.join()
        assert time.monotonic() - began < 60
    assert killed
    assert store.present().all()


@pytest.mark.slow
def test_a_worker_that_hangs_keeps_no_run_from_beginning(
    make_store: Maker, awkward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_STRAGGLERS_S", 1.0)
    store = make_store(awkward, embed=False, rows_per_chunk=1)
    with started_cluster(tmp_path) as file, worker(file, "--no-nanny") as hangs:
        with connect(str(file)) as client:
            client.wait_for_workers(2)
            client.run(lambda: bool(__import__("virnuc_dask.runtime.embed")))
        hangs.send_signal(signal.SIGSTOP)
        seen: list[events.Event] = []
        config = RunConfig(deadline_floor=2, deadline_first=12)
        virnuc_dask.resume(store.path, cluster=str(file), config=config, listener=seen.append)
    (checked,) = (event for event in seen if isinstance(event, events.WorkersChecked))
    assert checked.workers == 1
    assert store.present().all()


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
    assert client.run(lambda: chunk_checks.__name__ in sys.modules)


# Stands for a GPU whose memory is somebody else's.
SHORT_OF_MEMORY = """
from virnuc_dask.runtime import embed

def short(reference):
    raise MemoryError("the card is full")

embed.load_checkpoint = short
"""


@pytest.mark.slow
def test_a_model_that_no_worker_has_memory_for_is_said_before_any_chunk(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = make_store(awkward, embed=False)
    (tmp_path / "short.py").write_text(SHORT_OF_MEMORY)
    with (
        started_cluster(tmp_path, worker_options=("--preload", "short.py")) as file,
        pytest.raises(VirnucError, match="no worker has enough memory now: the card is full"),
    ):
        virnuc_dask.resume(store.path, cluster=str(file))
    assert not store.present().any()


# Stands for a worker with another zarr, or with another disk at the store's path.
SEES_DAMAGE = """
from virnuc_dask.store import verify

verify.check_chunk = lambda *_, **__: "made up"
"""


@pytest.mark.slow
def test_what_only_a_worker_finds_damaged_is_not_removed(
    make_store: Maker, peptides: Path, tmp_path: Path
) -> None:
    store = make_store(peptides)
    before = finished_chunks(store)
    (store.path / "embedding" / "c.2.0").write_bytes(b"damaged" * 99)
    (tmp_path / "sees.py").write_text(SEES_DAMAGE)
    with (
        started_cluster(tmp_path, worker_options=("--preload", "sees.py")) as file,
        connect(str(file)) as client,
    ):
        report = virnuc_dask.verify(store.path, client=client, repair=True)
        assert client.run(lambda: chunk_checks.__name__ in sys.modules)
    assert list(report.bad) == [2]
    assert "made up" not in report.bad[2]
    gone = set(before) - set(finished_chunks(store))
    assert {Path(name).name for name in gone} == {"c.2", "c.2.0"}


@pytest.mark.slow
def test_workers_that_are_lost_over_and_over_are_one_line() -> None:
    with pytest.raises(VirnucError, match=r"lost: .*died"), connect("local", workers=1) as client:
        client.submit(os._exit, 1).result()


# --- shards ---


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        (None, {}, Shard(1, 1)),
        ("3/16", {}, Shard(3, 16)),
        ("slurm", {"TASK_ID": 0, "TASK_MIN": 0, "TASK_STEP": 1, "TASK_COUNT": 4}, Shard(1, 4)),
        ("slurm", {"TASK_ID": 7, "TASK_MIN": 1, "TASK_STEP": 2, "TASK_COUNT": 4}, Shard(4, 4)),
    ],
)
def test_shards_are_read(text: str | None, environment: dict[str, int], shard: Shard) -> None:
    names = {f"SLURM_ARRAY_{name}": str(value) for name, value in environment.items()}
    assert Shard.parse(text, names) == shard


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("0/4", {}, "must be 1 to 4"),
        ("5/4", {}, "must be 1 to 4"),
        ("1", {}, "give a share such as 3/16, or slurm"),
        ("a/b", {}, "give a share such as 3/16, or slurm"),
        ("slurm", {}, "not a task of an array job"),
        # --array=1,2,9: what is left out would be computed by nobody.
        ("slurm", {"TASK_ID": 9, "TASK_MIN": 1, "TASK_STEP": 1, "TASK_COUNT": 3}, "with gaps"),
        ("slurm", {"TASK_ID": 2, "TASK_MIN": 1, "TASK_STEP": 3, "TASK_COUNT": 3}, "with gaps"),
        ("slurm", dict.fromkeys(("TASK_ID", "TASK_MIN", "TASK_STEP", "TASK_COUNT"), ""), "SLURM_A"),
    ],
)
def test_shards_that_are_none_are_refused(
    text: str, environment: dict[str, object], message: str
) -> None:
    names = {f"SLURM_ARRAY_{name}": str(value) for name, value in environment.items()}
    with pytest.raises(UsageError, match=message):
        Shard.parse(text, names)


def test_every_chunk_is_in_one_shard_of_so_many() -> None:
    shards = [Shard(index, 7) for index in range(1, 8)]
    assert all(sum(shard.holds(chunk) for shard in shards) == 1 for chunk in range(100))


@pytest.mark.slow
def test_runs_with_no_contact_fill_one_store(
    make_store: Maker, peptides: Path, tmp_path: Path
) -> None:
    """Two shards at once, that both find no store; one of them overlaps a third."""
    whole = make_store(peptides, "whole.zarr")
    path = tmp_path / "out.zarr"
    common = ("--model=demo", "--rows-per-chunk", 32, "--repr-layer", 0, "--workers", 1)
    runs = [Run("run", peptides, path, *common, "--shard", f"{n}/3") for n in (1, 3)]
    assert [run.finish() for run in runs] == [0, 0]
    store = Store(path)
    for run, first in zip(runs, (0, 2), strict=True):
        mine = list(range(first, store.chunk_count, 3))
        assert sorted(run.computed()) == mine
        assert run.of("run_started")[0]["chunks_to_compute"] == len(mine)
        assert run.events[-1]["missing"] == {}
    assert np.flatnonzero(~store.present()).tolist() == list(range(1, store.chunk_count, 3))
    before = finished_chunks(store)
    last = Run("run", peptides, path, *common, "--shard", "2/3")
    overlapping = Run("resume", path, "--workers", 1, "--shard", "1/2")
    assert (last.finish(), overlapping.finish()) == (0, 0)
    assert last.events[-1]["elsewhere"] == 0
    assert before.items() <= finished_chunks(store).items()
    assert_ledger(store, whole)
