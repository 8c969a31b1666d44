"""Modules by the names they had before 0.2: each still imports, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __package__
# old name -> new name, both below this package. A line goes when the next major version is released.
RENAMED: dict[str, str] = {
    "activations": "models.activations",
    "alignment": "convert.parity",
    "attention.checking": "attention.self_check",
    "bench": "tools.bench",
    "bench.availability": "tools.bench.availability",
    "bench.breakdown": "tools.bench.breakdown",
    "bench.measure": "tools.bench.timing",
    "bench.original": "tools.bench.original_tower",
    "bench.peers": "tools.bench.baselines",
    "bench.presets": "tools.bench.models",
    "bench.report": "tools.bench.report",
    "bench.scaling": "tools.bench.scaling",
    "bench.session": "tools.bench.session",
    "bench.systems": "tools.bench.systems",
    "bench.targets": "tools.bench.targets",
    "bench.workloads": "tools.bench.workloads",
    "commands": "cli",
    "commands.align": "cli.align",
    "commands.bench": "cli.bench",
    "commands.convert": "cli.convert",
    "commands.demo": "cli.demo",
    "commands.doctor": "cli.doctor",
    "commands.eval": "cli.eval",
    "commands.eval_report": "cli.eval_report",
    "commands.probe": "cli.probe",
    "commands.run": "cli.run",
    "commands.train": "cli.train",
    "commands.verify": "cli.verify",
    "config_check": "checkpoint.config_check",
    "convert.conversion": "convert.plan",
    "convert.families": "convert.verify_against_hf",
    "convert.photos": "convert.test_images",
    "demo": "tools.demo",
    "demo.ask": "tools.demo.ask",
    "demo.files": "utils.files",
    "demo.models": "tools.demo.tiny_models",
    "demo.photos": "data.sample_photos",
    "demo.pipeline": "tools.demo.pipeline",
    "demo.report": "tools.demo.report",
    "demo.scoring": "tools.demo.scoring",
    "demo.training": "tools.demo.train_process",
    "digest": "checkpoint.hashing",
    "doctor": "tools.doctor",
    "doctor.examination": "tools.doctor.run",
    "doctor.probes": "tools.doctor.checks",
    "doctor.versions": "utils.versions",
    "encoder": "models.encoder",
    "evaluation": "eval",
    "evaluation.groups": "eval.task_groups",
    "evaluation.identity": "checkpoint.folder_hash",
    "evaluation.models": "eval.models",
    "evaluation.models.llava_packing": "eval.models.llava_packing",
    "evaluation.needs": "eval.preflight",
    "evaluation.probing": "eval.probe",
    "evaluation.results": "eval.results",
    "evaluation.runner": "eval.runner",
    "evaluation.tasks": "eval.tasks",
    "evaluation.tasks.smoke": "eval.tasks.smoke",
    "evaluation.tasks.smoke.utils": "eval.tasks.smoke.utils",
    "families": "models.registry",
    "families.aimv2": "models.aimv2",
    "families.dinov3": "models.dinov3",
    "families.key_maps": "checkpoint.key_map",
    "families.llava_vit": "models.llava_vit.packed",
    "families.llava_vit_keys": "models.llava_vit.key_map",
    "families.llava_vit_standard": "models.llava_vit.standard",
    "families.llava_vit_standard_config": "models.llava_vit.config",
    "families.siglip2": "models.siglip2",
    "feature_select": "towers.feature_select",
    "fused": "models.runtime.fused",
    "fused.activation_kernels": "kernels.triton.activation",
    "fused.functions": "kernels.fused_block",
    "fused.kernels": "kernels.triton",
    "fused.launching": "kernels.triton.launcher",
    "fused.norm_kernels": "kernels.triton.norm",
    "fused.reference": "kernels.reference",
    "fused.rotation_kernels": "kernels.triton.rotary",
    "graphs": "models.runtime.cuda_graphs",
    "hostfile": "train.hostfile",
    "hosts": "integrations.llava.install",
    "hosts.after_load": "integrations.llava.checkpoint",
    "hosts.answering": "integrations.llava.batched_inference",
    "hosts.arguments": "integrations.llava.arguments",
    "hosts.arguments_table": "integrations.llava.arguments_table",
    "hosts.base": "integrations.llava.host",
    "hosts.builder_hook": "integrations.llava.tower_builder",
    "hosts.frozen": "integrations.llava.restore_frozen",
    "hosts.imports": "utils.import_hooks",
    "hosts.inference": "integrations.llava.inference",
    "hosts.llava_next": "integrations.llava.hosts.llava_next",
    "hosts.llava_v1": "integrations.llava.hosts.llava_v1",
    "hosts.llavaction": "integrations.llava.hosts.llavaction",
    "hosts.mends": "integrations.llava.compat",
    "hosts.mends.attention": "integrations.llava.compat.cudnn_sdpa",
    "hosts.mends.deepspeed": "integrations.llava.compat.deepspeed",
    "hosts.mends.fsdp": "integrations.llava.compat.fsdp",
    "hosts.mends.llava": "integrations.llava.compat.llava",
    "hosts.mends.models": "integrations.llava.compat.models",
    "hosts.mends.names": "integrations.llava.compat.transformers_imports",
    "hosts.mends.resuming": "integrations.llava.compat.torch_load",
    "hosts.mends.trainer": "integrations.llava.compat.trainer",
    "hosts.native": "integrations.llava.tower_builder",
    "hosts.native_data": "integrations.llava.native_dataset",
    "hosts.native_model": "integrations.llava.native_resolution",
    "hosts.participation": "integrations.llava.text_only_batches",
    "hosts.patches": "integrations.llava.patcher",
    "hosts.standing": "integrations.llava.self_contained",
    "hosts.tuning": "integrations.llava.trainable_parts",
    "hosts.whole": "integrations.llava.checkpoint",
    "image_processor": "data.image_processor",
    "launch": "train.launcher",
    "layers": "models.layers",
    "loading": "checkpoint.weights",
    "modeling": "models.base",
    "module_state": "models.runtime.module_state",
    "native": "multimodal",
    "native.images": "data.native_image_processor",
    "native.projectors": "multimodal.projectors",
    "native.report": "multimodal.dataset_report",
    "native.resolution": "data.smart_resize",
    "native.settings": "data.native_config",
    "native.tokens": "multimodal.visual_tokens",
    "native.truncation": "multimodal.truncation",
    "native.video": "data.video",
    "native.visuals": "multimodal.visual_inputs",
    "nodes": "train.multinode",
    "packing": "data.patches",
    "participation": "models.unused_parameters",
    "positions": "data.positions",
    "presets": "models.llava_vit.presets",
    "reading": "train.config",
    "record": "train.history",
    "references": "convert.hf_reference",
    "resume": "train.resume",
    "rotation": "kernels.rotary",
    "standard_tower": "towers.standard_tower",
    "strict": "checkpoint.pretrained",
    "tape": "data.cached_metadata",
    "tower": "towers.packing_tower",
    "train.run_lock": "utils.run_lock",
    "train.supervise": "utils.supervise",
    "train_entry": "train.entrypoint",
    "training": "train.callbacks",
    "variants": "models.llava_vit.create_model",
}
# Names that a module lost when it was split, or that were renamed: old module -> {old name: new place}.
MOVED: dict[str, dict[str, str]] = {
    "bench.systems": {
        "our_system": "tools.bench.systems:packed_system",
    },
    "bench.workloads": {
        "attention_flops": "multimodal.flops:attention_flops",
    },
    "hosts.native_data": {
        "NativeCollator": "integrations.llava.native_dataset:FittingCollator",
    },
    "attention.checking": {
        "why_wrong": "attention.self_check:self_check_error",
    },
    "demo.photos": {
        "QUESTION": "tools.demo.dataset:QUESTION",
        "conversation": "tools.demo.dataset:conversation",
        "write_dataset": "tools.demo.dataset:write_dataset",
    },
    "doctor": {
        "Finding": "utils.findings:Finding",
    },
    "encoder": {
        "compute_dtype": "models.runtime.execution:compute_dtype",
    },
    "families.llava_vit_standard": {
        "RESIDUAL_PATCHES": "models.llava_vit.standard_positions:RESIDUAL_PATCHES",
        "clip_in_context": "models.llava_vit.standard_positions:clip_in_context",
    },
    "fused": {
        "FUSED_ENV": "utils.environment:FUSED",
        "kind_of": "models.runtime.fused:block_spec_of",
    },
    "fused.functions": {
        "Kind": "kernels.fused_block:BlockSpec",
    },
    "graphs": {
        "GRAPHS_ENV": "utils.environment:GRAPHS",
    },
    "hosts": {
        "FoundHost": "integrations.llava.host:FoundHost",
        "HOSTS": "integrations.llava.registry:HOSTS",
        "Host": "integrations.llava.host:Host",
        "NEXT_DIR_ENV": "integrations.llava.registry:NEXT_DIR_ENV",
        "all_hosts": "integrations.llava.registry:all_hosts",
        "find_host": "integrations.llava.registry:find_host",
        "packages": "integrations.llava.registry:packages",
    },
    "hosts.mends": {
        "MENDS": "integrations.llava.compat:COMPAT_PATCHES",
        "MEND_MODULES": "integrations.llava.compat:PATCH_MODULES",
        "Mend": "integrations.llava.compat:CompatPatch",
        "mend": "integrations.llava.compat:compat_patch",
    },
    "hosts.participation": {
        "into_model": "integrations.llava.text_only_batches:run_on_blanks",
    },
    "hosts.tuning": {
        "LORA_EXTRAS": "integrations.llava.checkpoint_files:LORA_EXTRAS",
        "check_tower_weights": "integrations.llava.checkpoint:check_tower_weights",
        "has_weights": "integrations.llava.checkpoint_files:has_weights",
        "refuse": "integrations.llava.checkpoint_files:refuse",
        "tower_tensors": "integrations.llava.checkpoint_files:tower_tensors",
    },
    "hosts.whole": {
        "ADAPTER_PREFIX": "integrations.llava.checkpoint_files:ADAPTER_PREFIX",
        "check_whole": "integrations.llava.checkpoint:check_complete",
    },
    "launch": {
        "RENAMED": "train.arguments:RENAMED",
        "REQUIRED": "train.arguments:REQUIRED",
        "nearest": "train.arguments:nearest",
        "zero_stage": "train.deepspeed_config:zero_stage",
    },
    "loading": {
        "CONFIG_NAME": "utils.files:CONFIG_NAME",
        "atomic_folder": "utils.files:atomic_folder",
        "open_to_others": "utils.files:open_to_others",
        "resolve_folder": "checkpoint.hub:resolve_folder",
        "write_json": "utils.files:write_json",
    },
    "native.report": {
        "IMAGE_WORD": "data.samples:IMAGE_WORD",
        "check_places": "data.samples:check_places",
        "text_of": "data.samples:text_of",
    },
    "native.resolution": {
        "ResolutionRule": "data.smart_resize:SmartResize",
    },
    "packing": {
        "PackedSegments": "data.segments:VarlenMetadata",
        "kept": "data.cached_metadata:cached",
        "make_segments": "data.segments:make_segments",
        "read_grid": "data.segments:read_grid",
        "to_device": "data.segments:to_device",
    },
    "rotation": {
        "ROTATIONS": "kernels.rotary:ROTATE",
        "rotate_halves": "kernels.rotary:rotate_half",
        "rotate_pairs": "kernels.rotary:rotate_interleaved",
        "rotated": "kernels.rotary:apply_rotary",
        "turned_back": "kernels.rotary:rotary_backward",
    },
    "tape": {
        "Tape": "data.cached_metadata:CachedMetadata",
        "taped": "data.cached_metadata:cached",
    },
    "tower": {
        "ATTENTION_ENV": "utils.environment:ATTENTION",
        "NAME_PREFIX": "towers.names:NAME_PREFIX",
        "folder_fingerprint": "checkpoint.hashing:folder_fingerprint",
    },
}
# Old packages: their submodules are in RENAMED under their own names.
PACKAGES = frozenset(old for old in RENAMED if any(other.startswith(f"{old}.") for other in RENAMED))


class _RenamedFinder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in RENAMED:
            return None
        return ModuleSpec(fullname, self, is_package=old in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        new = f"{PACKAGE}.{RENAMED[old]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        if old in PACKAGES or old in MOVED:
            module.__getattr__ = lambda name: _attribute(old, name)
        else:
            sys.modules[module.__name__] = import_module(new)


def _attribute(old: str, name: str) -> object:
    place, _, attribute = MOVED.get(old, {}).get(name, f"{RENAMED[old]}:{name}").partition(":")
    return getattr(import_module(f"{PACKAGE}.{place}"), attribute)


def install() -> None:
    """Make the old names importable. Last in line, so that it is asked for names that are not found alone."""
    sys.meta_path.append(_RenamedFinder())
