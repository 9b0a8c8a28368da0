"""Python loads this at the start of every process that `faults.arm` has prepared.

It takes the place of a `sitecustomize` that the environment may have.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("faults", Path(__file__).parents[1] / "faults.py")
assert spec is not None
assert spec.loader is not None
faults = module_from_spec(spec)
spec.loader.exec_module(faults)
faults.install_with_the_encoder()
