"""What makes presence honest: the seven rules of the design, each with its fault."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from conftest import VIRAL_PROTEINS, Maker, chunk_bytes, command, tree

import virnuc_dask
from virnuc_dask.errors import IdentityMismatchError, InputError, NotAStoreError, StoreError
from virnuc_dask.inputs.reader import read_blocks
from virnuc_dask.inputs.records import InputSummary
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Identity, Settings, Status
from virnuc_dask.store import verify
from virnuc_dask.store.chunk_checks import check_chunk, check_sequences
from virnuc_dask.store.create import Ingest
from virnuc_dask.store.store import Store

ARRAYS = ("sequence_id", "length", "offset", "residues", "status", "embedding")


def first_file(store: Store, array: str) -> Path:
    return store.path / array / ("c.0.0" if array == "embedding" else "c.0")


# --- rule 1: a chunk of fill values is present all the same ---


@pytest.fixture
def hopeless(tmp_path: Path) -> Path:
    """Records of which none can be embedded: their chunk holds nothing but NaN."""
    path = tmp_path / "hopeless.faa"
    path.write_text(">a\nM1\n>b\n\n>c\nM*K\n")
    return path


def test_a_chunk_of_fill_values_is_written_and_present(hopeless: Path, make_store: Maker) -> None:
    store = make_store(hopeless)
    assert store.present().all()
    assert check_chunk(store, 0) is None
    assert np.isnan(store.read_chunk(0)[1]).all()


def test_without_the_setting_that_chunk_would_be_lost(
    hopeless: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr.Array, "with_config", lambda self, _config: self)
    assert not make_store(hopeless).present().any()


# --- rule 2: what has its name survives a power cut ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """System calls that matter for durability, in order, with the path they are about."""
    seen: list[tuple[str, str]] = []
    fsync, replace_, rename = os.fsync, os.replace, os.rename

    def spy_fsync(descriptor: int) -> None:
        seen.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def named(path: Any) -> str:
        """A store's files are reached by its directory's descriptor."""
        return str(Path(path).parent.resolve() / Path(path).name)

    def spy_replace(source: Any, target: Any) -> None:
        seen.append(("rename", named(target)))
        seen.append(("from", named(source)))
        replace_(source, target)

    def spy_rename(source: Any, target: Any) -> None:
        seen.append(("from", str(source)))
        seen.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "rename", spy_rename)
    return seen


def test_a_chunk_is_synced_before_and_its_directory_after_the_rename(
    make_store: Maker, calls: list[tuple[str, str]]
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    calls.clear()
    rows = store.rows(0)
    store.write_chunk(0, np.ones(rows.stop, np.uint8), np.zeros((rows.stop, 64), np.float32))
    expected = []
    for array, name in (("status", "c.0"), ("embedding", "c.0.0")):
        directory = str(store.path / array)
        partial = next(p for kind, p in calls if kind == "from" and p.startswith(directory))
        assert partial.endswith(".partial")
        expected += [("fsync", partial), ("rename", f"{directory}/{name}"), ("from", partial)]
        expected += [("fsync", directory)]
    assert calls == expected  # status first, embedding last: its name is the commit


def test_every_file_of_a_new_store_is_synced_before_the_store_appears(
    make_store: Maker, calls: list[tuple[str, str]]
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    appeared = calls.index(("rename", str(store.path)))
    staging = Path(calls[appeared - 1][1])
    synced = {Path(path) for kind, path in calls[:appeared] if kind == "fsync"}
    for file in [store.path, *store.path.rglob("*")]:
        assert staging / file.relative_to(store.path) in synced
    assert calls[appeared + 1] == ("fsync", str(store.path.parent))


def test_a_failed_write_leaves_neither_chunk_nor_partial_file(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")  # a full disk cannot be had here

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_chunk(0, np.ones(32, np.uint8), np.zeros((32, 64), np.float32))
    assert not store.touched()[0]
    assert os.listdir(store.path / "status") == ["zarr.json"]


# --- rule 3: damage does not pass silently ---


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.sweep
def test_a_flipped_bit_is_found_in_every_array(array: str, make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    assert verify.verify(store.path).exit_code == 0
    file = first_file(store, array)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    report = verify.verify(store.path)
    assert report.exit_code == 4
    if array in ("status", "embedding"):
        assert list(report.bad) == [0]
    else:
        assert report.sequences is not None


def test_a_lost_sequence_chunk_is_an_error_and_never_embedded_as_fill(make_store: Maker) -> None:
    for array in ("length", "offset", "residues"):
        store = make_store(VIRAL_PROTEINS, f"{array}.zarr", embed=False)
        first_file(store, array).unlink()
        with pytest.raises(StoreError, match="missing"):
            store.read_rows(0)


def test_another_chunks_sequences_are_noticed(make_store: Maker) -> None:
    one = make_store(VIRAL_PROTEINS, "one.zarr", embed=False)
    other = make_store(VIRAL_PROTEINS.parent / "esm_some_proteins.fasta", "two.zarr", embed=False)
    first_file(one, "residues").write_bytes(first_file(other, "residues").read_bytes())
    assert check_sequences(one) is not None


# --- rule 4: presence is checked cheaply at every resume, and thoroughly by verify ---


@pytest.mark.parametrize("array", ["status", "embedding"])
@pytest.mark.parametrize("size", [0, 5])
@pytest.mark.parametrize("chunk", [0, 9])
@pytest.mark.sweep
def test_an_empty_or_stunted_file_is_no_chunk_and_is_written_again(
    array: str, size: int, chunk: int, make_store: Maker, client: Any
) -> None:
    store = make_store(VIRAL_PROTEINS)  # the last of its ten chunks is shorter
    before = chunk_bytes(store.path)
    file = first_file(store, array)
    file = file.with_name(file.name.replace("c.0", f"c.{chunk}", 1))
    file.write_bytes(file.read_bytes()[:size])
    assert np.flatnonzero(~store.present()).tolist() == [chunk]
    assert list(verify.verify(store.path).bad) == [chunk]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert chunk_bytes(store.path) == before


@pytest.mark.parametrize("chunk", [0, 9])
def test_half_a_chunk_is_found_by_verify_and_mended_by_repair(
    chunk: int, make_store: Maker, client: Any
) -> None:
    store = make_store(VIRAL_PROTEINS)
    before = chunk_bytes(store.path)
    file = store.path / "embedding" / f"c.{chunk}.0"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    report = verify.verify(store.path, repair=True)
    assert list(report.bad) == [chunk]
    assert report.exit_code == 0
    assert np.flatnonzero(~store.present()).tolist() == [chunk]
    assert virnuc_dask.resume(store.path, client=client).computed_chunks == 1
    assert chunk_bytes(store.path) == before


def test_run_verify_mends_in_one_go(make_store: Maker, client: Any) -> None:
    store = make_store(VIRAL_PROTEINS)
    before = chunk_bytes(store.path)
    (store.path / "embedding" / "c.3.0").write_bytes(b"not a chunk, and long enough")
    config = virnuc_dask.RunConfig(verify=True)
    assert virnuc_dask.resume(store.path, client=client, config=config).computed_chunks == 1
    assert chunk_bytes(store.path) == before


def test_a_damaged_short_last_chunk_does_not_stop_its_own_repair(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS)
    status, embedding = store.read_chunk(9)
    (store.path / "embedding" / "c.9.0").write_bytes(b"not a chunk, and long enough")
    store.write_chunk(9, status, embedding)
    assert check_chunk(store, 9) is None


def test_a_chunk_is_decoded_as_zarr_does(
    make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(VIRAL_PROTEINS)
    for decodes_here in (True, False):
        if not decodes_here:
            monkeypatch.setattr("virnuc_dask.store.store._CODECS", ())
        for chunk in (0, 9):
            rows = store.rows(chunk)
            found = store.read_chunk(chunk)
            for name, values in zip(("status", "embedding"), found, strict=True):
                np.testing.assert_array_equal(values, store.array(name)[rows])
                assert values.flags.writeable != decodes_here
    monkeypatch.undo()
    (store.path / "embedding" / "c.9.0").write_bytes(b"not a chunk, and long enough")
    with pytest.raises(ValueError, match="checksum"):
        store.read_chunk(9)
    (store.path / "embedding" / "c.9.0").unlink()
    assert np.isnan(store.read_chunk(9)[1]).all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda status, embedding: embedding.__setitem__((3, 5), np.nan), "not finite"),
        (lambda status, embedding: status.__setitem__(3, Status.PENDING), "no finished row"),
        (lambda status, embedding: status.__setitem__(3, 99), "no finished row"),
        (lambda status, embedding: status.__setitem__(3, Status.NON_FINITE), "has an embedding"),
        (lambda status, embedding: status.__setitem__(3, Status.TRUNCATED), "with the sequences"),
        (lambda status, embedding: status.__setitem__(3, Status.EMPTY), "with the sequences"),
        (lambda status, embedding: status.__setitem__(3, Status.INVALID_RESIDUES), "sequences"),
    ],
)
@pytest.mark.sweep
def test_states_and_values_that_do_not_agree_are_found(
    change: Any, problem: str, make_store: Maker
) -> None:
    store = make_store(VIRAL_PROTEINS)
    status, embedding = map(np.copy, store.read_chunk(1))
    assert check_chunk(store, 1) is None
    change(status, embedding)
    store.write_chunk(1, status, embedding)
    assert problem in str(check_chunk(store, 1))


# --- rule 5: what is not a chunk is not taken for one ---


def test_foreign_files_are_ignored_listed_and_removed_by_repair(make_store: Maker) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    names = ["c.0.0.swp", "c.0.1", "c.00.0", "c.0", "c.99.0", "C.0.0", "c.0.0~", ".DS_Store"]
    for name in names:
        (store.path / "embedding" / name).write_bytes(bytes(100))
        (store.path / "status" / f"{name}.x").write_bytes(bytes(100))
    (store.path / "status" / "c.0").mkdir()  # a directory has a chunk's name
    assert not store.present().any()
    report = verify.verify(store.path)
    assert len(report.leftovers) == 2 * len(names) + 1
    verify.verify(store.path, repair=True)
    assert os.listdir(store.path / "embedding") == ["zarr.json"]
    assert os.listdir(store.path / "status") == ["zarr.json"]


def test_repair_takes_a_dead_writers_partial_file_and_leaves_a_living_ones(
    make_store: Maker,
) -> None:
    store = make_store(VIRAL_PROTEINS)
    host = os.uname().nodename
    folder = store.path / "embedding"
    # The process that a name gives may be another's in another container: it is not looked at.
    alive = folder / f"c.0.0~{host}~999999~{'0' * 32}.partial"
    gone = folder / f"c.0.0~{host}~{os.getpid()}~{'0' * 32}.partial"
    elsewhere = folder / f"c.0.0~another.host~1~{'0' * 32}.partial"
    long_ago = folder / f"c.0.0~another.host~1~{'1' * 32}.partial"
    for file in (alive, gone, elsewhere, long_ago):
        file.write_bytes(b"half of a chunk")
    os.utime(long_ago, (0, 0))
    assert store.present().all()
    with alive.open() as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        report = verify.verify(store.path, repair=True)
    assert report.leftovers == sorted(map(str, (gone, long_ago)))
    assert [file.exists() for file in (alive, gone, elsewhere, long_ago)] == [
        True,
        False,
        True,
        False,
    ]


# --- rule 6: the same chunk, the same bytes, however often and by whom ---


def test_racing_ingests_end_with_one_store(tmp_path: Path) -> None:
    stores: list[Store] = []
    threads = [
        threading.Thread(
            target=lambda: stores.append(
                prepare(VIRAL_PROTEINS, tmp_path / "a.zarr", Settings("demo"), lambda _e: None)[0]
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    assert os.listdir(tmp_path) == ["a.zarr"]
    assert check_sequences(stores[0]) is None


# --- rule 7: no clock and no lock decides anything ---


@pytest.mark.parametrize("when", [0, 4_102_444_800])
def test_modification_times_mean_nothing(when: int, make_store: Maker, client: Any) -> None:
    store = make_store(VIRAL_PROTEINS)
    store.remove_chunk(2)
    for file in store.path.rglob("*"):
        os.utime(file, (when, when))
    summary = virnuc_dask.run(VIRAL_PROTEINS, store.path, model="demo", client=client, repr_layer=0)
    assert summary.computed_chunks == 1


# --- identity ---


OTHER_VALUES = {
    "format": 2,
    "input_sha256": "0" * 64,
    "records": 299,
    "weights_sha256": "1" * 64,
    "repr_layer": 2,
    "pooling": "max",
    "precision": "float16",
    "dtype": "float16",
    "alphabet": "another",
    "max_residues": 500,
    "long": "window",
    "rows_per_chunk": 64,
    "per_residue": True,
    "translation": "six-frame; virnucpro; window 300",
    "tiling": "48 residues, step 24",
}


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_a_mismatch_names_every_field_with_both_values(name: str, make_store: Maker) -> None:
    identity = make_store(VIRAL_PROTEINS, embed=False).identity
    other = replace(identity, **{name: OTHER_VALUES[name]})
    assert identity.differences(other) == [(name, getattr(identity, name), OTHER_VALUES[name])]
    message = str(IdentityMismatchError("out.zarr", identity.differences(other)))
    for part in (name, repr(getattr(identity, name)), repr(OTHER_VALUES[name])):
        assert part in message


def test_a_run_with_other_settings_is_refused_and_changes_nothing(
    make_store: Maker, awkward: Path
) -> None:
    store = make_store(VIRAL_PROTEINS)
    before = tree(store.path)
    with pytest.raises(IdentityMismatchError) as refused:
        virnuc_dask.run(
            awkward, store.path, model="demo", pooling="bos", long="skip", max_residues=100
        )
    names = {name for name, _, _ in refused.value.differences}
    assert names == {"input_sha256", "records", "pooling", "long", "max_residues", "repr_layer"}
    assert refused.value.exit_code == 2
    assert tree(store.path) == before


def test_an_input_of_the_same_size_and_time_is_still_another_input(
    tmp_path: Path, client: Any
) -> None:
    source = tmp_path / "a.faa"
    source.write_text(">a\nMKTAYIAKQR\n")
    virnuc_dask.run(source, tmp_path / "a.zarr", model="demo", client=client)
    stat = source.stat()
    source.write_text(">a\nMKTAYIAKQK\n")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(IdentityMismatchError, match="input_sha256"):
        virnuc_dask.run(source, tmp_path / "a.zarr", model="demo", client=client)


# --- ingest ---


@pytest.mark.slow
def test_an_ingest_that_was_killed_leaves_no_store_and_the_next_one_cleans_up(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out" / "a.zarr"
    process = subprocess.Popen(
        command("run", "-", target, "--model=demo", "-q"), stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    content = VIRAL_PROTEINS.read_bytes()
    process.stdin.write(content[: len(content) // 2])
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.*.ingest")):  # before that it is locked, under another name
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (orphan,) = os.listdir(target.parent)  # the fault has fired in the middle of the ingest
    assert orphan.endswith(".ingest")

    store, _ = prepare(VIRAL_PROTEINS, target, Settings("demo"), lambda _event: None)
    assert os.listdir(target.parent) == ["a.zarr"]
    assert check_sequences(store) is None
    assert store.records == 300


def test_the_staging_of_a_living_ingest_is_left_alone(tmp_path: Path) -> None:
    with Ingest(tmp_path / "a.zarr") as running:
        prepare(VIRAL_PROTEINS, tmp_path / "a.zarr", Settings("demo"), lambda _event: None)
        assert len(os.listdir(tmp_path)) == 2
        del running
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad.fa.gz"
    bad.write_bytes(VIRAL_PROTEINS.read_bytes()[:-2000])
    with pytest.raises(InputError):
        prepare(bad, tmp_path / "deep" / "a.zarr", Settings("demo"), lambda _event: None)
    assert not (tmp_path / "deep" / "a.zarr").exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_is_not_a_store_is_never_touched(tmp_path: Path) -> None:
    file = tmp_path / "thesis.docx"
    file.write_text("four years")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "data").write_text("precious")
    for path in (file, folder):
        with pytest.raises(NotAStoreError, match="nothing was changed"):
            prepare(VIRAL_PROTEINS, path, Settings("demo"), lambda _event: None)
    assert file.read_text() == "four years"
    assert (folder / "data").read_text() == "precious"
    with pytest.raises(NotAStoreError, match="no store"):
        Store(tmp_path / "nothing")


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"[]", None])
@pytest.mark.parametrize("file", ["zarr.json", "embedding/zarr.json"])
def test_damaged_metadata_is_a_clear_error(
    damage: bytes | None, file: str, make_store: Maker
) -> None:
    store = make_store(VIRAL_PROTEINS, embed=False)
    if damage is None:
        (store.path / file).unlink()
    else:
        (store.path / file).write_bytes(damage)
    with pytest.raises(StoreError, match=r"zarr\.json"):
        Store(store.path)


@pytest.mark.slow
def test_records_cross_block_and_chunk_borders_unharmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peptides: Path
) -> None:
    monkeypatch.setattr("virnuc_dask.store.create.SEQUENCES_PER_CHUNK", 100)
    monkeypatch.setattr("virnuc_dask.store.create.RESIDUES_PER_STORED_CHUNK", 1000)
    monkeypatch.setattr("virnuc_dask.inputs.reader.BLOCK_RECORDS", 37)
    store, _ = prepare(
        peptides, tmp_path / "a.zarr", Settings("demo", rows_per_chunk=50), lambda _e: None
    )
    summary = InputSummary()
    blocks = list(read_blocks([peptides], summary))
    ids = [name for block in blocks for name in block.ids]
    residues = np.concatenate([block.residues for block in blocks])
    stored = [store.read_rows(chunk) for chunk in range(store.chunk_count)]
    assert np.array_equal(np.concatenate([r for _, r in stored]), residues)
    assert np.array_equal(np.concatenate([n for n, _ in stored]), summary.all_lengths())
    assert [n for chunk in range(store.chunk_count) for n in store.read_ids(chunk)] == ids
    assert check_sequences(store) is None


def test_the_store_opens_lazily_in_xarray_with_ids_as_a_coordinate(make_store: Maker) -> None:
    import warnings

    import dask.array
    import xarray

    store = make_store(VIRAL_PROTEINS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (
            xarray.open_zarr(store.path, consolidated=False),
            virnuc_dask.open_store(store.path),
        ):
            known = {"sequence_id", "description", "source", "length", "status"}
            assert set(data.coords) - {"embedded"} == known
            assert isinstance(data.embedding.data, dask.array.Array)
            assert data.embedding.dims == ("sequence", "feature")
            assert data.embedding.shape == (300, 64)
            assert str(data.sequence_id.values[0]) == "tr|D6CFW8|D6CFW8_9VIRU"
            assert data.status.attrs["flag_meanings"].split()[:2] == ["pending", "embedded"]
            assert len(data.status.attrs["flag_values"]) == len(Status)


def test_a_selection_is_saved_as_readme_says(make_store: Maker, awkward: Path) -> None:
    store = make_store(awkward, rows_per_chunk=3)
    data = virnuc_dask.open_store(store.path)
    assert json.loads(data.attrs["virnuc_dask"])["id"] == store.id
    # What every format can keep: texts, numbers and lists of numbers.
    for found in (data.attrs, *(variable.attrs for variable in data.variables.values())):
        for value in found.values():
            assert isinstance(value, str | int) or all(isinstance(item, int) for item in value)
    good = data.embedded.values
    assert 1 < good.sum() < 7
    assert good[:3].any()
    assert not good[:3].all()  # a chunk of which some rows are left out
    selected = data[["embedding"]].isel(sequence=data.embedded).drop_encoding()
    selected["embedding"] = selected.embedding.chunk(sequence=2)
    saved = store.path.with_name("good.zarr")
    selected.to_zarr(saved)
    again = xarray.open_zarr(saved)
    assert again.identical(selected)
    assert np.array_equal(again.embedding.values, data.embedding.values[good])
