"""Power cuts: what was acknowledged is there afterwards, and what is there is whole.

A store on ext4 in an image file, mounted by loop; a process that fills it is stopped, and the image
is copied as it is, without a sync. The copy is what a disk would hold whose machine lost its power:
only what was flushed has reached it. Mounting it replays the journal, as the next boot would.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Maker, chunk_bytes
from nursery import Nursery, wait_for, wait_until_stopped

from virnuc_dask.store import verify
from virnuc_dask.store.store import Store

SETTINGS = {"rows_per_chunk": 4, "repr_layer": 0, "per_residue": True}
# Nothing reaches the disk by the passing of time while a test lasts: only what was synced.
OPTIONS = "loop,commit=300"


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    arguments = ["mount", "-o", OPTIONS, str(image), str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount an image here, so no power was cut: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass(frozen=True)
class Lab:
    """A disk to write to, and the copies that power cuts have left of it."""

    image: Path
    disk: Path
    whole: Store
    cuts: list[tuple[Path, list[int]]] = field(default_factory=list)

    @property
    def source(self) -> str:
        return str(VIRAL_PROTEINS)

    @property
    def store(self) -> Path:
        return self.disk / "out.zarr"

    @property
    def acknowledged(self) -> Path:
        """Where the process that writes says, on another disk, what it has finished."""
        return self.image.with_name("acknowledged")

    def said(self) -> list[int]:
        """Chunks that are acknowledged."""
        file = self.acknowledged
        return [int(chunk) for chunk in file.read_text().split()] if file.exists() else []

    def copy(self, number: int) -> Path:
        """The image as a cut leaves it."""
        return self.image.with_name(f"cut{number}.img")

    def cut(self) -> None:
        """Copy the image; the process that writes to it must have been stopped."""
        said, copy = self.said(), self.copy(len(self.cuts))
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        self.cuts.append((copy, said))


@contextmanager
def lab_in(folder: Path, make_store: Maker) -> Iterator[Lab]:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed, so no power was cut")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(2**26)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    whole = make_store(VIRAL_PROTEINS, "whole.zarr", **SETTINGS)
    with mounted(image, folder / "disk") as disk:
        yield Lab(image, disk, whole)


def making(lab: Lab) -> str:
    return f"make({lab.source!r}, {str(lab.store)!r}, {SETTINGS})"


def filling(lab: Lab, after_each: str = "") -> str:
    """Fill the store, and say of every chunk when it is done."""
    return (
        f"said = os.open({str(lab.acknowledged)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY);"
        f" [(os.write(said, b'%d ' % chunk), {after_each or None})"
        f" for chunk in embed_chunks({str(lab.store)!r}, range({lab.whole.chunk_count}))]"
    )


def cut_right_after_acknowledgements(nursery: Nursery, lab: Lab) -> None:
    """The process stops itself as soon as it has said that a chunk is done."""
    stop = "chunk % 16 == 7 and os.kill(os.getpid(), signal.SIGSTOP)"
    pid = nursery.start(filling(lab, stop))
    for _ in range(1 + sum(chunk % 16 == 7 for chunk in range(lab.whole.chunk_count))):
        wait_until_stopped(pid)
        lab.cut()
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.005)
    assert nursery.end() == 0


def cut_anywhere(nursery: Nursery, lab: Lab) -> None:
    """The process is stopped whatever it is doing, before it is beyond the next goal."""
    dice = random.Random(4)
    goals = sorted(dice.sample(range(lab.whole.chunk_count - 15), 8))
    # It waits there for the cut before.
    copies = {n: str(lab.copy(k)) for k, n in enumerate([*goals[1:], lab.whole.chunk_count])}
    is_cut = f"lambda: os.path.exists({copies}.get(chunk + 1, '/'))"
    pid = nursery.start(
        f"import time; {filling(lab, f'[time.sleep(0.002) for _ in iter({is_cut}, True)]')}"
    )
    wait_until_stopped(pid)
    os.kill(pid, signal.SIGCONT)
    for goal in goals:
        wait_for(lambda goal=goal: len(lab.said()) >= goal)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(pid)
        lab.cut()
        os.kill(pid, signal.SIGCONT)
    assert nursery.end() == 0


def check_cuts(nursery: Nursery, lab: Lab, cut: Any) -> None:
    """What was acknowledged before a cut is there after it, and whole; the rest can be computed."""
    assert nursery.run(making(lab)) == 0
    subprocess.run(["sync", "-f", str(lab.disk)], check=True)  # making it is another test's matter
    cut(nursery, lab)
    expected = chunk_bytes(lab.whole.path)
    seen = {len(said) for _, said in lab.cuts}
    assert len(seen) > 3, "the cuts were not in the middle"
    for image, said in lab.cuts:
        with mounted(image, image.with_suffix("")) as disk:
            store = Store(disk / "out.zarr")
            present = np.flatnonzero(store.present()).tolist()
            assert set(said) <= set(present), "an acknowledged chunk is lost"
            assert len(present) <= len(said) + 1
            for chunk in present:
                for key in store.keys(chunk):
                    assert (store.path / key).read_bytes() == expected[key]
            # A chunk that is not present may have some of its files, and these are whole as well.
            bad = verify.verify(store.path).bad
            assert all(chunk not in present for chunk in bad)
            assert all(problem.endswith("chunk is missing") for problem in bad.values()), bad


def check_cut_after_an_ingest(nursery: Nursery, lab: Lab) -> None:
    """A store that has just been made is there after a cut, with everything in it."""
    pid = nursery.start(f"{making(lab)}; os.kill(os.getpid(), signal.SIGSTOP)")
    wait_until_stopped(pid)
    os.kill(pid, signal.SIGCONT)
    wait_for(lab.store.exists)
    wait_until_stopped(pid)
    lab.cut()
    os.kill(pid, signal.SIGCONT)
    assert nursery.end() == 0
    ((image, _),) = lab.cuts
    with mounted(image, image.with_suffix("")) as disk:
        assert sorted(os.listdir(disk)) == ["lost+found", "out.zarr"], "the store is lost"
        for file in lab.disk.rglob("*"):
            copy = disk / file.relative_to(lab.disk)
            assert copy.exists(), f"{copy.name} is lost"
            assert copy.is_dir() or copy.read_bytes() == file.read_bytes(), f"{copy} is damaged"
