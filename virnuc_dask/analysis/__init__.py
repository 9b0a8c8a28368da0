"""What people do with a store: open it lazily, check it, look for neighbours, export it.

Nothing here needs torch. The names that belong to users are resolved by `virnuc_dask` itself.
"""
