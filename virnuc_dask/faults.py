"""A hook for tests: sequences that harm the process that encodes them.

Set ``VIRNUC_DASK_FAULTS`` to the path of a JSON file such as ``{"WWCWW": "abort"}``, and whatever
encodes a sequence that has this motif ends as it would in a library's bug: ``abort`` and ``kill``
end the process, ``raise`` raises. Unset, as always outside tests, nothing is read.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.packing import Segments

VARIABLE = "VIRNUC_DASK_FAULTS"


def strike(residues: NDArray[np.uint8], segments: Segments) -> None:
    """Do what is asked for, if a segment has one of the motifs.

    Raises
    ------
    RuntimeError
        What ``raise`` stands for.
    """
    if VARIABLE not in os.environ:
        return
    table: dict[str, str] = json.loads(Path(os.environ[VARIABLE]).read_text())
    for start, length in zip(segments.start, segments.length, strict=True):
        sequence = residues[start : start + length].tobytes().decode("ascii")
        for motif, action in table.items():
            if motif in sequence:
                if action == "abort":
                    os.abort()
                if action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(f"a fault was asked for: {motif}")
