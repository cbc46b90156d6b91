"""Whether a clip costs the same however many there are, and what planning a million shards costs.

    python bench/scale.py clips      1, 10 and 100 times as many clips: time a clip, peak memory
    python bench/scale.py shards     as many clips in shards of 10 to 10,000
    python bench/scale.py workers    one worker and two
    python bench/scale.py plan       1,000,000 names of shards: time, memory, the pipeline's description
    python bench/scale.py all --record

Runs are processes of `earmark annotate` on the local disk with the bundled student. Clips are
2 s of noise, FLAC at 16 kHz; shards of one size are one file under many names. Time a clip is
that of the shards (`shard_msec`), what came before the first clip is told apart; peak memory is
that of the largest process. Runs take turns, three rounds, medians. `flat` says whether time a
clip and peak memory stay within 10 % of the smallest run's. `plan` is told of a local folder of
empty files, and of a listing of the stand-in for Cloud Storage. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.cloud import TIMEOUT_S, TWO_PROCESSES  # noqa: E402
from bench.record import append_results, machine, table  # noqa: E402
from bench.stand_ins import CloudStorage  # noqa: E402

FLAT = 0.1
DIFFERENT_CLIPS = 50  # noise is slow to make; each is there again and again


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["clips", "shards", "workers", "plan", "all"])
    parser.add_argument("--checkpoint", default="bundled")
    parser.add_argument("--clips", type=int, default=200, help="of the smallest run of `clips`")
    parser.add_argument("--clip-s", type=float, default=2.0)
    parser.add_argument("--clips-per-shard", type=int, default=100, help="of `clips`, `workers`")
    parser.add_argument("--total", type=int, default=10_000, help="clips of `shards`, `workers`")
    parser.add_argument(
        "--shard-sizes", type=int, nargs="+", default=[10, 100, 1_000, 10_000], help="of `shards`"
    )
    parser.add_argument("--names", type=int, default=1_000_000, help="of `plan`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"machine": machine(), "checkpoint": args.checkpoint}
    lines: list[str] = []
    for what, bench in (
        ("clips", bench_clips),
        ("shards", bench_shards),
        ("workers", bench_workers),
        ("plan", bench_plan),
    ):
        if args.what in (what, "all"):
            result[what] = bench(args)
            lines += ["", *(plan_table if what == "plan" else run_table)(result[what])]
    print(json.dumps(result, indent=1))
    if args.record:
        about = (
            f"Checkpoint {args.checkpoint}, clips of {args.clip_s} s, {args.rounds} rounds in turn."
        )
        title = f"`scale.py {args.what}`"
        append_results(title, result["machine"], [about, *lines])


# --------------------------------------------------------------------------- runs


def bench_clips(args: argparse.Namespace) -> dict[str, Any]:
    runs = {}
    for times in (1, 10, 100):
        clips = times * args.clips
        runs[f"{clips} clips"] = (clips, min(args.clips_per_shard, args.clips), ())
    return taken_in_turn(args, runs)


def bench_shards(args: argparse.Namespace) -> dict[str, Any]:
    runs = {
        f"shards of {size}": (args.total, size, ())
        for size in args.shard_sizes
        if size <= args.total
    }
    return taken_in_turn(args, runs)


def bench_workers(args: argparse.Namespace) -> dict[str, Any]:
    size = min(args.clips_per_shard, args.total)
    result = taken_in_turn(
        args, {"1 worker": (args.total, size, ()), "2 workers": (args.total, size, TWO_PROCESSES)}
    )
    one, two = (result["runs"][name]["wall_s"] for name in ("1 worker", "2 workers"))
    return {**result, "two_workers_times_as_fast": round(one / two, 2)}


def taken_in_turn(
    args: argparse.Namespace, runs: dict[str, tuple[int, int, tuple[str, ...]]]
) -> dict[str, Any]:
    """Runs each (clips, clips in a shard, options) `--rounds` times; gives the medians."""
    with tempfile.TemporaryDirectory(prefix="earmark-scale-") as name:
        folder = Path(name)
        found: dict[str, list[dict[str, float]]] = {run: [] for run in runs}
        for number in range(args.rounds):
            for run, (clips, size, options) in runs.items():
                shards = folder / f"{clips}-of-{size}"
                if not shards.exists():
                    make_shards(shards, clips, size, args.clip_s)
                output = folder / f"{len(found[run])}-{run.replace(' ', '-')}"
                found[run].append(annotated(shards, output, args.checkpoint, clips, options))
                print(f"round {number + 1}, {run}: {found[run][-1]}", file=sys.stderr, flush=True)
    medians = {
        run: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
        for run, all_ in found.items()
    }
    first = next(iter(medians.values()))
    flat = {
        key: all(abs(one[key] / first[key] - 1) <= FLAT for one in medians.values())
        for key in ("ms_a_clip", "peak_mb")
    }
    return {"runs": medians, "flat": flat, "all": found}


def make_shards(folder: Path, clips: int, size: int, clip_s: float) -> None:
    """`clips` clips in tars of `size`; the last one may hold fewer."""
    noise = np.random.default_rng(0)
    encoded = []
    for _ in range(min(size, DIFFERENT_CLIPS)):
        audio = io.BytesIO()
        soundfile.write(audio, noise.normal(0, 0.1, int(clip_s * 16_000)), 16_000, format="FLAC")
        encoded.append(audio.getvalue())
    folder.mkdir()
    written: dict[int, Path] = {}  # clips -> a tar of so many
    for number, first in enumerate(range(0, clips, size)):
        tar, held = folder / f"noise-{number:06d}.tar", min(size, clips - first)
        if held in written:
            os.link(written[held], tar)
            continue
        written[held] = tar
        with tarfile.open(tar, "w") as opened:
            for clip in range(held):
                content = encoded[clip % len(encoded)]
                info = tarfile.TarInfo(f"{clip:06d}.flac")
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))


def annotated(
    shards: Path, output: Path, checkpoint: str, clips: int, options: tuple[str, ...]
) -> dict[str, float]:
    """Time and peak memory of a run of its own process."""
    command = [sys.executable, "-m", "pipeline", "annotate", str(shards), "--output", str(output)]
    command += ["--checkpoint", checkpoint, "--device", "cpu", *options]
    said = output.with_suffix(".log")
    with said.open("wb") as log:
        files = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        started = time.monotonic()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pid = os.posix_spawn(sys.executable, command, env, file_actions=files)
        _, status, usage = os.wait4(pid, 0)
        process_s = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}: {said.read_text()[-2_000:]}")
    summary = json.loads((output / "summary.json").read_text())
    if (summary["clips"], summary["failed"]) != (clips, 0):
        raise SystemExit(f"{output} holds {summary['clips']} clips, {summary['failed']} failed")
    # Until it becomes another program, a child counts its parent's memory as its own.
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise SystemExit("this process is larger than what it measures: its peak memory is unknown")
    shards_s = summary["metrics"]["shard_msec"]["sum"] / 1_000
    return {
        "clips": clips,
        "shards": summary["metrics"]["shards"],
        "ms_a_clip": round(1_000 * shards_s / clips, 3),
        "wall_s": summary["wall_s"],  # of the pipeline
        "process_s": round(process_s, 3),  # with the start of Python
        "cpu_ms_a_clip": round(1_000 * (usage.ru_utime + usage.ru_stime) / clips, 3),
        "peak_mb": round(usage.ru_maxrss / 1_024, 1),
    }


def run_table(result: dict[str, Any]) -> list[str]:
    head = ["run", "shards", "ms a clip", "pipeline, s", "process, s", "CPU ms a clip", "peak, MB"]
    rows = [
        [
            run, one["shards"], round(one["ms_a_clip"], 2), round(one["wall_s"], 1),
            round(one["process_s"], 1), round(one["cpu_ms_a_clip"], 2), round(one["peak_mb"]),
        ]
        for run, one in result["runs"].items()
    ]  # fmt: skip
    lines = table(head, rows)
    if "two_workers_times_as_fast" in result:
        return [*lines, "", f"Two workers are {result['two_workers_times_as_fast']} times as fast."]
    flat = {key: "yes" if value else "no" for key, value in result["flat"].items()}
    return [
        *lines,
        "",
        f"Within 10 % of the first: time {flat['ms_a_clip']}, memory {flat['peak_mb']}.",
    ]


# ------------------------------------------------------------------------- planning


def bench_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What `cloud.py look` sees of as many names, in a process of its own each."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="earmark-names-") as name, CloudStorage("in") as cloud:
        names = [f"train/speech-and-music-{number:07d}.tar" for number in range(args.names)]
        (Path(name) / "train").mkdir()
        for file in names:
            os.close(os.open(f"{name}/{file}", os.O_CREAT | os.O_WRONLY))
        cloud.put_many("in", names)
        for place, pattern in (
            ("local", f"{name}/train/*.tar"),
            ("listing", "gs://in/train/*.tar"),
        ):
            done = subprocess.run(
                [sys.executable, str(ROOT / "bench" / "cloud.py"), "look", "plan", pattern],
                cwd=ROOT, env={**os.environ, **cloud.env}, capture_output=True, text=True,
                timeout=4 * TIMEOUT_S,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
            found[place] = json.loads(done.stdout)
            print(f"{place}: {found[place]}", file=sys.stderr, flush=True)
    return found


def plan_table(found: dict[str, Any]) -> list[str]:
    head = ["names from", "shards", "time, s", "resident above the start, MB"]
    head += ["Python's own peak, MB", "plan packed, bytes", "pipeline's description, bytes"]
    rows = [
        [
            {"local": "a local folder", "listing": "the stand-in's listing"}[place],
            f"{one['shards']:,}",
            one["wall_s"],
            one["resident_peak_above_mb"],
            one["python_peak_mb"],
            f"{one['packed_bytes']:,}",
            f"{one['pipeline_proto_bytes']:,}",
        ]
        for place, one in found.items()
    ]
    return table(head, rows)


if __name__ == "__main__":
    main()
