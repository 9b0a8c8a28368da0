"""What workers are forked from: imported by the process that does so, and by nothing else."""

from __future__ import annotations

import gc
import signal
from contextlib import suppress

# A terminal's Ctrl-C and its end come here and to workers too, which inherit this; the coordinator
# acts on them.
for _number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)

import virnuc_dask.runtime.workers  # noqa: E402, F401
from virnuc_dask.encoder.upstream import fair_esm  # noqa: E402
from virnuc_dask.errors import UsageError  # noqa: E402

with suppress(UsageError):  # workers that only verify do without
    fair_esm()
# Nobody looks through it again: its pages stay shared, and its process ends at once.
gc.freeze()
