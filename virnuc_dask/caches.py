"""A cache of values that later processes reuse, in the user's private cache directory.

Each entry has a name, a key and a value. `recall` returns a value only for the same key, so the key
must contain everything that the value depends on.

Nothing here raises an error. Values that cannot be kept, or are damaged, are computed again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from virnuc_dask.files import write_durably

# Per kind. A digest has less than 1 KB, a mean up to 27 KB (5,120 features).
_MOST_ENTRIES = 200


def recall(kind: str, name: bytes, key: Any) -> Any:
    """Return the value that is kept for a name and key, or None.

    Parameters
    ----------
    kind : str
        Kind of the entry, such as "weights".
    name : bytes
        Name of the entry.
    key : JSON value
        The key that was given to `remember`.

    Returns
    -------
    JSON value, optional
        The file may be damaged, so the caller must check the value.
    """
    # The file may hold anything, even JSON that is nested too deeply.
    with suppress(OSError, ValueError, RecursionError):
        entry = _entry(kind, name)
        if entry is None or not is_private(entry.parent):
            return None
        document = json.loads(entry.read_bytes())
        if isinstance(document, dict) and document.get("key") == key:
            return document.get("value")
    return None


def remember(kind: str, name: bytes, key: Any, value: Any) -> None:
    """Keep a value, if possible; it replaces an earlier value of the same kind and name.

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
        if is_private(entry.parent):
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
    """File of an entry, or None if the user has no home directory."""
    place = folder()
    return place and place / f"{kind}-{sha256(name).hexdigest()[:32]}.json"


def folder() -> Path | None:
    """Directory of the entries, or None if the user has no home directory."""
    # Follows the XDG Base Directory Specification; torch.hub keeps weights in the same directory.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111  # pathlib raises without HOME
    return cache / "virnuc_dask" if cache.is_absolute() else None


def is_private(folder: Path) -> bool:
    """Whether only this user can write into a directory. Entries of another are not used."""
    state = folder.stat()
    return state.st_uid == os.geteuid() and not state.st_mode & 0o022
