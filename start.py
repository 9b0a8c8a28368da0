"""Set up an environment beside this file and use it; needs nothing but Python 3.11 and pip's index.

python3 start.py demo    embed real viral proteins, show what came out; installs what users need
python3 start.py test    run the quick tests; with --all, or as pytest is told, all of them
python3 start.py check   lint, types, and who may import whom; also the Dockerfile, workflows
python3 start.py docs    build the pages of docs/ into site/
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
INSTALLED_FROM = (
    "pyproject.toml",
    "constraints.txt",
    "hatch_build.py",
    "virnuc_dask/encoder/cpu_kernels.cpp",
)
QUERY = "sp|P36782|VE2_HPV12"
# Written last, so that an interrupted installation is taken up again.
INSTALLED = ENVIRONMENT / "installed"


def main() -> int:
    commands = {"demo": demo, "test": test, "check": check, "docs": docs}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever has less meets this line first
        print(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}")
        return 2
    os.chdir(HERE)
    try:
        install("[export,faiss,s3,umap]" if sys.argv[1] == "demo" else "[dev]")
        return commands[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        print(f"\ninterrupted; to go on: python3 start.py {sys.argv[1]}")
        return 130


def install(extras: str) -> None:
    """Install the package with extras; whoever has `dev` has all of them."""
    sources = "\n".join((HERE / name).read_text() for name in INSTALLED_FROM)
    if INSTALLED.exists() and INSTALLED.read_text() in (
        f"[dev]\n{sources}",
        f"{extras}\n{sources}",
    ):
        return
    print(f"installing into {ENVIRONMENT}: once, and it takes a few minutes", flush=True)
    if "PIP_EXTRA_INDEX_URL" not in os.environ:
        index = "https://download.pytorch.org/whl/cpu"
        print(f"(without CUDA: PIP_EXTRA_INDEX_URL={index})", flush=True)
    if not PYTHON.exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=False)
        if made.returncode:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            raise SystemExit("cannot make an environment; on Debian: apt install python3-venv")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--constraint", "constraints.txt", "--editable", f".{extras}"]
    if subprocess.run(pip, check=False).returncode:
        raise SystemExit("the installation failed; the same command tries again")
    INSTALLED.write_text(f"{extras}\n{sources}")


def demo(arguments: list[str]) -> int:
    store, peptides = HERE / "demo.zarr", HERE / "demo.faa"
    with open(peptides, "w") as file:
        script = [PYTHON, "examples/lambda_orfs.py", "examples/lambda_virus.fa.gz"]
        subprocess.run(script, stdout=file, check=True)
    proteins = "examples/viral_proteins.faa.gz"
    print("\nEmbedding the phage lambda's open reading frames and 300 viral proteins.")
    command = ["run", peptides.name, proteins, store.name, "--model", "demo"]
    command += ["--rows-per-chunk", "32", *arguments]
    code = show("-m", "virnuc_dask", *command)
    if code not in (0, 3):
        return code
    print("\nWhich chunks are there:")
    shown = show("-m", "virnuc_dask", "status", store.name)
    print("\nOpened lazily as an xarray.Dataset:")
    shown |= show("-c", f"import virnuc_dask; print(virnuc_dask.open_store({store.name!r}))")
    print("\nNearest neighbours; of random weights, so by composition only:", flush=True)
    shown |= show("-m", "virnuc_dask", "nearest", store.name, "--query", QUERY, "--k", "5")
    print(
        "\nKill it half-way and type it again; to start afresh: python3 start.py demo --overwrite"
    )
    print("For the commands of the README: . .venv/bin/activate")
    return code or shown


def test(arguments: list[str]) -> int:
    # Most of a fault test is waiting for processes to start. More threads each would only fight.
    for library in ("OMP", "NUMBA"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    # Else each of a thousand processes compiles what it imports, and the tests, anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    several = ("-n", "3" if "--all" in arguments else "2", "--dist", "loadfile")
    several += ("--no-loadscope-reorder",)
    if not arguments:
        return show("-m", "pytest", *several, "--quick")
    return show("-m", "pytest", *several, *(each for each in arguments if each != "--all"))


def check(_arguments: list[str]) -> int:
    commands = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    codes = [show("-m", *command) for command in commands]
    programs = (
        ("lint-imports", "--no-logo"),  # who may import whom: the contracts in pyproject.toml
        ("hadolint", "Dockerfile"),
        ("zizmor", "--offline", "--quiet", ".github/workflows"),
    )
    for name, *arguments in programs:
        program = [PYTHON.with_name(name), *arguments]
        codes.append(subprocess.run(program, check=False).returncode)
    return int(any(codes))  # one that was killed has a code below zero


def docs(arguments: list[str]) -> int:
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    return show("-m", "mkdocs", "build", "--strict", *arguments)


def show(*command: str) -> int:
    """Run a command. A terminal's Ctrl-C reaches it too: it ends in its own way, with a summary."""
    process, interrupt = subprocess.Popen([str(PYTHON), *command]), None
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt:
        raise interrupt
    return process.returncode


if __name__ == "__main__":
    raise SystemExit(main())
