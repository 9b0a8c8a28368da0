"""A directory in Zarr format that can be removed as soon as a write has failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

from zarr.abc.buffer import Buffer
from zarr.storage import LocalStore


class ZarrFolder(LocalStore):
    """Zarr's store in a directory, with an end to its writes.

    Zarr writes several files at once. If one fails, the others go on behind the caller's back, and
    make the directory again that the caller has removed.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self._changed = Condition()
        self._is_left = False
        self._writes = 0

    def leave(self) -> None:
        """Refuse further writes, and return when those that have begun are over."""
        with self._changed:
            self._is_left = True
            self._changed.wait_for(lambda: not self._writes)

    async def set(self, key: str, value: Buffer) -> None:  # noqa: D102  # as in zarr
        with self._counted():
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:  # noqa: D102  # as in zarr
        with self._counted():
            await super().set_if_not_exists(key, value)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            if self._is_left:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            self._writes += 1
        try:
            yield
        finally:
            with self._changed:
                self._writes -= 1
                self._changed.notify_all()
