"""Files that analysis writes: whole, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync


def check_out(out: str | Path, suffixes: Sequence[str], *, force: bool = False) -> Path:
    """The path of a file that can be written. To be asked before work that may take long.

    Parameters
    ----------
    out : path
    suffixes : sequence of str
        One of which it must have, such as ``.tsv``.
    force : bool
        A file that exists is replaced; a link, or what is no file, never is.

    Raises
    ------
    UsageError
        It is a URL, its suffix is not known, it exists, or its directory does not.
    """
    if "://" in str(out):
        raise UsageError(f"{out}: this goes into a file on this machine")
    path = Path(expanded(out))
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{out}: cannot tell the format; known are {' and '.join(suffixes)}")
    if os.path.lexists(path):
        if not force:
            raise UsageError(f"{path} exists; give another name, or --force, which replaces it")
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"{path} is not replaced: it is no file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"{path}: {path.parent} is no directory that can be written to")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name, `path`, once all of it is on the disk.

    Raises
    ------
    OSError
        It cannot be written; the error names `path`.
    """
    # Not with all of its name, which may be as long as a name can be.
    unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        # Its name is for what survives a power cut.
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (unfinished, path):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
