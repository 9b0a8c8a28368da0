"""Look at what a run needs on this machine: packages, processor, GPUs, folders, models."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dask.system import CPU_COUNT

from virnuc_dask import __version__, caches
from virnuc_dask.encoder.fair_esm import check_fair_esm
from virnuc_dask.encoder.models import PUBLISHED
from virnuc_dask.encoder.weight_files import file_of
from virnuc_dask.errors import UsageError
from virnuc_dask.runtime import local

_SHOWN = ("torch", "dask", "distributed", "zarr", "xarray", "numpy")
# Extra, a module of it, and what it is for.
_EXTRAS = (
    ("s3", "obstore", "stores at s3:// and gs://"),
    ("export", "pyarrow", "tables as Parquet"),
    ("export", "h5py", "AnnData as .h5ad"),
    ("faiss", "faiss", "index"),
    ("umap", "umap", "map --method umap"),
)
# A store of a million rows of 650M takes about this much.
_FREE = 5 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    found : str
    advice : str
        What to do about it; empty if all is well.
    is_needed : bool
        Whether no run works without it.
    """

    name: str
    found: str
    advice: str = ""
    is_needed: bool = False

    @property
    def mark(self) -> str:
        """``ok``, ``--`` for what is slower or not possible, or ``no`` for what every run needs."""
        return "ok" if not self.advice else "no" if self.is_needed else "--"

    def to_json(self) -> dict[str, Any]:
        """The finding as plain JSON values."""
        return asdict(self) | {"mark": self.mark}


def examine() -> Iterator[Finding]:
    """Yield what is found, as it is found: looking at a GPU takes seconds."""
    yield Finding(
        "program",
        f"virnuc-dask {__version__}, Python {platform.python_version()},"
        f" {platform.system()} {platform.machine()}",
    )
    yield Finding("packages", ", ".join(f"{name} {_version(name)}" for name in _SHOWN))
    yield _fair_esm()
    yield _processor()
    yield from _gpus()
    yield _extras()
    yield _temporary_folder()
    yield _folder("this folder", Path(), "a store of a million rows takes about 5 GiB", _FREE)
    yield _cache()
    yield _models()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is missing"


def _fair_esm() -> Finding:
    try:
        check_fair_esm()
    except UsageError as error:
        return Finding("fair-esm", "cannot be used", str(error), is_needed=True)
    return Finding("fair-esm", _version("fair-esm"))


def _processor() -> Finding:
    import torch

    from virnuc_dask.encoder import cpu_kernels

    found = f"{CPU_COUNT} cores, {torch.backends.cpu.get_cpu_capability()}"
    if cpu_kernels.is_usable(torch.device("cpu"), "float32", 1280):
        return Finding("processor", f"{found}, compiled kernels")
    return Finding(
        "processor",
        f"{found}, no compiled kernels",
        "encoding on cores takes 1.2 to 1.6 times as long: install a C++ compiler (g++), then"
        " virnuc-dask again",
    )


def _gpus() -> Iterator[Finding]:
    import torch

    from virnuc_dask.encoder import gpu_kernels

    gpus = local.visible_gpus()
    if not gpus and torch.version.cuda is None:
        advice = "this torch has no CUDA; if there is a GPU, install one that has: pytorch.org"
        yield Finding("GPU", "none", advice)
    elif not gpus:
        advice = "is there a driver (nvidia-smi)? is CUDA_VISIBLE_DEVICES right?"
        yield Finding("GPU", f"none for torch's CUDA {torch.version.cuda}", advice)
    for number in range(len(gpus)):
        device = torch.device("cuda", number)
        about = torch.cuda.get_device_properties(device)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        try:
            is_fast = gpu_kernels.is_usable(device, torch.float16, 1280, 20)
        except RuntimeError as error:
            yield Finding("GPU", found, f"it does not work now: {error}")
        else:
            advice = "" if is_fast else "encoding is slower without Triton's kernels: see above"
            yield Finding("GPU", found, advice)
    if gpus:
        try:
            local.gpu_cluster()
        except UsageError as error:
            yield Finding("local-cuda", "cannot be used", str(error))


def _extras() -> Finding:
    missing = [each for each in _EXTRAS if find_spec(each[1]) is None]
    if not missing:
        return Finding("extras", "all")
    extras = ",".join(dict.fromkeys(extra for extra, _, _ in missing))
    return Finding(
        "extras",
        f"not possible: {'; '.join(what for _, _, what in missing)}",
        f"if you want it: pip install 'virnuc-dask[{extras}]'",
    )


def _temporary_folder() -> Finding:
    advice = "set TMPDIR to a folder that can be written"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # tried all that may be one
        return Finding("temporary folder", str(error), advice, is_needed=True)
    return _folder("temporary folder", folder, advice)


def _folder(name: str, path: Path, advice: str, needs: int = 0) -> Finding:
    path = path.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, f"{path}: {error.strerror or error}", advice)
    found = f"{path}, {free / 2**30:.1f} GiB free"
    return Finding(name, found, advice if free < needs else "")


def _cache() -> Finding:
    advice = "set XDG_CACHE_HOME; until then weights are read whole at each start"
    folder = caches.folder()
    return _folder("cache", folder, advice) if folder else Finding("cache", "none", advice)


def _models() -> Finding:
    files = {name: file_of(name) for name in PUBLISHED}
    found = [
        f"{name} ({file.stat().st_size / 2**20:,.0f} MiB)"
        for name, file in files.items()
        if file.is_file()
    ]
    folder = next(iter(files.values())).parent
    return Finding("models", f"{', '.join(found) or 'none yet'}, in {folder}")
