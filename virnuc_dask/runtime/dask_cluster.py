"""Connect to a Dask cluster: this machine's cores or GPUs, or a running scheduler."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import gaierror
from threading import Event
from typing import Any

import dask
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta
from distributed import Client, Security, comm
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from virnuc_dask import __version__
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.files import expanded
from virnuc_dask.runtime import local
from virnuc_dask.settings import AUTO, RunConfig

SCHEDULER_LOST = "the scheduler was lost. Finished chunks are safe; `resume` goes on"
# Seconds that the scheduler may take to answer.
_ANSWER_S = 2.0
_START_S = 120
# Seconds between two looks at what is awaited.
_LOOK_S = 0.2
# Dask writes a scheduler file in place, so it is empty for a moment.
_WRITING_S = 2
# Assumed number of workers of a running scheduler, before the run connects to it.
WORKERS_ELSEWHERE = 16
_DEFAULT = RunConfig()
# Clusters that this module starts and closes.
OWN = ("local", "local-cuda")
_CORES = (AUTO, "cpu")
# Causes that another try may not meet: a scheduler that is not there yet, or not any more.
_MAY_PASS = (TimeoutError, ConnectionError, gaierror)
_UNREACHABLE = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
# Others, such as ucx://, may not survive the end of the loop that connected first.
_GREETED = ("tcp://", "tls://")
# Seconds that what was reached may take to say who it is. Dask has no limit for that.
_GREETING_S = 30


class StoppedWaiting(Exception):  # noqa: N818  # no error
    """The caller was told to stop while it waited for a scheduler or its workers."""


@contextmanager
def connect(
    cluster: str,
    workers: int | None = None,
    config: RunConfig = _DEFAULT,
    waiting: Callable[[str], None] = lambda reason: None,
    is_stopped: Callable[[], bool] = lambda: False,
    *,
    encodes: bool = True,
) -> Iterator[Client]:
    """Yield a client of a cluster; start and close a local cluster.

    Parameters
    ----------
    cluster : str
        ``local`` or ``local-cuda``: start one process per core or GPU of this machine, and close
        them at the end. ``auto``: ``local-cuda`` if there is a GPU, otherwise ``local``. Anything
        else is the address or the scheduler file of a running scheduler, which keeps running.
    workers : int, optional
        Workers of a local cluster; default: one per core or visible GPU, and a single one for
        ``local`` with a device other than a CPU.
    config : RunConfig, optional
        Its TLS files are for a running scheduler.
    waiting : callable
        Called with the reason before a scheduler file or the first worker is awaited.
    is_stopped : callable
        Whether to wait no longer. It is called several times a second while something is awaited.
    encodes : bool
        Whether workers of a local cluster load torch while they start.

    Raises
    ------
    StoppedWaiting
    UsageError
        The name or an option means nothing, the scheduler file does not appear, TLS files do not
        fit, there is no GPU, or the workers cannot start.
    VirnucError
        The scheduler does not answer, or the workers do not connect in time.
    """
    cluster = resolve(cluster)
    check_options(cluster, workers, config)
    local.have_home()
    if cluster in OWN:
        start = (
            partial(local.start_gpus, workers, encodes=encodes)
            if cluster == "local-cuda"
            else partial(
                local.start_cores, expected_workers(cluster, workers, config), encodes=encodes
            )
        )
        with (
            local.apart(),
            local.started(start) as started,
            Client(started, set_as_default=False) as client,
        ):
            _await_workers(client, len(started.worker_spec), is_stopped)
            with _said_if_lost():
                yield client
        return
    with _attached(cluster, config, waiting, is_stopped) as client:
        if not client.nthreads():
            waiting(f"the scheduler at {expanded(cluster)} has none")
        _await_workers(client, 1, is_stopped)
        with _said_if_lost():
            check_scheduler(client)
            yield client


def check_cluster(
    cluster: str, config: RunConfig = _DEFAULT, waiting: Callable[[str], None] = lambda reason: None
) -> None:
    """Check that a running scheduler answers and can run this work; it may have no workers yet.

    Parameters
    ----------
    cluster : str
        As `resolve` returns it. A cluster of this machine has nothing to check before it starts.
    config, waiting
        As for `connect`.

    Raises
    ------
    UsageError, VirnucError
        As from `connect`.
    """
    if cluster not in OWN:
        with _attached(cluster, config, waiting) as client, _said_if_lost():
            check_scheduler(client)


def check_options(cluster: str, workers: int | None, config: RunConfig) -> None:
    """Refuse options that mean nothing for a cluster.

    Raises
    ------
    UsageError
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if workers is not None and cluster not in OWN:
        raise UsageError(
            "the number of workers can be set only for --cluster local and --cluster local-cuda"
        )
    if _tls_files(config) and cluster in OWN:
        raise UsageError(f"TLS files are for a running scheduler, not for --cluster {cluster}")


def _attached(
    cluster: str,
    config: RunConfig,
    waiting: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> Client:
    """Return a client of a running scheduler."""
    cluster = expanded(cluster)
    is_file = "://" not in cluster
    try:
        address = _scheduler_address(Path(cluster), waiting, is_stopped) if is_file else cluster
        security = _security(address, config)
        if address.startswith(_GREETED):
            _greet(address, security, is_stopped)
        return Client(address, security=security, set_as_default=False)
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        if is_stopped():
            raise StoppedWaiting from error
        # Dask has no specific error for an invalid address or TLS files that do not match.
        cause = local.innermost(error)
        reasons = [str(error)] if str(cause) in str(error) else [str(error), str(cause)]
        why = f"cluster {cluster}: no scheduler answers: {': '.join(filter(None, reasons))}"
        if not isinstance(cause, _MAY_PASS) and getattr(cause, "errno", 0) not in _UNREACHABLE:
            raise UsageError(why) from error
        if isinstance(cause, ConnectionResetError):
            why += ". Does it speak TLS (tls://)?" if address.startswith("tcp://") else ""
        elif is_file:
            why += ". A scheduler that was killed leaves its file; start another"
        raise VirnucError(why) from error


def resolve(cluster: str) -> str:
    """Replace ``auto`` by a local cluster of this machine; return any other cluster unchanged.

    Raises
    ------
    UsageError
        The cluster is ``local-cuda``, but there is no GPU or no dask-cuda.
    """
    if cluster == "auto":
        cluster = "local-cuda" if local.visible_gpus() else "local"
    if cluster == "local-cuda":
        local.gpu_cluster()
    return cluster


def expected_workers(cluster: str, workers: int | None, config: RunConfig) -> int:
    """Number of workers that a cluster will have; an assumption for a running scheduler."""
    if workers is not None:
        return workers
    if cluster == "local":
        # There may be only one device other than the CPU.
        return CPU_COUNT if config.device in _CORES else 1
    return max(1, len(local.visible_gpus())) if cluster == "local-cuda" else WORKERS_ELSEWHERE


def _scheduler_address(
    file: Path, waiting: Callable[[str], None], is_stopped: Callable[[], bool]
) -> str:
    """Read a scheduler file, once it is there: its scheduler may have been started with the run.

    Dask's own reader would wait for ever for a file that never appears, and retry for a minute
    with one that can never work.
    """
    if not file.is_file():
        if file.exists() or file.suffix != ".json" or not file.parent.is_dir():
            raise UsageError(
                f"cluster {str(file)!r}: give {', '.join(OWN)} or auto, an address such as"
                " tcp://host:8786, or a scheduler file"
            )
        waiting(f"there is no {file} yet")
    until = time.monotonic() + _START_S
    while not file.exists():
        if time.monotonic() > until:
            raise UsageError(f"cluster {file}: no such file within {_START_S} s")
        if is_stopped():
            raise StoppedWaiting
        time.sleep(_LOOK_S)
    until = time.monotonic() + _WRITING_S
    while True:
        try:
            return str(json.loads(file.read_text())["address"])
        except (KeyError, TypeError) as error:
            raise UsageError(f"cluster {file}: not a scheduler file: no address in it") from error
        except ValueError as error:
            if time.monotonic() > until:
                raise UsageError(f"cluster {file}: not a scheduler file: {error}") from error
        time.sleep(_LOOK_S)


def _greet(address: str, security: Security, is_stopped: Callable[[], bool]) -> None:
    """Connect to a scheduler and leave again. `Client` waits without end for one that hangs.

    Raises
    ------
    OSError, StoppedWaiting, UsageError, VirnucError
    """
    connection = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    limit = connection + _GREETING_S
    is_over = Event()

    async def greet() -> None:
        until = time.monotonic() + limit
        connecting = asyncio.ensure_future(
            comm.connect(address, **security.get_connection_args("client"))
        )
        while not connecting.done():
            if is_over.is_set() or is_stopped():
                raise StoppedWaiting
            if time.monotonic() > until:
                raise VirnucError(
                    f"no scheduler answers: {address} says nothing within {limit:g} s. It hangs, or"
                    " this is the address of a dashboard"
                )
            await asyncio.wait([connecting], timeout=_LOOK_S)
        await connecting.result().close()

    # In a thread, because a notebook runs a loop of its own in this one.
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(asyncio.run, greet()).result()
        except MemoryError as error:
            # Dask takes the first eight bytes of the answer for a length: of "HTTP/1.1", 3 EiB.
            raise UsageError(f"{address}: what answers there is no Dask scheduler") from error
        finally:
            is_over.set()  # after an interrupt


def _tls_files(config: RunConfig) -> dict[str, str]:
    """The user's TLS files, by the names of Dask's options."""
    files = {
        "tls_ca_file": config.tls_ca_file,
        "tls_client_cert": config.tls_cert,
        "tls_client_key": config.tls_key,
    }
    return {name: expanded(file) for name, file in files.items() if file is not None}


def _security(address: str, config: RunConfig) -> Security:
    """TLS from the user's files, or else from Dask's configuration."""
    given = _tls_files(config)
    for file in given.values():
        if not Path(file).is_file():
            raise UsageError(f"{file}: no such file; it is needed for TLS")
    if given and address.startswith("tcp://"):
        raise UsageError(f"{address} is not encrypted, but TLS files are given; tls:// is meant?")
    security = Security(require_encryption=True, **given) if given else Security()
    try:
        context = security.get_connection_args("client")["ssl_context"]
    except OSError as error:  # it names no file
        raise UsageError(
            f"{', '.join(given.values()) or 'TLS files of the configuration of Dask'}: cannot be"
            f" used together: {error}"
        ) from error
    if address.startswith("tls://") and context is None:
        raise UsageError(
            f"{address} needs TLS: give --tls-ca-file, --tls-cert and --tls-key, or set it in"
            " Dask's configuration"
        )
    return security


def _await_workers(client: Client, count: int, is_stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            client.wait_for_workers(count, timeout=_LOOK_S)
        except TimeoutError as error:
            if is_stopped():
                raise StoppedWaiting from error
            if time.monotonic() > until:
                raise VirnucError(
                    f"{count} worker(s) did not connect within {_START_S} s"
                ) from error
        else:
            return


def check_scheduler(client: Client) -> None:
    """Check that a scheduler can unpickle tasks, which it does before it sends them to workers.

    Raises
    ------
    UsageError
        The scheduler lacks this package or one that it needs, or has another version of it.
    """

    # A nested function is pickled by value, so the scheduler needs no module for it.
    async def lacks(ours: str) -> str | None:
        import asyncio
        from importlib import import_module

        try:
            # In a thread, so that the scheduler keeps working while torch loads.
            await asyncio.to_thread(import_module, "virnuc_dask.runtime.workers")
            theirs = import_module("virnuc_dask").__version__
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if theirs == ours else f"virnuc_dask {theirs}, here {ours}"

    if lack := client.run_on_scheduler(lacks, __version__):
        raise UsageError(f"the scheduler cannot run this work; it needs virnuc_dask too: {lack}")


def ask_scheduler(client: Client, question: Any, **arguments: Any) -> Any:
    """Ask a scheduler, as the methods of `client` do, but only for a while.

    Raises
    ------
    TimeoutError
        It does not answer.
    """
    return client.sync(question, callback_timeout=_ANSWER_S, **arguments)


@contextmanager
def _said_if_lost() -> Iterator[None]:
    """Report lost workers and schedulers without a traceback."""
    try:
        yield
    except (KilledWorker, FutureCancelledError, CommClosedError) as error:
        raise VirnucError(
            f"the workers or their scheduler were lost: {error}; `resume` goes on"
        ) from error
