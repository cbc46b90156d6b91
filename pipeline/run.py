"""One run: the pipeline itself, and what stands around it in the output folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
)

from pipeline import __version__
from pipeline.options import DEFAULT_RUNNER, AnnotateOptions, UsageError
from student.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from student.labels import ancestors, audioset_ontology
from student.model import DeviceError, choose_device, choose_dtype
from transforms.annotate import AnnotateShards, Annotation
from transforms.decode import RESAMPLE_QUALITY
from transforms.records import Shard, as_text
from transforms.shards import InputError, Plan, limit_shards, outdated, plan_shards
from transforms.write import (
    CLIPS_FOLDER,
    RUN_FILE,
    RUN_KEY,
    RowOptions,
    ShardSummary,
    partial_of,
    read_summary,
    remove_abandoned,
)

LABELS_FILE = "labels.parquet"
SUMMARY_FILE = "summary.json"

_VERSIONS_OF = (
    "torch", "transformers", "apache-beam", "pyarrow", "numpy", "av", "soundfile", "soxr"
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can begin."""

    options: AnnotateOptions
    checkpoint: Checkpoint
    device: str
    dtype: str
    plan: Plan
    todo: list[Shard]  # the shards of the plan that have no file yet
    run: str  # what run.json says

    @property
    def finished(self) -> int:
        """Shards that an earlier run finished."""
        return len(self.plan.shards) - len(self.todo)


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    total: ShardSummary  # of everything in the output
    shards: int  # of this run alone
    clips: int  # of this run alone
    audio_s: float  # of this run alone
    wall_s: float

    @property
    def failure_ratio(self) -> float:
        """Share of clips in the output that failed."""
        return self.total.failed / self.total.clips if self.total.clips else 0.0


def annotate(root: beam.Pipeline, shards: list[Shard], annotation: Annotation) -> None:
    """The pipeline: shard descriptions in, a Parquet file each."""
    _ = root | "Shards" >> beam.Create(shards, reshuffle=False) | AnnotateShards(annotation)


def prepare(options: AnnotateOptions) -> Job:
    """Checks everything that can be checked before work begins, and plans it.

    Writes `run.json` and `labels.parquet` when the output is new.

    Raises:
        UsageError: an option, an input, the checkpoint, the device or the output
            cannot be used as asked.
    """
    if "://" in options.output or not options.output:
        raise UsageError(f"--output {options.output!r} is not a local folder")
    _pipeline(options.beam)  # Beam checks its options when a pipeline is made
    try:
        device = choose_device(options.device)
        dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
        checkpoint = read_checkpoint(options.checkpoint)
        plan = plan_shards(options.inputs, options.files_per_shard)
    except (CheckpointError, DeviceError, InputError) as error:
        raise UsageError(str(error)) from error
    if options.limit is not None:
        plan = Plan(limit_shards(plan.shards, options.limit), plan.ignored)

    run = describe_run(options, checkpoint, dtype)
    output = Path(options.output)
    try:
        if options.overwrite:
            _empty(output)
        claimed = _claim(output, run)
        if not (output / LABELS_FILE).exists():
            thresholds = _thresholds(options, checkpoint)
            _write_atomically(
                output / LABELS_FILE, lambda file: write_labels(file, checkpoint, thresholds)
            )
        remove_abandoned(output)
        done = {file.stem for file in (output / CLIPS_FOLDER).glob("*.parquet")}
    except OSError as error:
        raise UsageError(
            f"--output {options.output!r} cannot be written: {error.strerror}"
        ) from error
    _refuse_other_divisions(output, plan.shards, done)
    todo = [shard for shard in plan.shards if shard.id not in done]
    return Job(options, checkpoint, str(device), dtype, plan, todo, claimed)


def execute(job: Job, watch: Callable[[Job, Path], AbstractContextManager[Any]]) -> Outcome:
    """Runs the pipeline over the shards that have no file yet, then sums up the output.

    Args:
        watch: shows progress while its context lasts, from the files that workers
            leave in the given folder.
    """
    output = Path(job.options.output)
    started = time.monotonic()
    if job.todo:
        with tempfile.TemporaryDirectory(prefix="earmark-") as progress:
            annotation = Annotation(
                checkpoint=job.options.checkpoint,
                weights_sha256=job.checkpoint.weights_sha256,
                config_sha256=job.checkpoint.config_sha256,
                device=job.device,
                dtype=job.dtype,
                pool=job.options.pool,
                rows=_row_options(job.options, job.checkpoint),
                output=str(output.resolve()),
                run=job.run,
                progress_folder=progress,
            )
            with watch(job, Path(progress)):
                root = _pipeline(job.options.beam)
                annotate(root, job.todo, annotation)
                root.run().wait_until_finish()
    wall_s = time.monotonic() - started
    remove_abandoned(output)
    return _sum_up(output, {shard.id for shard in job.todo}, wall_s)


def describe_run(options: AnnotateOptions, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """What made an output: `run.json`, and the metadata of each of its files.

    `scoring` is all that changes a row; its hash is the `fingerprint`, and one
    output has one fingerprint.
    """
    thresholds = _thresholds(options, checkpoint)
    scoring = {
        "earmark": __version__,
        "weights_sha256": checkpoint.weights_sha256,
        "config_sha256": checkpoint.config_sha256,
        "labels": _digest([asdict(label) for label in checkpoint.labels]),
        "features": asdict(checkpoint.features),
        "dtype": dtype,
        "resample": f"soxr {RESAMPLE_QUALITY}",
        "chunk_samples": checkpoint.features.chunk_samples,
        "pool": options.pool,
        "thresholds": _digest(thresholds) if len(set(thresholds)) > 1 else thresholds[0],
        "top_k": options.top_k,
        "score_type": options.score_type,
        "chunks": options.chunks,
        "embeddings": options.embeddings,
        "limit": options.limit,
    }
    return {
        "earmark": __version__,
        "fingerprint": _digest(scoring),
        "checkpoint": {
            "name": as_text(checkpoint.name),
            "weights_sha256": checkpoint.weights_sha256,
            "labels": len(checkpoint.labels),
            "thresholds": "option" if options.threshold is not None
            else "checkpoint" if checkpoint.has_own_thresholds else "default",
        },
        "scoring": scoring,
        "thresholds": {label.name: t for label, t in zip(checkpoint.labels, thresholds, strict=True)},
        "inputs": [as_text(pattern) for pattern in options.inputs],
        "options": {
            name: value
            for name, value in asdict(options).items()
            if name not in ("inputs", "output", "checkpoint", "overwrite")
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS_OF},
    }  # fmt: skip


def write_labels(file: Path, checkpoint: Checkpoint, thresholds: tuple[float, ...]) -> None:
    """`labels.parquet`: what each index of `scores` means, with AudioSet's ontology above it."""
    ontology = audioset_ontology()

    def names(mids: tuple[str, ...]) -> list[str]:
        return [ontology[mid].name for mid in mids]

    rows = [
        {
            "index": label.index,
            "mid": label.mid or None,
            "name": label.name,
            "threshold": threshold,
            "parents": names(ontology[label.mid].parent_mids) if label.mid in ontology else [],
            "ancestors": names(ancestors(label.mid)),
        }
        for label, threshold in zip(checkpoint.labels, thresholds, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, LABELS_SCHEMA), file, compression="zstd")


LABELS_SCHEMA = pa.schema(
    [
        ("index", pa.int16()),
        ("mid", pa.string()),
        ("name", pa.string()),
        ("threshold", pa.float32()),
        ("parents", pa.list_(pa.string())),
        ("ancestors", pa.list_(pa.string())),
    ]
)


def _claim(output: Path, run: dict[str, Any]) -> str:
    """Makes `output` this run's, or checks that it is of the same making; gives its `run.json`."""
    run_file = output / RUN_FILE
    if not run_file.exists():
        if any((output / CLIPS_FOLDER).glob("*")):
            raise UsageError(
                f"--output {str(output)!r} has a folder {CLIPS_FOLDER!r} that earmark did not make "
                f"(there is no {RUN_FILE}); choose another --output"
            )
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
        _write_atomically(run_file, lambda file: file.write_text(text, "utf-8"), first_wins=True)
    try:
        claimed = run_file.read_text("utf-8")
        earlier = json.loads(claimed)["scoring"]
        differences = [
            f"{key} was {_shown(earlier.get(key))}, is {_shown(value)}"
            for key, value in run["scoring"].items()
            if earlier.get(key) != value
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_file} is damaged; use --overwrite to start anew") from error
    if differences:
        raise UsageError(
            f"--output {str(output)!r} holds rows that were made otherwise: {'; '.join(differences)}. "
            "One output holds one making: choose another --output, or start anew with --overwrite"
        )
    return claimed


def _refuse_other_divisions(output: Path, planned: list[Shard], done: set[str]) -> None:
    """Refuses shards of a folder or Parquet file whose clips a finished file holds already."""
    files = {(as_text(shard.uri), as_text(file)) for shard in planned for file in shard.files}
    for shard_id in outdated(planned, done):
        table = pq.read_table(
            output / CLIPS_FOLDER / f"{shard_id}.parquet", columns=["shard", "member"]
        )
        rows = zip(table["shard"].to_pylist(), table["member"].to_pylist(), strict=True)
        if "-rg" in shard_id or not files.isdisjoint(rows):
            raise UsageError(
                f"{output}/{CLIPS_FOLDER}/{shard_id}.parquet is finished, but its input is divided "
                "otherwise by now (files were added or removed, or --files-per-shard is another): clips "
                "would be in the table twice; "
                "use --overwrite to start anew, or another --output"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f'{text[:13]}..."' if len(text) > 60 and isinstance(value, str) else text


def _empty(output: Path) -> None:
    """Removes what earmark put into `output`, and nothing else."""
    if not (output / RUN_FILE).exists():
        return
    shutil.rmtree(output / CLIPS_FOLDER, ignore_errors=True)
    # run.json last: until then an interrupted --overwrite is still recognised.
    for name in (LABELS_FILE, SUMMARY_FILE, RUN_FILE):
        (output / name).unlink(missing_ok=True)


def _write_atomically(
    file: Path, write: Callable[[Path], Any], *, first_wins: bool = False
) -> None:
    partial = partial_of(file)
    try:
        write(partial)
        if not first_wins:
            partial.replace(file)
            return
        try:
            os.link(partial, file)  # fails where another process was first
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not file.exists():
                partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _sum_up(output: Path, of_this_run: set[str], wall_s: float) -> Outcome:
    """Adds up the footers of all finished files, and writes `summary.json`.

    Raises:
        ValueError: a file is damaged, or of another making than `run.json` says.
    """
    making = json.loads((output / RUN_FILE).read_text("utf-8"))["fingerprint"]
    total, now = ShardSummary(), ShardSummary()
    for file in sorted((output / CLIPS_FOLDER).glob("*.parquet")):
        summary = read_summary(file)
        made = json.loads(pq.read_metadata(file).metadata[RUN_KEY])["fingerprint"]
        if made != making:
            raise ValueError(f"{file} is of another making than {RUN_FILE}; use --overwrite")
        total += summary
        if file.stem in of_this_run:
            now += summary
    failures: dict[str, dict[str, int]] = {}
    for reason, count in total.failures.most_common():
        stage, _, kind = reason.partition("/")
        failures.setdefault(stage, {})[kind] = count
    content = {
        "clips": total.clips,
        "tagged": total.clips - total.failed,
        "failed": total.failed,
        "failures": failures,
        "audio_s": round(total.audio_s, 3),
        "wall_s": round(wall_s, 3),
        "clips_per_s": round(now.clips / wall_s, 3) if now.clips else 0.0,
        "clips_this_run": now.clips,
        "tags": dict(total.tags.most_common()),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _write_atomically(output / SUMMARY_FILE, lambda file: file.write_text(text, "utf-8"))
    return Outcome(total, len(of_this_run), now.clips, now.audio_s, wall_s)


def _pipeline(beam_options: tuple[str, ...]) -> beam.Pipeline:
    """An empty pipeline with Beam's options, earmark's defaults among them.

    Raises:
        UsageError: Beam does not accept the options.
    """
    options = PipelineOptions(list(beam_options))
    if "runner" not in options.get_all_options(drop_default=True):
        options.view_as(StandardOptions).runner = DEFAULT_RUNNER
    # Everything lives in installed modules; a pickled main session would only hide a missing one.
    options.view_as(SetupOptions).save_main_session = False
    if options.view_as(DirectOptions).direct_num_workers < 0:
        raise UsageError("--direct_num_workers must be 0 (all cores) or more")
    try:
        return beam.Pipeline(options=options)
    except (ValueError, RuntimeError, ImportError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise UsageError(f"Beam does not take these options: {lines}") from error


def _row_options(options: AnnotateOptions, checkpoint: Checkpoint) -> RowOptions:
    return RowOptions(
        thresholds=_thresholds(options, checkpoint),
        top_k=options.top_k,
        chunks=options.chunks,
        embeddings=options.embeddings,
        score_type=options.score_type,
    )


def _thresholds(options: AnnotateOptions, checkpoint: Checkpoint) -> tuple[float, ...]:
    if options.threshold is not None:
        return (options.threshold,) * len(checkpoint.labels)
    return checkpoint.thresholds


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
