#!/usr/bin/env bash
# Train on several machines: start this on each of them, with its own NODE_RANK, from 0 on.
#
#     NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MODEL=llama-3.1-8b DATA=/shared/my.jsonl \
#         OUTPUT=/shared/runs/mine bash torchrun_nodes.sh
#
# MASTER_ADDR is the address of node 0, whose MASTER_PORT the others must reach. DATA and OUTPUT are
# on storage that all nodes share. Further options of `qlora-kit train` may follow.
set -euo pipefail

exec torchrun --nnodes "${NODES:?how many machines}" --node-rank "${NODE_RANK:?from 0 on}" \
    --master-addr "${MASTER_ADDR:?the address of node 0}" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "${GPUS:-gpu}" -m qlora_kit train \
    --model "${MODEL:?name a model}" --data "${DATA:?name the data}" \
    --output "${OUTPUT:?name the folder of the run}" --resume "$@"
