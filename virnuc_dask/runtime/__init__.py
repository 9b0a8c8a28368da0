"""A run: the chunks of a store through the workers of a Dask cluster."""
