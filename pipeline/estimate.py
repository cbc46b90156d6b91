"""`earmark estimate`: what a run will come to, before it is paid for."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import AnnotateOptions, UsageError, refuse_missing
from pipeline.quantities import counted
from pipeline.terminal import errors_said, quiet

if TYPE_CHECKING:
    from rich.console import Console

# Options of `annotate` that change what a run takes, in its own words.
SHARED = (
    "inputs", "checkpoint", "device", "decode_processes", "dtype", "score_type", "chunks",
    "embeddings", "limit", "files_per_shard", "inputs_from", "billing_project", "segments", "pad",
    "chunk_hop_s", "max_clip_mb", "max_duration_s", "clip_timeout_s", "path_column", "id_column",
    "start_column", "end_column", "audio_root",
)  # fmt: skip
WORKERS = "1,2,4,8,16,32"


@click.command(
    epilog=flags.examples(
        "earmark estimate 'shards/*.tar'",
        "earmark estimate gs://my-audio/shards --checkpoint bookbot/distil-ast-audioset --workers 1,10,100",
        "earmark estimate gs://my-audio/shards --gpu nvidia-l4 --price-per-hour 0.9",
        "earmark estimate shards --output tags && earmark annotate shards --output tags",
    ),
)
@click.option(
    "--output",
    "-o",
    metavar="DIR",
    help="Output of the run: shards that have a file there are done, and estimate.json goes there, for `earmark annotate` to compare with.",
)
@click.option(
    "--gpu",
    metavar="TYPE[:COUNT]",
    help="Instead of this machine: a worker with this GPU, such as nvidia-l4. From published figures, so the range is wide.",
)
@click.option(
    "--workers",
    default=WORKERS,
    show_default=True,
    metavar="N,N,...",
    help="How many workers such as this machine.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    metavar="P",
    help="What a worker costs for an hour, in any currency.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    metavar="N",
    help="How many clips to tag here.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of which clips are drawn.")
@click.option("--save", metavar="FILE", help="Write the estimate as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
@click.option("--verbose", "-v", is_flag=True, help="Show logs, and tracebacks.")
def estimate(verbose: bool, **options: Any) -> None:
    """Say what annotating INPUT will take, before it is paid for.

    Draws clips from all over the input, tags them here, and says how many clips and
    hours there are, how long a run takes with 1 to N workers, how large the output is,
    and what is the bottleneck: each with the range that holds the truth four times in five.
    Nothing is written but estimate.json, with --output or --save.
    """
    quiet(verbose)
    with errors_said(verbose, kept="Nothing was annotated"):
        _estimate(options)


def estimate_like(annotate: click.Command) -> click.Command:
    """The command, with those of `annotate`'s options that matter to it."""
    shared = [parameter for parameter in annotate.params if parameter.name in SHARED]
    estimate.params[:0] = shared
    return estimate


def _estimate(options: dict[str, Any]) -> None:
    workers = _workers(options["workers"])
    if not options["inputs"] and not options["inputs_from"]:
        raise UsageError("Missing argument 'INPUT...'.")
    refuse_missing(options["inputs"])
    # A mistake should not cost the time that follows.
    price = options["price_per_hour"]
    if price is not None and not math.isfinite(price):
        raise UsageError(f"--price-per-hour {price} is no price; expected a number from 0 up")
    if options["save"] and not Path(options["save"]).absolute().parent.is_dir():
        raise UsageError(
            f"--save {options['save']!r} cannot be written: there is no folder "
            f"{str(Path(options['save']).parent)!r}"
        )
    if options["save"] and Path(options["save"]).is_dir():
        raise UsageError(
            f"--save {options['save']!r} cannot be written: it is a folder; name a file"
        )
    from rich.console import Console

    from pipeline import dataflow
    from pipeline.expected import ESTIMATE_FILE
    from pipeline.forecast import draw_sample, measure, process_age_s, project
    from pipeline.run import prepare
    from student.checkpoint import CheckpointError
    from student.model import DeviceError
    from transforms.output import publish_bytes

    gpu = options["gpu"]
    if gpu is not None and dataflow.parse_gpu(gpu)[0] == dataflow.NO_GPU:
        gpu = None
    err = Console(stderr=True)
    say = partial(err.print, highlight=False, soft_wrap=True, markup=False)
    output = options["output"]
    asked = AnnotateOptions(
        output=output or _NOWHERE,
        dry_run=True,
        **{name: options[name] for name in SHARED},
    )
    job = prepare(asked)
    before_s, before_cpu_s = process_age_s(), time.process_time()
    if not job.todo.shards:
        raise UsageError(
            f"there is nothing to estimate: all {job.shards:,} shards have a file in {output}"
            if job.shards != 1
            else f"there is nothing to estimate: the one shard has a file in {output}"
        )
    sample = draw_sample(job, options["sample"], options["seed"], say)
    try:
        measured = measure(job, sample, say)
    except (CheckpointError, DeviceError) as error:
        raise UsageError(str(error)) from error
    content = project(
        job,
        sample,
        measured,
        before_s=before_s,
        before_cpu_s=before_cpu_s,
        workers=workers,
        gpu=gpu,
        price_per_hour=options["price_per_hour"],
        seed=options["seed"],
    )
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if options["as_json"]:
        click.echo(text, nl=False)
    else:
        show(content, Console())
    if options["save"]:
        try:
            Path(options["save"]).write_text(text, "utf-8")
        except OSError as error:
            raise UsageError(
                f"--save {options['save']!r} cannot be written: {error.strerror}"
            ) from error
        click.echo(f"Wrote {options['save']}", err=True)
    if output:
        try:
            publish_bytes(job.output, ESTIMATE_FILE, text.encode())
        except OSError as error:
            raise UsageError(
                f"--output {output!r} cannot be written: {error.strerror or error}"
            ) from error
        say(f"Wrote {job.output.uri}/{ESTIMATE_FILE}")


_NOWHERE = "/nonexistent/earmark-estimate"  # an output that is looked at, and never written


def _workers(stated: str) -> list[int]:
    try:
        counts = sorted({int(count) for count in stated.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise UsageError(
            f"--workers {stated!r}: expected numbers from 1 on with commas between, such as {WORKERS}"
        )
    return counts


def show(estimate: dict[str, Any], console: Console) -> None:
    """Prints an estimate."""
    from rich.table import Table

    from pipeline.quantities import amount, duration, size

    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)

    def spread(of: dict[str, float], shown: Any) -> str:
        low, high = shown(of["low"]), shown(of["high"])
        return shown(of["expected"]) + (f" ({low} to {high})" if low != high else "")

    def whole(value: float) -> str:
        return f"{value:,.0f}"

    sample = estimate["sample"]
    done = estimate["skipped_shards"]
    say(
        f"Input: {estimate['shards']:,} shard{'s' * (estimate['shards'] != 1)} to do, "
        f"{amount(estimate['input_bytes'], estimate['input_rows'])}"
        + (f"; {done:,} more are finished" if done else "")
    )
    read = (
        "all of it was read" if sample["all_read"] else f"{sample['read_clips']:,} clips were read"
    )
    say(f"  {read}, {sample['tagged_clips']:,} were tagged here; in brackets the 80 % interval")
    say(f"Clips:  {spread(estimate['clips'], whole)}")
    if estimate["failed"]["high"] >= 1:
        say(f"  of which may fail: {spread(estimate['failed'], whole)}")
    say(f"Audio:  {spread(estimate['audio_s'], duration)}")
    say(f"Output: {spread(estimate['output_bytes'], size)}")
    say(f"Student: {estimate['checkpoint']}, on {estimate['device']} in {estimate['dtype']}")
    if estimate["source"]:
        console.print(
            f"  {estimate['source']}", style="yellow", highlight=False, soft_wrap=True, markup=False
        )
    at = estimate["machine"]
    if at["busy"]:
        console.print(
            f"  Other work is on this machine (load {at['load']:.1f}, {at['cores']} cores): times are those of a busy one.",
            style="yellow", highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    priced = estimate["price_per_hour"] is not None
    columns = ["workers", "time", "worker hours", *(["cost"] if priced else [])]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for entry in estimate["workers"]:
        hours = entry["worker_h"]
        row = [
            f"{entry['workers']:,}",
            spread(entry["wall_s"], duration),
            spread(hours, lambda h: f"{h:,.2f}" if h < 100 else whole(h)),
        ]
        if priced:
            row.append(spread(entry["cost"], lambda price: f"{price:,.2f}"))
        table.add_row(*row)
    console.print(table)
    startup_s = estimate["before_s"] + estimate["startup_s"]["expected"]
    say(f"Of each time {duration(startup_s)} pass before the first clip.")
    idle = [
        entry["workers"] for entry in estimate["workers"] if entry["workers"] > estimate["shards"]
    ]
    if idle:
        say(
            f"There {'is' if estimate['shards'] == 1 else 'are'} {counted(estimate['shards'], 'shard')}, so {idle[0]:,} workers are more than can work; smaller shards "
            "spread further."
        )
    took = estimate["ms_per_clip"]
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in took.items() if ms >= 0.05)
    say(f"Bottleneck: {estimate['binds']}. Milliseconds a clip, here: {stages}.")
