"""What an error means, and when a chunk that raised one is tried again."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest
from conftest import VIRAL_PROTEINS, Maker, chunk_bytes
from distributed.comm import CommClosedError

import virnuc_dask
from virnuc_dask import IncompleteRunError, RunConfig
from virnuc_dask.encoder.memory import is_out_of_memory
from virnuc_dask.runtime import chunk_policy, events, failures


@pytest.mark.parametrize(
    ("error", "hopeless", "tries"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, 2),
        (OSError(errno.EROFS, "Read-only file system"), True, 2),
        (PermissionError(errno.EACCES, "Permission denied"), True, 2),
        (OSError(errno.EIO, "Input/output error"), False, 7),
        (ConnectionResetError(), False, 7),
        (TimeoutError(), False, 7),
        (MemoryError(), False, 7),
        (CommClosedError("in <TCP>"), False, 7),
        (ValueError("a bug"), False, 2),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, 2),
    ],
)
def test_errors_are_told_apart(error: Exception, hopeless: bool, tries: int) -> None:
    assert failures.is_hopeless(error) == hopeless
    assert chunk_policy.most_attempts(error, RunConfig(attempts=7)) == tries
    assert chunk_policy.most_attempts(error, RunConfig(attempts=1)) == 1


# As torch 2.11, cuBLAS and Triton 3.6 say it. The first of cuBLAS was met on an H200 whose memory
# another process had, and all that the process tried later met it too.
@pytest.mark.parametrize(
    ("text", "memory", "sticky"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True, False),
        ("Triton Error [CUDA]: out of memory", True, True),
        ("CUDA error: out of memory", True, True),
        (
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
            False,
            True,
        ),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("Triton Error [CUDA]: device-side assert triggered", False, True),
        ("mat1 and mat2 shapes cannot be multiplied", False, False),
    ],
)
def test_errors_of_a_gpu_are_told_apart(text: str, memory: bool, sticky: bool) -> None:
    error = RuntimeError(text)
    assert is_out_of_memory(error) == memory
    assert failures.is_sticky(error) == sticky
    assert failures.is_of_the_input(error) != sticky or memory


@pytest.mark.slow
def test_a_transient_error_is_waited_out_while_the_others_go_on(
    make_store: Maker, client: Any
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    store = make_store(VIRAL_PROTEINS, embed=False)
    obstacle = store.path / "embedding" / "c.3.0"
    obstacle.mkdir()
    seen: list[events.Event] = []
    times: list[float] = []

    def listen(event: events.Event) -> None:
        seen.append(event)
        times.append(time.monotonic())
        if isinstance(event, events.ChunkFailed):
            obstacle.rmdir()

    config = RunConfig(backoff=4.0, in_flight=1)  # so that others are left when it fails
    summary = virnuc_dask.resume(store.path, client=client, config=config, listener=listen)
    kinds = [type(event).__name__ for event in seen]
    assert kinds.count("ChunkFailed") == 1
    failed = kinds.index("ChunkFailed")
    done = [n for n, event in enumerate(seen) if isinstance(event, events.ChunkDone)]
    last = seen[done[-1]]
    assert isinstance(last, events.ChunkDone)
    assert last.chunk == 3
    assert times[done[-1]] - times[failed] >= 2.0  # half of the backoff at least
    assert times[done[-2]] - times[failed] < times[done[-1]] - times[failed]
    assert (summary.exit_code, summary.retries, len(done)) == (0, 1, 10)
    assert chunk_bytes(store.path) == chunk_bytes(whole.path)


def test_an_error_that_stays_is_tried_three_times(make_store: Maker, client: Any) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    (store.path / "embedding" / "c.3.0").mkdir()
    seen: list[events.Event] = []
    config = RunConfig(backoff=0.01)
    with pytest.raises(IncompleteRunError) as raised:
        virnuc_dask.resume(store.path, client=client, config=config, listener=seen.append)
    summary = raised.value.summary
    failures = [event for event in seen if isinstance(event, events.ChunkFailed)]
    assert [(event.chunk, event.attempt, event.final) for event in failures] == [
        (3, 1, False),
        (3, 2, False),
        (3, 3, True),
    ]
    assert (summary.exit_code, list(summary.missing)) == (4, [3])
