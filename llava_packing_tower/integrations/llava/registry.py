"""Which hosts there are, and which of them is here. A host is one file and one line in HOSTS."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ...utils import environment
from ...utils.files import user_path
from .host import FoundHost, Host, misfits

logger = logging.getLogger(__name__)

# Looked for in this order; modules with a HOST.
HOSTS: tuple[str, ...] = (
    "onevision",
    "llava_next",
    "llava_med",
    "llava_v1",
    "llavaction",
    "llava_more",
    "geochat",
    "bunny",
    "eagle",
    "videollava",
    "moellava",
    "cambrian",
)
UNSUPPORTED: dict[str, str] = {
    "tinyllava": "TinyLLaVA makes its towers from configs of transformers' own models, by a registry "
    "(register_vision_tower), and has no builder of towers and no initialize_vision_modules",
}
"""Packages of LLaVAs that no host can describe, each with the reason. They are left alone, and named."""
DIR_ENV, NEXT_DIR_ENV = environment.LLAVA_DIR, environment.NEXT_DIR
_on_path: list[str] = []
_in_use: dict[str, Host | None] = {}  # by package: what it was recognized as when it was imported; None: left alone


def all_hosts() -> tuple[Host, ...]:
    """The hosts of the table, in the order in which they are looked for."""
    return tuple(import_module(f".hosts.{name}", __package__).HOST for name in HOSTS)


def packages() -> tuple[str, ...]:
    """The names under which hosts, and LLaVAs that are left alone, are imported."""
    return tuple(dict.fromkeys([*(host.package for host in all_hosts()), *UNSUPPORTED]))


class Recognised(NamedTuple):
    """What a folder is: a host that this package works with, or else why it does not (None: it is no LLaVA)."""

    host: Host | None
    reason: str | None = None


def recognise(package: str, root: Path) -> Recognised:
    """The host that a package in the folder ``root`` is. A LLaVA with signatures that no host has is not taken for one.

    Nothing of it is imported.
    """
    unlike: list[str] = []
    for host in all_hosts():
        if host.package == package and host.is_in(root):
            unlike = misfits(host, root)
            if not unlike:
                trainer = environment.read(environment.TRAINER)
                return Recognised(host if trainer is None else host.with_trainer(trainer))
            break
    looks_like_one = unlike or any(root.glob("model/*_arch.py")) or (root / "model" / "vision_tower").is_dir()
    if not looks_like_one:
        return Recognised(None)
    why = "; ".join(unlike[:2]) or UNSUPPORTED.get(package) or "it does not have the layout of a known LLaVA"
    return Recognised(
        None,
        f"{package} in {root} is left as it is: {why}. Packing towers, native resolution, the packed training step and "
        f"the checks of checkpoints are not available in it",
    )


def use(package: str, module: ModuleType) -> Host | None:
    """The host that an imported package is, which :func:`host_of` answers from now on.

    None for one that is left alone, which is said once if it is a LLaVA.
    """
    if package not in _in_use:
        found = [recognise(package, Path(path)) for path in module.__path__]
        _in_use[package] = next((each.host for each in found if each.host), None)
        if _in_use[package] is None and (reason := next((each.reason for each in found if each.reason), None)):
            logger.warning("%s", reason)
    return _in_use[package]


def forget_all() -> None:
    """Undo every :func:`use`."""
    _in_use.clear()


def host_of(module: str | ModuleType | None = None) -> Host:
    """The host that a module, given itself or by its full name, belongs to: of the hosts in use, else of those here.

    None is the host that :func:`find_host` finds. Raises ``ValueError`` for a module of no host.
    """
    if module is None:
        return find_host().host
    name = module if isinstance(module, str) else module.__name__
    for host in _in_use.values():
        if host is not None and host.owns(name):
            return host
    for package in packages():
        if name == package or name.startswith(f"{package}."):
            return find_host(package).host
    raise ValueError(f"module {name} belongs to no LLaVA: those known are the packages {', '.join(packages())}")


def host_of_model(model: object) -> Host:
    """The host that the class of a model, or one of its base classes, comes from; else the one that is here."""
    for cls in type(model).__mro__:
        for host in (*_in_use.values(), *all_hosts()):
            if host is not None and host.owns(cls.__module__):
                return host
    return host_of()


def meta_model(arch: ModuleType) -> type:
    """The class with ``initialize_vision_modules`` in a host's ``arch`` module."""
    return getattr(arch, host_of(arch).meta_model)


def mixin(arch: ModuleType) -> type:
    """The class with ``encode_images`` in a host's ``arch`` module."""
    return getattr(arch, host_of(arch).mixin)


def trainer_class(module: ModuleType) -> type:
    """The host's trainer, as its ``trainer`` or its ``train`` module has it."""
    return getattr(module, host_of(module).trainer.name)


def data_module(train: ModuleType) -> ModuleType:
    """The module of a host with its dataset and what that reads samples with: its ``train``, in most."""
    host = host_of(train)
    return train if host.data is None else import_module(host.module(host.data))


def image_token(data: ModuleType) -> int:
    """The id of ``<image>``: that of the module with the dataset, where that has it, else of ``arch``."""
    found = vars(data).get("IMAGE_TOKEN_INDEX")
    return import_module(host_of(data).module(host_of(data).arch)).IMAGE_TOKEN_INDEX if found is None else found


def loader(builder: ModuleType) -> Callable:
    """The function of a host's ``loader`` module that loads a checkpoint."""
    return getattr(builder, host_of(builder).loader.name)


def put_clone_on_path() -> str | None:
    """Put the clone that ``LLAVA_DIR`` (or ``LLAVA_NEXT_DIR``) names in front of ``sys.path``.

    Returns:
        the package in it; None where neither is set.

    Raises:
        ValueError: two different folders, no LLaVA that this package works with, another one was imported before.
    """
    given = {name: user_path(value).resolve() for name in (DIR_ENV, NEXT_DIR_ENV) if (value := environment.read(name))}
    if not given:
        return None
    if len({*given.values()}) > 1:
        raise ValueError(f"{DIR_ENV} is {given[DIR_ENV]}, but {NEXT_DIR_ENV} is {given[NEXT_DIR_ENV]}: set one of them")
    name, folder = next(iter(given.items()))
    reasons = []
    for host in all_hosts():
        for base in dict.fromkeys((folder, folder / host.folder)):
            root = base.joinpath(*host.package.split("."))
            if not root.is_dir():
                continue
            found = recognise(host.package, root)
            if found.host is not None:
                _put_on_path(name, base, root, host.package)
                return host.package
            reasons.append(found.reason)
    reasons += [recognise(package, folder / package).reason for package in UNSUPPORTED if (folder / package).is_dir()]
    reason = next(filter(None, reasons), None)
    raise ValueError(
        f"{name}={folder}: {reason or 'there is no LLaVA that this package knows'}. Known are:\n" + _known()
    )


def _put_on_path(name: str, base: Path, root: Path, package: str) -> None:
    loaded = sys.modules.get(package)
    if loaded is not None and Path(next(iter(loaded.__path__))).resolve() != root:
        raise ValueError(f"{name}={base}, but {package} is already imported from {next(iter(loaded.__path__))}")
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
        _on_path.append(str(base))


def take_off_path() -> None:
    """Undo :func:`put_clone_on_path`."""
    while _on_path:
        path = _on_path.pop()
        if path in sys.path:
            sys.path.remove(path)


def find_host(package: str | None = None) -> FoundHost:
    """The host that ``import <package>`` would give, found without importing it.

    package: None is the one in ``LLAVA_DIR``, or ``llava``.

    Raises ``ValueError`` if there is none, or one that this package does not work with; it says what to install.
    """
    named = put_clone_on_path() if package in (None, "llava") else None
    package = package or named or "llava"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no LLaVA is installed (package {package!r}). One of:\n" + _known(package))
    root = Path(next(iter(spec.submodule_search_locations)))
    found = recognise(package, root)
    if found.host is not None:
        return FoundHost(found.host, root, _version(found.host, root))
    reason = found.reason or f"{root} does not have the layout of a known LLaVA"
    raise ValueError(f"{reason}. Known are:\n" + _known(package))


def _known(package: str | None = None) -> str:
    """How the hosts with this package name, or all of them, are installed."""
    hosts = [host for host in all_hosts() if host.package == package] or all_hosts()
    return "\n".join(f"  {host.title}: {host.install}" for host in hosts)


def _version(host: Host, root: Path) -> str:
    """As the clone's pyproject.toml or the installed distribution states it."""
    depth = len(host.package.split(".")) - 1
    project = root.parents[depth] / "pyproject.toml"
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
