"""What a stranger waits for. Who may import whom is said, and checked, by pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, VIRAL_PROTEINS

import virnuc_dask


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


HEAVY = {
    "torch",
    "distributed",
    "dask",
    "zarr",
    "xarray",
    "numpy",
    "esm",
    "Bio",
    "pandas",
    "jinja2",
    "obstore",
    "scipy",
    "skops",
    "sklearn",
    "bokeh",
    "matplotlib",
}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import virnuc_dask") & HEAVY
    assert not loaded_by("import virnuc_dask.cli.main") & HEAVY


def test_help_is_answered_without_loading_anything_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['run', '--help']\nfrom virnuc_dask.cli.main import main\n"
    loaded = loaded_by(f"{code}try: main()\nexcept SystemExit: pass")
    assert not loaded & HEAVY


def test_reading_a_store_loads_no_torch() -> None:
    assert not loaded_by("from virnuc_dask import open_store, verify") & {"torch", "obstore"}


@pytest.mark.slow
def test_a_coordinator_loads_no_torch(tmp_path: Path) -> None:
    """Only its workers do: of a model that was read before, all that it needs is kept."""
    script = tmp_path / "script.py"
    script.write_text(COORDINATOR.format(str(VIRAL_PROTEINS), str(tmp_path / "out.zarr")))
    said = subprocess.check_output([sys.executable, script], text=True).split()
    assert said == ["5", "True", "False"]


COORDINATOR = """
import sys
from pathlib import Path
import virnuc_dask

if __name__ == "__main__":
    done = virnuc_dask.run({!r}, {!r}, model="demo", workers=1)
    again = virnuc_dask.resume(done.store)
    print(done.computed_chunks, again.complete, "torch" in sys.modules)
"""


@pytest.mark.slow
def test_public_names_resolve_and_stay_functions() -> None:
    statement = "import virnuc_dask, virnuc_dask.runtime.run; assert callable(virnuc_dask.run)"
    assert "distributed" in loaded_by(statement)
    for name in virnuc_dask.__all__:
        assert getattr(virnuc_dask, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        virnuc_dask.nothing  # noqa: B018


def test_the_tests_of_the_promises_are_there() -> None:
    table = (
        (ROOT / "docs" / "explanation" / "promises.md")
        .read_text()
        .partition("| promise | tested by |")[2]
        .partition("\n\n")[0]
    )
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)`", table)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
