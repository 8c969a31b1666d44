#!/usr/bin/env bash
# Fine-tune LLaVA on several machines. Everything else is passed on to `llava-packing train`.
#   on every machine:  NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 train_scripts/finetune_multinode.sh [CONFIG.yaml] [...]
#   on one machine, over ssh:  HOSTFILE=hosts.txt train_scripts/finetune_multinode.sh [CONFIG.yaml] [...]
# Under Slurm, NNODES and NODE_RANK are taken from it; MASTER_PORT is 29500 if not set.
set -euo pipefail

config="$(dirname "$0")/../configs/llava_next_finetune.yaml"
if [[ $# -gt 0 && $1 != --* ]]; then
  config="$1"
  shift
fi
if [[ -n "${HOSTFILE:-}" ]]; then
  exec llava-packing train "$config" --hostfile "$HOSTFILE" "$@"
fi
nodes="${NNODES:-${SLURM_NNODES:?set NNODES, the number of machines, or HOSTFILE}}"
rank="${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK, the number of this machine from 0}}"
exec llava-packing train "$config" --nnodes "$nodes" --node_rank "$rank" \
  --master_addr "${MASTER_ADDR:?set MASTER_ADDR, machine 0 as the others reach it}" \
  --master_port "${MASTER_PORT:-29500}" "$@"
