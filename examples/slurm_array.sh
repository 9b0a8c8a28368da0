#!/bin/bash
# Independent runs, one GPU each, that fill one store and know nothing of each other:
#
#     sbatch examples/slurm_array.sh reads.faa /scratch/out.zarr --model esm2_t33_650M_UR50D
#
# Preempted or out of time, they are queued again and go on. The run that has read the input first
# makes the store; the others find it there. When all have ended, one more job makes sure:
#
#     sbatch --dependency=afterany:JOB --gres=gpu:1 --cpus-per-task=4 --mem=32G --time=04:00:00 \
#         --wrap 'virnuc-dask resume /scratch/out.zarr --cluster local-cuda || [ $? -eq 3 ]'
#SBATCH --job-name=virnuc_dask
#SBATCH --array=1-16
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
virnuc-dask run "$@" --cluster local-cuda --shard slurm --no-progress &
run=$!
# Running chunks are finished within --grace, 30 seconds. Out of time it is queued again; after
# SIGTERM, as by scancel, it is not, for SLURM itself queues again what it preempts.
again=no
trap 'again=yes; kill -TERM $run' USR1
trap 'kill -TERM $run' TERM
wait $run
code=$?
while kill -0 $run 2>/dev/null; do  # the wait ended at the signal, not at the run's end
    wait $run
    code=$?
done
if [ $again = yes ] && [ $code = 143 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
# 3: complete, but some rows could not be embedded; to SLURM that is no failure.
if [ $code = 3 ]; then
    exit 0
fi
exit $code
