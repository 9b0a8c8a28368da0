"""Check a store: read, decode and compare everything in it."""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from virnuc_dask.errors import StoreError
from virnuc_dask.inputs.lengths import states_before_encoding
from virnuc_dask.inputs.records import Block, InputDigest, Origin
from virnuc_dask.settings import Status
from virnuc_dask.store.results import Result, damaged_results, open_result, result_names
from virnuc_dask.store.store import (
    CHUNK_FILE,
    HEADERS,
    MIN_CHUNK_BYTES,
    SEQUENCES_PER_CHUNK,
    Store,
    is_embedded,
    origin_arrays,
    residue_slots,
)


def check_chunk(store: Store, chunk: int, *, sequences: bool = True) -> str | None:
    """Read and decode a chunk. Return its problem, or None.

    There are four checks: all files are present and not too small; all files decode and match
    their checksums; each status code is known, final, and agrees with the sequence; embeddings are
    finite exactly where the status says so. Without `sequences` the status is not compared with
    the sequences; use this if the sequence arrays are damaged.
    """
    for key in store.keys(chunk):
        array, size = key.partition("/")[0], store.location.size(key)
        if size is None:
            return f"{array} chunk is missing"
        if size < MIN_CHUNK_BYTES:
            return f"{array} chunk has {size} bytes"
    try:
        status, embedding = store.read_chunk(chunk)
        residues = store.read_residue_embeddings(chunk) if store.identity.per_residue else None
    except (ValueError, RuntimeError) as error:
        return f"does not decode: {error}"
    if not np.isin(status, [s for s in Status if s is not Status.PENDING]).all():
        return "status has a code that no finished row can have"
    embedded = is_embedded(status)
    if sequences:
        lengths, letters = store.read_rows(chunk)
        identity = store.identity
        expected = states_before_encoding(lengths, letters, identity.max_residues, identity.long)
        by_encoder = is_embedded(expected) & (status >= Status.OUT_OF_MEMORY)
        if (status != np.where(by_encoder, status, expected)).any():
            return "status does not agree with the sequences"
        if residues is not None:
            should_be = np.zeros(len(residues), np.bool_)
            kept = np.repeat(embedded, store.encoded(lengths))
            should_be[: len(kept)] = kept
            there, absent = np.isfinite(residues).all(axis=1), np.isnan(residues).all(axis=1)
            if not (np.where(should_be, there, absent)).all():
                return "the residue embeddings do not agree with the status"
    if not np.isfinite(embedding[embedded]).all():
        return "an embedded row is not finite"
    if not np.isnan(embedding[~embedded]).all():
        return "a quarantined row has an embedding"
    return None


def check_sequences(store: Store) -> str | None:
    """Decode the sequence arrays and compare their digest with the input's.

    Returns
    -------
    str, optional
        The problem, or None.
    """
    digest = InputDigest()
    try:
        if store.identity.per_residue:
            array, encoded = store.array("residue_embedding"), store.encoded(store.lengths())
            slots, total = residue_slots(encoded, store.identity.rows_per_chunk, array.chunks[0])
            if total != array.shape[0] or (slots != store.array("residue_slot")[:]).any():
                return "`residue_slot` does not agree with the lengths"
        for start in range(0, store.records, SEQUENCES_PER_CHUNK):
            rows = slice(start, min(start + SEQUENCES_PER_CHUNK, store.records))
            lengths = np.asarray(store.array("length")[rows], np.int32)
            offsets = np.asarray(store.array("offset")[rows], np.int64)
            if (lengths < 0).any() or (np.diff(offsets) != lengths[:-1]).any():
                return "`length` and `offset` do not agree"
            end = int(offsets[-1]) + int(lengths[-1])
            residues = np.asarray(store.array("residues")[int(offsets[0]) : end], np.uint8)
            ids = [str(name) for name in store.array("sequence_id")[rows]]
            digest.update(Block(ids, lengths, residues))
            if problem := _check_headers(store, rows):
                return problem
            if origin := [name for name in origin_arrays(store.identity) if name != "read_id"]:
                arrays = {name: np.asarray(store.array(name)[rows]) for name in origin}
                digest.update_origin(Origin([], **arrays))
        if "read_id" in store.names:
            _add_reads(store, digest)
    except (ValueError, RuntimeError) as error:
        return f"sequence arrays do not decode: {error}"
    if digest.hexdigest() != store.identity.input_sha256:
        return "sequence arrays do not hold the input of the store"
    return None


def _check_headers(store: Store, rows: slice) -> str | None:
    """Problem of the header arrays, which the digest does not cover, or None."""
    if not set(HEADERS) <= store.names:
        return None
    chunk = f"c.{rows.start // SEQUENCES_PER_CHUNK}"
    for name in HEADERS:
        if store.location.size(f"{name}/{chunk}") is None:  # it would read as empty headers
            return f"a chunk of `{name}` is missing"
    _ = store.array("description")[rows]
    sources = store.array("source")
    numbers, files = np.asarray(sources[rows]), sources.attrs.get("files")
    if not isinstance(files, list) or not ((numbers >= 0) & (numbers < len(files))).all():
        return "`source` names unknown inputs"
    return None


def _add_reads(store: Store, digest: InputDigest) -> None:
    """Add the identifiers of all input records, also of records without a row."""
    reads = store.array("read_id")
    for start in range(0, reads.shape[0], SEQUENCES_PER_CHUNK):
        ids = [str(name) for name in reads[start : start + SEQUENCES_PER_CHUNK]]
        none = np.array([], np.int64)
        digest.update_origin(Origin(ids, read=none, start=none))


def check_results(store: Store) -> dict[tuple[str, int], str]:
    """Problem of each damaged chunk of results, by the result's name and the chunk.

    A chunk is good if it decodes, and exactly the rows with an embedding have a finite value.
    Damaged metadata of a result is reported as chunk -1.
    """
    damaged = damaged_results(store)
    problems = {(name, -1): problem for name, problem in damaged.items()}
    present = store.present()

    def check(result: Result, chunk: int) -> None:
        if problem := _problem_of_result(result, chunk, bool(present[chunk])):
            problems[result.name, chunk] = problem

    with ThreadPoolExecutor(8) as pool:
        for name in result_names(store):
            if name not in damaged:
                result = open_result(store, name)
                # `touched`, not `present`: a file that is too small is damage too.
                chunks = np.flatnonzero(result.touched()).tolist()
                deque(pool.map(check, repeat(result), chunks), maxlen=0)
    return dict(sorted(problems.items()))


def _problem_of_result(result: Result, chunk: int, is_embedded_chunk: bool) -> str | None:
    store = result.store
    try:
        values = result.read(store.rows(chunk))
        status = store.read_status(chunk) if is_embedded_chunk else None
    except StoreError as error:
        return str(error)
    except (ValueError, RuntimeError):
        return None  # `status` is damaged; `check_chunk` reports that
    if status is None:
        return None
    has_value = values >= 0 if result.kind == "cluster" else np.isfinite(values)
    if result.kind == "map":
        has_value = has_value.all(axis=1)
    if (has_value != is_embedded(status)).any():
        return "the rows with a value are not the rows with an embedding"
    return None


def leftovers(store: Store) -> list[str]:
    """Keys of files that belong neither to the store nor to a living writer.

    Readers ignore these files. A `.partial` file is listed if no process holds its lock. Locks of
    another host may not be visible here, so its files are listed once they are a day old.
    """
    patterns = {name: CHUNK_FILE.get(name, re.compile(r"c\.(\d+)")) for name in store.names}
    limits = {name: store.array(name).cdata_shape[0] for name in store.names}
    damaged = damaged_results(store)
    for name in result_names(store):
        is_whole = name not in damaged
        patterns[name] = open_result(store, name).chunk_file if is_whole else re.compile(r"c\..*")
        limits[name] = store.chunk_count
    strays = [entry for entry in store.location.listing() if entry not in {*patterns, "zarr.json"}]
    for name, pattern in patterns.items():
        limit = limits[name]
        for entry, size in store.location.listing(name).items():
            match = pattern.fullmatch(entry)
            is_chunk = match is not None and size is not None
            is_chunk &= name in damaged or (match is not None and int(match[1]) < limit)
            if entry != "zarr.json" and not is_chunk:
                strays.append(f"{name}/{entry}")
    return sorted(filter(store.location.is_abandoned, strays))
