"""What a worker reports of a chunk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """Result of a task. The embeddings are only in the store.

    Attributes
    ----------
    chunk, rows : int
    counts : dict of str to int
        Rows by state; empty if the chunk was already present. The store's `status` has all rows.
    computed : bool
        False if the chunk was already present: another task wrote it, or this task did before its
        worker died.
    read_s, wait_s, compute_s, write_s : float
        Seconds of each part. `wait_s` is the time until another chunk released the device.
    fill : float
        Tokens of the batches as a share of their capacity; 0 if nothing was encoded.
    memory : int
        Peak bytes of device memory of this process; on a CPU, the peak RSS of the process.
    gpu : int, optional
        Utilisation of the GPU during the last second or less, in per cent.
    pid : int
        Process that computed the chunk.
    """

    chunk: int
    rows: int
    counts: dict[str, int]
    computed: bool
    read_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    fill: float = 0.0
    memory: int = 0
    gpu: int | None = None
    pid: int = field(default_factory=os.getpid)
