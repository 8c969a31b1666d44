"""One run at a time in an output folder: a lock that the kernel drops when the last process of a run has ended.

The launcher and each rank of a run hold the lock together (flock, shared); a new run asks for it alone. A crashed run
leaves the file behind and no lock. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path

from .errors import UsageError
from .files import user_path

LOCK = ".packing_run.lock"
LOCK_ENV = "LLAVA_PACKING_RUN_LOCK"


class RunLock:
    """The lock of ``output_dir``.

    Args:
        output_dir: made if it is not there.
        run: what the launchers of one run on several machines have in common (where they meet); None for one machine.
        argument: what named the folder.

    Raises:
        UsageError: while another run has it, with its process, machine and start.
    """

    def __init__(self, output_dir: str | os.PathLike, run: str | None = None, argument: str = "output_dir") -> None:
        folder = user_path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        self._file = _opened(self.path)
        if not _locked(self._file, fcntl.LOCK_EX):
            owner = _owner(self._file)
            if run is None or owner.get("run") != run or not _locked(self._file, fcntl.LOCK_SH):
                os.close(self._file)
                raise UsageError(
                    f"{argument}: another run writes into {folder}: process {owner.get('pid', '(unknown)')} on "
                    f"{owner.get('machine', '(unknown)')}, since {owner.get('started', '(unknown)')}. "
                    f"Wait for it, stop it, or use another {argument}"
                )
            return
        owner = {"pid": os.getpid(), "machine": os.uname().nodename, "run": run}
        owner["started"] = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)
        if not _locked(self._file, fcntl.LOCK_SH):  # another launcher came between the two
            os.close(self._file)
            raise UsageError(f"{argument}: another run has just started in {folder}")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove the file where nobody else has it any more, and let go."""
        if _locked(self._file, fcntl.LOCK_EX):
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def hold(path: str | os.PathLike) -> int:
    """In a rank: hold the lock that the launcher has taken, as long as this process lives; returns the descriptor."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = _opened(Path(path))
    _locked(file, fcntl.LOCK_SH)
    return file


def _opened(path: Path) -> int:
    """Open the file that has this name once it is open: a run that ends may remove it in between."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                return file
        except FileNotFoundError:
            pass
        os.close(file)


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        print("output_dir: this file system has no locks, so a second run there would not be noticed", flush=True)
    return True


def _owner(file: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:  # it is being written
        return {}
    return found if isinstance(found, dict) else {}
