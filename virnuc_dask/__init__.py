"""Protein language model embeddings for millions of sequences, on workers that may vanish.

- ``run`` embeds sequences into a Zarr store, and ``resume`` completes an unfinished store.
- ``open_store`` opens a store lazily, and ``open_residues`` the residue embeddings of a row.
- ``nearest`` finds the most similar rows. ``annotate`` gives rows the labels of their nearest
  neighbours, and ``leave_one_out`` measures how often such labels are right.
- ``make_map`` projects rows onto a map, and ``make_clusters`` groups them.
- ``train`` fits a classifier to two stores, and ``predict`` scores a store with it.
- ``report`` writes a page about a store.
- ``load_encoder`` returns the encoder alone.
- ``create_store`` and ``tasks`` serve your own Dask graph.

Importing this package loads neither torch nor distributed. Names are imported when first used.
"""

# Nothing is imported here, not even `typing`, because the handling of Ctrl-C must come first.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from virnuc_dask.analysis.approximate import build_index
    from virnuc_dask.analysis.clusters import Clusters, make_clusters, write_clusters
    from virnuc_dask.analysis.dataset import open_residues, open_store
    from virnuc_dask.analysis.export import export
    from virnuc_dask.analysis.labels import annotate, leave_one_out
    from virnuc_dask.analysis.maps import Map, make_map
    from virnuc_dask.analysis.neighbours import nearest
    from virnuc_dask.analysis.plots import draw_map
    from virnuc_dask.analysis.prediction import predict
    from virnuc_dask.analysis.reads import by_read
    from virnuc_dask.analysis.report import report
    from virnuc_dask.analysis.training import train
    from virnuc_dask.encoder.encoder import load_encoder
    from virnuc_dask.runtime.chunk_report import ChunkReport
    from virnuc_dask.runtime.run import resume, run
    from virnuc_dask.runtime.summary import IncompleteRunError, RunSummary
    from virnuc_dask.runtime.tasks import create_store, tasks
    from virnuc_dask.settings import RunConfig, Tiling, Translation
    from virnuc_dask.store.verify import verify

__version__ = "0.1.0"
__all__ = [
    "ChunkReport",
    "Clusters",
    "IncompleteRunError",
    "Map",
    "RunConfig",
    "RunSummary",
    "Tiling",
    "Translation",
    "annotate",
    "build_index",
    "by_read",
    "create_store",
    "draw_map",
    "export",
    "leave_one_out",
    "load_encoder",
    "make_clusters",
    "make_map",
    "nearest",
    "open_residues",
    "open_store",
    "predict",
    "report",
    "resume",
    "run",
    "tasks",
    "train",
    "verify",
    "write_clusters",
]

_HOME = {
    "ChunkReport": "runtime.chunk_report",
    "Clusters": "analysis.clusters",
    "IncompleteRunError": "runtime.summary",
    "Map": "analysis.maps",
    "RunConfig": "settings",
    "RunSummary": "runtime.summary",
    "Tiling": "settings",
    "Translation": "settings",
    "annotate": "analysis.labels",
    "build_index": "analysis.approximate",
    "by_read": "analysis.reads",
    "create_store": "runtime.tasks",
    "draw_map": "analysis.plots",
    "export": "analysis.export",
    "leave_one_out": "analysis.labels",
    "load_encoder": "encoder.encoder",
    "make_clusters": "analysis.clusters",
    "make_map": "analysis.maps",
    "nearest": "analysis.neighbours",
    "open_residues": "analysis.dataset",
    "open_store": "analysis.dataset",
    "predict": "analysis.prediction",
    "report": "analysis.report",
    "resume": "runtime.run",
    "run": "runtime.run",
    "tasks": "runtime.tasks",
    "train": "analysis.training",
    "verify": "store.verify",
    "write_clusters": "analysis.clusters",
}


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
