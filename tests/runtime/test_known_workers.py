"""The workers as a run sees them when the scheduler does not answer.

The client is made up: a scheduler that is silent for exactly one call cannot be had.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from virnuc_dask import RunConfig
from virnuc_dask.errors import UnfitWorkerError, VirnucError
from virnuc_dask.runtime import events, known_workers
from virnuc_dask.runtime.known_workers import KnownWorkers


class Scheduler:
    """Answers as Dask's does, but for the questions that it does not hear."""

    def __init__(self, threads: dict[str, int]) -> None:
        self.threads, self.silent = threads, 0
        self.scheduler = SimpleNamespace(
            ncores=lambda: self.threads,
            identity=lambda n_workers: {
                "workers": {worker: {"nanny": f"nanny of {worker}"} for worker in self.threads}
            },
            processing=lambda workers: dict.fromkeys(self.threads, ()),
            has_what=lambda workers: dict.fromkeys(self.threads, ()),
        )

    def sync(self, question: Any, callback_timeout: float, **arguments: Any) -> Any:
        assert callback_timeout < 10
        if self.silent:
            self.silent -= 1
            raise TimeoutError
        return question(**arguments)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(
        known_workers, "replace_process", lambda client, worker: found.append(worker)
    )
    return found


def known(client: Any, seen: list[events.Event] | None = None) -> KnownWorkers:
    emit = (lambda event: None) if seen is None else seen.append
    return KnownWorkers(client, RunConfig(), emit)


def test_workers_that_could_not_be_counted_are_counted_later() -> None:
    client = Scheduler({"a": 2, "b": 8})
    client.silent = 2
    seen: list[events.Event] = []
    workers = known(client, seen)
    assert (workers.window, workers.threads, seen) == (1, 0, [])
    workers.ask_again()
    assert not seen
    workers.ask_again()
    assert (workers.window, workers.threads) == (2 + 3, 10)
    assert seen == [events.WorkersChanged(2, 10)]
    workers.ask_again()
    assert len(seen) == 1


def test_a_worker_that_could_not_be_replaced_is_replaced_later(replaced: list[str]) -> None:
    client = Scheduler({"a": 2, "b": 2})
    workers = known(client)
    client.silent = 2  # to the replacement, and to the count after it
    assert not workers.replace("a", for_good=True)
    assert workers.candidates() == {"b"}
    assert not replaced
    workers.ask_again()
    assert replaced == ["a"]
    workers.gone("a")
    assert workers.present == {"b"}
    workers.ask_again()
    assert replaced == ["a"]


def test_a_worker_that_left_while_it_could_not_be_replaced_is_forgotten(
    replaced: list[str],
) -> None:
    client = Scheduler({"a": 2, "b": 2})
    workers = known(client)
    client.silent = 2
    workers.replace("a")
    workers.gone("a")
    del client.threads["a"]
    workers.ask_again()
    assert not replaced
    assert workers.window == 2


def test_others_get_chunks_until_none_is_left_that_fits() -> None:
    workers = known(Scheduler({"a": 1, "b": 1}))
    assert workers.candidates() == frozenset()  # any
    workers.set_aside(UnfitWorkerError("a", ("no weights",)))
    assert workers.candidates() == {"b"}
    with pytest.raises(VirnucError, match="no worker is left") as caught:
        workers.set_aside(UnfitWorkerError("b", ("no GPU",)))
    assert "b  no GPU" in str(caught.value)
