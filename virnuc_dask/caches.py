"""What is worth keeping from one process to the next, in the user's private cache directory.

Each entry has a name, a key and a value. A value is found only under the very key that it was kept
with, so whoever keeps one puts everything into the key that the value depends on.

Nothing here raises. What cannot be kept, or is damaged, is computed again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from virnuc_dask.files import write_durably

# Of each kind. An entry has some kilobytes.
_MOST_ENTRIES = 200


def recall(kind: str, name: bytes, key: Any) -> Any:
    """The value that is kept under a key, or None.

    Parameters
    ----------
    kind : str
        Such as "weights".
    name : bytes
        What the entry is of.
    key : JSON value
        As it was given to `remember`.

    Returns
    -------
    JSON value, optional
        It may be anything: the file may be damaged.
    """
    # A foreign file may be anything, also JSON that is nested too deeply.
    with suppress(OSError, ValueError, RecursionError):
        entry = _entry(kind, name)
        if entry is None or not _is_private(entry.parent):
            return None
        found = json.loads(entry.read_bytes())
        if isinstance(found, dict) and found.get("key") == key:
            return found.get("value")
    return None


def remember(kind: str, name: bytes, key: Any, value: Any) -> None:
    """Keep a value instead of an earlier one of the same kind and name, if that is possible.

    Parameters
    ----------
    kind : str
    name : bytes
    key, value : JSON value
    """
    entry = _entry(kind, name)
    if entry is None:
        return
    with suppress(OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(entry.parent):
            write_durably(entry, json.dumps({"key": key, "value": value}, indent=1).encode())
            others = sorted(entry.parent.glob(f"{kind}-*.json"), key=lambda e: e.stat().st_mtime)
            for old in others[:-_MOST_ENTRIES]:
                old.unlink()


def forget(kind: str, name: bytes) -> None:
    """Remove an entry.

    Parameters
    ----------
    kind : str
    name : bytes
    """
    if entry := _entry(kind, name):
        with suppress(OSError):
            entry.unlink()


def _entry(kind: str, name: bytes) -> Path | None:
    """The file of an entry; None without a home."""
    # As the XDG Base Directory Specification has it; torch's hub keeps weights beside it.
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        folder = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111  # pathlib raises without one
    if not folder.is_absolute():
        return None
    return folder / "virnuc_dask" / f"{kind}-{sha256(name).hexdigest()[:32]}.json"


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have written into a directory."""
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
