"""The house rules: who may import whom, and what a stranger waits for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import virnuc_dask

PACKAGE = ROOT / "virnuc_dask"

# A module imports only from those before it. The order is that of the README's table.
ORDER = [
    "interrupts",
    "streams",
    "errors",
    "config",
    "models",
    "residues",
    "lookalikes",
    "translate",
    "tiles",
    "sequences",
    "packing",
    "files",
    "caches",
    "objects",
    "places",
    "store",
    "results",
    "ingest",
    "integrity",
    "analysis.columns",
    "analysis.dataset",
    "analysis.formats",
    "analysis.annotated",
    "analysis.export",
    "analysis.reads",
    "analysis.outputs",
    "analysis.passes",
    "analysis.rows",
    "analysis.comparable",
    "analysis.fits",
    "analysis.samples",
    "analysis.approximate",
    "analysis.neighbours",
    "analysis.labels",
    "analysis.tables",
    "analysis.classifier",
    "analysis.training",
    "analysis.prediction",
    "analysis.maps",
    "analysis.clusters",
    "analysis.points",
    "analysis.plots",
    "analysis.report",
    "memory",
    "upstream",
    "huggingface",
    "lora",
    "digests",
    "weights",
    "kernels",
    "queues",
    "triton_kernels",
    "fused",
    "linear",
    "attention",
    "esm2",
    "faults",
    "turns",
    "encoder",
    "retry",
    "embed",
    "isolate",
    "drift",
    "local",
    "cluster",
    "events",
    "progress",
    "prepare",
    "estimates",
    "workers",
    "graph",
    "forked",
    "roster",
    "work",
    "coordinator",
    "options",
    "cli_analysis",
    "cli",
    "__main__",
]


def imports(module: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules that a module imports, whole."""
    tree = ast.parse(module.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Files by module, as in the order."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: path for name, path in files.items() if path.stem != "__init__"}


def test_every_module_is_in_the_order() -> None:
    assert modules().keys() == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    allowed = {f"virnuc_dask.{other}" for other in ORDER[: ORDER.index(name)]}
    ours = {
        found
        for found in imports(modules()[name])
        if found.startswith("virnuc_dask.") and found.removeprefix("virnuc_dask.") in ORDER
    }
    assert ours <= allowed


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("zarr", {"files", "objects", "store", "results", "ingest", "analysis.annotated"}),
        ("obstore", {"objects"}),
        ("esm", {"upstream"}),
        ("safetensors", {"huggingface"}),
        ("transformers", set()),  # what it saves is read without it
        ("Bio", {"sequences", "translate"}),
        ("rich", {"progress"}),
        ("click", {"cli", "cli_analysis", "options"}),
        ("distributed", {"local", "cluster", "workers", "roster", "work", "coordinator"}),
        (
            "xarray",
            {
                "analysis.columns",
                "analysis.dataset",
                "analysis.labels",
                "analysis.neighbours",
                "analysis.reads",
            },
        ),
        ("faiss", {"analysis.approximate"}),
        ("flox", {"analysis.reads"}),
        ("scipy", {"analysis.maps"}),
        ("skops", {"analysis.classifier"}),
        ("sklearn", {"analysis.clusters", "analysis.report", "analysis.training"}),
        ("umap", {"analysis.maps"}),
        ("bokeh", {"analysis.plots"}),
        ("matplotlib", {"analysis.plots"}),
        ("jinja2", {"analysis.report"}),
    ],
)
def test_each_library_has_its_owners(library: str, owners: set[str]) -> None:
    users = {
        name
        for name, path in modules().items()
        if any(found.split(".")[0] == library for found in imports(path))
    }
    assert users == owners


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
    assert not loaded_by("import virnuc_dask.cli") & HEAVY


def test_help_is_answered_without_loading_anything_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['run', '--help']\nfrom virnuc_dask.cli import main\n"
    loaded = loaded_by(f"{code}try: main()\nexcept SystemExit: pass")
    assert not loaded & HEAVY


def test_reading_a_store_loads_no_torch() -> None:
    assert not loaded_by("from virnuc_dask import open_store, verify") & {"torch", "obstore"}


def test_public_names_resolve_and_stay_functions() -> None:
    statement = "import virnuc_dask, virnuc_dask.coordinator; assert callable(virnuc_dask.run)"
    assert "torch" in loaded_by(statement)
    for name in virnuc_dask.__all__:
        assert getattr(virnuc_dask, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        virnuc_dask.nothing  # noqa: B018
