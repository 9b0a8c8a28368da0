"""Rows that may kill their process: computed in processes made to be killed.

A chunk that was being computed whenever workers died is suspect, but most often innocent: workers
vanish for many reasons. Here it is computed again in a child process. If the child dies or hangs,
the rows that it was at are halved and a new child goes on, until the rows that do so alone are
known: about log2 n deaths for one guilty row of n, and no worker's.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from virnuc_dask.encoder.memory import is_starved
from virnuc_dask.errors import VirnucError
from virnuc_dask.inputs.lengths import encoded_lengths, residues_to_encode
from virnuc_dask.runtime import failures
from virnuc_dask.runtime.embed import (
    BEYOND_DOUBT,
    ChunkReport,
    Rows,
    embed_chunk,
    embed_rows,
    get_encoder,
)
from virnuc_dask.runtime.failures import FOREVER, LOOK_EVERY_S, NOBODY_LOOKED_S, Patience
from virnuc_dask.settings import Identity, ModelSpec, Status

# The child met an error in the ordinary way: no row has killed it.
_RAISED = 70
# A row has made the device useless: as good as a death.
_DEVICE_LOST = 71


def _nobody() -> None:
    pass


def embed_chunk_apart(
    path: str,
    chunk: int,
    identity: Identity,
    model: ModelSpec,
    device: str = "cpu",
    patience: Patience = FOREVER,
    goes_on: Callable[[], None] = _nobody,
    store_id: str | None = None,
) -> ChunkReport:
    """As `embed_chunk`, in child processes; rows that kill or hang them are quarantined."""
    embed = partial(embed_apart, patience=patience, goes_on=goes_on)
    return embed_chunk(path, chunk, identity, model, device, embed, store_id)


def embed_apart(
    model: ModelSpec,
    device: str,
    lengths: NDArray[np.int32],
    residues: NDArray[np.uint8],
    identity: Identity,
    patience: Patience = FOREVER,
    goes_on: Callable[[], None] = _nobody,
) -> Rows:
    """Embed rows in child processes.

    Parameters
    ----------
    model, device, lengths, residues, identity
        As for `embed_here`.
    patience : Patience
        With a child; the time to load the model, and that for some rows.
    goes_on : callable
        Called whenever a child starts, and when one has done a part.

    Raises
    ------
    VirnucError
        A child raised, or died or hung before it came to the rows: no row's fault.
    """
    count = len(lengths)
    encoded = encoded_lengths(lengths, identity.max_residues, identity.long)
    ends = np.concatenate(([0], np.cumsum(encoded)))
    costs = residues_to_encode(lengths, identity.max_residues, identity.long)
    whole = Rows(
        np.full(count, Status.CRASHED_WORKER, np.uint8),
        np.full((count, model.dimension), np.nan, np.float32),
        np.full((int(ends[-1]), model.dimension), np.nan, np.float16)
        if identity.per_residue
        else None,
    )
    # Rows that another precision cannot hold are tried in float32, of which a child that meets the
    # first of them has to load the model.
    twin = patience.start if identity.precision != "float32" else 0.0
    left, died_alone = deque([(0, count)]), set[int]()
    with TemporaryDirectory(prefix="virnuc-dask-") as name:
        folder = Path(name)
        np.savez(folder / "rows.npz", lengths=lengths, residues=residues)
        while left:
            job = {"model": asdict(model), "identity": asdict(identity), "device": device}
            (folder / "job.json").write_text(json.dumps({**job, "parts": list(left)}))
            (folder / "ready").unlink(missing_ok=True)
            parts = {
                _result(folder, *part): twin + patience.allowed(int(costs[slice(*part)].sum()))
                for part in left
            }
            hung = _run_child(folder, {folder / "ready": patience.start, **parts}, goes_on)
            while left and (found := _result(folder, *left[0])).exists():
                first, last = left.popleft()
                with np.load(found, allow_pickle=False) as arrays:
                    whole.status[first:last] = arrays["status"]
                    whole.embedding[first:last] = arrays["embedding"]
                    if whole.residues is not None:
                        whole.residues[ends[first] : ends[last]] = arrays["residues"]
            if left:
                # It died of this part. A row is guilty if that happens twice while it is alone:
                # children too are killed by others.
                first, last = left.popleft()
                if last - first > 1:
                    middle = (first + last) // 2
                    left.extendleft([(middle, last), (first, middle)])
                elif first not in died_alone:
                    died_alone.add(first)
                    left.appendleft((first, last))
                else:
                    whole.status[first] = Status.TIMED_OUT if hung else Status.CRASHED_WORKER
    return whole


def _result(folder: Path, first: int, last: int) -> Path:
    return folder / f"{first}-{last}.npz"


def _run_child(folder: Path, allowed: dict[Path, float], goes_on: Callable[[], None]) -> bool:
    """Have a child do the parts of the job, in order, until it is done or dead.

    Parameters
    ----------
    folder : Path
        With the job.
    allowed : dict of Path to float
        Seconds for each file that it makes, in order; the first says that it is ready.
    goes_on : callable
        Called at the start, and for each file.

    Returns
    -------
    bool
        Whether it hung and was killed.
    """
    ready = next(iter(allowed))
    # Modules are looked for where this process does, and not first in the working directory.
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(folder / "stderr", "w+b") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "virnuc_dask.runtime.isolate", str(folder)],
            stdin=subprocess.PIPE,  # which closes with this process, and with it the child ends
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | path,
        )
        with child:
            hung = _watch(child, allowed, goes_on)
        code = child.returncode
        if code and (code == _RAISED or not ready.exists()):
            stderr.seek(0)
            last_words = stderr.read().decode(errors="replace")[-500:].strip()
            how = f"hung for {allowed[ready]:.0f} s" if hung else f"ended with {code}"
            raise VirnucError(f"a child process {how}: {last_words}")
    return hung


def _watch(
    child: subprocess.Popen[bytes], allowed: dict[Path, float], goes_on: Callable[[], None]
) -> bool:
    """Wait for a child's end; kill it if it hangs, and say whether that was so."""
    files, seconds = list(allowed), list(allowed.values())
    made, since = 0, time.monotonic()
    looked = since
    goes_on()
    while True:
        try:
            child.wait(LOOK_EVERY_S)
            return False
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if now - looked > NOBODY_LOOKED_S:
                since += now - looked
            looked = now
            while made < len(files) and files[made].exists():
                made, since = made + 1, now
                goes_on()
            if now - since > seconds[min(made, len(seconds) - 1)]:
                child.kill()
                return True


def _main(folder: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    model, identity = ModelSpec(**job["model"]), Identity.from_json(job["identity"])
    with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
        lengths, residues = arrays["lengths"], arrays["residues"]
    ends = np.concatenate(([0], np.cumsum(lengths)))
    encoder = get_encoder(model, job["device"])
    # Whoever dies of this does not die of a row.
    encoder.encode([BEYOND_DOUBT])
    gc.freeze()  # nobody looks through what is loaded again: it ends at once
    (folder / "ready").touch()
    for first, last in job["parts"]:
        try:
            rows = embed_rows(
                encoder, lengths[first:last], residues[ends[first] : ends[last]], identity
            )
        except RuntimeError as error:
            # If others have all memory of the device, no row is to blame.
            if failures.is_sticky(error) and not is_starved(torch.device(job["device"])):
                os._exit(_DEVICE_LOST)
            raise
        arrays = {"status": rows.status, "embedding": rows.embedding}
        if rows.residues is not None:
            arrays["residues"] = rows.residues
        partial = folder / "partial.npz"
        np.savez(partial, **arrays)
        partial.rename(_result(folder, first, last))


def _end_with_parent() -> None:
    # Not sys.stdin, whose lock a thread that still waits would hold at the child's own end.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except Exception as error:
        try:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            # A full disk may not take even that: no row's fault either.
            os._exit(_RAISED)
