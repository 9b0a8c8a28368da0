"""How a Dask client is made: this machine's cores or GPUs, or a cluster that runs already."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import arbitrary_address  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import dask
import distributed.utils
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Nanny, Security
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.scheduler import KilledWorker
from distributed.worker import Worker

from virnuc_dask import __version__
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.files import expanded
from virnuc_dask.runtime.local import allow_open_files, apart, have_home, started
from virnuc_dask.settings import AUTO, RunConfig

# So that one chunk is read or written while another is computed. A GPU is too fast for one helper.
THREADS_PER_WORKER = 2
THREADS_PER_GPU = 3
_START_S = 120
# Workers that a scheduler elsewhere is taken to have before anybody has asked it.
WORKERS_ELSEWHERE = 16
_DEFAULT = RunConfig()
# Clusters that are started and closed here.
OWN = ("local", "local-cuda")
_CORES = (AUTO, "cpu")
# How our own workers' processes are made; Dask's own key has the site's word on its clusters'.
_METHOD = "virnuc-dask.multiprocessing-method"
_ENVIRON = "distributed.nanny.pre-spawn-environ"


@contextmanager
def connect(
    cluster: str, workers: int | None = None, config: RunConfig = _DEFAULT
) -> Iterator[Client]:
    """A client of the cluster that a user names.

    Parameters
    ----------
    cluster : str
        ``local`` or ``local-cuda``: one process for each core or GPU of this machine, closed
        afterwards; ``auto``: whichever there is. Otherwise the address or the scheduler file of a
        running scheduler, which is left as it is.
    workers : int, optional
        Workers of a local cluster; default: one for each core, or each visible GPU, and one alone
        for ``local`` with another device than cores.
    config : RunConfig, optional
        Its TLS files are for a scheduler that runs already.

    Raises
    ------
    UsageError
        A name that means nothing, a scheduler that does not answer, GPUs that are not there, or
        workers that cannot start.
    VirnucError
        Workers that do not come.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    cluster = resolve(cluster)
    have_home()
    if cluster in OWN:
        start = (
            partial(_start_gpus, workers)
            if cluster == "local-cuda"
            else partial(_start_cores, expected_workers(cluster, workers, config))
        )
        with (
            apart({**MALLOC, **CALM, **_KEEP_PLACES, **_method()}),
            started(start) as local,
            Client(local, set_as_default=False) as client,
        ):
            client.register_plugin(_IgnoreInterrupt())
            _await_workers(client, len(local.worker_spec))
            with _said_if_lost():
                yield client
        return
    if workers is not None:
        raise UsageError(
            "the number of workers can be chosen only with --cluster local and local-cuda"
        )
    cluster = expanded(cluster)
    is_file = Path(cluster).is_file()
    if not (is_file or "://" in cluster):
        raise UsageError(
            f"cluster {cluster!r}: neither {', '.join(OWN)} or auto, nor an address such as"
            " tcp://host:8786, nor a scheduler file"
        )
    try:
        # Not Dask's own `scheduler_file`, which tries for a minute what can never work.
        address = json.loads(Path(cluster).read_text())["address"] if is_file else cluster
        client = Client(address, security=_security(address, config), set_as_default=False)
    except KeyError as error:
        raise UsageError(f"cluster {cluster}: not a scheduler file: no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        # Dask has no error of its own for an address that is none, or TLS that does not fit.
        raise UsageError(f"cluster {cluster}: no scheduler answers: {error}") from error
    with client:
        _await_workers(client, 1)
        with _said_if_lost():
            check_scheduler(client)
            yield client


def resolve(cluster: str) -> str:
    """What ``auto`` means on this machine; any other cluster is itself.

    Raises
    ------
    UsageError
        There are to be GPUs, but there is none, or no dask-cuda.
    """
    if cluster == "auto":
        cluster = "local-cuda" if visible_gpus() else "local"
    if cluster == "local-cuda":
        _gpu_cluster()
    return cluster


def expected_workers(cluster: str, workers: int | None, config: RunConfig) -> int:
    """How many workers a cluster will have; of a scheduler elsewhere nobody knows beforehand."""
    if workers is not None:
        return workers
    if cluster == "local":
        # Of another device than cores there may be one.
        return CPU_COUNT if config.device in _CORES else 1
    return max(1, len(visible_gpus())) if cluster == "local-cuda" else WORKERS_ELSEWHERE


def visible_gpus() -> list[str]:
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them, or would."""
    import torch

    # Asks the driver and starts nothing on a device. What is counted may be too new for the driver.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def fork_workers() -> None:
    """Have this process's local workers forked from one that has loaded all code, if that is safe.

    A worker starts in a third of a second then, also one that takes a dead one's place, and ends at
    once. For a program of one run: workers see its environment as it was when the first started.
    Not where there are GPUs, which nobody has tried, nor where a system's libraries may not survive
    it.
    """
    if sys.platform == "linux" and not visible_gpus() and _sockets_can_be_made():
        dask.config.set({_METHOD: "forkserver"})
        # Dask's own list has pandas in it, and it would load that here as well.
        distributed.utils._forkserver_preload_set = True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["virnuc_dask.runtime.forked"])
        # Or Python looks for that first in the working directory, where anything may be.
        os.environ["PYTHONSAFEPATH"] = "1"


def _method() -> dict[str, str]:
    return {"distributed.worker.multiprocessing-method": dask.config.get(_METHOD, "spawn")}


def _sockets_can_be_made() -> bool:
    """Whether there can be one among the temporary files: its path may be too long."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(arbitrary_address("AF_UNIX"))
    except OSError:
        return False
    return True


_ON_THIS_MACHINE: dict[str, Any] = {
    # Anything else than an address listens on all interfaces.
    "host": "127.0.0.1",
    "dashboard_address": "127.0.0.1:0",
    # Dask would kill a worker at its share of the memory, however much is free.
    "memory_limit": 0,
    "silence_logs": logging.CRITICAL,
}


def _start_cores(count: int, nanny: type[Nanny]) -> LocalCluster:
    allow_open_files(count)
    environment = _threads_of_each(count)
    if dask.config.get(_METHOD, None) == "forkserver":
        os.environ.update(environment)  # loaded before a worker has an environment of its own
    return LocalCluster(
        n_workers=count,
        threads_per_worker=THREADS_PER_WORKER,
        worker_class=nanny,
        env=environment,
        **_ON_THIS_MACHINE,
    )


def _threads_of_each(workers: int) -> dict[str, str]:
    """Cores for each worker: torch obeys the smaller of the two, and Dask sets both to 1."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(max(1, CPU_COUNT // workers)))


def _gpu_cluster() -> Callable[..., LocalCluster]:
    """dask-cuda's cluster, if there is anything for it."""
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise UsageError(
            f"--cluster local-cuda needs dask-cuda ({error}): pip install 'virnuc_dask[cuda]', or"
            " [cuda12] for CUDA 12. Without a GPU: --cluster local"
        ) from error
    if not visible_gpus():
        raise UsageError(
            "--cluster local-cuda: torch finds no GPU here. Is it a build for CUDA, is there a"
            " driver, what does CUDA_VISIBLE_DEVICES say? Without a GPU: --cluster local"
        )
    return LocalCUDACluster  # type: ignore[no-any-return]


def _start_gpus(count: int | None, nanny: type[Nanny]) -> LocalCluster:
    """One worker for each visible GPU, or for the first so many."""
    gpus = visible_gpus()
    count = count or len(gpus)
    if count > len(gpus):
        raise UsageError(f"--cluster local-cuda: {count} workers, but {len(gpus)} visible GPU(s)")
    allow_open_files(count)
    threads = _threads_of_each(count)
    with dask.config.set({f"{_ENVIRON}.{name}": value for name, value in threads.items()}):
        return _gpu_cluster()(
            CUDA_VISIBLE_DEVICES=gpus[:count],
            threads_per_worker=THREADS_PER_GPU,
            worker_class=nanny,
            # Arrays stay in the worker that made them: there is nothing to spill.
            device_memory_limit=None,
            **_ON_THIS_MACHINE,
        )


def _security(address: str, config: RunConfig) -> Security:
    """TLS as the user says it, or as Dask's own configuration does."""
    files = {
        "tls_ca_file": config.tls_ca_file,
        "tls_client_cert": config.tls_cert,
        "tls_client_key": config.tls_key,
    }
    given = {name: expanded(file) for name, file in files.items() if file is not None}
    for file in given.values():
        if not Path(file).is_file():
            raise UsageError(f"{file}: no such file; TLS needs it")
    security = Security(require_encryption=True, **given) if given else Security()
    context = security.get_connection_args("client")["ssl_context"]
    if address.startswith("tls://") and context is None:
        raise UsageError(
            f"{address} wants TLS: --tls-ca-file, --tls-cert and --tls-key, or Dask's configuration"
        )
    return security


def _await_workers(client: Client, count: int) -> None:
    try:
        client.wait_for_workers(count, timeout=_START_S)
    except TimeoutError as error:
        raise VirnucError(f"{count} worker(s) did not come within {_START_S} s") from error


def check_scheduler(client: Client) -> None:
    """See whether a scheduler can unpickle tasks, which it does on their way to workers.

    Raises
    ------
    UsageError
        It lacks this package, or what that needs, or has another version.
    """

    # In here, so that it travels whole.
    async def lacks(ours: str) -> str | None:
        import asyncio
        from importlib import import_module

        try:
            # In a thread: there is torch to load, and the scheduler has to go on.
            await asyncio.to_thread(import_module, "virnuc_dask.runtime.workers")
            theirs = import_module("virnuc_dask").__version__
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if theirs == ours else f"virnuc_dask {theirs}, here {ours}"

    if lack := client.run_on_scheduler(lacks, __version__):
        raise UsageError(f"the scheduler cannot take this work; it needs virnuc_dask too: {lack}")


@contextmanager
def _said_if_lost() -> Iterator[None]:
    """Lost workers and schedulers are no traceback."""
    try:
        yield
    except (KilledWorker, FutureCancelledError, CommClosedError) as error:
        raise VirnucError(
            f"the workers or their scheduler were lost: {error}. The same command goes on"
        ) from error


# Dask has workers give every freed page back to the system at once, which costs the encoder a
# quarter of its speed: each batch faults its memory in again. glibc reads these when a process
# starts, so they must be there before; 32 MiB is the most that it accepts for the second.
MALLOC = {
    f"{_ENVIRON}.MALLOC_TRIM_THRESHOLD_": str(2**30),
    f"{_ENVIRON}.MALLOC_MMAP_THRESHOLD_": str(2**25),
}

# Dask looks a hundred times a second at what each worker's threads do, and fifty times whether its
# event loop and the scheduler's keep up: 0.7 % of a core for each process, also while it waits.
CALM = {
    "distributed.worker.profile.interval": "100ms",
    "distributed.admin.tick.interval": "200ms",
}

# Dask closes a worker's place for good if it is empty this long after a death, also if another
# death has emptied it meanwhile: workers that die often enough would all be gone in the end.
_KEEP_PLACES = {"distributed.deploy.lost-worker-timeout": "1000 days"}


class _IgnoreInterrupt(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """A terminal's Ctrl-C and its end reach the workers too; the coordinator acts on them."""

    name = "virnuc-dask-ignore-interrupt"

    def setup(self, worker: Worker) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
