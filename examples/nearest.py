"""Print the sequences whose embeddings are nearest to one sequence's, read lazily from a store.

python examples/nearest.py demo.zarr C3VMB7
"""

from __future__ import annotations

import argparse

import numpy as np

import virnuc_dask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("query", help="identifier, or a part of it; the first match is taken")
    parser.add_argument("--count", type=int, default=5, help="(default: %(default)s)")
    arguments = parser.parse_args()

    data = virnuc_dask.open_store(arguments.store)
    ids = data.sequence_id.values
    matches = np.flatnonzero(np.strings.find(ids, arguments.query) >= 0)
    if not len(matches):
        raise SystemExit(f"no identifier in {arguments.store} has {arguments.query!r} in it")
    query = int(matches[0])
    # All of this is lazy: one pass over the chunks, and only the similarities stay in memory.
    centred = data.embedding - data.embedding.mean("sequence")  # NaN rows are left out
    length = (centred**2).sum("feature", skipna=False) ** 0.5
    similarity = centred.dot(centred[query], dim="feature") / (length * length[query])
    values = similarity.compute().values
    print(f"{ids[query]} ({int(data.length[query])} residues) is nearest to")
    ranked = np.argsort(-np.nan_to_num(values, nan=-2))
    for row in ranked[ranked != query][: arguments.count]:
        print(f"  {values[row]:.3f}  {ids[row]} ({int(data.length[row])} residues)")


if __name__ == "__main__":
    main()
