"""Numbers that the worker processes of one machine share out among themselves."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import IO

_held: dict[Path, tuple[int, IO[str]]] = {}  # by folder; open for as long as this process lives
_lock = threading.Lock()


def claim_number(folder: Path, numbers: int) -> int:
    """A number below `numbers` that no other process with this folder has.

    It is this process's until it ends, however it ends: the lock is the kernel's.

    Args:
        folder: of this run alone, on this machine's disk.
        numbers: how many there are.

    Raises:
        RuntimeError: all are taken.
    """
    with _lock:
        if folder in _held:
            return _held[folder][0]
        for number in range(numbers):
            file = (folder / f"device-{number}.lock").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held[folder] = number, file
            return number
    raise RuntimeError(
        f"all {numbers} worker processes of this run are there, and this is one more: "
        "--devices and --processes-per-gpu say how many; leave out --direct_num_workers"
    )
