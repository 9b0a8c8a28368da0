"""The command line as its users meet it: real processes, real exit codes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
from click.testing import CliRunner
from conftest import ROOT, VIRAL_PROTEINS, Cli, Maker, command
from harness import Run

from virnuc_dask.cli.main import _missing_lines, main
from virnuc_dask.runtime.summary import NOT_COMPUTED


@pytest.mark.slow
def test_run_ends_with_a_summary_and_how_to_open_the_store(cli: Cli, awkward: Path) -> None:
    done = cli("run", awkward, "out.zarr", "--model=demo", "--workers", 1, "--max-residues", 50)
    assert done.returncode == 3
    for part in ("quarantined: empty", "out.zarr", "sequences/s"):
        assert part in done.stdout
    assert re.search(r"^embedded +4 \(1 of them truncated\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^rows +7$", done.stdout, re.MULTILINE)
    assert 'open with: virnuc_dask.open_store("out.zarr")' in done.stdout
    assert "row 3  stop  invalid_residues" in done.stdout
    assert "2 records with letters that are not residues" in done.stderr
    assert "1 row of more than 50 residues will be truncated to these" in done.stderr
    assert "look at it: virnuc-dask report out.zarr report.html" in done.stdout
    assert "Traceback" not in done.stderr
    again = cli("run", awkward, "out.zarr", "--model=demo", "--max-residues", 50)
    assert again.returncode == 3
    assert "1 of 1, 0 computed now" in again.stdout


@pytest.mark.parametrize(("name", "store"), [("run", ["out.zarr"]), ("plan", [])])
@pytest.mark.parametrize("options", [(), ("--model", ""), ("--json",)])
@pytest.mark.sweep
def test_a_model_must_be_named(
    name: str,
    store: list[str],
    options: tuple[str, ...],
    cli_here: Cli,
    awkward: Path,
    tmp_path: Path,
) -> None:
    refused = cli_here(name, awkward, *store, *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: which model?")
    for part in ("--model", "esm2_t33_650M_UR50D", "demo", "random weights"):
        assert part in refused.stderr
    assert os.listdir(tmp_path) == ["awkward.faa"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "in.faa"), "Missing argument 'INPUTS...'"),
        (("run", "in.faa", "out.zarr", "--pooling", "sum"), "'sum' is not one of"),
        (("plan", "in.faa", "--frames", "orf"), "frames requires translate six-frame"),
    ],
)
def test_what_else_is_wrong_comes_before_the_model(
    arguments: tuple[str, ...], message: str, cli_here: Cli
) -> None:
    refused = cli_here(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "which model?" not in refused.stderr


@pytest.mark.slow
def test_standard_input_is_read(cli: Cli, awkward: Path) -> None:
    done = cli(
        "run", "-", "out.zarr", "--model=demo", "--workers", 1, "--json", input=awkward.read_text()
    )
    assert done.returncode == 3
    assert json.loads(done.stdout.splitlines()[-1])["records"] == 7


@pytest.mark.slow
def test_json_is_json_and_nothing_else_on_stdout(cli: Cli, awkward: Path) -> None:
    done = cli("run", awkward, "out.zarr", "--model=demo", "--workers", 1, "--json")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [document["event"] for document in documents][-2:] == ["chunk_done", "run_summary"]
    assert documents[-1]["exit_code"] == done.returncode == 3


def truncated_gzip(path: Path) -> None:
    path.write_bytes(VIRAL_PROTEINS.read_bytes()[:5000])


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def utf16(path: Path) -> None:
    path.write_text(">a\nMKT\n", encoding="utf-16")


def unequal(path: Path) -> None:
    path.write_text("@a\nMKT\n+\nIII\n@b\nMKTAY\n+\nIII\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated_gzip, binary, utf16, unequal, empty])
@pytest.mark.slow
def test_bad_input_is_one_clear_line_and_exit_code_2(
    damage: Any, cli_here: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "bad.fa"
    damage(path)
    done = cli_here("run", path, "out.zarr", "--model=demo")
    assert done.returncode == 2
    assert done.stdout == ""
    model, line = done.stderr.splitlines()
    assert model.startswith("model: demo (random weights")
    assert line.startswith(f"error: {path}")
    if damage is not empty:
        assert ", line " in line
    assert os.listdir(tmp_path) == ["bad.fa"]


@pytest.mark.slow
def test_strict_refuses_with_file_line_and_record(cli: Cli, awkward: Path) -> None:
    done = cli("run", awkward, "out.zarr", "--model=demo", "--strict")
    assert done.returncode == 2
    assert f"{awkward}, line 6, record 'stop': an internal stop '*'" in done.stderr


@pytest.mark.slow
def test_another_identity_is_refused_by_name(make_store: Maker, cli: Cli) -> None:
    make_store(VIRAL_PROTEINS, embed=False)
    done = cli(
        "run", VIRAL_PROTEINS, "out.zarr", "--model=demo", "--pooling", "max", "--repr-layer", 0
    )
    assert done.returncode == 2
    assert "pooling: the store has 'mean', this run asks for 'max'" in done.stderr
    assert "repr_layer" not in done.stderr


@pytest.mark.slow
def test_status_draws_the_chunks_that_are_there(make_store: Maker, cli: Cli) -> None:
    store = make_store(VIRAL_PROTEINS)
    store.remove_chunk(0)
    store.remove_chunk(7)
    done = cli("status", "out.zarr")
    assert done.stdout.splitlines()[0] == "░██████░██"
    assert "8 of 10 chunks, 236 of 300 rows (78.7%)" in done.stdout
    assert done.stdout.splitlines()[-1] == "finish with: virnuc-dask resume out.zarr"
    found = json.loads(cli("status", "out.zarr", "--json", "--rows").stdout)
    assert found["missing"] == [0, 7]
    assert sum(found["states"].values()) == 300
    assert found["states"]["pending"] == 64


@pytest.mark.slow
def test_status_tells_scripts_whether_a_store_is_done(
    make_store: Maker, cli_here: Cli, awkward: Path
) -> None:
    make_store(VIRAL_PROTEINS, "whole.zarr")
    make_store(awkward, "odd.zarr")
    make_store(awkward, "begun.zarr", rows_per_chunk=2).remove_chunk(0)
    for store, code, with_rows in (("whole", 0, 0), ("odd", 0, 3), ("begun", 4, 4)):
        for options, expected in (((), code), (("--rows",), with_rows)):
            assert cli_here("status", f"{store}.zarr", *options).returncode == expected
            found = cli_here("status", f"{store}.zarr", "--json", *options)
            assert json.loads(found.stdout)["exit_code"] == found.returncode == expected


@pytest.mark.slow
def test_status_says_that_truncated_rows_are_embedded(make_store: Maker, cli: Cli) -> None:
    make_store(VIRAL_PROTEINS, "whole.zarr")
    assert "embedded  300 (29 of them truncated)\n" in cli("status", "whole.zarr", "--rows").stdout
    make_store(VIRAL_PROTEINS, "windows.zarr", long="window")
    assert "embedded  300 (29 of them windowed)\n" in cli("status", "windows.zarr", "--rows").stdout


@pytest.mark.slow
def test_status_sees_a_run_as_long_as_its_process_lives(
    make_store: Maker, cli: Cli, peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(peptides, embed=False)
    with faults.holding(monkeypatch, tmp_path / "faults.json", faults.motif_of(peptides)):
        run = Run("resume", store.path, "--workers", 1)
    for event in run:
        if event["event"] == "chunk_done":
            break
    os.kill(run.process.pid, signal.SIGSTOP)
    while_it_runs = cli("status", "out.zarr")
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert "a run is filling it; if it ends early: virnuc-dask resume" in while_it_runs.stdout
    found = cli("status", "out.zarr")
    assert (found.returncode, while_it_runs.returncode) == (4, 4)
    assert found.stdout.splitlines()[-1] == "finish with: virnuc-dask resume out.zarr"


@pytest.mark.slow
def test_status_can_be_watched_until_a_store_is_complete(
    make_store: Maker, cli: Cli, tmp_path: Path
) -> None:
    store = make_store(ROOT / "examples" / "esm_some_proteins.fasta", embed=False, rows_per_chunk=4)
    watch = subprocess.Popen(
        command("status", store.path, "--watch"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stderr is not None
    assert watch.stderr.readline() == "0 of 4 chunks, 0 rows\n"  # it waits
    assert cli("resume", store.path, "--workers", 1, "-q").returncode == 0
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0
    assert err.splitlines()[-1] == "4 of 4 chunks, 15 rows"
    assert "4 of 4 chunks, 15 of 15 rows (100.0%)" in out


@pytest.mark.slow
def test_an_interrupted_run_counts_what_it_has_not_computed(
    make_store: Maker, peptides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(peptides, embed=False, rows_per_chunk=8)
    table = tmp_path / "faults.json"
    # Neither the first chunk nor the last.
    with faults.holding(monkeypatch, table, faults.motif_of(peptides, 0)):
        process = subprocess.Popen(
            command("resume", store.path, "--workers", 1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    while not store.present().any():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    faults.release(table)
    out, err = process.communicate(timeout=60)
    missing = int((~store.present()).sum())
    assert process.returncode == 130
    assert f"\n  {missing} chunks not computed yet\n" in out
    assert out.splitlines()[-1] == f"resume with: virnuc-dask resume {store.path}"
    assert "is missing" not in out
    assert "leaked" not in err


def test_chunks_that_failed_are_named_and_the_rest_counted() -> None:
    missing = {chunk: f"OSError: {chunk}" for chunk in range(12)} | {20: NOT_COMPUTED}
    lines = list(_missing_lines(missing))
    assert lines[0] == "chunk 0 is missing: OSError: 0"
    assert lines[10:] == ["2 more chunks failed", "1 chunk not computed yet"]


@pytest.mark.slow
def test_verify_names_damage_and_repair_mends_it(make_store: Maker, cli: Cli) -> None:
    store = make_store(VIRAL_PROTEINS)
    assert cli("verify", "out.zarr").returncode == 0
    file = store.path / "embedding" / "c.2.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    (store.path / "embedding" / "notes.txt").write_text("mine")
    found = cli("verify", "out.zarr")
    assert found.returncode == 4
    assert "chunk 2: does not decode" in found.stdout
    assert "notes.txt" in found.stdout
    assert cli("verify", "out.zarr", "--repair").returncode == 0
    assert cli("resume", "out.zarr", "--workers", 1, "-q").returncode == 0
    assert json.loads(cli("verify", "out.zarr", "--json").stdout)["bad"] == {}


@pytest.mark.slow
def test_plan_says_what_it_would_take_and_writes_nothing(cli_here: Cli, tmp_path: Path) -> None:
    done = cli_here("plan", VIRAL_PROTEINS, "--model=demo")
    assert done.returncode == 0
    assert "300" in done.stdout
    assert "137,862 (median 276, most 3,164)" in done.stdout
    for line in (
        r"records +300",
        r"rows +300",
        r"long rows +29 of more than 1,022 residues; embedded, truncated to that length, without"
        r" 18\.0% of all residues",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE)
    found = json.loads(cli_here("plan", VIRAL_PROTEINS, "--model=demo", "--json").stdout)
    assert found["long_records"] == 29
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_another_esm_is_one_clear_line_and_only_where_fair_esm_is_needed(
    make_store: Maker, cli: Cli, awkward: Path, other_esm: dict[str, str]
) -> None:
    make_store(awkward)
    for arguments in (
        ("run", awkward, "new.zarr", "--model=demo"),
        ("plan", awkward, "--model=demo"),
        ("resume", "out.zarr"),
        ("verify", "out.zarr", "--sample", 1),
    ):
        refused = cli(*arguments, env=other_esm)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert re.match("error: the module esm at .*/site/esm/__init__.py is not fair-esm's", line)
    assert not Path(awkward.parent, "new.zarr").exists()
    assert cli("verify", "out.zarr", "--cluster", "local", env=other_esm).returncode == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "esm.py",
            "import sys; sys.exit(3)",
            "module esm at .*esm.py is not .* .SystemExit: 3",
        ),
        ("esm/__init__.py", "raise OSError('a\\nb')", "the module esm at .* .OSError: a\\)"),
        ("esm/readme.txt", "", "not installed, and the module esm at .*/esm is not fair-esm's"),
        ("readme.txt", "", "fair-esm is not installed: pip install fair-esm"),
    ],
)
def test_what_is_in_fair_esms_place_is_named(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    # Without site-packages, and so without fair-esm.
    code = "from virnuc_dask.encoder.fair_esm import fair_esm; fair_esm()"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert re.match(f"virnuc_dask.errors.UsageError: .*{message}", found.stderr.splitlines()[-1])


@pytest.mark.slow
def test_nucleotides_are_refused(cli_here: Cli, tmp_path: Path) -> None:
    path = tmp_path / "dna.fa.gz"
    path.write_bytes(gzip.compress(b">a\nACGTTGCA\n>b\nACGTNACGT\n"))
    assert "look like nucleotides" in cli_here("plan", path, "--model=demo").stderr
    assert cli_here("plan", path, "--model=demo", "--molecule", "protein").returncode == 0


@pytest.mark.slow
def test_a_terminal_gets_a_live_bar(awkward: Path, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command("run", awkward, tmp_path / "out.zarr", "--model=demo", "--workers", 1),
        stderr=follower,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:
        pass  # Linux says EIO where others say end of file
    assert process.wait(timeout=60) == 3
    text = shown.decode()
    for part in ("rows", "seq/s", "res/s", "ETA", "1 worker", "3 quarantined", "100%"):
        assert part in text
    assert "retried" not in text  # for nothing was
    assert "\x1b[?25l" in text  # drawn in place


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output


@pytest.mark.parametrize(
    ("typed", "meant"), [("neighbours", "nearest"), ("anotate", "annotate"), ("UMAP", "map")]
)
def test_a_command_that_was_meant_is_named(typed: str, meant: str) -> None:
    done = CliRunner().invoke(main, [typed, "x.zarr"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"No such command '{typed}'. Did you mean {meant}?" in done.stderr
    assert "Did you mean" not in CliRunner().invoke(main, ["xyzzy"]).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *("export {store} {file}.tsv", "nearest {store} --query x --out {file}.tsv"),
        *("annotate {store} --labels x --out {file}.tsv", "map {store} --out {file}.html"),
        *("map {store} --png {file}.png", "cluster {store} --out {file}.tsv"),
        *("train --viral {store} --other {store} --out {file}.skops", "report {store} {file}.html"),
    ],
)
def test_a_file_that_is_there_is_replaced_by_force(
    arguments: str, make_store: Maker, awkward: Path, tmp_path: Path
) -> None:
    store = make_store(awkward, embed=False)
    words = arguments.format(store=store.path, file=tmp_path / "there").split()
    file = Path(next(word for word in words if "there." in word))
    file.write_text("mine")
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout, file.read_text()) == (2, "", "mine")
    assert f"{file} exists; give another name, or --force, which replaces it" in done.stderr
