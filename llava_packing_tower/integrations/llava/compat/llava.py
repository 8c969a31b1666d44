"""Compat patches of LLaVA's own files. Each looks at one module of the host, right after it was imported."""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType

from ..arguments import current_training_arguments
from ..host import PREPARE
from ..methods import Call, add_step
from ..patcher import Patches
from ..registry import host_of, meta_model, trainer_class
from . import compat_patch


def _source(thing: object) -> str:
    try:
        return "" if thing is None else inspect.getsource(thing)
    except OSError:  # no source file: a frozen or generated module, which the hosts are not
        return ""


def _save_assumes_cuda(train: ModuleType) -> bool:
    import torch

    return not torch.cuda.is_available() and "torch.cuda.synchronize()" in _source(train.safe_save_model_for_hf_trainer)


@compat_patch(
    module="{train}",
    reason="torch.cuda.synchronize() is called before the model is saved, which fails on a machine without CUDA",
    defect=_save_assumes_cuda,
)
def cuda_sync(train: ModuleType, patches: Patches) -> None:
    import torch

    def without_cuda(call: Call) -> Iterator[None]:
        # Only while the host saves: elsewhere a missing CUDA stays an error.
        synchronize = torch.cuda.synchronize
        torch.cuda.synchronize = lambda device=None: None
        try:
            yield
        finally:
            torch.cuda.synchronize = synchronize

    add_step(train, "train.safe_save_model_for_hf_trainer", "cuda_sync", without_cuda, patches)


def _strict_forwards(model: ModuleType) -> list[type]:
    """The host's language models whose forward takes no ``cache_position``, or ``cache``, though transformers' own one
    does."""
    host, found = host_of(model), []
    for cls in vars(model).values():
        if not (isinstance(cls, type) and host.owns(cls.__module__) and "forward" in vars(cls)):
            continue
        taken = inspect.signature(cls.forward).parameters
        lacking = {"cache_position", "cache"} - taken.keys()
        if not lacking or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            continue
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")]
        if theirs and lacking & inspect.signature(theirs[0].forward).parameters.keys():
            found.append(cls)
    return found


@compat_patch(
    module="{models}",
    reason="generate() passes cache_position, or in transformers 5.24 cache, which the host's forward() does not "
    "accept",
    issue="haotian-liu/LLaVA#1448",
    defect=lambda model: bool(_strict_forwards(model)),
)
def fwd_kw(model: ModuleType, patches: Patches) -> None:
    for cls in _strict_forwards(model):
        known = frozenset(inspect.signature(cls.forward).parameters)

        def known_only(call: Call, known: frozenset[str] = known) -> None:
            if "cache" in call.arguments and "cache" not in known:  # its newer name
                call.arguments["past_key_values"] = call.arguments.pop("cache")
            for name in call.arguments.keys() - known:  # the language model works cache_position out again by itself
                del call.arguments[name]

        add_step(cls, "LlavaForCausalLM.forward", "fwd_kw", known_only, patches)


_modalities: ContextVar[tuple[object] | None] = ContextVar("modalities of a forward that takes none", default=None)


def _without_modalities(model: ModuleType) -> list[type]:
    """The host's language models whose forward takes no ``modalities``, though what it calls does (LLaVA-NeXT)."""
    host, found = host_of(model), []
    for cls in vars(model).values():
        if isinstance(cls, type) and host.owns(cls.__module__) and "forward" in vars(cls) and hasattr(cls, PREPARE):
            taken, passed = (
                inspect.signature(function).parameters for function in (cls.forward, getattr(cls, PREPARE))
            )
            by_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
            if "image_sizes" in taken and "modalities" in passed and "modalities" not in taken and not by_keyword:
                found.append(cls)
    return found


@compat_patch(
    module="{models}",
    reason="the collator gives modalities, which forward() of Mistral and Gemma does not accept; it hands image_sizes "
    "on in their place",
    defect=lambda model: bool(_without_modalities(model)),
)
def modalities(model: ModuleType, patches: Patches) -> None:
    def keep(call: Call) -> Iterator[None]:
        token = _modalities.set((call.arguments.pop("modalities", None),))
        try:
            yield
        finally:
            _modalities.reset(token)

    def take(call: Call) -> None:
        kept, given = _modalities.get(), call.arguments
        if kept is not None:
            given["image_sizes"] = given.get("modalities")
            given["modalities"] = kept[0] or ["image"] * len(given["input_ids"])

    for cls in _without_modalities(model):
        owner = next(base for base in cls.__mro__ if PREPARE in vars(base))
        add_step(cls, "LlavaForCausalLM.forward", "modalities", keep, patches)
        add_step(owner, f"LlavaMetaForCausalLM.{PREPARE}", "modalities", take, patches)


def _undefined_globals(function: Callable, module: ModuleType) -> set[str]:
    """Global names that a function reads and that neither its module nor Python defines."""
    read = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    return read - vars(module).keys() - vars(builtins).keys()


def _own_loop_is_broken(trainer: ModuleType) -> bool:
    loop = vars(trainer_class(trainer)).get("_inner_training_loop")
    return loop is not None and bool(_undefined_globals(loop, trainer))


@compat_patch(
    module="{trainer}",
    reason="the trainer's own copy of transformers' training loop uses names that it does not import, such as "
    "DebugOption; transformers' loop is used instead, and trainer_mode=zo is not available",
    issue="LLaVA-VL/LLaVA-NeXT#504",
    defect=_own_loop_is_broken,
)
def inner_loop(trainer: ModuleType, patches: Patches) -> None:
    cls = trainer_class(trainer)
    patches.delete(cls, "_inner_training_loop")

    def refuse_zo(call: Call) -> None:
        mode = getattr(call.self.args, "trainer_mode", "regular")
        if mode != "regular":  # it would go through all its steps, and change no weight
            raise ValueError(
                f"trainer_mode {mode} needs the training loop of {cls.__module__}, which uses names that it does not "
                f"import, such as DebugOption: import them there, or remove trainer_mode"
            )

    add_step(cls, "LLaVATrainer.train", "inner_loop", refuse_zo, patches)


@compat_patch(
    module="{train}",
    reason="the vision tower is cast to float16 whenever bf16 is off, even in float32 training, where it now stays "
    "float32",
    defect=lambda train: "torch.bfloat16 if training_args.bf16 else torch.float16" in _source(train.train),
)
def tower_fp32(train: ModuleType, patches: Patches) -> None:
    arch = sys.modules[host_of(train).module(host_of(train).arch)]

    def stay_float32(call: Call) -> Iterator[None]:
        yield
        arguments = current_training_arguments()
        if arguments is None or arguments.bf16 or arguments.fp16:
            return
        import torch

        tower = call.self.get_vision_tower()

        def to(*args, **kwargs):
            del tower.to  # for the one call that train() makes next
            if kwargs.get("dtype") is torch.float16:
                kwargs["dtype"] = torch.float32
            return tower.to(*args, **kwargs)

        tower.to = to

    add_step(meta_model(arch), "LlavaMetaModel.initialize_vision_modules", "tower_fp32", stay_float32, patches)


@compat_patch(
    module="{trainer}",
    reason="a separate learning rate for a frozen part gives the optimizer an empty parameter group; DeepSpeed drops "
    "the group, and the learning-rate scheduler still expects it",
    defect=lambda trainer: "optimizer_grouped_parameters" in _source(trainer_class(trainer).create_optimizer),
)
def empty_groups(trainer: ModuleType, patches: Patches) -> None:
    def drop_empty(call: Call) -> Iterator[None]:
        yield
        groups = call.result.param_groups
        # In place: the optimizer has no state yet, and whoever holds it sees the same list.
        groups[:] = [group for group in groups if group["params"]]

    add_step(trainer_class(trainer), "LLaVATrainer.create_optimizer", "empty_groups", drop_empty, patches)


def _asks_for_antialias(mm_utils: ModuleType) -> bool:
    from PIL import Image

    return not hasattr(Image, "ANTIALIAS") and "Image.ANTIALIAS" in _source(
        vars(mm_utils).get("resize_and_center_crop")
    )


@compat_patch(
    module="{mm_utils}",
    reason="the host resizes with Image.ANTIALIAS (crop_split), which Pillow 10 calls LANCZOS",
    defect=_asks_for_antialias,
)
def pillow_antialias(mm_utils: ModuleType, patches: Patches) -> None:
    class Renamed:
        ANTIALIAS = mm_utils.Image.Resampling.LANCZOS

        def __getattr__(self, name: str, image: ModuleType = mm_utils.Image) -> object:
            return getattr(image, name)

    patches.set(mm_utils, "Image", Renamed())
