"""Clusters of our own: they start anywhere, or say why not, and end when they are told to."""

from __future__ import annotations

import asyncio
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from clusters import started_cluster
from conftest import ROOT, VIRAL_PROTEINS, Cli, Maker, command, tree
from harness import Run, assert_ledger, await_end, clear_partial_files_of_the_killed, program
from models import random_network, save_network

import virnuc_dask
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.runtime.local import innermost
from virnuc_dask.store.store import Store

QUICK = ("--model=demo", "--repr-layer", 0, "--workers", 1, "-q")

# --- scripts ---

SCRIPT = """
import warnings
import virnuc_dask
warnings.simplefilter("ignore")  # the demo model's weights are random
print(virnuc_dask.run("in.faa", "out.zarr", model="demo", workers=2, progress=False).counts)
"""


@pytest.mark.parametrize("how", ["file", "exec"])
@pytest.mark.slow
def test_a_script_needs_neither_a_file_nor_a_guard(how: str, tmp_path: Path) -> None:
    """Workers import nothing of it, so that none of them runs it again."""
    (tmp_path / "in.faa").write_text(">a\nMKTAYIAKQR\n>b\nMKV\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    inner = "exec(open('script.py').read())"
    arguments = ["script.py"] if how == "file" else ["-c", inner]
    done = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "{'embedded': 2}\n"), done.stderr
    assert done.stderr == ""


LEFT = """
import sys
from distributed import LocalCluster
from virnuc_dask.runtime.dask_cluster import connect

LocalCluster.close = lambda *arguments, **more: None
context = connect("local", workers=1)
client = context.__enter__()
print(*client.run(__import__("os").getpid).values(), flush=True)
"""


@pytest.mark.slow
def test_a_process_ends_with_workers_that_no_cluster_closed(tmp_path: Path) -> None:
    """Workers block SIGTERM. Here Dask's own closing is broken, as when it takes too long."""
    (tmp_path / "left.py").write_text(LEFT)
    done = subprocess.run(
        [sys.executable, "left.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    await_end({int(done.stdout)})


# A worker stands still while it starts, and its coordinator is interrupted.
HELD = """
import os, sys, time
if any("spawn_main" in argument for argument in sys.orig_argv):
    with open("new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("new", "held")
    time.sleep(3600)
"""
INTERRUPTED = """
import _thread, os, threading, time
from distributed import LocalCluster
from virnuc_dask.runtime.dask_cluster import connect

def interrupt():
    while not os.path.exists("held"):
        time.sleep(0.05)
    _thread.interrupt_main()

LocalCluster.close = lambda *arguments, **more: None
threading.Thread(target=interrupt).start()
with connect("local", workers=1):
    pass
"""


@pytest.mark.slow
def test_a_process_ends_with_workers_that_are_still_starting(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HELD)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    await_end({int((tmp_path / "held").read_text())})


# --- a site's configuration ---


# Each by itself would break a cluster of this machine, or its workers.
FOR_THE_SITES_CLUSTERS = {
    "DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True",
    "DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls",
    "DISTRIBUTED__COMM__TLS__CA_FILE": "/nowhere/ca.pem",
    "TEMPORARY_DIRECTORY": "/proc/nowhere",
    "DISTRIBUTED__WORKER__PRELOAD": '["a_sites_module"]',
    "DISTRIBUTED__SCHEDULER__PRELOAD": '["a_sites_module"]',
    "DISTRIBUTED__NANNY__PRELOAD": '["a_sites_module"]',
    "DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "fork",
    "DISTRIBUTED__WORKER__RESOURCES__GPU": "1",
}


@pytest.mark.slow
def test_a_sites_configuration_is_not_for_our_own_clusters(awkward: Path, cli: Cli) -> None:
    site = {f"DASK_{name}": value for name, value in FOR_THE_SITES_CLUSTERS.items()}
    done = cli("run", awkward, "out.zarr", *QUICK, env=os.environ | site)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(
    "arguments", [("run", VIRAL_PROTEINS, "o.zarr", "--model=demo"), ("verify", "o.zarr")]
)
@pytest.mark.slow
def test_a_broken_configuration_is_one_line(
    arguments: tuple[object, ...], cli: Cli, make_store: Maker, tmp_path: Path
) -> None:
    make_store(VIRAL_PROTEINS, "o.zarr")
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "site.yaml").write_text("distributed:\n  comm: [unclosed\n")
    done = cli(*arguments, env=os.environ | {"DASK_CONFIG": str(tmp_path / "dask")})
    assert done.returncode == 2
    assert done.stderr.startswith("error: Dask rejects its configuration")
    assert str(tmp_path / "dask" / "site.yaml") in done.stderr
    assert done.stderr.count("\n") == 1


# --- users and limits ---


@pytest.mark.slow
def test_nobody_in_particular_can_run_it(awkward: Path, tmp_path: Path) -> None:
    """No HOME, no entry among the users, and nowhere to write but here."""
    model = save_network(random_network(2, 32, 4), tmp_path / "model.pt")
    options = ("--model", model, "--workers", 1, "-q")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    leave = "+dac_read_search"  # to read this interpreter, wherever it is
    nobody = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    nobody += [f"--inh-caps={leave}", f"--ambient-caps={leave}", "env", "-i", "PATH=/usr/bin:/bin"]
    package = Path(virnuc_dask.__file__).parents[1]
    nobody += [f"PYTHONPATH={package}", f"TMPDIR={tmp_path}"]
    if subprocess.run(
        [*nobody, sys.executable, "-c", ""], check=False, capture_output=True
    ).returncode:
        pytest.skip("needs leave to become another user, as root has")
    for number, home in enumerate(([], ["HOME=/nowhere"])):
        done = subprocess.run(
            [*nobody, *home, *command("run", awkward, f"{number}.zarr", *options)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr


def limited(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_the_limit_of_open_files_is_raised_if_it_may_be(awkward: Path, cli: Cli) -> None:
    options = ("--model=demo", "--repr-layer", 0, "--workers", 4, "-q")
    done = cli("run", awkward, "out.zarr", *options, preexec_fn=lambda: limited(48, 1024))
    assert done.returncode == 3, done.stderr
    done = cli("run", awkward, "2.zarr", *options, preexec_fn=lambda: limited(48, 96))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "4 workers need about" in done.stderr
    assert "the limit is 96; use fewer --workers" in done.stderr


# --- why workers do not start ---


@pytest.mark.parametrize(
    ("end", "error", "tries", "said"),
    [
        ("os._exit(3)", UsageError, 1, "the workers do not start: a worker ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", VirnucError, 3, "by signal 9 (Killed). Is there too little"),
        ("os.kill(os.getpid(), 6)", VirnucError, 3, "was ended by signal 6 (Aborted)"),
    ],
)
def test_how_workers_ended_is_said_and_memory_only_of_the_killed(
    end: str,
    error: type[VirnucError],
    tries: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes that end before they are workers, as without their libraries or memory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any('spawn_main' in argument for argument in sys.orig_argv):\n"
        f"    open({str(tmp_path / 'tries')!r}, 'a').write('.')\n"
        f"    {end}\n"
    )
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{path}")
    with pytest.raises(error) as caught, connect("local", workers=1):
        pass
    assert type(caught.value) is error
    assert said in str(caught.value)
    assert ("memory" in str(caught.value)) == ("9" in end)
    assert len((tmp_path / "tries").read_text()) == tries


# Loading the encoder fails once in each worker, as where memory is short for a moment.
FAILS_ONCE = """
import sys
from importlib.abc import MetaPathFinder

class Once(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "virnuc_dask.runtime.embed":
            sys.meta_path.remove(self)
            open({!r}, "a").write(".")
            raise MemoryError("for a moment")

if any("spawn_main" in argument for argument in sys.orig_argv):
    sys.meta_path.insert(0, Once())
"""


@pytest.mark.slow
def test_a_worker_that_cannot_load_the_encoder_while_it_starts_is_not_lost(
    awkward: Path, make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask replaces none that fails to start."""
    whole = make_store(awkward, "whole.zarr", rows_per_chunk=1)
    (tmp_path / "sitecustomize.py").write_text(FAILS_ONCE.format(str(tmp_path / "failed")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    done: list[int] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone):
            if not done:
                os.kill(event.pid, signal.SIGKILL)
            done.append(event.chunk)

    options = {"model": "demo", "repr_layer": 0, "rows_per_chunk": 1, "workers": 1}
    path = tmp_path / "out.zarr"
    summary = virnuc_dask.run(awkward, path, listener=listen, **options)
    assert (summary.exit_code, summary.workers_lost) == (3, 1)
    assert (tmp_path / "failed").read_text() == ".."

    assert sorted(done) == list(range(whole.chunk_count))
    clear_partial_files_of_the_killed(Store(path))
    assert_ledger(Store(path), whole)
    before = tree(path)
    assert virnuc_dask.resume(path).computed_chunks == 0
    assert tree(path) == before


def test_causes_are_found_however_they_are_chained() -> None:
    cause, said, late = (
        OSError("the cause"),
        KeyError("on the way"),
        RuntimeError("failed to start"),
    )
    said.__cause__, late.__context__ = cause, said
    assert innermost(late) is cause
    late.__suppress_context__ = True
    assert innermost(late) is late
    too_late = TimeoutError()
    too_late.__cause__ = asyncio.CancelledError()  # as asyncio does
    assert innermost(too_late) is too_late


# --- signals ---


def test_a_run_whose_cluster_never_starts_ends_when_it_is_told_to(awkward: Path) -> None:
    """Whatever a start may hang in; here it is imitated by one that never returns."""
    script = (
        "import sys, time\n"
        "from virnuc_dask.runtime import local\n"
        "from virnuc_dask.__main__ import main\n"
        "def hang(*_, **__):\n"
        "    print('starting', file=sys.stderr, flush=True)\n"
        "    while True: time.sleep(1)\n"
        "local.LocalCluster = hang\n"
        "main()\n"
    )
    arguments = map(
        str, ("run", awkward, awkward.with_name("o.zarr"), "--model=demo", "--grace", 0, "-q")
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting" in line:
                process.send_signal(signal.SIGTERM)
                break
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert "stopping takes longer than the grace" in process.stderr.read()


@pytest.mark.slow
def test_a_run_whose_scheduler_stands_still_ends_when_it_is_told_to(
    make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are overdue by then, so that it has asked the scheduler about the workers."""
    store = make_store(VIRAL_PROTEINS, embed=False, rows_per_chunk=1)
    (tmp_path / "faults.json").write_text('{"": "slow"}')
    faults.arm(monkeypatch, tmp_path / "faults.json")
    with started_cluster(tmp_path) as file, connect(str(file)) as client:
        client.wait_for_workers(1)
        scheduler = client.run_on_scheduler(os.getpid)
        resume = ("resume", store.path, "--cluster", file, "--grace", 8, "--deadline-floor", 2)
        run = Run(*resume, program=program(patient=True, deadline_factor=1), stderr=subprocess.PIPE)
        for event in run:
            if event["event"] == "chunk_done" and len(run.computed()) == 4:  # there is a median
                os.kill(scheduler, signal.SIGSTOP)
                time.sleep(4)
                run.process.send_signal(signal.SIGTERM)
                break
        try:
            code = run.finish()
        finally:
            os.kill(scheduler, signal.SIGCONT)
        assert run.process.stderr is not None
        assert code == 128 + signal.SIGTERM, run.process.stderr.read()
    # It ended by itself, and was not cut off.
    assert run.of("stopping")
    assert run.of("run_summary")[0]["interrupted"] == signal.SIGTERM


@pytest.mark.slow
def test_a_terminal_that_is_closed_is_a_signal_like_others(
    make_store: Maker, peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = make_store(peptides, embed=False), tmp_path / "faults.json"
    # Neither the first chunk nor the last: some are missing when the signal comes, however late.
    with faults.holding(monkeypatch, table, faults.motif_of(peptides, 0)):
        run = Run(
            "resume",
            store.path,
            "--workers",
            1,
            # It may be ignored here.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
    workers = set()
    for event in run:
        if event["event"] == "chunk_done" and not workers:
            workers.add(event["pid"])
            run.process.send_signal(signal.SIGHUP)
            faults.release(table)
    assert run.process.wait(timeout=60) == 128 + signal.SIGHUP
    assert run.of("run_summary")[0]["interrupted"] == signal.SIGHUP
    await_end(workers)
    assert Run("resume", store.path, "--workers", 1).finish() == 0
    assert Store(store.path).present().all()


def test_an_interrupted_demo_ends_with_the_runs_summary_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, as a terminal sends it to all of its foreground, with an environment as installed."""
    sources = runpy.run_path(str(ROOT / "start.py"))["INSTALLED_FROM"]
    for name in ("start.py", *sources):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (programs := tmp_path / ".venv" / "bin").mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    texts = ["[dev]", *((ROOT / name).read_text() for name in sources)]
    (tmp_path / ".venv" / "installed").write_text("\n".join(texts))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    table = tmp_path / "faults.json"
    with faults.holding(monkeypatch, table, faults.motif_of(VIRAL_PROTEINS)):
        process = subprocess.Popen(
            [sys.executable, "start.py", "demo", "--workers", "1"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    while not list(tmp_path.glob("demo.zarr/embedding/c.*.0")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    faults.release(table)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "chunks not computed yet" in out
    assert out.splitlines()[-1] == "interrupted; to go on: python3 start.py demo"
    assert "Traceback" not in err
    assert "leaked" not in err


@pytest.mark.slow
def test_a_hangup_under_nohup_is_none(
    make_store: Maker, peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = make_store(peptides, embed=False), tmp_path / "faults.json"
    with faults.holding(monkeypatch, table, faults.motif_of(peptides)):
        run = Run(
            "resume",
            store.path,
            "--workers",
            1,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )
    for event in run:
        if event["event"] == "chunk_done" and len(run.computed()) == 1:
            run.process.send_signal(signal.SIGHUP)
            faults.release(table)
    assert run.process.wait(timeout=60) == 0
