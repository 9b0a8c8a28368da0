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

from virnuc_dask import kernels, linear
from virnuc_dask.config import PRECISIONS, Precision, Settings, precision_on
from virnuc_dask.encoder import load_encoder
from virnuc_dask.errors import IdentityMismatchError, UsageError
from virnuc_dask.kernels import Integers
from virnuc_dask.linear import make_linear
from virnuc_dask.prepare import prepare

ON_CPU: list[Precision] = ["float32", "bfloat16", "int8"]
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
        if not kernels.serve(torch.device("cpu"), "float32", 160):
            pytest.skip("the kernels were not built, or not for this processor")
        return "compiled"
    monkeypatch.setattr(kernels, "_library", lambda: None)
    if request.param == "torch":
        monkeypatch.setattr(linear, "_has_onednn", lambda _dtype: False)
        monkeypatch.setattr(linear, "_has_onednn_int8", lambda: False)
    elif not (linear._has_onednn(torch.float32) and linear._has_onednn_int8()):
        pytest.skip("this processor or this torch has no fused oneDNN layers")
    return str(request.param)


def lowest_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / norms).min())


@pytest.mark.parametrize("precision", ON_CPU)
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


@pytest.mark.parametrize("precision", ON_CPU)
def test_layers_agree(precision: Precision, operators: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((48, 32), (48,)))
    x = torch.randn((70, 32), generator=generator)
    x[3] = 0  # a token without a scale
    x[5] *= 1e6  # must not cost its neighbours their precision
    layer = make_linear(weight, bias, precision)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}[precision]
    size = exact.abs().amax(1, keepdim=True)
    assert ((layer(x).finished() - exact).abs() / size).max() < tolerance
    found = layer.gelu(x)
    if isinstance(found, Integers):
        assert (precision, operators) == ("int8", "compiled")
        found = (found.values.float() - 128) * found.scale[:, None]
    assert ((found - torch.nn.functional.gelu(exact)).abs() / size).max() < tolerance


@pytest.mark.parametrize("features", [1000, 1008])  # without and with kernels
def test_int8_uses_the_whole_range_and_no_more(features: int) -> None:
    # 255 steps from the largest to its negative: an error of half a step at the most.
    x = torch.linspace(-1, 1, features).repeat(3, 1) * torch.tensor([[1.0], [1e-3], [7]])
    found = make_linear(torch.eye(features), torch.zeros(features), "int8")(x).finished()
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((found - x).abs() <= 0.501 * step).all()


def test_a_precision_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="int8 is for CPUs"):
        precision_on("cuda:1", "int8")
    with pytest.raises(UsageError, match="float16 is for GPUs"):
        load_encoder("demo", precision="float16")
    with pytest.raises(UsageError, match="float32, bfloat16, float16, int8"):
        load_encoder("demo", precision="fp4")  # type: ignore[arg-type]


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu() -> None:
    assert [precision_on(device, "auto") for device in ("cpu", "cuda")] == ["float32", "bfloat16"]


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
    with pytest.raises(UsageError, match="float16 is for GPUs"):
        make_store(VIRAL_PROTEINS, "other.zarr", precision="float16")
    assert not (tmp_path / "other.zarr").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "int8"])
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
