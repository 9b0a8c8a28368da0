"""Where the weights of a model are, which files they have, and whether these have changed.

Nothing here reads weights or needs torch, so that a coordinator does not wait for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virnuc_dask.encoder.models import PUBLISHED
from virnuc_dask.errors import ModelError
from virnuc_dask.files import expanded
from virnuc_dask.settings import DEMO

# The coarsest timestamps of file systems. A younger file may change again and look the same.
_SETTLED_NS = 2 * 10**9
# In the order of transformers: a directory may still hold files of an earlier save.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".bin")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class FileStates:
    """Identifies the content of some files without reading them.

    Attributes
    ----------
    states : tuple of tuple
        Path, device, inode, size, mtime and ctime of each file. Times are in ns.
    are_settled : bool
        Whether any later change will be visible, because the last one is at least 2 s old.
    """

    states: tuple[tuple[str, int, int, int, int, int], ...]
    are_settled: bool

    @classmethod
    def of(cls, files: Sequence[Path]) -> FileStates:
        """State of files as they are now.

        Parameters
        ----------
        files : sequence of path
            Absolute paths. Links are followed.

        Raises
        ------
        OSError
        """
        now = time.time_ns()
        states, newest = [], 0
        for file in files:
            status = file.stat()
            times = status.st_mtime_ns, status.st_ctime_ns
            states.append((str(file), status.st_dev, status.st_ino, status.st_size, *times))
            newest = max(newest, *times)
        return cls(tuple(states), newest + _SETTLED_NS <= now)

    def is_same(self, other: FileStates | None) -> bool:
        """Whether nothing has changed between the two states."""
        return other is not None and self.states == other.states


# --- models ---------------------------------------------------------------------------------------


def resolved(reference: str) -> str:
    """A model reference that is valid in any working directory: a path becomes absolute."""
    if reference == DEMO or reference in PUBLISHED:
        return reference
    # Links are kept: the name that a link leads to may not show the kind of the file.
    return str(Path(expanded(reference)).absolute())


def weights_at_hand(reference: str) -> bool:
    """Whether a model can be read without a download."""
    if reference in PUBLISHED:
        return file_of(reference).is_file()
    return reference == DEMO or exists(file_of(reference))


def published_part(reference: str) -> str | None:
    """Name of the fair-esm model to download if needed: the model itself, or its base."""
    folder = Path(expanded(reference))
    if reference in PUBLISHED:
        return reference
    if not exists(folder) or not is_adapter(folder) or has_weights(folder):
        return None
    try:
        return published_base(folder)
    except (ModelError, ValueError, AttributeError):
        return None  # reading it reports the problem


def file_of(reference: str) -> Path:
    """The file or directory of a model other than ``demo``."""
    if reference in PUBLISHED:
        # Where fair-esm's own loader keeps its downloads.
        return _hub() / "checkpoints" / f"{reference}.pt"
    return Path(expanded(reference))


def states_of(reference: str) -> FileStates | None:
    """State of all files that a model's digest depends on, or None if it cannot be read."""
    try:
        return FileStates.of([file.absolute() for file in _files_of(file_of(reference))])
    except Exception:  # files missing, or damaged in any way; reading reports the problem
        return None


def _files_of(file: Path) -> list[Path]:
    if not is_adapter(file):
        return huggingface_files(file) if is_huggingface(file) else [file]
    base = file if has_weights(file) else file_of(published_base(file))
    return adapter_files(file) + (huggingface_files(base) if base == file else [base])


def exists(file: Path) -> bool:
    """Whether there are weights at a path, whatever they are."""
    try:
        return file.is_file() or is_huggingface(file) or is_adapter(file)
    except (OSError, ValueError):  # a name that is too long, or has a NUL byte
        return False


def _hub() -> Path:
    """Directory in which torch.hub keeps its downloads."""
    if torch := sys.modules.get("torch"):  # a program may have chosen another
        return Path(torch.hub.get_dir())
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))  # noqa: PTH118
    return Path(os.path.expanduser(home), "hub")  # noqa: PTH111  # pathlib raises without HOME


# --- layouts --------------------------------------------------------------------------------------


def is_huggingface(path: Path) -> bool:
    """Whether a path is a directory or a file in Hugging Face's layout."""
    if path.suffix in _SUFFIXES and path.is_file():
        return (path.parent / "config.json").is_file()
    return (path / "config.json").is_file()


def has_weights(folder: Path) -> bool:
    """Whether a directory holds weights under one of their usual names."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def huggingface_files(path: Path) -> list[Path]:
    """All files from which `read_huggingface` takes values or names.

    Raises
    ------
    ValueError, OSError, KeyError
        Files are missing or damaged.
    """
    if path.is_file():
        return [path.parent / "config.json", path]
    index = [path / name for name in _WEIGHTS if (path / name).is_file()][:1]
    return list(dict.fromkeys([path / "config.json", *index, *huggingface_weights(path)]))


def huggingface_weights(folder: Path) -> list[Path]:
    """Files of weights in a directory in Hugging Face's layout.

    Raises
    ------
    ValueError, OSError, KeyError
        Files are missing or damaged.
    """
    here = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not here:
        raise ValueError(f"found none of {', '.join(_WEIGHTS)}")
    if here[0].suffix != ".json":
        return here[:1]
    names = sorted(set(json.loads(here[0].read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{here[0].name} names files outside its directory")
    return [folder / name for name in names]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, with or without its base model."""
    return (path / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Name of the base model in an adapter's configuration."""
    return str(json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path"))


def adapter_files(folder: Path) -> list[Path]:
    """All files that `read_adapter` may read."""
    names = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
    return [folder / name for name in names if (folder / name).is_file()]


def published_base(folder: Path) -> str:
    """Base model of an adapter without a base beside it. The name is data, never a path.

    Raises
    ------
    ModelError
        The base is not a published model.
    """
    base = base_of(folder)
    name = base.removeprefix("facebook/")
    if name not in PUBLISHED:
        raise ModelError(
            f"model {folder}: the adapter's base model, {base!r}, is not one of fair-esm's; put the"
            " base's config.json and weights beside it"
        )
    return name
