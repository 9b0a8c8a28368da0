"""What a cluster of our own needs of this process and machine, and why its workers do not start."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import spawn
from typing import Any

import dask
from distributed import LocalCluster, Nanny, Status

from virnuc_dask.errors import UsageError, VirnucError
from virnuc_dask.runtime import failures

_STARTS = 3
# Dask's own name of a process that is to become a worker.
_WORKER = "Dask Worker process (from Nanny)"
# multiprocessing's exit code of a process that was lost with the one that it was forked from.
_LOST = 255
# Descriptors of a coordinator: measured were 24 and 13 for each worker, while all are started anew.
_FILES = 48
_FILES_PER_WORKER = 14

# Several runs at once share what `apart` changes; the last one to end puts it back.
_lock = threading.Lock()
_users = 0
_changes = ExitStack()


@contextmanager
def apart(settings: dict[str, Any]) -> Iterator[None]:
    """Keep clusters of our own apart from a site's Dask configuration and from the user's script.

    A site's configuration is meant for its clusters: the TLS that it wants of them, its preloads,
    timeouts and lifetimes. Ours are on loopback and have Dask's defaults. Their workers do not
    import the main module, of which they need nothing: it may be no file, or start a run itself.

    Parameters
    ----------
    settings : dict
        Of Dask, on top of its defaults.
    """
    global _users
    with _lock:
        if not _users:
            _changes.enter_context(dask.config.set(_defaults(settings)))
            _changes.enter_context(_no_main_module())
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _changes.close()


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    ours = dask.config.merge(*dask.config.defaults)["distributed"]
    dask.config.set(
        {name.removeprefix("distributed."): value for name, value in settings.items()}, config=ours
    )
    # How a link leads to the dashboard is the site's to say. Nothing of ours is large enough for
    # a disk of its own: the folder for temporary files serves.
    ours["dashboard"] = dask.config.get("distributed.dashboard")
    return {"distributed": ours, "temporary-directory": None}


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
    """Have a home where there is none, as containers do: the dashboard cannot do without."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # pathlib raises
        os.environ["HOME"] = "/"


def allow_open_files(workers: int) -> None:
    """Raise the limit of open files as far as a cluster of so many workers needs it.

    Raises
    ------
    UsageError
        It may not be raised so far.
    """
    needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{workers:,} workers need about {needed:,} open files, and the limit is {hard:,}:"
            " choose fewer by --workers, or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def started(start: Callable[[type[Nanny]], LocalCluster]) -> LocalCluster:
    """Start a cluster; again if a worker was killed, or the machine was short of something.

    Parameters
    ----------
    start : callable
        Is given the class of the workers' nannies.

    Raises
    ------
    UsageError
        It will not start, however often it is tried.
    VirnucError
        It has not started.
    """
    for _ in range(_STARTS):
        ends: list[int] = []
        try:
            return start(_nanny(ends))
        except VirnucError:
            raise
        except Exception as error:
            # Of whatever happens, Dask says that something failed to start.
            cause, problem = error, _problem(error, ends)
            if not _may_pass(innermost(error), ends):
                raise UsageError(f"the workers do not start: {problem}") from error
    raise VirnucError(f"the workers did not start, {_STARTS} times: {problem}") from cause


def _may_pass(cause: BaseException, ends: list[int]) -> bool:
    """Whether a start may go better another time: something was killed, or was short."""
    was_killed = _LOST in ends or min(ends, default=0) < 0 or isinstance(cause, EOFError)
    return was_killed or failures.is_transient(cause)


def innermost(error: BaseException) -> BaseException:
    """The error that others were raised for."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def _nanny(ends: list[int]) -> type[Nanny]:
    """Nannies that take down how processes ended that have not become workers and said nothing."""

    class WatchfulNanny(Nanny):  # type: ignore[misc]  # distributed has no types
        ended_with = 0

        async def instantiate(self) -> Status:
            status = await super().instantiate()  # raises what a process has said
            if status != Status.running:
                ends.append(self.ended_with)
            return status

        def _on_worker_exit_sync(self, exitcode: int) -> None:
            self.ended_with = exitcode
            super()._on_worker_exit_sync(exitcode)

        async def kill(self, *arguments: Any, **more: Any) -> None:
            try:
                await super().kill(*arguments, **more)
            except AssertionError:
                # There is no process to end if it could not be started, which Dask takes for
                # granted; `close` would leave the others to themselves.
                if self.process is None or self.process.process.pid is not None:
                    raise

    return WatchfulNanny


def _problem(error: Exception, ends: list[int]) -> str:
    if not ends:
        cause = innermost(error)
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    if _LOST in ends:
        return "the process that workers are forked from was lost"
    if min(ends) >= 0:
        return f"a worker ended with exit code {max(ends)}; if it said why, that is above"
    number = -min(ends)
    question = ". Is there too little memory?" if number == signal.SIGKILL else ""
    return f"a worker was ended by signal {number} ({signal.strsignal(number)}){question}"
