"""Python loads this at the start of a process, unless its test has a PYTHONPATH of its own.

The process sees one core only. So a run has one worker unless the test asks for more: each further
one loads torch, which takes longer than what most tests have it do. Nor does its scheduler show a
dashboard, as where bokeh is not installed: to load its pages takes an eighth of a small run's time.
`tests/runtime/test_telemetry.py` looks at them. A process that ends does not
look for garbage first, which takes a third of a second with torch; our own programs do the same.
"""

import atexit
import gc
import os
import sys


class NoDashboard:
    """What is asked for a module before all that could find it."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "distributed.dashboard.scheduler":
            raise ImportError(name)


os.cpu_count = os.process_cpu_count = lambda: 1  # type: ignore[attr-defined,unused-ignore]
os.sched_getaffinity = lambda _: {0}
sys.meta_path.insert(0, NoDashboard())
atexit.register(gc.freeze)
