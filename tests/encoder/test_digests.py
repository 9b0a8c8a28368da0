"""Digests of weights are kept: they are the same as without, and of no other file."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from models import random_network, save_huggingface, save_network
from safetensors.torch import load_file, save_file

from virnuc_dask.encoder import digests, weight_files
from virnuc_dask.encoder.digests import KnownWeights, known_weights
from virnuc_dask.encoder.weight_files import FileStates
from virnuc_dask.encoder.weights import Checkpoint, hashing, known_sha256, load_checkpoint
from virnuc_dask.errors import VirnucError
from virnuc_dask.runtime.plan import plan
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings
from virnuc_dask.store.store import Store

WRONG = "0" * 64
KEPT = asdict(KnownWeights(WRONG, 2, 32))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of digests, of which there is none yet; files may be as young as they like."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_files, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "virnuc_dask"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(save_network(random_network(2, 32, 4), tmp_path / "model.pt"))


def known(reference: Path | str) -> str:
    return known_sha256(load_checkpoint(str(reference)))


def hashed(reference: Path | str) -> str:
    return load_checkpoint(str(reference)).sha256()


def forge(reference: Path | str, digest: str = WRONG) -> None:
    files = load_checkpoint(str(reference)).files
    assert files is not None
    digests.remember(files, KnownWeights(digest, 2, 32))


def published(folder: Path) -> Path:
    return Path(save_network(random_network(2, 32, 4), folder / "model.pt"))


def of_huggingface(folder: Path) -> Path:
    return Path(save_huggingface(random_network(2, 32, 4), folder))


def sharded(folder: Path) -> Path:
    of_huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def adapter(folder: Path) -> Path:
    import peft
    import transformers

    network = transformers.EsmModel.from_pretrained(of_huggingface(folder))
    peft.get_peft_model(network, peft.LoraConfig(target_modules=["query"])).save_pretrained(folder)
    return folder


LAYOUTS = {
    published: {"model.pt"},
    of_huggingface: {"config.json", "model.safetensors"},
    sharded: {"config.json", "model.safetensors.index.json", "0.safetensors", "1.safetensors"},
    adapter: {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("config.json", "model.safetensors"),
    },
}


# --- the same, without reading ---


@pytest.mark.parametrize(("make", "names"), LAYOUTS.items())
def test_a_kept_digest_is_the_same(
    make: Callable[[Path], Path],
    names: set[str],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = make(tmp_path)
    expected = hashed(reference)
    assert not cache.exists()
    assert known(reference) == expected
    (entry,) = cache.iterdir()
    assert {Path(state[0]).name for state in json.loads(entry.read_text())["key"][-1]} == names
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(Checkpoint, "sha256", None)
    assert known(reference) == expected
    monkeypatch.undo()
    for name in names:  # each of the files counts
        os.utime(tmp_path / name)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
        files = load_checkpoint(str(reference)).files
        assert files is not None
        assert digests.recall(files) is None
        assert known(reference) == expected


def test_commands_hash_weights_once(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "in.faa"
    inputs.write_text(">a\nMKV\n")
    settings = Settings(str(model))
    store, spec = prepare(inputs, tmp_path / "a.zarr", settings, lambda _event: None)
    assert spec.weights_sha256 == hashed(model)
    monkeypatch.setattr(Checkpoint, "sha256", None)
    for name in ("a.zarr", "b.zarr"):  # comparing a store, and making one
        again, found = prepare(inputs, tmp_path / name, settings, lambda _event: None)
        assert again.identity == store.identity
        assert found == spec
    assert plan(inputs, settings).model == spec


@pytest.mark.parametrize("make", LAYOUTS)
def test_what_is_known_is_what_is_read(
    make: Callable[[Path], Path], cache: Path, tmp_path: Path
) -> None:
    """Whether a model was read or is known, a run says and does the same."""
    reference = make(tmp_path)
    inputs = tmp_path / "in.faa"
    inputs.write_text(">a\nMKV\n")
    settings = Settings(str(reference))
    assert known_weights(str(reference)) is None
    said: list[list[Any]] = [[], []]
    for events in said:
        prepare(inputs, tmp_path / "a.zarr", settings, events.append)
    assert said[0] == said[1]
    kept = known_weights(str(reference))
    assert kept is not None
    assert kept.has_adapter == (make is adapter)
    wrong = Settings(str(reference), repr_layer=3)
    with pytest.raises(VirnucError) as known_error:
        prepare(inputs, tmp_path / "b.zarr", wrong, lambda _event: None)
    for entry in cache.iterdir():
        entry.unlink()
    with pytest.raises(VirnucError, match="layer 3 of a model with 2") as read_error:
        prepare(inputs, tmp_path / "b.zarr", wrong, lambda _event: None)
    assert str(known_error.value) == str(read_error.value)


def test_the_demo_model_is_what_is_said_of_it() -> None:
    checkpoint = load_checkpoint("demo")
    assert known_weights("demo") == KnownWeights(
        checkpoint.sha256(), checkpoint.layers, checkpoint.dimension
    )


def resident(file: Path) -> float:
    """The share of a file that is in the system's memory."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        size = ctypes.c_size_t(len(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), size, pages) == 0
        del start
    return sum(page & 1 for page in pages) / len(pages)


def drop(file: Path) -> None:
    """Have the system forget what it has read of a file."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a file's pages")
@pytest.mark.slow
def test_a_second_start_does_not_read_the_weights(tmp_path: Path, cli: Cli) -> None:
    model = Path(save_network(random_network(4, 640, 20), tmp_path / "model.pt"))
    (tmp_path / "in.faa").write_text(">a\nMKV\n")
    drop(model)
    if resident(model) > 0.1:
        pytest.skip("the file system keeps its files in memory")
    time.sleep(2.1)  # until the file is known to be complete
    shares, said = [], []
    for _ in range(2):
        drop(model)
        # For a GPU, on which nothing is tried.
        arguments = ("plan", "in.faa", "--model", model, "--device", "cuda", "--json")
        done = cli(*arguments, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr
        shares.append(resident(model))
        said.append(json.loads(done.stdout))
    assert said[0] == said[1]
    assert said[0]["model"]["weights_sha256"] == hashed(model)
    assert shares[0] > 0.7
    assert shares[1] < 0.4


# --- files that have changed ---


def overwritten(model: Path, other: bytes) -> None:
    with open(model, "r+b") as file:
        file.write(other)


def replaced(model: Path, other: bytes) -> None:
    (part := model.with_name("part")).write_bytes(other)
    os.utime(part, ns=(0, model.stat().st_mtime_ns))
    part.replace(model)


def linked_elsewhere(model: Path, other: bytes) -> None:
    (target := model.with_name("other")).write_bytes(other)
    os.utime(target, ns=(0, model.stat().st_mtime_ns))
    model.unlink()
    model.symlink_to(target)


@pytest.mark.parametrize("change", [overwritten, replaced, linked_elsewhere])
def test_a_changed_file_is_hashed_again(
    change: Callable[[Path, bytes], None], cache: Path, model: Path, tmp_path: Path
) -> None:
    """Though it has the same name, size and modification time."""
    before, first = model.stat(), known(model)
    content = Path(save_network(random_network(2, 32, 4, seed=1), tmp_path / "other.pt"))
    other = content.read_bytes().replace(b"other/", b"model/")
    assert len(other) == before.st_size
    change(model, other)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = model.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert known(model) == hashed(model) == hashed(content) != first
    assert len(list(cache.iterdir())) == 1  # the old one is gone


def test_a_file_that_has_just_changed_may_change_again_unseen(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "_SETTLED_NS", 600 * 10**9)
    os.utime(model, ns=(0, 0))  # of which ctime tells
    assert known(model) == hashed(model)
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_hashed_has_no_digest(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Checkpoint.sha256

    def meanwhile(self: Checkpoint, given_up: threading.Event | None = None) -> str:
        os.utime(model)
        return own(self, given_up)

    monkeypatch.setattr(Checkpoint, "sha256", meanwhile)
    assert len(known(model)) == 64
    assert not cache.exists()


def test_a_file_that_is_replaced_after_it_was_read_is_hashed_as_it_was(
    cache: Path, model: Path
) -> None:
    first, checkpoint = known(model), load_checkpoint(str(model))
    replaced(model, b"something else")
    assert checkpoint.files is not None
    digests.remember(checkpoint.files, KnownWeights(WRONG, 2, 32))
    assert known_sha256(checkpoint) == first


def test_a_digest_that_was_given_up_is_not_kept(cache: Path, model: Path) -> None:
    given_up = threading.Event()
    given_up.set()
    assert known_sha256(load_checkpoint(str(model)), given_up) == ""
    assert not cache.exists()


# --- the cache itself ---


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"key": [1, ',
        b"[" * 100_000,
        b"[]",
        b"null",
        b"{}",
        {"value": KEPT | {"sha256": WRONG[1:]}},
        {"value": KEPT | {"sha256": WRONG + "\n"}},
        {"value": KEPT | {"sha256": "G" * 64}},
        {"value": KEPT | {"sha256": 7}},
        {"value": KEPT | {"layers": 0}},
        {"value": KEPT | {"layers": "2"}},
        {"value": KEPT | {"dimension": 10**9}},
        {"value": KEPT | {"has_adapter": 1}},
        {"value": KEPT | {"left_out": None}},
        {"value": KEPT | {"left_out": [7]}},
        {"value": KEPT | {"more": 7}},
        {"value": {}},
        {"value": 7},
        {"value": WRONG},
        {"value": None},
        {"value": KEPT, "key": None},
        {"value": KEPT, "key": []},
        {"value": KEPT, "key": [0]},
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_damaged_or_foreign_entry_is_replaced(
    content: bytes | dict[str, Any], cache: Path, model: Path
) -> None:
    expected = known(model)
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    made = json.dumps(json.loads(good) | content) if isinstance(content, dict) else None
    entry.write_bytes(made.encode() if made else content)  # type: ignore[arg-type]
    assert known(model) == expected
    assert entry.read_bytes() == good
    assert list(cache.iterdir()) == [entry]


@pytest.mark.parametrize("obstacle", ["a file", "no such disk", "a directory", "no home"])
def test_without_a_cache_it_is_hashed(
    obstacle: str, cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "a file":
        cache.parent.write_text("")
    elif obstacle == "no such disk":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    elif obstacle == "a directory":
        known(model)
        (entry,) = cache.iterdir()
        entry.unlink()
        entry.mkdir()
    else:

        def nobody(_: int) -> None:
            raise KeyError

        monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # one that is not absolute is to be ignored
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", nobody)
        monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert known(model) == hashed(model)
    assert not [path for path in tmp_path.rglob("weights-*") if path.is_file()]
    with hashing(load_checkpoint(str(model)), or_known=True) as digest:
        assert digest.result() == hashed(model)


def test_a_home_has_its_cache_where_others_are(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    known(model)
    assert len(list((tmp_path / "home" / ".cache" / "virnuc_dask").iterdir())) == 1


def test_what_others_may_have_written_is_not_believed(cache: Path, model: Path) -> None:
    forge(model)
    assert known(model) == WRONG
    cache.chmod(0o777)
    assert known(model) == hashed(model)
    cache.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(cache, 54321, -1)
        assert known(model) == hashed(model)


AT_ONCE = """
import sys
from virnuc_dask.encoder import digests, weight_files
from virnuc_dask.encoder.weights import known_sha256, load_checkpoint
weight_files._SETTLED_NS = 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    checkpoint = load_checkpoint(sys.argv[1])
    print(known_sha256(checkpoint), flush=True)
    digests.forget(checkpoint.files)
"""


@pytest.mark.slow
def test_two_processes_at_once(cache: Path, model: Path) -> None:
    command = [sys.executable, "-c", AT_ONCE, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, set(said.split())) == (0, {hashed(model)})
    assert not list(cache.iterdir())


# --- one that is wrong ---


@pytest.mark.slow
def test_a_wrong_digest_lets_nothing_into_a_store(
    cache: Path, model: Path, tmp_path: Path, cli: Cli
) -> None:
    """Workers hash what they have loaded, and one that finds other weights computes nothing."""
    (tmp_path / "in.faa").write_text(">a\nMKTAYIAKQR\n>b\nMKV\n")
    true = hashed(model)
    forge(model)
    options = ("--model", model, "--workers", 1, "-q")
    done = cli("run", "in.faa", "wrong.zarr", *options)
    assert done.returncode == 2, done.stderr
    assert f"this worker has weights {true[:12]}, the store was made with 000000000000" in (
        done.stderr
    )
    store = Store(tmp_path / "wrong.zarr")
    assert store.identity.weights_sha256 == WRONG
    assert not store.present().any()
    # The entry is gone, so that the next run does not believe it again.
    assert not list(cache.iterdir())
    assert cli("run", "in.faa", "right.zarr", *options).returncode == 0
    assert Store(tmp_path / "right.zarr").identity.weights_sha256 == true
    done = cli("run", "in.faa", "wrong.zarr", *options)
    assert done.returncode == 2
    assert "weights" in done.stderr


def test_links_count_as_what_they_lead_to(cache: Path, model: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link.pt").symlink_to(model)
    first, second = FileStates.of([model]), FileStates.of([link])
    assert first.states[0][1:] == second.states[0][1:]
    torch.save({}, model)
    assert not second.is_same(FileStates.of([link]))
