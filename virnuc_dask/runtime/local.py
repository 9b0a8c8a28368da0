"""Start clusters on this machine's cores or GPUs, and explain why workers do not start."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import tempfile
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import active_children, resource_tracker, spawn, util
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import LocalCluster, Nanny, Status

from virnuc_dask.caches import is_private
from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.runtime import failures

_STARTS = 3
# Name that Dask gives to a process that becomes a worker.
_WORKER = "Dask Worker process (from Nanny)"
# File descriptors of a coordinator. Measured while all workers restart: 24, and 13 per worker.
_FILES = 48
_FILES_PER_WORKER = 14

# One thread reads or writes a chunk while another computes. A GPU is too fast for one such thread.
THREADS_PER_WORKER = 2
THREADS_PER_GPU = 3
_ENVIRON = "distributed.nanny.pre-spawn-environ"
# Dask makes workers return every freed page to the system at once. This costs the encoder a quarter
# of its speed, because each batch faults its memory in again. glibc reads these variables when a
# process starts, so they must be set before; 32 MiB is the largest value of the second.
MALLOC = {
    f"{_ENVIRON}.MALLOC_TRIM_THRESHOLD_": str(2**30),
    f"{_ENVIRON}.MALLOC_MMAP_THRESHOLD_": str(2**25),
}

# Otherwise a new process looks for modules in the working directory first, which may hold any.
_SAFE_PATH = {f"{_ENVIRON}.PYTHONSAFEPATH": "1"}

# By default Dask samples each worker's threads 100 times a second, and checks 50 times a second
# whether its event loops keep up: 0.7 % of a core per process, even while it waits.
LESS_PROFILING = {
    "distributed.worker.profile.interval": "100ms",
    "distributed.admin.tick.interval": "200ms",
}

# Dask stops replacing a worker that is still missing this long after a death, even if its
# replacement died meanwhile: workers that die often would all be gone in the end.
_KEEP_PLACES = {"distributed.deploy.lost-worker-timeout": "1000 days"}

# Concurrent runs share the changes of `apart`; the last run to end undoes them.
_lock = threading.Lock()
_users = 0
_changes = ExitStack()


@contextmanager
def apart() -> Iterator[None]:
    """Isolate local clusters from the site's Dask configuration and from the user's script.

    A site's configuration is for the site's clusters: required TLS, preloads, timeouts and
    lifetimes. Local clusters use loopback and Dask's defaults. Their workers do not import the
    main module: they do not need it, it may not be a file, and it may start a run itself.
    """
    global _users
    with _lock:
        if not _users:
            _changes.enter_context(dask.config.set(_defaults()))
            _changes.enter_context(_no_main_module())
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _changes.close()


def _defaults() -> dict[str, Any]:
    ours = dask.config.merge(*dask.config.defaults)["distributed"]
    settings = {**MALLOC, **_SAFE_PATH, **LESS_PROFILING, **_KEEP_PLACES}
    dask.config.set(
        {name.removeprefix("distributed."): value for name, value in settings.items()}, config=ours
    )
    ours["dashboard"] = dask.config.get("distributed.dashboard")  # the site decides its link
    return {"distributed": ours, "temporary-directory": str(_private_folder())}


def _private_folder() -> Path:
    """A folder for temporary files into which only this user can write.

    A scheduler and workers import modules from their folders. In a shared one another user could
    exchange these, and also this one, if TMPDIR is not a folder as /tmp, which is sticky.

    Raises
    ------
    UsageError
        There is no folder for temporary files.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"virnuc_dask-{os.geteuid()}")
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not folder.is_symlink() and folder.is_dir() and is_private(folder):
            return folder
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))  # somebody else has made it
        _changes.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder
    except OSError as error:
        raise UsageError(f"no folder for temporary files: {error}; set TMPDIR") from error


@contextmanager
def _no_main_module() -> Iterator[None]:
    prepare = spawn.get_preparation_data

    def prepare_without_main(name: str) -> dict[str, Any]:
        data = prepare(name)
        if name == _WORKER:
            for key in ("init_main_from_name", "init_main_from_path"):
                data.pop(key, None)
        return data

    spawn.get_preparation_data = prepare_without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = prepare


def have_home() -> None:
    """Set HOME if the user has no home directory, as in containers: the dashboard needs one."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # pathlib raises
        os.environ["HOME"] = "/"


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files for a cluster of this many workers.

    Raises
    ------
    UsageError
        The hard limit is too low.
    """
    needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{workers:,} workers need about {needed:,} open files, but the limit is {hard:,};"
            " use fewer --workers, or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def started(start: Callable[[type[Nanny]], LocalCluster]) -> LocalCluster:
    """Start a cluster; try again if a worker was killed or the machine ran out of a resource.

    Parameters
    ----------
    start : callable
        Starts the cluster; its argument is the class of the workers' nannies.

    Raises
    ------
    UsageError
        The cluster cannot start, and another try would not help.
    VirnucError
        All tries failed.
    """
    for _ in range(_STARTS):
        ends: list[int] = []
        try:
            return start(_nanny(ends))
        except VirnucError:
            raise
        except Exception as error:
            # Dask reports every cause only as a failure to start.
            cause, problem = error, _problem(error, ends)
            if not _may_pass(innermost(error), ends):
                raise UsageError(f"the workers do not start: {problem}") from error
    raise VirnucError(f"the workers did not start, {_STARTS} times: {problem}") from cause


def _may_pass(cause: BaseException, ends: list[int]) -> bool:
    """Whether another try may succeed: a process was killed, or a resource was short."""
    was_killed = min(ends, default=0) < 0 or isinstance(cause, EOFError)
    return was_killed or failures.is_transient(cause)


def innermost(error: BaseException) -> BaseException:
    """The first error in a chain of causes; asyncio's cancellation under a timeout is none."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if isinstance(inner, CancelledError):
            break
        error = inner
    return error


# Processes that became workers of our clusters, and nannies whose process is becoming one.
_started: set[int | None] = set()
_starting: set[Nanny] = set()


def _kill_left_workers() -> None:
    """Kill the workers that are left when this process exits, because no cluster closed them.

    They block SIGTERM, by which multiprocessing would end them; it would wait for them for ever.
    """
    ours = _started.union(nanny.pid for nanny in list(_starting))  # which may change meanwhile
    for process in active_children():
        if process.pid in ours:
            with suppress(ValueError):  # Dask has closed it just now
                process.kill()


# multiprocessing calls it at the exit, after Dask has closed what it can.
util.Finalize(None, _kill_left_workers, exitpriority=0)


def _nanny(ends: list[int]) -> type[Nanny]:
    """A nanny class that appends to `ends` the exit codes of processes that never became workers.

    It does so only for processes that ended without reporting an error.
    """

    class WatchfulNanny(Nanny):  # type: ignore[misc]  # distributed has no types
        ended_with = 0

        async def instantiate(self) -> Status:
            # A terminal or a queue sends these to workers too, but the coordinator handles them. A
            # process inherits what the thread that starts it blocks, so this holds from its first
            # moment. The tracker comes first, because its start would unblock two of them again.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            _starting.add(self)
            try:
                status = await super().instantiate()  # raises an error that the process reported
                if status == Status.running:
                    _started.add(self.process.pid)
                else:
                    ends.append(self.ended_with)
                return status
            finally:
                _starting.discard(self)

        def _on_worker_exit_sync(self, exitcode: int) -> None:
            self.ended_with = exitcode
            super()._on_worker_exit_sync(exitcode)

        async def kill(self, *arguments: Any, **more: Any) -> None:
            try:
                await super().kill(*arguments, **more)
            except AssertionError:
                # Dask assumes that the process exists. If it could not be started, the assertion
                # would make `close` leave the other workers running.
                if self.process is None or self.process.process.pid is not None:
                    raise

    return WatchfulNanny


def _problem(error: Exception, ends: list[int]) -> str:
    if not ends:
        cause = innermost(error)
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    if min(ends) >= 0:
        return f"a worker ended with exit code {max(ends)}; any error message of it is above"
    number = -min(ends)
    question = ". Is there too little memory?" if number == signal.SIGKILL else ""
    return f"a worker was ended by signal {number} ({signal.strsignal(number)}){question}"


def visible_gpus() -> list[str]:
    """GPUs of this machine, named as in CUDA_VISIBLE_DEVICES."""
    import torch

    # Asks the driver and starts nothing on a device. Torch may count GPUs that it cannot use, if it
    # is too new for the driver; `is_available` sees that.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


_ON_THIS_MACHINE: dict[str, Any] = {
    # Without an address, Dask listens on all interfaces.
    "host": "127.0.0.1",
    # TLS with temporary certificates of this cluster alone. Other users of this machine reach its
    # loopback too, and whoever may talk to a worker can run code as its user.
    "security": True,
    "dashboard_address": "127.0.0.1:0",
    # With a limit, Dask kills a worker that exceeds its share, however much memory is free.
    "memory_limit": 0,
    "silence_logs": logging.CRITICAL,
}


def _preload(encodes: bool) -> list[str]:
    return ["virnuc_dask.runtime.worker_preload"] if encodes else []


def start_cores(count: int, nanny: type[Nanny], *, encodes: bool = True) -> LocalCluster:
    """Start this many workers, which share the cores; with torch if they are to encode."""
    allow_open_files(count)
    return LocalCluster(
        n_workers=count,
        threads_per_worker=THREADS_PER_WORKER,
        worker_class=nanny,
        preload=_preload(encodes),
        env=_threads_of_each(count),
        **_ON_THIS_MACHINE,
    )


def _threads_of_each(workers: int) -> dict[str, str]:
    """Cores per worker, as environment variables.

    Torch uses the smaller of the two variables, and Dask sets both to 1 by default.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(max(1, CPU_COUNT // workers)))


def gpu_cluster() -> Callable[..., LocalCluster]:
    """dask-cuda's cluster class; an error if dask-cuda or a GPU is missing."""
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise UsageError(
            f"--cluster local-cuda needs dask-cuda ({error}): pip install 'dask-cuda[cu13]', or"
            " [cu12] for CUDA 12. Without a GPU: --cluster local"
        ) from error
    if not visible_gpus():
        raise UsageError(
            "--cluster local-cuda: torch finds no GPU here. Check that torch is a CUDA build, that"
            " there is a driver, and CUDA_VISIBLE_DEVICES. Without a GPU: --cluster local"
        )
    return LocalCUDACluster  # type: ignore[no-any-return]


def start_gpus(count: int | None, nanny: type[Nanny], *, encodes: bool = True) -> LocalCluster:
    """Start one worker for each visible GPU, or for each of the first `count`."""
    gpus = visible_gpus()
    count = count or len(gpus)
    if count > len(gpus):
        raise UsageError(
            f"--cluster local-cuda: {count} workers, but only {len(gpus)} visible GPU(s)"
        )
    allow_open_files(count)
    threads = _threads_of_each(count)
    with dask.config.set({f"{_ENVIRON}.{name}": value for name, value in threads.items()}):
        return gpu_cluster()(
            CUDA_VISIBLE_DEVICES=gpus[:count],
            threads_per_worker=THREADS_PER_GPU,
            worker_class=nanny,
            preload=_preload(encodes),
            # Tasks do not exchange arrays, so there is nothing to spill.
            device_memory_limit=None,
            **_ON_THIS_MACHINE,
        )
