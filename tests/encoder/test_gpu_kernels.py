"""Kernels for GPUs: by Triton's interpreter where there is none, by themselves where there is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from models import random_network, random_sequences, save_network, upstream_mean

from virnuc_dask.encoder import gpu_kernels
from virnuc_dask.encoder.device_queue import Queue
from virnuc_dask.encoder.encoder import load_encoder

# Features and heads whose sizes are awkward in different ways; one head of 128 features.
SHAPES = [(64, 4), (160, 5), (72, 3), (256, 2)]

# Kernels are interpreted or compiled as the environment says when Triton is loaded. The interpreter
# cannot multiply matrices of bfloat16: there it comes as far as attention, which is last.
KERNELS = """
import torch
from virnuc_dask.encoder import gpu_kernels
for features, heads in {shapes}:
    for dtype in (torch.float16, torch.bfloat16):
        problem = gpu_kernels.differs(torch.device("cpu"), dtype, features, heads)
        excused = dtype == torch.bfloat16 and problem == "attention differs"
        assert problem is None or excused, (features, heads, dtype, problem)
print("equal")
"""
NETWORK = """
import sys
import numpy as np
from virnuc_dask.encoder import encoder, gpu_kernels, cpu_kernels
from virnuc_dask.encoder.encoder import load_encoder
from tests.support.models import random_sequences
encoder.precision_on = lambda *_: None  # float16 on a CPU is for this test alone
sequences = random_sequences([1, 33, 70, 70])
plain = load_encoder(sys.argv[1], precision="float16")
gpu_kernels.is_usable = lambda *_: True
ours = load_encoder(sys.argv[1], precision="float16")
assert plain.backends == {"attention": "sdpa", "elementwise": "torch"}
assert ours.backends == {"attention": "triton", "elementwise": "triton"}
together = ours.encode(sequences)
alone = np.concatenate([ours.encode([sequence]) for sequence in sequences])
np.savez(sys.argv[2], plain=plain.encode(sequences), together=together, alone=alone)
"""


def interpret(script: str, *arguments: object) -> str:
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which torch's builds for CPUs come without")
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 has no loops of unknown length with NumPy 2.4")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels_do_what_torch_does() -> None:
    assert interpret(KERNELS.format(shapes=SHAPES)) == "equal\n"


@pytest.mark.slow
def test_a_network_of_these_kernels_is_the_same_network(tmp_path: Path) -> None:
    network = random_network(2, 72, 3)
    path = save_network(network, tmp_path / "model.pt")
    interpret(NETWORK, path, tmp_path / "rows.npz")
    rows = np.load(tmp_path / "rows.npz")
    expected = upstream_mean(network, random_sequences([1, 33, 70, 70]))
    # As far from float32 as torch's own operations are, and not farther.
    error, usual = (np.abs(rows[name] - expected).max() for name in ("together", "plain"))
    assert 0 < error < 1.5 * usual
    assert np.abs(rows["together"] - rows["alone"]).max() < error


def test_every_query_of_every_sequence_has_one_program() -> None:
    lengths = np.array([3, 64, 65, 128, 129, 1024])
    programs = gpu_kernels.cut_programs(lengths)
    assert programs.dtype == np.int32
    found = [
        (sequence, query)
        for sequence, first in programs.tolist()
        for query in range(first, min(first + gpu_kernels.TILE.queries, int(lengths[sequence])))
    ]
    assert sorted(found) == [
        (n, query) for n, length in enumerate(lengths) for query in range(length)
    ]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException | str], None]]:
    """Stands for a GPU on which the kernels differ as they are told to."""

    def behave(how: BaseException | str) -> None:
        def differs(*_: object) -> str:
            if isinstance(how, BaseException):
                raise how
            return how

        monkeypatch.setattr(gpu_kernels, "differs", differs)
        gpu_kernels.is_usable.cache_clear()

    yield behave
    gpu_kernels.is_usable.cache_clear()


def on_a_gpu() -> bool:
    return gpu_kernels.is_usable(torch.device("cuda:7"), torch.bfloat16, 64, 4)


def test_where_they_do_not_serve_the_reason_is_said(
    a_gpu: Callable[[BaseException | str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert not gpu_kernels.is_usable(torch.device("cpu"), torch.bfloat16, 64, 4)
    assert not gpu_kernels.is_usable(torch.device("cuda"), torch.float32, 64, 4)
    assert not caplog.records  # as it should be
    for reason in ("attention differs", RuntimeError("Failed to find C compiler")):
        a_gpu(reason)
        assert not on_a_gpu()
        assert str(reason) in caplog.text


@pytest.mark.parametrize(
    "text",
    ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: unspecified launch failure"],
)
def test_a_device_that_is_full_or_lost_says_nothing_about_the_kernels(
    text: str, a_gpu: Callable[[BaseException | str], None]
) -> None:
    a_gpu(RuntimeError(text))
    for _ in range(2):  # and nothing is remembered
        with pytest.raises(RuntimeError, match=text[:10]):
            on_a_gpu()


def test_what_the_kernels_cannot_read_is_refused() -> None:
    wide = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="dense"):
        gpu_kernels.gelu(wide.t())
    with pytest.raises(ValueError, match="dense"):
        gpu_kernels.add_norm(wide.t(), None, wide[0], wide[0], 1e-5, torch.float16)
    long = torch.empty(2**28, 4, device="meta")
    with pytest.raises(ValueError, match="268,435,456 tokens is too long"):
        gpu_kernels.attend(torch.zeros(1, 24), 2, wide[0], wide, long)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("features", "heads"), [*SHAPES, (320, 20), (480, 20), (1280, 20), (2560, 40), (5120, 40)]
)
def test_kernels_do_what_torch_does_on_a_gpu(features: int, heads: int, dtype: torch.dtype) -> None:
    assert gpu_kernels.differs(torch.device("cuda"), dtype, features, heads) is None


@pytest.mark.gpu
def test_all_kernels_serve_on_a_gpu(tmp_path: Path) -> None:
    path = save_network(random_network(2, 320, 20), tmp_path / "model.pt")
    encoder = load_encoder(path, "cuda", "bfloat16")
    assert encoder.backends == {"attention": "triton", "elementwise": "triton"}


@pytest.mark.gpu
def test_threads_that_queue_work_behind_each_other_get_their_own_rows(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = save_network(random_network(4, 640, 10), tmp_path / "model.pt")
    encoder = load_encoder(path, "cuda", "bfloat16")
    # Of different sizes, so that one's memory becomes another's.
    parts = [random_sequences([20 + 7 * number] * 900, seed=number) for number in range(12)]
    expected = [encoder.encode(part) for part in parts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            found = list(pool.map(encoder.encode, parts))
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_work_that_is_queued_is_waited_for(tmp_path: Path) -> None:
    queue = Queue(torch.device("cuda"))
    with queue.as_current_device(), torch.inference_mode():
        began = queue.mark()
        values = torch.randn(8192, 8192, device="cuda")
        for _ in range(50):
            values = values @ values * 1e-4
        host = queue.start_copy(values)
        ended = queue.mark()
        assert queue.wait(began, ended) > 0
        assert torch.equal(host, values.cpu())
