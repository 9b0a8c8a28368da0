"""Proteins and frames in tiles: no residue is left out, and each tile says where it is from."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pyarrow.parquet
import pytest
from conftest import EXAMPLES, VIRAL_PROTEINS, Cli, Maker
from harness import Run, assert_ledger
from hypothesis import given
from hypothesis import strategies as st

import virnuc_dask
from virnuc_dask.errors import IdentityMismatchError, InputError, UsageError
from virnuc_dask.inputs.reader import read_blocks
from virnuc_dask.inputs.records import InputSummary
from virnuc_dask.inputs.tiles import cut_tiles
from virnuc_dask.runtime.display import input_notes
from virnuc_dask.runtime.plan import plan
from virnuc_dask.settings import Identity, Settings, Tiling, Translation
from virnuc_dask.store import status, verify
from virnuc_dask.store.store import Store

GENOME = EXAMPLES / "lambda_virus.fa.gz"
PROTEINS = ">a first\nABCDEFGHIK\n>b\nMK\n>none\n>a again\nMKTAYIAKQRQISFVK-SHF\n>bad\nMKT1AYIAKQ\n"


def spans(lengths: list[int], how: Tiling, at_once: int = 1000) -> list[list[tuple[int, int]]]:
    """Tiles of each protein, as residues from 1."""
    found: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for tiles in cut_tiles(np.array(lengths, np.int32), how, at_once):
        for protein, start, stop in zip(*(part.tolist() for part in tiles), strict=True):
            found[protein].append((start + 1, stop))
    return found


# --- where proteins are cut ---


@pytest.mark.parametrize(
    ("length", "how", "expected"),
    [
        (0, Tiling(4), [(1, 0)]),
        (1, Tiling(4), [(1, 1)]),
        (3, Tiling(4), [(1, 3)]),
        (4, Tiling(4), [(1, 4)]),
        (5, Tiling(4), [(1, 4), (2, 5)]),
        (6, Tiling(4), [(1, 4), (3, 6)]),
        (7, Tiling(4), [(1, 4), (3, 6), (4, 7)]),
        (6, Tiling(4, 1), [(1, 4), (2, 5), (3, 6)]),
        (8, Tiling(4, 4), [(1, 4), (5, 8)]),
        (9, Tiling(4, 4), [(1, 4), (5, 8), (6, 9)]),
        (3, Tiling(1), [(1, 1), (2, 2), (3, 3)]),
    ],
)
def test_tiles_of_one_protein(length: int, how: Tiling, expected: list[tuple[int, int]]) -> None:
    assert spans([length], how) == [expected]


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    size=st.integers(1, 20),
    step=st.integers(1, 20),
    at_once=st.integers(1, 9),
)
def test_tiles_cover_all_and_none_is_idle(
    lengths: list[int], size: int, step: int, at_once: int
) -> None:
    how = Tiling(size, min(size, step))
    found = spans(lengths, how, at_once)
    assert found == spans(lengths, how)
    for length, tiles in zip(lengths, found, strict=True):
        assert (tiles[0][0], tiles[-1][1]) == (1, length)
        assert {last - first + 1 for first, last in tiles} == {min(size, length)}
        assert all(1 <= b[0] - a[0] <= how.stride for a, b in pairwise(tiles))
        assert all(b[0] - a[0] == how.stride for a, b in pairwise(tiles[:-1]))
        assert set().union(*(range(a, b + 1) for a, b in tiles)) == set(range(1, length + 1))


@given(size=st.integers(2, 30), start=st.integers(0, 70))
def test_a_fragment_shares_three_quarters_with_a_tile(size: int, start: int) -> None:
    start = min(start, 100 - size)
    first, last = start + 1, start + size
    shared = max(min(b, last) - max(a, first) + 1 for a, b in spans([100], Tiling(size))[0])
    assert shared >= 3 * size / 4


@pytest.mark.parametrize("arguments", [(0,), (4, 0), (4, 5), (4, -1)])
def test_tiles_that_leave_residues_out_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"size must be at least 1|step must be"):
        Tiling(*arguments)


def test_tiles_of_virnucpros_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="not with frames virnucpro"):
        Settings("demo", translation=Translation("virnucpro", 300), tiling=Tiling(24))


# --- a store of proteins ---


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.faa"
    path.write_text(PROTEINS)
    return path


@pytest.fixture
def tiled(proteins: Path, make_store: Maker) -> Store:
    return make_store(proteins, rows_per_chunk=4, tiling=Tiling(8))


IDS = ["a/1-8", "a/3-10", "b/1-2", "none/1-0"]
IDS += ["a/1-8", "a/5-12", "a/9-16", "a/12-19", "bad/1-8", "bad/3-10"]
READS = [0, 0, 1, 2, 3, 3, 3, 3, 4, 4]


def test_a_tile_is_a_row_that_knows_where_it_is_from(tiled: Store) -> None:
    data = virnuc_dask.open_store(tiled.path)
    assert data.sequence_id.values.tolist() == IDS
    assert data.read.values.tolist() == READS
    assert data.read_id.values.tolist() == ["a", "b", "none", "a", "bad"]
    assert data.start.values.tolist() == [0, 2, 0, 0, 0, 4, 8, 11, 0, 2]
    assert data.start.attrs["long_name"] == "first residue in the record, from 0"
    assert "frame" not in data.coords
    assert data.description.values.tolist() == ["first"] * 2 + [""] * 2 + ["again"] * 4 + [""] * 2
    assert {Path(name).name for name in data.source.values} == {"proteins.faa"}
    residues = bytes(data.residues.values).decode()
    # Without its gap: positions are those of the residues that are stored.
    whole = ["ABCDEFGHIK", "MK", "", "MKTAYIAKQRQISFVKSHF", "MKT1AYIAKQ"]
    for row, read in enumerate(READS):
        begin, count, start = (int(data[n][row]) for n in ("offset", "length", "start"))
        assert residues[begin : begin + count] == whole[read][start : start + count]
    assert status.row_states(tiled.path) == {"embedded": 7, "invalid_residues": 2, "empty": 1}


def test_a_tile_has_the_embedding_of_its_residues_alone(
    tiled: Store, tmp_path: Path, make_store: Maker
) -> None:
    alone = tmp_path / "alone.faa"
    alone.write_text(">a\nABCDEFGH\n>b\nCDEFGHIK\n")
    data = virnuc_dask.open_store(make_store(alone, "alone.zarr").path)
    rows = virnuc_dask.open_store(tiled.path).embedding.values[:2]
    np.testing.assert_allclose(rows, data.embedding.values, rtol=1e-5, atol=1e-6)


def test_tiles_of_one_protein_are_taken_together(tiled: Store) -> None:
    data = virnuc_dask.open_store(tiled.path)
    found = virnuc_dask.by_read(data)
    assert found.read_id.values.tolist() == ["a", "b", "none", "a", "bad"]
    assert found.rows.values.tolist() == [2, 1, 1, 4, 2]
    values = data.embedding.values
    np.testing.assert_allclose(found.embedding.values[3], values[4:8].mean(axis=0), rtol=1e-5)
    assert np.isnan(found.embedding.values[[2, 4]]).all()


def test_where_tiles_are_from_is_verified(tiled: Store) -> None:
    assert verify.verify(tiled.path).sequences is None
    for name in ("read", "start", "read_id"):
        array = tiled.array(name)
        old = array[3]
        array[3] = "another" if name == "read_id" else old + 1
        assert "do not hold the input" in str(verify.verify(tiled.path).sequences)
        array[3] = old
    assert verify.verify(tiled.path).sequences is None


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz", "h5", "h5ad", "zarr"])
def test_tiles_are_exported_with_where_they_are_from(
    suffix: str, tiled: Store, tmp_path: Path
) -> None:
    out = tmp_path / f"rows.{suffix}"
    assert virnuc_dask.export(tiled.path, out) == (7 if suffix == "h5" else 10)
    if suffix == "parquet":
        table = pyarrow.parquet.read_table(out).to_pydict()
        assert table["sequence_id"] == IDS
        assert [table["read_id"][5], table["read"][5], table["start"][5]] == ["a", 3, 4]
        assert not {"window", "frame"} & table.keys()
    if suffix == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(out) as file:
            assert file["a_3-10"].attrs["sequence_id"] == "a/3-10"
            assert all(isinstance(item, h5py.Dataset) for item in file.values())
    if suffix == "csv":
        about = json.loads(out.with_name("rows.csv.json").read_text())
        assert about["tiling"] == "8 residues, step 4"


def test_a_query_is_found_among_tiles(tiled: Store) -> None:
    found = virnuc_dask.nearest(tiled.path, ["a/5-12"], k=2)
    assert found.query_row.values.tolist() == [5]
    assert set(found.sequence_id.values[0].tolist()) <= set(IDS)


def test_the_digest_does_not_depend_on_where_blocks_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digests = set()
    for rows in (65_536, 7, 1):
        monkeypatch.setattr("virnuc_dask.inputs.tiles._ROWS_PER_BLOCK", rows)
        summary = InputSummary()
        blocks = list(read_blocks([VIRAL_PROTEINS], summary, tiling=Tiling(600)))
        assert max(len(block.lengths) for block in blocks) <= rows
        assert sum(len(block.lengths) for block in blocks) == summary.records
        reads = [name for block in blocks if block.origin for name in block.origin.read_ids]
        assert len(reads) == summary.tiled == 300
        digests.add(summary.sha256)
    assert len(digests) == 1


def test_what_is_planned_is_what_a_run_has(tiled: Store, proteins: Path) -> None:
    made = plan(proteins, Settings("demo", tiling=Tiling(8)))
    assert (made.input.tiled, made.input.records, made.longest) == (5, 10, 8)
    assert (made.input.records, made.input.residues) == (tiled.records, int(tiled.lengths().sum()))
    lines = dict(made.lines())
    assert (lines["records"], lines["rows"]) == ("5", "10")
    assert lines["quarantined"] == "tiles of records: 1 invalid, 1 empty"


def test_strict_refuses_a_letter_of_a_tile(proteins: Path, make_store: Maker) -> None:
    with pytest.raises(InputError, match="letter '1'"):
        make_store(proteins, tiling=Tiling(4), strict=True)


# --- identity ---


def test_tiles_are_part_of_the_identity(tiled: Store, proteins: Path, make_store: Maker) -> None:
    assert tiled.identity.tiling == "8 residues, step 4"
    for tiling in (None, Tiling(8, 5), Tiling(7)):
        with pytest.raises(IdentityMismatchError, match=r"tiling: .*8 residues, step 4"):
            make_store(proteins, tiling=tiling, rows_per_chunk=4)
    # The default, given.
    assert make_store(proteins, tiling=Tiling(8, 4), rows_per_chunk=4).id == tiled.id


def test_a_store_from_before_there_were_tiles_goes_on(
    proteins: Path, make_store: Maker, client: Any
) -> None:
    store = make_store(proteins, embed=False)
    metadata = store.path / "zarr.json"
    document = json.loads(metadata.read_text())
    identity = document["attributes"]["virnuc_dask"]["identity"]
    assert identity.pop("tiling") is None
    metadata.write_text(json.dumps(document))
    assert Store(store.path).identity == Identity.from_json(identity) == store.identity
    assert virnuc_dask.resume(store.path, client=client).exit_code == 3
    same = {"rows_per_chunk": 32, "repr_layer": 0}
    again = virnuc_dask.run(proteins, store.path, model="demo", client=client, **same)
    assert again.computed_chunks == 0
    with pytest.raises(IdentityMismatchError, match="tiling"):
        virnuc_dask.run(proteins, store.path, model="demo", client=client, tiling=Tiling(8), **same)


# --- frames ---


def test_a_frames_tiles_say_where_they_begin_in_the_genome(make_store: Maker) -> None:
    how = Translation("orf", min_residues=100)
    whole = virnuc_dask.open_store(
        make_store(GENOME, "whole.zarr", embed=False, translation=how).path
    )
    store = make_store(GENOME, embed=False, translation=how, tiling=Tiling(24))
    data = virnuc_dask.open_store(store.path)
    assert set(data.length.values.tolist()) == {24}
    assert verify.verify(store.path).sequences is None
    assert data.start.attrs["long_name"].startswith("first nucleotide")
    rows = dict(zip(whole.sequence_id.values, range(whole.sizes["sequence"]), strict=True))
    proteins, tiles = bytes(whole.residues.values), bytes(data.residues.values)
    offsets, starts, frames = (whole[n].values for n in ("offset", "start", "frame"))
    begins, of_frames = data.start.values, data.frame.values
    assert set(frames.tolist()) == {1, 2, 3, -1, -2, -3}
    for number, name in enumerate(data.sequence_id.values):
        frame, _, span = name.rpartition("/")
        first, last = map(int, span.split("-"))
        row = rows[frame]
        begin = offsets[row] + first - 1
        assert tiles[24 * number : 24 * number + 24] == proteins[begin : begin + 24]
        sign = 1 if frames[row] > 0 else -1
        assert begins[number] == starts[row] + sign * 3 * (first - 1)
        assert of_frames[number] == frames[row]
        assert last - first == 23
    assert virnuc_dask.by_read(data).rows.values.tolist() == [store.records]


def test_reads_without_a_frame_keep_their_names(tmp_path: Path, make_store: Maker) -> None:
    source = tmp_path / "reads.fa"
    source.write_text(f">none\nACG\n>one\n{'GCT' * 30}\n>last\nAC\n")
    data = virnuc_dask.open_store(
        make_store(source, translation=Translation(), tiling=Tiling(10, 10)).path
    )
    assert data.read_id.values.tolist() == ["none", "one", "last"]
    assert set(data.read.values.tolist()) == {1}
    assert "one_F1/21-30" in data.sequence_id.values


@pytest.mark.parametrize(
    ("rule", "length", "hinted"),
    [("open", 1_200, True), ("open", 900, False), ("orf", 1_200, False)],
)
def test_a_genome_without_an_open_frame_hints_at_orf(
    rule: Any, length: int, hinted: bool, tmp_path: Path, make_store: Maker
) -> None:
    source = tmp_path / "genome.fa"
    settings = Settings("demo", translation=Translation(rule))
    # A stop in each of the six frames, again and again.
    source.write_text(f">genome\n{('TAACTAACTAATTAGTTAGTTAG' * 60)[:length]}\n")
    translation = settings.translation
    for work in (plan, lambda *_: make_store(source, translation=translation)):
        with pytest.raises(InputError, match="none of 1 records gives a row") as refused:
            work(source, settings)
        assert ("need --frames orf" in str(refused.value)) == hinted
    # And where another record has a frame.
    with source.open("a") as file:
        file.write(f">read\n{'GCT' * 30}\n")
    (note,) = input_notes(plan(source, settings).input)
    assert "1 of 2 records gave no row" in note
    assert ("here 1 record of 1,000 nucleotides or more, need --frames orf" in note) == hinted


# --- the command line ---


@pytest.mark.slow
def test_a_tiled_run_is_killed_and_goes_on(
    tmp_path: Path, make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_store(VIRAL_PROTEINS, "whole.zarr", rows_per_chunk=64, tiling=Tiling(100, 80))
    path = tmp_path / "out.zarr"
    options = ("--model=demo", "--repr-layer", 0, "--rows-per-chunk", 64, "--workers", 1)
    options += ("--tile", 100, "--tile-step", 80)
    motif = faults.motif_of(VIRAL_PROTEINS)
    with faults.holding(monkeypatch, tmp_path / "faults.json", motif):
        run = Run("run", VIRAL_PROTEINS, path, *options)
    for event in run:
        if event["event"] == "chunk_done" and len(run.computed()) == 5:
            run.process.kill()
            break
    run.finish()
    assert run.process.returncode == -signal.SIGKILL
    done = set(np.flatnonzero(Store(path).present()).tolist())
    assert 5 <= len(done) < whole.chunk_count
    again = Run("run", VIRAL_PROTEINS, path, *options)
    assert again.finish() == 0
    assert done.isdisjoint(again.computed())
    verify.verify(path, repair=True)
    assert_ledger(Store(path), whole)


@pytest.mark.slow
def test_tiles_on_the_command_line(cli_here: Cli) -> None:
    common = (VIRAL_PROTEINS, "--model=demo")
    alone = cli_here("plan", *common, "--tile-step", 3)
    assert alone.returncode == 2
    assert "tile_step requires tile" in alone.stderr
    wide = cli_here("plan", *common, "--tile", 24, "--tile-step", 25)
    assert wide.returncode == 2
    assert "must be 1 to 24 residues" in wide.stderr
    nucleotides = cli_here("plan", GENOME, "--model=demo", "--tile", 24)
    assert nucleotides.returncode == 2
    assert "1 of 1 records look like nucleotides" in nucleotides.stderr


def test_a_store_of_tiles_for_tasks_of_ones_own(proteins: Path, tmp_path: Path) -> None:
    import dask

    path = tmp_path / "own.zarr"
    virnuc_dask.create_store(proteins, path, model="demo", tiling=Tiling(8))
    dask.compute(*virnuc_dask.tasks(path), scheduler="sync")
    assert status.status(path).rows_done == 10
