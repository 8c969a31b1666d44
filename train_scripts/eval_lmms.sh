#!/usr/bin/env bash
# Evaluate a trained LLaVA checkpoint with lmms-eval; everything after the checkpoint goes to `llava-packing eval`.
#   train_scripts/eval_lmms.sh CHECKPOINT [--tasks image,video] [--num_gpus 8] [--limit 50] [--log_samples ...]
# TASKS=ai2d,chartqa   in place of --tasks (default: image)
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
checkpoint="$1"
shift
case " $* " in
  *" --tasks "* | *" --tasks="*) ;;
  *) set -- --tasks "${TASKS:-image}" "$@" ;;
esac
exec llava-packing eval "$checkpoint" "$@"
