"""The one place where LLaVA is touched: which hosts there are, and how the packing tower gets into them.

Nothing of a host is edited. :func:`apply` makes changes in memory when the host is imported, :func:`undo` takes them
back. A host is one module here and one line in HOSTS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...utils import environment
from . import compat as mends
from . import native_install as native
from . import refused
from . import tower_builder as builder_hook
from .host import FoundHost, Host
from .import_hooks import ImportHooks
from .patcher import Patches

# Looked for in this order; modules with a HOST.
HOSTS: tuple[str, ...] = ("llava_next", "llava_v1", "llavaction")
NEXT_DIR_ENV = environment.NEXT_DIR

_hooks = ImportHooks()
_patches = Patches()
_active = False


def all_hosts() -> tuple[Host, ...]:
    return tuple(import_module(f".{name}", __package__).HOST for name in HOSTS)


def packages() -> tuple[str, ...]:
    """The names under which hosts are imported."""
    return tuple(dict.fromkeys(host.package for host in all_hosts()))


def apply() -> None:
    """Make every host, imported already or later, build packing towers; mend what is broken in it. Idempotent.

    ``LLAVA_NEXT_DIR``, if set, is put in front of ``sys.path``. Raises ``ValueError`` where it is no LLaVA-NeXT.
    """
    global _active
    if _active:
        return
    _active = True
    try:
        _put_next_on_path()
        _hooks.install()
        for package in packages():
            mends.install(package, _hooks, _patches)
            builder_hook.install(package, _hooks, _patches)
            native.install(package, _hooks, _patches)
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
    _active = False


def is_active() -> bool:
    return _active


def _extend(package: str) -> None:
    """What the plugin adds to every host: arguments, tuned parts, a config that remembers the tower, a check."""

    # Imported when the host is: these modules need torch, and `import builder_patch` must stay cheap.
    def on_arch(arch: ModuleType) -> None:
        from .saving import note_when_saving
        from .text_only_batches import into_model
        from .trainable_parts import remember_tower

        remember_tower(arch, _patches)
        note_when_saving(arch, _patches)
        into_model(arch, _patches)

    def on_models(models: ModuleType) -> None:
        from .saving import note_with_models

        note_with_models(models, _patches)

    def on_builder(builder: ModuleType) -> None:
        from .after_load import after_load
        from .checkpoint import check_loaded, projector_in_full, strict_adapter
        from .model_class import load_by_architectures
        from .restore_frozen import restore_frozen

        after_load(builder, _patches, projector_in_full, restore_frozen, check_loaded)
        strict_adapter(builder, _patches)
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

        return builder_hook.mark_wrapper(name_by_architectures(original), original)

    builder_hook.hook_function(package, "mm_utils", "get_model_name_from_path", on_utilities, _hooks, _patches)
    _hooks.after(f"{package}.model.llava_arch", on_arch)
    _hooks.after(f"{package}.model", on_models)
    _hooks.after(f"{package}.model.builder", on_builder)
    _hooks.after(f"{package}.train.train", on_train)


def _put_next_on_path() -> None:
    folder = environment.read(NEXT_DIR_ENV)
    if not folder:
        return
    path = Path(folder).expanduser().resolve()
    next_host = import_module(".llava_next", __package__).HOST
    if not next_host.recognises(path / next_host.package):
        raise ValueError(
            f"{NEXT_DIR_ENV}={folder} is not a clone of LLaVA-NeXT: it has no llava/model/multimodal_resampler"
        )
    loaded = sys.modules.get(next_host.package)
    if loaded is not None and Path(loaded.__file__).parent != path / next_host.package:
        raise ValueError(f"{NEXT_DIR_ENV}={folder}, but llava was imported already, from {loaded.__file__}")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
        _patches.on_undo(lambda: str(path) in sys.path and sys.path.remove(str(path)))


def find_host(package: str = "llava") -> FoundHost:
    """The host that ``import <package>`` would give, found without importing it.

    Raises ``ValueError`` if there is none, or one of a kind that is not in HOSTS; it says what to install.
    """
    if package == "llava":
        _put_next_on_path()
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no LLaVA is installed (package {package!r}). One of:\n" + _how_to_install(package))
    root = Path(next(iter(spec.submodule_search_locations)))
    for host in all_hosts():
        if host.package == package and host.recognises(root):
            return FoundHost(host, root, _version(host, root))
    raise ValueError(f"{root} is not a LLaVA that is laid out like one of these:\n" + _how_to_install(package))


def _how_to_install(package: str) -> str:
    hosts = [host for host in all_hosts() if host.package == package] or all_hosts()
    return "\n".join(f"  {host.title}: {host.install}" for host in hosts)


def _version(host: Host, root: Path) -> str:
    """As the clone's pyproject.toml or the installed distribution states it."""
    project = root.parent / "pyproject.toml"
    if project.is_file():
        for line in project.read_text(encoding="utf-8").splitlines():
            if line.startswith("version"):
                return line.partition("=")[2].strip().strip("\"'")
    for distribution in dict.fromkeys((host.distribution or host.package, host.package)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "(unknown version)"
