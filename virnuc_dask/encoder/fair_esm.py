"""Imports fair-esm. Another package also has a module ``esm``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from virnuc_dask.errors import UsageError


def fair_esm() -> tuple[Any, Any]:
    """fair-esm's classes ``Alphabet`` and ``ESM2``.

    They are imported only when they are needed. So without fair-esm a store can still be read, and
    a worker can report that it is missing.

    Raises
    ------
    UsageError
        fair-esm is missing, damaged, or hidden by another module ``esm``.
    """
    try:
        from esm.data import Alphabet
        from esm.model.esm2 import ESM2
    except (Exception, SystemExit) as error:  # another esm.py may raise anything
        raise UsageError(_problem(error)) from error
    return Alphabet, ESM2


def check_fair_esm() -> None:
    """Refuse an environment without fair-esm, without importing it, since it needs torch.

    Raises
    ------
    UsageError
        It is missing, or hidden by another module ``esm``.
    """
    spec = find_spec("esm")
    if spec is None or spec.origin is None or not Path(spec.origin).with_name("model").is_dir():
        fair_esm()  # says what is wrong


def _problem(error: BaseException) -> str:
    spec = find_spec("esm")
    if spec is None:
        return "fair-esm is not installed: pip install fair-esm"
    if spec.origin is None:  # a folder without code; Python prefers any package to it
        folder = next(iter(spec.submodule_search_locations or ()))
        return (
            f"fair-esm is not installed, and the module esm at {folder} is not fair-esm's:"
            " pip install fair-esm"
        )
    reason = (str(error).splitlines() or [""])[0][:200]
    return (
        f"the module esm at {spec.origin} is not fair-esm's, or it is damaged"
        f" ({type(error).__name__}: {reason}). PyPI's esm (ESM3, ESM C) and fair-esm cannot share"
        " an environment: make another one for virnuc_dask. If the module is a file or folder of"
        " your own, rename it"
    )
