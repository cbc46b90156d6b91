"""How much of what the model alone could do is left from FLAC shards on disk to Parquet.

    python bench/throughput.py --device cuda --record
    python bench/throughput.py --device cuda --processes 1 2 4 6

The model alone: `Student.score` over decoded clips of 10 s in memory, features and copies
included. The pipeline: the command `earmark annotate`, a process of its own, over WebDataset tars
of 16 kHz FLAC (sounds of the corpus, put one behind the other). Its rate is that between the
published files (`bench.command`), so starting Python and loading are not in it; the whole
command's time is told too. Every tar is one file under many names. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.command import annotated  # noqa: E402
from bench.peers import corpus_clips, make_checkpoint, make_material  # noqa: E402
from bench.record import append_results, machine, table  # noqa: E402
from student.model import Student  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a folder; made where none is given")
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "corpus")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--different", type=int, default=32, help="clips, that are there again and again"
    )
    parser.add_argument("--clips-per-shard", type=int, default=1_024)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[0],
        help="that share a GPU; 0: as the command has it",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="earmark-throughput-") as name:
        work = Path(name)
        waves = list(itertools.islice(corpus_clips(args.corpus), args.different))
        checkpoint = args.checkpoint or work / "checkpoint"
        if args.checkpoint is None:
            make_checkpoint(checkpoint, 0, waves[:16])
        tar = make_material(work, waves, max(1, args.clips_per_shard // len(waves))).many
        shards = work / "shards"
        shards.mkdir()
        for number in range(args.shards):
            os.link(tar, shards / f"clips-{number:05d}.tar")
        alone, found = [], {most: [] for most in args.processes}
        for number in range(args.rounds):
            alone.append(model_alone(checkpoint, args.device, waves))
            say(f"round {number + 1}, model alone: {alone[-1]:.0f} clips/s")
            for most in args.processes:
                output = work / f"{number}-{most}"
                found[most].append(annotated(shards, output, checkpoint, args.device, most))
                say(f"round {number + 1}, {most} processes: {found[most][-1]}")
    model = statistics.median(alone)
    result = {
        "machine": machine(),
        "device": args.device,
        "clips": found[args.processes[0]][0]["clips"],
        "rounds": args.rounds,
        "model_alone_clips_s": round(model, 1),
        "model_alone_all": [round(one, 1) for one in alone],
        "pipeline": {
            f"{most}": {
                **{key: statistics.median(one[key] for one in runs) for key in ("clips_s", "whole_clips_s", "process_s")},
                "all": [one["clips_s"] for one in runs],
                "share_of_model_alone": round(statistics.median(one["clips_s"] for one in runs) / model, 3),
                "profile": runs[-1]["profile"],
            }
            for most, runs in found.items()
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.record:
        append_results(f"`throughput.py` on {args.device}", result["machine"], markdown(result))


def model_alone(checkpoint: Path, device: str, waves: list[np.ndarray]) -> float:
    """Clips a second of a student in a process of its own, so that nothing of it stays on the GPU."""
    code = (
        "import sys, json, time, numpy as np; sys.path.insert(0, sys.argv[1]); "
        "from bench.throughput import scored; scored(*sys.argv[2:])"
    )
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, np.stack(waves))
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(checkpoint), device, file.name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def scored(checkpoint: str, device: str, file: str) -> None:
    """Prints clips a second of `Student.score`, warm."""
    student, waves = Student.load(checkpoint, device), np.load(file)
    many = list(
        itertools.islice(
            itertools.cycle(waves), 16 * student.max_batch if student.device.type == "cuda" else 4
        )
    )
    student.score(many)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 3:
        student.score(many)
        done += len(many)
    print(done / (time.perf_counter() - started))


def markdown(result: dict[str, Any]) -> list[str]:
    head = [
        "processes that share the GPU",
        "clips/s",
        "all rounds",
        "of the model alone",
        "whole command, clips/s",
    ]
    rows = [
        ["as the command has it" if most == "0" else most, one["clips_s"], one["all"],
         f"{100 * one['share_of_model_alone']:.0f} %", one["whole_clips_s"]]
        for most, one in result["pipeline"].items()
    ]  # fmt: skip
    return [
        f"{result['clips']:,} clips of 10 s, {result['rounds']} rounds in turn. The model alone: "
        f"{result['model_alone_clips_s']} clips/s ({result['model_alone_all']}).",
        "",
        *table(head, rows),
    ]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
