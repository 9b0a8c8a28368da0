"""Damage to a finished store, and what must be noticed of it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree
from harness import assert_ledger

import virnuc_dask
from virnuc_dask.errors import StoreError
from virnuc_dask.store import status, verify
from virnuc_dask.store.store import MIN_CHUNK_BYTES, Store

# Half of the proteins are longer, here and there: no two chunks have the same status.
SETTINGS = {"per_residue": True, "max_residues": 300}


def copied(whole: Store, folder: Path) -> Store:
    """A copy in a folder, to be damaged."""
    return Store(shutil.copytree(whole.path, folder / "out.zarr"))


def file_of(store: Store, array: str, chunk: int) -> Path:
    """A chunk's file; of several, the first."""
    return store.path / next(key for key in store.keys(chunk) if key.startswith(f"{array}/"))


def flip(content: bytes, bit: int) -> bytes:
    return bytes(byte ^ (1 << bit % 8) * (n == bit // 8) for n, byte in enumerate(content))


def check_damage(
    store: Store,
    whole: Store,
    array: str,
    chunk: int,
    content: bytes,
    client: Any,
    *,
    decodes: bool = False,
) -> None:
    """Damage a file. What is too small is no chunk; all else is for `verify` to find.

    `status` counts files. So does a plain `resume`, which also decodes the states, to sum them up.
    """
    file = file_of(store, array, chunk)
    assert content != file.read_bytes()
    healthy = tree(store.path)
    file.write_bytes(content)
    damaged = tree(store.path)
    stunted = len(content) < MIN_CHUNK_BYTES
    missing = np.flatnonzero(~status.status(store.path).present).tolist()
    assert missing == [chunk] * stunted, "a file's name alone is trusted"
    report = verify.verify(store.path)
    assert (list(report.bad), report.exit_code, report.sequences) == ([chunk], 4, None)
    if not stunted:
        if array == "status" and not decodes:
            with pytest.raises(StoreError, match=rf"status of chunk {chunk} .* `verify --repair`"):
                virnuc_dask.resume(store.path, client=client)
        else:
            assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
        assert tree(store.path) == damaged
        assert list(verify.verify(store.path, repair=True).bad) == [chunk]
        assert not store.touched()[chunk]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert_ledger(store, whole)
    mended = tree(store.path)
    touched = set(store.keys(chunk))
    assert {n for n in healthy if healthy[n] != mended[n]} <= touched
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
    assert tree(store.path) == mended


def check_flipped_bits(store: Store, array: str, bits: int) -> None:
    """`verify` finds every one of some random bits of a file; the rest of it is healthy."""
    file = file_of(store, array, 3)
    content = file.read_bytes()
    assert verify.verify(store.path).exit_code == 0
    for bit in random.Random(array).sample(range(8 * len(content)), bits):
        file.write_bytes(flip(content, bit))
        assert list(verify.verify(store.path).bad) == [3], f"bit {bit} is not noticed"
    file.write_bytes(content)
    assert verify.verify(store.path).exit_code == 0
