"""What Dask imports while a worker of a cluster of our own starts: all that its tasks need.

Among these 180,000 objects the garbage collector finds nothing. It would look while they are loaded
(0.2 s), and once more when the worker ends (0.3 s), for which the coordinator waits.
"""

import atexit
import gc

gc.disable()
import virnuc_dask.runtime.embed  # noqa: E402, F401

gc.freeze()
gc.enable()
atexit.register(gc.freeze)
