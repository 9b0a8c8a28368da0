"""Kernels for GPUs: by Triton's interpreter where there is none, by themselves where there is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from models import random_network, random_sequences, save_network, upstream_mean

from virnuc_dask import fused
from virnuc_dask.encoder import Encoder, load_encoder
from virnuc_dask.queues import Queue

# Features and heads whose sizes are awkward in different ways; one head of 128 features.
SHAPES = [(64, 4), (160, 5), (72, 3), (256, 2)]

# Kernels are interpreted or compiled as the environment says when Triton is loaded. The interpreter
# cannot multiply matrices of bfloat16: there it comes as far as attention, which is last.
KERNELS = """
import torch
from virnuc_dask import fused
for features, heads in {shapes}:
    for dtype, expected in ((torch.float16, None), (torch.bfloat16, "attention differs")):
        problem = fused.differs(torch.device("cpu"), dtype, features, heads)
        assert problem == expected, (features, heads, dtype, problem)
print("equal")
"""
NETWORK = """
import sys
import numpy as np
from virnuc_dask import encoder, fused, kernels
from virnuc_dask.encoder import load_encoder
from tests.models import random_sequences
encoder.precision_on = lambda *_: None  # float16 on a CPU is for this test alone
sequences = random_sequences([1, 33, 70, 70])
plain = load_encoder(sys.argv[1], precision="float16")
fused.serve = lambda *_: True
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


def test_kernels_do_what_torch_does() -> None:
    assert interpret(KERNELS.format(shapes=SHAPES)) == "equal\n"


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
    programs = fused.cut_programs(lengths)
    assert programs.dtype == np.int32
    found = [
        (sequence, query)
        for sequence, first in programs.tolist()
        for query in range(first, min(first + fused.TILE.queries, int(lengths[sequence])))
    ]
    assert sorted(found) == [
        (n, query) for n, length in enumerate(lengths) for query in range(length)
    ]


def test_where_they_do_not_serve_the_reason_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert not fused.serve(torch.device("cpu"), torch.bfloat16, 64, 4)
    assert not fused.serve(torch.device("cuda"), torch.float32, 64, 4)
    assert not caplog.records  # as it should be
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "differs", lambda *_: "attention differs")
        assert not fused.serve(torch.device("cuda:7"), torch.bfloat16, 64, 4)
        assert "attention differs" in caplog.text

        def fail(*_: object) -> None:
            raise RuntimeError("Failed to find C compiler")

        patch.setattr(fused, "differs", fail)
        assert not fused.serve(torch.device("cuda:7"), torch.float16, 64, 4)
        assert "Failed to find C compiler" in caplog.text
    fused.serve.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("features", "heads"), [*SHAPES, (320, 20), (480, 20), (1280, 20), (2560, 40), (5120, 40)]
)
def test_kernels_do_what_torch_does_on_a_gpu(features: int, heads: int, dtype: torch.dtype) -> None:
    assert fused.differs(torch.device("cuda"), dtype, features, heads) is None


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
def test_a_device_is_given_away_before_its_work_is_done(tmp_path: Path) -> None:
    path = save_network(random_network(12, 1280, 20), tmp_path / "model.pt")
    encoder: Encoder = load_encoder(path, "cuda", "bfloat16")
    encoder.encode(random_sequences([100] * 1000))
    queue = Queue(torch.device("cuda"))
    with queue.chosen(), torch.inference_mode():
        began = queue.mark()
        values = torch.randn(8192, 8192, device="cuda")
        for _ in range(50):
            values = values @ values * 1e-4
        host = queue.start_copy(values)
        ended = queue.mark()
        assert ended.work is not None
        assert not ended.work.query()  # still at it
        assert queue.wait(began, ended) > 0
        assert torch.equal(host, values.cpu())
