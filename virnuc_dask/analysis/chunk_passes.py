"""Passes over the embeddings of a store, in threads or on a cluster's workers.

Each thread holds one chunk, however many rows there are. Results come in the order of the chunks.
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

# Values of rows multiplied at once: 2 MiB in float32 fit in the cache of a core.
_VALUES_PER_BLOCK = 2**19
_ROWS_PER_TASK = 4096
_MOST_THREADS = 16

Progress = Callable[[int, int], None]
Transform = Callable[[NDArray[np.float32]], NDArray[Any]]


def thread_count(workers: int | None) -> int:
    """Number of threads: `workers`, or by default one per core, at most 16.

    Raises
    ------
    UsageError
        `workers` is less than 1.
    """
    from dask.system import CPU_COUNT

    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    return workers or min(_MOST_THREADS, CPU_COUNT)


def blocks(store: Store, chunks: list[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Row numbers and embeddings of the embedded rows, a few at a time."""
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
    """A copy in float32; NumPy's own conversion of float16 takes six times as long.

    The bits of a float16 are moved to their positions in a float32. The exponent is then 112 too
    small, because the biases differ, and a product corrects it. This also corrects subnormal
    numbers.
    """
    if values.dtype != np.float16:
        return values.astype(np.float32)
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= -0x7000_2000  # clears bits 28 to 30, which are copies of the sign
    found: NDArray[np.float32] = bits.view(np.float32)
    found *= np.float32(2.0**112)
    return found


def check_finite(store: Store, values: NDArray[np.floating[Any]]) -> None:
    """Refuse values that only a damaged store has, because NaN cannot be compared."""
    if not np.isfinite(values).all():
        raise StoreError(f"{store.path}: an embedded row is not finite; `verify` finds it")


class ChunkCounter:
    """Reports the number of chunks read so far."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, chunks: int) -> None:
        """Count and report more chunks."""
        self._done += chunks
        if self._progress:
            self._progress(self._done, self._total)


@dataclass(frozen=True, slots=True)
class Pool:
    """Threads of this process, or workers of a cluster.

    Attributes
    ----------
    store : Store
    submit : callable
        Like an executor's ``submit``; it passes the store as the first argument.
    width : int
        Most calls in flight.
    shared : callable
        Sends an argument of many calls to the workers once.
    """

    store: Store
    submit: Callable[..., Any]
    width: int
    shared: Callable[[Any], Any]

    def grouped(self, chunks: list[int]) -> Iterator[list[int]]:
        """Chunks of each call: one chunk, or several small ones."""
        step = max(1, _ROWS_PER_TASK // self.store.identity.rows_per_chunk)
        return (chunks[first : first + step] for first in range(0, len(chunks), step))

    def run(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], count: ChunkCounter
    ) -> Iterator[Any]:
        """Results of the calls in order; the first argument of each call is its chunks."""
        running: deque[tuple[int, Any]] = deque()
        for call in calls:
            running.append((len(call[0]), self.submit(function, *call)))
            if len(running) >= self.width:
                yield self._next(running, count)
        while running:
            yield self._next(running, count)

    def _next(self, running: deque[tuple[int, Any]], count: ChunkCounter) -> Any:
        chunks, future = running.popleft()
        result = future.result()
        count.add(chunks)
        return result


@contextmanager
def open_pool(store: Store, threads: int, client: Any) -> Iterator[Pool]:
    """A pool of threads of this process, or of the workers of a Dask client if given."""
    if client is not None:
        width = 2 * max(1, sum(client.nthreads().values()))
        to_client = partial(client.submit, _at, store.location.address, store.id, pure=False)
        # Not hashed: an equal argument of an earlier pass would have the same key, and Dask may
        # still be releasing that.
        shared = partial(client.scatter, broadcast=True, hash=False)
        yield Pool(store, to_client, width, shared)
        return
    from threadpoolctl import threadpool_limits

    # Each thread multiplies small blocks alone. More BLAS threads would mostly wait for each other:
    # on two busy cores this took ten times as long.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as executor:

        def submit(function: Callable[..., Any], *arguments: Any) -> Any:
            return executor.submit(function, store, *arguments)

        # One call more than threads, so that no thread waits while a result is merged.
        yield Pool(store, submit, threads + 1, lambda shared: shared)


def fill(
    result: Result,
    transform: Transform,
    *,
    workers: int | None = None,
    client: Any = None,
    progress: Progress | None = None,
) -> int:
    """Compute missing chunks of a result, where the embeddings are present.

    Each chunk is committed separately, so repeating an interrupted call continues it.

    Parameters
    ----------
    result : Result
    transform : callable
        Function from embeddings, float32, shape (n, D), to values of the result, shape (n,) or
        (n, 2). Each value depends only on its own row. For a client it must be picklable.
    workers : int, optional
        Threads.
    client : distributed.Client, optional
    progress : callable, optional
        Called with the number of chunks done so far and their total.

    Returns
    -------
    int
        Number of computed chunks.

    Raises
    ------
    StoreError
        A chunk of embeddings is damaged.
    ResultReplacedError
        Another command replaced the result meanwhile.
    StoreReplacedError
        Another store replaced this store.
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
