"""Measures Cloud Storage in and out, against the stand-in of `stand_ins.py` on loopback.

    python bench/cloud.py faults      rows, faults and retries with 10 % of requests going wrong
    python bench/cloud.py requests    requests a shard and a clip, and time beside the local disk
    python bench/cloud.py listing     time, requests and memory of planning up to 100,000 shards

Each prints JSON with the machine it ran on; `faults` exits with 1 if a row is missing,
doubled or different. Real Cloud Storage answers later than loopback does: requests can
be carried over to it, times cannot.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import datetime
import io
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.stand_ins import CloudStorage, Faults, Request  # noqa: E402

KINDS = ("503", "429", "reset", "stall", "truncate", "short")
BROKEN_EVERY = 50  # clips
MAX_RUNS = 10  # of one command, until it ends well
TIMEOUT_S = 1_800
TWO_PROCESSES = (
    "--runner", "DirectRunner", "--direct_num_workers", "2",
    "--direct_running_mode", "multi_processing",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    faults = commands.add_parser("faults", help="rows, faults and retries")
    faults.add_argument("--rate", type=float, default=0.1, help="share of requests that go wrong")
    faults.add_argument("--stall", type=float, default=5.0, help="s that a stalled answer stands")
    faults.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    faults.add_argument("--rounds", type=int, default=1, help="of each way to run")
    faults.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    requests = commands.add_parser("requests", help="requests and time, without faults")
    for command in (faults, requests):
        command.add_argument("--clips", type=int, default=1_000)
        command.add_argument("--checkpoint", default="bundled")
        command.add_argument("--seed", type=int, default=0)
    faults.add_argument("--clips-per-shard", type=int, default=25)
    requests.add_argument("--clips-per-shard", type=int, nargs="+", default=[25, 250])
    requests.add_argument("--rounds", type=int, default=3, help="of which the median time counts")
    listing = commands.add_parser("listing", help="time, requests and memory of planning")
    listing.add_argument("--objects", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    look = commands.add_parser("look")  # what `listing` runs in a process of its own
    look.add_argument("what", choices=["find", "plan"])
    look.add_argument("pattern")
    args = parser.parse_args(argv)
    if args.command == "look":
        print(json.dumps(look_at(args.what, args.pattern)))
        return 0
    result = {"faults": bench_faults, "requests": bench_requests, "listing": bench_listing}[
        args.command
    ](args)
    print(json.dumps({"machine": machine(), **result}, indent=1))
    return 1 if result.get("wrong") else 0


def machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "load_average_1_5_15_min": [round(load, 1) for load in os.getloadavg()],
    }


# ------------------------------------------------------------------- clips and rows


def make_shards(folder: Path, clips: int, clips_per_shard: int, seed: int) -> None:
    """Tars of noise of 0.5 to 3 s, WAV and FLAC in turn, one in `BROKEN_EVERY` broken."""
    noise = np.random.default_rng(seed)
    folder.mkdir()
    for first in range(0, clips, clips_per_shard):
        with tarfile.open(folder / f"noise-{first // clips_per_shard:05d}.tar", "w") as tar:
            for clip in range(first, min(first + clips_per_shard, clips)):
                kind = ("wav", "flac")[clip % 2]
                wave = noise.normal(0, 0.1, int(noise.uniform(0.5, 3.0) * 16_000))
                audio = io.BytesIO()
                soundfile.write(audio, wave, 16_000, format=kind)
                content = audio.getvalue()
                if clip % BROKEN_EVERY == BROKEN_EVERY // 2:
                    content = b"neither " + content[:100]
                info = tarfile.TarInfo(f"clip-{clip:05d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def upload(cloud: CloudStorage, folder: Path, prefix: str) -> None:
    for file in sorted(folder.iterdir()):
        cloud.put("in", f"{prefix}/{file.name}", file.read_bytes())


Rows = dict[tuple[str, str], list[dict[str, Any]]]


def rows_of(tables: Iterator[pa.Table]) -> Rows:
    """Rows by (shard's file name, member); `clip_id` and `shard` name the place, which differs."""
    rows: Rows = {}
    for table in tables:
        for row in table.to_pylist():
            del row["clip_id"]
            key = row.pop("shard").rpartition("/")[2], row["member"]
            rows.setdefault(key, []).append(row)
    return rows


def local_rows(output: Path) -> Rows:
    return rows_of(pq.read_table(file) for file in sorted((output / "clips").glob("*.parquet")))


def cloud_tables(cloud: CloudStorage, prefix: str, unreadable: list[str]) -> Iterator[pa.Table]:
    for name in cloud.names("out", f"{prefix}/clips/"):
        try:
            yield pq.read_table(io.BytesIO(cloud.get("out", name)))
        except (pa.ArrowException, OSError):
            unreadable.append(name)


def compare(expected: Rows, found: Rows) -> dict[str, int]:
    return {
        "missing": len(expected.keys() - found.keys()),
        "unexpected": len(found.keys() - expected.keys()),
        "doubled": sum(len(rows) - 1 for rows in found.values()),
        "different": sum(found[key][0] != expected[key][0] for key in expected.keys() & found),
    }


# ---------------------------------------------------------------------- running it


@dataclass
class Ended:
    code: int
    wall_s: float
    said: list[str]  # the last lines


def annotate(
    source: str, output: str, checkpoint: str, env: dict[str, str], *options: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "annotate", source, "--output", output]
    command += ["--checkpoint", checkpoint, "--device", "cpu", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(run: subprocess.Popen[str], started: float) -> Ended:
    try:
        _, said = run.communicate(timeout=TIMEOUT_S)
    finally:
        kill_all(run)
    return Ended(run.returncode, time.monotonic() - started, said.strip().splitlines()[-3:])


def kill_all(run: subprocess.Popen[str]) -> None:
    """Ends a run and the worker processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


@dataclass
class Tally:
    """What several runs of one command came to."""

    runs: int = 0
    kills: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    metrics: Counter[str] = field(default_factory=Counter)


def until_done(
    cloud: CloudStorage, prefix: str, checkpoint: str, shards: int, way: Way
) -> Tally:  # fmt: skip
    """Runs a command again, as its user would, until it ends well."""
    tally = Tally()
    place = f"gs://in/{prefix}/*.tar", f"gs://out/{prefix}", checkpoint, cloud.env
    while tally.runs < MAX_RUNS:
        tally.runs += 1
        started = time.monotonic()
        run = annotate(*place, *way.options)
        if way.kill and not tally.kills and killed(run, cloud, prefix, shards // 2):
            tally.kills += 1
            tally.wall_s += time.monotonic() - started
            continue
        twin = annotate(*place, *way.options) if way.twins and tally.runs == 1 else None
        both = [finish(each, started) for each in (run, twin) if each is not None]
        tally.wall_s += max(ended.wall_s for ended in both)
        tally.errors += [" | ".join(ended.said) for ended in both if ended.code]
        if not any(ended.code for ended in both):
            summary = json.loads(cloud.get("out", f"{prefix}/summary.json"))
            tally.metrics.update(
                {k: v for k, v in summary["metrics"].items() if isinstance(v, int)}
            )
            return tally
    raise SystemExit(f"did not end well in {MAX_RUNS} runs: {tally.errors}")


def killed(run: subprocess.Popen[str], cloud: CloudStorage, prefix: str, shards: int) -> bool:
    """Kills `run` once `shards` of its files are there; False if it was done before."""
    while len(cloud.names("out", f"{prefix}/clips/")) < shards:
        if run.poll() is not None:
            return False
        time.sleep(0.05)
    kill_all(run)
    assert run.stderr is not None
    run.stderr.close()
    return run.returncode == -signal.SIGKILL


# ---------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Way:
    """How it is run."""

    options: tuple[str, ...] = ()
    kill: bool = False  # in the middle, and gone on with
    twins: bool = False  # the same command twice at once, as a worker that was thought dead does it


WAYS = {
    "one_process": Way(),
    "two_processes": Way(TWO_PROCESSES),
    "killed": Way(kill=True),
    "twice_at_once": Way(twins=True),
}


def bench_faults(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="earmark-faults-") as name:
        folder = Path(name)
        make_shards(folder / "shards", args.clips, args.clips_per_shard, args.seed)
        shards = len(list((folder / "shards").iterdir()))
        ended = finish(
            annotate(f"{folder}/shards", f"{folder}/tags", args.checkpoint, {}), time.monotonic()
        )
        if ended.code:
            raise SystemExit(f"the undisturbed run failed: {ended.said}")
        expected = local_rows(folder / "tags")
        runs: list[dict[str, Any]] = []
        with CloudStorage("in", "out") as cloud:
            for way in args.ways:
                for number in range(-1, args.rounds):  # first without faults, to compare times
                    if number < 0 and (WAYS[way].kill or WAYS[way].twins):
                        continue
                    prefix = f"{way}-{number + 1}"
                    upload(cloud, folder / "shards", prefix)
                    seed = 1_000 * args.seed + 10 * number + list(WAYS).index(way)
                    cloud.faults = None if number < 0 else Faults(
                        rate=args.rate, kinds=tuple(args.kinds), seed=seed, stall_s=args.stall
                    )  # fmt: skip
                    cloud.requests.clear()
                    tally = until_done(cloud, prefix, args.checkpoint, shards, WAYS[way])
                    injected = dict(cloud.faults.counts) if cloud.faults else {}
                    requests = len(cloud.requests)
                    cloud.faults = None
                    runs.append(judged(cloud, prefix, expected, way, tally, injected, requests))
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        wrong = sum(run["wrong"] for run in runs)
        return {
            "checkpoint": args.checkpoint,
            "clips": args.clips,
            "shards": shards,
            "broken_clips": sum(rows[0]["error"] is not None for rows in expected.values()),
            "local_wall_s": round(ended.wall_s, 1),
            "fault_rate": args.rate,
            "stall_s": args.stall,
            "runs": runs,
            "faults_in_all": dict(sum((Counter(run["faults"]) for run in runs), Counter())),
            "requests_in_all": sum(run["requests"] for run in runs if run["faults"]),
            "wrong": wrong,
        }


def judged(
    cloud: CloudStorage, prefix: str, expected: Rows, way: str, tally: Tally,
    injected: dict[str, int], requests: int,
) -> dict[str, Any]:  # fmt: skip
    unreadable: list[str] = []
    rows = rows_of(cloud_tables(cloud, prefix, unreadable))
    differences = compare(expected, rows)
    return {
        "way": way,
        "rows": sum(map(len, rows.values())),
        **differences,
        "unreadable_files": len(unreadable),
        "wrong": sum(differences.values()) + len(unreadable),
        "requests": requests,
        "faults": injected,
        # Of the run that ended well; what a killed one had counted went with it.
        "retries_counted": {
            name: tally.metrics.get(name, 0)
            for name in ("read_retries", "write_retries", "list_retries", "shards_published_by_another")
        },
        "runs_of_the_command": tally.runs,
        "kills": tally.kills,
        "ended_with_an_error": tally.errors,
        "wall_s": round(tally.wall_s, 1),
    }  # fmt: skip


# ---------------------------------------------------------------------- requests


def bench_requests(args: argparse.Namespace) -> dict[str, Any]:
    results = []
    for clips_per_shard in args.clips_per_shard:
        with tempfile.TemporaryDirectory(prefix="earmark-requests-") as name:
            folder = Path(name)
            make_shards(folder / "shards", args.clips, clips_per_shard, args.seed)
            sizes = [file.stat().st_size for file in (folder / "shards").iterdir()]
            local_s, cloud_s = [], []
            with CloudStorage("in", "out") as cloud:
                upload(cloud, folder / "shards", "s")
                for number in range(args.rounds):  # in turn, so that both meet the same neighbours
                    annotated(f"{folder}/shards", f"{folder}/tags-{number}", args.checkpoint, {})
                    summary = (folder / f"tags-{number}" / "summary.json").read_bytes()
                    local_s.append(json.loads(summary)["wall_s"])
                    cloud.requests.clear()
                    place = f"s-{number}"
                    annotated("gs://in/s/*.tar", f"gs://out/{place}", args.checkpoint, cloud.env)
                    log = list(cloud.requests)
                    summary = cloud.get("out", f"{place}/summary.json")
                    cloud_s.append(json.loads(summary)["wall_s"])
            kinds = Counter(request.kind for request in log)
            shards = len(sizes)
            results.append(
                {
                    "clips": args.clips,
                    "shards": shards,
                    "clips_per_shard": clips_per_shard,
                    "mean_shard_bytes": round(sum(sizes) / shards),
                    "requests": len(log),
                    "by_kind": dict(kinds),
                    "by_kind_a_shard": {k: round(n / shards, 2) for k, n in kinds.items()},
                    "by_kind_a_clip": {k: round(n / args.clips, 4) for k, n in kinds.items()},
                    "by_purpose": dict(sorted(Counter(map(purpose_of, log)).items())),
                    # From the start of the pipeline to its end: not the start of Python.
                    "local_s": local_s,
                    "cloud_s": cloud_s,
                    "local_s_a_clip": round(statistics.median(local_s) / args.clips, 4),
                    "cloud_s_a_clip": round(statistics.median(cloud_s) / args.clips, 4),
                    "cloud_to_local": round(
                        statistics.median(cloud_s) / statistics.median(local_s), 2
                    ),
                }
            )
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return {"checkpoint": args.checkpoint, "results": results}


def annotated(source: str, output: str, checkpoint: str, env: dict[str, str]) -> None:
    ended = finish(annotate(source, output, checkpoint, env), time.monotonic())
    if ended.code:
        raise SystemExit(f"{source} to {output} failed: {ended.said}")


def purpose_of(request: Request) -> str:
    """What a request of an undisturbed run is for."""
    place = request.path.rpartition("/o/")[2] if "/o/" in request.path else request.path
    if request.kind == "list":
        where = "output" if "/b/out/" in request.path else "input"
        return f"list {where}"
    if request.kind == "read" and place.endswith(".tar"):
        return "read audio"
    if request.kind == "read" and "/clips/" in place:
        return "read footer, to sum up"
    if request.kind == "metadata" and "/clips/" in place:
        return "metadata of a shard's file, is it there"
    if request.kind == "read":
        return f"read {place.rpartition('/')[2]}"
    if request.kind in ("write", "write-start"):
        # A multipart upload names its object in the body, so this looks at nothing.
        return request.kind
    return f"{request.kind} {place.rpartition('/')[2]}"


# ---------------------------------------------------------------------- listing


def bench_listing(args: argparse.Namespace) -> dict[str, Any]:
    results = []
    for count in args.objects:
        with CloudStorage("in") as cloud:
            cloud.put_many("in", [f"train/speech-and-music-{n:07d}.tar" for n in range(count)])
            found: dict[str, Any] = {"objects": count}
            for what in ("find", "plan"):
                cloud.requests.clear()
                done = subprocess.run(
                    [sys.executable, __file__, "look", what, "gs://in/train/*.tar"],
                    cwd=ROOT, env={**os.environ, **cloud.env}, capture_output=True, text=True,
                    timeout=TIMEOUT_S,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(done.stderr)
                seen = json.loads(done.stdout)
                passes = seen.pop("passes")
                lists = sum(request.kind == "list" for request in cloud.requests)
                other = len(cloud.requests) - lists
                found[what] = {
                    **seen, "list_requests": lists / passes, "other_requests": other / passes
                }  # fmt: skip
            results.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    return {"results": results}


def look_at(what: str, pattern: str) -> dict[str, Any]:
    """Goes through a listing twice: for time and resident memory, and for Python's own memory."""
    import gc
    import tracemalloc

    from transforms.shards import find_shards, pack_shards
    from transforms.storage import cloud_client

    options = _options(pattern)
    cloud_client(None)  # what every command pays, whatever it lists
    shards = 0

    def look() -> Any:
        nonlocal shards
        if what == "find":
            shards = sum(1 for _ in find_shards([pattern], Counter()))
            return None
        from pipeline.plan import plan_inputs
        from transforms.meter import Meter
        from transforms.storage import DEFAULT_ACCESS

        planned = plan_inputs((pattern,), options, DEFAULT_ACCESS, set(), Meter())
        shards = planned.todo.shards
        return planned.todo

    import pipeline.run  # noqa: F401  before memory is looked at

    gc.collect()
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    started = time.monotonic()
    todo = look()
    wall_s = time.monotonic() - started
    peak = _resident_bytes("VmHWM")
    found: dict[str, Any] = {
        "shards": shards,
        "wall_s": round(wall_s, 2),
        "resident_before_mb": round(before / 1e6, 1),
        "resident_peak_above_mb": round((peak - before) / 1e6, 1),
    }
    if todo is not None:
        # The stand-in's objects are all empty; real ones have each its size and checksum.
        todo.packets = list(pack_shards(_unlike(todo)))
        found["packed_bytes"] = sum(map(len, todo.packets))
        found["pipeline_proto_bytes"] = _proto_bytes(todo)
    del todo
    tracemalloc.start()
    look()
    found["python_peak_mb"] = round(tracemalloc.get_traced_memory()[1] / 1e6, 2)
    return found | {"passes": 2}


def _unlike(shards: Iterable[Any]) -> Iterator[Any]:
    chance = random.Random(0)
    for shard in shards:
        checksum = base64.b64encode(chance.randbytes(4)).decode()
        size = chance.randrange(100_000_000, 1_000_000_000)
        yield dataclasses.replace(shard, size_bytes=size, checksum=checksum)


def _options(pattern: str) -> Any:
    from pipeline.options import AnnotateOptions

    return AnnotateOptions(inputs=(pattern,), output="gs://out/x")


def _proto_bytes(todo: Any) -> int:
    """Bytes of the pipeline's description, as a runner gets it."""
    import apache_beam as beam

    from pipeline.run import annotate as wire
    from transforms.annotate import Annotation
    from transforms.write import RowOptions

    root = beam.Pipeline(runner="FnApiRunner")
    digest = "0" * 64
    wire(
        root,
        todo,
        Annotation(
            "bundled", digest, digest, "cpu", "float32", "max",
            RowOptions((0.2,) * 527), "gs://out/x", json.dumps({"fingerprint": digest}),
        ),
    )  # fmt: skip
    return len(root.to_runner_api().SerializeToString())


def _resident_bytes(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{which}:\s*(\d+)", status, re.MULTILINE)[1])


if __name__ == "__main__":
    sys.exit(main())
