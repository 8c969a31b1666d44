"""Python programs in new processes in which torch and transformers are imported already: seconds cheaper each.

A server (one for each process of the tests) imports them and nothing of this package or of a LLaVA. For every program
it forks; the fork becomes what ``python -c``, ``-m`` or a file would be.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_server: subprocess.Popen | None = None


def execute(
    command: list[str], env: dict[str, str], timeout: float = 400, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess:
    """``command``: ``[sys.executable, ...]``, without options of the interpreter itself but -c and -m.

    ``env`` is what the program sees; libraries that are imported already have read that of the tests. Past the time
    limit the program is killed with its children, and the test fails.
    """
    assert command[0] == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        server = _started()
        request = {"words": list(map(str, command[1:])), "env": env, "cwd": str(cwd), "files": list(map(str, files))}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        pid = int(server.stdout.readline())
        late = False
        try:
            late = not select.select([server.stdout], [], [], timeout)[0]
        finally:  # also after Ctrl-C and pytest's own time limit
            if late or not select.select([server.stdout], [], [], 0)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            status = int(server.stdout.readline())
        out, err = (file.read_text(errors="replace") for file in files)
    if late:
        raise AssertionError(f"still running after {timeout} s:\n{out[-3000:]}\n{err[-5000:]}")
    return subprocess.CompletedProcess(command, status, out, err)


def _started() -> subprocess.Popen:
    global _server
    if _server is None or _server.poll() is not None:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        words = [sys.executable, __file__]
        _server = subprocess.Popen(
            words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=REPOSITORY
        )
        atexit.register(_server.stdin.close)
    return _server


# ---------------------------------------------------------------- the server


def serve() -> None:
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    sys.path.pop(0)  # of this file
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _become(**json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(words: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    """The program, to its end: this does not return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    status: object = 0
    try:
        _run(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def _run(words: list[str]) -> None:
    match words:
        case ["-c", code, *rest]:
            sys.argv[:] = ["-c", *rest]
            sys.path.insert(0, "")
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(code, "<string>", "exec"), vars(main))
        case ["-m", module, *rest]:
            sys.argv[:] = [module, *rest]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *rest]:
            sys.argv[:] = [file, *rest]
            sys.path.insert(0, str(Path(file).parent.resolve()))
            runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    serve()
