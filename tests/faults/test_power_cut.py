"""Power cuts: what was acknowledged is there afterwards, and what is there is whole."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import tree
from harness import assert_ledger, clear_partial_files_of_the_killed, finished_chunks
from nursery import Nursery
from power_cuts import (
    Lab,
    check_cut_after_an_ingest,
    check_cuts,
    cut_anywhere,
    cut_right_after_acknowledgements,
    mounted,
)

import virnuc_dask
from virnuc_dask.store.store import Store


@pytest.mark.parametrize("cut", [cut_right_after_acknowledgements, cut_anywhere])
def test_a_power_cut_costs_no_chunk_that_was_acknowledged(
    cut: Any, nursery: Nursery, lab: Lab, client: Any
) -> None:
    check_cuts(nursery, lab, cut)
    image, said = lab.cuts[len(lab.cuts) // 2]
    with mounted(image, image.with_suffix("")) as disk:
        store = Store(disk / "out.zarr")
        before = finished_chunks(store)
        summary = virnuc_dask.resume(store.path, client=client)
        assert summary.exit_code == 0
        assert summary.computed_chunks <= store.chunk_count - len(said)
        clear_partial_files_of_the_killed(store)
        assert_ledger(store, lab.whole)
        after = tree(store.path)
        assert {name: after[name] for name in before} == before
        assert virnuc_dask.resume(store.path, client=client).computed_chunks == 0
        assert tree(store.path) == after


def test_a_power_cut_costs_no_store_that_was_made(nursery: Nursery, lab: Lab, client: Any) -> None:
    check_cut_after_an_ingest(nursery, lab)
    with mounted(lab.cuts[0][0], lab.image.with_name("again")) as disk:
        assert virnuc_dask.resume(disk / "out.zarr", client=client).exit_code == 0
        assert_ledger(Store(disk / "out.zarr"), lab.whole)
