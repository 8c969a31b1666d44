#!/usr/bin/env bash
# Stage 1: train the projector alone, between a frozen packed tower and a frozen decoder.
# The YAML may be left out; everything else is passed on to `llava-packing train`.
#   train_scripts/pretrain_projector.sh [CONFIG.yaml] [--num_gpus 8] [--dry_run] [--key value ...]
set -euo pipefail

config="$(dirname "$0")/../configs/llava_next_pretrain.yaml"
if [[ $# -gt 0 && $1 != --* ]]; then
  config="$1"
  shift
fi
exec llava-packing train "$config" "$@"
