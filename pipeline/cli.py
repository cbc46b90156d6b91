"""The command line."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import click

from pipeline import __version__, flags
from pipeline.compact import compact
from pipeline.completion import complete_paths, completion
from pipeline.dataset import dataset
from pipeline.distill import distill
from pipeline.doctor import doctor
from pipeline.estimate import estimate_like
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.look import compare, report
from pipeline.options import AnnotateOptions, UsageError, refuse_missing, split_beam_options
from pipeline.query import query
from pipeline.retag import retag
from pipeline.retry import retry
from pipeline.terminal import EXIT_FAILURES, EXIT_INTERRUPTED, errors_said, quiet
from pipeline.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="earmark")
def cli() -> None:
    """Tag any audio dataset with AudioSet's 527 labels."""


@cli.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Any option of Apache Beam can follow, such as --runner DirectRunner "
    "--direct_num_workers 2 --direct_running_mode multi_processing. Without --runner, "
    "Beam's in-process FnApiRunner runs the job here.\n\n"
    + flags.examples(
        "earmark annotate 'shards/*.tar' --output tags",
        "earmark annotate recordings --output tags --checkpoint bookbot/distil-ast-audioset --profile",
        "earmark annotate gs://my-audio/shards --output gs://my-tags/train --runner DataflowRunner "
        "--project my-project --region us-central1 --gpu nvidia-l4 --dry-run",
    ),
)
@click.argument("inputs", nargs=-1, type=click.UNPROCESSED, metavar="INPUT...")
@click.option(
    "--output",
    "-o",
    required=True,
    metavar="DIR",
    help="Folder for the Parquet files, local or a URL such as gs://bucket/tags. A run into the same folder goes on where the last one stopped.",
)
@click.option(
    "--checkpoint",
    default=AnnotateOptions.checkpoint,
    show_default=True,
    metavar="C",
    help="A Hugging Face id (owner/name[@revision]), a directory (local, gs://, s3://), or 'bundled'.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="D",
    help="auto, cpu, cuda or cuda:N. A device that is missing is an error.",
)
@click.option(
    "--devices",
    metavar="all|N",
    help="All GPUs of this machine, or N of them, with worker processes for each (with --device cpu: N processes that share its cores), each with shards of its own. [default: one GPU]",
)
@click.option(
    "--processes-per-gpu",
    type=click.IntRange(1),
    metavar="N",
    help="Worker processes that share a GPU of this machine. [default: one for each 4 cores and 8 GB of its memory, 4 at most]",
)
@click.option(
    "--decode-processes",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that decode for each worker thread. 0: a thread decodes, and a file that crashes a decoder ends the worker. [default: on a GPU of this machine its share of the cores, else 1]",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "reduced", "float32", "bfloat16", "float16", "int8"]),
    help="What the model computes in; auto is float32 on a CPU, and reduced the fastest that is to keep scores within 0.01 on any device.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="T",
    help="Score from which a label is a tag. [default: the checkpoint's own per label, else 0.2]",
)
@flags.thresholds
@click.option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="Keep at most the K highest tags of a clip.",
)
@click.option(
    "--pool",
    type=click.Choice(["max", "mean"]),
    default=AnnotateOptions.pool,
    show_default=True,
    help="How a clip's score is made from those of its chunks.",
)
@click.option(
    "--chunk-hop-s",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds from one chunk's start to the next one's; less than a chunk's length makes them overlap. [default: a chunk's length, 10.24 for AST]",
)
@click.option(
    "--pad",
    type=click.Choice(["zero", "repeat"]),
    default=AnnotateOptions.pad,
    show_default=True,
    help="What a clip shorter than a chunk is filled up with: zeros, as AST was trained, or itself.",
)
@click.option(
    "--score-type",
    type=click.Choice(["float32", "float16"]),
    default=AnnotateOptions.score_type,
    show_default=True,
    help="How scores are stored; float16 halves the table, but BigQuery, Athena and Trino cannot read it.",
)
@click.option(
    "--chunks", is_flag=True, help="Keep the scores of every chunk, with its start and end."
)
@click.option(
    "--segments",
    is_flag=True,
    help="Keep when each label is heard: neighbouring chunks that reach its threshold, merged.",
)
@click.option("--embeddings", is_flag=True, help="Keep the student's embedding of every clip.")
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Annotate the first N clips only."
)
@click.option(
    "--files-per-shard",
    type=click.IntRange(1),
    default=AnnotateOptions.files_per_shard,
    show_default=True,
    metavar="N",
    help="How many loose audio files, or rows of a manifest, make a shard.",
)
@click.option("--overwrite", is_flag=True, help="Remove an earlier run's files from DIR first.")
@click.option(
    "--refresh",
    is_flag=True,
    help="Do finished shards anew whose inputs have changed since, each replaced in one step.",
)
@click.option(
    "--max-failure-ratio",
    type=click.FloatRange(0, 1),
    default=AnnotateOptions.max_failure_ratio,
    show_default=True,
    metavar="R",
    help="Exit with 1 when more than this share of all clips failed.",
)
@click.option(
    "--max-clip-mb",
    type=click.FloatRange(0, min_open=True),
    default=AnnotateOptions.max_clip_mb,
    show_default=True,
    metavar="MB",
    help="A clip of more encoded MB (MiB) is an error (TooLarge), and not decoded.",
)
@click.option(
    "--max-duration-s",
    type=click.FloatRange(0, min_open=True),
    default=AnnotateOptions.max_duration_s,
    show_default=True,
    metavar="S",
    help="Of a longer clip the first S seconds are tagged, and its row says so (TooLong).",
)
@click.option(
    "--clip-timeout-s",
    type=click.FloatRange(0, min_open=True),
    default=AnnotateOptions.clip_timeout_s,
    show_default=True,
    metavar="S",
    help="A clip that takes longer to decode is an error (TimedOut).",
)
@flags.inputs_from
@click.option(
    "--path-column",
    metavar="NAME",
    help="The column of a manifest that names the audio files. [default: path, audio_filepath, file_name or the like]",
)
@click.option(
    "--id-column",
    metavar="NAME",
    help="The column that names the clips; '' for none. [default: id, clip_id, utt_id or the like]",
)
@click.option(
    "--start-column",
    metavar="NAME",
    help="The column of the second where a clip begins; '' for none: files are not cut. [default: start, offset or the like]",
)
@click.option(
    "--end-column",
    metavar="NAME",
    help="The column of the second where it ends; '' for none. [default: end or the like, or duration beside a start]",
)
@click.option(
    "--audio-root",
    metavar="DIR",
    help="Where a manifest's relative paths begin. [default: the manifest's folder]",
)
@flags.billing_project
@flags.kms_key
@click.option(
    "--gpu",
    metavar="TYPE[:COUNT]",
    help="On Dataflow: the GPU of each worker, such as nvidia-l4, or none. Sets machine, image, disk and threads; Beam's own options win.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, tag one clip here, show the plan; run and submit nothing.",
)
@click.option(
    "--job-file",
    metavar="FILE",
    help="With --dry-run: write the Dataflow job as JSON.",
)
@click.option(
    "--detach", is_flag=True, help="Return once the Dataflow job is submitted, and do not wait."
)
@click.option(
    "--profile",
    is_flag=True,
    help="At the end, show where the time went, and what to do about it.",
)
@click.option("--verbose", "-v", is_flag=True, help="Show Beam's log, and tracebacks.")
@click.pass_context
def annotate(
    context: click.Context, inputs: tuple[str, ...], verbose: bool, **options: Any
) -> None:
    """Tag every clip in INPUT and write Parquet.

    An INPUT is a WebDataset tar, a zip, a Parquet or Arrow file with an audio
    column, a TFRecord, an audio file, a manifest (CSV, TSV, JSON lines, Parquet,
    Kaldi, lhotse, AudioSet) whose rows name audio files, a folder (walked
    recursively) or a quoted glob of these: a local path or a URL (gs://, s3://,
    hf://, https://).
    """
    own = [name for parameter in context.command.params for name in parameter.opts]
    quiet(verbose)
    with errors_said(verbose):
        paths, beam = split_beam_options(inputs, own)
        if not paths and not options["inputs_from"]:
            raise UsageError("Missing argument 'INPUT...'.")
        if not beam:  # on another runner a local path may be wrong in itself
            refuse_missing(paths)
        _run(AnnotateOptions(inputs=paths, beam=beam, **options))


@cli.command(epilog=flags.examples("earmark demo", "earmark demo /tmp/demo"))
@click.argument("folder", default="demo", metavar="[FOLDER]")
@click.option("--verbose", "-v", is_flag=True, help="Show Beam's log, and tracebacks.")
def demo(folder: str, verbose: bool) -> None:
    """Synthesise a few shards, tag them, and show truth beside tags.

    FOLDER (default: demo) receives `shards/` and the output `tags/`.
    """
    from pathlib import Path

    quiet(verbose)
    with errors_said(verbose):
        from rich.console import Console

        from pipeline.demo import show_truth, write_demo_shards

        shards = write_demo_shards(Path(folder) / "shards")
        click.echo(f"Wrote {' and '.join(str(shard) for shard in shards)}", err=True)
        output = Path(folder) / "tags"
        _run(
            AnnotateOptions(
                inputs=(str(Path(folder) / "shards"),),
                output=str(output),
                overwrite=True,
            )
        )
        show_truth(output, Console())


@cli.command(
    epilog=flags.examples(
        "earmark schema gs://my-tags/train --dialect bigquery --dataset sounds > clips.sql",
        "earmark schema tags --dialect trino --table labels",
    )
)
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--dialect",
    required=True,
    # Those of pipeline.schema, which would load pyarrow for --help; a test compares them.
    type=click.Choice(["bigquery-json", "bigquery", "bigquery-load", "athena", "trino"]),
    help="bigquery is an external table, bigquery-load a native one, bigquery-json the schema file.",
)
@click.option(
    "--table",
    default="clips",
    show_default=True,
    type=click.Choice(["clips", "labels"]),
    help="clips/*.parquet or labels.parquet.",
)
@click.option(
    "--dataset",
    default="earmark",
    show_default=True,
    metavar="NAME",
    help="BigQuery's dataset, Athena's database or Trino's schema.",
)
@flags.billing_project
def schema(
    output: str, dialect: Any, table: Any, dataset: str, billing_project: str | None
) -> None:
    """Write what a SQL engine needs to read OUTPUT: a table definition.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket; docs/query.md
    says what to do with the definition.
    """
    import json

    from pipeline.schema import table_definition
    from transforms.storage import Access, read_all

    with errors_said(verbose=False):
        url = f"{output.rstrip('/')}/run.json"
        try:
            run = json.loads(read_all(url, Access(billing_project)))
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(
                f"{url} cannot be read ({type(error).__name__}: {error}); "
                "OUTPUT is the folder that earmark annotate wrote"
            ) from error
        try:
            click.echo(table_definition(run, output, dialect, table, dataset), nl=False)
        except ValueError as error:
            raise UsageError(str(error)) from error


cli.add_command(compact)
cli.add_command(compare)
cli.add_command(estimate_like(annotate))
cli.add_command(completion)
cli.add_command(dataset)
cli.add_command(distill)
cli.add_command(doctor)
cli.add_command(evaluate)
cli.add_command(export)
cli.add_command(query)
cli.add_command(report)
cli.add_command(retag)
cli.add_command(retry)
cli.add_command(verify)


def _run(options: AnnotateOptions) -> None:
    # What is imported here stays: looking for garbage among it takes half a second of the start.
    gc.disable()
    from rich.console import Console

    from pipeline import display
    from pipeline.run import execute, prepare

    gc.freeze()
    gc.enable()
    out, err = Console(), Console(stderr=True)
    if options.job_file and not options.dry_run:
        raise UsageError(
            "--job-file needs --dry-run; Beam's --dataflow_job_file writes and submits"
        )
    if options.profile and (options.dry_run or options.detach):
        other = "--dry-run" if options.dry_run else "--detach"
        raise UsageError(
            f"--profile tells of a run that is waited for, {other} of none: leave out one of them"
        )
    job = prepare(options)
    display.show_job(job, err)
    if options.dry_run:
        _rehearse(job, out)
        return
    outcome = execute(
        job,
        lambda job, folder: display.live(job, folder, err),
        lambda job, places: display.watch_job(job, places, err),
    )
    if outcome is None:
        display.show_submitted(job, out)
        return
    display.show_outcome(outcome, options.output, out)
    if options.profile:
        display.show_profile(outcome.profile, out)
    if outcome.failure_ratio > options.max_failure_ratio:
        err.print(
            f"Error: {outcome.total.failed:,} of {outcome.total.clips:,} clips failed, more than "
            f"--max-failure-ratio {options.max_failure_ratio}; their rows say why",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(EXIT_FAILURES)


def _rehearse(job: Any, out: Any) -> None:
    import json
    from pathlib import Path

    from pipeline import display
    from pipeline.rehearse import rehearse

    rehearsal = rehearse(job)
    display.show_rehearsal(job, rehearsal, out)
    if job.options.job_file:
        text = json.dumps(rehearsal.description, indent=2) + "\n"
        try:
            Path(job.options.job_file).write_text(text, "utf-8")
        except OSError as error:
            raise UsageError(
                f"--job-file {job.options.job_file!r} cannot be written: {error.strerror}"
            ) from error


def main() -> None:
    """The console script `earmark`."""
    # Threads of torch that wait should sleep: spinning, they take the cores from the decoder
    # beside them (and from every other process). Read when torch is loaded, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    complete_paths(cli)
    try:
        cli(prog_name="earmark")
    except SystemExit as ended:
        if ended.code != EXIT_INTERRUPTED:
            raise
        # A thread may hang in a read for a while; Python would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)
