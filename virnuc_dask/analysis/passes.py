"""One pass over the embeddings of a store, in threads or on a cluster's workers.

Whatever the number of rows, each thread holds one chunk, and results come in the order of the
chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.errors import ResultReplacedError, StoreError, StoreReplacedError, UsageError
from virnuc_dask.store.results import Result, open_result
from virnuc_dask.store.store import Store, is_embedded

# Values of rows that are multiplied at once: 2 MiB in float32 stay in a core's cache.
_VALUES_PER_BLOCK = 2**19
_ROWS_PER_TASK = 4096
_MOST_THREADS = 16

Progress = Callable[[int, int], None]
Transform = Callable[[NDArray[np.float32]], NDArray[Any]]


def thread_count(workers: int | None) -> int:
    """So many threads as are asked for; else one for each core, at most 16.

    Raises
    ------
    UsageError
    """
    from dask.system import CPU_COUNT

    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    return workers or min(_MOST_THREADS, CPU_COUNT)


def blocks(store: Store, chunks: list[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Numbers and embeddings of the embedded rows, a few at a time."""
    step = max(1, _VALUES_PER_BLOCK // store.dimension)
    for chunk in chunks:
        with store.reading(f"chunk {chunk}"):
            status, embedding = store.read_chunk(chunk)
        rows = np.flatnonzero(is_embedded(status))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            is_whole = part[-1] - part[0] == len(part) - 1
            values = embedding[part[0] : part[-1] + 1] if is_whole else embedding[part]
            yield store.rows(chunk).start + part, values


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """A copy in float32. NumPy's own conversion of float16 takes six times as long.

    The bits of a float16 are moved to where a float32 has them. Then the exponent, whose bias is
    another, is 112 too small. Subnormal numbers become right by the product too.
    """
    if values.dtype != np.float16:
        return values.astype(np.float32)
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= -0x7000_2000  # all but the bits 28 to 30, which are copies of the sign, and 13 zeros
    found: NDArray[np.float32] = bits.view(np.float32)
    found *= np.float32(2.0**112)
    return found


def check_finite(store: Store, values: NDArray[np.floating[Any]]) -> None:
    """Refuse what there is only in a damaged store: nothing can be compared with NaN."""
    if not np.isfinite(values).all():
        raise StoreError(f"{store.path}: an embedded row is not finite; `verify` says which")


class ChunkCounter:
    """Tells a listener how many chunks were read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, chunks: int) -> None:
        """Say that so many more were read."""
        self._done += chunks
        if self._progress:
            self._progress(self._done, self._total)


@dataclass(frozen=True, slots=True)
class Pool:
    """Threads, or a cluster's workers.

    Attributes
    ----------
    store : Store
    submit : callable
        As an executor's, with the store in front of the arguments.
    width : int
        Calls in flight.
    shared : callable
        What many calls take, to be sent once.
    """

    store: Store
    submit: Callable[..., Any]
    width: int
    shared: Callable[[Any], Any]

    def grouped(self, chunks: list[int]) -> Iterator[list[int]]:
        """Chunks of one call: one, or several small ones."""
        step = max(1, _ROWS_PER_TASK // self.store.identity.rows_per_chunk)
        return (chunks[first : first + step] for first in range(0, len(chunks), step))

    def run(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], count: ChunkCounter
    ) -> Iterator[Any]:
        """Results of the calls, in their order; each begins with its chunks."""
        running: deque[tuple[int, Any]] = deque()
        for call in calls:
            running.append((len(call[0]), self.submit(function, *call)))
            if len(running) >= self.width:
                yield self._next(running, count)
        while running:
            yield self._next(running, count)

    def _next(self, running: deque[tuple[int, Any]], count: ChunkCounter) -> Any:
        chunks, future = running.popleft()
        found = future.result()
        count.add(chunks)
        return found


@contextmanager
def open_pool(store: Store, threads: int, client: Any) -> Iterator[Pool]:
    """Threads of this process, or the workers of a Dask client if there is one."""
    if client is not None:
        width = 2 * max(1, sum(client.nthreads().values()))
        to_client = partial(client.submit, _at, store.location.address, store.id, pure=False)
        yield Pool(store, to_client, width, partial(client.scatter, broadcast=True))
        return
    from threadpoolctl import threadpool_limits

    # Each thread multiplies small blocks, by itself. Threads of BLAS in them would wait for each
    # other most of the time: on two busy cores that took ten times as long.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as executor:

        def submit(function: Callable[..., Any], *arguments: Any) -> Any:
            return executor.submit(function, store, *arguments)

        # One more than there are threads, so that none waits while a result is merged.
        yield Pool(store, submit, threads + 1, lambda shared: shared)


def fill(
    result: Result,
    transform: Transform,
    *,
    workers: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> int:
    """Compute the chunks that a result lacks, of those whose embeddings are there.

    Each chunk is committed by itself, so that an interrupted call can be repeated and goes on.

    Parameters
    ----------
    result : Result
    transform : callable
        From embeddings, float32, shape (n, D), to values, shape (n,) or (n, 2) as the result's;
        of each row by itself. For a client it must be one that can be pickled.
    workers : int, optional
        Threads.
    client : distributed.Client, optional
    progress : callable, optional
        Called with the chunks done so far and how many there are to do.

    Returns
    -------
    int
        Chunks that were computed.

    Raises
    ------
    StoreError
        A chunk of embeddings is damaged.
    ResultReplacedError
        Another command has replaced the result meanwhile.
    StoreReplacedError
        Another store is in the store's place.
    """
    store = result.store
    due = np.flatnonzero(store.present() & ~result.present()).tolist()
    count = ChunkCounter(progress, len(due))
    with open_pool(store, thread_count(workers), client) as pool:
        shared = pool.shared(transform)
        calls = ((group, result.name, result.id, shared) for group in pool.grouped(due))
        for _ in pool.run(_fill, calls, count):
            pass
    return len(due)


def _fill(store: Store, chunks: list[int], name: str, id_: str, transform: Transform) -> None:
    result = open_result(store, name)
    if result.id != id_:
        raise ResultReplacedError(str(store.path), name)
    for chunk in chunks:
        values = result.empty(chunk)
        start = store.rows(chunk).start
        for rows, embedding in blocks(store, [chunk]):
            block = as_float32(embedding)
            check_finite(store, block)
            values[rows - start] = transform(block)
        result.write(chunk, values)


def _at(location: str, id_: str, function: Callable[..., Any], *arguments: Any) -> Any:
    store = Store(location)
    if store.id != id_:
        raise StoreReplacedError(location)
    return function(store, *arguments)
