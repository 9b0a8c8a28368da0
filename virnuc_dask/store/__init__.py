"""The Zarr store and its results: create, read, write and check. Only this package uses Zarr."""
