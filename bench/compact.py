"""What `earmark compact` takes of a large output.

    python bench/compact.py 1000000
    python bench/compact.py 1000000 --shards 10 --record

Makes an output of so many rows in the schema of `earmark annotate` (float32 scores of 527 labels; members in no
order), then runs the command as a process: wall time, CPU time, peak memory. With one shard all of its row groups
overlap, and are merged on disk. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.record import append_results, machine, table  # noqa: E402
from pipeline.ledger import describe_run, labels_parquet  # noqa: E402
from pipeline.options import AnnotateOptions  # noqa: E402
from student.checkpoint import read_checkpoint  # noqa: E402
from transforms.output import LocalOutput  # noqa: E402
from transforms.write import RowOptions, clips_schema, tags_of, write_rows  # noqa: E402


def make(folder: Path, rows: int, shards: int) -> None:
    """An output of so many rows."""
    checkpoint = read_checkpoint("bundled")
    thresholds = (0.5,) * len(checkpoint.labels)
    options = RowOptions(thresholds)
    made = describe_run(
        AnnotateOptions(inputs=("x",), output=str(folder)), checkpoint, thresholds, "float32", {}
    )
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(made))
    (folder / "labels.parquet").write_bytes(labels_parquet(checkpoint.labels, thresholds))
    schema = clips_schema(len(thresholds), 1, options)
    rng = np.random.default_rng(0)

    def of_shard(shard: int) -> Iterator[dict[str, Any]]:
        count = rows * (shard + 1) // shards - rows * shard // shards
        for number in rng.permutation(count).tolist():
            scores = rng.random(len(thresholds), np.float32) ** 40
            yield dict.fromkeys(schema.names) | {
                "clip_id": f"shard-{shard:05d}-0123456789ab/clip-{number:08d}.flac",
                "shard": f"shard-{shard:05d}.tar", "member": f"clip-{number:08d}.flac",
                "duration_s": 10.0, "sample_rate": 16_000, "channels": 1, "codec": "flac",
                "audio_xxh128": f"{number:032x}", "peak_dbfs": -3.0, "rms_dbfs": -20.0,
                "tags": tags_of(scores, checkpoint.labels, options), "scores": scores,
            }  # fmt: skip

    for shard in range(shards):
        name = f"clips/shard-{shard:05d}-0123456789ab.parquet"
        write_rows(of_shard(shard), schema, LocalOutput(str(folder)), name, json.dumps(made))


def measure(rows: int, shards: int) -> dict[str, Any]:
    """What one compaction took."""
    with tempfile.TemporaryDirectory(prefix="earmark-bench-") as folder:
        source, target = Path(folder) / "tags", Path(folder) / "few"
        # In a process of its own: a child's peak begins with what its parent holds.
        making = multiprocessing.get_context("spawn").Process(
            target=make, args=(source, rows, shards)
        )
        making.start()
        making.join()
        size = sum(file.stat().st_size for file in (source / "clips").iterdir())
        command = [sys.executable, "-m", "pipeline", "compact", str(source), "--to", str(target)]
        with tempfile.TemporaryFile() as said:
            started = time.monotonic()
            process = subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=said)
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            done = json.load(said)
        return {
            "rows": rows, "shards": shards, "source_mib": round(size / 2**20),
            "files": len(done["files"]), "row_groups": sum(f["row_groups"] for f in done["files"]),
            "wall_s": round(wall_s, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "peak_mib": round(used.ru_maxrss / 1024),
        }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1])
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    about = machine()
    found = [measure(given.rows, shards) for shards in given.shards]
    print(json.dumps({"machine": about, "runs": found}, indent=2))
    if given.record:
        head = ("shards", "MiB", "files", "row groups", "s", "CPU s", "peak MiB")
        cells = ("shards", "source_mib", "files", "row_groups", "wall_s", "cpu_s", "peak_mib")
        lines = table(head, [[run[cell] for cell in cells] for run in found])
        append_results(f"`bench/compact.py`, {given.rows:,} rows", about, lines)


if __name__ == "__main__":
    main()
