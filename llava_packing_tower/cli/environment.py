"""The environment variables of this package, checked before a command begins: ranks would fail on them one by one."""

from __future__ import annotations

import difflib
import os
import sys

from ..utils import environment
from ..utils.errors import UsageError

PREFIX = "LLAVA_PACKING_"


def check_environment(patches: bool = True) -> None:
    """Raises :class:`UsageError` for a value that means nothing; says which names with our prefix nobody reads.

    patches: also names of compat patches (``doctor`` has them among its findings).
    """
    known = {name for variable in environment.VARIABLES.values() for name in (variable.name, *variable.old)}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            print(
                f"{name} is no variable of this package, and has no effect; the nearest is {nearest}", file=sys.stderr
            )
    try:
        for name in (environment.FUSED, environment.GRAPHS):
            environment.switch(name)
        for name in (environment.ENCODER_TOKENS, environment.PEAK_TFLOPS):
            environment.number(name)
        if (backend := environment.read(environment.ATTENTION)) not in (None, "auto"):
            from ..attention.dispatch import BACKENDS

            if backend not in BACKENDS:
                raise ValueError(
                    f"{environment.ATTENTION} must be auto or one of {', '.join(BACKENDS)}, got {backend!r}"
                )
        if patches and environment.read(environment.DISABLE_PATCHES):
            from ..integrations.llava.compat import disabled

            disabled()
    except ValueError as error:
        raise UsageError(str(error)) from error
