"""What a run shows to people; on terminals of its own: `test_streams`."""

from __future__ import annotations

import pytest

from virnuc_dask.runtime import display as display_module
from virnuc_dask.runtime import events
from virnuc_dask.runtime.display import display


def test_lines_of_a_log_say_only_what_there_is_and_are_not_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(display_module, "_PLAIN_EVERY_S", 0.0)
    with display("auto") as listener:
        listener(events.RunStarted("out.zarr", 300, 10, 0, 0, 10, 300, 137_862))
        listener(events.WorkersChanged(2, 4))
        listener(events.WorkersChanged(0, 0))
        listener(events.WorkerLost("tcp://127.0.0.1:1", (3,)))
        listener(events.WorkersChanged(2, 4))
        listener(events.Stopping(15, 2, 25.0))
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert shown.splitlines() == [
        "out.zarr: 300 rows in 10 chunks, 0 done, 10 to compute",
        "starting workers",
        "0/300 rows  ETA ?  2 workers",
        "waiting for workers",
        "worker tcp://127.0.0.1:1 was lost; 1 chunk will be computed elsewhere",
        "waiting for workers",
        "0/300 rows  ETA ?  1 retried  2 workers",
        "stopping: 2 running chunks may finish within 25 s; a second signal exits immediately",
        "0/300 rows  stopping  1 retried  2 workers",
    ]


def test_colours_that_are_forced_make_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with display("auto"):
        pass
    assert capsys.readouterr().err == ""
