"""Runs `earmark annotate` as a user does, in a process of its own, for the benchmarks of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EDGE = 4  # files: several processes begin and end together


def annotated(
    shards: Path,
    output: Path,
    checkpoint: Path,
    device: str,
    most: int = 0,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Clips a second between the published files, and of the whole command.

    Args:
        shards: a folder of shards alike.
        output: a folder that is not there yet.
        checkpoint: a folder.
        device: of `--device`.
        most: processes that share a GPU; 0: as the command has it.
        dtype: of `--dtype`.
    """
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "annotate",
        str(shards),
        "--output",
        str(output),
    ]
    command += ["--checkpoint", str(checkpoint), "--device", device, "--dtype", dtype, "--profile"]
    if most:
        command += ["--processes-per-gpu", str(most)]
    started = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    process_s = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")
    summary = json.loads((output / "summary.json").read_text())
    if summary["failed"]:
        raise SystemExit(f"{summary['failed']} clips failed: {summary}")
    published = sorted(file.stat().st_mtime for file in (output / "clips").glob("*.parquet"))
    # Where one is published, the other processes have more or less of theirs done: in the middle
    # of a run that evens out.
    middle = published[EDGE:-EDGE] if len(published) > 3 * EDGE else published
    between = summary["clips"] * (len(middle) - 1) / len(published)
    return {
        "clips": summary["clips"],
        "clips_s": round(between / max(1e-9, middle[-1] - middle[0]), 1),
        "whole_clips_s": round(summary["clips"] / process_s, 1),
        "process_s": round(process_s, 2),
        "profile": summary.get("profile"),
    }
