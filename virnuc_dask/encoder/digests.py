"""Digests of weights that were hashed before, kept from one run to the next.

A kept digest counts only for the very same files: same paths, devices, inodes, sizes and times. The
time of the last change, ctime, cannot be set, so a file with other content differs in it, unless it
was written within the clock's granularity or its file system keeps no such time. A digest that is
wrong all the same lets nothing into a store: every worker hashes the weights that it has loaded.

What cannot be kept, or is damaged, is hashed again.
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

# To be counted up whenever the same weights get another digest.
_ALGORITHM = 1
_KIND = "weights"
# The coarsest times that file systems keep. A younger file may change once more and look the same.
_SETTLED_NS = 2 * 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileStates:
    """What identifies the content of some files, without reading them.

    Attributes
    ----------
    states : tuple of tuple
        Path, device, inode, size, mtime and ctime of each, the times in ns.
    are_settled : bool
        Whether any later change will be seen: all files were last changed some seconds before.
    """

    states: tuple[tuple[str, int, int, int, int, int], ...]
    are_settled: bool

    @classmethod
    def of(cls, files: Sequence[Path]) -> FileStates:
        """Of files as they are now.

        Parameters
        ----------
        files : sequence of path
            Absolute. Of a link it is what it leads to that counts.

        Raises
        ------
        OSError
        """
        now = time.time_ns()
        states, newest = [], 0
        for file in files:
            found = file.stat()
            times = found.st_mtime_ns, found.st_ctime_ns
            states.append((str(file), found.st_dev, found.st_ino, found.st_size, *times))
            newest = max(newest, *times)
        return cls(tuple(states), newest + _SETTLED_NS <= now)

    def is_same(self, other: FileStates | None) -> bool:
        """Whether nothing has changed between two looks."""
        return other is not None and self.states == other.states


def recall(files: FileStates) -> str | None:
    """The digest that is kept of files in this state, if there is one.

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
    """Keep the digest of files, instead of an earlier one of the same paths, if that is possible.

    Parameters
    ----------
    files : FileStates
        As they were before they were read, and still are.
    digest : str
    """
    if files.are_settled:
        caches.remember(_KIND, _name(files), _key(files), digest)


def forget(files: FileStates) -> None:
    """Remove what is kept of these paths.

    Parameters
    ----------
    files : FileStates
    """
    caches.forget(_KIND, _name(files))


def _name(files: FileStates) -> bytes:
    """Of the paths only, so that a new digest takes the place of an old one."""
    return os.fsencode("\0".join(state[0] for state in files.states))


def _key(files: FileStates) -> list[object]:
    # Frequencies that a file leaves out are computed, with last bits that torch and the processor
    # decide. A home may be shared by several machines.
    kind = torch.backends.cpu.get_cpu_capability()
    return [_ALGORITHM, __version__, torch.__version__, kind, [list(s) for s in files.states]]
