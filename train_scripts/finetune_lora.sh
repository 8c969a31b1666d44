#!/usr/bin/env bash
# Fine-tune LLaVA with LoRA on the decoder (needs peft).
# The YAML may be left out; everything else is passed on to `llava-packing train`.
#   train_scripts/finetune_lora.sh [CONFIG.yaml] [--num_gpus 8] [--dry_run] [--key value ...]
set -euo pipefail

config="$(dirname "$0")/../configs/llava_lora.yaml"
if [[ $# -gt 0 && $1 != --* ]]; then
  config="$1"
  shift
fi
exec llava-packing train "$config" "$@"
