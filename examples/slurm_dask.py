"""Embed on a Dask cluster of SLURM jobs that come and go, one GPU each.

    pip install dask-jobqueue cryptography
    python examples/slurm_dask.py reads.faa /scratch/out.zarr

This process is the coordinator: run it where it may live as long as the work takes. Workers speak
TLS, for on a cluster they have to listen beyond this machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dask
from dask_jobqueue import SLURMCluster
from distributed import Client

import virnuc_dask


def private_folder() -> str:
    """A folder that all nodes see, and into which only you can write.

    The scheduler and workers import modules from there, so it is not the /tmp that users share.
    """
    folder = Path("dask-scratch").absolute()
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # an error if it is somebody else's
    return str(folder)


def make_cluster() -> SLURMCluster:
    """Jobs of one worker with three threads: one chunk is computed, others are read and written."""
    folder = private_folder()
    with dask.config.set({"temporary-directory": folder}):  # the scheduler's
        return SLURMCluster(
            processes=1,
            cores=3,
            job_cpu=4,
            memory="32GB",
            walltime="04:00:00",
            # A lost job is replaced, so it need not come back too.
            job_extra_directives=["--gres=gpu:1", "--no-requeue"],
            # As `--cluster local` does: Dask's default costs the encoder a quarter of its speed.
            job_script_prologue=[
                "export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=33554432"
            ],
            security=True,
            # Dashboards ask nobody for a password: see them by `ssh -L`.
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            worker_extra_args=["--dashboard-address", "127.0.0.1:0", "--memory-limit", "0"],
            # Where every node finds the certificates, for their owner alone to read.
            shared_temp_directory=".",
            local_directory=folder,
        )


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    inputs, store = sys.argv[1:]
    with make_cluster() as cluster, Client(cluster) as client:
        # Always so many, one in a lost one's place. Dask's own idea of how many are wanted goes by
        # tasks that wait, and a run has none waiting.
        cluster.adapt(minimum_jobs=16, maximum_jobs=16)
        summary = virnuc_dask.run(
            inputs,
            store,
            model="esm2_t33_650M_UR50D",
            client=client,
            config=virnuc_dask.RunConfig(device="cuda"),
            allow_incomplete=True,
        )
    print(summary.counts)
    return summary.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
