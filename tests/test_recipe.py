"""The recipe for conda: it can be rendered, and needs what the package needs."""

from __future__ import annotations

import json
import subprocess
import tomllib

import pytest
import yaml
from conftest import ROOT
from engines import RATTLER_BUILD, programs_of

from virnuc_dask import __version__

RECIPE = ROOT / "conda" / "recipe.yaml"
# Other names at conda-forge, where `dask` and `matplotlib` bring more, and xopen has no extras.
NAMES = {
    "dask": "dask-core",
    "matplotlib": "matplotlib-base",
    "torch": "pytorch",
    "xopen[zstd]": "xopen",
}


def conda_name(requirement: str) -> str:
    name, bound, version = requirement.partition(">=")
    return f"{NAMES.get(name, name)} {bound}{version}"


def test_the_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert recipe["context"]["version"] == __version__
    python, *others = recipe["requirements"]["run"]
    assert python == f"python {package['project']['requires-python']}"
    assert others == sorted(map(conda_name, package["project"]["dependencies"]))
    assert {*package["build-system"]["requires"]} < {*recipe["requirements"]["host"]}


RENDER = """
import json, sys
from rattler_build import Stage0Recipe, VariantConfig
recipe = Stage0Recipe.from_file(sys.argv[1])
variants = recipe.render(VariantConfig.from_file(sys.argv[2]))
print(json.dumps([each.recipe.to_dict() for each in variants]))
"""


@pytest.mark.slow
def test_the_recipe_can_be_rendered(pytestconfig: pytest.Config) -> None:
    python = programs_of(RATTLER_BUILD, pytestconfig.cache) / "python"
    variants = RECIPE.with_name("variants.yaml")
    rendered = json.loads(subprocess.check_output([python, "-c", RENDER, RECIPE, variants]))
    assert len({each["build"]["string"] for each in rendered}) == 3  # one for each Python
    for each in rendered:
        assert each["package"] == {"name": "virnuc-dask", "version": __version__}
        compiler, _ = each["requirements"]["build"]
        assert compiler.startswith("gxx_")
