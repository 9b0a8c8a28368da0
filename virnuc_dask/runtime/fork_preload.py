"""Preload the modules of workers. Only the process that forks the workers imports this."""

from __future__ import annotations

import gc
import signal
from contextlib import suppress

# A terminal sends SIGINT and SIGHUP to this process and to its workers too. Both ignore them, and
# the coordinator handles them. Workers inherit this.
for _number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)

import virnuc_dask.runtime.workers  # noqa: E402, F401
from virnuc_dask.encoder.fair_esm import fair_esm  # noqa: E402
from virnuc_dask.errors import UsageError  # noqa: E402

with suppress(UsageError):  # workers that only verify do not need it
    fair_esm()
# No garbage collection of what is loaded: its pages stay shared, and processes end at once.
gc.freeze()
