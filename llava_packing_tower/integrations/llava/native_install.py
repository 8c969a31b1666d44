"""Native resolution and video in a host: merging projectors, its models, its data.

Everything is in place in every host, and does nothing for a model whose config does not say
``image_aspect_ratio: native``.
"""

from __future__ import annotations

from types import ModuleType

from .import_hooks import ImportHooks
from .patcher import Patches
from .tower_builder import hook_function, mark_wrapper


def install(package: str, hooks: ImportHooks, patches: Patches) -> None:
    """Prepare the LLaVA in ``package``."""
    hook_function(
        package, "model.multimodal_projector.builder", "build_vision_projector", _with_merging, hooks, patches
    )

    # Imported when the host is: these modules need torch, and `import builder_patch` must stay cheap.
    def on_arch(arch: ModuleType) -> None:
        from .native_resolution import into_model

        into_model(arch, patches)

    def on_models(models: ModuleType) -> None:
        from .native_resolution import into_generate

        into_generate(models, patches)

    def on_train(train: ModuleType) -> None:
        from .native_dataset import into_training

        into_training(train, patches)

    hooks.after(f"{package}.model.llava_arch", on_arch)
    hooks.after(f"{package}.model", on_models)
    hooks.after(f"{package}.train.train", on_train)


def _with_merging(original):
    """LLaVA's ``build_vision_projector(config, ...)`` with our two projectors in front."""
    import functools

    from ...multimodal.projectors import make_projector

    @functools.wraps(original)
    def build_vision_projector(config: object, *args: object, **kwargs: object) -> object:
        kind = getattr(config, "mm_projector_type", None)
        ours = make_projector(kind, getattr(config, "mm_hidden_size", 0), config.hidden_size)
        return original(config, *args, **kwargs) if ours is None else ours

    return mark_wrapper(build_vision_projector, original)
