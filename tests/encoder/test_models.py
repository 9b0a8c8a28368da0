"""Which models there are, and chunks that are as large as is worth losing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VIRAL_PROTEINS, Cli, Maker
from models import random_network, save_network

import virnuc_dask
from virnuc_dask.encoder.models import PUBLISHED, Estimate, costliest, parameters
from virnuc_dask.errors import RandomWeightsWarning
from virnuc_dask.runtime import events
from virnuc_dask.runtime.events import silence
from virnuc_dask.runtime.plan import plan
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import RANDOM_WEIGHTS, ModelSpec, Precision, Settings
from virnuc_dask.store.store import Store

MILLION = 10**6


def spec(name: str, precision: Precision = "float32") -> ModelSpec:
    model = PUBLISHED[name]
    return ModelSpec(name, "", model.dimension, model.layers, "mean", precision)


# --- the size of a chunk ---


def test_parameters_are_those_of_the_models_names() -> None:
    for name, model in PUBLISHED.items():
        number, unit = re.findall(r"_(\d+)([MB])_", name)[0]
        named = int(number) * {"M": 1e6, "B": 1e9}[unit]
        assert parameters(model.layers, model.dimension) == pytest.approx(named, rel=0.08)


@pytest.mark.parametrize("length", [60, 300])
@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "float32"), ("cuda", "bfloat16"), ("cuda:1", "float32")]
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_chunk_of_a_large_input_takes_half_a_minute_whatever_the_model(
    name: str, device: str, precision: Precision, length: int
) -> None:
    estimate = Estimate.of(spec(name, precision), device, length)
    rows = estimate.rows_per_chunk(np.full(MILLION, length), 8)
    assert rows & (rows - 1) == 0
    assert rows <= 8192
    seconds = rows * length / estimate.residues_per_s
    assert seconds <= 40 or rows == 1
    assert seconds > 20 or rows == 8192


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("records", [1, 7, 600, 20_000])
def test_each_worker_has_four_chunks_where_that_is_worth_it(records: int, workers: int) -> None:
    estimate = Estimate.of(spec("esm2_t6_8M_UR50D"), "cpu", 300)
    rows = estimate.rows_per_chunk(np.full(records, 300), workers)
    chunks = -(-records // rows)
    assert chunks >= min(records, 4 * workers) or rows * 300 / estimate.residues_per_s <= 0.1


def test_what_has_nothing_to_encode_and_a_model_of_no_layers_have_chunks_too() -> None:
    nothing = np.zeros(20_000, np.int64)
    assert Estimate.of(spec("esm2_t6_8M_UR50D"), "cpu", 0).rows_per_chunk(nothing, 2) == 8192
    none = Estimate.of(replace(spec("esm2_t6_8M_UR50D"), repr_layer=0), "cpu", 300)
    assert none.rows_per_chunk(np.full(MILLION, 300), 2) == 8192


def test_single_residues_that_are_kept_bound_a_chunks_memory() -> None:
    estimate = Estimate.of(spec("esm2_t33_650M_UR50D", "bfloat16"), "cuda", 300)
    residues = np.full(MILLION, 300)
    without = estimate.rows_per_chunk(residues, 1)
    rows = estimate.rows_per_chunk(residues, 1, residues * 1280 * 2)
    assert rows < without
    assert rows * 300 * 1280 * 2 <= 2**28


def test_the_largest_chunk_counts_and_not_the_average() -> None:
    """An input that is sorted, or put together from several."""
    estimate = Estimate.of(spec("esm2_t33_650M_UR50D", "bfloat16"), "cuda", 154)
    residues = np.repeat([60, 1000], [900_000, 100_000])
    rows = estimate.rows_per_chunk(residues, 1, residues * 1280 * 2)
    assert costliest(residues, rows) * 1280 * 2 <= 2**28
    rows = estimate.rows_per_chunk(residues, 1)
    assert costliest(residues, rows) / estimate.residues_per_s <= 40
    assert costliest(residues[:-1], 2) == 2000  # and a last chunk that is shorter


def test_the_time_to_download_a_model_is_that_of_all_its_layers() -> None:
    model = replace(spec("esm2_t48_15B_UR50D", "bfloat16"), repr_layer=1)
    assert Estimate.of(model, "cuda", 300).load_s > 10_000


@pytest.mark.slow
def test_a_store_is_chunked_as_planned(tmp_path: Path, make_store: Maker) -> None:
    small = str(save_network(random_network(2, 32, 4), tmp_path / "small.pt"))
    large = str(save_network(random_network(2, 320, 20), tmp_path / "large.pt"))
    stores: dict[str, Store] = {}
    for number, (model, per_residue) in enumerate(product((small, large), (False, True))):
        path = tmp_path / f"{number}.zarr"
        virnuc_dask.create_store(
            VIRAL_PROTEINS, path, model=model, workers=3, per_residue=per_residue
        )
        stores[str(number)] = store = Store(path)
        planned = plan(VIRAL_PROTEINS, Settings(model, per_residue=per_residue), workers=3)
        assert planned.rows_per_chunk == store.identity.rows_per_chunk
        assert planned.chunks == store.chunk_count
    assert stores["2"].chunk_count > stores["0"].chunk_count
    # A store that is there keeps its chunks, whatever would be chosen today.
    virnuc_dask.create_store(VIRAL_PROTEINS, tmp_path / "few.zarr", model="demo", rows_per_chunk=7)
    virnuc_dask.create_store(VIRAL_PROTEINS, tmp_path / "few.zarr", model="demo")
    assert Store(tmp_path / "few.zarr").identity.rows_per_chunk == 7


def test_of_two_runs_that_make_a_store_at_once_the_slower_takes_the_fasters_chunks(
    tmp_path: Path,
) -> None:
    path, made = tmp_path / "a.zarr", []

    def overtake(event: events.Event) -> None:
        if isinstance(event, events.Reading) and not made:
            made.append(prepare(VIRAL_PROTEINS, path, settings, silence, "cpu", lambda: 64)[0])

    settings = Settings("demo")
    store, _ = prepare(VIRAL_PROTEINS, path, settings, overtake)
    assert store.id == made[0].id
    alone = prepare(VIRAL_PROTEINS, tmp_path / "b.zarr", settings, silence)[0]
    assert store.identity.rows_per_chunk < alone.identity.rows_per_chunk


# --- random weights, and which weights they are ---


@pytest.mark.slow
def test_random_weights_are_said_wherever_somebody_looks(
    cli: Cli, awkward: Path, tmp_path: Path
) -> None:
    run = ("run", awkward, "out.zarr", "--model", "demo", "--workers", 1, "--no-progress")
    done = cli(*run)
    first = done.stderr.splitlines()[0]
    assert RANDOM_WEIGHTS in first
    described = first.removeprefix("model: ")
    assert described.endswith("layer 4, mean pooling, float32 on cpu")
    assert "weights 129ce4726f6c" in described
    assert described in done.stdout  # the summary
    assert described in cli("plan", awkward, "--model", "demo").stdout
    assert f"model: {described}\n" in cli("status", "out.zarr").stdout
    assert described in cli(*run[:-1], "--quiet").stdout
    assert described in cli("resume", "out.zarr", "--no-progress").stderr.splitlines()[0]
    for command in (
        ("plan", awkward, "--model", "demo"),
        ("status", "out.zarr"),
        ("resume", "out.zarr"),
    ):
        document = json.loads(cli(*command, "--json").stdout.splitlines()[-1])
        assert document["comment"] == RANDOM_WEIGHTS
    data: Any = virnuc_dask.open_store(tmp_path / "out.zarr")
    assert data.attrs["comment"] == RANDOM_WEIGHTS
    # And no word of it as a warning of Python's, which the command line has no use for.
    assert "RandomWeightsWarning" not in done.stderr


@pytest.mark.filterwarnings("default::virnuc_dask.errors.RandomWeightsWarning")
@pytest.mark.slow
def test_in_python_random_weights_are_a_warning_where_they_were_asked_for(
    awkward: Path, tmp_path: Path, client: Any
) -> None:
    with pytest.warns(RandomWeightsWarning, match=RANDOM_WEIGHTS) as first:
        virnuc_dask.run(awkward, tmp_path / "a.zarr", model="demo", client=client)
    with pytest.warns(RandomWeightsWarning, match=RANDOM_WEIGHTS) as second:
        virnuc_dask.create_store(awkward, tmp_path / "b.zarr", model="demo")
    with pytest.warns(RandomWeightsWarning, match=RANDOM_WEIGHTS) as third:
        virnuc_dask.resume(tmp_path / "b.zarr", client=client)
    assert [warning.filename for warning in (*first, *second, *third)] == [__file__] * 3


@pytest.mark.filterwarnings("error::virnuc_dask.errors.RandomWeightsWarning")
@pytest.mark.slow
def test_a_model_that_was_given_is_named_and_nothing_is_said_of_random_weights(
    cli: Cli, awkward: Path, tmp_path: Path
) -> None:
    model = save_network(random_network(2, 32, 4), tmp_path / "own.pt")
    done = cli("run", awkward, "out.zarr", "--model", model, "--workers", 1, "--no-progress")
    store = Store(tmp_path / "out.zarr")
    described = (
        f"{model}, weights {store.identity.weights_sha256[:12]}, layer 2, mean pooling,"
        " float32 on cpu"
    )
    assert done.stderr.splitlines()[0] == f"model: {described}"
    for text in (done.stdout, cli("status", "out.zarr").stdout):
        assert described in text
        assert RANDOM_WEIGHTS not in text
    assert "comment" not in virnuc_dask.open_store(tmp_path / "out.zarr").attrs
    assert np.isfinite(virnuc_dask.open_store(tmp_path / "out.zarr").embedding[0]).all()
