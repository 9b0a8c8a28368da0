"""Would 8-bit floats do? Their products, emulated on a CPU, beside int8's.

``python -m benchmarks.float8`` prints, for random ESM-2 models of published shapes and sequences of
5 to 800 residues, how far each row is from float32. Activations are rounded to float8_e4m3fn with
a scale per token, weights with one per feature, sums are float32: what a GPU's
``torch._scaled_mm`` does at its most careful.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.encoder import cosine
from tests.models import random_network, random_sequences, save_network
from virnuc_dask import esm2
from virnuc_dask.encoder import load_encoder
from virnuc_dask.kernels import Integers, Product
from virnuc_dask.linear import Linear

SHAPES = {"8M": (6, 320, 20), "35M": (12, 480, 20), "150M": (30, 640, 20)}
LENGTHS = [5, 12, 33, 60, 80, 100, 200, 300, 500, 800]
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(values: Tensor) -> Tensor:
    """Values that float8 holds, times a scale for each row."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


class Float8Linear(Linear):
    """A linear layer whose factors are float8."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(rounded(weight), bias)

    def __call__(self, x: Tensor | Integers) -> Product:
        """The product, shape (tokens, out), from x of shape (tokens, in)."""
        return Product(F.linear(rounded(self._converted(x)), self._weight, self._bias))


@contextmanager
def float8_layers() -> Iterator[None]:
    """Encoders that are loaded meanwhile have them."""
    usual = esm2.make_linear
    esm2.make_linear = lambda weight, bias, _precision: Float8Linear(weight, bias)
    try:
        yield
    finally:
        esm2.make_linear = usual


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    sequences = random_sequences(LENGTHS)
    print("| model | products | max abs | cosine | centred |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            weights = save_network(random_network(*shape), Path(folder) / "model.pt")
            exact = load_encoder(weights).encode(sequences)
            with float8_layers():
                emulated = load_encoder(weights).encode(sequences)
            whole = load_encoder(weights, precision="int8").encode(sequences)
            for products, found in (("int8", whole), ("float8", emulated)):
                mean = exact.mean(0)
                print(
                    f"| {name} | {products} | {np.abs(found - exact).max():.3f} |"
                    f" {cosine(found, exact).min():.6f} |"
                    f" {cosine(found - mean, exact - mean).min():.5f} |"
                )


if __name__ == "__main__":
    main()
