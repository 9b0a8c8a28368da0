"""Look at what a run needs on this machine: packages, processor, GPUs, folders, models."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from virnuc_dask import __version__, caches
from virnuc_dask.encoder.fair_esm import check_fair_esm
from virnuc_dask.encoder.models import PUBLISHED
from virnuc_dask.encoder.weight_files import file_of
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, lock

_SHOWN = ("torch", "dask", "distributed", "zarr", "xarray", "numpy")
# Packages, their modules, and what they serve.
_EXTRAS = (
    ("obstore", "obstore", "stores at s3:// and gs://"),
    ("pyarrow", "pyarrow", "tables as Parquet"),
    ("h5py", "h5py", "AnnData as .h5ad"),
    ("faiss-cpu", "faiss", "index"),
    ("umap-learn", "umap", "map --method umap"),
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


def examine(folder: str | Path | None = None) -> Iterator[Finding]:
    """Yield what is found, as it is found: looking at a GPU takes seconds.

    Parameters
    ----------
    folder : path, optional
        Folder for stores, which is needed if it is named; default: the current one. A temporary
        file is made in it, locked, and removed.
    """
    yield Finding(
        "program",
        f"virnuc-dask {__version__}, Python {platform.python_version()},"
        f" {platform.system()} {platform.machine()}",
    )
    yield _packages()
    yield _fair_esm()
    try:
        yield _processor()
        yield from _gpus()
    except ImportError as error:
        advice = "install virnuc-dask again, with all that it needs"
        yield Finding("torch and dask", f"cannot be imported: {error}", advice, is_needed=True)
    yield _extras()
    yield _temporary_folder()
    yield _store_folder(expanded(folder or "."), is_needed=folder is not None)
    yield _cache()
    yield _models()


def _packages() -> Finding:
    found = ", ".join(f"{name} {installed}" for name in _SHOWN if (installed := _version(name)))
    needed = [text for text in requires("virnuc-dask") or () if "extra ==" not in text]
    names = [re.split(r"[^\w.-]", text)[0] for text in needed]
    if missing := [name for name in names if not _version(name)]:
        advice = f"missing: {', '.join(missing)}; pip install {' '.join(missing)}"
        return Finding("packages", found, advice, is_needed=True)
    return Finding("packages", found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _fair_esm() -> Finding:
    try:
        check_fair_esm()
    except UsageError as error:
        return Finding("fair-esm", "cannot be used", str(error), is_needed=True)
    return Finding("fair-esm", _version("fair-esm"))


def _processor() -> Finding:
    import torch
    from dask.system import CPU_COUNT

    from virnuc_dask.encoder import cpu_kernels

    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{CPU_COUNT} cores, {capability}"
    if cpu_kernels.is_usable(torch.device("cpu"), "float32", 1280):
        return Finding("processor", f"{found}, compiled kernels")
    advice = "encoding on cores takes 1.2 to 1.6 times as long"
    if platform.machine() == "x86_64" and not capability.startswith("AVX"):
        advice += "; there are none for a processor without AVX2"
    else:
        advice += ": install a C++ compiler (g++), then virnuc-dask again"
    return Finding("processor", f"{found}, no compiled kernels", advice)


def _gpus() -> Iterator[Finding]:
    import torch

    from virnuc_dask.encoder import gpu_kernels
    from virnuc_dask.runtime import local

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
            problem = gpu_kernels.differs(device, torch.float16, 1280, 20)
        except Exception as error:  # no Triton, no C compiler, a device that is lost, …
            problem = f"{type(error).__name__}: {error}"
        advice = f"encoding is slower without Triton's kernels: {problem}" if problem else ""
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
    return Finding(
        "extras",
        f"not possible: {'; '.join(what for _, _, what in missing)}",
        f"if you want it: pip install {' '.join(package for package, _, _ in missing)}",
    )


def _temporary_folder() -> Finding:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # tried all that may be one
        advice = "set TMPDIR to a folder that can be written"
        return Finding("temporary folder", str(error), advice, is_needed=True)
    return Finding("temporary folder", f"{folder}, {_free(folder) / 2**30:.1f} GiB free")


def _store_folder(path: str, *, is_needed: bool) -> Finding:
    name = "folder for stores"
    if "://" in path:
        return Finding(name, f"{path}: buckets are not looked at")
    folder = Path(path).absolute()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            has_locks = lock(file.fileno())
    except OSError as error:
        found = f"{folder}, cannot be written: {error.strerror}"
        return Finding(name, found, "name another one", is_needed=is_needed)
    free = _free(folder)
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    if not has_locks:
        advice = "runs are not seen by others there; see docs/howto/clusters.md"
        return Finding(name, f"{found}, no locks (flock)", advice)
    advice = "" if free > _FREE else "a store of a million rows takes about 5 GiB"
    return Finding(name, found, advice)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _cache() -> Finding:
    """Find out whether digests of weights can be kept; nothing is created for that."""
    slow = "until then weights are read whole at each start"
    folder = caches.folder()
    if folder is None:
        return Finding("cache", "no home directory", f"set XDG_CACHE_HOME; {slow}")
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding("cache", f"{folder}, cannot be written", f"set XDG_CACHE_HOME; {slow}")
    if existing == folder and not caches.is_private(folder):
        return Finding("cache", f"{folder}, others can write", f"chmod 700 {folder}; {slow}")
    return Finding("cache", str(folder))


def _models() -> Finding:
    files = {name: file_of(name) for name in PUBLISHED}
    found = [
        f"{name} ({file.stat().st_size / 2**20:,.0f} MiB)"
        for name, file in files.items()
        if file.is_file()
    ]
    folder = next(iter(files.values())).parent
    return Finding("models", f"{', '.join(found) or 'none yet'}, in {folder}")
