"""Analysis of stores: open lazily, search neighbours, map, cluster, classify, export, report.

No module here needs torch. `virnuc_dask` itself resolves the public names.
"""
