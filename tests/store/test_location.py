"""Where a store may be put: links, mount points, long names, home; and who is writing there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import VIRAL_PROTEINS, Cli, command
from nursery import wait_for

import virnuc_dask
from virnuc_dask.errors import StoreError, UsageError
from virnuc_dask.files import expanded, lock, remove_orphans
from virnuc_dask.runtime import events
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings
from virnuc_dask.store import directory
from virnuc_dask.store.chunk_checks import check_sequences
from virnuc_dask.store.create import Ingest
from virnuc_dask.store.store import Store

QUICK = ("--model=demo", "--repr-layer", 0, "--workers", 1, "-q")


def make(path: Path) -> Store:
    return prepare(VIRAL_PROTEINS, path, Settings("demo", repr_layer=0), lambda _event: None)[0]


# --- links, and what cannot be renamed ---


@pytest.mark.parametrize("leads_to", ["an empty directory", "nothing yet", "another link"])
@pytest.mark.slow
def test_a_link_is_followed(leads_to: str, tmp_path: Path) -> None:
    scratch, link = tmp_path / "scratch" / "here", tmp_path / "link.zarr"
    link.symlink_to(scratch)
    if leads_to == "an empty directory":
        scratch.mkdir(parents=True)
    elif leads_to == "another link":
        scratch.parent.mkdir()
        scratch.symlink_to(tmp_path / "further")
    store = make(link)
    assert check_sequences(store) is None
    assert link.is_symlink()
    assert (link.resolve() / "zarr.json").is_file()
    assert not [name for name in os.listdir(scratch.parent) if name.endswith(".ingest")]
    assert virnuc_dask.resume(link, workers=1).complete
    assert make(link).present().all()


def refused(cli: Cli, path: object, **options: Any) -> str:
    """What a run says that cannot put a store there, of an input that would never end."""
    reader, writer = os.pipe()
    try:
        done = cli("run", "-", path, *QUICK, stdin=reader, **options)
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.slow
def test_the_working_directory_is_refused_before_the_input_is_read(
    cli: Cli, tmp_path: Path
) -> None:
    assert "working directory; name a directory within it, such as out.zarr" in refused(cli, ".")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_mount_point_is_refused_before_the_input_is_read(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    script = f'cd "{tmp_path}" && mkdir m && mount --bind volume m && exec "$@"'
    namespace = ("unshare", "--mount", "sh", "-c", script, "sh")
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs leave to mount in a namespace of its own, as root has")
    shutil.rmtree(tmp_path / "m")
    with subprocess.Popen(
        [*namespace, *command("run", "-", "m", *QUICK)],
        stdin=subprocess.PIPE,  # in which nothing ever comes
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr is not None
        message = run.stderr.read()
        assert run.wait(timeout=60) == 2
    assert "Device or resource busy; name a directory within it, such as m/out.zarr" in message
    assert os.listdir(tmp_path / "volume") == []


def test_an_empty_directory_that_gets_no_store_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "out.zarr"
    folder.mkdir(mode=0o750)
    before = folder.stat()
    bad = tmp_path / "bad.faa"
    bad.write_bytes(b">a\nMK\0V\n")
    with pytest.raises(UsageError):
        prepare(bad, folder, Settings("demo"), lambda _event: None)
    assert folder.stat().st_ino == before.st_ino
    assert folder.stat().st_mode == before.st_mode
    assert sorted(os.listdir(tmp_path)) == ["bad.faa", "out.zarr"]


@pytest.mark.parametrize("where", ["a file", "a loop", "a name that is too long"])
@pytest.mark.slow
def test_what_can_be_no_store_is_said_before_the_input_is_read(
    where: str, cli: Cli, tmp_path: Path
) -> None:
    if where == "a file":
        (tmp_path / "thesis").write_text("four years")
        assert "Not a directory" in refused(cli, "thesis/out.zarr")
    elif where == "a loop":
        (tmp_path / "loop").symlink_to("loop")
        assert "loop: Too many levels of symbolic links" in refused(cli, "loop")
    else:
        assert "File name too long" in refused(cli, "x" * 256)
    assert [name for name in os.listdir(tmp_path) if name not in ("thesis", "loop")] == []


@pytest.mark.parametrize("letter", ["x", "ü", "蛋"])
@pytest.mark.slow
def test_a_name_may_be_as_long_as_the_system_lets_it_be(
    letter: str, cli: Cli, tmp_path: Path
) -> None:
    name = letter * (255 // len(letter.encode()))
    done = cli("run", VIRAL_PROTEINS, name, *QUICK)
    assert done.returncode == 0, done.stderr
    assert cli("verify", name).returncode == 0
    # Beside a table there is a file with a longer name.
    for suffix, more in ((".npz", ""), (".csv", ".json")):
        out = letter * ((255 - len(suffix + more)) // len(letter.encode())) + suffix
        assert cli("export", name, out).returncode == 0
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".")]


# --- home ---


def test_a_tilde_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    shutil.copy(VIRAL_PROTEINS, home / "in.faa.gz")
    store, _ = prepare(
        "~/in.faa.gz", "~/o.zarr", Settings("demo", repr_layer=0), lambda _event: None
    )
    assert str(store.path) == f"{home}/o.zarr"
    assert virnuc_dask.open_store(Path("~/o.zarr")).sizes["sequence"] == store.records
    assert virnuc_dask.verify("~/o.zarr").missing == store.chunk_count
    assert virnuc_dask.export("~/o.zarr", "~/o.csv", partial=True) == store.records
    with pytest.raises(UsageError, match=f"{home}/none.pt|~/none.pt"):
        virnuc_dask.load_encoder("~/none.pt")
    assert sorted(os.listdir(home)) == ["in.faa.gz", "o.csv", "o.csv.json", "o.zarr"]
    assert os.listdir(work) == []
    # As in a shell, a name that merely begins so is a name.
    shutil.copy(VIRAL_PROTEINS, work / "~copy.faa.gz")
    store, _ = prepare("~copy.faa.gz", "~o.zarr", Settings("demo"), lambda _event: None)
    assert store.records == 300
    assert sorted(os.listdir(work)) == ["~copy.faa.gz", "~o.zarr"]


@pytest.mark.slow
def test_on_the_command_line_too(cli: Cli, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    options = ("--telemetry=~/t.jsonl", *QUICK)
    done = cli("run", VIRAL_PROTEINS, "~/o.zarr", *options, env=os.environ | {"HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(home)) == ["o.zarr", "t.jsonl"]
    assert os.listdir(tmp_path) == ["home"]


def test_without_a_home_a_tilde_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_number: int) -> None:
        raise KeyError("uid not found")  # a user without an entry cannot be had in this process

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(UsageError, match="no home directory"):
        expanded("~/out.zarr")
    assert expanded("out~.zarr") == "out~.zarr"


# --- who is writing ---


@pytest.mark.slow
def test_what_an_ingest_in_another_container_writes_is_left_alone(tmp_path: Path) -> None:
    """The same host name, the same disk, and process numbers that mean nothing to each other."""
    container = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs leave to make a namespace of processes, as root has")
    path, bad = tmp_path / "out.zarr", tmp_path / "bad.faa"
    bad.write_bytes(b">a\nMK\0V\n")
    with subprocess.Popen(
        [*container, *command("run", "-", path, *QUICK)], stdin=subprocess.PIPE
    ) as first:
        assert first.stdin is not None
        first.stdin.write(b"".join(b">s%d\nMKTAYIAKQR\n" % number for number in range(140_000)))
        first.stdin.flush()
        # The last array of a block. A file that is being written has another name.
        wait_for(lambda: list(tmp_path.glob(".out.zarr~*.ingest/offset/c.0")))
        (staging,) = tmp_path.glob(".out.zarr~*.ingest")
        before = {file for file in staging.rglob("*") if not file.name.endswith(".partial")}
        for others in ((), container):
            second = subprocess.run(
                [*others, *command("run", bad, path, "--model=demo")], check=False
            )
            assert second.returncode == 2
        assert before <= set(staging.rglob("*"))
        first.stdin.write(b">last\nMKV\n")
        first.stdin.close()
        assert first.wait(timeout=120) == 0
    store = Store(path)
    assert store.records == 140_001
    assert check_sequences(store) is None


@pytest.mark.parametrize("lost", ["length/c.0", "length", "."])
def test_an_ingest_from_which_something_was_removed_is_not_published(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does so: nothing would mend a store without its beginning."""
    monkeypatch.setattr("virnuc_dask.store.create.SEQUENCES_PER_CHUNK", 100)
    path = tmp_path / "out.zarr"

    def remove(event: object) -> None:
        if isinstance(event, events.ModelChosen):
            return
        (staging,) = tmp_path.glob(".out.zarr~*.ingest")
        assert (staging / "length" / "c.0").is_file()
        target = staging / lost
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    with pytest.raises(StoreError, match=r"was removed, .*starts over"):
        prepare(VIRAL_PROTEINS, path, Settings("demo"), remove)
    assert os.listdir(tmp_path) == []
    assert make(path).records == 300
    assert os.listdir(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize(
    ("host", "age", "stays"), [("here", 0, False), ("there", 0, True), ("there", 2, False)]
)
def test_what_killed_ingests_left_is_removed_once_that_is_certain(
    host: str, age: int, stays: bool, tmp_path: Path
) -> None:
    """On a disk that several machines share, a lock may not reach from one to another."""
    name = os.uname().nodename if host == "here" else "another.host"
    left = tmp_path / f".out.zarr~{name}~{os.getpid()}~{'0' * 32}.ingest"
    (left / "length").mkdir(parents=True)
    for entry in (left / "length", left):
        os.utime(entry, times=(time.time() - age * 86_400,) * 2)
    assert make(tmp_path / "out.zarr").records == 300
    assert left.exists() == stays


def test_another_ingest_may_remove_a_directory_that_is_not_locked_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []

    def late(descriptor: int) -> bool:
        if not removed:
            (before,) = os.listdir(tmp_path)
            remove_orphans(tmp_path, ".out.zarr")
            removed.append(before)
        return lock(descriptor)

    monkeypatch.setattr(directory, "lock", late)
    with Ingest(tmp_path / "out.zarr"):
        (staging,) = os.listdir(tmp_path)
        remove_orphans(tmp_path, ".out.zarr")
        assert os.listdir(tmp_path) == [staging]
    assert removed[0].endswith(".new")
    assert staging.endswith(".ingest")


def test_a_file_system_without_locks_is_judged_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # such a disk cannot be had here

    monkeypatch.setattr("fcntl.flock", unsupported)
    path = tmp_path / "out.zarr"
    with Ingest(path):
        (staging,) = tmp_path.iterdir()
        make(path)
        assert staging.exists()
        os.utime(staging, (0, 0))
        for entry in staging.iterdir():
            os.utime(entry, (0, 0))
        remove_orphans(tmp_path, ".out.zarr")
        assert os.listdir(tmp_path) == ["out.zarr"]
