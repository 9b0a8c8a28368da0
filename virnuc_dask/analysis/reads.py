"""Aggregation of the rows of one read, or of the tiles of one protein."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from virnuc_dask.errors import UsageError

How = Literal["mean", "max", "min"]


def by_read(data: Any, how: How = "mean") -> Any:
    """Combine the frames, windows and tiles of each read into one row.

    A read is a record of the input; for tiled proteins it is a protein.

    Parameters
    ----------
    data : xarray.Dataset
        Translated reads or tiles from `open_store`, or a selection of their rows in order.
    how : {'mean', 'max', 'min'}
        How to combine the values of a feature over the read's embedded rows.

    Returns
    -------
    xarray.Dataset
        ``embedding`` (read, feature), float32, lazy; NaN if no row of a read is embedded.
        Coordinates: ``read``, the number of the input record; ``read_id``, its name; ``rows``, the
        number of its rows here. Reads without a row are left out. The call itself only loads
        ``read``, 8 bytes per row.

    Raises
    ------
    UsageError
        The rows are whole records, or not in the order of their reads, or `how` is not valid.
    """
    import xarray
    from flox.xarray import rechunk_for_blockwise, xarray_reduce

    if how not in get_args(How):
        raise UsageError(f"how={how!r}: must be one of {', '.join(get_args(How))}")
    if "read" not in data.coords:
        raise UsageError("rows were not translated from reads or tiled; each row is a whole record")
    number = data.read.values
    if (np.diff(number) < 0).any():
        raise UsageError("rows are not in the order of their reads")
    reads, counts = np.unique(number, return_counts=True)
    known: dict[str, Any] = {"read": reads, "rows": ("read", counts)}
    if "read_id" in data.coords:  # a selection of variables may have dropped it
        names = data.read_id.isel(input_record=reads)
        known["read_id"] = names.rename(input_record="read").variable
    if not len(reads):
        nothing = np.empty((0, data.sizes["feature"]), np.float32)
        return xarray.Dataset({"embedding": (("read", "feature"), nothing)}, known)
    labels = xarray.DataArray(number, dims="sequence", name="read")
    # If each read is within one chunk, chunks of rows map to chunks of reads without exchange of
    # data. Sums in float16 would not be precise.
    rows = data.embedding.drop_vars(list(data.embedding.coords)).astype(np.float32)
    rows = rechunk_for_blockwise(rows, "sequence", labels)
    combined = xarray_reduce(rows, labels, func=f"nan{how}", method="blockwise", engine="flox")
    combined = combined.transpose("read", "feature").assign_coords(known)
    return combined.to_dataset(name="embedding")
