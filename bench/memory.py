"""Peak memory of whole runs: many clips, and one very long one.

    python bench/memory.py

Runs `earmark annotate` as a process of its own on 1, 300 and 3,000 clips of 2 s
(tars of 300), and on one recording of an hour (44.1 kHz stereo FLAC). Prints JSON:
peak resident memory in MB and wall seconds of each. 3,000 clips may take no more
than 300, and the hour no more than a few chunks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

CLIPS_PER_TAR = 300


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="bundled")
    parser.add_argument("--hour-s", type=float, default=3_600, help="length of the long recording")
    args = parser.parse_args(argv)

    result: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    }
    with tempfile.TemporaryDirectory(prefix="earmark-memory-") as name:
        folder = Path(name)
        for clips in (1, CLIPS_PER_TAR, 10 * CLIPS_PER_TAR):
            source = folder / f"clips-{clips}"
            write_tars(source, clips)
            result[f"{clips} clips"] = run(source, folder / f"out-{clips}", args.checkpoint)
        long = folder / "long.flac"
        write_long(long, args.hour_s)
        result[f"one clip of {args.hour_s:.0f} s"] = run(long, folder / "out-long", args.checkpoint)
    print(json.dumps(result, indent=2))


def run(source: Path, output: Path, checkpoint: str) -> dict[str, float]:
    """Peak MB and wall seconds of one run."""
    command = [sys.executable, "-m", "pipeline", "annotate", str(source), "--output", str(output)]
    command += ["--checkpoint", checkpoint, "--device", "cpu"]
    started = time.monotonic()
    null = os.open(os.devnull, os.O_WRONLY)
    files = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=files)
    _, status, usage = os.wait4(pid, 0)
    os.close(null)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return {
        "peak_mb": round(usage.ru_maxrss / 1_024),
        "wall_s": round(time.monotonic() - started, 1),
    }


def write_tars(folder: Path, clips: int) -> None:
    noise = np.random.default_rng(0)
    folder.mkdir()
    for first in range(0, clips, CLIPS_PER_TAR):
        with tarfile.open(folder / f"noise-{first:06d}.tar", "w") as tar:
            for clip in range(first, min(clips, first + CLIPS_PER_TAR)):
                audio = io.BytesIO()
                soundfile.write(audio, noise.normal(0, 0.1, 32_000), 16_000, format="flac")
                info = tarfile.TarInfo(f"{clip:06d}.flac")
                info.size = len(audio.getvalue())
                audio.seek(0)
                tar.addfile(info, audio)


def write_long(file: Path, duration_s: float) -> None:
    noise = np.random.default_rng(0)
    with soundfile.SoundFile(file, "w", 44_100, 2, format="FLAC", subtype="PCM_16") as sound:
        for _ in range(int(duration_s)):
            sound.write(noise.normal(0, 0.1, (44_100, 2)))


if __name__ == "__main__":
    main()
