"""What is known of weights without reading them, kept from one run to the next.

It is used only for the same files: same paths, devices, inodes, sizes and times. No program can set
ctime, the time of the last change. So a file with other content has another ctime, unless it was
written within the clock's granularity or its file system keeps no ctime. Even a wrong digest lets
nothing into a store: every worker hashes the weights that it has loaded.

Weights are read again if this cannot be kept or is damaged.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from virnuc_dask import __version__, caches
from virnuc_dask.encoder.weight_files import FileStates, states_of
from virnuc_dask.settings import DEMO

# Increase this whenever the same weights get another digest.
_ALGORITHM = 1
_KIND = "weights"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_LAYERS, _MOST_FEATURES = 1000, 100_000


@dataclass(frozen=True, slots=True)
class KnownWeights:
    """What a coordinator must know of weights.

    Attributes
    ----------
    sha256 : str
        As from `Checkpoint.sha256`, 64 hexadecimal digits.
    layers, dimension : int
        Transformer layers, and features per token.
    has_adapter : bool
        Whether a LoRA adapter is merged into them.
    left_out : tuple of str
        Tensors outside ESM-2, such as a classifier's.
    """

    sha256: str
    layers: int
    dimension: int
    has_adapter: bool = False
    left_out: tuple[str, ...] = ()


# The demo model is the same on every machine, and no file.
DEMO_WEIGHTS = KnownWeights(
    "129ce4726f6c6e07dad3f6144b3cc14977f7d3741b5620ae94edbb1de8cf17f2", layers=4, dimension=64
)


def known_weights(reference: str) -> KnownWeights | None:
    """What is known of a model's weights; None if they must be read.

    Parameters
    ----------
    reference : str
        As for `load_checkpoint`.
    """
    if reference == DEMO:
        return DEMO_WEIGHTS
    files = states_of(reference)
    return recall(files) if files else None


def recall(files: FileStates) -> KnownWeights | None:
    """What is kept for files in this state, if anything.

    Parameters
    ----------
    files : FileStates
    """
    return _checked(caches.recall(_KIND, _name(files), _key(files)))


def _checked(kept: Any) -> KnownWeights | None:
    """What was kept, unless it is damaged: the file may hold anything."""
    with suppress(TypeError, KeyError, AttributeError):
        known = KnownWeights(**{**kept, "left_out": tuple(kept["left_out"])})
        if (
            _SHA256.fullmatch(known.sha256)
            and known.layers in range(1, _MOST_LAYERS)
            and known.dimension in range(1, _MOST_FEATURES)
            and isinstance(known.has_adapter, bool)
            and all(isinstance(name, str) for name in known.left_out)
        ):
            return known
    return None


def remember(files: FileStates, known: KnownWeights) -> None:
    """Keep what is known of files if possible. It replaces what was kept for the same paths.

    Parameters
    ----------
    files : FileStates
        State before the files were read. It must be unchanged.
    known : KnownWeights
    """
    if files.are_settled:
        caches.remember(_KIND, _name(files), _key(files), asdict(known))


def forget(files: FileStates) -> None:
    """Remove what is kept for these paths.

    Parameters
    ----------
    files : FileStates
    """
    caches.forget(_KIND, _name(files))


def _name(files: FileStates) -> bytes:
    """A name made of the paths only, so that new weights replace old ones."""
    return os.fsencode("\0".join(state[0] for state in files.states))


def _key(files: FileStates) -> list[object]:
    # Frequencies that a file leaves out are computed. Their last bits depend on torch and on the
    # processor, and several machines may share a home directory.
    where = [_torch(), os.environ.get("ATEN_CPU_CAPABILITY", ""), _processor()]
    return [_ALGORITHM, __version__, *where, list(map(list, files.states))]


def _torch() -> str:
    with suppress(PackageNotFoundError):
        return version("torch")
    return ""


def _processor() -> str:
    """Digest of a processor's instruction sets."""
    flags = b""
    with suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        flags = next(
            (line for line in file if line.lower().startswith((b"flags", b"features"))), b""
        )
    return sha256(flags + platform.machine().encode()).hexdigest()[:16]
