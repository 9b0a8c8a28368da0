"""The packed encoder against fair-esm's own forward, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    LETTERS,
    checkpoint_data,
    random_network,
    random_sequences,
    relative_error,
    save_network,
    upstream,
    upstream_mean,
)

from virnuc_dask.encoder.device_queue import Mark
from virnuc_dask.encoder.encoder import Encoder, largest, largest_by_run, load_encoder
from virnuc_dask.encoder.packing import cut_segments
from virnuc_dask.errors import InputError, ModelError
from virnuc_dask.settings import Pooling, Precision

TOLERANCE = 1e-4
# float32 rounding; far below what any wrong mask or neighbour would give.
ROUNDING = 2e-6

ARCHITECTURES = [  # layers, dimension, heads: head dimensions 16, 20, 24, 32, 64
    (2, 64, 4),
    (6, 80, 4),
    (3, 96, 4),
    (4, 64, 2),
    (5, 128, 2),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.nn.Module]:
    network = random_network(3, 64, 4)
    return save_network(network, tmp_path_factory.mktemp("model") / "small.pt"), network


@pytest.mark.parametrize(("layers", "dimension", "heads"), ARCHITECTURES)
@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.slow
def test_packed_forward_equals_upstream(
    layers: int, dimension: int, heads: int, token_dropout: bool, tmp_path: Path
) -> None:
    network = random_network(layers, dimension, heads, token_dropout=token_dropout)
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"))
    lengths = [1, 2, 3, 17, 33, 64, 99, 100, 100, 300, 777, 1021, 1022]
    sequences = [*random_sequences(lengths), LETTERS]
    expected = upstream_mean(network, sequences)
    found = encoder.encode(sequences)
    assert found.dtype == np.float32
    assert found.shape == (len(sequences), dimension)
    assert relative_error(found, expected) < TOLERANCE
    # A tolerance says something only if unrelated sequences are far beyond it.
    assert relative_error(found[:-1], expected[1:]) > 100 * TOLERANCE
    for sequence, row in zip(sequences, expected, strict=True):
        assert relative_error(encoder.encode([sequence]), row[None]) < TOLERANCE


@pytest.mark.slow
def test_every_length_from_1_to_1022_equals_upstream(small: tuple[str, torch.nn.Module]) -> None:
    path, network = small
    sequences = random_sequences(list(range(1, 1023)))
    found = load_encoder(path).encode(sequences)
    # All of them went through in shared batches; upstream sees every seventh one alone.
    chosen = [0, 1, 2, *range(5, 1022, 7), 1020, 1021]
    expected = upstream_mean(network, [sequences[n] for n in chosen])
    assert relative_error(found[chosen], expected) < TOLERANCE


def test_upstreams_padded_batches_agree_too(small: tuple[str, torch.nn.Module]) -> None:
    path, network = small
    sequences = random_sequences([5, 50, 120, 7])
    padded = [tokens[1:-1].mean(0) for tokens in upstream(network, sequences)]
    assert relative_error(load_encoder(path).encode(sequences), np.stack(padded)) < TOLERANCE


@pytest.mark.slow
def test_no_result_depends_on_the_batch(small: tuple[str, torch.nn.Module]) -> None:
    encoder = load_encoder(small[0])
    random = np.random.default_rng(3)
    sequences = random_sequences([int(n) for n in random.integers(1, 400, 120)])
    alone = np.concatenate([encoder.encode([sequence]) for sequence in sequences])
    for _ in range(3):
        order = random.permutation(len(sequences))
        some = order[: int(random.integers(2, len(order)))]
        batched = encoder.encode([sequences[number] for number in some])
        assert relative_error(batched, alone[some]) < ROUNDING
    twice = encoder.encode([sequences[0], *sequences, sequences[0]])
    assert relative_error(twice[[0, -1]], alone[[0, 0]]) < ROUNDING


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("pooling", ["mean", "bos", "max"])
def test_every_layer_and_pooling_equals_upstream(
    layer: int, pooling: str, small: tuple[str, torch.nn.Module]
) -> None:
    path, network = small
    sequences = random_sequences([1, 20, 20, 333])
    tokens = [upstream(network, [sequence], layer)[0] for sequence in sequences]
    expected = np.stack(
        [{"mean": t[1:-1].mean(0), "bos": t[0], "max": t[1:-1].max(0)}[pooling] for t in tokens]
    )
    encoder = load_encoder(path, repr_layer=layer, pooling=pooling)
    assert relative_error(encoder.encode(sequences), expected) < TOLERANCE


@pytest.mark.slow
def test_a_sequence_longer_than_any_window_is_encoded_whole(
    small: tuple[str, torch.nn.Module],
) -> None:
    path, network = small
    sequences = random_sequences([1500, 2600])
    expected = upstream_mean(network, sequences)
    assert relative_error(load_encoder(path).encode(sequences), expected) < TOLERANCE


def test_letters_are_cleaned_as_in_a_run() -> None:
    encoder = load_encoder("demo")
    plain = encoder.encode(["MKTAYIX"])
    for same in ("mktayix", "MKTAYIX*", "MK-TA.YIX", "MKTAYIJ", " MKT AYIX\t"):
        assert np.array_equal(encoder.encode([same]), plain)


def test_what_cannot_be_encoded_is_named_by_its_place() -> None:
    encoder = load_encoder("demo")
    assert encoder.encode([]).shape == (0, 64)
    with pytest.raises(TypeError, match="list of sequences"):
        encoder.encode("MKT")
    for bad, problem in (("", "no residues"), ("*", "no residues"), ("MK1", "letter '1'")):
        with pytest.raises(InputError, match=f"sequence 1: {problem}"):
            encoder.encode(["MKT", bad])


def test_a_layer_that_is_not_there_is_refused() -> None:
    for layer in (-1, 5, 99):
        with pytest.raises(ModelError, match=f"layer {layer} of a model with 4"):
            load_encoder("demo", repr_layer=layer)


def test_threads_share_an_encoder() -> None:
    from concurrent.futures import ThreadPoolExecutor

    encoder: Encoder = load_encoder("demo")
    sequences = random_sequences([40] * 8)
    alone = [encoder.encode([sequence]) for sequence in sequences]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda sequence: encoder.encode([sequence]), sequences))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_device_is_free_before_its_work_is_done() -> None:
    encoder = load_encoder("demo")
    wait, held = encoder._queue.wait, []

    def watched(*marks: Mark) -> float:
        held.append(encoder._device_lock._threads.locked())
        return wait(*marks)

    encoder._queue.wait = watched  # type: ignore[method-assign]
    encoder.encode(["MKTAYIAKQR"])
    assert held == [False]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_how_a_file_lays_out_its_numbers_does_not_matter(
    precision: Precision, tmp_path: Path
) -> None:
    data = checkpoint_data(random_network(2, 64, 4))
    torch.save(data, tmp_path / "rows.pt")
    # Columns first: equal tensors, of which nothing in the digest tells.
    for name, tensor in data["model"].items():
        if tensor.dim() == 2:
            data["model"][name] = tensor.t().contiguous().t()
    torch.save(data, tmp_path / "columns.pt")
    rows, columns = (
        load_encoder(str(tmp_path / name), precision=precision)
        for name in ("rows.pt", "columns.pt")
    )
    assert rows.spec.weights_sha256 == columns.spec.weights_sha256
    sequences = random_sequences([5, 40, 40])
    assert np.array_equal(rows.encode(sequences), columns.encode(sequences))


@pytest.mark.parametrize("pooling", ["mean", "bos", "max"])
@pytest.mark.slow
def test_results_that_arrive_in_the_end_are_the_same(pooling: Pooling) -> None:
    """A GPU's are combined when all batches have been begun; here a CPU's are."""
    encoder = load_encoder("demo", pooling=pooling)
    lengths = np.array([40, 900, 33, 2000, 7, 7, 500] * 5, np.int32)
    residues = np.frombuffer("".join(random_sequences(lengths.tolist())).encode(), np.uint8)
    segments = cut_segments(lengths, 300, "window")
    case = residues, segments, len(lengths)
    usual = encoder.encode_segments(*case, per_residue=True)
    encoder._queue.is_immediate = False
    late = encoder.encode_segments(*case, per_residue=True)
    assert np.isfinite(usual.embedding).all()
    assert np.array_equal(usual.embedding, late.embedding)
    assert np.array_equal(usual.residues, late.residues)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_maximum_of_all_lengths_at_once_is_the_same(device: str) -> None:
    runs = [(2, 1), (1, 7), (3, 40)]
    hidden = torch.randn(sum(count * (length + 2) for count, length in runs), 8, device=device)
    hidden[7, 3] = hidden[60, 5] = torch.nan  # within sequences
    hidden[0] = 99  # a BOS
    expected = largest_by_run(hidden, runs)
    assert int(expected.isnan().sum()) == 2
    found = largest(hidden.clone(), runs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "dimension", "heads"), ARCHITECTURES)
def test_cuda_equals_upstream_in_float32(
    layers: int, dimension: int, heads: int, tmp_path: Path
) -> None:
    network = random_network(layers, dimension, heads)
    encoder = load_encoder(save_network(network, tmp_path / "model.pt"), device="cuda")
    sequences = random_sequences([1, 2, 33, 100, 100, 300, 1022])
    expected = upstream_mean(network, sequences)
    assert relative_error(encoder.encode(sequences), expected) < TOLERANCE
