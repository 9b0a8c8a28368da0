"""Memory: how many tokens fit, which errors mean that it ran out, and how it is released."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

# Tokens per batch on a CPU: 512 to 4,096 are equally fast, and smaller batches stay in cache.
CPU_TOKENS = 2048
# The most tokens per batch on a GPU. About 64 bytes per token and feature are alive at once.
GPU_TOKENS, _TOKEN_BYTES = 2**17, 64
_STARVED = 2**26
# Bits of Linux's 64-bit entry for a page of a process (Documentation/admin-guide/mm/pagemap.rst):
# it is in memory; it is in swap; it belongs to a file or is shared with other processes.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def fitting_tokens(device: torch.device, dimension: int) -> int:
    """Tokens per batch that fit into half of a device's free memory.

    The result is a power of two, so that small differences in free memory change no batch, and no
    last bit of a row.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch's allocator has cached is free as well.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tokens = max(CPU_TOKENS, free // 2 // (_TOKEN_BYTES * dimension))
    return int(min(GPU_TOKENS, 1 << (tokens.bit_length() - 1)))


def is_starved(device: torch.device) -> bool:
    """Whether a GPU has so little free memory that even loading a kernel may fail.

    cuBLAS then reports a failed execution, which looks like the fault of its input.
    """
    if device.type != "cuda":
        return False
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError:  # the device is no longer usable, for another reason
        return False
    return bool(free < _STARVED)


def grown(budget: int, fitting: int) -> int:
    """Tokens per batch for the next chunk: at most twice as many, if they fit; never fewer."""
    return max(budget, min(2 * budget, fitting))


def release_memory(device: torch.device) -> None:
    """Return the allocator's cached memory: the next batch may need it in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a libc other than glibc has no such function
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_pages(tensor: Tensor) -> None:
    """Release pages that were read from a mapped file. The system reads them again when needed.

    Such pages count as memory of the process from the first read until the file is unmapped. No
    value changes: a tensor keeps its pages if it is not from a file, if it was written to, or if
    the system does not tell.

    Parameters
    ----------
    tensor : Tensor
        May be part of another tensor. Neighbours in its first and last page are released too.
        Other threads may read it at the same time.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((count - 1) * stride for count, stride in steps)
    address = tensor.data_ptr()
    first = address // mmap.PAGESIZE
    pages = -(-(address + reach * tensor.element_size()) // mmap.PAGESIZE) - first
    # The system may not be Linux, or be a sandbox with only a part of Linux.
    with suppress(OSError, AttributeError, ValueError):
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(8 * first)
            states = np.frombuffer(table.read(8 * pages), np.uint64)
        # The process's own memory would come back as zeros. So one page must be a file's, which is
        # enough because a tensor lies within one mapping, and none may have been written to.
        is_there = (states & (_PRESENT | _SWAPPED)) != 0
        is_of_file = (states & _OF_FILE) != 0
        if len(states) == pages and (is_there & is_of_file).any() and is_of_file[is_there].all():
            start, size = (ctypes.c_size_t(n * mmap.PAGESIZE) for n in (first, pages))
            ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that a device or the host is out of memory."""
    # On a CPU torch raises a plain RuntimeError; oneDNN's has one of the last two texts. A GPU
    # without memory for a kernel does not raise `OutOfMemoryError` either.
    texts = (
        *("out of memory", "can't allocate memory"),
        *("could not create a", "could not execute a"),
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )
