"""The one place where LLaVA is touched: which hosts there are, and how the packing tower gets into them.

Nothing of a host is edited. :func:`apply` makes changes in memory when the host is imported, :func:`undo` takes them
back. A host is one module here and one line in HOSTS.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from . import compat, native_install, refused, tower_builder
from .import_hooks import ImportHooks
from .patcher import Patches
from .registry import packages, put_next_on_path, take_off_path

_hooks = ImportHooks()
_patches = Patches()
_active = False


def apply() -> None:
    """Make every host, imported already or later, build packing towers; apply the compat patches. Idempotent.

    ``LLAVA_NEXT_DIR``, if set, is put in front of ``sys.path``. Raises ``ValueError`` where it is no LLaVA-NeXT.
    """
    global _active
    if _active:
        return
    _active = True
    try:
        put_next_on_path()
        _hooks.install()
        for package in packages():
            compat.install(package, _hooks, _patches)
            tower_builder.install(package, _hooks, _patches)
            native_install.install(package, _hooks, _patches)
            refused.install(package, _hooks)
            _extend(package)
    except BaseException:
        undo()
        raise


def undo() -> None:
    """Take back everything that :func:`apply` did."""
    global _active
    _hooks.remove()
    _patches.undo()
    take_off_path()
    _active = False


def is_active() -> bool:
    return _active


def _extend(package: str) -> None:
    """What the plugin adds to every host: arguments, tuned parts, a config that remembers the tower, a check."""

    # Imported when the host is: these modules need torch, and `import builder_patch` must stay cheap.
    def on_arch(arch: ModuleType) -> None:
        from .packed_step import into_decoders
        from .saving import note_when_saving
        from .text_only_batches import into_model
        from .trainable_parts import remember_tower

        remember_tower(arch, _patches)
        note_when_saving(arch, _patches)
        into_model(arch, _patches)
        into_decoders(_patches)

    def on_models(models: ModuleType) -> None:
        from .saving import note_with_models

        note_with_models(models, _patches)

    def on_builder(builder: ModuleType) -> None:
        from .checkpoint import check_when_loaded
        from .model_class import load_by_architectures

        check_when_loaded(builder, _patches)
        load_by_architectures(builder, _patches)

    def on_train(train: ModuleType) -> None:
        from .arguments import extend
        from .gradients import check_gradients
        from .model_class import train_by_architectures
        from .saving import save_what_is_trained
        from .trainable_parts import tune_parts

        extend(train, _patches)
        tune_parts(train, _patches)
        train_by_architectures(train, _patches)
        save_what_is_trained(train, _patches)
        check_gradients(train, _patches)

    def on_utilities(original: Callable) -> Callable:
        from .model_class import name_by_architectures

        return tower_builder.mark_wrapper(name_by_architectures(original), original)

    def on_trainer(trainer: ModuleType) -> None:
        from .packed_step import into_trainer

        into_trainer(_patches)

    tower_builder.hook_function(package, "mm_utils", "get_model_name_from_path", on_utilities, _hooks, _patches)
    _hooks.after(f"{package}.model.llava_arch", on_arch)
    _hooks.after(f"{package}.model", on_models)
    _hooks.after(f"{package}.model.builder", on_builder)
    _hooks.after(f"{package}.train.train", on_train)
    _hooks.after(f"{package}.train.llava_trainer", on_trainer)
