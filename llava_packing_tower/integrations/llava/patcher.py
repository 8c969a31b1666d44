"""Changes to somebody else's modules that can be taken back exactly."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

_ABSENT = object()


class Patches:
    """Remembers what it replaced. :meth:`undo` puts everything back, newest first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        """``owner.name = value``; undone to the attribute's own old value, or to its absence (a class may inherit)."""
        old = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if old is _ABSENT else setattr(owner, name, old))

    def delete(self, owner: object, name: str) -> None:
        """``del owner.name``."""
        old = vars(owner)[name]
        delattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, old))

    def set_item(self, mapping: MutableMapping, key: object, value: object) -> None:
        """``mapping[key] = value``."""
        old = mapping.get(key, _ABSENT)
        mapping[key] = value
        self._undo.append(lambda: mapping.pop(key, None) if old is _ABSENT else mapping.__setitem__(key, old))

    def on_undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
