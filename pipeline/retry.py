"""`earmark retry`: failed rows of an output once more, in files that are replaced in one step.

Each shard's file is replaced by one in which the other rows are what they were, bit for bit. A
reader finds the old file or the new one; a run that is killed leaves one of them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click

from pipeline import flags
from pipeline.options import UsageError, split_beam_options
from pipeline.quantities import counted
from pipeline.terminal import EXIT_FAILURES, errors_said, printable, quiet

_NOT_FOUND_TOLD = 5


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Any option of Apache Beam can follow, as for earmark annotate.",
)
@click.argument("output", metavar="OUTPUT")
@click.argument("inputs", nargs=-1, type=click.UNPROCESSED, metavar="[INPUT]...")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="T",
    help="Only rows whose error is of this type, such as TimedOut; may be given several times.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(["read", "decode"]),
    help="Only rows that failed in this stage; may be given several times.",
)
@click.option(
    "--checkpoint",
    metavar="C",
    help="Where the checkpoint is by now. [default: where run.json says; other weights are refused]",
)
@click.option("--device", default="auto", show_default=True, metavar="D", help="As for annotate.")
@click.option("--devices", metavar="all|N", help="As for annotate.")
@click.option("--processes-per-gpu", type=click.IntRange(1), metavar="N", help="As for annotate.")
@click.option("--decode-processes", type=click.IntRange(0), metavar="N", help="As for annotate.")
@click.option("--gpu", metavar="TYPE[:COUNT]", help="As for annotate.")
@flags.inputs_from
@flags.billing_project
@flags.kms_key
@click.option("--verbose", "-v", is_flag=True, help="Show Beam's log, and tracebacks.")
@click.pass_context
def retry(
    context: click.Context,
    output: str,
    inputs: tuple[str, ...],
    types: tuple[str, ...],
    stages: tuple[str, ...],
    verbose: bool,
    **options: Any,
) -> None:
    """Do the failed rows of OUTPUT once more.

    OUTPUT is what `earmark annotate` wrote. Rows that are fine stay as they are, bit for bit.
    An INPUT takes the place of those that run.json names.
    """
    own = [name for parameter in context.command.params for name in parameter.opts]
    quiet(verbose)
    with errors_said(verbose, "No row is lost: run the same command again to go on"):
        paths, beam = split_beam_options(inputs, own)
        _retry(output, paths, stages, types, beam, options)


def _retry(
    output: str,
    inputs: tuple[str, ...],
    stages: tuple[str, ...],
    types: tuple[str, ...],
    beam: tuple[str, ...],
    given: dict[str, Any],
) -> None:
    from rich.console import Console

    from pipeline import display, ledger
    from pipeline.recorded import recorded_labels, recorded_options, recorded_rows, recorded_run
    from pipeline.run import Redo, execute, prepare
    from transforms.output import open_output
    from transforms.retry import Retry
    from transforms.storage import Access
    from transforms.write import ShardSummary, finished_shards

    retry = Retry(stages, types)
    try:
        place = open_output(output, Access(given["billing_project"], given["kms_key"]))
    except (ImportError, ValueError) as error:
        raise UsageError(f"OUTPUT {output!r} cannot be used: {error}") from error
    made = recorded_run(place, output)
    ledger.refuse_compacted(made, output)
    thresholds = recorded_rows(made, recorded_labels(place, made), output).thresholds
    total = ShardSummary()
    failed: dict[str, int] = {}
    for shard_id, footer in ledger.footers(place, sorted(finished_shards(place))):
        if isinstance(footer, ValueError):
            raise footer
        total.add(footer.summary)
        if rows := retry.count(footer.summary):
            failed[shard_id] = rows
    if not failed:
        known = ", ".join(f"{reason} ({n:,})" for reason, n in total.failures.most_common())
        click.echo(printable(f"No row failed so: {known}." if known else "No row has an error."))
        return

    options = recorded_options(made, output, inputs, given.pop("inputs_from"))
    stated = {name: value for name, value in given.items() if value is not None}
    job = prepare(replace(options, **stated, beam=beam), Redo(retry, set(failed), thresholds))
    found = {shard.id for shard in job.todo}
    gone = sorted(failed.keys() - found)
    err = Console(stderr=True)
    display.show_job(job, err)
    outcome = execute(
        job,
        lambda job, folder: display.live(job, folder, err),
        lambda job, places: display.watch_job(job, places, err),
    )
    if outcome is None:
        return
    tried = sum(failed[shard_id] for shard_id in found)
    better = total.failed - outcome.total.failed
    click.echo(
        f"Tried {tried:,} failed row{'s' * (tried != 1)} of {len(found):,} shard"
        f"{'s' * (len(found) != 1)} once more: {max(0, better):,} got scores. Of all "
        f"{counted(outcome.total.clips, 'clip')} {outcome.total.failed:,} failed."
    )
    if gone:
        named = ", ".join(gone[:_NOT_FOUND_TOLD]) + " ..." * (len(gone) > _NOT_FOUND_TOLD)
        click.echo(
            printable(
                f"Error: {len(gone):,} shards with failed rows are not among the inputs any more: {named}; "
                "name where they are by now: earmark retry OUTPUT INPUT"
            ),
            err=True,
        )
    if outcome.not_retried:
        click.echo(
            f"Error: {counted(outcome.not_retried, 'shard')} left unchanged, because the clips are others "
            "by now; earmark annotate --refresh does them anew",
            err=True,
        )
    if gone or outcome.not_retried:
        sys.exit(EXIT_FAILURES)
