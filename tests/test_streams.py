"""Whatever standard output, standard error or the terminal does, and whenever Ctrl-C is pressed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker, command

import virnuc_dask
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
FULL = "No space left on device"


def assert_whole(path: Path) -> None:
    report = virnuc_dask.verify(path)
    assert (report.missing, report.bad, report.sequences, report.leftovers) == (0, {}, None, [])


def through(redirections: str, *arguments: object) -> list[str]:
    """A command whose descriptors a shell has set up."""
    return ["sh", "-c", f'exec "$@" {redirections}', "sh", *command(*arguments)]


def ended_pipe() -> int:
    """The end for writing of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


# --- commands that only say something, and those that also do ---


@pytest.fixture
def store(make_store: Maker, awkward: Path) -> Path:
    """With a chunk missing, for which `status` has more to say."""
    made = make_store(awkward, rows_per_chunk=1)
    made.remove_chunk(0)
    return Path(made.path)


SAYING = [
    ("status", "out.zarr"),
    ("status", "out.zarr", "--json"),
    ("plan", VIRAL_PROTEINS, "--model=demo"),
]


@needs_full
@pytest.mark.parametrize("arguments", SAYING)
@pytest.mark.sweep
def test_what_only_speaks_fails_if_it_is_not_heard(
    arguments: tuple[Any, ...], store: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        through(">/dev/full", *arguments), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 4
    assert done.stderr == f"standard output: {FULL}; some of it is lost\n"


@pytest.mark.parametrize("redirections", [">&-", "<&- >&- 2>&-", "2>&-"])
@pytest.mark.parametrize("arguments", SAYING[:2])
@pytest.mark.sweep
def test_closed_descriptors_are_no_error(
    arguments: tuple[Any, ...], redirections: str, store: Path, tmp_path: Path
) -> None:
    done = subprocess.run(through(redirections, *arguments), cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (4, b"")  # of the chunk that is missing
    assert bool(done.stdout) == (redirections == "2>&-")


@pytest.mark.parametrize("arguments", [*SAYING, ("--help",)])
@pytest.mark.sweep
def test_a_pipe_that_ends_is_no_error(
    arguments: tuple[Any, ...], store: Path, tmp_path: Path
) -> None:
    writer = ended_pipe()
    done = subprocess.run(command(*arguments), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    # `status` tells of the chunk that is missing.
    assert (done.returncode, done.stderr) == (4 if arguments[0] == "status" else 0, b"")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
    ],
)
def test_a_map_without_block_characters(
    environment: dict[str, str], store: Path, cli: Cli, tmp_path: Path
) -> None:
    os.rename(store, tmp_path / "☃.zarr")
    done = cli("status", "☃.zarr", env=os.environ | environment, encoding="utf-8")
    assert done.returncode == 4
    assert done.stderr == ""
    shown = "☃" if "LC_ALL" in environment else r"\u2603"
    assert done.stdout.splitlines()[0] == ".######"
    assert done.stdout.splitlines()[-1] == f"finish with: virnuc-dask resume {shown}.zarr"


@needs_full
@pytest.mark.slow
def test_verify_and_export_tell_of_the_store_and_not_of_their_output(
    make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = Path(make_store(awkward, rows_per_chunk=1).path)

    def call(redirections: str, *arguments: object) -> tuple[int, str]:
        shell = through(redirections, *arguments)
        done = subprocess.run(shell, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        said = [line for line in done.stderr.splitlines() if not line.startswith("comment: ")]
        return done.returncode, "".join(said).split(";")[0]

    lost = f"standard output: {FULL}"
    assert call(">/dev/full", "verify", store) == (0, lost)
    assert call("2>/dev/full >&-", "export", store, "out.csv") == (0, "")
    assert call(">/dev/full", "export", store, "out.npz") == (0, lost)
    assert (tmp_path / "out.csv").read_text().count("\n") == 8
    assert (tmp_path / "out.npz").exists()
    (store / "embedding" / "c.2.0").write_bytes(b"damaged")
    assert call(">/dev/full 2>/dev/full", "verify", store, "--json") == (4, "")
    assert call("<&- >&- 2>&-", "verify", store, "--repair") == (0, "")
    assert not (store / "embedding" / "c.2.0").exists()


# --- runs: 3 is what all of them end with, and no trouble with the output is ---


@needs_full
@pytest.mark.slow
def test_a_run_goes_on_when_its_json_cannot_be_written(awkward: Path, tmp_path: Path) -> None:
    shell = through(
        ">/dev/full", "run", awkward, "out.zarr", "--model=demo", "--workers", 1, "--json"
    )
    done = subprocess.run(shell, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == f"standard output: {FULL}; some of it is lost\n"
    assert_whole(tmp_path / "out.zarr")


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_it(awkward: Path, tmp_path: Path) -> None:
    writer = ended_pipe()
    shell = command("run", awkward, "out.zarr", "--model=demo", "--workers", 1, "--no-progress")
    done = subprocess.run(shell, cwd=tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 3
    assert_whole(tmp_path / "out.zarr")


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
@pytest.mark.slow
def test_a_run_without_descriptors_damages_no_file(
    flag: str, awkward: Path, tmp_path: Path
) -> None:
    shell = through(
        "<&- >&- 2>&-", "run", awkward, "out.zarr", "--model=demo", "--workers", 1, flag
    )
    done = subprocess.run(shell, cwd=tmp_path)
    assert done.returncode == 3
    assert_whole(tmp_path / "out.zarr")
    telemetry = (tmp_path / "out.zarr.telemetry.jsonl").read_text().splitlines()
    assert json.loads(telemetry[-1])["event"] == "run_summary"


@pytest.mark.slow
def test_a_run_waits_for_a_pipe_that_does_not_block(awkward: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    try:
        while True:
            filled += os.write(writer, b" " * 4096)
    except BlockingIOError:
        pass
    process = subprocess.Popen(
        command("run", awkward, "out.zarr", "--model=demo", "--workers", 1, "--json"),
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    with open(reader, "rb") as file:
        lines = file.read()[filled:].splitlines()
    assert process.wait() == 3
    assert [json.loads(line)["event"] for line in lines][-1] == "run_summary"
    assert_whole(tmp_path / "out.zarr")


def on_terminal(
    awkward: Path,
    tmp_path: Path,
    environment: dict[str, str],
    *,
    columns: int = 160,
    hangs_up: bool = False,
) -> str:
    """What a run shows on a terminal."""
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, columns))  # type: ignore[attr-defined,unused-ignore]
    # What runs tests side by side sets COLUMNS, which would count for more than the terminal.
    usual = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        command("run", awkward, "out.zarr", "--model=demo", "--workers", 1),
        cwd=tmp_path,
        stdout=follower,
        stderr=follower,
        env=usual | {"TERM": "xterm"} | environment,
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
            if hangs_up:
                break
    except OSError:
        pass  # Linux says EIO where others say end of file
    os.close(leader)
    assert process.wait() == 3
    assert_whole(tmp_path / "out.zarr")
    return shown.decode("ascii" if environment else "utf-8")


@pytest.mark.slow
def test_a_run_goes_on_when_its_terminal_hangs_up(awkward: Path, tmp_path: Path) -> None:
    assert "\x1b" in on_terminal(awkward, tmp_path, {}, hangs_up=True)


@pytest.mark.slow
def test_a_terminal_of_one_column_and_without_our_letters(awkward: Path, tmp_path: Path) -> None:
    shown = on_terminal(awkward, tmp_path, {"PYTHONIOENCODING": "ascii"}, columns=1)
    assert "\x1b[?25l" in shown  # a bar, drawn in place
    assert 'open with: virnuc_dask.open_store("out.zarr")' in shown


@pytest.mark.parametrize(
    ("columns", "bar", "line"),
    [
        (80, 16, r"7/7 rows  ETA \d+\.\d s  3 quarantined  \d+ seq/s  1 worker"),
        (40, 8, r"7/7 rows  ETA \d+\.\d s"),
        (20, 0, r"7/7 rows"),
    ],
)
@pytest.mark.slow
def test_a_narrow_terminal_keeps_the_bar_and_what_matters_most(
    columns: int, bar: int, line: str, awkward: Path, tmp_path: Path
) -> None:
    shown = on_terminal(awkward, tmp_path, {}, columns=columns)
    # What was drawn is erased before it is drawn anew, and at the end.
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]", shown)]
    last = [part.rstrip() for part in drawn if "7/7 rows" in part]
    assert last
    for part in last:
        assert re.fullmatch(rf". {'━' * bar + ' ' if bar else ''}100% {line}", part)
        assert len(part) <= columns


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_lines(awkward: Path, tmp_path: Path) -> None:
    shown = on_terminal(awkward, tmp_path, {"TERM": "dumb"})
    assert "out.zarr: 7 rows in 1 chunk, 0 done, 1 to compute" in shown
    assert "\x1b" not in shown


def test_what_a_listener_meets_is_not_the_stores_disk(tmp_path: Path) -> None:
    def listen(_event: object) -> None:
        raise OSError(28, FULL, "mine")

    with pytest.raises(OSError, match="mine"):
        prepare(VIRAL_PROTEINS, tmp_path / "out.zarr", Settings("demo"), listen)
    assert os.listdir(tmp_path) == []


# --- Ctrl-C at a certain moment, however long it takes to come to it ---

# An audit hook's words for that moment: an import, the last step of an ingest.
HOOK = """
import atexit, os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def hook(event, arguments):
    if event == wanted and str(arguments[0]).endswith(ending):
        interrupt()

wanted, ending = os.environ["INTERRUPT_AT"].split()
if wanted == "last":
    atexit.register(interrupt)
elif wanted == "end":
    def hook(event, arguments):
        if event == "import" and arguments[0] == "click":
            atexit.register(interrupt)
sys.addaudithook(hook)
"""
INTERRUPTED = "interrupted; nothing is lost: run the same command again\n"


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command that interrupts itself."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)

    def call(moment: str, *arguments: object, ignored: bool = False) -> Any:
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        trap = "trap '' INT; " if ignored else ""
        return subprocess.run(
            ["sh", "-c", f'{trap}exec "$@"', "sh", *command(*arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "INTERRUPT_AT": moment},
        )

    return call


@pytest.mark.parametrize(
    ("moment", "arguments"),
    [
        ("import virnuc_dask.cli.interrupts", ("--help",)),
        ("import virnuc_dask.standard_streams", ("--help",)),
        ("import click", ("--help",)),
        ("import virnuc_dask.cli.options", ("--version",)),
        ("import numpy", ("status", "none.zarr")),
        ("import torch", ("plan", VIRAL_PROTEINS, "--model=demo")),
        ("import virnuc_dask.runtime.display", ("resume", "none.zarr")),
        ("end .", ("--help",)),
        ("end .", ("status", "none.zarr")),
    ],
)
@pytest.mark.slow
def test_an_interrupt_is_one_line_at_any_moment(
    moment: str, arguments: tuple[Any, ...], interrupted: Any, tmp_path: Path
) -> None:
    done = interrupted(moment, *arguments)
    assert done.returncode == 130
    assert done.stderr.removeprefix("error: none.zarr: no store there\n") == INTERRUPTED
    assert os.listdir(tmp_path) == ["hook"]


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_half_done(
    interrupted: Any, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    done = interrupted("os.rename .ingest", "run", awkward, "new.zarr", "--model=demo", "--json")
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    make_store(awkward)
    done = interrupted("os.rename .csv", "export", "out.zarr", "out.csv")
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    assert sorted(os.listdir(tmp_path)) == ["awkward.faa", "hook", "out.zarr"]


def test_what_ignores_interrupts_goes_on_ignoring_them(interrupted: Any) -> None:
    done = interrupted("import click", "--version", ignored=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_when_all_is_over_there_is_nothing_to_interrupt(interrupted: Any) -> None:
    done = interrupted("last .", "--version")
    assert (done.returncode, done.stderr) == (0, "")
