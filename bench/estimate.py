"""How near `earmark estimate` comes: it is asked, and then the same clips are annotated.

    python bench/estimate.py ../shared/corpus/permissive-0000[0-2].tar

Each input is taken as tars (`tars`), as loose files in folders of 200 (`files`) and as Parquet
(`parquet`), or all three beside each other (`mixed`). Estimate and run follow one upon the other, in
processes of their own, so that other work on the machine meets both. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import append_results, machine, table
from transforms.read import read_clips
from transforms.records import EncodedClip
from transforms.shards import plan_shards

WAYS = ("tars", "files", "parquet", "mixed")
NUMBERS = ("clips", "audio_s", "audio_bytes", "output_bytes", "wall_s")


def main(argv: list[str] | None = None) -> None:
    """Estimates and annotates, each way, and prints what was expected and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tars", nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["tars"])
    parser.add_argument("--rounds", type=int, default=1, help="each with another seed")
    parser.add_argument("--checkpoint", default="bundled")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--options", nargs="*", default=[], help="more, of both commands")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    about, results = machine(), []
    with tempfile.TemporaryDirectory() as name:
        for way in args.ways:
            inputs = inputs_of(args.tars, way, Path(name))
            for seed in range(args.rounds):
                output = Path(name) / f"out-{way}-{seed}"
                options = ["--checkpoint", args.checkpoint, "--output", str(output), *args.options]
                own = ["--sample", str(args.sample), "--seed", str(seed)]
                estimate_s = earmark("estimate", *inputs, *options, *own)
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                run_s = earmark("annotate", *inputs, *options)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                summary = json.loads((output / "summary.json").read_text())
                stated = json.loads((output / "estimate.json").read_text())
                result = {
                    "way": way,
                    "seed": seed,
                    "estimate_s": round(estimate_s, 1),
                    "whole_run_s": round(run_s, 1),
                    "expected_whole_run_s": stated["workers"][0]["wall_s"],
                    "cpu_s": {
                        "expected": stated["cpu_s"],
                        "actual": round(cpu_s, 2),
                        "ratio": round(cpu_s / stated["cpu_s"], 3),
                    },
                    "binds": stated["binds"],
                    "bottleneck": summary["profile"]["bottleneck"],
                    **summary["estimate"],
                }
                results.append(result)
                print(json.dumps(result), file=sys.stderr)
    print(json.dumps({"machine": about, "results": results}, indent=1))
    if args.record:
        append_results("`estimate.py`", about, markdown(results))


def inputs_of(tars: Sequence[str], way: str, folder: Path) -> list[str]:
    """The clips of `tars` in another form."""
    if way == "tars":
        return list(tars)
    forms = {"files": as_files, "parquet": as_parquet}
    third = max(1, len(tars) // 3)
    if way != "mixed":
        return [forms[way](tars, folder / way)]
    return [
        *tars[:third],
        as_files(tars[third : 2 * third], folder / "mixed-files"),
        as_parquet(tars[2 * third :], folder / "mixed-parquet"),
    ]


def as_files(tars: Sequence[str], folder: Path) -> str:
    """A folder of loose files."""
    number = 0
    for tar in tars:
        for shard in plan_shards([tar]).shards:
            for clip in read_clips(shard):
                if isinstance(clip, EncodedClip):
                    file = (
                        folder / f"{number // 200:03d}" / f"{number:06d}{Path(clip.member).suffix}"
                    )
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(clip.audio.read())
                    number += 1
    return str(folder)


def as_parquet(tars: Sequence[str], folder: Path) -> str:
    """A folder of Parquet files, one a tar, row groups of 50 clips."""
    folder.mkdir(parents=True)
    for tar in tars:
        for shard in plan_shards([tar]).shards:
            rows = [
                {
                    "audio": {"bytes": clip.audio.read(), "path": clip.member},
                    "note": str(clip.metadata),
                }
                for clip in read_clips(shard)
                if isinstance(clip, EncodedClip)
            ]
            audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            schema = pa.schema([("audio", audio), ("note", pa.string())])
            file = folder / f"{Path(tar).stem}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=50)
    return str(folder)


def earmark(*arguments: str) -> float:
    """Seconds that a command takes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.monotonic() - started


def markdown(results: Sequence[dict]) -> list[str]:
    """Lines for `RESULTS.md`: actual divided by expected, and whether it was in the range."""

    def ratio(of: dict) -> str:
        inside = of["low"] <= of["actual"] <= of["high"]
        return f"{of['ratio']:.2f}" + ("" if inside else "*")

    rows = []
    for of in results:
        whole = of["expected_whole_run_s"]
        numbers = [ratio(of[name]) for name in NUMBERS]
        rows.append(
            [
                of["way"],
                of["seed"],
                *numbers,
                f"{of['whole_run_s'] / whole['expected']:.2f}",
                f"{of['cpu_s']['ratio']:.2f}",
                of["estimate_s"],
                of["whole_run_s"],
                f"{of['binds']}, {of['bottleneck']}",
            ]
        )
    head = [
        "input", "seed", "clips", "audio", "bytes", "output", "time", "time of the command", "CPU time",
        "estimate took, s", "run took, s", "bottleneck said, was",
    ]  # fmt: skip
    return [
        "Actual divided by expected; * outside of the 80 % interval.",
        "",
        *table(head, rows),
    ]


if __name__ == "__main__":
    main()
