"""Real input, real stores, real processes; shared by all tests."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import settings
from nursery import Nursery
from s3 import Server, objects
from xopen import xopen

from virnuc_dask.settings import Settings
from virnuc_dask.store.store import TASK_ARRAYS, Store

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ONE_CORE = Path(__file__).parent / "support" / "one_core"
PROGRAM = [sys.executable, "-m", "virnuc_dask"]
VIRAL_PROTEINS = EXAMPLES / "viral_proteins.faa.gz"

# Deadlines measure the machine's other work.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Awkward on purpose: long, empty, invalid, gaps, lower case, duplicate ids, a J and stops.
AWKWARD = (
    ">a first\nMKTAYIAKQRQISFVKSHFSRQ\n"
    ">b\nmktay-iakqr.qis*\n"
    ">empty\n"
    ">stop inside\nMKT*AYI\n"
    ">a again, the same id\nMKTJJ\n"
    ">digit\nMKT1\n"
    f">long\n{'MKTAYIAKQRQISFVKSHFSRQ' * 4}\n"
)


def pytest_configure(config: pytest.Config) -> None:
    # What tests import is never garbage. Looking for some took half of the time in which they are
    # collected, which xdist's first process leaves to the others.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()
    # Before they are imported, so that a failure shows values.
    pytest.register_assert_rewrite("damage", "harness", "killed_writes", "power_cuts")
    # In a script's background Ctrl-C is ignored, and programs that are started respect that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.freeze()  # or pytest looks for garbage five times more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out slow tests, and all but the first case of sweeps",
    )


def leave_out_long_tests(config: pytest.Config, items: list[pytest.Item]) -> None:
    begun: set[str] = set()
    kept, left_out = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        is_sweep = "sweep" in item.keywords
        is_long = "slow" in item.keywords or (is_sweep and function in begun)
        begun.add(function)
        (left_out if is_long else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


# Files that take longest come first, so that no process is left with one of them at the end.
LONGEST = ("test_poison", "test_kill_and_resume", "test_cluster", "test_many_kills", "test_bucket")
LONGEST += ("test_cli", "test_readme", "test_hanging", "test_another_store", "test_starting")
LONGEST += ("test_workflows", "test_wheel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))  # stable
    if config.getoption("quick"):
        leave_out_long_tests(config, items)

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device; torch finds none"
    if "soak" not in str(config.getoption("-m")):
        reasons["soak"] = "takes minutes to hours: -m soak asks for it"
    for item in items:
        for keyword, reason in reasons.items():
            if keyword in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Processes that tests start see one core: see `tests/support/one_core`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ONE_CORE), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache and a folder for temporary files, so that tests leave nothing in the user's.

    Whatever is killed may leave something there, such as workflow engines and Dask's schedulers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # One for all processes of pytest: the lock of a GPU is there.
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tmp"
        folder.mkdir(exist_ok=True)
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", None)  # which is found anew
        yield


@pytest.fixture(scope="session")
def peptides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phage lambda's open reading frames of 12 residues and more: 2,049 real peptides."""
    path = tmp_path_factory.mktemp("peptides") / "lambda_orfs.faa"
    script = [sys.executable, "examples/lambda_orfs.py", "examples/lambda_virus.fa.gz"]
    with path.open("w") as file:
        subprocess.run([*script, "--minimum", "12"], cwd=ROOT, stdout=file, check=True)
    return path


@pytest.fixture(scope="session")
def some_proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred of the viral proteins, for what would take long with all of them.

    The longest comes first, so that the last one is in the chunk that a run begins last.
    """
    path = tmp_path_factory.mktemp("proteins") / "some.faa"
    with xopen(VIRAL_PROTEINS) as text:
        records = list(islice(SimpleFastaParser(text), 100))
    records.sort(key=lambda record: -len(record[1]))
    path.write_text("".join(f">{title}\n{sequence}\n" for title, sequence in records))
    return path


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """Seven records, each with something odd about it."""
    path = tmp_path / "awkward.faa"
    path.write_text(AWKWARD)
    return path


Maker = Callable[..., Store]


def made(inputs: Path, path: Path, *, embed: bool = True, **settings: Any) -> Store:
    """A new store of an input; all of it embedded, or nothing, in this process.

    Layer 0, the token embedding, is quick, and as good as any for what a store does.
    """
    from virnuc_dask.runtime.embed import embed_chunk
    from virnuc_dask.runtime.prepare import prepare

    chosen = Settings(**({"model": "demo", "rows_per_chunk": 32, "repr_layer": 0} | settings))
    store, model = prepare(inputs, path, chosen, lambda _event: None)
    for chunk in range(store.chunk_count if embed else 0):
        embed_chunk(str(store.path), chunk, store.identity, model)
    return store


def copied(store: Store, path: Path) -> Store:
    """A copy with an id of its own, for what is computed from a store is kept by its id."""
    metadata = shutil.copytree(store.path, path) / "zarr.json"
    metadata.write_text(metadata.read_text().replace(store.id, uuid4().hex))
    return Store(path)


@pytest.fixture(scope="session")
def viral_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The one that most tests begin with: each has a copy."""
    return made(VIRAL_PROTEINS, tmp_path_factory.mktemp("viral") / "viral.zarr")


@pytest.fixture
def make_store(tmp_path: Path, request: pytest.FixtureRequest) -> Maker:
    """Make a store, as `made` does, in the test's own folder."""

    def make(inputs: Path, name: str = "out.zarr", **settings: Any) -> Store:
        if inputs == VIRAL_PROTEINS and not settings:
            return copied(request.getfixturevalue("viral_store"), tmp_path / name)
        return made(inputs, tmp_path / name, **settings)

    return make


@pytest.fixture
def store(make_store: Maker) -> Store:
    """300 real proteins in ten chunks."""
    return make_store(VIRAL_PROTEINS, "viral.zarr")


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """Two worker processes, kept for the whole session."""
    from virnuc_dask.runtime.dask_cluster import connect

    with connect("local", workers=2) as connected:
        yield connected


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Processes to be killed, one at a time."""
    with Nursery() as started:
        yield started


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server of this session's own."""
    with Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def blinded(tmp_path: Path) -> tuple[str, ...]:
    """The beginning of a command that sees an empty folder where others see `hidden`."""
    hide = f'mount -t tmpfs none "{tmp_path}/hidden" && exec "$@"'
    command = ("unshare", "--mount", "sh", "-c", hide, "sh")
    (tmp_path / "hidden").mkdir()
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs leave to mount in a namespace of its own, as root has")
    return command


@pytest.fixture
def other_esm(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds PyPI's esm, which is not fair-esm, in its place."""
    (package := tmp_path / "site" / "esm").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "3.2.1"\n')
    (package / "data").mkdir()
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(package.parent), str(ROOT)))}


@pytest.fixture
def bench(tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `killed_writes.Bench`."""
    from killed_writes import make_bench

    return make_bench(tmp_path, make_store, monkeypatch)


@pytest.fixture
def lab(tmp_path: Path, make_store: Maker) -> Iterator[Any]:
    """A `power_cuts.Lab`, or a skip where no image can be mounted."""
    from power_cuts import lab_in

    with lab_in(tmp_path, make_store) as lab:
        yield lab


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run a command in a process of its own, in an empty directory."""

    def call(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            **options,
        )

    return call


@pytest.fixture
def cli_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command as `cli` does, but in this process, where it is no matter of processes.

    The README's commands are all run in processes of their own.
    """
    from click.testing import CliRunner

    from virnuc_dask.cli.main import main

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return call


def command(*arguments: object) -> list[str]:
    """The command line of a command."""
    return [*PROGRAM, *map(str, arguments)]


def tree(path: Path | str) -> dict[str, tuple[Any, Any, bytes]]:
    """Every file of a store: inode, modification time and content. Equal: nothing was written.

    Behind a URL: every object, with its ETag and time.
    """
    if isinstance(path, str):
        return objects(path)
    return {
        str(file.relative_to(path)): (
            file.stat().st_ino,
            file.stat().st_mtime_ns,
            file.read_bytes(),
        )
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def chunk_bytes(path: Path | str) -> dict[str, bytes]:
    """The content of every file that tasks write."""
    return {
        name: content
        for name, (_, _, content) in tree(path).items()
        if name.partition("/")[0] in TASK_ARRAYS
    }
