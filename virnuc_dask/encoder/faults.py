"""A hook for tests: sequences that harm the process that encodes them.

Set ``VIRNUC_DASK_FAULTS`` to the path of a JSON file such as ``{"WWCWW": "abort"}``, and whatever
encodes a sequence that has this motif fares as it would with a library's bug. A list of actions is
for the first, second, … time that the motif is met, in whatever process; after its end nothing
happens. How often a motif was met is the size of the file ``MOTIF.met`` beside the table. Unset, as
always outside tests, nothing is read.

========== =========================================================
``abort``  ends the process by SIGABRT
``kill``   ends it by SIGKILL
``raise``  raises RuntimeError
``cuda``   raises what torch does once a GPU's context is lost
``memory`` takes memory until there is none
``nan``    makes the sequence's result NaN
``hang``   does not return
``slow``   takes a second longer
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
    """Do what is asked for, if one of the chosen segments has one of the motifs.

    Returns
    -------
    ndarray, bool, shape (chosen,)
        Whose results are to be NaN.

    Raises
    ------
    RuntimeError
        What ``raise`` and ``cuda`` stand for.
    MemoryError
        What ``memory`` ends with, where a limit is set.
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
    """The action that is due; a file's size counts, for processes that end without a word."""
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
            raise RuntimeError("a fault was asked for")
        case "cuda":
            raise RuntimeError("CUDA error: device-side assert triggered")
        case "memory":
            held = []
            while True:  # a limit of addresses is met at once, one of memory soon
                held.append((b"\1" * 2**24, np.empty(2**28, np.uint8)))
        case "hang":
            while True:
                time.sleep(60)
        case "slow":
            time.sleep(1)
