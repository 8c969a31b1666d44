"""The `llava-packing` command. A command is one module of this package and one line in COMMANDS."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..utils.errors import FORBIDDEN, UsageError, what_the_disk_says
from ..utils.files import check_target, user_path
from ..utils.supervise import Stopped, raising_signals
from .environment import check_environment


class Command(NamedTuple):
    """Where a command lives and its one-line help. The module is imported only when the command is called."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "align": Command("align", "compare a packed encoder with transformers' own model on the same checkpoint"),
    "train": Command("train", "train LLaVA with a packing tower, from a YAML file"),
    "convert": Command("convert", "convert a checkpoint to packing (or back) and verify the result"),
    "verify": Command("verify", "compare two LlavaViT checkpoints on real photographs"),
    "doctor": Command("doctor", "check the host, versions, defects and attention backends, and how to fix them"),
    "demo": Command("demo", "fine-tune a tiny LLaVA on real photographs, reload it and ask about each photo"),
    "eval": Command("eval", "evaluate a checkpoint on lmms-eval's tasks"),
    "eval-report": Command("eval_report", "results of several evaluations in one table and one chart"),
    "probe": Command("probe", "compare towers without a decoder: linear and k-NN probe on an image folder"),
    "export": Command("export", "write a LLaVA checkpoint as a Hugging Face folder, for transformers and vLLM"),
    "import": Command("import_", "turn an export back into a LLaVA checkpoint"),
    "show": Command("show", "a picture of what a tower sees: patches, tokens, the packed row, features, costs"),
    "run": Command("run", "run LLaVA's own scripts, or any other script, with the packing tower"),
    "bench": Command("bench", "measure the packed encoders beside transformers, timm and the original tower"),
}


WRITTEN = {"json": False, "out": False, "plot": False, "output_path": True, "output": True, "cache": True}
"""Arguments that name what a command writes, and whether that is a folder. (``--output_dir`` has checks of its own.)"""


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "commands:\n" + "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Run one command. Each module has `add_arguments(parser)` and `run(args) -> int`, the exit status."""
    _open_standard_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    top = argparse.ArgumentParser(
        prog="llava-packing", epilog=_overview(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"llava-packing {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="command", help="one of: " + ", ".join(COMMANDS))
    name = top.parse_args(argv[:1]).command
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with raising_signals():
            status = _run(name, argv[1:])
            sys.stdout.flush()
            return status
    except UsageError as error:
        return _say(name, error, 2)
    except Stopped as stopped:
        return _say(name, stopped, stopped.status)
    except BrokenPipeError:
        if not _is_unread():
            raise
        return 128 + signal.SIGPIPE
    except MemoryError as error:
        return _say(name, f"the memory of this machine does not suffice: {error or 'no more is to be had'}", 1)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENAMETOOLONG:
            return _say(name, f"{str(error.filename)[:80]}...: {error.strerror}", 2)
        if number in FORBIDDEN:
            return _say(name, f"{error.filename}: {error.strerror}" if error.filename else error, 2)
        if (reason := what_the_disk_says(error)) is None:
            raise
        return _say(name, reason, 1)


def _open_standard_streams() -> None:
    """Where a daemon has closed one (``>&-``): the next file that is opened would be taken for it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _is_unread() -> bool:
    """Whether whoever read the output has ended, as with ``| head``; then nothing more is written to it."""
    try:
        file = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        return False
    poll = select.poll()
    poll.register(file, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), file)
    return True


def _say(name: str, what: object, status: int) -> int:
    with contextlib.suppress(OSError):  # a log on a full disk
        print(f"llava-packing {name}: {what}", file=sys.stderr, flush=True)
    return status


def _run(name: str, words: list[str]) -> int:
    module = import_module(f".{COMMANDS[name].module}", __package__)
    parser = argparse.ArgumentParser(
        prog=f"llava-packing {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # `--key` belongs to the host's arguments as typed; an abbreviation must not be taken for one of this command.
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    # A command that takes the host's own arguments says so by reading `args.rest`.
    if getattr(module, "TAKES_REST", False):
        args, args.rest = parser.parse_known_args(words)
    else:
        args = parser.parse_args(words)
    check_environment(patches=name != "doctor")
    _replace_tildes(args)
    _check_targets(args)
    return module.run(args)


def _replace_tildes(args: argparse.Namespace) -> None:
    """``~`` in paths: a shell leaves it in ``--out=~/seen.png``, and a folder of that name would be made."""
    for name, given in vars(args).items():
        if isinstance(given, Path):
            setattr(args, name, user_path(given))
        elif isinstance(given, list) and all(isinstance(each, Path) for each in given):
            setattr(args, name, [user_path(each) for each in given])


def _check_targets(args: argparse.Namespace) -> None:
    """Whether what a command is told to write can be written: said now, and not when its work is done."""
    for name, given in vars(args).items():
        if name in WRITTEN and isinstance(given, str | Path):
            try:
                check_target(Path(given), is_folder=WRITTEN[name])
            except ValueError as error:
                raise UsageError(f"--{name}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
