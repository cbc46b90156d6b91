"""`earmark compact`: the rows of an output in few large files, for engines that read many at once."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__, flags
from pipeline.options import UsageError
from pipeline.terminal import errors_said, printable

if TYPE_CHECKING:  # heavy to import, and only types here
    from student.labels import Label
    from transforms.compact import Part, Planned
    from transforms.output import Output

MARKER_FILE = "compacting.json"  # in the new folder until it is whole


@click.command(
    epilog=flags.examples(
        "earmark compact tags --to tags-compact",
        "earmark compact gs://my-tags/train --to gs://my-tags/train-compact --target-mb 256",
    )
)
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--to",
    required=True,
    metavar="DIR",
    help="Folder for the new output, local or a URL. It is an output once it is whole; until then the same command begins anew.",
)
@click.option(
    "--target-mb",
    type=click.FloatRange(0, min_open=True),
    default=512.0,
    show_default=True,
    metavar="MB",
    help="About how large a file is to be (MiB).",
)
@click.option("--json", "as_json", is_flag=True, help="Say what was done as JSON.")
@flags.billing_project
@flags.kms_key
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def compact(output: str, to: str, verbose: bool, as_json: bool, **options: Any) -> None:
    """Write the rows of OUTPUT into few large files, sorted by clip_id.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket; it stays as it is. All that
    reads an output reads the new one.
    """
    kept = "DIR is no output until it is whole: run the same command again to begin anew"
    with errors_said(verbose, kept):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        job = prepare(CompactOptions(output, to, **options))
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("compacting", total=job.planned.total.clips)
            done = execute(job, lambda rows: bar.update(task, completed=rows))
        if as_json:
            click.echo(json.dumps(done.as_json(), indent=2))
        else:
            click.echo(printable(done.sentence()))


@dataclass(frozen=True)
class CompactOptions:
    """The options of `earmark compact`; `--help` describes them."""

    source: str
    to: str
    target_mb: float = 512.0
    billing_project: str | None = None
    kms_key: str | None = None


@dataclass(frozen=True)
class CompactJob:
    """An output to be compacted; everything has been checked."""

    options: CompactOptions
    source: Output
    output: Output
    run: dict[str, Any]  # the new run.json
    labels: tuple[Label, ...]
    planned: Planned


@dataclass(frozen=True)
class Compacted:
    """What a compaction came to."""

    job: CompactJob
    parts: list[Part]
    digest: int  # of the rows, of `transforms.row_hash`: before and after
    wall_s: float

    def sentence(self) -> str:
        """For people."""
        rows, size = sum(part.rows for part in self.parts), sum(p.size_bytes for p in self.parts)
        files, before = len(self.parts), self.job.planned.files
        return (
            f"Compacted {before:,} file{'s' * (before != 1)} into {files:,} "
            f"({size / 2**20:,.1f} MiB, {sum(part.row_groups for part in self.parts):,} row groups) in "
            f"{self.wall_s:.1f} s.\n"
            f"{rows:,} rows before and after, with the same hash of all columns: {self.digest:016x}.\n"
            f"The output is {self.job.options.to}."
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": self.job.options.source,
            "to": self.job.options.to,
            "files_before": self.job.planned.files,
            "files": [
                {
                    "name": part.name, "rows": part.rows, "row_groups": part.row_groups,
                    "bytes": part.size_bytes,
                }
                for part in self.parts
            ],
            "rows": sum(part.rows for part in self.parts),
            "rows_xxh3": f"{self.digest:016x}",
            "wall_s": round(self.wall_s, 3),
        }  # fmt: skip


def prepare(options: CompactOptions) -> CompactJob:
    """Checks all that can be checked, and writes nothing.

    Raises:
        UsageError: OUTPUT or DIR cannot be used as asked.
        OSError: storage does not answer.
    """
    from pipeline import ledger
    from pipeline.recorded import open_both, recorded_labels, recorded_run, whereabouts
    from transforms.compact import CompactError, plan
    from transforms.storage import Access
    from transforms.write import CLIPS_FOLDER, RUN_FILE, finished_shards

    access = Access(options.billing_project, options.kms_key)
    source, output = open_both(options.source, options.to, "--to", (), access)
    if f"{whereabouts(output)}/".startswith(f"{whereabouts(source)}/"):
        raise UsageError(
            f"--to {options.to!r} is OUTPUT or inside of it: a reader would find rows twice; give a new "
            "folder"
        )
    made = recorded_run(source, options.source)
    labels = recorded_labels(source, made)
    if output.read(RUN_FILE) is not None:
        raise UsageError(
            f"--to {options.to!r} holds an output already ({RUN_FILE}); give a new folder, or remove "
            "that one first"
        )
    if output.read(MARKER_FILE) is None and next(output.names(CLIPS_FOLDER), None) is not None:
        raise UsageError(
            f"--to {options.to!r} has a folder {CLIPS_FOLDER!r} that earmark compact did not make; "
            "give a new folder"
        )
    shards = sorted(finished_shards(source))
    if not shards:
        raise UsageError(
            f"{source.uri}/{CLIPS_FOLDER} holds no finished shard: there is nothing to compact"
        )
    try:
        planned = plan(source, [f"{CLIPS_FOLDER}/{s}.parquet" for s in shards], made["fingerprint"])
    except CompactError as error:
        raise UsageError(str(error)) from error
    run = made | {
        "id": uuid.uuid4().hex,
        ledger.COMPACTED_KEY: {
            "earmark": __version__,
            # What a compacted output was made of is what has the shards.
            "from": made.get(ledger.COMPACTED_KEY, {}).get("from")
            or {"output": source.uri, "id": made["id"], "fingerprint": made["fingerprint"]},
            "clips": planned.total.clips,
        },
    }
    return CompactJob(options, source, output, run, labels, planned)


def execute(job: CompactJob, shown: Callable[[int], None] = lambda rows: None) -> Compacted:
    """Writes the new output; `run.json`, which makes it one, comes last.

    Args:
        job: of `prepare`.
        shown: is told how many rows were read.

    Raises:
        UsageError: a file of the source cannot be read, or what was written is not what was read.
        OSError: the new output cannot be written.
        RuntimeError: another compaction into the same folder has begun since.
    """
    from pipeline import ledger
    from transforms.compact import CompactError, Rows, differing, write_parts
    from transforms.output import LocalOutput, publish_bytes, remove_abandoned
    from transforms.write import CLIPS_FOLDER, RUN_FILE, ShardSummary

    started = time.monotonic()
    output, run = job.output, json.dumps(job.run, indent=2, ensure_ascii=False) + "\n"
    try:
        if isinstance(output, LocalOutput):
            folder = Path(output.uri)
            remove_abandoned(folder, folder / CLIPS_FOLDER)
        # First the mark, so that whoever else writes here stops before its files are removed.
        publish_bytes(output, MARKER_FILE, json.dumps({"id": job.run["id"]}).encode())
        left = [name for name in output.names(CLIPS_FOLDER) if not name.startswith(".")]
        output.remove(*(f"{CLIPS_FOLDER}/{name}" for name in left))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--to {job.options.to!r} cannot be written: {reason}") from error

    def still_ours() -> None:
        if json.loads(output.read(MARKER_FILE) or b"{}").get("id") != job.run["id"]:
            raise RuntimeError(
                f"another compaction into {output.uri} has begun; this one writes nothing more"
            )

    rows = Rows(job.source, job.planned)

    def read() -> Iterable[Any]:
        for table in rows:
            yield table
            shown(rows.rows)

    total, parts, digest = ShardSummary(), [], 0
    try:
        for part in write_parts(
            read(), job.planned.schema, output, run, int(job.options.target_mb * 2**20), still_ours
        ):
            parts.append(part)
            total.add(part.summary)
            digest = (digest + part.digest) % (1 << 64)
    except CompactError as error:
        raise UsageError(str(error)) from error
    if (rows.rows, rows.digest) != (total.clips, digest):
        raise UsageError(
            f"{rows.rows:,} rows with the hash {rows.digest:016x} were read, {total.clips:,} with the "
            f"hash {digest:016x} are in the new files: memory or a disk is at fault; {output.uri} is not "
            "finished"
        )
    if wrong := differing(job.planned.total, total):
        raise UsageError(
            f"the footers of {job.source.uri} say other totals than its rows ({', '.join(wrong)}): "
            "earmark verify tells of which file"
        )
    thresholds = tuple(job.run.get("thresholds", {}).get(label.name) for label in job.labels)
    publish_bytes(output, ledger.LABELS_FILE, ledger.labels_parquet(job.labels, thresholds))
    publish_bytes(output, ledger.SUMMARY_FILE, _summary(job.source, total))
    still_ours()
    publish_bytes(output, RUN_FILE, run.encode(), replace=False)
    output.remove(MARKER_FILE)
    return Compacted(job, parts, digest, time.monotonic() - started)


def _summary(source: Output, total: Any) -> bytes:
    """The source's `summary.json`, where it says what the rows are; else one without a run."""
    from pipeline import ledger
    from transforms.write import ShardSummary

    content = source.read(ledger.SUMMARY_FILE) or b"{}"
    try:
        if not ledger.differing_totals(json.loads(content), total):
            return content
    except ValueError:
        pass
    made = ledger.summary_of(total, ShardSummary(), 0.0, {}, None)
    return (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()
