"""Kills a run again and again, and compares what is left with an undisturbed run.

    python bench/kill.py --kills 20

Each run is started into the same output and gets SIGKILL at a random moment after
it began to score; when an output is complete it is compared and a new one begun.
Prints JSON; exits with 1 if a row is missing, doubled or different.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--clips", type=int, default=150, help="clips in a shard")
    parser.add_argument("--checkpoint", default="bundled")
    parser.add_argument(
        "--max-delay", type=float, default=4.0, help="s between first score and kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)

    with tempfile.TemporaryDirectory(prefix="earmark-kill-") as name:
        folder = Path(name)
        write_shards(folder / "shards", args.shards, args.clips, args.seed)
        expected = folder / "undisturbed"
        started = time.monotonic()
        finish(annotate(folder / "shards", expected, args.checkpoint))
        wall_s = time.monotonic() - started

        kills = outputs = wrong = 0
        output = folder / "output-0"
        while True:
            run = annotate(folder / "shards", output, args.checkpoint)
            if kills < args.kills and killed(run, output, chance.uniform(0, args.max_delay)):
                kills += 1
                continue
            finish(run)
            outputs += 1
            wrong += not table_of(output).equals(table_of(expected))
            if kills >= args.kills:
                break
            output = folder / f"output-{outputs}"

        rows = table_of(output)
        result = {
            "kills": kills,
            "outputs_completed_and_compared": outputs,
            "outputs_that_differ": wrong,
            "clips": args.shards * args.clips,
            "rows": rows.num_rows,
            "duplicates": rows.num_rows - len(set(rows["clip_id"].to_pylist())),
            "undisturbed_wall_s": round(wall_s, 1),
        }
    print(json.dumps(result))
    good = not wrong and not result["duplicates"] and result["rows"] == result["clips"]
    return 0 if good else 1


def write_shards(folder: Path, shards: int, clips: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"noise-{shard:05d}.tar", "w") as tar:
            for clip in range(clips):
                wave = noise.normal(0, 0.1, int(noise.uniform(0.5, 3.0) * 16_000))
                audio = io.BytesIO()
                soundfile.write(audio, wave, 16_000, format="wav")
                info = tarfile.TarInfo(f"clip-{shard:05d}-{clip:05d}.wav")
                info.size = len(audio.getvalue())
                audio.seek(0)
                tar.addfile(info, audio)


def annotate(shards: Path, output: Path, checkpoint: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "annotate", str(shards)]
    command += ["--output", str(output), "--checkpoint", checkpoint, "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(run: subprocess.Popen[bytes]) -> None:
    if run.wait():
        raise SystemExit(f"{run.args} ended with {run.returncode}")


def killed(run: subprocess.Popen[bytes], output: Path, delay_s: float) -> bool:
    """Kills `run` some time after its first file was begun; False if it was done before."""
    while not any((output / "clips").glob(f".*.{run.pid}.*.partial")):
        if run.poll() is not None:
            return False
        time.sleep(0.01)
    time.sleep(delay_s)
    run.send_signal(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


def table_of(output: Path) -> pa.Table:
    files = sorted((output / "clips").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files).sort_by("clip_id")


if __name__ == "__main__":
    sys.exit(main())
