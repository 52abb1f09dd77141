#!/usr/bin/env bash
# Train on the nodes of a Slurm job, one torchrun a node.
#
#     MODEL=llama-3.1-8b DATA=/shared/my.jsonl OUTPUT=/shared/runs/mine sbatch slurm.sh
#
# Two minutes before its time is over the job saves a checkpoint and queues itself again. Slurm queues
# it again where a node fails or is taken away. Either way it goes on from the last checkpoint, on
# whichever nodes it gets. Further options of `qlora-kit train` may follow.
#
#SBATCH --job-name=qlora-kit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=qlora-kit-%j.log
set -euo pipefail

: "${MODEL:?name a model}" "${DATA:?name the data}" "${OUTPUT:?name the folder of the run}"
export MODEL DATA OUTPUT
# srun does not take over the CPUs of a task by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${hosts%%$'\n'*}"
# Two jobs on one node need two ports.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Single quotes: each node puts its own rank in.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
    --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --nproc-per-node "${GPUS:-gpu}" -m qlora_kit train \
    --model "$MODEL" --data "$DATA" --output "$OUTPUT" --resume "$@"' torchrun "$@" &
step=$!

# USR1 is sent by --signal only. A cancelled job gets TERM, and is not queued again.
queue_again() {
    kill -TERM "$step"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap queue_again USR1
wait "$step"
