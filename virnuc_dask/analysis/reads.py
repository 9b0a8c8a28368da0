"""What was translated from one read, or cut from one protein, taken together."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from virnuc_dask.errors import UsageError

How = Literal["mean", "max", "min"]


def by_read(data: Any, how: How = "mean") -> Any:
    """One row for each read instead of one for each of its frames, windows and tiles.

    A read is a record of the input; of tiled proteins it is a protein.

    Parameters
    ----------
    data : xarray.Dataset
        From `open_store`, of translated reads or of tiles; or some of its rows, in their order.
    how : {'mean', 'max', 'min'}
        What becomes of a feature, of those of the read's rows that have an embedding.

    Returns
    -------
    xarray.Dataset
        ``embedding`` (read, feature), float32, lazy; NaN where no row of a read is embedded.
        Coordinates: ``read``, the number of the input record; ``read_id``, its name; ``rows``, how
        many rows it has here. Reads without a row are left out. Of all rows only ``read`` is read
        at once, 8 bytes each.

    Raises
    ------
    UsageError
        The rows are whole records, not in the order of their reads, or `how` is something else.
    """
    import xarray
    from flox.xarray import rechunk_for_blockwise, xarray_reduce

    if how not in get_args(How):
        raise UsageError(f"how={how!r}: must be one of {', '.join(get_args(How))}")
    if "read" not in data.coords:
        raise UsageError("these rows were not translated from reads, nor tiled: each is a record")
    number = data.read.values
    if (np.diff(number) < 0).any():
        raise UsageError("rows are not in the order of their reads")
    reads, counts = np.unique(number, return_counts=True)
    known: dict[str, Any] = {"read": reads, "rows": ("read", counts)}
    if "read_id" in data.coords:  # a selection of variables has lost it
        names = data.read_id.isel(input_record=reads)
        known["read_id"] = names.rename(input_record="read").variable
    if not len(reads):
        nothing = np.empty((0, data.sizes["feature"]), np.float32)
        return xarray.Dataset({"embedding": (("read", "feature"), nothing)}, known)
    labels = xarray.DataArray(number, dims="sequence", name="read")
    # With every read within one chunk a chunk of rows is a chunk of reads, and nothing is
    # exchanged. Sums of float16 would be rough.
    rows = data.embedding.drop_vars(list(data.embedding.coords)).astype(np.float32)
    rows = rechunk_for_blockwise(rows, "sequence", labels)
    found = xarray_reduce(rows, labels, func=f"nan{how}", method="blockwise", engine="flox")
    found = found.transpose("read", "feature").assign_coords(known)
    return found.to_dataset(name="embedding")
