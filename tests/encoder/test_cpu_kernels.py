"""The compiled kernels, each library that this processor can run, beside torch's own operators."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask.encoder import cpu_kernels
from virnuc_dask.encoder.attention import Layout, attend, attend_natively
from virnuc_dask.encoder.network import _pair

CPU = torch.device("cpu")
# Around the vectors of 4, 8 and 16 lanes and the blocks of 6 and 8 rows.
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 9, 13, 14, 15, 16, 30, 31, 46, 60, 98, 127, 128, 200]
CAPABLE = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["generic"]
)


@pytest.fixture(params=CAPABLE)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    path = Path(cpu_kernels.__file__).with_name(f"_kernels_{request.param}.so")
    if not path.exists():
        pytest.skip(f"{path.name} was not built: no C++ compiler when this was installed")
    found = ctypes.CDLL(str(path))
    monkeypatch.setattr(cpu_kernels, "_library", lambda: found)
    return found


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def test_they_are_built_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler here")
    if platform.machine() == "x86_64" and CAPABLE == ["generic"]:
        pytest.skip("this processor is older than AVX2, for which none are built")
    assert cpu_kernels.is_usable(CPU, "float32", 320)
    assert not cpu_kernels.is_usable(CPU, "float16", 320)
    assert not cpu_kernels.is_usable(CPU, "float32", 330)
    assert not cpu_kernels.is_usable(torch.device("cuda"), "float32", 320)


def a_layout(lengths: list[int], features: int) -> Layout:
    bounds = torch.tensor([0, *(length + 2 for length in lengths)]).cumsum(0).to(torch.int32)
    runs = [(1, length) for length in lengths]
    angles = torch.arange(max(lengths) + 2)[:, None] * noise(features // 2, seed=9).abs()
    return Layout(runs, bounds, angles)


def heads_first(qkv: Tensor, heads: int) -> Tensor:
    """The same features in the order that `attend` wants: those that turn together in pairs."""
    parts = qkv.T.chunk(3)
    return torch.cat([*(_pair(part, heads) for part in parts[:2]), parts[2]]).T.contiguous()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Heads of the published models, and one of another size; all features are a multiple of 16.
@pytest.mark.parametrize(("heads", "d"), [(5, 16), (2, 24), (3, 32), (2, 64), (1, 128), (4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(
    library: ctypes.CDLL, threads: int, heads: int, d: int, dtype: torch.dtype
) -> None:
    layout = a_layout(LENGTHS, d)
    qkv = noise(layout.tokens, 3 * heads * d).to(dtype)
    expected = attend(heads_first(qkv, heads), heads, layout)
    found = attend_natively(qkv, heads, layout)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_attention_to_the_nearest_only_or_to_all_alike(library: ctypes.CDLL, scale: float) -> None:
    layout = a_layout([30], 16)
    qkv = noise(32, 3 * 80)
    qkv[:, :160] *= scale
    expected = attend(heads_first(qkv, 5), 5, layout)
    torch.testing.assert_close(attend_natively(qkv, 5, layout), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gives_the_same_bits_alone(
    library: ctypes.CDLL, threads: int, dtype: torch.dtype
) -> None:
    layout = a_layout(LENGTHS, 16)
    qkv = noise(layout.tokens, 3 * 80).to(dtype)
    together = attend_natively(qkv, 5, layout)
    for first, last in zip(layout.bounds[:-1].tolist(), layout.bounds[1:].tolist(), strict=True):
        alone = Layout([], torch.tensor([0, last - first], dtype=torch.int32), layout.angles)
        found = attend_natively(qkv[first:last], 5, alone)
        assert torch.equal(found, together[first:last])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_with_its_sequence(
    library: ctypes.CDLL, bad: float
) -> None:
    layout = a_layout([5, 20, 40], 16)
    qkv = noise(layout.tokens, 3 * 80)
    clean = attend_natively(qkv, 5, layout)
    for feature in (3, 80 + 3, 160 + 3):  # of the first head's query, key and value
        spoilt = qkv.clone()
        spoilt[10, feature] = bad  # in the second sequence, 7 to 28
        found = attend_natively(spoilt, 5, layout)
        assert torch.equal(found[:7], clean[:7])
        assert torch.equal(found[29:], clean[29:])
        assert not found[7:29].isfinite().all()
    x = noise(9, 32)
    x[4, 30] = bad
    for dtype in (torch.float32, torch.bfloat16):
        rows = cpu_kernels.add_norm(x.clone(), None, torch.ones(32), torch.zeros(32), 1e-5, dtype)
        assert rows.isfinite().all(1).tolist() == [row != 4 for row in range(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm(library: ctypes.CDLL, threads: int, dtype: torch.dtype) -> None:
    x, weight, bias = 5 * noise(61, 48) + 2, noise(48, seed=1), noise(48, seed=2)
    product = noise(61, 48, seed=3)
    for added in (None, product, product.bfloat16()):
        summed = x if added is None else x + added
        expected = F.layer_norm(summed, (48,), weight, bias, 1e-5)
        given = x.clone()
        found = cpu_kernels.add_norm(given, added, weight, bias, 1e-5, dtype)
        torch.testing.assert_close(given, summed, atol=1e-6, rtol=1e-6)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance / 5)


def test_bfloat16_is_rounded_to_the_nearest_and_from_ties_to_even(library: ctypes.CDLL) -> None:
    # A norm that changes nothing: mean 0, variance 1.
    bits = torch.arange(0x3F000000, 0x3F800000, 997, dtype=torch.int32)
    values = torch.cat([bits, torch.tensor([0x3F008000, 0x3F018000], dtype=torch.int32)])
    shift = values.view(torch.float32)[: len(values) // 16 * 16]
    found = cpu_kernels.add_norm(
        torch.zeros(1, len(shift)), None, torch.zeros(len(shift)), shift, 1e-5, torch.bfloat16
    )
    assert torch.equal(found[0], shift.bfloat16())


def test_memory_that_cannot_be_had_is_an_error(library: ctypes.CDLL) -> None:
    # A sequence that would need more than there are addresses for; nothing is read.
    bounds = torch.tensor([0, 2**31 - 64], dtype=torch.int32)
    with pytest.raises(MemoryError, match="attend"):
        cpu_kernels._run("attend", 1, 0, None, None, bounds, 1, 2**14, None)


def test_tokens_beyond_the_last_sequence_are_nothing(library: ctypes.CDLL, threads: int) -> None:
    layout = a_layout(LENGTHS, 16)
    qkv = noise(layout.tokens, 3 * 80)
    more = torch.cat([qkv, torch.full((5, 3 * 80), torch.nan)])
    expected = F.pad(attend_natively(qkv, 5, layout), (0, 0, 0, 5))
    assert torch.equal(attend_natively(more, 5, layout), expected)


def test_several_threads_at_once(library: ctypes.CDLL) -> None:
    layout = a_layout(LENGTHS, 16)
    inputs = [noise(layout.tokens, 3 * 80, seed=seed) for seed in range(8)]
    expected = [attend_natively(qkv, 5, layout) for qkv in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = pool.map(lambda qkv: attend_natively(qkv, 5, layout), inputs)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_what_a_thread_writes_to_outlives_who_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    # A stand-in for a kernel that is still at work when Ctrl-C comes. In every thread: what has
    # not begun by then is never called.
    begun, go_on, alive = Barrier(threads + 1, timeout=30), Event(), []

    def slow(*_: object) -> int:
        begun.wait()
        go_on.wait(30)
        alive.append(of_x() is not None)
        return 0

    monkeypatch.setattr(cpu_kernels, "_library", lambda: SimpleNamespace(virnuc_add_norm=slow))
    x, weight, bias = noise(48, 32), noise(32), noise(32)
    of_x = weakref.ref(x)

    def interrupt() -> None:
        begun.wait()
        # A signal that comes just before the main thread sleeps does not wake it, and costs 30 s.
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    given = [x]
    del x
    # dask-jobqueue, once imported by another test, has Ctrl-C leave by another exception.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    Thread(target=interrupt).start()
    try:
        cpu_kernels.add_norm(given.pop(), None, weight, bias, 1e-5, torch.float32)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    else:
        pytest.fail("nothing was interrupted")
    finally:
        signal.signal(signal.SIGINT, usual)
    go_on.set()
    cpu_kernels._pool().submit(int).result()
    until = time.monotonic() + 30
    while len(alive) < threads and time.monotonic() < until:
        time.sleep(0.01)
    assert alive == [True] * threads


def test_defaults_of_torch_that_others_have_set(library: ctypes.CDLL) -> None:
    layout = a_layout(LENGTHS, 16)
    qkv, values = noise(layout.tokens, 3 * 80), noise(61, 64)
    turns = layout.turns

    def both() -> list[Tensor]:
        norm = cpu_kernels.add_norm(
            values.clone(), None, values[0], values[1], 1e-5, torch.bfloat16
        )
        return [cpu_kernels.attend(qkv, turns, layout.bounds, 5), norm]

    expected = both()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = both()
    finally:
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_lies_otherwise_in_memory_is_refused(library: ctypes.CDLL) -> None:
    values = noise(64, 64)
    with pytest.raises(ValueError, match="dense"):
        cpu_kernels.add_norm(values.T, None, values[0], values[1], 1e-5, torch.float32)


def test_a_library_of_another_source_is_not_loaded(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(cpu_kernels.__file__).with_suffix(".cpp")
    built = tmp_path / "kernels.so"
    built.write_bytes(Path(library._name).read_bytes())
    assert cpu_kernels.load(built) is not None
    assert cpu_kernels.load(tmp_path / "none.so") is None
    monkeypatch.setattr(cpu_kernels, "__file__", str(tmp_path / "cpu_kernels.py"))
    assert cpu_kernels.load(built) is None  # there is no source
    (tmp_path / "cpu_kernels.cpp").write_text(source.read_text() + "\n// a change\n")
    assert cpu_kernels.load(built) is None
    (tmp_path / "cpu_kernels.cpp").write_text(source.read_text())
    assert cpu_kernels.load(built) is not None


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false", "env false -x", ""])
def test_an_installation_without_a_working_compiler_goes_on(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = pytest.importorskip("hatch_build", reason="hatchling is not installed").KernelsHook
    package = tmp_path / "virnuc_dask" / "encoder"
    package.mkdir(parents=True)
    (package / "cpu_kernels.cpp").write_bytes(
        Path(cpu_kernels.__file__).with_suffix(".cpp").read_bytes()
    )
    (package / "_kernels_avx2.so").write_text("of an earlier version")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "/usr/bin" if compiler else "")
    said: list[str] = []
    app = SimpleNamespace(display_warning=said.append)
    building = hook(str(tmp_path), {}, None, None, str(tmp_path), "wheel", app)
    building.initialize("standard", {"artifacts": []})
    assert said
    assert not list(package.glob("*.so"))
