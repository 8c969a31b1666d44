"""Train LLaVA through a packed vision tower: the host's own training, started with DeepSpeed (or torchrun on a CPU).

The keys of the YAML file are the host's own argument names; --key value on the command line takes precedence.

  llava-packing train configs/llava_next_finetune.yaml --output_dir out/finetune --num_gpus 8
  llava-packing train configs/llava_next_finetune.yaml --learning_rate 2e-5 --dry_run
"""

from __future__ import annotations

import argparse
import shlex

from ..launch import make_plan
from ..launch import run as run_plan

TAKES_REST = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--num_gpus", type=int, metavar="N", help="GPUs of each machine (default: all)")
    parser.add_argument("--num_processes", type=int, metavar="N", help="run on the CPU, in N processes")
    parser.add_argument("--hostfile", metavar="F", help="DeepSpeed hostfile: train on several machines")
    parser.add_argument("--master_port", type=int, metavar="P", help="port of the rendezvous (default: a free one)")
    parser.add_argument("--dry_run", action="store_true", help="check the configuration, print the plan and stop")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status of the training processes."""
    plan = make_plan(args.config, args.rest, args.num_gpus, args.num_processes, args.hostfile, args.master_port)
    print(plan.describe(), flush=True)
    if args.dry_run:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in plan.environment.items())
        print(f"  command: {settings} {shlex.join(plan.command)}")
        return 0
    return run_plan(plan)
