"""Read and decode everything in a store, and remove damaged chunks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from virnuc_dask.store.chunk_checks import check_chunk, check_results, check_sequences, leftovers
from virnuc_dask.store.results import open_result, results_of
from virnuc_dask.store.store import TASK_ARRAYS, Store

_CHUNKS_PER_CHECK = 16


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of `verify`.

    Attributes
    ----------
    checked : int
        Chunks that were read and decoded: all chunks that have a file.
    missing : int
        Chunks without a file: remaining work, not damage.
    bad : dict of int to str
        Problem of each damaged chunk.
    sequences : str, optional
        Problem of the sequence arrays, which recomputation cannot repair.
    results : dict of str to str
        Problem of each damaged chunk of results, by names such as ``score_virus: chunk 3``.
    leftovers : list of str
        Files that do not belong to the store.
    repaired : bool
        Whether damaged chunks and leftovers in the computed arrays were removed.
    """

    checked: int
    missing: int
    bad: dict[int, str] = field(default_factory=dict)
    sequences: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def exit_code(self) -> int:
        """0 if nothing is damaged or all damage was repaired, otherwise 4."""
        is_damaged = self.bad or self.results
        return 4 if self.sequences or (is_damaged and not self.repaired) else 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def verify(
    store: str | Path,
    *,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
    client: Any = None,
) -> VerifyReport:
    """Read and decode everything in a store.

    Parameters
    ----------
    store : path
    repair : bool
        Remove damaged chunks, and stray files from the directories that tasks write to. `resume`
        computes the chunks again; the command that made a result computes its chunks again. Files
        of a living writer are never removed.
    progress : callable, optional
        Called with the number of checked chunks and their total.
    client : distributed.Client, optional
        Its workers read and decode; default: threads of this process.

    Returns
    -------
    VerifyReport
    """
    from dask import compute, delayed

    opened = Store(store)
    # `touched`, not `present`: a file that is too small counts as missing, but is damage too.
    chunks = [int(chunk) for chunk in np.flatnonzero(opened.touched())]
    sequences = check_sequences(opened)
    bad: dict[int, str] = {}
    run = partial(compute, scheduler="threads") if client is None else partial(_gather, client)
    width = 8 if client is None else 2 * max(4, sum(client.nthreads().values()))
    step = _CHUNKS_PER_CHECK * width
    for start in range(0, len(chunks), step):
        parts = [
            delayed(_check)(
                opened.location.address,
                chunks[first : first + _CHUNKS_PER_CHECK],
                sequences is None,
            )
            for first in range(start, min(start + step, len(chunks)), _CHUNKS_PER_CHECK)
        ]
        for problems in run(*parts):
            bad.update(problems)
        if progress:
            progress(min(start + step, len(chunks)), len(chunks))
    if client is not None:
        # Check bad chunks again here: a worker may have another zarr, or another disk at this path.
        with ThreadPoolExecutor(8) as pool:
            again = partial(_check, opened.location.address, sequences=sequences is None)
            rechecked = list(pool.map(again, ([chunk] for chunk in bad)))
        bad = {chunk: problem for part in rechecked for chunk, problem in part.items()}
    damaged = check_results(opened)
    strays = leftovers(opened)
    if repair:
        opened.check_location()
        for name, chunk in damaged:
            if chunk < 0:
                opened.location.remove(name)
            else:
                open_result(opened, name).remove_chunk(chunk)
        results = results_of(opened)
        for chunk in bad:
            for result in results:  # computed from rows that may be embedded differently later
                result.remove_chunk(chunk)
            opened.remove_chunk(chunk)
        for key in strays:
            if key.rpartition("/")[0] in {*TASK_ARRAYS, *(result.name for result in results)}:
                opened.location.remove(key)
    return VerifyReport(
        len(chunks),
        opened.chunk_count - len(chunks),
        bad,
        sequences,
        {
            f"{name}: {f'chunk {chunk}' if chunk >= 0 else 'metadata'}": problem
            for (name, chunk), problem in damaged.items()
        },
        [f"{opened.path}/{key}" for key in strays],
        repair,
    )


def _gather(client: Any, *parts: Any) -> list[dict[int, str]]:
    return list(client.compute(list(parts), sync=True))


def _check(path: str, chunks: list[int], sequences: bool) -> dict[int, str]:
    store = Store(path)
    problems = {chunk: check_chunk(store, chunk, sequences=sequences) for chunk in chunks}
    return {chunk: problem for chunk, problem in problems.items() if problem is not None}
