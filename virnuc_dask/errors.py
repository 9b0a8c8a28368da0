"""The few errors this package raises, each with the exit code the command line gives it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


class VirnucError(Exception):
    """Anything that stops a command; ``exit_code`` is what the shell sees."""

    exit_code = 4


class UsageError(VirnucError):
    """Something that the user asked for cannot be done as asked."""

    exit_code = 2


class InputError(UsageError):
    """Input that cannot be read as sequences.

    Parameters
    ----------
    problem : str
        What is wrong.
    file : str
        The input as the user named it; ``-`` is standard input.
    line : int, optional
        Line number in the decompressed text, counted from 1.
    record : str, optional
        Identifier of the record, or its ordinal where it has none.
    """

    def __init__(
        self, problem: str, *, file: str, line: int | None = None, record: str | None = None
    ) -> None:
        self.problem, self.file, self.line, self.record = problem, file, line, record
        where = "standard input" if file == "-" else file
        if line is not None:
            where += f", line {line}"
        if record is not None:
            # An identifier is data from outside: it may be a megabyte long, or hold control codes.
            where += f", record {record[:80]!r}"
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel from workers; by default only the message would.
        return partial(
            type(self), self.problem, file=self.file, line=self.line, record=self.record
        ), ()


class ModelError(UsageError):
    """A model that is unknown, unreadable, or not the one it should be."""


class RandomWeightsWarning(UserWarning):
    """Embeddings of the demo model, which mean nothing."""


class StoreError(VirnucError):
    """A store that is damaged, or cannot be read or written."""


class ResultReplacedError(StoreError):
    """A result that another command has replaced while this one was filling it.

    Parameters
    ----------
    path : str
        Of the store.
    name : str
        Of the result.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        super().__init__(
            f"{path}: `{name}` was replaced by another command, or removed, while this one was"
            " filling it; nothing of this one was left in it"
        )

    def __reduce__(self) -> tuple[type[ResultReplacedError], tuple[str, str]]:
        return type(self), (self.path, self.name)


class StoreReplacedError(StoreError):
    """A place that no longer holds the store that was opened there.

    Parameters
    ----------
    path : str
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: the store that this run is filling is no longer there; it was removed, moved,"
            " or replaced by another, which was left as it is"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


class LocationError(StoreError, OSError):
    """An object store that does not answer, or answers with an error.

    An `OSError` too, so that its errno says what is to be done about it, as for a disk. Most often
    met before anything is computed; what meets it later says so.

    Parameters
    ----------
    number : int
        Errno of a disk's error that means as much.
    cause : str
    url : str
    """

    exit_code = 2

    def __init__(self, number: int, cause: str, url: str) -> None:
        super().__init__(number, cause, url)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class DeviceLostError(VirnucError):
    """A device whose process is of no use any more, such as after a sticky CUDA error.

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
    """A worker that lacks what a run needs.

    Parameters
    ----------
    worker : str
        Its address; of a process that is no worker, what it is called.
    lacks : tuple of str
    """

    def __init__(self, worker: str, lacks: tuple[str, ...]) -> None:
        self.worker, self.lacks = worker, lacks
        super().__init__(f"{worker}: {'; '.join(lacks)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.worker, self.lacks)


class NotAStoreError(UsageError):
    """The path holds something else, or nothing."""


class IdentityMismatchError(UsageError):
    """The store was made with settings under which its rows would have other values.

    Parameters
    ----------
    path : str
        The store.
    differences : sequence of (field, stored, requested)
        Every identity field that differs, with both values.
    """

    def __init__(self, path: str, differences: Sequence[tuple[str, object, object]]) -> None:
        self.path, self.differences = path, list(differences)
        lines = [
            f"  {field}: the store has {stored!r}, this run asks for {requested!r}"
            for field, stored, requested in differences
        ]
        super().__init__(
            f"{path} was made with other settings, so its rows would not match:\n"
            + "\n".join(lines)
            + "\nWrite to another store, or repeat the settings the store was made with"
            " (`resume` takes them from the store)."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.differences)
