"""Precisions of the encoder: how near they come to float32, and what stands in for oneDNN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Maker
from models import random_network, random_sequences, relative_error, save_network, upstream_mean
from numpy.typing import NDArray

import virnuc_dask
from virnuc_dask.encoder import cpu_kernels, linear
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.linear import make_linear
from virnuc_dask.errors import IdentityMismatchError, UsageError
from virnuc_dask.runtime.embed import embed_rows
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.runtime.recomputed import compare_recomputed
from virnuc_dask.settings import PRECISIONS, Identity, Precision, Settings, Status, precision_on

ON_CPU: list[Precision] = ["float32", "bfloat16"]
AS_MADE = Settings("demo", rows_per_chunk=32, repr_layer=0)  # as conftest makes a store
LENGTHS = [1, 2, 3, 17, 33, 64, 99, 100, 100, 300, 777, 1022]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.nn.Module]:
    network = random_network(4, 160, 10)  # heads of 16 features, as in ESM-2 8M
    return save_network(network, tmp_path_factory.mktemp("model") / "model.pt"), network


@pytest.fixture(params=["compiled", "onednn", "torch"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With all that there is; without a compiler; and without oneDNN, as on another torch."""
    if request.param == "compiled":
        if not cpu_kernels.is_usable(torch.device("cpu"), "float32", 160):
            pytest.skip("the kernels were not built, or not for this processor")
        return "compiled"
    monkeypatch.setattr(cpu_kernels, "_library", lambda: None)
    if request.param == "torch":
        monkeypatch.setattr(linear, "_has_onednn", lambda _dtype: False)
    elif not linear._has_onednn(torch.float32):
        pytest.skip("this processor or this torch has no fused oneDNN layers")
    return str(request.param)


def lowest_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / norms).min())


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.slow
def test_every_row_is_close_to_upstreams_float32(
    precision: Precision, model: tuple[str, torch.nn.Module], operators: str
) -> None:
    path, network = model
    sequences = random_sequences(LENGTHS)
    expected = upstream_mean(network, sequences)
    found = load_encoder(path, precision=precision).encode(sequences)
    assert found.dtype == np.float32
    assert lowest_cosine(found, expected) > 0.999
    # Unrelated sequences are alike too: what tells them apart must survive.
    centre = expected.mean(axis=0)
    assert lowest_cosine(found - centre, expected - centre) > 0.99
    error = relative_error(found, expected)
    if precision == "float32":
        assert error < 1e-6
    else:
        assert 1e-5 < error < 1e-2  # less would be no reduced precision at all


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.slow
def test_alone_and_in_a_batch_are_bitwise_the_same(
    precision: Precision, model: tuple[str, torch.nn.Module]
) -> None:
    if not linear._has_onednn(torch.float32):
        pytest.skip("this processor or this torch has no fused oneDNN layers")
    encoder = load_encoder(model[0], precision=precision)
    sequences = random_sequences([*LENGTHS, *range(30, 90)], seed=1)
    alone = np.concatenate([encoder.encode([sequence]) for sequence in sequences])
    order = np.random.default_rng(0).permutation(len(sequences))
    batched = encoder.encode([sequences[number] for number in order])
    if precision == "bfloat16" and torch.cpu._is_amx_tile_supported():
        # There oneDNN adds up in another order for another number of tokens.
        assert lowest_cosine(batched, alone[order]) > 0.9999
        again = encoder.encode([sequences[number] for number in order])
        assert np.array_equal(batched, again)
    else:
        assert np.array_equal(batched, alone[order])


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("precision", ON_CPU)
def test_layers_agree(precision: Precision) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((48, 32), (48,)))
    x = torch.randn((70, 32), generator=generator)
    x[3] = 0
    x[5] *= 1e6
    layer = make_linear(weight, bias, precision)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    tolerance = 1e-5 if precision == "float32" else 0.02
    size = exact.abs().amax(1, keepdim=True)
    assert ((layer(x) - exact).abs() / size).max() < tolerance
    gelu = torch.nn.functional.gelu(exact)
    assert ((layer.gelu(x) - gelu).abs() / size).max() < tolerance


def test_a_precision_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="float16 needs a GPU"):
        load_encoder("demo", precision="float16")
    with pytest.raises(UsageError, match=r"float32, bfloat16, float16$"):
        load_encoder("demo", precision="fp4")  # type: ignore[arg-type]


def test_auto_is_float32_on_a_cpu_and_float16_on_a_gpu() -> None:
    assert [precision_on(device, "auto") for device in ("cpu", "cuda")] == ["float32", "float16"]


def test_auto_goes_on_with_what_a_store_has(make_store: Maker, tmp_path: Path) -> None:
    store = make_store(VIRAL_PROTEINS, precision="bfloat16")
    again, model = prepare(VIRAL_PROTEINS, store.path, AS_MADE, lambda _event: None)
    assert again.identity.precision == model.precision == "bfloat16"
    with pytest.raises(IdentityMismatchError, match="precision"):
        prepare(
            VIRAL_PROTEINS,
            store.path,
            replace(AS_MADE, precision="float32"),
            lambda _event: None,
        )
    with pytest.raises(UsageError, match="float16 needs a GPU"):
        make_store(VIRAL_PROTEINS, "other.zarr", precision="float16")
    assert not (tmp_path / "other.zarr").exists()


def test_a_store_of_a_precision_that_was_given_up_is_only_read(
    make_store: Maker, tmp_path: Path
) -> None:
    """There are stores of int8, which was offered until it was measured on real weights."""
    store = make_store(VIRAL_PROTEINS)
    root = store.path / "zarr.json"
    root.write_text(root.read_text().replace('"precision": "float32"', '"precision": "int8"'))
    assert virnuc_dask.open_store(store.path).sizes["sequence"] == 300
    assert virnuc_dask.verify(store.path).exit_code == 0
    assert virnuc_dask.export(store.path, tmp_path / "rows.csv")
    drift = compare_recomputed(store.path, 5)
    assert (drift.precision, drift.good) == ("int8", True)
    for more in (
        lambda: virnuc_dask.resume(store.path),
        lambda: virnuc_dask.tasks(store.path),
        lambda: virnuc_dask.tasks(store.path, device="cuda"),
        lambda: prepare(VIRAL_PROTEINS, store.path, AS_MADE, lambda _event: None),
    ):
        with pytest.raises(UsageError, match=r"int8 is no longer offered.*another store"):
            more()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_row_is_close_on_cuda(precision: Precision, tmp_path: Path) -> None:
    for heads in (10, 5):  # 16 and 32 features
        network = random_network(4, 160, heads)
        path = save_network(network, tmp_path / f"{heads}.pt")
        sequences = random_sequences(LENGTHS)
        expected = upstream_mean(network, sequences)
        found = load_encoder(path, "cuda", precision).encode(sequences)
        assert lowest_cosine(found, expected) > 0.999
        if precision == "float32":
            assert relative_error(found, expected) < 1e-4


@pytest.mark.gpu
def test_rows_that_float16_cannot_hold_are_computed_in_float32_on_a_gpu(tmp_path: Path) -> None:
    network = random_network(2, 160, 10)
    with torch.no_grad():
        network.layers[0].fc2.bias[3] += 7e4  # float16 tops out at 65,504
    path = save_network(network, tmp_path / "model.pt")
    sequences = random_sequences(LENGTHS)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    residues = np.frombuffer("".join(sequences).encode(), np.uint8)
    half = load_encoder(path, "cuda", "float16")
    assert not np.isfinite(half.encode(sequences)).any()
    identity = Identity(
        1, "", 0, "", 2, "mean", "float16", "float32", "", 1022, "truncate", 32, per_residue=False
    )
    found = embed_rows(half, lengths, residues, identity)
    assert (found.status == Status.EMBEDDED).all()
    exact = load_encoder(path, "cuda").encode(sequences)
    assert relative_error(found.embedding, exact) < 1e-3
