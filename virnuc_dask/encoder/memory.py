"""Memory: how much is encoded at once, which errors say that there is none left, what is let go."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

# Tokens per batch on a CPU: 512 to 4,096 are equally fast, and the smaller stay in cache.
CPU_TOKENS = 2048
# On a GPU at most; about 64 bytes per token and feature are alive at once.
GPU_TOKENS, _TOKEN_BYTES = 2**17, 64
_STARVED = 2**26
# What Linux tells of each page of a process, in 64 bits (Documentation/admin-guide/mm/pagemap.rst):
# that it is in memory, that it is in swap, that it is a file's own or shared with other processes.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def fitting_tokens(device: torch.device, dimension: int) -> int:
    """Tokens per batch that a device has memory for, if half of what is free is used.

    A power of two, so that a little memory more or less changes no batch, and no last bit of a row.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for later is this process's, and free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tokens = max(CPU_TOKENS, free // 2 // (_TOKEN_BYTES * dimension))
    return int(min(GPU_TOKENS, 1 << (tokens.bit_length() - 1)))


def is_starved(device: torch.device) -> bool:
    """Whether next to nothing of a GPU's memory is free, so that even a kernel may not be loaded.

    cuBLAS then says that its execution failed, which looks like the fault of what it was given.
    """
    if device.type != "cuda":
        return False
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError:  # the device is of no use any more, for some other reason
        return False
    return bool(free < _STARVED)


def grown(budget: int, fitting: int) -> int:
    """Tokens per batch for the next chunk: twice as many, if so many fit, and never fewer."""
    return max(budget, min(2 * budget, fitting))


def release_memory(device: torch.device) -> None:
    """Give back what the allocator keeps for later: the next batch may need it in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a libc other than glibc has no such function
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_pages(tensor: Tensor) -> None:
    """Let go of what was read of a mapped file: it is read again from there when it is needed.

    Such pages count as the process's memory from when they are read until the whole file is let go.
    Tensors that are not from a file, or were written to, are left as they are, and so is all where
    the system does not tell: this changes no value.

    Parameters
    ----------
    tensor : Tensor
        May be a part of another; its neighbours in its first and its last page go with it. Other
        threads may read it meanwhile.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((count - 1) * stride for count, stride in steps)
    address = tensor.data_ptr()
    first = address // mmap.PAGESIZE
    pages = -(-(address + reach * tensor.element_size()) // mmap.PAGESIZE) - first
    # No Linux, or a sandbox that has only a part of it.
    with suppress(OSError, AttributeError, ValueError):
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(8 * first)
            states = np.frombuffer(table.read(8 * pages), np.uint64)
        # Memory of the process's own would come back as zeros, so there must be a page that is a
        # file's, and a tensor lies within one mapping; and none that was written to since.
        is_there = (states & (_PRESENT | _SWAPPED)) != 0
        is_of_file = (states & _OF_FILE) != 0
        if len(states) == pages and (is_there & is_of_file).any() and is_of_file[is_there].all():
            start, size = (ctypes.c_size_t(n * mmap.PAGESIZE) for n in (first, pages))
            ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that a device or the host is short of memory."""
    # On a CPU torch raises a plain RuntimeError, and oneDNN, short of memory, one of the last two.
    # A kernel that a GPU has no memory for is no `OutOfMemoryError` either.
    texts = (
        *("out of memory", "can't allocate memory"),
        *("could not create a", "could not execute a"),
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )
