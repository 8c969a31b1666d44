"""The one place where LLaVA is touched: which hosts there are, and how the packing tower gets into them.

Nothing of a host is edited. :func:`apply` makes changes in memory when the host is imported, :func:`undo` takes them
back. A host is one module here and one line in HOSTS; what is changed in which method is listed in :mod:`.methods`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from ...utils.import_hooks import ImportHooks
from . import compat, refused, registry, tower_builder
from .host import Host, Part
from .patcher import Patches

_hooks = ImportHooks()
_patches = Patches()
_active = False


def apply() -> None:
    """Make every host, imported already or later, build packing towers; apply the compat patches. Idempotent.

    ``LLAVA_DIR``, if set, is put in front of ``sys.path``. A LLaVA with other signatures than the known ones is left
    alone. Raises ``ValueError`` where LLAVA_DIR is no known LLaVA, and where a compat patch is switched off that does
    not exist.
    """
    global _active
    if _active:
        return
    _active = True
    try:
        compat.disabled()
        registry.put_clone_on_path()
        _hooks.install()
        for package in registry.packages():
            _when_imported(package)
    except BaseException:
        undo()
        raise


def undo() -> None:
    """Take back everything that :func:`apply` did."""
    global _active
    _hooks.remove()
    _patches.undo()
    registry.take_off_path()
    registry.forget_all()
    _active = False


def is_active() -> bool:
    return _active


def _when_imported(package: str) -> None:
    """Change a package right before its own body runs, or now: which host it is, its files say."""
    seen = set()

    def prepare(module: ModuleType) -> None:
        host = registry.use(package, module)
        if host is not None and host.name not in seen:  # once: what is imported again runs the same hooks
            seen.add(host.name)
            _install(host)

    if package in sys.modules:
        prepare(sys.modules[package])
    else:
        _hooks.before(package, prepare)


def _install(host: Host) -> None:
    """Have each module of a host changed right after it is imported."""
    refused.install(host, _hooks)
    compat.install(host, _hooks, _patches)
    tower_builder.install(host, _hooks, _patches)
    tower_builder.hook_function(host, host.projector_builder, tower_builder.hooked_projector, _hooks, _patches)
    names = Part(host.mm_utils, "get_model_name_from_path")
    tower_builder.hook_function(host, names, partial(tower_builder.hooked_names, host=host), _hooks, _patches)
    for part in host.gridded_images:
        tower_builder.hook_function(host, part, _gridded, _hooks, _patches)
    _hooks.after(host.module(host.arch), _on_arch)
    for models in (host.models, *host.late_models):
        _hooks.after(host.module(models), _on_models)
    _hooks.after(host.module(host.loader.module), _on_loader)
    _hooks.after(host.module(host.train), _on_train)
    _hooks.after(host.module(host.trainer.module), _on_trainer)


def _gridded(original: Callable) -> Callable:
    from .gridded_images import hooked_grid

    return hooked_grid(original)


# Imported when the host is: these modules need torch, and `import builder_patch` must stay cheap.


def _on_arch(arch: ModuleType) -> None:
    from .native_resolution import into_model
    from .packed_step import into_decoders
    from .saving import note_when_saving
    from .speed import count_tokens
    from .text_only_batches import look_up_once, run_on_blanks
    from .trainable_parts import remember_tower
    from .words_on_host import join_on_host

    host = registry.host_of(arch)
    if host.native_reason is not None:
        return
    for cls in (registry.meta_model(arch), registry.mixin(arch)):
        if host.get_tower != "get_vision_tower":  # the rest of this package calls it so
            _patches.set(cls, "get_vision_tower", vars(cls)[host.get_tower])
    into_model(arch, _patches)
    remember_tower(arch, _patches)
    note_when_saving(arch, _patches)
    run_on_blanks(arch, _patches)
    look_up_once(arch, _patches)
    join_on_host(arch, _patches)
    into_decoders(_patches)
    count_tokens(arch, _patches)


def _on_models(models: ModuleType) -> None:
    from .native_resolution import into_generate
    from .saving import note_with_models

    into_generate(models, _patches)
    note_with_models(models, _patches)


def _on_loader(builder: ModuleType) -> None:
    from .checkpoint import check_when_loaded
    from .model_class import load_by_architectures

    check_when_loaded(builder, _patches)
    load_by_architectures(builder, _patches)


def _on_train(train: ModuleType) -> None:
    from .arguments import extend
    from .dealt_batches import deal_batches
    from .gradients import check_gradients
    from .model_class import train_by_architectures
    from .native_dataset import into_training
    from .saving import save_what_is_trained
    from .speed import into_trainers
    from .trainable_parts import tune_parts
    from .zero3 import gather_by_layer

    into_training(train, _patches)
    extend(train, _patches)
    tune_parts(train, _patches)
    train_by_architectures(train, _patches)
    save_what_is_trained(train, _patches)
    check_gradients(train, _patches)
    gather_by_layer(train, _patches)
    deal_batches(train, _patches)
    into_trainers(train, _patches)


def _on_trainer(trainer: ModuleType) -> None:
    from . import left_out, packed_step
    from .out_of_memory import explain_out_of_memory

    explain_out_of_memory(_patches)
    packed_step.into_trainer(_patches)
    left_out.into_trainer(trainer, _patches)
