"""`earmark retag`: other tags for an output that is there, from its scores, without a model.

Never in place: a reader of an output that is half retagged would find tags of two makings in
one table, and files that are replaced one by one cannot appear together. The new output is
made like any other, a file a shard, and goes on where it was stopped.
"""

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
from pipeline.quantities import counted
from pipeline.terminal import errors_said, printable

if TYPE_CHECKING:  # heavy to import, and only types here
    from pipeline.thresholds import Thresholds
    from student.labels import Label
    from transforms.output import Output
    from transforms.write import RowOptions, ShardSummary

# Each holds a row group. A remote one waits for storage most of the time; on local disks it is
# Python that makes the tags, and more of them at once are no faster.
_SHARDS_AT_ONCE = 4
_NAMED = 20  # damaged shards that are told of one by one


@click.command(
    epilog=flags.examples(
        "earmark retag tags --output tags-strict --threshold 0.5",
        "earmark retag gs://my-tags/train --output gs://my-tags/fitted --thresholds thresholds.json",
    )
)
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--output",
    "-o",
    "new",
    required=True,
    metavar="DIR",
    help="Folder for the new output, local or a URL. The same command again goes on where the last one stopped.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="T",
    help="Score from which a label is a tag.",
)
@flags.thresholds
@click.option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="Keep at most the K highest tags of a clip. [default: all, whatever OUTPUT has]",
)
@click.option("--overwrite", is_flag=True, help="Remove an earlier output from DIR first.")
@flags.billing_project
@flags.kms_key
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def retag(output: str, new: str, verbose: bool, **options: Any) -> None:
    """Write OUTPUT anew with other tags, from its scores, without a model.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket; it stays as it is.
    """
    with errors_said(verbose):
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        job = prepare(RetagOptions(output, new, **options))
        for note in job.notes:
            console.print(printable(note), style="yellow", markup=False)

        def shown(shards: Iterable[Any]) -> Iterable[Any]:
            return track(
                shards,
                "retagging",
                len(job.todo),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )

        outcome = execute(job, shown)
        done = len(job.todo) - len(outcome.refused)
        earlier = f", {job.finished:,} were finished earlier" if job.finished else ""
        click.echo(
            f"Retagged {done:,} shard{'s' * (done != 1)} in {outcome.wall_s:.1f} s{earlier}."
        )
        if done:
            click.echo(
                f"{counted(outcome.after.clips, 'clip')}, {outcome.after.failed:,} of them failed: "
                f"{outcome.before.tags.total():,} tags before, {outcome.after.tags.total():,} now."
            )
        click.echo(printable(f"The output {new} holds {counted(outcome.total.clips, 'clip')}."))
        if outcome.refused:
            raise UsageError(
                f"{len(outcome.refused):,} of {counted(len(job.todo), 'shard')} could not be retagged and are "
                "not in the new output; the same command again tries them alone:\n  "
                + "\n  ".join(outcome.refused[:_NAMED])
                + f"\n  and {len(outcome.refused) - _NAMED:,} more"
                * (len(outcome.refused) > _NAMED)
            )


@dataclass(frozen=True)
class RetagOptions:
    """The options of `earmark retag`; `--help` describes them."""

    source: str
    output: str
    threshold: float | None = None
    thresholds: str | None = None
    top_k: int | None = None
    overwrite: bool = False
    billing_project: str | None = None
    kms_key: str | None = None


@dataclass(frozen=True)
class RetagJob:
    """Tags to be recomputed; everything has been checked."""

    source: Output
    output: Output
    fingerprint: str  # of the source
    run: str  # what the new run.json says
    labels: tuple[Label, ...]
    rows: RowOptions
    todo: list[str]  # ids of the shards that have no new file yet
    finished: int  # shards of the source that have one
    notes: list[str]


@dataclass(frozen=True)
class Retagged:
    """What a retagging came to."""

    before: ShardSummary  # of the shards that this run did, as they were
    after: ShardSummary  # the same as they are now
    total: ShardSummary  # of everything in the new output
    refused: tuple[str, ...]  # a sentence for each shard that could not be retagged, by place
    wall_s: float


def prepare(options: RetagOptions) -> RetagJob:
    """Checks all that can be checked, and writes `run.json` and `labels.parquet` of a new output.

    Raises:
        UsageError: the source, the thresholds or the output cannot be used as asked.
    """
    from pipeline import ledger
    from pipeline.recorded import open_both, recorded_labels, recorded_run, whereabouts
    from pipeline.thresholds import asked_thresholds
    from transforms.output import LocalOutput, remove_abandoned
    from transforms.storage import Access
    from transforms.write import CLIPS_FOLDER, RUN_FILE, RowOptions, finished_shards

    access = Access(options.billing_project, options.kms_key)
    source, output = open_both(
        options.source, options.output, "--output", (options.thresholds or "",), access
    )
    if whereabouts(source) == whereabouts(output):
        raise UsageError(
            f"--output {options.output!r} is OUTPUT itself: tags are not replaced in place, because a "
            "reader would find old and new ones in one table; give a new folder"
        )

    made = recorded_run(source, options.source)
    labels = recorded_labels(source, made)
    asked = asked_thresholds(
        options.threshold,
        options.thresholds,
        labels,
        made["checkpoint"]["weights_sha256"],
        access,
    )
    if asked is None:
        raise UsageError(
            "which tags are wanted? Give --threshold T for all labels, or --thresholds FILE"
        )
    thresholds, notes = asked
    rows = RowOptions(thresholds, options.top_k, score_type=made["scoring"]["score_type"])
    run = describe_retagging(made, options, source.uri, labels, thresholds)

    shards = finished_shards(source)
    if not shards:
        raise UsageError(
            f"{source.uri}/{CLIPS_FOLDER} holds no finished shard: there is nothing to retag"
        )
    _check_scores(source, shards, labels, rows)
    try:
        if isinstance(output, LocalOutput):
            folder = Path(output.uri)
            remove_abandoned(folder, folder / CLIPS_FOLDER)
        if options.overwrite:
            ledger.empty(output)
        claimed = ledger.claim(output, options.output, run)
        _refuse_other_source(json.loads(claimed), made, f"{output.uri}/{RUN_FILE}")
        ledger.write_labels(output, labels, thresholds)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--output {options.output!r} cannot be written: {reason}") from error
    todo = sorted(shards - finished_shards(output))
    return RetagJob(
        source, output, made["fingerprint"], claimed, labels, rows, todo, len(shards) - len(todo), notes
    )  # fmt: skip


def execute(
    job: RetagJob, shown: Callable[[Iterable[Any]], Iterable[Any]] = lambda shards: shards
) -> Retagged:
    """Retags the shards that have no new file, then sums up the new output.

    A file of the source that cannot be retagged keeps no other from it.

    Args:
        job: of `prepare`.
        shown: is given the finished shards one by one, and gives them back.

    Raises:
        OSError: a new file cannot be written; those before it are kept.
        RuntimeError: somebody began the new output anew in the meantime.
    """
    from pipeline import ledger
    from pipeline.at_once import few_at_once
    from transforms.retag import RetagError, retag_file
    from transforms.storage import is_local
    from transforms.write import CLIPS_FOLDER, ShardSummary, check_claim, finished_shards

    started = time.monotonic()
    remote = not (is_local(job.source.uri) and is_local(job.output.uri))
    before, after = ShardSummary(), ShardSummary()
    refused = []

    def one(shard_id: str) -> tuple[ShardSummary, ShardSummary] | RetagError:
        try:
            return retag_file(
                job.source,
                job.output,
                f"{CLIPS_FOLDER}/{shard_id}.parquet",
                job.labels,
                job.rows,
                job.fingerprint,
                job.run,
                lambda: check_claim(job.output, job.run),
            )
        except RetagError as error:
            return error

    for done in shown(few_at_once(one, job.todo, _SHARDS_AT_ONCE if remote else 1)):
        if isinstance(done, RetagError):
            refused.append(str(done))
        else:
            before.add(done[0])
            after.add(done[1])
    wall_s = time.monotonic() - started
    published = finished_shards(job.output)
    # No clip was scored by this run: how fast it was says nothing about a student's speed, so
    # that summary.json has none of its clips in `clips_this_run` and `clips_per_s`.
    total, _ = ledger.sum_up(job.output, published, published, wall_s, {})
    return Retagged(before, after, total, tuple(sorted(refused)), wall_s)


def describe_retagging(
    made: dict[str, Any],
    options: RetagOptions,
    source: str,
    labels: tuple[Label, ...],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """The new `run.json`: that of the source with other thresholds, and where its rows came from.

    `scoring`, and so the fingerprint, is what `earmark annotate` with these thresholds would
    have: it goes on in the new output, where it has the same options.

    Args:
        made: the `run.json` of the source.
        options: what was asked for.
        source: where the source is.
        labels: of the scores.
        thresholds: one a label.
    """
    from pipeline import ledger

    scoring = made["scoring"] | {
        "thresholds": ledger.thresholds_digest(thresholds),
        "top_k": options.top_k,
    }
    return made | {
        "id": uuid.uuid4().hex,
        "fingerprint": ledger.digest(scoring),
        "checkpoint": made["checkpoint"]
        | {"thresholds": "option" if options.threshold is not None else "file"},
        "scoring": scoring,
        "thresholds": {
            label.name: threshold for label, threshold in zip(labels, thresholds, strict=True)
        },
        "options": made["options"]
        | {
            "threshold": options.threshold,
            "thresholds": options.thresholds,
            "top_k": options.top_k,
        },
        "retagged": {
            "earmark": __version__,
            "from": {"output": source, "id": made["id"], "fingerprint": made["fingerprint"]},
        },
    }


def _check_scores(
    source: Output, shards: set[str], labels: tuple[Label, ...], rows: RowOptions
) -> None:
    """Looks at one file, so that an output that lacks scores leaves no trace of a new one.

    At the first that can be read: a damaged one is told of when the others are done.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from transforms.retag import RetagError, check_retaggable
    from transforms.write import CLIPS_FOLDER

    for shard_id in sorted(shards):
        name = f"{CLIPS_FOLDER}/{shard_id}.parquet"
        try:
            with source.open(name) as stream:
                schema = pq.read_schema(stream)
            check_retaggable(schema, labels, rows, f"{source.uri}/{name}")
        except RetagError as error:
            raise UsageError(str(error)) from error
        except (OSError, pa.ArrowException) as error:
            damaged = error  # an `as` name ends with its clause
        else:
            return
    raise UsageError(
        f"none of the {len(shards):,} files of {source.uri}/{CLIPS_FOLDER} can be read (the last one: "
        f"{damaged}): remove those that are damaged, and annotate again"
    ) from damaged


def _refuse_other_source(claimed: dict[str, Any], made: dict[str, Any], place: str) -> None:
    """Refuses to add to an output whose rows are of another place, though made alike."""
    origin = claimed.get("retagged", {}).get("from", {})
    if (origin.get("id"), origin.get("fingerprint")) != (made["id"], made["fingerprint"]):
        was = f"retagged from {origin.get('output')}" if origin else "made by earmark annotate"
        raise UsageError(
            f"{place} says that the rows there were {was}, not from this run of OUTPUT: choose another "
            "--output, or start anew with --overwrite"
        )
