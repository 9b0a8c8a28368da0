"""Notebooks: a live bar, tables, an event loop that runs already; and those of the examples."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from conftest import EXAMPLES

import virnuc_dask
from virnuc_dask.errors import RandomWeightsWarning

CODE = f"""
import asyncio, warnings, virnuc_dask
warnings.simplefilter("ignore")
assert asyncio.get_event_loop().is_running()
virnuc_dask.run(r"{EXAMPLES / "viral_proteins.faa.gz"}", "<b>.zarr", model="demo", workers=1)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the cell of a notebook with a run in it shows."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    nbclient.NotebookClient(book, timeout=200, resources=folder).execute()
    return list(book.cells[0].outputs)


def test_a_run_shows_a_bar_that_has_reached_its_end(outputs: list[Any]) -> None:
    (bar,) = (output.data for output in outputs if output.output_type == "display_data")
    assert '<progress value="300" max="300">' in bar["text/html"]
    assert "300/300 rows" in bar["text/plain"]
    assert "&lt;b&gt;.zarr: 300 rows" in bar["text/html"]
    assert "<b>.zarr: 300 rows" in bar["text/plain"]


def test_its_summary_is_a_table(outputs: list[Any]) -> None:
    (summary,) = (output.data for output in outputs if output.output_type == "execute_result")
    assert "<tr><th>rows</th><td>300</td></tr>" in summary["text/html"]
    assert "<td>&lt;b&gt;.zarr</td>" in summary["text/html"]


def test_elsewhere_lines_are_shown_unless_they_are_not_wanted(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, client: Any
) -> None:
    proteins, store, seen = EXAMPLES / "esm_some_proteins.fasta", tmp_path / "out.zarr", []
    with pytest.warns(RandomWeightsWarning):
        virnuc_dask.run(proteins, store, model="demo", client=client, listener=seen.append)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert f"{store}: 15 rows in 1 chunk, 0 done, 1 to compute" in shown.err
    assert isinstance(seen[-1], virnuc_dask.RunSummary)
    with pytest.warns(RandomWeightsWarning):
        virnuc_dask.resume(store, client=client, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["reads_to_viral", "neighbours_and_map"])
@pytest.mark.slow
def test_the_examples_run_from_their_first_cell_to_the_last(name: str, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    # They are kept with what they have printed, of real weights.
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert "weights b8013f181c0e" in str(code)
    (model,) = re.findall(r'MODEL = "(.*)"', code[0].source)
    code[0].source = code[0].source.replace(model, "demo")
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=400, resources=folder).execute()
