#!/usr/bin/env bash
# Train on all GPUs of this machine; GPUS=2 takes two of them.
#
#     MODEL=llama-3.1-8b DATA=my.jsonl OUTPUT=runs/mine bash torchrun_one_node.sh
#
# Further options of `qlora-kit train` may follow. `--resume` begins where there is no checkpoint
# yet, so the same command starts a run and goes on with it.
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m qlora_kit train \
    --model "${MODEL:?name a model}" --data "${DATA:?name the data}" \
    --output "${OUTPUT:?name the folder of the run}" --resume "$@"
