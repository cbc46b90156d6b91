"""What `earmark report` and `earmark compare` take of large outputs.

    python bench/report.py 100000
    python bench/report.py 1000000 --no-compare --record

Makes outputs of so many rows in the schema of `earmark annotate` (float32 scores of 527 labels, 10,000 rows a shard,
1 % failed) and one tar of 10,000 MP3 of 4 s that stands behind every shard, so that a clip has a copy in each, then
runs the commands as processes: wall time, CPU time, peak memory, bytes of the page. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import xxhash

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.record import append_results, machine, table  # noqa: E402
from pipeline.ledger import describe_run, labels_parquet  # noqa: E402
from pipeline.options import AnnotateOptions  # noqa: E402
from student.checkpoint import read_checkpoint  # noqa: E402
from transforms.output import LocalOutput  # noqa: E402
from transforms.write import RowOptions, clips_schema, tags_of, write_rows  # noqa: E402

ROWS_PER_SHARD = 10_000
DIFFERENT_SOUNDS = 50
CLIP_S, SAMPLE_RATE = 4, 16_000
FAILED = 0.01


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--no-compare", action="store_true", help="leave out earmark compare")
    parser.add_argument("--folder", type=Path, help="where outputs are made [default: temporary]")
    parser.add_argument("--record", action="store_true", help="append a table to RESULTS.md")
    arguments = parser.parse_args(argv)
    about = machine()
    runs: list[dict[str, Any]] = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            runs += measured(Path(folder), rows, compare=not arguments.no_compare)
    print(json.dumps({"machine": about, "runs": runs}, indent=2))
    if arguments.record:
        head = ["rows", "command", "wall, s", "CPU, s", "peak memory, MB", "page, MB", "output, MB"]
        lines = table(head, [list(run.values()) for run in runs])
        append_results("reports", about, lines)


def measured(folder: Path, rows: int, *, compare: bool) -> list[dict[str, Any]]:
    """The commands on outputs of `rows` rows."""
    shards = -(-rows // ROWS_PER_SHARD)
    sounds = write_tars(folder / "shards", shards)
    write_output(folder / "a", folder / "shards", rows, sounds, 0.0)
    size_mb = round(sum(f.stat().st_size for f in folder.glob("a/clips/*")) / 1e6)
    runs = []
    for command in (["report", folder / "a"], ["report", folder / "a", "--no-audio"]):
        run = timed(command)
        page_mb = round((folder / "a" / "report.html").stat().st_size / 1e6, 1)
        said = " ".join(["report", *map(str, command[2:])])
        runs.append(
            {"rows": rows, "command": said, **run, "page_mb": page_mb, "output_mb": size_mb}
        )
    if compare:
        write_output(folder / "b", folder / "shards", rows, sounds, 0.1)
        page = folder / "compare.html"
        run = timed(["compare", folder / "a", folder / "b", "--to", page])
        page_mb = round(page.stat().st_size / 1e6, 1)
        runs.append(
            {"rows": rows, "command": "compare", **run, "page_mb": page_mb, "output_mb": size_mb}
        )
    return runs


def timed(command: list[Any]) -> dict[str, Any]:
    """Wall and CPU time and peak memory of a command."""
    program = [sys.executable, "-m", "pipeline", *map(str, command)]
    started = time.monotonic()
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(program)}: {said}")
    return {
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1e3),
    }


def write_tars(folder: Path, shards: int) -> list[str]:
    """One tar under as many names; gives the hashes of its clips."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    sounds, hashes = [], []
    for _ in range(DIFFERENT_SOUNDS):
        file = io.BytesIO()
        soundfile.write(
            file, 0.1 * random.standard_normal(CLIP_S * SAMPLE_RATE), SAMPLE_RATE, format="MP3"
        )
        sounds.append(file.getvalue())
    with tarfile.open(folder / "s-000.tar", "w") as tar:
        for clip in range(ROWS_PER_SHARD):
            # An ID3v1 tag of its own makes each other bytes.
            content = sounds[clip % len(sounds)] + f"TAG{clip:06d}".encode().ljust(128, b"\0")
            hashes.append(xxhash.xxh128_hexdigest(content))
            info = tarfile.TarInfo(f"{clip:06d}.mp3")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for shard in range(1, shards):
        (folder / f"s-{shard:03d}.tar").hardlink_to(folder / "s-000.tar")
    return hashes


def write_output(folder: Path, shards: Path, rows: int, sounds: list[str], shift: float) -> None:
    """An output as `earmark annotate` writes it; `shift` moves all logits at random."""
    checkpoint = read_checkpoint("bundled")
    labels = checkpoint.labels
    thresholds = (0.2,) * len(labels)
    run = describe_run(
        AnnotateOptions(inputs=(str(shards),), output=str(folder)),
        checkpoint,
        thresholds,
        "float32",
        {},
    )
    text = json.dumps(run)
    folder.mkdir()
    (folder / "run.json").write_text(text)
    (folder / "labels.parquet").write_bytes(labels_parquet(labels, thresholds))
    options = RowOptions(thresholds)
    schema = clips_schema(len(labels), 0, options)
    output = LocalOutput(str(folder))
    for shard in range(-(-rows // ROWS_PER_SHARD)):
        count = min(ROWS_PER_SHARD, rows - shard * ROWS_PER_SHARD)
        of_shard = made_rows(
            shard, count, shards / f"s-{shard:03d}.tar", labels, options, sounds, shift
        )
        write_rows(of_shard, schema, output, f"clips/s-{shard:03d}-0123456789ab.parquet", text)


def made_rows(
    shard: int,
    count: int,
    tar: Path,
    labels: Any,
    options: RowOptions,
    sounds: list[str],
    shift: float,
) -> Iterator[dict[str, Any]]:
    random, moved = np.random.default_rng(shard), np.random.default_rng(shard + 10**6)
    # Labels are as unequal as they are in the world.
    base = np.sort(np.random.default_rng(0).normal(-7, 1.2, len(labels)))[::-1].astype(np.float32)
    failed = random.random(count) < FAILED
    for row in range(count):
        logits = base + 1.6 * random.standard_normal(len(labels), np.float32)
        logits += np.float32(shift) * moved.standard_normal(len(labels), np.float32)
        scores = 1 / (1 + np.exp(-logits))
        member = f"{row:06d}.mp3"
        error = {"stage": "decode", "type": "InvalidDataError", "message": "Invalid data"}
        yield {
            "clip_id": f"s-{shard:03d}-0123456789ab/{member}", "shard": str(tar), "member": member,
            "start_s": None, "end_s": None, "duration_s": float(random.gamma(4, 2)), "sample_rate": 44_100, "channels": 1 + row % 2,
            "codec": "mp3", "audio_xxh128": sounds[row], "peak_dbfs": float(-abs(random.normal(0, 4))),
            "rms_dbfs": float(random.normal(-22, 8)),
            "tags": None if failed[row] else tags_of(scores, labels, options),
            "scores": None if failed[row] else scores, "metadata": None,
            "error": error if failed[row] else None,
        }  # fmt: skip


if __name__ == "__main__":
    main()
