"""Processes that do one job to a store, to be killed, cut off or met by errors at its system calls.

They are forked from one that has loaded everything, so that a death takes a tenth of a second and a
sweep can be exhaustive.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SERVER = """
import ctypes, functools, os, signal, sys, tempfile, traceback
import torch, zarr
from virnuc_dask import files
from virnuc_dask.runtime import embed, prepare
from virnuc_dask.store import create, directory, store
from virnuc_dask.settings import Settings
from virnuc_dask.encoder.weights import describe, load_checkpoint

# One thread opens and writes all of zarr's files: a call's number is the same each time.
zarr.config.set({"threading.max_workers": 1})
torch.set_num_threads(1)
MODEL = describe(load_checkpoint("demo"), repr_layer=0)


def embed_chunks(path, chunks):
    identity = store.Store(path).identity
    for chunk in chunks:
        embed.embed_chunk(path, chunk, identity, MODEL)
        yield chunk


def make(source, path, settings):
    prepare.prepare(source, path, Settings("demo", **settings), lambda event: None)


# Once, so that no other files are left to be read.
prepare.version = functools.cache(prepare.version)
with tempfile.TemporaryDirectory() as folder:
    source, path = os.path.join(folder, "a.faa"), os.path.join(folder, "a.zarr")
    with open(source, "w") as file:
        file.write(">a\\nMKV\\n")
    make(source, path, {"repr_layer": 0})
    list(embed_chunks(path, [0]))
exec(sys.argv[1])
print("ready", flush=True)
for job in sys.stdin:
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # no longer than the server
        ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # may be traced by anyone
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            exec(job)
            code = 0
        except OSError as error:
            code = error.errno
        except BaseException:
            traceback.print_exc()
            code = 255
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Forks processes that have everything loaded and are stopped right before a job.

    Parameters
    ----------
    mutation : str
        Statements that spoil the code under test, for the tests of the tests.
    """

    def __init__(self, mutation: str = "") -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, mutation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def start(self, job: str) -> int:
        """Fork a process for one job; it waits for SIGCONT."""
        assert self._server.stdin is not None
        self._server.stdin.write(job + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def end(self) -> int:
        """Exit code of the process: 0, the errno of its OSError, or minus the signal."""
        return int(self._answer())

    def run(self, job: str) -> int:
        pid = self.start(job)
        wait_until_stopped(pid)
        os.kill(pid, signal.SIGCONT)
        return self.end()

    def trace(self, job: str, log: Path, *options: str) -> int:
        """Run a job under strace."""
        skip_without_strace()
        log.unlink(missing_ok=True)
        pid = self.start(job)
        wait_until_stopped(pid)  # it may be traced from then on
        arguments = ["-y", "-qq", "-o", str(log), "-p", str(pid), *options]
        strace = subprocess.Popen(["strace", *arguments])
        wait_for(lambda: log.exists() and "stopped by SIGSTOP" in log.read_text())
        os.kill(pid, signal.SIGCONT)
        code = self.end()
        assert strace.wait(timeout=60) == 0
        return code


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_until_stopped(pid: int) -> None:
    """Until no thread of a process runs, in user code or in the kernel."""

    def stopped() -> bool:
        threads = Path(f"/proc/{pid}/task").glob("*/stat")
        return {t.read_text().rpartition(")")[2].split()[0] for t in threads} <= {"T", "t"}

    wait_for(stopped)


@cache
def skip_without_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: nothing was killed at its system calls")
    probe = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"processes may not be traced here: {probe.stderr.decode().strip()}")
