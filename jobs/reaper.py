"""Ends what a private Ray leaves behind when its command is killed: `python -m jobs.reaper FOLDER`.

The command holds the other end of standard input, which closes when it ends in whatever way. Most of Ray ends
with it, but its agents wait for a control plane that is gone. Everything Ray starts keeps a log open in its
folder, which is how it is recognised: never by name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import psutil


def users_of(folder: Path, spared: set[int]) -> list[psutil.Process]:
    """Processes of this user with a file of `folder` open or in their command; `spared` are process ids."""
    inside = f"{folder}{os.sep}"
    found = []
    for process in psutil.process_iter():
        if process.pid in spared:
            continue
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is not ours
            opened = any(file.path.startswith(inside) for file in process.open_files())
            if opened or any(inside in word for word in process.cmdline()):
                found.append(process)
    return found


def end(processes: list[psutil.Process], patience_s: float = 3.0) -> None:
    """Terminate these processes, and kill those that are still there after a while."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s)


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. One that has, but whose parent has not noticed, does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def still_running(processes: list[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """Those of `processes` that have not ended by themselves after a while."""
    deadline = time.monotonic() + patience_s
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def clear(folder: Path, spared: set[int]) -> None:
    """End all users of `folder`, those they start meanwhile included, and remove it."""
    for _ in range(5):
        found = users_of(folder, spared)
        if not found:
            break
        end(found)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    folder, command = Path(sys.argv[1]), os.getppid()
    sys.stdin.read()
    # The command writes logs there too. If it still runs, it is waiting for us.
    clear(folder, spared={os.getpid(), command} if os.getppid() == command else {os.getpid()})


if __name__ == "__main__":
    main()
