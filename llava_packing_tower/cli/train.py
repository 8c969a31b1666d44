"""Train LLaVA with a packing tower: the host's own training, started with DeepSpeed (or torchrun on a CPU).

The keys of the YAML file are the host's own argument names; --key value on the command line takes precedence.

  llava-packing train configs/llava_next_finetune.yaml --output_dir out/finetune --num_gpus 8
  llava-packing train configs/llava_next_finetune.yaml --learning_rate 2e-5 --dry_run
  llava-packing train configs/llava_next_finetune.yaml --max_steps 40 --profile

Started again with the same output_dir, it resumes from the last complete checkpoint. On several machines, give
--hostfile on one of them (DeepSpeed starts the others over ssh), or start the same command on each with --nnodes and
either --rdzv_endpoint or --node_rank, --master_addr and --master_port.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..train import multinode, resume
from ..train.launcher import make_plan
from ..train.launcher import run as run_plan
from ..utils.errors import UsageError
from ..utils.files import user_path, write_for_program
from ..utils.run_lock import RunLock

TAKES_REST = True
PROFILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file with the host's argument names")
    parser.add_argument("--num_gpus", type=int, metavar="N", help="GPUs of each machine (default: all)")
    parser.add_argument("--num_processes", type=int, metavar="N", help="run on the CPU, in N processes")
    parser.add_argument("--hostfile", metavar="F", help="DeepSpeed hostfile, to train on several machines")
    parser.add_argument("--master_port", type=int, metavar="P", help="port of the rendezvous (default: a free one)")
    multinode.add_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="end the run at a sample that cannot be read, by name")
    parser.add_argument(
        "--check_images", action="store_true", help="read every image and video before training, and list the bad ones"
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=PROFILED,
        metavar="STEPS",
        help=f"profile so many steps (default {PROFILED}): a trace in output_dir/profile, and what bounds the run",
    )
    parser.add_argument("--dry_run", action="store_true", help="check the configuration, print the plan and stop")
    parser.add_argument("--json", type=Path, help="with --dry_run: also write the plan to this file")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status of the training processes."""
    if args.profile is not None and args.profile < 1:
        raise UsageError(f"--profile must be at least 1, got {args.profile}")
    machines = multinode.Nodes(
        args.nnodes, args.node_rank, args.master_addr, args.master_port, args.rdzv_endpoint, args.rdzv_id
    )
    words = [*args.rest, *(["--mm_packing_strict", "true"] if args.strict else [])]
    words += ["--mm_packing_profile", str(args.profile)] if args.profile is not None else []
    plan = make_plan(
        *(args.config, words, args.num_gpus, args.num_processes, args.hostfile, args.master_port, machines),
        check_images=args.check_images,
    )
    if args.json is not None and not args.dry_run:
        raise UsageError("--json has the plan of --dry_run: add it")
    print(plan.describe(), flush=True)
    if args.dry_run:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in plan.environment.items())
        print(f"  command: {settings} {shlex.join(plan.command)}")
        write_for_program(args.json, plan.content())
        return 0
    if plan.finished is not None:
        return 0
    with RunLock(plan.values["output_dir"], machines.meeting_place):
        (user_path(str(plan.values["output_dir"])) / resume.FINISHED).unlink(missing_ok=True)
        for line in resume.set_aside(plan.values["output_dir"]):
            print(line, flush=True)
        return run_plan(plan)
