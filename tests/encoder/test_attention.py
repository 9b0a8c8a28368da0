"""Which packed attention is used. Without a GPU, stand-ins take the place of torch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from virnuc_dask.encoder.attention import (
    PackedKernel,
    attend,
    best_attention,
    describe_attention,
    usable_packed_kernel,
)

if not hasattr(torch.nn.attention, "current_flash_attention_impl"):
    pytest.skip("needs torch 2.11, which can switch", allow_module_level=True)
CPU, HALF = torch.device("cpu"), torch.float16
# By name: to import it takes a second and makes a folder for torch's compiler.
VARLEN = "torch.nn.attention.varlen.varlen_attn"
Registered = dict[str, Callable[..., object]]


class Switch:
    """What torch keeps of a FlashAttention that it has switched on."""

    def remove(self) -> None:
        pass


def raises(error: Exception) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise error

    return call


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registered]:
    """What torch calls to switch on a FlashAttention, and no longer does after the test."""
    impls: Registered = {"FA3": Switch, "FA4": Switch}
    monkeypatch.setattr("torch.nn.attention._registry._FLASH_ATTENTION_IMPLS", impls)
    yield impls
    if torch.nn.attention.current_flash_attention_impl():
        torch.nn.attention.restore_flash_attention_impl()


def stand_in(broken: tuple[str | None, ...] = ()) -> Callable[..., Tensor]:
    """Attention of each sequence, but nonsense by the broken FlashAttentions."""

    def attend_each(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *_: object
    ) -> Tensor:
        if torch.nn.attention.current_flash_attention_impl() in broken:
            return torch.zeros_like(query)
        parts = [
            F.scaled_dot_product_attention(
                *(x[first:end].float().transpose(0, 1) for x in (query, key, value))
            ).transpose(0, 1)
            for first, end in pairwise(bounds.tolist())
        ]
        return torch.cat(parts).to(query.dtype)

    return attend_each


@pytest.mark.parametrize(
    ("broken", "used", "switched_on"),
    [
        ((), "varlen FA4", "FA4"),
        (("FA4",), "varlen", None),
        (("FA4", None), None, None),
    ],
)
def test_flash_attention_4_is_used_if_it_agrees_and_switched_off_if_not(
    broken: tuple[str | None, ...],
    used: str | None,
    switched_on: str | None,
    registered: Registered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VARLEN, stand_in(broken))
    kernel = usable_packed_kernel(CPU, HALF, 16)
    assert (kernel and describe_attention(kernel)) == used
    assert torch.nn.attention.current_flash_attention_impl() == switched_on


def test_without_flash_attention_4_torchs_own_is_used(
    registered: Registered, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(VARLEN, stand_in())
    registered["FA4"] = raises(ImportError("no flash_attn here"))
    kernel = usable_packed_kernel(CPU, HALF, 16)
    assert kernel is not None
    assert describe_attention(kernel) == "varlen"
    assert "no packed attention by FA4: ImportError: no flash_attn here" in caplog.text


def test_another_choice_of_this_process_stays(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.nn.attention.activate_flash_attention_impl("FA3")
    monkeypatch.setattr(VARLEN, stand_in())
    kernel = usable_packed_kernel(CPU, HALF, 16)
    assert isinstance(kernel, PackedKernel)
    assert describe_attention(kernel) == "varlen FA3"
    monkeypatch.setattr(VARLEN, stand_in(broken=("FA3",)))
    assert usable_packed_kernel(CPU, HALF, 16) is None
    assert torch.nn.attention.current_flash_attention_impl() == "FA3"


def test_a_device_that_is_lost_is_no_fault_of_the_kernel(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VARLEN, raises(RuntimeError("CUDA error: device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        usable_packed_kernel(CPU, HALF, 16)


def test_a_cpu_and_float32_have_no_packed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VARLEN, stand_in())
    assert best_attention(CPU, HALF, 16) is attend
    assert best_attention(torch.device("cuda"), torch.float32, 16) is attend
