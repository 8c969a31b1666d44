"""From a YAML file to the processes that train: reading, checking, and the command line of the launcher.

Everything here happens before torch or the host is imported, so that a typo costs a tenth of a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..data.native_config import KEYS, NATIVE, PREFIX, check_settings
from ..integrations.llava.host import Argument, FoundHost
from ..integrations.llava.registry import find_host
from ..towers.names import FUSED, PACKING, STANDARD, random_clip, tower_kind, tower_names
from ..utils import environment as variables
from ..utils.errors import UsageError
from ..utils.files import read_json, user_path
from ..utils.hub import check_is_here
from ..utils.net import free_port
from ..utils.run_lock import LOCK, LOCK_ENV
from ..utils.supervise import supervise
from ..utils.versions import Run, impossible, install_command
from .arguments import ALIASES, expand_paths, known_arguments, resolve, to_argv
from .config import read_overrides, read_yaml
from .deepspeed_config import check_deepspeed
from .folder_checks import check_encoders, check_folders, check_reference
from .hostfile import check_hostfile, pack
from .multinode import Nodes
from .preflight import check_precision, check_samples, check_values
from .resume import finished, last_complete, misfit, other_data, other_order, read_saved
from .trainer_values import check_micro_batches, check_pairs, check_trainer_values

TRAINER_KEY = "trainer"
TORCHRUN = "llava_packing_tower.train.torchrun"
ENTRY = "llava_packing_tower.train.entrypoint"
TOWER_WORDS = {
    FUSED: "packing towers, joined by channel",
    PACKING: "packing tower",
    STANDARD: "standard LlavaViT",
    None: "LLaVA's own",
}


@dataclass
class Plan:
    """What will run. ``values``: the host's arguments by name; ``processes`` on each machine (None: every GPU)."""

    host: FoundHost
    values: dict[str, object]
    zero_stage: int | None
    device: str
    processes: int | None
    hostfile: str | None = None
    nodes: Nodes = field(default_factory=Nodes)
    samples: int = 0
    warnings: list[str] = field(default_factory=list)
    media: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The plan as the lines that are printed before it runs."""
        count = self.processes or "all"
        if self.device == "gpu":
            where = "1 GPU" if count == 1 else f"{count} GPUs"
        else:
            where = "1 process on the CPU" if count == 1 else f"{count} processes on the CPU"
        if self.nodes.count > 1:
            where = f"{self.nodes.count} machines x {where}"
        if self.processes:
            where += f", world size {self.world_size}"
        engine = "no DeepSpeed" if self.zero_stage is None else f"DeepSpeed ZeRO-{self.zero_stage}"
        engine = "FSDP" if self.values.get("fsdp") else engine
        rows = {
            "host": str(self.host),
            "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "deepspeed")),
            "decoder": self.values["model_name_or_path"],
            "tower": f"{self.values['vision_tower']} ({TOWER_WORDS[tower_kind(self.values['vision_tower'])]})",
            "data": f"{self.values['data_path']} ({self.samples} samples)",
            "trained": self.values.get("mm_tunable_parts") or "by the host's own arguments",
            "engine": f"{engine}, {where}" + (f" on the machines of {self.hostfile}" if self.hostfile else ""),
            "output": self.values["output_dir"],
            "start": self.start(),
            **({"files": "\n".join(self.media)} if self.media else {}),
        }
        lines = [*rows.items(), *(("warning", warning) for warning in self.warnings)]
        return "\n".join(f"{key:>9}: {value}" for key, value in lines)

    def content(self) -> dict[str, object]:
        """The plan as JSON."""
        kept = ("zero_stage", "device", "processes", "hostfile", "samples", "environment", "command", "values")
        found = {"files": [line.strip() for line in self.media], "warning": "\n".join(self.warnings) or None}
        return {"host": str(self.host), "start": self.start(), **{name: getattr(self, name) for name in kept}, **found}

    @property
    def world_size(self) -> int | None:
        """Processes on all machines; None where only DeepSpeed's launcher will know."""
        return self.processes and self.processes * self.nodes.count

    @property
    def finished(self) -> int | None:
        """The steps that were done, where an earlier run in the same folder did all of them."""
        return finished(self.values["output_dir"], self.values)

    def start(self) -> str:
        """Where the run begins, in words."""
        if (steps := self.finished) is not None:
            return f"already finished after {steps} steps: nothing to do"
        checkpoint = last_complete(self.values["output_dir"])
        if checkpoint is None:
            return "from the beginning"
        saved, asked = read_saved(checkpoint), int(str(self.values.get("max_steps") or -1))
        differs = 0 < asked != saved.max_steps
        changed = f" (its learning rate schedule was made for {saved.max_steps} steps)" if differs else ""
        return f"resumes from {checkpoint.name}{changed}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


# ---------------------------------------------------------------- checking


def check_files(values: dict[str, object], beside: Path, found: FoundHost) -> int | None:
    """Check what can be checked on disk; returns the ZeRO stage that is asked for (None: no DeepSpeed)."""
    for name in ("data_path", "image_folder", "video_folder"):
        path = values.get(name)
        if isinstance(path, str) and path and "{" not in path and not user_path(path).exists():
            raise UsageError(f"{name}: {path} does not exist")
    tower, decoder = str(values["vision_tower"]), str(values["model_name_or_path"])
    towers = [("vision_tower", path) for path in tower_names(tower)]
    for name, path in (*towers, ("model_name_or_path", decoder)):
        if not path.strip():
            raise UsageError(f"{name}: {values[name]!r} names none")
        # A hub id is owner/name; where there is a folder of the owner's name, it is meant.
        is_path = (
            path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
        )
        if is_path and not user_path(path).is_dir():
            there = user_path(path).exists()
            raise UsageError(f"{name}: {path} is not a folder" if there else f"{name}: folder {path} does not exist")
    check_folders(values, found)
    try:
        for _, path in towers:
            check_is_here(path)
        reason = random_clip(tower)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if reason is not None:
        raise UsageError(f"vision_tower: {reason}")
    if values.get("lora_enable") and find_spec("peft") is None:
        raise UsageError(f"lora_enable needs peft: {install_command('peft')}")
    return check_deepspeed(values, beside)


def check_fsdp(values: Mapping[str, object]) -> None:
    """Raises :class:`UsageError` for what the hosts cannot save, or resume from, under FSDP."""
    if not values.get("fsdp"):
        return
    if values.get("deepspeed"):
        raise UsageError("fsdp and deepspeed exclude each other: remove one of them")
    if values.get("lora_enable"):
        raise UsageError("fsdp: the hosts would save one rank's shard of a LoRA; use `deepspeed:` instead")
    parts = {part.strip() for part in str(values.get("mm_tunable_parts") or "mm_language_model").split(",")}
    if values.get("tune_mm_mlp_adapter") or parts <= {"mm_mlp_adapter", "mm_vision_resampler"}:
        raise UsageError("fsdp: the hosts would save one rank's shard of the projector; use `deepspeed:` instead")
    if start := last_complete(values["output_dir"]):
        raise UsageError(
            f"fsdp: a run resumed from {start} would differ from an uninterrupted one; use another output_dir, or "
            f"DeepSpeed"
        )


def check_resolution(values: Mapping[str, object]) -> None:
    """Raises :class:`UsageError` for settings of native resolution that cannot be carried out or would be ignored."""
    given = [PREFIX + key for key in KEYS if values.get(PREFIX + key) is not None]
    if values.get("image_aspect_ratio") != NATIVE:
        if given:
            raise UsageError(f"{given[0]} has no effect without image_aspect_ratio: {NATIVE}")
        return
    try:
        check_settings(values)
    except ValueError as error:
        raise UsageError(str(error)) from error


# ---------------------------------------------------------------- launching


def make_plan(
    config: str | os.PathLike,
    overrides: Sequence[str] = (),
    num_gpus: int | None = None,
    num_processes: int | None = None,
    hostfile: str | None = None,
    master_port: int | None = None,
    nodes: Nodes | None = None,
    check_images: bool = False,
) -> Plan:
    """Read and check a configuration and work out how it is launched.

    Args:
        config: YAML file; its keys are argument names of the host.
        overrides: words ``--key value`` that take precedence.
        num_gpus: GPUs of each machine (default: all there are).
        num_processes: this many processes on the CPU of this machine, GPU or not.
        hostfile: DeepSpeed hostfile for several machines.
        master_port: port of the rendezvous (default: a free one).
        nodes: several machines that torchrun brings together, in place of a hostfile.
        check_images: read every image and video of the data to its end.

    Raises:
        UsageError: for anything wrong in the configuration.
    """
    try:
        found = find_host()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not found.host.trainers:
        raise UsageError(
            f"{found} is not trained by this command. Its own training script runs with the packing tower under "
            f"`llava-packing run -- python SCRIPT`"
        )
    given = read_yaml(config)
    for key, value in read_overrides(overrides).items():
        given.pop(next((k for k in given if ALIASES.get(k, k) == ALIASES.get(key, key)), key), None)
        given[key] = value
    trainer = str(given.pop(TRAINER_KEY, None) or "sft")
    try:
        found = replace(found, host=found.host.with_trainer(trainer))
    except ValueError as error:
        raise UsageError(f"{TRAINER_KEY}: {error}") from error
    known = known_arguments(found)
    values = expand_paths(resolve(given, known, found))
    check_values(values, found)
    check_trainer_values(values)
    check_resolution(values)
    check_fsdp(values)
    stage = check_files(values, Path(config).resolve().parent, found)
    for name, count in (("num_gpus", num_gpus), ("num_processes", num_processes)):
        if count is not None and count < 1:
            raise UsageError(f"--{name} must be at least 1, got {count}")
    if trainer == "dpo":
        check_pairs(values)
        check_reference(values, stage)
    if num_processes is not None and (num_gpus is not None or hostfile is not None):
        raise UsageError("--num_processes is for runs on the CPU; remove it with --num_gpus or --hostfile")
    device = "cpu"
    if num_processes is None:
        gpus = _gpus()
        if num_gpus is not None and num_gpus > gpus and hostfile is None:
            raise UsageError(f"--num_gpus {num_gpus}, but this machine has {gpus}")
        if num_gpus is not None or hostfile is not None or gpus:
            device, num_processes = "gpu", num_gpus or (gpus or None if hostfile is None else None)
    check_precision(values, device)
    nodes = nodes or Nodes(port=master_port)
    if hostfile is not None and nodes.count > 1:
        raise UsageError("--hostfile and --nnodes exclude each other")
    if hostfile is not None:
        check_hostfile(hostfile)
    plan = Plan(found, values, stage, device, num_processes or (1 if device == "cpu" else None), hostfile, nodes)
    check_versions(plan, known)
    check_resume(plan)
    checked = check_samples(values, found, known.get("model_max_length"), check_images)
    plan.samples, cut, plan.media = checked
    plan.warnings += [cut] if cut else []
    check_micro_batches(values, plan.samples, plan.world_size or 1)
    check_encoders(values)
    plan.environment = {**_environment(plan), variables.TRAINER: trainer}
    plan.command = _command(plan)
    return plan


def check_versions(plan: Plan, known: Mapping[str, Argument]) -> None:
    """Raises :class:`UsageError`, with the commands that fix it, where the installed versions cannot run the plan."""
    config = plan.values.get("deepspeed")
    if isinstance(config, str):
        config = read_json(Path(config))
    attention = plan.values.get("attn_implementation")
    if attention is None and "flash_attention_2" in known["attn_implementation"].default:
        attention = "flash_attention_2"
    file = user_path(str(plan.values["model_name_or_path"])) / "config.json"
    hidden_size = read_json(file).get("hidden_size") if file.is_file() else None
    if hidden_size is not None and (type(hidden_size) is not int or hidden_size < 1):
        raise UsageError(f"model_name_or_path: {file} is damaged: hidden_size is {hidden_size!r:.80}")
    problems = impossible(
        Run(
            zero_stage=plan.zero_stage,
            on_cpu=plan.device == "cpu",
            processes=plan.processes and plan.processes * plan.nodes.count,
            attention=attention,
            deepspeed=config,
            hidden_size=hidden_size,
        )
    )
    if problems:
        raise UsageError("the installed versions cannot run this:\n" + "\n".join(str(problem) for problem in problems))


def check_resume(plan: Plan) -> None:
    """Raises :class:`UsageError` where the run would resume from a checkpoint that another kind of run saved; warns of
    data that changed since."""
    checkpoint = last_complete(plan.values["output_dir"])
    try:
        if plan.finished is not None or checkpoint is None:
            return
        reason = misfit(checkpoint, plan.world_size, plan.zero_stage) or other_order(checkpoint, plan.values)
        warning = None if reason else other_data(checkpoint, plan.values)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if reason is not None:
        raise UsageError(f"output_dir: this run cannot resume from {checkpoint}: {reason}")
    plan.warnings += [warning] if warning else []


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _environment(plan: Plan) -> dict[str, str]:
    """What the processes need in their environment; what the user has set stays."""
    wanted = {
        "TOKENIZERS_PARALLELISM": "false",
        LOCK_ENV: str(user_path(str(plan.values["output_dir"])).resolve() / LOCK),
    }
    # torchrun would give each process one thread, also to an optimizer that runs on the CPU.
    if plan.processes is not None:
        wanted["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // plan.processes))
    if plan.device == "cpu":
        wanted |= {
            # DeepSpeed counts CPU sockets with the numactl program unless it gets the number of processes.
            "LOCAL_SIZE": str(plan.processes),
        }
    if plan.nodes.on_this_machine and plan.hostfile is None:  # nothing must depend on how its host name resolves
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _alone(plan: Plan) -> bool:
    """One process and no DeepSpeed: then nothing is to be wrapped around the model."""
    return plan.processes == 1 and plan.zero_stage is None and plan.hostfile is None and plan.nodes.count == 1


def _command(plan: Plan) -> list[str]:
    words = [sys.executable, "-m"]
    if plan.hostfile:
        if plan.zero_stage is None:
            raise UsageError("--hostfile needs DeepSpeed: give a `deepspeed:` configuration")
        words += ["deepspeed.launcher.runner", "--master_port", str(plan.nodes.port or free_port())]
        words += ["--num_gpus", str(plan.processes)] if plan.processes else []
        words += ["--hostfile", plan.hostfile, "--module", ENTRY]
        return [*words, pack(to_argv(plan.values), {**os.environ, **plan.environment})]
    if _alone(plan):
        # Not through torchrun: in its environment even one process trains in DDP, which refuses unused parameters.
        words += [ENTRY]
    else:
        # Through torchrun, one process with DeepSpeed included: on a CPU it does not start without its environment. On
        # GPUs too: DeepSpeed's own launcher counts GPUs from 0 and overrides CUDA_VISIBLE_DEVICES.
        words += [TORCHRUN, *plan.nodes.torchrun(plan.processes), "--module", ENTRY]
    return words + to_argv(plan.values)


def run(plan: Plan) -> int:
    """Run the plan to its end and return the exit status of the launcher."""
    environment = {**os.environ, **plan.environment}
    if plan.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif _alone(plan):  # with more GPUs in sight, transformers would use DataParallel
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return supervise(plan.command, environment)
