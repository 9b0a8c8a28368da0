"""A device's queue of work. A GPU does its work some time after it is queued."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy values to a device. Nothing waits for a GPU's copy."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in a device's queue. A CPU has no queue: its mark is a time."""

    seconds: float = 0.0
    work: torch.cuda.Event | None = None
    copies: torch.cuda.Event | None = None


class Queue:
    """The work of one encoder on its device.

    All threads add to the same queue of a GPU, so their work is done in the order in which it was
    queued. Results are copied to the host in a second stream, while the GPU does the next work.

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    is_immediate : bool
        Whether work is done when the call that queues it returns, as on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_immediate = device.type != "cuda"
        self._copies = None if self.is_immediate else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def as_current_device(self) -> AbstractContextManager[object]:
        """A context in which kernels are launched on this device."""
        return nullcontext() if self._copies is None else torch.cuda.device(self._device)

    def mark(self) -> Mark:
        """Mark the present end of the queue."""
        if self._copies is None:
            return Mark(time.perf_counter())
        # blocking: a thread that waits for these events sleeps and frees the processor.
        work = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        copies = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        work.record(torch.cuda.current_stream(self._device))
        copies.record(self._copies)
        return Mark(work=work, copies=copies)

    def start_copy(self, values: Tensor) -> Tensor:
        """Start to copy values to the host. They are complete once `wait` reaches a later mark."""
        if self._copies is None:
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            host.copy_(values, non_blocking=True)
        values.record_stream(self._copies)  # keeps the memory until it is copied
        return host

    def wait(self, began: Mark, ended: Mark) -> float:
        """Wait until all work before `ended` is done and copied.

        Returns
        -------
        float
            Seconds that the device took for the work between the marks.
        """
        if began.work is None or ended.work is None or ended.copies is None:
            return ended.seconds - began.seconds
        ended.work.synchronize()
        ended.copies.synchronize()
        return float(began.work.elapsed_time(ended.work)) / 1000
