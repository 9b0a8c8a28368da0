"""Errors are part of the interface, and travel from workers."""

from __future__ import annotations

import pickle

import pytest

from virnuc_dask.errors import (
    IdentityMismatchError,
    InputError,
    ModelError,
    NotAStoreError,
    StoreError,
    UsageError,
    VirnucError,
)

ERRORS = [
    (VirnucError("lost"), 4),
    (UsageError("no"), 2),
    (InputError("odd letter", file="a.fa", line=3, record="x"), 2),
    (InputError("empty", file="-"), 2),
    (ModelError("unknown"), 2),
    (StoreError("damaged"), 4),
    (NotAStoreError("nothing there"), 2),
    (IdentityMismatchError("a.zarr", [("pooling", "mean", "max")]), 2),
]


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_errors_keep_everything_on_their_way_from_a_worker(error: VirnucError, code: int) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert arrived.exit_code == error.exit_code == code


def test_input_errors_say_where() -> None:
    error = InputError("odd letter", file="a.fa", line=3, record="x")
    assert str(error) == "a.fa, line 3, record 'x': odd letter"
    assert str(InputError("empty", file="-")) == "standard input: empty"
