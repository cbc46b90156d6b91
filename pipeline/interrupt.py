"""Ctrl-C while worker processes of this machine are at work: they leave it to this one, and end with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_WORKER = b"sdk_worker_main"  # what Beam starts


@contextlib.contextmanager
def workers_end_with_us() -> Iterator[None]:
    """Keeps Ctrl-C, which a terminal sends to every process of a command, from Beam's workers.

    Each would print a traceback of its own, and Beam one for each worker that is gone. When this
    process is interrupted it kills them: a file that is not published yet is never seen.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of signals
        return
    python, handler, hook = sys.executable, signal.getsignal(signal.SIGINT), threading.excepthook

    def stop(number: int, frame: FrameType | None) -> None:
        # At once: Beam, as it ends, would close the workers' line, and they would say so.
        threading.excepthook = lambda _: None
        for worker in _workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        raise KeyboardInterrupt

    # Beam gives this to a shell as the beginning of a worker's command. What is ignored when Python
    # starts stays ignored.
    sys.executable = f"trap '' INT; exec {shlex.quote(python)}"
    signal.signal(signal.SIGINT, stop)
    try:
        yield
        threading.excepthook = hook
    finally:
        sys.executable = python
        signal.signal(signal.SIGINT, handler)


def _workers() -> list[int]:
    """The worker processes that this one has started; none where there is no /proc to tell."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if _WORKER in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found
