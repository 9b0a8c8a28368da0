"""Output files of analysis. A partial file never appears."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded, sync


def check_out(
    out: str | Path, suffixes: Sequence[str], *, force: bool = False, kept: str = ""
) -> Path:
    """Check that a file can be written, before work that may take long; return its path.

    Parameters
    ----------
    out : path
    suffixes : sequence of str
        Allowed suffixes, such as ``.tsv``.
    force : bool
        Allow an existing regular file. A link or a directory is never replaced.
    kept : str
        What the store keeps, such as ``scores``. Then the refusal of an existing file says that
        these are not computed again.

    Raises
    ------
    UsageError
        It is a URL, its suffix is not known, it exists, or its directory does not exist or is not
        writable.
    """
    if "://" in str(out):
        raise UsageError(f"{out}: the output must be a file on this machine")
    path = Path(expanded(out))
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{out}: cannot tell the format; known are {' and '.join(suffixes)}")
    if os.path.lexists(path):
        if not force:
            again = f"; {kept} that the store keeps are not computed again" if kept else ""
            raise UsageError(
                f"{path} exists; give another name, or --force, which replaces it{again}"
            )
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"{path} is not replaced: it is not a regular file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise UsageError(f"{path}: {path.parent} is not a writable directory")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Temporary path for a file; it is renamed to `path` once it is complete and on the disk.

    Raises
    ------
    OSError
        The file cannot be written; the error names `path`.
    """
    # Do not add to the final name, which may already have the maximum length.
    unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        # Only a file that survives a power cut may get the final name.
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (unfinished, path):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
