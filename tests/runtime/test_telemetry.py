"""What a run leaves behind about itself: telemetry, Dask's report, and how busy workers were."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from conftest import Cli, tree

import virnuc_dask
from virnuc_dask import RunConfig
from virnuc_dask.errors import UsageError
from virnuc_dask.runtime import events
from virnuc_dask.runtime.telemetry import recorded

OPTIONS = ("--model=demo", "--rows-per-chunk", 2, "--workers", 1, "-q")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_chunk_is_accounted_for_beside_the_store(
    awkward: Path, cli: Cli, tmp_path: Path
) -> None:
    assert cli("run", awkward, "out.zarr", *OPTIONS).returncode == 3
    file = tmp_path / "out.zarr.telemetry.jsonl"
    found = lines(file)
    assert len({line["run"] for line in found}) == 1
    kinds = [line["event"] for line in found]
    assert kinds[:2] == ["model_chosen", "input_read"]
    assert kinds[-1] == "run_summary"
    done = [line for line in found if line["event"] == "chunk_done"]
    assert sorted(line["chunk"] for line in done) == [0, 1, 2, 3]
    assert sum(line["rows"] for line in done) == 7
    for line in done:
        assert line["worker"].startswith("tls://127.0.0.1:")
        assert line["memory"] > 2**26
        assert line["gpu"] is None
        assert all(line[f"{part}_s"] >= 0 for part in ("read", "wait", "compute", "write"))
        assert line["compute_s"] > 0
        assert line["write_s"] > 0
    # Chunk 1 has a row that is no protein and one with a stop in it: there is nothing to encode.
    assert [line["fill"] > 0 for line in sorted(done, key=lambda line: line["chunk"])] == [
        True,
        False,
        True,
        True,
    ]
    assert 0 < found[-1]["busy"] <= 1

    # A run with nothing to do adds nothing; one with something to do adds to it.
    before = tree(tmp_path)
    assert cli("resume", "out.zarr", "-q").returncode == 3
    assert tree(tmp_path) == before
    virnuc_dask.store.store.Store(tmp_path / "out.zarr").remove_chunk(2)
    assert cli("resume", "out.zarr", *OPTIONS[3:]).returncode == 3
    assert lines(file)[: len(found)] == found
    again = lines(file)[len(found) :]
    assert [line["chunk"] for line in again if line["event"] == "chunk_done"] == [2]


@pytest.mark.slow
def test_telemetry_goes_where_it_is_told_or_nowhere(
    awkward: Path, cli: Cli, tmp_path: Path
) -> None:
    cli("run", awkward, "a.zarr", *OPTIONS, "--telemetry", "elsewhere.jsonl")
    cli("run", awkward, "b.zarr", *OPTIONS, "--no-telemetry")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"awkward.faa", "a.zarr", "b.zarr", "elsewhere.jsonl"}


def test_a_file_that_cannot_be_written_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[events.Event] = []
    with recorded(seen.append, tmp_path / "absent" / "file.jsonl") as listener:
        for _ in range(2):
            listener(events.WorkerLost("tcp://127.0.0.1:1", ()))
    assert len(seen) == 2
    assert capsys.readouterr().err.count("no telemetry: ") == 1
    if (full := Path("/dev/full")).exists():
        with recorded(seen.append, full) as listener:
            listener(events.WorkerLost("tcp://127.0.0.1:1", ()))
        assert capsys.readouterr().err == "no telemetry: /dev/full: No space left on device\n"


def test_dask_reports_on_a_run(awkward: Path, client: Any, tmp_path: Path) -> None:
    seen: list[events.Event] = []
    file = tmp_path / "report.html"
    config = RunConfig(performance_report=str(file))
    virnuc_dask.run(
        awkward,
        tmp_path / "out.zarr",
        model="demo",
        client=client,
        config=config,
        listener=seen.append,
    )
    assert "Dask Performance Report" in file.read_text()
    (connected,) = (event for event in seen if isinstance(event, events.Connected))
    assert connected.dashboard.startswith("http://127.0.0.1:")


def test_a_local_run_shows_dasks_dashboard(awkward: Path, tmp_path: Path) -> None:
    pages = []

    def look(event: events.Event) -> None:
        if isinstance(event, events.Connected):
            with urlopen(event.dashboard) as answer:  # noqa: S310  # it is of loopback
                pages.append(answer.read().decode())

    report = virnuc_dask.run(
        awkward, tmp_path / "out.zarr", model="demo", cluster="local", workers=1, listener=look
    )
    assert report.exit_code == 3  # for some of the input is odd
    (page,) = pages
    assert '<div id="status-tasks">' in page


def test_a_report_without_bokeh_is_refused_before_any_chunk(
    awkward: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(performance_report=str(tmp_path / "report.html"))
    # As if it were not installed; the fixture's scheduler is in this process.
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(UsageError, match="pip install bokeh"):
        virnuc_dask.run(awkward, tmp_path / "out.zarr", model="demo", client=client, config=config)
    assert not virnuc_dask.store.store.Store(tmp_path / "out.zarr").present().any()
