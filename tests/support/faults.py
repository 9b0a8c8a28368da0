"""Sequences that harm the process that encodes them, as a bug in a library would.

`arm` names a JSON file such as ``{"WWCWW": "abort"}`` to this process and to all that it starts. A
process that encodes a sequence with this motif then fails. A list of actions applies to the first,
second, … sequence with the motif, counted over all processes; after its end nothing happens. The
size of the file ``MOTIF.met`` beside the JSON file is the count.

========== =========================================================
``abort``  ends the process by SIGABRT
``kill``   ends it by SIGKILL
``raise``  raises RuntimeError
``cuda``   raises torch's error for a lost GPU context
``memory`` allocates memory until none is left
``nan``    makes the sequence's result NaN
``hang``   never returns
``hold``   returns once `release` was called, in any process
``slow``   takes one second longer
``pass``   does nothing
========== =========================================================
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VARIABLE = "VIRNUC_DASK_FAULTS"
PRELOAD = Path(__file__).parent / "preload"
_ENCODER = "virnuc_dask.encoder.encoder"


def arm(patch: Any, table: Path) -> None:
    """From here on the motifs of a table do harm, in this process and in those that it starts."""
    patch.setenv(VARIABLE, str(table))
    path = os.environ.get("PYTHONPATH")
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(PRELOAD), path))))
    patch.syspath_prepend(PRELOAD)  # which is handed on to child processes
    encoder = import_module(_ENCODER).Encoder
    patch.setattr(encoder, "_encode_batch", harmful(encoder._encode_batch))


def await_met(table: Path, motif: str) -> None:
    """Wait until a sequence with a motif has been met: the harm has begun."""
    met, deadline = table.with_name(f"{motif}.met"), time.monotonic() + 120
    while not met.exists():
        assert time.monotonic() < deadline, f"{motif!r} was not met"
        time.sleep(0.02)


@contextmanager
def holding(patch: Any, table: Path, motif: str) -> Iterator[None]:
    """What is started within is held at a motif until `release`, so it cannot end before that."""
    table.write_text(json.dumps({motif: "hold"}))
    with patch.context() as inner:
        arm(inner, table)
        yield


def motif_of(inputs: Path, record: int = -1) -> str:
    """The first residues of a record, which no other has; by default the last one's."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser
    from xopen import xopen

    with xopen(inputs) as text:
        sequences = [sequence for _, sequence in SimpleFastaParser(text)]
    motif = sequences.pop(record)[:12]
    assert not any(motif in other for other in sequences)
    return motif


def release(table: Path) -> None:
    """Let go on what is held, and what would be from here on."""
    _released(table).touch()


def _released(table: Path) -> Path:
    return table.with_suffix(".released")


def install_with_the_encoder() -> None:
    """Have the encoder's class changed when its module is imported, if it ever is."""

    class Finder(MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> Any:
            if name != _ENCODER:
                return None
            sys.meta_path.remove(self)
            spec = find_spec(name)
            assert spec is not None
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                module.Encoder._encode_batch = harmful(module.Encoder._encode_batch)

            loader.exec_module = execute_and_change
            return spec

    sys.meta_path.insert(0, Finder())


def harmful(encode_batch: Any) -> Any:
    """Wrap the method that encodes a batch."""

    @wraps(encode_batch)
    def encode(self: Any, residues: Any, segments: Any, batch: Any, per_residue: bool) -> Any:
        spoiled = []
        if VARIABLE in os.environ:
            spoiled = [_is_spoiled(residues, segments, segment) for segment in batch.segments]
        part = encode_batch(self, residues, segments, batch, per_residue)
        if any(spoiled):
            import numpy as np

            part.pooled[np.array(spoiled)] = np.nan
            if part.residues is not None:
                part.residues[np.repeat(spoiled, segments.length[batch.segments])] = np.nan
        return part

    return encode


def _is_spoiled(residues: Any, segments: Any, segment: int) -> bool:
    """Do to a segment what is due, and say whether its result must become NaN."""
    path = Path(os.environ[VARIABLE])
    table: dict[str, str | list[str]] = json.loads(path.read_text())
    first = segments.start[segment]
    sequence = residues[first : first + segments.length[segment]].tobytes().decode("ascii")
    is_spoiled = False
    for motif in filter(sequence.__contains__, table):
        action = _due(table[motif], path.with_name(f"{motif}.met"))
        while action == "hold" and not _released(path).exists():
            time.sleep(0.02)
        _act(action)
        is_spoiled |= action == "nan"
    return is_spoiled


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
            import numpy as np

            held = []
            while True:  # reaches a limit of addresses at once, a limit of memory soon
                held.append((b"\1" * 2**24, np.empty(2**28, np.uint8)))
        case "hang":
            while True:
                time.sleep(60)
        case "slow":
            time.sleep(1)
