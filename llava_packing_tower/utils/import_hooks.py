"""Running code right before or right after a module is imported, whenever that happens.

LLaVA copies names between its modules while it is imported (``from .multimodal_encoder.builder import
build_vision_tower``), so a change has to be in place before the next module copies it: not after ``import llava``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _NamespaceLoader(Loader):
    """Stands for the loader that Python gives a package without ``__init__.py`` after it was found."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        pass


class ImportHooks(MetaPathFinder):
    """A finder that finds nothing itself: it lets the others find, and wraps the loading of watched modules.

    Callbacks run each time the module's body runs (a reload, or an import that is tried again after it failed).
    """

    def __init__(self) -> None:
        self._before: dict[str, list[Callback]] = {}
        self._after: dict[str, list[Callback]] = {}
        self._failure: BaseException | None = None

    def install(self) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        self._before.clear()
        self._after.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def before(self, name: str, callback: Callback) -> None:
        """Call ``callback(module)`` before the body of module ``name`` runs. Never called if it has run already."""
        self._before.setdefault(name, []).append(callback)

    def after(self, name: str, callback: Callback) -> None:
        """Call ``callback(module)`` after the body of module ``name`` has run: now, if that has happened already."""
        self._after.setdefault(name, []).append(callback)
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            callback(module)

    def surface_failures(self, name: str) -> None:
        """Raise what a callback raised while module ``name`` was imported, even if that module swallowed it.

        LLaVA's ``model/__init__.py`` imports its models in ``try: ... except: pass``.
        """

        def forget(module: ModuleType) -> None:
            self._failure = None

        def raise_again(module: ModuleType) -> None:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

        self.before(name, forget)
        self.after(name, raise_again)

    def _run(self, callbacks: Sequence[Callback], module: ModuleType) -> None:
        for callback in callbacks:
            try:
                callback(module)
            except BaseException as failure:
                self._failure = self._failure or failure
                raise

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._before and fullname not in self._after:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is not None and spec.loader is None:  # a package without __init__.py, which has no body to run
            spec.loader = _NamespaceLoader()
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        loader, run_body = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is its own self again for whoever inspects the module later
            self._run(self._before.get(fullname, ()), module)
            run_body(module)
            self._run(self._after.get(fullname, ()), module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None
