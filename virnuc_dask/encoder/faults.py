"""A hook for tests: sequences that harm the process that encodes them.

Set ``VIRNUC_DASK_FAULTS`` to the path of a JSON file such as ``{"WWCWW": "abort"}``. A process that
encodes a sequence with this motif then fails as it would through a bug in a library. A list of
actions applies to the first, second, … sequence with the motif, counted over all processes. After
the end of the list nothing happens. The size of the file ``MOTIF.met`` beside the JSON file is the
count. Outside tests the variable is never set, and nothing is read.

========== =========================================================
``abort``  ends the process by SIGABRT
``kill``   ends it by SIGKILL
``raise``  raises RuntimeError
``cuda``   raises torch's error for a lost GPU context
``memory`` allocates memory until none is left
``nan``    makes the sequence's result NaN
``hang``   never returns
``slow``   takes one second longer
``pass``   does nothing
========== =========================================================
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.encoder.packing import Segments

VARIABLE = "VIRNUC_DASK_FAULTS"


def inject(
    residues: NDArray[np.uint8], segments: Segments, chosen: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Cause the faults of all motifs that the chosen segments contain.

    Returns
    -------
    ndarray, bool, shape (chosen,)
        True for segments with a result that must become NaN.

    Raises
    ------
    RuntimeError
        By ``raise`` and ``cuda``.
    MemoryError
        By ``memory``, where a limit is set.
    """
    spoiled = np.zeros(len(chosen), np.bool_)
    if VARIABLE not in os.environ:
        return spoiled
    path = Path(os.environ[VARIABLE])
    table: dict[str, str | list[str]] = json.loads(path.read_text())
    for number, segment in enumerate(chosen):
        first = segments.start[segment]
        sequence = residues[first : first + segments.length[segment]].tobytes().decode("ascii")
        for motif in filter(sequence.__contains__, table):
            action = _due(table[motif], path.with_name(f"{motif}.met"))
            _act(action)
            spoiled[number] |= action == "nan"
    return spoiled


def _due(actions: str | list[str], count: Path) -> str:
    """The action that is due. A file's size is the counter: it survives a killed process."""
    with open(count, "ab") as file:
        file.write(b".")
        file.flush()
        met = file.tell()
    if isinstance(actions, str):
        return actions
    return actions[met - 1] if met <= len(actions) else "pass"


def _act(action: str) -> None:
    match action:
        case "abort":
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("an injected fault")
        case "cuda":
            raise RuntimeError("CUDA error: device-side assert triggered")
        case "memory":
            held = []
            while True:  # reaches a limit of addresses at once, a limit of memory soon
                held.append((b"\1" * 2**24, np.empty(2**28, np.uint8)))
        case "hang":
            while True:
                time.sleep(60)
        case "slow":
            time.sleep(1)
