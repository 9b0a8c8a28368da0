"""Digests of weights, kept from one run to the next.

A kept digest is used only for the same files: same paths, devices, inodes, sizes and times. No
program can set ctime, the time of the last change. So a file with other content has another ctime,
unless it was written within the clock's granularity or its file system keeps no ctime. Even a wrong
digest lets nothing into a store: every worker hashes the weights that it has loaded.

Weights are hashed again if their digest cannot be kept or is damaged.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from virnuc_dask import __version__, caches

# Increase this whenever the same weights get another digest.
_ALGORITHM = 1
_KIND = "weights"
# The coarsest timestamps of file systems. A younger file may change again and look the same.
_SETTLED_NS = 2 * 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def recall(files: FileStates) -> str | None:
    """Digest that is kept for files in this state, if there is one.

    Parameters
    ----------
    files : FileStates

    Returns
    -------
    str, optional
        64 hexadecimal digits.
    """
    digest = caches.recall(_KIND, _name(files), _key(files))
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def remember(files: FileStates, digest: str) -> None:
    """Keep the digest of files if possible. It replaces an earlier one of the same paths.

    Parameters
    ----------
    files : FileStates
        State before the files were read. It must be unchanged.
    digest : str
    """
    if files.are_settled:
        caches.remember(_KIND, _name(files), _key(files), digest)


def forget(files: FileStates) -> None:
    """Remove the digest that is kept for these paths.

    Parameters
    ----------
    files : FileStates
    """
    caches.forget(_KIND, _name(files))


def _name(files: FileStates) -> bytes:
    """A name made of the paths only, so that a new digest replaces an old one."""
    return os.fsencode("\0".join(state[0] for state in files.states))


def _key(files: FileStates) -> list[object]:
    # Frequencies that a file leaves out are computed. Their last bits depend on torch and on the
    # processor, and several machines may share a home directory.
    capability = torch.backends.cpu.get_cpu_capability()
    return [_ALGORITHM, __version__, torch.__version__, capability, list(map(list, files.states))]
