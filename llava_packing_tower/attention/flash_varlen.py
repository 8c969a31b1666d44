"""The functions behind torch's custom operators, which cost the host more than the launch of the kernel inside: 0.6 ms
per block and training step on a slow CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType


def plain_function(module: ModuleType, name: str, parameters: set[str]) -> Callable | None:
    """The function that ``module`` made the custom operator ``name`` of; None if it is none, or takes other parameters
    (another version of the package)."""
    function = getattr(getattr(module, name, None), "_init_fn", None)
    known = inspect.signature(function).parameters.keys() if function is not None else set()
    return function if parameters <= known else None
