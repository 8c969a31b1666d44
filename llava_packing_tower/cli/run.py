"""Run a Python script or module with the packing tower in LLaVA. No file of LLaVA is edited.

    llava-packing run -- python -m llava.eval.model_vqa --model-path checkpoints/run1 ...

With another launcher, name the entry point: `torchrun ... -m llava_packing_tower.run script.py ...`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from ..utils.errors import UsageError

ENTRY = ["-m", "llava_packing_tower.run"]
# Options of the interpreter that take no value.
FLAG = re.compile(r"-[bBdEIOPqsSuvx]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- python ...", help="the command to run")


def command(words: list[str]) -> list[str]:
    """The command to start for what was typed after ``--``.

    Raises :class:`UsageError` for anything but ``python [-u ...] (-m MODULE | SCRIPT.py) ...`` or ``SCRIPT.py ...``.
    """
    words = words[1:] if words[:1] == ["--"] else words
    example = "llava-packing run -- python -m llava.eval.model_vqa --model-path ..."
    if not words:
        raise UsageError(f"nothing to run, e.g.: {example}")
    interpreter, flags = sys.executable, []
    if re.fullmatch(r"python[\d.]*", os.path.basename(words[0])):
        # A bare `python` is this one: another would not have this package.
        interpreter = words[0] if os.path.dirname(words[0]) else sys.executable
        words = words[1:]
        while words and FLAG.fullmatch(words[0]):
            flags.append(words.pop(0))
    if (words[:1] == ["-m"] and len(words) > 1) or (words and words[0].endswith(".py")):
        return [interpreter, *flags, *ENTRY, *words]
    raise UsageError(
        f"cannot add the hook to `{' '.join(words[:3])}`: it must be `python -m MODULE` or a .py file, e.g.: "
        f"{example}. With a launcher: torchrun ... -m llava_packing_tower.run -m MODULE"
    )


def run(args: argparse.Namespace) -> int:
    words = command(args.words)
    target = words[words.index(ENTRY[-1]) + 1]
    if target.endswith(".py") and not os.path.isfile(target):
        raise UsageError(f"{target}: no such file")
    sys.stdout.flush()
    try:
        os.execv(words[0], words)
    except OSError as error:
        raise UsageError(f"{words[0]}: {error.strerror}") from error
