"""Several machines that DeepSpeed starts over ssh: the hostfile, and how words come to the other machines unharmed.

DeepSpeed hands its command line to pdsh, which hands it to a shell on each machine: parentheses, quotes, ``$`` and
``%n`` in a value would be taken for the shell's or pdsh's own. And of the environment it passes on next to nothing. So
arguments and environment travel as one word of letters and digits, which :mod:`.entrypoint` opens.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import MutableMapping, Sequence

from ..utils.errors import UsageError
from ..utils.files import user_path

FLAG = "--packed="
# What the other machines need to do the same as this one. No keys and tokens: a command line can be seen by everyone.
PASSED_ON = re.compile(
    r"LLAVA_.*|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|HF_DATASETS_CACHE|TRANSFORMERS_OFFLINE|WANDB_(PROJECT|MODE)"
    r"|OMP_NUM_THREADS|GLOO_SOCKET_IFNAME"
)


def check_hostfile(file: str | os.PathLike) -> dict[str, int]:
    """Processes of each machine, as the hostfile states them: lines ``name slots=8``.

    Raises :class:`UsageError` for a file that is missing (DeepSpeed would train on this machine alone) or that it
    cannot read, and where pdsh is missing, without which it starts nothing.
    """
    path = user_path(file)
    if not path.is_file():
        raise UsageError(f"--hostfile: {file} {'is not a regular file' if path.exists() else 'does not exist'}")
    machines: dict[str, int] = {}
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hostfile: {file} cannot be read: {error}") from error
    for number, line in enumerate(content.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", text)
        if found is None or found[1] in machines or int(found[2]) < 1:
            raise UsageError(f"--hostfile: {file}, line {number}: expected a new `name slots=N`, got {text!r}")
        machines[found[1]] = int(found[2])
    if not machines:
        raise UsageError(f"--hostfile: {file} lists no machine")
    if len(machines) > 1 and shutil.which("pdsh") is None:
        raise UsageError("--hostfile needs pdsh, with which DeepSpeed starts the machines: apt install pdsh")
    return machines


def pack(arguments: Sequence[str], environment: MutableMapping[str, str]) -> str:
    """One word that holds ``arguments`` and what PASSED_ON takes of ``environment``."""
    kept = {name: value for name, value in environment.items() if PASSED_ON.fullmatch(name)}
    text = json.dumps({"arguments": list(arguments), "environment": kept})
    return FLAG + base64.urlsafe_b64encode(text.encode()).decode()


def unpack(words: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """``words`` with a word of :func:`pack` replaced by what it holds; its environment goes into ``environment``."""
    opened: list[str] = []
    for word in words:
        if not word.startswith(FLAG):
            opened.append(word)
            continue
        content = json.loads(base64.urlsafe_b64decode(word[len(FLAG) :]))
        environment.update(content["environment"])
        opened += content["arguments"]
    return opened
