#!/usr/bin/env bash
# One search as a Slurm job, Ray on all of its machines:
#
#   sbatch clusters/slurm.sh experiments/sst2.yaml search.trials=32
#
# Run from the checkout, on a file system that all machines share.  A job that ran out of time goes on
# when it is submitted again: the same command on the same storage resumes.
#SBATCH --job-name=sft-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --output=sft-ray-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
source "${SFT_RAY_VENV:-.venv}/bin/activate"

export SFT_RAY_STORAGE=${SFT_RAY_STORAGE:-$PWD/runs}
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null # in ~/.ray, which all machines see

# Jobs of several users may meet on a machine: each has a port of its own.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))
exec srun ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --dashboard-host 127.0.0.1 -- \
    python tune.py "$@"
