"""One chunk at a time on a device, over threads and processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from virnuc_dask.encoder import device_lock
from virnuc_dask.encoder.device_lock import DeviceLock

HOLD = """
import time
from virnuc_dask.encoder.device_lock import _file_lock
lock = _file_lock("card")
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceLock:
    """A lock of a card that is not here: the lock's file is as it would be."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock = DeviceLock(torch.device("cpu"))
    lock._processes = device_lock._file_lock("card")
    return lock


def held_elsewhere(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_threads_wait_for_each_other() -> None:
    lock, inside, most = DeviceLock(torch.device("cpu")), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with lock:
                inside += 1
                most = max(most, inside)
                time.sleep(0.0001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.mark.slow
def test_a_process_that_is_killed_releases_its_lock(card: DeviceLock, tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path)
    killer = threading.Timer(0.5, process.kill)
    began = time.monotonic()
    killer.start()
    with card:
        waited = time.monotonic() - began
    assert 0.4 < waited < device_lock._LONGEST_WAIT_S / 2
    process.wait()


@pytest.mark.slow
def test_a_process_that_hangs_keeps_nobody_for_ever(
    card: DeviceLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_lock, "_LONGEST_WAIT_S", 0.3)
    process = held_elsewhere(tmp_path)
    with card:
        assert process.poll() is None
    with card:  # and it is given back as if it had been had
        pass
    process.kill()
    process.wait()


def test_without_locks_of_files_only_threads_wait(
    card: DeviceLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))  # no folder can be made there
    nowhere = DeviceLock(torch.device("cpu"))
    nowhere._processes = device_lock._file_lock("card")
    assert_only_threads_wait(nowhere)
    monkeypatch.setattr("fcntl.flock", refuse)  # as some network file systems do
    for _ in range(2):
        assert_only_threads_wait(card)


def assert_only_threads_wait(lock: DeviceLock) -> None:
    assert lock._processes is not None
    with lock:
        assert lock._threads.locked()
        assert not lock._processes.is_locked


def test_an_interrupt_while_waiting_leaves_the_lock_free(
    card: DeviceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(card._processes, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), card:
        pass
    assert not card._threads.locked()


def test_a_link_is_not_followed(card: DeviceLock, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / f"virnuc_dask-{os.getuid()}-card.lock").symlink_to(target)
    with card:
        assert card._processes is not None
        assert not card._processes.is_locked
    assert not target.exists()
