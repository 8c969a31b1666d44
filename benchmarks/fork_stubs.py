"""Empty packages in place of those that a fork imports and that are not installed."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MACHINERY = ("importlib", "_frozen_importlib", "llava_packing_tower.utils.import_hooks")


class _Anything:
    """Stands for a class or function of a package that is not installed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> object:
        # As a decorator it changes nothing.
        return args[0] if len(args) == 1 and callable(args[0]) else _Anything()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (_Anything,)


class _Empty(ModuleType):
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {}) if name[:1].isupper() else _Anything()


class Stubs(MetaPathFinder, Loader):
    """Finds what nobody else found, while the fork is imported."""

    def __init__(self, package: str) -> None:
        self.package, self.names = package.split(".")[0], set()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        top, importer = fullname.split(".")[0], sys._getframe(1)
        while importer is not None and importer.f_globals.get("__name__", "").startswith(MACHINERY):
            importer = importer.f_back
        asked = "" if importer is None else importer.f_globals.get("__name__", "")
        if asked.split(".")[0] != self.package or top == self.package or (top in sys.modules and top not in self.names):
            return None
        self.names.add(top)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []
