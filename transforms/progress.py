"""Counts that workers leave in a folder for whoever watches a local run.

Beam's local runners say nothing until the end, and their workers may be threads
or processes; a small file per worker serves both.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

_INTERVAL_S = 0.3


@dataclass
class Progress:
    """What has been done so far."""

    clips: int = 0
    failed: int = 0
    audio_s: float = 0.0
    bytes: int = 0  # of encoded audio; with the shards' sizes this gives the time left
    shards: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(
            self.clips + other.clips,
            self.failed + other.failed,
            self.audio_s + other.audio_s,
            self.bytes + other.bytes,
            self.shards + other.shards,
        )


class ProgressFile:
    """One worker's counts, written to `folder` at most a few times a second."""

    def __init__(self, folder: str | None) -> None:
        # A worker on another machine has no such folder, and nobody watches it there.
        watched = folder is not None and Path(folder).is_dir()
        self._file = (
            Path(folder or "") / f"{os.getpid()}-{uuid.uuid4().hex}.json" if watched else None
        )
        self._written_at = 0.0
        self.counts = Progress()

    def write(self, *, now: bool = False) -> None:
        """Writes the counts if the last time is long enough ago, or if `now`."""
        if not self._file or (not now and time.monotonic() - self._written_at < _INTERVAL_S):
            return
        self._written_at = time.monotonic()
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self.counts)))
        partial.replace(self._file)


def read_progress(folder: Path) -> Progress:
    """The sum over all workers."""
    total = Progress()
    for file in folder.glob("*.json"):
        total += Progress(**json.loads(file.read_text()))
    return total
