"""Memory that runs out: the token budget halves and stays, and no row is lost that fits alone.

And memory that is not taken in the first place: of a model's file while it is read.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIRAL_PROTEINS, Maker
from esm.model.esm2 import ESM2
from models import random_network, random_sequences, save_huggingface, save_network

from virnuc_dask.encoder import memory
from virnuc_dask.encoder.attention import Layout
from virnuc_dask.encoder.encoder import load_encoder
from virnuc_dask.encoder.memory import (
    CPU_TOKENS,
    GPU_TOKENS,
    fitting_tokens,
    give_back_pages,
    grown,
    is_starved,
)
from virnuc_dask.encoder.network import Network
from virnuc_dask.runtime import embed
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings, Status


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for a device that holds 500 tokens: says so as CUDA's allocator does.

    A GPU cannot be had everywhere; a real allocator's limit is in the test after these.
    """
    forward = Network._forward
    refused: list[int] = []

    def limited(self: Network, filled: torch.Tensor, layout: Layout) -> torch.Tensor:
        if (tokens := layout.tokens) > 500:
            refused.append(tokens)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, filled, layout)

    monkeypatch.setattr(Network, "_forward", limited)
    return refused


@pytest.mark.slow
def test_the_budget_halves_until_it_fits_and_is_remembered(small_device: list[int]) -> None:
    sequences = random_sequences([*range(20, 120), 400, 490])
    encoder = load_encoder("demo")
    found = encoder.encode(sequences)
    assert small_device
    assert 125 <= encoder.token_budget <= 500
    small_device.clear()
    again = encoder.encode(sequences)
    # Batches may exceed the budget by less than a sequence: only one with the longest can.
    assert len(small_device) <= 1
    alone = np.concatenate([load_encoder("demo").encode([s]) for s in sequences])
    assert np.array_equal(found, again)
    assert np.allclose(found, alone, rtol=0, atol=1e-6)


def test_a_sequence_that_does_not_fit_alone_is_named(small_device: list[int]) -> None:
    encoder = load_encoder("demo")
    with pytest.raises(MemoryError, match="sequence 1, 600 residues"):
        encoder.encode(random_sequences([30, 600, 40]))
    assert small_device[-1] == 602


@pytest.mark.slow
def test_rows_that_do_not_fit_are_quarantined_and_their_neighbours_are_not(
    small_device: list[int], make_store: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_loaded", {})
    store = make_store(VIRAL_PROTEINS, repr_layer=None)
    long = np.concatenate([store.read_rows(c)[0] for c in range(store.chunk_count)]) > 498
    assert 0 < long.sum() < len(long)
    assert small_device
    status = np.concatenate([store.read_chunk(c)[0] for c in range(store.chunk_count)])
    embedding = np.concatenate([store.read_chunk(c)[1] for c in range(store.chunk_count)])
    assert (status[long] == Status.OUT_OF_MEMORY).all()
    assert np.isnan(embedding[long]).all()
    assert np.isfinite(embedding[~long]).all()
    assert (status[~long] == Status.EMBEDDED).all()


def test_no_row_is_blamed_while_others_have_the_memory(
    make_store: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU that another process has filled, for a while."""
    monkeypatch.setattr(embed, "_loaded", {})
    whole = make_store(VIRAL_PROTEINS, "whole.zarr")
    forward = Network._forward
    refused: list[int] = []

    def full(self: Network, filled: torch.Tensor, layout: Layout) -> torch.Tensor:
        if len(refused) < 400:
            refused.append(len(filled))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, filled, layout)

    settings = Settings("demo", rows_per_chunk=32, repr_layer=0)
    store, spec = prepare(VIRAL_PROTEINS, tmp_path / "out.zarr", settings, lambda _event: None)
    monkeypatch.setattr(Network, "_forward", full)
    with pytest.raises(MemoryError, match="20 residues, does not fit"):
        embed.embed_chunk(str(store.path), 0, store.identity, spec)
    assert not store.present().any()
    refused += [0] * 400
    embed.embed_chunk(str(store.path), 0, store.identity, spec)
    (encoder,) = embed._loaded.values()
    assert encoder.token_budget == CPU_TOKENS
    for ours, expected in zip(store.read_chunk(0), whole.read_chunk(0), strict=True):
        assert np.array_equal(ours, expected)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(Network, "_forward", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        load_encoder("demo").encode(["MKT"])


LIMITED = """
import resource, sys
import numpy as np, torch
from virnuc_dask.encoder import encoder as module, memory
torch.set_num_threads(1)
memory.CPU_TOKENS = 2**17
encoder = module.load_encoder(sys.argv[1], precision=sys.argv[2])
rng = np.random.default_rng(0)
sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(1500)]
expected = encoder.encode(sequences[:32])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, used + 250 * 2**20))
found = encoder.encode(sequences)
print(encoder.token_budget, np.array_equal(found[:32], expected), np.isfinite(found).all())
"""


@pytest.mark.parametrize(
    # Most processors only imitate bfloat16, and take a minute.
    "precision",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)],
)
@pytest.mark.slow
def test_a_real_limit_of_the_address_space(precision: str, tmp_path: Path) -> None:
    path = save_network(random_network(2, 320, 20), tmp_path / "model.pt")
    command = [sys.executable, "-c", LIMITED, path, precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    budget, same, finite = done.stdout.split()
    assert int(budget) < 2**16  # the limit was met
    assert (same, finite) == ("True", "True")


@pytest.mark.gpu
def test_a_real_limit_on_a_gpu(tmp_path: Path) -> None:
    path = save_network(random_network(4, 640, 10), tmp_path / "model.pt")
    encoder = load_encoder(path, "cuda", "bfloat16")
    sequences = random_sequences([100] * 2000)
    expected = encoder.encode(sequences)
    before = encoder.token_budget = 2**17
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 2**28) / total)
    try:
        found = encoder.encode(sequences)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert encoder.token_budget < before
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_batches_grow_again_as_far_as_memory_is_free() -> None:
    budget, seen = 247, []
    while budget < GPU_TOKENS:
        seen.append(budget)
        budget = grown(budget, GPU_TOKENS)
    assert budget == GPU_TOKENS
    assert len(seen) == 10
    assert grown(4000, 5000) == 5000
    assert grown(4000, CPU_TOKENS) == 4000  # what has fitted is not given up
    assert grown(GPU_TOKENS, GPU_TOKENS) == GPU_TOKENS


def test_what_fits_follows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver says is made up: no GPU need be here."""

    def lost(_: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu = torch.device("cuda")
    assert not is_starved(torch.device("cpu"))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    # A few megabytes more make no other batches.
    for free, starved, tokens in (
        *((5 << 20, True, CPU_TOKENS), (2**30, False, CPU_TOKENS)),
        *((9_000_000_000, False, 2**14), (9_010_000_000, False, 2**14)),
        (80 << 30, False, GPU_TOKENS),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2**37))
        assert is_starved(gpu) == starved
        assert fitting_tokens(gpu, 2560) == tokens
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert not is_starved(gpu)


@pytest.mark.gpu
def test_batches_grow_again_on_a_gpu(tmp_path: Path) -> None:
    path = save_network(random_network(2, 320, 20), tmp_path / "model.pt")
    encoder = load_encoder(path, "cuda", "bfloat16")
    first, encoder.token_budget = encoder.token_budget, 247
    expected = encoder.encode(random_sequences([100] * 50))
    for _ in range(10):
        found = encoder.encode(random_sequences([100] * 50))
    assert encoder.token_budget == first
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_the_first_budget_is_a_cpus() -> None:
    assert load_encoder("demo").token_budget == CPU_TOKENS


# VmHWM and not getrusage, which begins with what the parent process had.
MEASURED = """
import sys
import torch
from virnuc_dask.runtime.embed import get_encoder
from virnuc_dask.encoder.fair_esm import fair_esm
from virnuc_dask.encoder.weights import describe, load_checkpoint
def tell(field):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
fair_esm()
before = tell("VmHWM")
spec = describe(load_checkpoint(sys.argv[1]))
if sys.argv[2] == "encoder":
    encoder = get_encoder(spec)
print(spec.weights_sha256, tell("VmHWM") - before, tell("VmRSS") - before)
"""
needs_pagemap = pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="the system does not tell of its pages"
)


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest keeps those of three sessions."""
    yield tmp_path
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.unlink()


def large_network(layers: int, dimension: int, heads: int) -> ESM2:
    with torch.device("meta"):  # no time for upstream's random weights
        network = ESM2(layers, dimension, heads)
    network.to_empty(device="cpu").requires_grad_(False)
    for tensor in network.state_dict().values():
        tensor.uniform_(-1, 1)
    return network


def measured(reference: str, what: str) -> tuple[str, int, int]:
    """Digest of a model, and peak and present memory of the process that read it."""
    command = [sys.executable, "-c", MEASURED, reference, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    digest, peak, present = done.stdout.split()
    return digest, int(peak), int(present)


@needs_pagemap
@pytest.mark.parametrize("layout", ["fair-esm, float16", "Hugging Face, float32"])
@pytest.mark.slow
def test_hashing_takes_no_memory_of_the_models_size(layout: str, large_folder: Path) -> None:
    if layout == "fair-esm, float16":
        network = large_network(2, 2560, 40).half()
        reference = save_network(network, large_folder / "model.pt")
    else:
        network = large_network(1, 2560, 40)
        reference = save_huggingface(network, large_folder)
    size = sum(file.stat().st_size for file in large_folder.iterdir())
    assert size > 300e6
    digest, peak, _ = measured(reference, "digest")
    expected = sha256(b"token_dropout True\n")
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(("lm_head.", "contact_head.")):
            expected.update(f"{name} {tuple(tensor.shape)}\n".encode())
            expected.update(tensor.float().numpy())
    assert digest == expected.hexdigest()
    assert peak < size / 2


@needs_pagemap
@pytest.mark.slow
def test_a_worker_holds_its_weights_once(large_folder: Path) -> None:
    reference = save_network(large_network(16, 640, 20), large_folder / "model.pt")
    size = Path(reference).stat().st_size
    assert size > 300e6
    _, peak, present = measured(reference, "encoder")
    assert peak < 1.4 * size
    assert present < 1.2 * size


def test_giving_back_pages_changes_no_value(tmp_path: Path) -> None:
    values = torch.arange(300_000, dtype=torch.float32).view(300, 1000)
    torch.save({"model": values}, tmp_path / "file.pt")
    mapped = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)["model"]
    written = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)["model"]
    written[150] = expected = torch.full((1000,), 7.0)
    for tensor in (mapped, values, values.clone(), torch.from_numpy(values.numpy().copy())):
        for part in (tensor, tensor[7:9], tensor.T[3:], tensor[0, :1], tensor[:0], tensor[0, 0]):
            give_back_pages(part)
        give_back_pages(tensor[:1].expand(300, 1000))
        assert torch.equal(tensor, torch.arange(300_000, dtype=torch.float32).view(300, 1000))
    give_back_pages(written)
    assert torch.equal(written[150], expected)
    assert torch.equal(written[151:], values[151:])


class UntoldPages(BytesIO):
    """What a system that tells nothing of its pages says of them."""

    def read(self, size: int | None = -1) -> bytes:
        return bytes(size or 0)


def test_pages_of_which_nothing_is_told_are_not_taken_for_a_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.arange(300_000, dtype=torch.float32)
    monkeypatch.setattr(memory, "open", lambda *_, **__: UntoldPages(), raising=False)
    give_back_pages(values)
    assert torch.equal(values, torch.arange(300_000, dtype=torch.float32))
