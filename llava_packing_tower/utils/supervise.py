"""The launcher and its processes end together: signals are passed on, and ranks notice that the launcher is gone.

Every process of a run is in a session of its own, so that one call ends a process with all that it started. The ranks
look for the launcher each second: that holds through DeepSpeed's and torchrun's own processes in between, and after a
kill -9 that no handler sees. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LAUNCHER_ENV = "LLAVA_PACKING_LAUNCHER"
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for the processes of a run."""
INTERVAL = 1.0
"""Seconds between two looks of a rank at its launcher."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def identity(pid: int | None = None) -> str:
    """This machine, a process and when it started: ``host:pid:ticks``. A pid alone may be another process by then.

    Raises ``ProcessLookupError`` where there is no such process.
    """
    pid = os.getpid() if pid is None else pid
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the program may hold spaces and brackets; field 22 of proc(5) is counted behind it.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(f"no process {pid}") from None
    if fields[0] in "ZX":  # ended, and not waited for yet
        raise ProcessLookupError(f"process {pid} has ended")
    return f"{socket.gethostname()}:{pid}:{fields[19]}"


def is_alive(process: str) -> bool:
    """Whether the process of an :func:`identity` of this machine still runs."""
    try:
        return identity(int(process.split(":")[1])) == process
    except ProcessLookupError:
        return False


def watch_launcher(environment: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """In a rank: end this process and all it started once the launcher named in the environment is gone.

    Returns the thread that looks, or None where there is no launcher on this machine.
    """
    launcher = environment.get(LAUNCHER_ENV, "")
    if launcher.partition(":")[0] != socket.gethostname():
        return None

    def look() -> None:
        while is_alive(launcher):
            time.sleep(INTERVAL)
        try:
            print("the launcher has ended: this rank exits", file=sys.stderr, flush=True)
        finally:  # whoever read that may have ended, too
            _end_group(os.getpid())

    thread = threading.Thread(target=look, name="watch_launcher", daemon=True)
    thread.start()
    return thread


def _end_group(pid: int) -> None:
    """SIGKILL to all processes of a run that are in the group of ``pid``; to ``pid`` alone in a group of another's."""
    group = os.getpgid(pid)
    with contextlib.suppress(ProcessLookupError):
        if group == os.getsid(pid):
            os.killpg(group, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _started_by(launcher: str) -> Iterator[int]:
    """The processes that have this launcher in their environment."""
    mark = f"{LAUNCHER_ENV}={launcher}".encode()
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # it has just ended, or is another user's
            continue


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Stopped(BaseException):
    """A signal that asks this process to end: what is open is closed on the way out, as with KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def _is_stopping() -> bool:
    """Whether the running code is a ``finally`` or ``except``, or the end of a ``with``, that a Stopped has reached."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Stopped):
            return True
        error = error.__context__
    return False


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """In here SIGTERM, SIGHUP and SIGINT raise :class:`Stopped`, but not while one is being dealt with: nothing
    interrupts the cleaning up. (One that was lost, in an ``except:`` of some library or in a finalizer, can be sent
    again.) Signals that are ignored (nohup) stay ignored, and other threads than the main one have none."""

    def stop(number: int, frame: object) -> None:
        if not _is_stopping():
            raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def child(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own that ends with this one, however that ends, and with this block.

    It gets SIGTERM if the block is left while it runs; what is left of its session after :data:`GRACE` seconds gets
    SIGKILL. options: those of ``Popen``.
    """
    process = subprocess.Popen(
        command,
        env={**environment, LAUNCHER_ENV: identity()},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
        **options,
    )
    try:
        yield process
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of its session
        for pid in _started_by(identity()):  # in other sessions, and perhaps frozen: it cannot look at its launcher
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit status.

    SIGTERM, SIGHUP and SIGINT end it: first it gets SIGTERM, after :data:`GRACE` seconds everything in its session
    SIGKILL; the status is then 128 + the signal. A signal that is ignored (nohup) stays ignored.
    """
    try:
        with raising_signals(), child(command, environment) as process:
            return _status(process.wait())
    except Stopped as stopped:
        print(f"{signal.Signals(stopped.status - 128).name}: the training was stopped", file=sys.stderr, flush=True)
        return stopped.status


def _status(returncode: int) -> int:
    """As a shell has it: 128 + the signal for a process that a signal ended."""
    return returncode if returncode >= 0 else 128 - returncode
