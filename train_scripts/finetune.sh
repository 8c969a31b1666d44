#!/usr/bin/env bash
# Fine-tune LLaVA through a packed vision tower. Everything after the YAML file is passed on.
#   train_scripts/finetune.sh configs/llava_next_finetune.yaml --num_gpus 8 --output_dir out/finetune
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,3s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
exec llava-packing train "$@"
