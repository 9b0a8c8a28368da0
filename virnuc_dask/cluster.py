"""How a Dask client is made: a cluster of this machine's cores, or one that runs already."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.worker import Worker

from virnuc_dask.errors import UsageError, VirnucError

# Two threads, so that one chunk is read or written while the other is computed.
THREADS_PER_WORKER = 2
_START_S = 120


@contextmanager
def connect(cluster: str, workers: int | None = None) -> Iterator[Client]:
    """A client of the cluster that a user names.

    Parameters
    ----------
    cluster : str
        ``local``: one process per worker on this machine, closed afterwards. Otherwise the address
        or the scheduler file of a running scheduler, which is left as it is.
    workers : int, optional
        Workers of a local cluster; default: one for each core.

    Raises
    ------
    UsageError
        A name that means nothing, or a scheduler that does not answer.
    VirnucError
        Workers that do not come.
    """
    if cluster == "local":
        count = workers or CPU_COUNT
        if count < 1:
            raise UsageError(f"workers must be at least 1, not {count}")
        threads = str(max(1, CPU_COUNT // count))
        with (
            dask.config.set(_MALLOC),
            LocalCluster(
                n_workers=count,
                threads_per_worker=THREADS_PER_WORKER,
                processes=True,
                # Anything else than an address listens on all interfaces.
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                # Dask would kill a worker at its share of the memory, however much is free.
                memory_limit=0,
                # Torch obeys the smaller of the two, and Dask sets both to 1.
                env=dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
                silence_logs=logging.CRITICAL,
            ) as local,
            Client(local, set_as_default=False) as client,
        ):
            client.register_plugin(_IgnoreInterrupt())
            _await_workers(client, count)
            yield client
        return
    if workers is not None:
        raise UsageError("the number of workers can be chosen only with --cluster local")
    is_file = Path(cluster).is_file()
    if not (is_file or "://" in cluster):
        raise UsageError(
            f"cluster {cluster!r}: neither 'local', nor an address such as tcp://host:8786, nor a"
            " scheduler file"
        )
    try:
        client = (
            Client(scheduler_file=cluster, set_as_default=False)
            if is_file
            else Client(cluster, set_as_default=False)
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cluster {cluster}: no scheduler answers: {error}") from error
    with client:
        _await_workers(client, 1)
        yield client


def _await_workers(client: Client, count: int) -> None:
    try:
        client.wait_for_workers(count, timeout=_START_S)
    except TimeoutError as error:
        raise VirnucError(f"{count} worker(s) did not come within {_START_S} s") from error


# Dask has workers give every freed page back to the system at once, which costs the encoder a
# quarter of its speed: each batch faults its memory in again. glibc reads these when a process
# starts, so they must be there before; 32 MiB is the most that it accepts for the second.
_MALLOC = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**30),
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(2**25),
}


class _IgnoreInterrupt(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """A terminal's Ctrl-C reaches the workers too; the coordinator is the one to act on it."""

    name = "virnuc-dask-ignore-interrupt"

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
