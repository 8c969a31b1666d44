"""One training process: applies the hook and the compat patches, then runs the host's own ``train()`` on ``sys.argv``.

Started by the launcher (`llava-packing train`) as ``-m llava_packing_tower.train.entrypoint``, once per rank.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import sys
from importlib import import_module

from ..integrations.llava import install, registry
from ..integrations.llava.patcher import Patches
from ..utils.errors import what_the_disk_says
from ..utils.run_lock import LOCK_ENV, hold
from ..utils.supervise import watch_launcher
from .hostfile import unpack


def main() -> None:
    sys.argv[1:] = unpack(sys.argv[1:], os.environ)  # before anything reads either
    watch_launcher()
    if lock := os.environ.get(LOCK_ENV):
        hold(lock)
    rank = int(os.environ.get("RANK", "0"))
    logging.getLogger("llava_packing_tower").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.basicConfig(format="%(message)s")
    install.apply()
    host = registry.find_host().host
    train = import_module(host.module(host.train))

    from transformers import TrainingArguments, set_seed

    from . import callbacks

    trainers = callbacks.install(train, Patches())
    # The host seeds when it makes its trainer, after the projector got its random weights: runs would differ.
    set_seed(int(_argument("seed") or TrainingArguments.seed))
    takes = inspect.signature(train.train).parameters
    try:
        train.train(**{name: _argument(name) for name in ("attn_implementation",) if name in takes})
        callbacks.finish(trainers)
    except Exception as error:
        if (reason := what_the_disk_says(error)) is None:
            raise
        raise SystemExit(reason) from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave()


def leave() -> None:
    """End this process well, without taking the interpreter apart.

    Threads of the collectives may outlive their groups, and a rank that meets one of them on its way out is aborted
    ("terminate called without an active exception"): torchrun then calls a run failed that has saved everything.
    """
    atexit._run_exitfuncs()  # loggers and data loaders put their things away here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _argument(name: str) -> str | None:
    """The value of ``--name`` in ``sys.argv``: LLaVA 1.x takes it as a parameter of ``train()``."""
    words = sys.argv
    for word, following in zip(words, [*words[1:], None]):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
