"""The errors of this package, each with the exit code of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


class VirnucError(Exception):
    """Base class of all errors that stop a command; ``exit_code`` is the process's exit code."""

    exit_code = 4


class UsageError(VirnucError):
    """The user's request cannot be carried out."""

    exit_code = 2


class InputError(UsageError):
    """The input cannot be read as sequences.

    Parameters
    ----------
    problem : str
        What is wrong.
    file : str
        The input as the user named it; ``-`` is standard input.
    line : int, optional
        Line number in the decompressed text, counted from 1.
    record : str, optional
        Identifier of the record, or its number if it has no identifier.
    """

    def __init__(
        self, problem: str, *, file: str, line: int | None = None, record: str | None = None
    ) -> None:
        self.problem, self.file, self.line, self.record = problem, file, line, record
        where = "standard input" if file == "-" else file
        if line is not None:
            where += f", line {line}"
        if record is not None:
            # Identifiers are untrusted: they may be a megabyte long or contain control characters.
            where += f", record {record[:80]!r}"
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers send errors pickled; the default would keep only the message.
        return partial(
            type(self), self.problem, file=self.file, line=self.line, record=self.record
        ), ()


class ModelError(UsageError):
    """The model is unknown, unreadable, or not the expected one."""


class RandomWeightsWarning(UserWarning):
    """The embeddings come from the demo model and mean nothing."""


class StoreError(VirnucError):
    """The store is damaged, or cannot be read or written."""


class ResultReplacedError(StoreError):
    """Another command replaced the result while this command was filling it.

    Parameters
    ----------
    path : str
        Path of the store.
    name : str
        Name of the result.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        super().__init__(
            f"{path}: `{name}` was replaced by another command, or removed, while this command"
            " was filling it; this command left no values in the new one"
        )

    def __reduce__(self) -> tuple[type[ResultReplacedError], tuple[str, str]]:
        return type(self), (self.path, self.name)


class StoreInUseError(UsageError):
    """A run is filling the store that is to be replaced.

    Parameters
    ----------
    path : str
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: a run is filling this store; end it before you replace the store"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


class StoreReplacedError(StoreError):
    """The store that was opened is no longer at its location.

    Parameters
    ----------
    path : str
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: this run's store is no longer there; it was removed, moved, or replaced by"
            " another store; this run did not change the other store"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


class LocationError(StoreError, OSError):
    """An object store does not answer, or answers with an error.

    It is also an `OSError`: its errno selects the handling, as for a disk error. Its exit code is
    for errors before anything is computed; a run turns later ones into a `StoreError`.

    Parameters
    ----------
    number : int
        Errno of the equivalent disk error.
    cause : str
    url : str
    """

    exit_code = 2

    def __init__(self, number: int, cause: str, url: str) -> None:
        super().__init__(number, cause, url)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class DeviceLostError(VirnucError):
    """The process that uses a device can no longer compute, such as after a sticky CUDA error.

    Parameters
    ----------
    worker : str
        Address of the worker.
    problem : str
    """

    def __init__(self, worker: str, problem: str) -> None:
        self.worker, self.problem = worker, problem
        super().__init__(f"{worker}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.worker, self.problem)


class UnfitWorkerError(VirnucError):
    """A worker does not meet the requirements of a run.

    Parameters
    ----------
    worker : str
        Address of the worker, or a name for a process that is not a worker.
    lacks : tuple of str
        Requirements that it does not meet.
    """

    def __init__(self, worker: str, lacks: tuple[str, ...]) -> None:
        self.worker, self.lacks = worker, lacks
        super().__init__(f"{worker}: {'; '.join(lacks)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.worker, self.lacks)


class NotAStoreError(UsageError):
    """Nothing, or something other than a store, is at the path."""


# They differ whenever the same records are translated or cut otherwise.
_OF_ROWS = {"input_sha256", "records"}


class IdentityMismatchError(UsageError):
    """The store was made with other settings, so its rows have other values.

    Parameters
    ----------
    path : str
        The store.
    differences : sequence of (field, stored, requested)
        Each identity field that differs, with both values.
    """

    def __init__(self, path: str, differences: Sequence[tuple[str, object, object]]) -> None:
        self.path, self.differences = path, list(differences)
        made_rows = {"translation", "tiling"} & {field for field, *_ in differences}
        lines = [
            f"  {field}: the store has {stored!r}, this run asks for {requested!r}"
            for field, stored, requested in differences
            if not (made_rows and field in _OF_ROWS)
        ]
        super().__init__(
            f"{path} was made with other settings, so its rows would not match:\n"
            + "\n".join(lines)
            + "\nWrite to another store, or repeat the settings the store was made with"
            " (`resume` takes them from the store), or replace the store: --overwrite."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.differences)
