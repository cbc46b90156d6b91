"""What stands beside the rows of an output: `run.json`, `labels.parquet`, `summary.json`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import __version__
from pipeline.expected import ESTIMATE_FILE, compared
from pipeline.options import AnnotateOptions, UsageError
from pipeline.thresholds import Thresholds
from student.checkpoint import Checkpoint
from student.labels import Label, ancestors, audioset_ontology
from transforms.chunk import hop_samples_of
from transforms.decode import RESAMPLE_QUALITY
from transforms.output import Output, publish_bytes, remove_output
from transforms.records import Shard, as_text
from transforms.shard_id import has_row_groups, source_of
from transforms.shards import outdated
from transforms.source import what_changed
from transforms.storage import is_local, public_name, public_url
from transforms.write import CLIPS_FOLDER, RUN_FILE, Footer, ShardSummary, read_footer

LABELS_FILE = "labels.parquet"
SUMMARY_FILE = "summary.json"
COMPACTED_KEY = "compacted"  # of the run.json that `earmark compact` writes
REPORT_FILE = "report.html"  # of `earmark report`, where no other place is named

_PLACES = ("audio_root", "thresholds")  # options that may be URLs
_VERSIONS_OF = (
    "torch", "transformers", "apache-beam", "pyarrow", "numpy", "av", "soundfile", "soxr"
)  # fmt: skip
_FOOTERS_AT_ONCE = 32  # a remote one is a round trip

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


def describe_run(
    options: AnnotateOptions,
    checkpoint: Checkpoint,
    thresholds: Thresholds,
    dtype: str,
    computed_by: Mapping[str, str],
) -> dict[str, Any]:
    """What made an output: `run.json`, and the metadata of each of its files.

    `scoring` is all that changes a row; its hash is the `fingerprint`, and one
    output has one fingerprint.
    """
    scoring = {
        "earmark": __version__,
        "weights_sha256": checkpoint.weights_sha256,
        "config_sha256": checkpoint.config_sha256,
        "labels": labels_digest(checkpoint.labels),
        "features": asdict(checkpoint.features),
        "dtype": dtype,
        "resample": f"soxr {RESAMPLE_QUALITY}",
        "chunk_samples": checkpoint.features.chunk_samples,
        "pool": options.pool,
        "thresholds": thresholds_digest(thresholds),
        "top_k": options.top_k,
        "score_type": options.score_type,
        "chunks": options.chunks,
        "embeddings": options.embeddings,
        "limit": options.limit,
        "max_clip_mb": options.max_clip_mb,
        "max_duration_s": options.max_duration_s,
        "clip_timeout_s": options.clip_timeout_s,
        # None is what was before there were these, so that outputs of then can be gone on with.
        "chunk_hop_samples": hop_samples_of(options.chunk_hop_s, checkpoint.features),
        "pad": None if options.pad == "zero" else options.pad,
        "segments": options.segments or None,
    }
    places = (*options.inputs, *filter(None, [options.audio_root]))
    return {
        "earmark": __version__,
        "id": uuid.uuid4().hex,  # of this beginning: --overwrite gives another, resuming does not
        "fingerprint": digest(scoring),
        "checkpoint": {
            "name": as_text(checkpoint.name),
            "weights_sha256": checkpoint.weights_sha256,
            "labels": len(checkpoint.labels),
            "thresholds": "option" if options.threshold is not None
            else "file" if options.thresholds is not None
            else "checkpoint" if checkpoint.has_own_thresholds else "default",
        },
        "scoring": scoring,
        "thresholds": {label.name: t for label, t in zip(checkpoint.labels, thresholds, strict=True)},
        "inputs": [as_text(public_url(pattern)) for pattern in options.inputs],
        # Where relative paths begin, those in lists too, for who reads them once more.
        "started_in": as_text(str(Path.cwd())) if options.inputs_from or any(map(is_relative, places)) else None,
        "options": {
            name: _public(name, value)
            for name, value in asdict(options).items()
            if name not in ("inputs", "output", "checkpoint", "overwrite", "refresh", "lists_start_in")
            and not name.startswith(("dry_run", "job_file", "detach", "profile"))
        },
        "computed_by": dict(computed_by),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS_OF},
    }  # fmt: skip


def _public(name: str, value: Any) -> Any:
    """An option's value, places on the web without what lets one in."""
    if name == "inputs_from":
        return [public_url(file) for file in value]
    return public_url(value) if name in _PLACES and isinstance(value, str) else value


def is_relative(place: str) -> bool:
    """Whether a place is a path of this machine that depends on where a command is run."""
    return is_local(place) and not os.path.isabs(place)


def from_folder(folder: str | None, place: str) -> str:
    """A place as it is named from elsewhere: a relative path begins at `folder`, None for here."""
    return os.path.join(folder, place) if folder and is_relative(place) else place


def labels_digest(labels: Sequence[Label]) -> str:
    """A hash of a checkpoint's labels: index, mid and name of each."""
    return digest([asdict(label) for label in labels])


def thresholds_digest(thresholds: Thresholds) -> Any:
    """Thresholds in a `run.json`: the number where they are equal, else a hash of all."""
    return digest(thresholds) if len(set(thresholds)) > 1 else thresholds[0]


def labels_parquet(labels: Sequence[Label], thresholds: Thresholds) -> bytes:
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
        for label, threshold in zip(labels, thresholds, strict=True)
    ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, LABELS_SCHEMA), file, compression="zstd")
    return file.getvalue()


def claim(
    output: Output,
    name: str,
    run: dict[str, Any],
    *,
    only_look: bool = False,
    advice: str = "One output holds one making: choose another --output, or start anew with --overwrite",
) -> str:
    """Makes `output` this run's, or checks that it is of the same making; gives its `run.json`.

    Args:
        output: where.
        name: what the user calls it.
        run: of `describe_run`.
        only_look: write nothing.
        advice: what to do where it was made otherwise.

    Raises:
        UsageError: the output was made otherwise, or is not earmark's.
    """
    text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
    claimed = output.read(RUN_FILE)
    if claimed is None:
        if next(output.names(CLIPS_FOLDER), None) is not None:
            raise UsageError(
                f"--output {name!r} has a folder {CLIPS_FOLDER!r} that earmark did not make "
                f"(there is no {RUN_FILE}); choose another --output"
            )
        if only_look:
            return text
        publish_bytes(output, RUN_FILE, text.encode(), replace=False)
        claimed = output.read(RUN_FILE) or b""
    try:
        earlier = json.loads(claimed)["scoring"]
        differences = [
            f"{key} was {_shown(earlier.get(key))}, is {_shown(value)}"
            for key, value in run["scoring"].items()
            if earlier.get(key) != value
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{output.uri}/{RUN_FILE} is damaged; use --overwrite to start anew"
        ) from error
    if COMPACTED_KEY not in run:
        refuse_compacted(json.loads(claimed), name)
    if differences:
        raise UsageError(
            f"--output {name!r} holds rows that were made otherwise: {'; '.join(differences)}. {advice}"
        )
    return claimed.decode("utf-8")


def refuse_compacted(made: Mapping[str, Any], name: str) -> None:
    """Refuses an output of `earmark compact`, whose files are of no shards, for new rows.

    Args:
        made: its `run.json`.
        name: what the user calls it.

    Raises:
        UsageError: it is one.
    """
    if COMPACTED_KEY in made:
        whole = made[COMPACTED_KEY].get("from", {}).get("output")
        raise UsageError(
            f"{name!r} was made by earmark compact, and its files are no shards': rows are added to, or "
            f"tried again in, the output that it was made of, {whole!r}; compact that once more, into a "
            "new folder"
        )


def empty(output: Output) -> None:
    """Removes what earmark put into `output`, and nothing else."""
    if output.read(RUN_FILE) is not None:
        # run.json last: until then an interrupted --overwrite is still recognised.
        beside = (LABELS_FILE, SUMMARY_FILE, REPORT_FILE, ESTIMATE_FILE, RUN_FILE)
        remove_output(output, CLIPS_FOLDER, beside)


def write_labels(output: Output, labels: Sequence[Label], thresholds: Thresholds) -> None:
    """Publishes `labels.parquet`, unless it is there."""
    if output.read(LABELS_FILE) is None:
        publish_bytes(output, LABELS_FILE, labels_parquet(labels, thresholds))


def refuse_other_divisions(
    output: Output, planned: Callable[[], Iterable[Shard]], divided: set[str], finished: set[str]
) -> None:
    """Refuses shards of a folder, manifest or Parquet file whose clips a finished file holds already.

    Args:
        output: where.
        planned: gives the planned shards once more; called only where there is doubt.
        divided: ids of the planned shards of folders, manifests and Parquet files.
        finished: ids of the shards that have a file.

    Raises:
        UsageError: rows would be, or are, in the table twice.
    """
    doubtful = outdated({source_of(shard_id) for shard_id in divided}, finished - divided)
    if not doubtful:
        return
    files: set[tuple[str, str]] = set()
    manifests: set[str] = set()
    for shard in planned():
        if shard.kind == "manifest":
            manifests.add(source_of(shard.id))
        else:
            uri = as_text(public_url(shard.uri))
            files.update((uri, as_text(public_name(shard.uri, file))) for file in shard.files)
    for shard_id in doubtful:
        name = f"{CLIPS_FOLDER}/{shard_id}.parquet"
        with output.open(name) as stream:
            # Without Arrow's threads, one of which could abort the process as it ends.
            file = pq.ParquetFile(stream, pre_buffer=False)
            table = file.read(["shard", "member"], use_threads=False)
        rows = zip(table["shard"].to_pylist(), table["member"].to_pylist(), strict=True)
        if (
            has_row_groups(shard_id)
            or source_of(shard_id) in manifests
            or not files.isdisjoint(rows)
        ):
            raise UsageError(
                f"{output.uri}/{name} is finished, but its input is divided "
                "otherwise by now (files or rows were added or removed, or --files-per-shard is another): clips "
                "would be in the table twice; "
                "use --overwrite to start anew, or another --output"
            )


def sum_up(
    output: Output,
    finished: set[str],
    finished_before: set[str],
    wall_s: float,
    metrics: dict[str, Any],
    profile: dict[str, Any] | None = None,
    estimate: bytes | None = None,
) -> tuple[ShardSummary, ShardSummary]:
    """(totals of the output, those of this run): adds up all footers, and writes `summary.json`.

    `estimate` is what `estimate.json` held, to be shown beside what this run came to.

    Raises:
        ValueError: a file is damaged, or of another making than `run.json` says.
    """
    run = json.loads(output.read(RUN_FILE) or b"{}")
    making = run.get("fingerprint")
    total, now = ShardSummary(), ShardSummary()
    shards = sorted(finished)
    for shard_id, (summary, made) in zip(shards, _summaries(output, shards), strict=True):
        if made != making:
            raise ValueError(
                f"{output.uri}/{CLIPS_FOLDER}/{shard_id}.parquet is of another making than {RUN_FILE}; "
                "use --overwrite"
            )
        total.add(summary)
        if shard_id not in finished_before:
            now.add(summary)
    content = summary_of(total, now, wall_s, metrics, profile)
    if estimate is not None:
        done = len(finished - finished_before)
        content["estimate"] = beside_estimate(estimate, run, done, now, wall_s, metrics)
    if not now.clips and _says(output, total):
        return total, now  # the last run that did something is still what it tells of
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    publish_bytes(output, SUMMARY_FILE, text.encode())
    return total, now


def summary_of(
    total: ShardSummary,
    now: ShardSummary,
    wall_s: float,
    metrics: dict[str, Any],
    profile: dict[str, Any] | None,
) -> dict[str, Any]:
    """What `summary.json` says of the output's totals and those of the last run."""
    return {
        "clips": total.clips,
        "tagged": total.clips - total.failed,
        "failed": total.failed,
        "partial": total.partial,
        "failures": _by_stage(total.failures),
        "audio_s": round(total.audio_s, 3),
        "wall_s": round(wall_s, 3),
        "clips_per_s": round(now.clips / wall_s, 3) if now.clips else 0.0,
        "clips_this_run": now.clips,
        "tags": dict(total.tags.most_common()),
        "metrics": metrics,
        "profile": profile,
    }


def beside_estimate(
    estimate: bytes | None,
    run: Mapping[str, Any],
    shards: int,
    now: ShardSummary,
    wall_s: float,
    metrics: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What `estimate.json` expected beside what a run came to; None where there is none.

    Args:
        estimate: what the file holds.
        run: `run.json`.
        shards: that this run did.
        now: totals of these.
        wall_s: of this run.
        metrics: of `pipeline.run.metrics_of`.
    """
    # An estimate's time is that of one worker here.
    alone = bool(run.get("computed_by")) and run.get("options", {}).get("devices") is None
    actual = {
        "clips": now.clips,
        "audio_s": round(now.audio_s, 3),
        "audio_bytes": metrics.get("bytes_read"),
        "output_bytes": metrics.get("bytes_written"),
        "wall_s": round(wall_s, 3) if alone else None,
    }
    return compared(estimate, run.get("scoring", {}), shards, actual)


def _says(output: Output, total: ShardSummary) -> bool:
    """Whether `summary.json` has these totals already."""
    try:
        return not differing_totals(json.loads(output.read(SUMMARY_FILE) or b"{}"), total)
    except ValueError:
        return False


def differing_totals(stated: Any, total: ShardSummary) -> list[str]:
    """What of a `summary.json` is not the sum of the output's files, in words."""
    if not isinstance(stated, dict):
        return ["it holds no JSON object"]
    facts = {
        "clips": total.clips,
        "tagged": total.clips - total.failed,
        "failed": total.failed,
        "failures": _by_stage(total.failures),
        "audio_s": round(total.audio_s, 3),
        "tags": dict(total.tags),
    }
    return [
        f"{name} is {_shown(stated.get(name))}, the files add up to {_shown(value)}"
        if name not in ("failures", "tags")
        else f"{name} differ from those of the files"
        for name, value in facts.items()
        if stated.get(name) != value
    ]


def _by_stage(failures: Counter[str]) -> dict[str, dict[str, int]]:
    staged: dict[str, dict[str, int]] = {}
    for reason, count in failures.most_common():
        stage, _, kind = reason.partition("/")
        staged.setdefault(stage, {})[kind] = count
    return staged


def footers(output: Output, shards: Iterable[str]) -> Iterator[tuple[str, Footer | ValueError]]:
    """(shard id, footer) of finished shards, in order; an error in place of one that is damaged."""

    def one(shard_id: str) -> tuple[str, Footer | ValueError]:
        try:
            return shard_id, read_footer(output, f"{CLIPS_FOLDER}/{shard_id}.parquet")
        except ValueError as error:
            return shard_id, error

    left = iter(shards)
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        while some := list(islice(left, 1_024)):  # so that no more wait in memory
            yield from pool.map(one, some)


def changed_shards(output: Output, finished: Iterable[Shard]) -> Iterator[tuple[Shard, str]]:
    """(shard, how) of the finished shards whose source is another by now, as listings show.

    A file that is damaged, or does not say what its source was, is passed over.
    """
    left = iter(finished)
    while some := list(islice(left, 1_024)):
        found = footers(output, (shard.id for shard in some))
        for shard, (_, footer) in zip(some, found, strict=True):
            if isinstance(footer, Footer) and footer.source is not None:
                how = what_changed(footer.source, shard)
                if how is not None:
                    yield shard, how


def _summaries(output: Output, shards: list[str]) -> Iterator[tuple[ShardSummary, str]]:
    for _, footer in footers(output, shards):
        if isinstance(footer, ValueError):
            raise footer
        yield footer.summary, footer.fingerprint


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f'{text[:13]}..."' if len(text) > 60 and isinstance(value, str) else text


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold: SHA-256, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
