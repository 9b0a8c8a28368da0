"""Rows of stores, and of tables made of them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from typing import Any

import numpy as np
from numpy.typing import NDArray

import virnuc_dask
from virnuc_dask.store.store import HEADERS, Store

# Identifiers that would do harm if they were more than data.
NAMES = (
    "../../../../etc/x",
    "/etc/passwd",
    "=cmd|'/c'!A1",
    "\x1b]0;owned\x07\x1b[2J",
    "c.0.0",
    "zarr.json",
    "%n%s{0}${HOME}`id`",
    "x" * 1_000_000,
)


def all_rows(store: Store) -> tuple[list[str], NDArray[np.float64]]:
    """Identifiers and vectors of a whole store."""
    data = virnuc_dask.open_store(store.path).load()
    return data.sequence_id.values.tolist(), data.embedding.values.astype(np.float64)


def read_tsv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))


def move_chunks(store: Store, source: Store, chunks: Any) -> None:
    for chunk in chunks:
        store.write_chunk(chunk, *source.read_chunk(chunk))


def forget_headers(store: Store) -> None:
    """Make a store as it was before descriptions and sources were kept."""
    root = store.path / "zarr.json"
    document = json.loads(root.read_text())
    del document["attributes"]["virnuc_dask"]["headers"]
    document["attributes"]["coordinates"] = "sequence_id length status"
    root.write_text(json.dumps(document))
    for name in HEADERS:
        shutil.rmtree(store.path / name)
