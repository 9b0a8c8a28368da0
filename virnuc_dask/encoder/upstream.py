"""fair-esm, which is not the only one to call its module ``esm``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from virnuc_dask.errors import UsageError


def fair_esm() -> tuple[Any, Any]:
    """fair-esm's classes ``Alphabet`` and ``ESM2``.

    Imported when they are needed: this package's modules can be imported without them, so that a
    store can be read, and a worker that lacks them can say so.

    Raises
    ------
    UsageError
        There is no fair-esm, or something else in its place.
    """
    try:
        from esm.data import Alphabet
        from esm.model.esm2 import ESM2
    except (Exception, SystemExit) as error:  # whatever somebody's esm.py does
        raise UsageError(_problem(error)) from error
    return Alphabet, ESM2


def _problem(error: BaseException) -> str:
    spec = find_spec("esm")
    if spec is None:
        return "fair-esm is not installed: pip install fair-esm"
    if spec.origin is None:  # a folder without code, before which any package would go
        folder = next(iter(spec.submodule_search_locations or ()))
        return (
            f"fair-esm is not installed, and the module esm at {folder} is not fair-esm's:"
            " pip install fair-esm"
        )
    reason = (str(error).splitlines() or [""])[0][:200]
    return (
        f"the module esm at {spec.origin} is not fair-esm's, or damaged ({type(error).__name__}:"
        f" {reason}). PyPI's esm (ESM3, ESM C) and fair-esm cannot be in one environment: make"
        " another for virnuc_dask. A file or folder of your own needs another name"
    )
