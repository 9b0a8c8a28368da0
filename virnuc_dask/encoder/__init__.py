"""From sequences to embeddings: weights, batches, the network. Knows neither Zarr nor Dask."""
