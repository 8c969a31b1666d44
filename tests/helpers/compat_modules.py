"""Modules with a defect, and one compat patch applied to them."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from llava_packing_tower.integrations.llava import compat, registry
from llava_packing_tower.integrations.llava.host import Host
from llava_packing_tower.integrations.llava.patcher import Patches


def stand_in_host(package: str) -> Host:
    """A host that is laid out like LLaVA-NeXT, under a package name of its own."""
    return Host(name=package, title=package, package=package, recognises=lambda root: True, install="")


def module_from(tmp_path, monkeypatch, name: str, text: str) -> ModuleType:
    """A module with a source file, imported under ``name``: one of a stand-in for a host."""
    package = name.partition(".")[0]
    monkeypatch.setitem(registry._in_use, package, stand_in_host(package))
    file = tmp_path / (name.replace(".", "/") + ".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def patched(name: str, module: ModuleType) -> Patches | None:
    """Apply one patch where its defect is detected; None where it is not."""
    item = compat.load_all()[name]
    if not item.defect(module):
        return None
    patches = Patches()
    item.apply(module, patches)
    return patches
