"""A reloaded LLaVA is complete: every tensor came from a file, none is left on the meta device."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import nn

from ...checkpoint.hub import resolve_folder
from ...towers.packing_tower import HEVCViTPackingVisionTower
from ...utils.files import user_path
from .checkpoint_files import ADAPTER, LORA_EXTRAS, PROJECTOR, names_in_files, refuse, tensors_of, tower_tensors
from .methods import Call, Step, add_step
from .patcher import Patches
from .registry import loader
from .restore_frozen import adapter_has_tower, restore_frozen
from .trainable_parts import foreign_layers, is_packing_tower, is_readable

# transformers 5 stores the experts of a layer in one tensor, whatever the file calls them.
RENAMED_BY_TRANSFORMERS = (".experts.",)


def check_loaded(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Raises ``ValueError`` where a loaded LLaVA, or its tower, would not have the weights of its checkpoint."""
    check_tower_weights(model.get_vision_tower(), model.config, model_path, model_base)
    check_complete(model, model_path, model_base)


def check_complete(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Raises ``ValueError`` with the names of tensors that no file has (they would be random), that are on meta, or
    that a file has and the model does not.

    The vision tower is left to its own check. What the caller had offloaded to disk or CPU is not checked.
    """
    placed = getattr(model, "hf_device_map", None) or {}
    offloaded = any(place in ("cpu", "disk") for place in placed.values()) and len(set(placed.values())) > 1
    found = names_in_files(model_path, model_base)
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    known = {id(parameter) for name, parameter in named.items() if name in found}  # a tied tensor is in the file once
    problems = {"missing from the files": [], "on the meta device": [], "in the files, but not in the model": []}
    for name, parameter in named.items():
        if "vision_tower." in name or is_renamed(name):
            continue
        if parameter.is_meta and not offloaded:
            problems["on the meta device"].append(name)
        if name not in found and id(parameter) not in known:
            problems["missing from the files"].append(name)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    foreign = tuple(f"{name}." for name in foreign_layers(model))
    for name in sorted(found - named.keys() - buffers.keys()):
        expected = "vision_tower." in name or is_renamed(name) or name.startswith(foreign)
        if not expected and not any(re.search(pattern, name) for pattern in ignored):
            problems["in the files, but not in the model"].append(name)
    where = model_path if model_base is None else f"{model_path} and {model_base}"
    refuse(
        problems,
        f"the model is incomplete after loading {where} as {type(model).__name__} (`architectures` in config.json "
        f"names the class; a LoRA or a projector needs model_base, the folder that it was trained on)",
    )


def is_renamed(name: str) -> bool:
    return any(word in name for word in RENAMED_BY_TRANSFORMERS)


@torch.no_grad()
def projector_in_full(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Copy the values of ``mm_projector.bin`` into the model unrounded: LLaVA rounds them to float16 on the way."""
    file = resolve_folder(model_path, more=(PROJECTOR, LORA_EXTRAS)) / PROJECTOR
    if model_base is None or not file.is_file() or (file.parent / LORA_EXTRAS).is_file():
        return
    named = dict(model.named_parameters())
    for name, value in tensors_of(file).items():
        if name in named and is_readable(named[name]):
            named[name].copy_(value)


def check_when_loaded(builder: ModuleType, patches: Patches) -> None:
    """Have ``load_pretrained_model`` finish and check every model with a packing tower before it returns it."""
    method, called = "builder.load_pretrained_model", loader(builder).__name__
    add_step(builder, method, "strict_adapter", strict_adapter, patches, called)
    add_step(builder, method, "check_loaded", after_load(check_loaded), patches, called)
    add_step(builder, method, "restore_frozen", after_load(restore_frozen), patches, called)
    add_step(builder, method, "projector_in_full", after_load(projector_in_full), patches, called)


def after_load(act: Callable[[nn.Module, str, str | None], object]) -> Step:
    """A step of ``load_pretrained_model`` that calls ``act(model, model_path, model_base)`` on what was loaded, if that
    has a packing tower. An error of ``act`` is one of the loading."""

    def step(call: Call) -> Iterator[None]:
        yield
        model = call.result[1]
        if is_packing_tower(getattr(model, "get_vision_tower", lambda: None)()):
            act(model, call.arguments["model_path"], call.arguments.get("model_base"))

    return step


def strict_adapter(call: Call) -> Iterator[None]:
    """Have ``load_pretrained_model`` refuse a LoRA that does not fit: peft silently skips what has no place."""
    model_path, base = call.arguments["model_path"], call.arguments.get("model_base")
    folder = user_path(model_path)
    if not (folder / ADAPTER).is_file():
        yield
        return
    from peft import PeftModel

    kept = {name: vars(PeftModel)[name] for name in ("load_adapter", "from_pretrained")}
    load, start = PeftModel.load_adapter, PeftModel.from_pretrained

    @functools.wraps(load)
    def load_adapter(self, *words, **options):
        result = load(self, *words, **options)
        missing = [name for name in result.missing_keys if "lora_" in name and "vision_tower." not in name]
        refuse(
            {"missing from the files": missing, "in the files, but not in the model": list(result.unexpected_keys)},
            f"the LoRA of {model_path} does not fit {type(self.get_base_model()).__name__}: model_base must be "
            f"the model that it was trained on",
        )
        return result

    def from_pretrained(model, *words, **options):
        if adapter_has_tower(folder):  # it is merged into the weights that the tower has now
            restore_frozen(model, model_path, base, even_adapted=True)
        return start(model, *words, **options)

    PeftModel.load_adapter, PeftModel.from_pretrained = load_adapter, staticmethod(from_pretrained)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(PeftModel, name, value)


def check_tower_weights(
    tower: HEVCViTPackingVisionTower, config: object, model_path: str, model_base: str | None = None
) -> None:
    """Compare a tower in memory with the LLaVA checkpoint it was loaded from.

    Raises ``ValueError`` with the names of tensors that are missing there, have no place in the tower, or differ (by
    anything but the cast to the tower's dtype); nothing to compare where the checkpoint says that the weights are in
    the tower's own folder.
    """
    saved = getattr(config, "mm_packing_config", None) or {}
    state = tower.state_dict()
    sentence = "the vision tower does not have the weights of"
    if saved.get("weights") != "checkpoint":
        nan = [name for name, tensor in state.items() if is_readable(tensor) and tensor.isnan().any()]
        refuse({"without a value": nan}, f"{sentence} its own folder")
        return
    found = tower_tensors(model_path, model_base)
    # What a quantized layer keeps beside its weight, or in place of it, comes from that weight in the file.
    made = tuple(f"{name}." for name in foreign_layers(tower) if f"{name}.weight" in found)
    problems = {
        "not in the checkpoint": sorted(name for name in state.keys() - found.keys() if not name.startswith(made)),
        "in the checkpoint, but not in the tower": sorted(
            n for n in found.keys() - state.keys() if not n.startswith(made)
        ),
        "different from the checkpoint": [],
    }
    for name in state.keys() & found.keys():
        here = state[name]
        # Offloaded or quantized by the caller's own wish: there is nothing here that could be compared.
        if is_readable(here) and not torch.equal(here.cpu(), found[name].to(here.dtype)):
            problems["different from the checkpoint"].append(name)
    refuse(problems, f"{sentence} {model_path}")
