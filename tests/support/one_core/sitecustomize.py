"""Python loads this at the start of a process, unless its test has a PYTHONPATH of its own.

The process sees one core only. So a run has one worker unless the test asks for more: each further
one loads torch, which takes longer than what most tests have it do. Nor does its scheduler show a
dashboard, as where bokeh is not installed: to load its pages takes an eighth of a small run's time.
`tests/runtime/test_telemetry.py` looks at them.
"""

import os
import sys

os.cpu_count = os.process_cpu_count = lambda: 1  # type: ignore[attr-defined,unused-ignore]
os.sched_getaffinity = lambda _: {0}
sys.modules["distributed.dashboard.scheduler"] = None  # type: ignore[assignment]
