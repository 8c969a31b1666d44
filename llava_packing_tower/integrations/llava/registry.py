"""Which hosts there are, and which of them is here. A host is one file and one line in HOSTS."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...utils import environment
from .host import FoundHost, Host

# Looked for in this order; modules with a HOST.
HOSTS: tuple[str, ...] = ("llava_next", "llava_v1", "llavaction")
NEXT_DIR_ENV = environment.NEXT_DIR
_on_path: list[str] = []
_in_use: dict[str, Host] = {}  # by package: what it was recognised as when it was imported


def all_hosts() -> tuple[Host, ...]:
    return tuple(import_module(f".hosts.{name}", __package__).HOST for name in HOSTS)


def packages() -> tuple[str, ...]:
    """The names under which hosts are imported."""
    return tuple(dict.fromkeys(host.package for host in all_hosts()))


def use(package: str, module: ModuleType) -> Host:
    """The host that an imported package is, which :func:`host_of` answers from now on.

    One that no host recognises is taken for the first with that package's name.
    """
    hosts = [host for host in all_hosts() if host.package == package]
    roots = [Path(path) for path in module.__path__]
    _in_use[package] = next((h for h in hosts for root in roots if h.recognises(root)), hosts[0])
    return _in_use[package]


def forget_all() -> None:
    """Undo every :func:`use`."""
    _in_use.clear()


def host_of(module: str | ModuleType = "llava") -> Host:
    """The host that a module, given itself or by its full name, belongs to: of the hosts in use, else of those here.

    Raises ``ValueError`` for a module of no host.
    """
    name = module if isinstance(module, str) else module.__name__
    for host in _in_use.values():
        if host.owns(name):
            return host
    for package in packages():
        if name == package or name.startswith(f"{package}."):
            return find_host(package).host
    raise ValueError(f"module {name} belongs to no LLaVA: those known are the packages {', '.join(packages())}")


def host_of_model(model: object) -> Host:
    """The host that the class of a model, or one of its base classes, comes from; else the one that is here."""
    for cls in type(model).__mro__:
        for host in (*_in_use.values(), *all_hosts()):
            if host.owns(cls.__module__):
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


def put_next_on_path() -> None:
    """Put ``LLAVA_NEXT_DIR`` in front of ``sys.path``. Raises ``ValueError`` where it is no LLaVA-NeXT."""
    folder = environment.read(NEXT_DIR_ENV)
    if not folder:
        return
    path = Path(folder).expanduser().resolve()
    next_host = import_module(".hosts.llava_next", __package__).HOST
    if not next_host.recognises(path / next_host.package):
        raise ValueError(
            f"{NEXT_DIR_ENV}={folder} is not a clone of LLaVA-NeXT: it has no llava/model/multimodal_resampler"
        )
    loaded = sys.modules.get(next_host.package)
    if loaded is not None and Path(loaded.__file__).parent != path / next_host.package:
        raise ValueError(f"{NEXT_DIR_ENV}={folder}, but llava is already imported from {loaded.__file__}")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
        _on_path.append(str(path))


def take_off_path() -> None:
    """Undo :func:`put_next_on_path`."""
    while _on_path:
        path = _on_path.pop()
        if path in sys.path:
            sys.path.remove(path)


def find_host(package: str = "llava") -> FoundHost:
    """The host that ``import <package>`` would give, found without importing it.

    Raises ``ValueError`` if there is none, or one of a kind that is not in HOSTS; it says what to install.
    """
    if package == "llava":
        put_next_on_path()
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no LLaVA is installed (package {package!r}). One of:\n" + _how_to_install(package))
    root = Path(next(iter(spec.submodule_search_locations)))
    for host in all_hosts():
        if host.package == package and host.recognises(root):
            return FoundHost(host, root, _version(host, root))
    raise ValueError(f"{root} does not have the layout of a known LLaVA. Known are:\n" + _how_to_install(package))


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
