"""What workers of our own clusters load while they start, instead of at their first chunk.

It is for a worker only, because it changes the process's garbage collector. That finds nothing
among the 180,000 objects of torch and the other modules. It would look while they are loaded
(0.2 s), and once more when the worker ends (0.3 s), for which the coordinator waits.
"""

import atexit
import gc
from contextlib import suppress

gc.disable()
# A worker that fails to start is never replaced. The first chunk loads what is still missing: its
# error is reported, and it is tried again.
with suppress(Exception):
    import virnuc_dask.runtime.embed  # noqa: F401

gc.freeze()
gc.enable()
atexit.register(gc.freeze)
