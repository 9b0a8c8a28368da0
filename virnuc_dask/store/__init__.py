"""All that knows Zarr: how a store is made, read, written, checked, and what its results are."""
