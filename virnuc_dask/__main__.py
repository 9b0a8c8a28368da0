"""``python -m virnuc_dask``."""

from virnuc_dask.cli import main

if __name__ == "__main__":
    main()
