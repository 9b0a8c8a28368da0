"""Embeds sequences: weights, batches and the network. Uses neither Zarr nor Dask."""
