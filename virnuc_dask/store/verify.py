"""Read and decode everything in a store, and remove what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from virnuc_dask.store.checks import check_chunk, check_results, check_sequences, leftovers
from virnuc_dask.store.results import open_result, results_of
from virnuc_dask.store.store import TASK_ARRAYS, Store

_CHUNKS_PER_CHECK = 16


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    checked : int
        Chunks that were read and decoded: all that have a file.
    missing : int
        Chunks that have none: work that is left, and no damage.
    bad : dict of int to str
        Damaged chunks, with what is wrong.
    sequences : str, optional
        What is wrong with the sequence arrays, which no recomputation mends.
    results : dict of str to str
        Damaged chunks of results, such as ``score_virus: chunk 3``, with what is wrong.
    leftovers : list of str
        Files that are no part of the store.
    repaired : bool
        Whether bad chunks and leftovers in the computed arrays were removed.
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
        """0 if all is well or mended, 4 if something is damaged."""
        is_damaged = self.bad or self.results
        return 4 if self.sequences or (is_damaged and not self.repaired) else 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
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
        Remove damaged chunks, so that `resume` computes them again, or the command that made them
        if they are of results, and stray files from the directories that tasks write to. Never a
        file of a living writer.
    progress : callable, optional
        Called with the chunks checked and their total.
    client : distributed.Client, optional
        Whose workers read and decode; default: threads of this process.

    Returns
    -------
    VerifyReport
    """
    from dask import compute, delayed

    opened = Store(store)
    # A file that is too small counts as missing, and is damage all the same.
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
        for found in run(*parts):
            bad.update(found)
        if progress:
            progress(min(start + step, len(chunks)), len(chunks))
    if client is not None:
        # A worker may have another zarr, or another disk at this path: what is whole stays.
        with ThreadPoolExecutor(8) as pool:
            again = partial(_check, opened.location.address, sequences=sequences is None)
            found_here = list(pool.map(again, ([chunk] for chunk in bad)))
        bad = {chunk: problem for part in found_here for chunk, problem in part.items()}
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
            for result in results:  # of which no row may be embedded differently later
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
