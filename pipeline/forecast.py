"""What a run will come to: a sample of its clips, this machine at work on them, and a projection.

What is drawn stands for the rest, so every number has a range: how far it would be from
another draw (a bootstrap), and how far this machine's speed may drift.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import __version__, dataflow
from pipeline.expected import COMPARED, FORMAT
from pipeline.options import UsageError
from pipeline.plan import Todo
from pipeline.profile import SIDES
from pipeline.quantities import counted
from pipeline.run import Job, annotate, annotation_of, empty_pipeline
from student.checkpoint import read_json
from student.model import Student
from transforms.annotate import annotate_shard, load_student, pool_of
from transforms.decode_pool import DecodePool
from transforms.meter import Meter
from transforms.output import LocalOutput, publish_bytes
from transforms.progress import ProgressFile
from transforms.records import EncodedClip, Shard, UnreadableClip, as_text, audio_bytes_in, clips_in
from transforms.sample import Part, Reservoir, Taken, draw_shards, extent_of, read_part
from transforms.storage import public_url
from transforms.write import CLIPS_FOLDER, RUN_FILE

INTERVAL = 0.8  # how often the truth is to be within a range
# How far a machine's speed is taken to be from what a look of seconds shows, and how far where
# other work wants its cores too.
SPEED_DRIFT, BUSY_DRIFT = 0.1, 0.35
BUSY_LOAD = 1.3  # processes that want to run, for each core
TABLE_DRIFT = 0.03  # how far a large table's bytes a row are taken to be from a small one's

_DRAWS = 32  # parts of shards of one kind
_PART_BYTES = 4 << 20
_CENSUS_BYTES = 96 << 20  # inputs up to this are read whole
_ROW_BYTES = 200_000  # that a manifest's clip is taken to have: six seconds of 16-bit PCM
_READ_S = 12.0  # for all reading
_MEASURE_S = 20.0  # for one pass over the sample
_ENOUGH_S = 5.0  # of passes, so that a fast student's speed can be told
_PASSES = 3
_REPLICATES = 1_000
_SHARDS_DEALT = 100_000  # past it, all shards are taken to be alike
_TOTALS = ("clips", "audio_bytes", "audio_s", "chunks", "failed", "cost_s")
_IMPORTED_AT = time.monotonic()
_CORRELATED = 0.5  # from which bytes say more of a clip's seconds than the mean does

# What a GPU's tensor cores do at most in 16 bits, TFLOP/s without sparsity: NVIDIA's data
# sheets of T4, L4, A100 and H100 SXM.
GPU_TFLOP_S = {
    "nvidia-tesla-t4": 65.0,
    "nvidia-l4": 121.0,
    "nvidia-tesla-a100": 312.0,
    "nvidia-a100-80gb": 312.0,
    "nvidia-h100-80gb": 989.0,
}

# The share of it that an AST reaches. Hugging Face's documentation of AST states 40 ms (eager)
# and 14 ms (SDPA) for a batch of 8 of AST-base on an A100; at 261 GFLOP a clip these are 52 and
# 149 of its 312 TFLOP/s. They are said to be float32, whose peak there is 19.5: so they are no
# more than a hint. An H200 reached 45 % of its 989 by this code's model alone, and 24 to 29 %
# from FLAC to Parquet (bench/RESULTS.md).
GPU_SHARES = (0.17, 0.48)
GPU_SOURCE = (
    "no GPU of this type was measured: between 17 % and 48 % of the card's 16-bit peak, which is what the published "
    "times of AST-base on an A100 come to (40 and 14 ms for 8 clips, Hugging Face's documentation of "
    "AST), scaled by this student's operations; decoding as measured here, on one core to all vCPUs "
    "of the machine. Try a few shards before you trust it"
)
GPU_STARTUP_S = (180.0, 900.0)  # machine, driver, image: deploy/README.md says ten minutes and more


@dataclass(frozen=True)
class Range:
    """A number and the ends of its 80 % interval."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Each multiplied."""
        return Range(self.expected * factor, self.low * factor, self.high * factor)

    def plus(self, term: float) -> Range:
        """Each with `term` added."""
        return Range(self.expected + term, self.low + term, self.high + term)

    def as_json(self, digits: int = 3) -> dict[str, float]:
        """For `estimate.json`."""
        return {name: round(value, digits) for name, value in vars(self).items()}


@dataclass
class Stratum:
    """Shards of one kind, and what was read of them."""

    kind: str
    extent: float = 0.0  # of all shards of the kind, of `extent_of`
    in_clips: bool = True  # whether `extent` is clips
    size_bytes: float = 0.0
    shards: int = 0
    drawn: list[Shard] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)

    @property
    def is_census(self) -> bool:
        """Whether all of it was read."""
        return len(self.parts) == self.shards and all(part.whole for part in self.parts)


@dataclass(frozen=True)
class Sample:
    """Clips that stand for all of the input."""

    strata: list[Stratum]
    clips: list[tuple[int, Taken]]  # (stratum, clip), in random order
    read_s: float


@dataclass(frozen=True)
class Measured:
    """This machine at work on the sample.

    Attributes:
        durations_s: of each clip of the sample that was reached; None where it failed.
        chunks: of each of them.
        pass_s: seconds of each pass over them.
        pass_cpu_s: of all cores, that this process took for them.
        stages_s: seconds of a pass by stage, of `pipeline.profile.SIDES`.
        row_bytes: of the table, for a clip.
        file_bytes: of a table without rows.
        file_s: to make one.
        startup_s: of a run without shards (Beam, and the student loaded), and of its first batch.
    """

    durations_s: list[float | None]
    chunks: list[int]
    pass_s: list[float]
    pass_cpu_s: list[float]
    stages_s: dict[str, float]
    row_bytes: float
    file_bytes: int
    file_s: float
    startup_s: float
    startup_cpu_s: float
    load: float  # processes that wanted to run, on average, before the measuring


# ------------------------------------------------------------------------ the sample


def draw_sample(job: Job, size: int, seed: int, say: Callable[[str], None]) -> Sample:
    """Draws `size` clips of the shards to do, each as likely as any other.

    Raises:
        UsageError: a shard cannot be read.
    """
    started = time.monotonic()
    strata = _strata(job.todo)
    total = sum(stratum.size_bytes for stratum in strata) or 1
    census = total <= _CENSUS_BYTES
    for number, stratum in enumerate(strata):
        say(f"reading a sample of {counted(stratum.shards, 'shard')} ({stratum.kind})")
        # A kind that is a tenth of the input has a tenth of the time, but never none.
        share = max(0.1, stratum.size_bytes / total)
        ends = time.monotonic() + _READ_S * share
        _read_stratum(job, stratum, size, seed + number, census, ends)
    chosen: list[tuple[int, Taken]] = []
    chance = random.Random(seed)
    clips = [_clips_of(stratum) for stratum in strata]
    for number, stratum in enumerate(strata):
        wanted = round(size * clips[number] / (sum(clips) or 1))
        if stratum.taken:
            wanted = min(max(wanted, 1), len(stratum.taken))
            chosen += [(number, taken) for taken in chance.sample(stratum.taken, wanted)]
    chance.shuffle(chosen)
    return Sample(strata, chosen, time.monotonic() - started)


def _strata(todo: Todo) -> list[Stratum]:
    """Kinds of shards; loose files, manifests and limited shards are measured in clips, the others in bytes."""
    found: dict[tuple[str, bool], Stratum] = {}
    for shard in todo:
        in_clips = clips_in(shard) is not None
        stratum = found.setdefault((shard.kind, in_clips), Stratum(shard.kind, in_clips=in_clips))
        stratum.extent += extent_of(shard)
        stratum.size_bytes += _guessed_bytes(shard)
        stratum.shards += 1
    return list(found.values())


def _read_stratum(
    job: Job, stratum: Stratum, size: int, seed: int, census: bool, ends: float
) -> None:
    def of_kind() -> Iterator[Shard]:
        for shard in job.todo:
            in_clips = clips_in(shard) is not None
            if (shard.kind, in_clips) == (stratum.kind, stratum.in_clips):
                yield shard

    reservoir = Reservoir(size, random.Random(seed))
    if census and stratum.shards <= 10_000:
        drawn = list(of_kind())
        random.Random(seed).shuffle(drawn)  # should the time not suffice for all
    else:
        drawn = draw_shards(of_kind(), _DRAWS, seed)
        # Few large shards: several parts of each.
        census = False
        drawn = [drawn[place % len(drawn)] for place in range(_DRAWS)] if drawn else []
    each_s = max(0.5, (ends - time.monotonic()) / max(1, len(drawn)))
    for shard in drawn:
        now = time.monotonic()
        if stratum.parts and now > ends:
            break
        try:
            part = read_part(
                shard,
                len(stratum.parts),
                reservoir,
                max_bytes=None if census else _PART_BYTES,
                until=now + (ends - now if census else each_s),
                access=job.access,
            )
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{public_url(shard.uri)!r} cannot be read: {reason}") from error
        if part is not None:
            stratum.parts.append(part)
    stratum.taken = reservoir.kept


def _clips_of(stratum: Stratum) -> float:
    extent = sum(part.extent for part in stratum.parts)
    return stratum.extent * sum(part.clips for part in stratum.parts) / extent if extent else 0.0


# --------------------------------------------------------------------- this machine


def measure(job: Job, sample: Sample, say: Callable[[str], None]) -> Measured:
    """Runs the sample here as a worker would, into a folder that is removed again.

    Raises:
        CheckpointError, DeviceError: the student cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="earmark-") as folder:
        output = LocalOutput(str(Path(folder) / "out"))
        publish_bytes(output, RUN_FILE, job.run.encode())
        annotation = replace(
            annotation_of(job, folder), output=output.uri, run=job.run, worker_processes=1
        )
        say("starting a run without shards")
        load, started, cpu_s = load_average(), time.monotonic(), time.process_time()
        root = empty_pipeline(job.beam_options)
        annotate(root, Todo(), annotation)
        root.run().wait_until_finish()
        beam_s = time.monotonic() - started
        student = load_student(annotation, "cuda:0" if annotation.device == "cuda" else None)
        started = time.monotonic()
        # The first batch lays out memory and kernels, once a run.
        silence = np.zeros(student.features.chunk_samples, np.float32)
        student.score([silence] * student.max_batch)
        startup = beam_s + time.monotonic() - started, time.process_time() - cpu_s
        say(f"tagging {len(sample.clips):,} clips here")
        pool = pool_of(annotation, student.features)
        try:
            return _passes(sample, student, annotation, output, pool, startup, load)
        finally:
            if pool is not None:
                pool.close()


def _passes(
    sample: Sample,
    student: Student,
    annotation: Any,
    output: LocalOutput,
    pool: DecodePool | None,
    startup: tuple[float, float],
    load: float,
) -> Measured:
    def timed(name: str, clips: Sequence[Taken], ends: float | None) -> tuple[float, Meter]:
        meter = Meter()
        shard = Shard(name, name, "files", 0)
        started = time.perf_counter()
        annotate_shard(
            shard, student, annotation, output, ProgressFile(None), meter,
            pool=pool, clips=_until(clips, ends),
        )  # fmt: skip
        return time.perf_counter() - started, meter

    empty = [timed(f"empty-{number}", (), None)[0] for number in range(3)]
    file_bytes = (Path(output.uri) / CLIPS_FOLDER / "empty-0.parquet").stat().st_size
    clips = [taken for _, taken in sample.clips]
    pass_s: list[float] = []
    pass_cpu_s: list[float] = []
    stages: list[dict[str, float]] = []
    since = time.monotonic()
    for number in range(_PASSES):
        if number and time.monotonic() - since > _ENOUGH_S:
            break
        ends = since + _MEASURE_S if not number else None
        cpu_s = time.process_time()
        seconds, meter = timed(f"sample-{number}", clips, ends)
        pass_cpu_s.append(time.process_time() - cpu_s)
        pass_s.append(max(1e-6, seconds - statistics.median(empty)))
        _, values = meter.take()
        stages.append(
            {
                stage: sum(values.get(f"{stage}_usec", ())) / 1e6
                for of_side, _ in SIDES.values()
                for stage in of_side
            }
        )
        if not number:
            file = Path(output.uri) / CLIPS_FOLDER / "sample-0.parquet"
            durations_s = pq.read_table(file, columns=["duration_s", "tags"]).to_pylist()
            clips = clips[: len(durations_s)]
            row_bytes = (file.stat().st_size - file_bytes) / max(1, len(clips))
    # A clip that was decoded in part has an error, and scores and tags too.
    scored = [row["duration_s"] if row["tags"] is not None else None for row in durations_s]
    hop = annotation.hop_samples or student.features.chunk_samples
    hop_s = hop / student.features.sample_rate
    return Measured(
        durations_s=scored,
        chunks=[0 if s is None else _chunks(s, student.features.chunk_s, hop_s) for s in scored],
        pass_s=pass_s,
        pass_cpu_s=pass_cpu_s,
        stages_s={name: statistics.median(of[name] for of in stages) for name in stages[0]},
        row_bytes=row_bytes,
        file_bytes=file_bytes,
        file_s=statistics.median(empty),
        startup_s=startup[0],
        startup_cpu_s=startup[1],
        load=load,
    )  # fmt: skip


def _chunks(duration_s: float, chunk_s: float, hop_s: float) -> int:
    """How many chunks `transforms.chunk.cut_chunks` makes of a clip, which is at least one."""
    return 1 + max(0, math.ceil((duration_s - chunk_s) / hop_s - 1e-6))


def _until(clips: Sequence[Taken], ends: float | None) -> Iterator[EncodedClip | UnreadableClip]:
    for taken in clips:
        if ends is not None and time.monotonic() > ends:
            return
        if isinstance(taken.clip, EncodedClip):
            taken.clip.audio.seek(0)
        yield taken.clip


# ---------------------------------------------------------------------- a projection


def project(
    job: Job,
    sample: Sample,
    measured: Measured,
    *,
    before_s: float,
    before_cpu_s: float,
    workers: Sequence[int],
    gpu: str | None = None,
    price_per_hour: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What the run will come to, as `estimate.json` holds it.

    Args:
        job: of `pipeline.run.prepare`.
        sample: of `draw_sample`.
        measured: of `measure`.
        before_s: what a run takes before it begins: Python, imports, listing, checks.
        before_cpu_s: of all cores.
        workers: how many machines such as this one, each way.
        gpu: a type of Dataflow's, instead of this machine.
        price_per_hour: of one worker.
        seed: of the bootstrap.
    """
    random_numbers = np.random.default_rng(seed)
    reached = sample.clips[: len(measured.durations_s)]
    totals = _totals(sample.strata, reached, measured, random_numbers)
    clips = _range(totals["clips"])
    per_clip = {stage: s / max(1, len(reached)) for stage, s in measured.stages_s.items()}
    read_parts = [part for stratum in sample.strata for part in stratum.parts]
    read_clips = sum(part.clips for part in read_parts)
    per_clip["read"] += sum(part.read_s for part in read_parts) / max(1, read_clips)
    busy = measured.load > BUSY_LOAD * _cores()
    drift = 1 + (BUSY_DRIFT if busy else SPEED_DRIFT) * random_numbers.uniform(
        -1, 1, _REPLICATES + 1
    )
    drift[0] = 1.0
    if gpu is None:
        cost_s = totals["cost_s"] * drift
        # The sample lay in memory: storage that is slower than all else sets the pace.
        feeding_s = sum(per_clip[stage] for stage in SIDES["decoding"][0]) * totals["clips"] * drift
        # The sample was one process's; several share the machine's GPU, which then may bind.
        processes = job.workers.processes
        decoders = processes * max(1, job.workers.decode_processes)
        scoring_s = (
            sum(per_clip[stage] for stage in ("features", "model")) * totals["clips"] * drift
        )
        work_s = np.maximum(cost_s, feeding_s / max(1, job.workers.decode_processes))
        # What one process alone takes of the GPU is in its own time.
        of_gpu_s = scoring_s / job.workers.devices if processes > 1 else np.zeros_like(scoring_s)
        binds = _binds(per_clip, decoders, processes)
        startup = Range(measured.startup_s, measured.startup_s * 0.8, measured.startup_s * 1.3)
        source = None
    else:
        work_s, binds = _on_gpu(job, gpu, per_clip, totals, random_numbers)
        processes, of_gpu_s = 1, np.zeros_like(work_s)
        low, high = GPU_STARTUP_S
        startup = Range(math.sqrt(low * high), low, high)
        source = GPU_SOURCE
    todo = job.todo
    work_s = work_s + todo.shards * measured.file_s
    sizes = _sizes(todo)
    ladder = []
    for count in workers:
        # A shard is one process's; what the processes of a machine share is its GPU.
        share = _longest_share(sizes, todo.shards, count * processes)
        machine_s = of_gpu_s * _longest_share(sizes, todo.shards, count)
        run = _range(np.maximum(work_s * share, machine_s))
        run = Range(run.expected + startup.expected, run.low + startup.low, run.high + startup.high)
        wall = run.plus(before_s)
        hours = wall.times(count / 3_600)
        entry: dict[str, Any] = {
            "workers": count,
            "wall_s": wall.as_json(1),
            "run_s": run.as_json(3),
            "worker_h": hours.as_json(4),
        }
        if price_per_hour is not None:
            entry["cost"] = hours.times(price_per_hour).as_json(4)
        ladder.append(entry)
    tables = 1 + TABLE_DRIFT * random_numbers.uniform(-1, 1, _REPLICATES + 1)
    tables[0] = 1.0
    output_bytes = _range(
        tables * totals["clips"] * measured.row_bytes + todo.shards * measured.file_bytes
    )
    # What this process would take of all cores: other work beside it changes that least.
    cpu_share = statistics.median(measured.pass_cpu_s) / statistics.median(measured.pass_s)
    cpu_s = before_cpu_s + measured.startup_cpu_s + cpu_share * float(totals["cost_s"][0])
    about = json.loads(job.run)
    scoring = {name: about["scoring"][name] for name in COMPARED}
    if gpu is not None:
        scoring["dtype"] = dataflow.GPUS[dataflow.parse_gpu(gpu)[0]].dtype
    return {
        "format": FORMAT,
        "earmark": __version__,
        "inputs": [as_text(public_url(name)) for name in job.options.inputs],
        "scoring": scoring,
        "checkpoint": about["checkpoint"]["name"],
        "device": gpu or job.workers.device,
        "dtype": scoring["dtype"],
        "machine": {"cores": _cores(), "processor": platform.machine(), "load": round(measured.load, 2), "busy": busy},
        "source": source,
        "seed": seed,
        "interval": INTERVAL,
        "sample": {
            "parts": len(read_parts),
            "read_clips": read_clips,
            "read_s": round(sample.read_s, 3),
            "tagged_clips": len(reached),
            "passes_s": [round(s, 3) for s in measured.pass_s],
            "all_read": all(stratum.is_census for stratum in sample.strata),
        },
        "shards": todo.shards,
        "skipped_shards": job.skipped,
        "input_bytes": todo.size_bytes,
        "input_rows": todo.rows,
        "clips": clips.as_json(0),
        "failed": _range(totals["failed"]).as_json(1),
        "audio_bytes": _range(totals["audio_bytes"]).as_json(0),
        "audio_s": _range(totals["audio_s"]).as_json(1),
        "chunks": _range(totals["chunks"]).as_json(0),
        "output_bytes": output_bytes.as_json(0),
        "binds": binds,
        "ms_per_clip": {stage: round(1e3 * s, 4) for stage, s in per_clip.items()},
        "before_s": round(before_s, 3),
        "startup_s": startup.as_json(),
        "cpu_s": round(cpu_s, 3),
        "price_per_hour": price_per_hour,
        "workers": ladder,
    }  # fmt: skip


def _totals(
    strata: Sequence[Stratum],
    reached: Sequence[tuple[int, Taken]],
    measured: Measured,
    chance: np.random.Generator,
) -> dict[str, NDArray[np.float64]]:
    """Totals over all strata: the first value as found, the others of bootstrap replicates."""
    sums = {name: np.zeros(_REPLICATES + 1) for name in _TOTALS}
    # A pass's seconds belong to its chunks, and to clips without any that were decoded in vain.
    effort = [max(count, 0.1) for count in measured.chunks]
    passes = np.array(measured.pass_s)
    unit_s = np.full(_REPLICATES + 1, np.median(passes) / sum(effort) if effort else 0.0)
    if effort and len(passes) > 1:
        drawn = chance.integers(len(passes), size=(_REPLICATES, len(passes)))
        unit_s[1:] = passes[drawn].mean(axis=1) / sum(effort)
    for number, stratum in enumerate(strata):
        places = [place for place, (of, _) in enumerate(reached) if of == number]
        if not stratum.parts:
            continue
        parts = np.array([(p.extent, p.clips, p.audio_bytes) for p in stratum.parts], float)
        chosen = _weights(len(parts), chance, fixed=stratum.is_census or stratum.in_clips)
        extent, clips_read, audio_read = (chosen @ parts).T
        clips = stratum.extent * clips_read / np.maximum(extent, 1e-9)
        if stratum.in_clips:
            clips = np.full(_REPLICATES + 1, stratum.extent)
        sums["clips"] += clips
        sums["audio_bytes"] += clips * audio_read / np.maximum(clips_read, 1e-9)
        if not places:
            continue
        kept = np.array(
            [
                (
                    1.0,
                    getattr(reached[place][1].clip, "size_bytes", 0),
                    measured.durations_s[place] or 0.0,
                    measured.chunks[place],
                    measured.durations_s[place] is None,
                    effort[place],
                )
                for place in places
            ],
            float,
        )
        if stratum.is_census:
            # Only which clips were tagged is chance, and the more of all, the less.
            weights = _weights(len(kept), chance)
            left = math.sqrt(max(0.0, 1 - len(kept) / max(1.0, clips[0])))
            weights = weights[0] + (weights - weights[0]) * left
        else:
            # Neighbours are alike: parts are drawn anew, with all of their clips.
            of_part = np.array([reached[place][1].part for place in places])
            weights = chosen[:, of_part] if not stratum.in_clips else _clusters(of_part, chance)
        count, size, audio_s, chunks, failed, work = (weights @ kept).T
        # A clip's seconds go with its bytes where all are of a kind, and bytes are known of many more.
        together = _correlation(kept[:, 1], kept[:, 2])
        if together > _CORRELATED and audio_read[0] > 0:
            base = clips * (audio_read / np.maximum(clips_read, 1e-9)) / np.maximum(size, 1e-9)
        else:
            base = clips / np.maximum(count, 1e-9)
        sums["audio_s"] += base * audio_s
        sums["chunks"] += base * chunks
        sums["failed"] += clips / np.maximum(count, 1e-9) * failed
        sums["cost_s"] += base * work * unit_s
    return sums


def _weights(
    count: int, chance: np.random.Generator, *, fixed: bool = False
) -> NDArray[np.float64]:
    """[1 + replicates, count]: how often each is drawn; once each in the first row."""
    weights = np.ones((_REPLICATES + 1, count))
    if not fixed:
        weights[1:] = chance.multinomial(count, np.full(count, 1 / count), size=_REPLICATES)
    return weights


def _clusters(of_part: NDArray[Any], chance: np.random.Generator) -> NDArray[np.float64]:
    """Weights of clips whose parts are drawn anew, each with all of its clips."""
    names, places = np.unique(of_part, return_inverse=True)
    return _weights(len(names), chance)[:, places]


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if len(one) < 8 or not one.std() or not other.std():
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _range(values: NDArray[np.float64]) -> Range:
    edge = (1 - INTERVAL) / 2
    low, high = np.quantile(values[1:], [edge, 1 - edge])
    expected = float(values[0])
    return Range(expected, min(float(low), expected), max(float(high), expected))


def _binds(per_clip: Mapping[str, float], decoders: int, processes: int = 1) -> str:
    """The stage that takes longest on the side that takes longer."""
    sides = {side: sum(per_clip[stage] for stage in stages) for side, (stages, _) in SIDES.items()}
    sides["decoding"] /= decoders
    if processes > 1:  # they share the GPU, and each writes
        sides["model"] -= per_clip["write"] * (1 - 1 / processes)
    stages, _ = SIDES[max(sides, key=lambda side: sides[side])]
    return max(stages, key=lambda stage: per_clip[stage])


def _on_gpu(
    job: Job,
    gpu: str,
    per_clip: Mapping[str, float],
    totals: Mapping[str, NDArray[np.float64]],
    chance: np.random.Generator,
) -> tuple[NDArray[np.float64], str]:
    """(seconds of one worker with `gpu`, what binds)."""
    kind, count = dataflow.parse_gpu(gpu)
    _, vcpus = dataflow.GPUS[kind].machines[count]
    flop = flop_per_chunk(read_json(job.checkpoint.directory / "config.json"))

    def spread(low: float, high: float) -> NDArray[np.float64]:
        values = np.exp(chance.uniform(math.log(low), math.log(high), _REPLICATES + 1))
        values[0] = math.sqrt(low * high)
        return values

    rate = 1e12 * GPU_TFLOP_S[kind] * count * spread(*GPU_SHARES)
    model_s = totals["chunks"] * flop / rate
    feeding = sum(per_clip[stage] for stage in SIDES["decoding"][0])
    decode_s = totals["clips"] * feeding / spread(1, max(2, vcpus))
    binds = (
        "model" if model_s[0] > decode_s[0] else _binds(per_clip | {"model": 0, "features": 0}, 1)
    )
    return np.maximum(model_s, decode_s), binds


def flop_per_chunk(config: Mapping[str, Any]) -> float:
    """Floating-point operations that the scores of a chunk need, of an AST's `config.json`.

    Of the last layer only two tokens are looked at (`student.engine`).
    """
    width, inner = config.get("hidden_size", 768), config.get("intermediate_size", 3_072)
    layers, patch = config.get("num_hidden_layers", 12), config.get("patch_size", 16)
    across = (config.get("num_mel_bins", 128) - patch) // config.get("frequency_stride", 10) + 1
    along = (config.get("max_length", 1_024) - patch) // config.get("time_stride", 10) + 1
    tokens = across * along + 2

    def layer(queries: int) -> float:
        projections = 2 * width * width * (2 * tokens + 2 * queries)
        return projections + 4 * queries * tokens * width + 4 * queries * width * inner

    patches = 2 * (tokens - 2) * patch**2 * width
    return float(patches + (layers - 1) * layer(tokens) + layer(2))


def _sizes(todo: Todo) -> list[float]:
    """Extents of the shards, empty where there are too many to deal one by one."""
    return [] if todo.shards > _SHARDS_DEALT else [_guessed_bytes(shard) for shard in todo]


def _guessed_bytes(shard: Shard) -> float:
    """Bytes of a shard's audio, which nobody knows of a manifest's before it is read."""
    rows = shard.manifest.rows if shard.manifest is not None else 0
    return audio_bytes_in(shard) + rows * _ROW_BYTES


def _longest_share(sizes: Sequence[float], shards: int, workers: int) -> float:
    """The share of all work that the last of `workers` to be done has had.

    Shards are taken one by one, in order, by whoever is free.
    """
    total = sum(sizes)
    if not sizes or not total:
        return math.ceil(max(1, shards) / workers) / max(1, shards)
    free = [0.0] * min(workers, len(sizes))
    for size in sizes:
        heapq.heapreplace(free, free[0] + size)
    return max(free) / total


def process_age_s() -> float:
    """Seconds since this process began, Python and its imports included; since this module, where
    the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine's start
        return float(Path("/proc/uptime").read_text().split()[0]) - began_s
    return time.monotonic() - _IMPORTED_AT


def load_average() -> float:
    """Processes that wanted to run in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
