"""Compiles the kernels while the package is built or installed, for all processors of this kind.

Without a compiler there are none, and torch does their work, slower.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = [
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fno-exceptions", "-fno-rtti", "-fPIC", "-shared"),
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Floats in a vector, W, and rows of a block that its registers hold.
X86 = {
    "avx512": [*AVX512, "-mprefer-vector-width=512", "-DW=16", "-DROWS=8"],
    "avx2": [*AVX2, "-DW=8", "-DROWS=6"],
}
OTHERS = {"generic": ["-DW=4", "-DROWS=8"]}


class KernelsHook(BuildHookInterface[Any]):
    """Adds the libraries to a wheel, or puts them into the working tree of an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is put together."""
        if self.target_name != "wheel":
            return
        package = Path(self.root, "virnuc_dask", "encoder")
        source = package / "cpu_kernels.cpp"
        for old in package.glob("_kernels_*.so"):
            old.unlink()
        compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or "")
        if not compiler:
            self.app.display_warning("no C++ compiler: built without kernels for the CPU")
            return
        variants = X86 if platform.machine().lower() in ("x86_64", "amd64") else OTHERS
        digest = f'-DSOURCE="{hashlib.sha256(source.read_bytes()).hexdigest()}"'
        for name, flags in variants.items():
            library = package / f"_kernels_{name}.so"
            command = [*compiler, *FLAGS, *flags, digest, "-o", str(library), str(source)]
            try:
                subprocess.run(command, capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "")
                self.app.display_warning(f"built without {library.name}: {error}\n{said}")
                library.unlink(missing_ok=True)
        build_data["artifacts"].append("virnuc_dask/encoder/_kernels_*.so")
        build_data["pure_python"] = False
        if sys.platform == "linux":
            # Loaded by ctypes, so they serve every Python, but only this kind of machine.
            kind = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{kind}"
        else:
            build_data["infer_tag"] = True
