"""What an encoder's host does for one chunk while its device waits: a network that returns at once.

    python -m benchmarks.host                  # launches return at once, and compute nothing
    python -m benchmarks.host --device cuda    # real launches and copies

While a thread holds the device's lock, no other chunk is queued. So what it does there must be far
less than the device takes, or the device idles. Everything is as in a run but the layers, which
give their result at once, and, without a GPU, what is computed of that result. The peer is
fair-esm's batch converter, which makes tokens of the same sequences. Prints Markdown for
RESULTS.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from esm.data import Alphabet
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.support.models import random_network, save_network
from virnuc_dask.encoder import attention, encoder
from virnuc_dask.encoder import network as network_module
from virnuc_dask.encoder.device_queue import Mark
from virnuc_dask.encoder.encoder import Encoder, load_encoder
from virnuc_dask.encoder.packing import cut_segments

# Tokens per batch that a GPU with free memory gets.
_BUDGET = 2**17
_TARGET_MS = 3.0


COLUMNS = ("sequences", "pooling", "under the lock, ms", "else, ms", "fair-esm, ms", "ratio")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in measured(arguments.device, arguments.features, arguments.turns):
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print(f"\nWhat is aimed at: less than {_TARGET_MS:.0f} ms under the lock.")


def measured(device: str, features: int, turns: int) -> Iterator[tuple[str, ...]]:
    """Medians for each kind of sequences and each pooling, as `COLUMNS` says."""
    precision: Any = "float32" if device == "cpu" else "float16"
    with TemporaryDirectory() as folder:
        network = random_network(1, features, max(1, features // 64))
        file = save_network(network, Path(folder) / "a.pt")
        for name, lengths in cases():
            peer = median(converted_ms(lengths) for _ in range(3))
            for pooling in ("mean", "max", "bos", "mean, per residue"):
                how: Any = pooling.partition(",")[0]
                model = load_encoder(file, device, precision, pooling=how)
                with instant(model, device) as held:
                    per_residue = "residue" in pooling
                    took = [chunk_ms(model, lengths, per_residue=per_residue) for _ in range(turns)]
                under = median(held[3:])
                yield (
                    f"{len(lengths):,} {name}",
                    pooling,
                    f"{under:.2f}",
                    f"{median(took[3:]) - under:.2f}",
                    f"{peer:.0f}",
                    f"{peer / under:.0f}",
                )


def cases() -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Names and lengths of the sequences of a chunk."""
    draw = np.random.default_rng(0)
    yield "reads", draw.integers(34, 101, 2_048).astype(np.int32)
    sizes = np.exp(draw.normal(5.5, 0.6, 460)).clip(30, 1_022)
    yield "proteins", sizes.astype(np.int32)
    yield "long, in windows", draw.integers(2_000, 6_000, 35).astype(np.int32)


def chunk_ms(model: Encoder, lengths: NDArray[np.int32], *, per_residue: bool) -> float:
    """Milliseconds in which a chunk is encoded."""
    residues = np.full(int(lengths.sum()), ord("A"), np.uint8)
    began = time.perf_counter()
    segments = cut_segments(lengths, 1_022, "window")
    with np.errstate(invalid="ignore"):  # without a GPU the results are whatever was in memory
        model.encode_segments(residues, segments, len(lengths), per_residue=per_residue)
    return 1e3 * (time.perf_counter() - began)


def converted_ms(lengths: NDArray[np.int32]) -> float:
    """Milliseconds in which fair-esm makes tokens of as many residues."""
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter(1_022)
    began = time.perf_counter()
    convert([(str(n), "A" * n) for n in lengths.tolist()])
    return 1e3 * (time.perf_counter() - began)


class Lock:
    """Notes for how long it is held."""

    def __init__(self) -> None:
        self.held_ms: list[float] = []

    def __enter__(self) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """End."""
        self.held_ms.append(1e3 * (time.perf_counter() - self._began))


class LateQueue:
    """A queue as of a GPU: results arrive later, in memory that is reserved for them."""

    is_immediate = False

    def as_current_device(self) -> Any:
        """A context in which launches return at once."""
        return Launches()

    def mark(self) -> Mark:
        """The time."""
        return Mark(time.perf_counter())

    def start_copy(self, values: Tensor) -> Tensor:
        """Memory with no values, of which none is touched yet."""
        return torch.empty(values.shape, dtype=values.dtype)

    def wait(self, began: Mark, ended: Mark) -> float:
        """Seconds between two marks."""
        return ended.seconds - began.seconds


class Launches(TorchFunctionMode):
    """What is computed of the layers' result has the right shape and no values."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return at once, if the operation is one of pooling and copying."""
        kwargs = kwargs or {}
        if function is F.embedding_bag:
            return torch.empty((len(kwargs["offsets"]), args[1].shape[1]))
        if function is torch.segment_reduce:
            return torch.empty((len(kwargs["lengths"]), args[0].shape[1]))
        if function is Tensor.index_fill_:
            return args[0]
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor):
            return torch.empty((len(args[1]), *args[0].shape[1:]))
        if function is Tensor.to and args[1] == torch.float16:
            return torch.empty(args[0].shape, dtype=torch.float16)
        return function(*args, **kwargs)


@contextmanager
def instant(model: Encoder, device: str) -> Iterator[list[float]]:
    """Replace the layers of a model, and on a CPU its queue; yield how long the lock was held."""

    def forward(tokens: Tensor, layout: Any) -> Tensor:
        layout.programs, layout.turns  # noqa: B018  # the first layer makes both
        return torch.empty((len(tokens), model.dimension), device=device)

    lock: Any = Lock()
    replaced: list[tuple[Any, str, Any]] = [
        (model, "_device_lock", lock),
        (model._network, "_forward", forward),
    ]
    if device == "cpu":
        copied: Callable[..., Tensor] = lambda values, _: torch.from_numpy(values).clone()  # noqa: E731
        replaced += [
            *((module, "to_device", copied) for module in (attention, encoder, network_module)),
            (model, "_queue", LateQueue()),
            (model, "token_budget", _BUDGET),
            (model._network, "_multiple", 1),
        ]
    with ExitStack() as stack:
        for each in replaced:
            stack.enter_context(mock.patch.object(*each))
        yield lock.held_ms


if __name__ == "__main__":
    main()
