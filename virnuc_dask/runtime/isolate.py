"""Compute rows that may kill their process in child processes.

A chunk is suspect if workers died while they computed it. Most suspects are innocent, because
workers vanish for many reasons. So a suspect chunk is computed again in a child process. If the
child dies or hangs, its current rows are halved and a new child continues, until the rows that
do so alone are known. One guilty row of n costs about log2 n children and no worker.
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
from virnuc_dask.runtime.chunk_report import ChunkReport
from virnuc_dask.runtime.deadlines import LOOK_EVERY_S, NO_DEADLINES, NOBODY_LOOKED_S, Deadlines
from virnuc_dask.runtime.embed import (
    UBIQUITIN,
    Rows,
    embed_chunk,
    embed_rows,
    get_encoder,
)
from virnuc_dask.settings import Identity, ModelSpec, Status

# Exit code of a child that raised an error: no row killed it.
_RAISED = 70
# Exit code of a child whose device a row made unusable. It counts as a death.
_DEVICE_LOST = 71


def _nobody() -> None:
    pass


def embed_chunk_in_children(
    path: str,
    chunk: int,
    identity: Identity,
    model: ModelSpec,
    device: str = "cpu",
    deadlines: Deadlines = NO_DEADLINES,
    progressed: Callable[[], None] = _nobody,
    store_id: str | None = None,
    scratch: str | None = None,
) -> ChunkReport:
    """Like `embed_chunk`, in child processes. Rows that kill or hang them are quarantined."""
    embed = partial(embed_in_children, deadlines=deadlines, progressed=progressed, scratch=scratch)
    return embed_chunk(path, chunk, identity, model, device, embed, store_id)


def embed_in_children(
    model: ModelSpec,
    device: str,
    lengths: NDArray[np.int32],
    residues: NDArray[np.uint8],
    identity: Identity,
    deadlines: Deadlines = NO_DEADLINES,
    progressed: Callable[[], None] = _nobody,
    scratch: str | None = None,
) -> Rows:
    """Embed rows in child processes.

    Parameters
    ----------
    model, device, lengths, residues, identity
        As for `embed_in_process`.
    deadlines : Deadlines
        Deadlines of a child: to load the model, and to encode rows.
    progressed : callable
        Called when a child starts, and when it finishes a part.
    scratch : str, optional
        Folder for files that are exchanged with children. Default: that of temporary files.

    Raises
    ------
    VirnucError
        A child raised, or it died or hung before the first row. No row is the cause.
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
    # Rows that overflow in another precision are encoded in float32. A child loads the float32
    # model at the first such row.
    twin = deadlines.start_s if identity.precision != "float32" else 0.0
    halving = Halving(count)
    with TemporaryDirectory(prefix="virnuc-dask-", dir=scratch) as name:
        folder = Path(name)
        np.savez(folder / "rows.npz", lengths=lengths, residues=residues)
        while parts_left := list(halving.left):
            job = {"model": asdict(model), "identity": asdict(identity), "device": device}
            (folder / "job.json").write_text(json.dumps({**job, "parts": parts_left}))
            (folder / "ready").unlink(missing_ok=True)
            parts = {
                _result(folder, *part): twin + deadlines.allowed_s(int(costs[slice(*part)].sum()))
                for part in parts_left
            }
            hung = _run_child(folder, {folder / "ready": deadlines.start_s, **parts}, progressed)
            while halving.left and (result := _result(folder, *halving.left[0])).exists():
                first, last = halving.survived()
                with np.load(result, allow_pickle=False) as arrays:
                    whole.status[first:last] = arrays["status"]
                    whole.embedding[first:last] = arrays["embedding"]
                    if whole.residues is not None:
                        whole.residues[ends[first] : ends[last]] = arrays["residues"]
            if halving.left:
                halving.died(hung=hung)
    for row, state in halving.guilty.items():
        whole.status[row] = state
    return whole


class Halving:
    """Find the rows that kill, by halving each part of a chunk in which a child died.

    Parameters
    ----------
    rows : int

    Attributes
    ----------
    left : deque of (int, int)
        First row, and end, of the parts to try, in this order.
    guilty : dict of int to Status
        Rows with which a child died or hung twice when it had nothing else: children are also
        killed for other reasons.
    """

    def __init__(self, rows: int) -> None:
        self.left = deque([(0, rows)])
        self.guilty: dict[int, Status] = {}
        self._died_alone = set[int]()

    def survived(self) -> tuple[int, int]:
        """Remove the first part, which a child has finished, and return it."""
        return self.left.popleft()

    def died(self, *, hung: bool) -> None:
        """Record that a child died, or hung and was killed, in the first part."""
        first, last = self.left.popleft()
        if last - first > 1:
            middle = (first + last) // 2
            self.left.extendleft([(middle, last), (first, middle)])
        elif first not in self._died_alone:
            self._died_alone.add(first)
            self.left.appendleft((first, last))
        else:
            self.guilty[first] = Status.TIMED_OUT if hung else Status.CRASHED_WORKER


def _result(folder: Path, first: int, last: int) -> Path:
    return folder / f"{first}-{last}.npz"


def _run_child(folder: Path, allowed: dict[Path, float], progressed: Callable[[], None]) -> bool:
    """Start a child that computes the parts of the job in order, and wait for its end.

    Parameters
    ----------
    folder : Path
        Folder of the job.
    allowed : dict of Path to float
        Seconds for each file that the child writes, in order. The first says that it is ready.
    progressed : callable
        Called at the start and for each file.

    Returns
    -------
    bool
        Whether the child hung and was killed.
    """
    ready = next(iter(allowed))
    # The child uses the module search path of this process, and not first the working directory.
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(folder / "stderr", "w+b") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "virnuc_dask.runtime.isolate", str(folder)],
            stdin=subprocess.PIPE,  # closes with this process, which ends the child
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | path,
        )
        with child:
            hung = _watch(child, allowed, progressed)
        code = child.returncode
        if code and (code == _RAISED or not ready.exists()):
            stderr.seek(0)
            last_words = stderr.read().decode(errors="replace")[-500:].strip()
            how = f"hung for {allowed[ready]:.0f} s" if hung else f"ended with {code}"
            raise VirnucError(f"a child process {how}: {last_words}")
    return hung


def _watch(
    child: subprocess.Popen[bytes], allowed: dict[Path, float], progressed: Callable[[], None]
) -> bool:
    """Wait for a child's end, and kill the child if it hangs. Return whether it hung."""
    files, seconds = list(allowed), list(allowed.values())
    made, since = 0, time.monotonic()
    looked = since
    progressed()
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
                progressed()
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
    # If this kills the process, no row is the cause.
    encoder.encode([UBIQUITIN])
    gc.freeze()  # no collection of loaded objects, so the process ends at once
    (folder / "ready").touch()
    for first, last in job["parts"]:
        try:
            rows = embed_rows(
                encoder, lengths[first:last], residues[ends[first] : ends[last]], identity
            )
        except RuntimeError as error:
            # If others use the device's memory, no row is the cause.
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
    # Not sys.stdin: this thread would hold its lock when the child ends by itself.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except Exception as error:
        try:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            # The message fails too if the disk is full. No row is the cause of that either.
            os._exit(_RAISED)
