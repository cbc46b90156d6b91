"""`earmark evaluate`: the command; the work is in the package `evaluation`."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import AnnotateOptions, UsageError
from pipeline.terminal import errors_said, quiet

if TYPE_CHECKING:  # heavy to import, and only types here
    from evaluation.evaluate import Evaluation
    from evaluation.scores import Source
    from evaluation.thresholds import FittedThresholds
    from evaluation.truth import Truth
    from student.labels import Label
    from transforms.storage import Access

# 95 % of fewer lie between values that are mostly chance: of 20, the second lowest and highest.
_FEWEST_REPLICATES = 50


@click.command(
    epilog=flags.examples(
        "earmark evaluate tags --truth eval_segments.csv --save scores.json",
        "earmark evaluate shards --checkpoint bookbot/distil-ast-audioset --truth metadata:labels",
    )
)
@click.argument("paths", nargs=-1, required=True, metavar="OUTPUT|DATA...")
@click.option(
    "--truth",
    required=True,
    metavar="T",
    help="What is true: a CSV, TSV, JSON Lines or Parquet file of clips and labels, AudioSet's segments, metadata:FIELD, or another OUTPUT.",
)
@click.option(
    "--truth-threshold",
    type=click.FloatRange(0, 1),
    metavar="S",
    help="Where the truth is scores: from which a label is true. [default: an output's tags; 0.3 of a Parquet file]",
)
@click.option("--clip-column", metavar="NAME", help="The truth's column of clips.")
@click.option("--label-column", metavar="NAME", help="The truth's column of labels.")
@click.option(
    "--teacher",
    metavar="OUTPUT",
    help="Scores to stand beside: another OUTPUT, or a Parquet file with clip_id and scores.",
)
@click.option(
    "--only",
    metavar="FILE",
    help="Look at these clips alone: a CSV, TSV, JSON Lines or Parquet file with a column of clips.",
)
@click.option(
    "--checkpoint",
    metavar="C",
    help="Annotate DATA with this checkpoint first: as earmark annotate takes both.",
)
@click.option(
    "--output",
    "-o",
    metavar="DIR",
    help="With --checkpoint: where the annotation goes. [default: a temporary folder]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="D",
    help="With --checkpoint: auto, cpu, cuda or cuda:N.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="With --checkpoint: what the model computes in; auto is float32 on a CPU.",
)
@click.option(
    "--pool",
    type=click.Choice(["max", "mean"]),
    default=AnnotateOptions.pool,
    show_default=True,
    help="With --checkpoint: how a clip's score is made from those of its chunks.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="With --checkpoint: the first N clips of DATA only.",
)
@click.option(
    "--labels-at-least",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Leave labels with fewer than N positives out of every number.",
)
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    default=200,
    show_default=True,
    metavar="N",
    help=f"Replicates of resampled clips that intervals are made of: {_FEWEST_REPLICATES} or more, or 0 for none.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of bootstrap and folds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--save", metavar="FILE", help="Write everything as JSON.")
@click.option("--markdown", metavar="FILE", help="Write the tables for a model card.")
@click.option("--per-label", metavar="FILE", help="Write a row for each label as CSV.")
@click.option(
    "--picture", metavar="FILE", help="Draw curves, reliability and labels as .png, .svg or .pdf."
)
@click.option(
    "--thresholds",
    metavar="FILE",
    help="Fit a threshold and a calibration for each label, and write them as JSON.",
)
@click.option(
    "--target-precision",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="P",
    help="With --thresholds: the lowest threshold of this precision. [default: the best F1]",
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    metavar="N",
    help="With --thresholds: parts, each judged by a fit of the others.",
)
@click.option(
    "--group-by",
    metavar="FIELD",
    help="Metadata whose equal values stay together, such as the recording: in a replicate, and in one part.",
)
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show logs, and tracebacks.")
def evaluate(paths: tuple[str, ...], verbose: bool, **options: Any) -> None:
    """Measure how good the scores in OUTPUT are.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket. With --checkpoint, DATA
    is audio, which is annotated first.
    """
    quiet(verbose)
    with errors_said(verbose, kept="Run the same command again"):
        _check(paths, options)
        from evaluation.scores import EvaluationError

        try:
            _evaluate(paths, options)
        except EvaluationError as error:
            raise UsageError(str(error)) from error


def _check(paths: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuses what cannot be done before any work is."""
    if options["checkpoint"] is None:
        if len(paths) > 1:
            raise UsageError(
                f"{len(paths)} outputs were given ({', '.join(paths)}); evaluate one at a time, "
                "another one beside it with --teacher, or audio with --checkpoint"
            )
        if options["output"] is not None:
            raise UsageError("--output is where --checkpoint annotates to; name the checkpoint too")
        for name in ("device", "dtype", "pool", "limit"):
            if options[name] != getattr(AnnotateOptions, name):
                raise UsageError(
                    f"--{name} is of the annotation that --checkpoint makes; an output has its scores"
                )
    if 0 < options["bootstrap"] < _FEWEST_REPLICATES:
        raise UsageError(
            f"--bootstrap {options['bootstrap']} is too few for an interval; ask for "
            f"{_FEWEST_REPLICATES} or more, or 0 for none"
        )
    if options["thresholds"] is None:
        if options["target_precision"] is not None:
            raise UsageError("--target-precision is for --thresholds; name its file")
        if options["group_by"] is not None and not options["bootstrap"]:
            raise UsageError("--group-by is for --thresholds and --bootstrap; ask for one of them")
    for option in ("save", "markdown", "per_label", "picture", "thresholds"):
        file = options[option]
        if file is None:
            continue
        name = option.removesuffix("_file").replace("_", "-")
        if not Path(file).absolute().parent.is_dir():
            raise UsageError(
                f"--{name} {file!r} cannot be written: there is no folder {str(Path(file).parent)!r}"
            )
        if Path(file).is_dir():
            raise UsageError(f"--{name} {file!r} cannot be written: it is a folder; name a file")
    if options["picture"]:
        from evaluation.picture import FORMATS

        if Path(options["picture"]).suffix[1:].lower() not in FORMATS:
            raise UsageError(
                f"--picture {options['picture']!r}: expected a name that ends in .{', .'.join(FORMATS)}"
            )
    if options["picture"] and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--picture needs matplotlib, which is not installed: pip install --editable '.[train]', "
            "or leave --picture out"
        )


def _evaluate(paths: tuple[str, ...], options: dict[str, Any]) -> None:
    from evaluation.scores import EvaluationError, only_of, open_source
    from evaluation.truth import read_clip_list, read_stated_truth, read_truth
    from transforms.storage import Access

    access = Access(options["billing_project"])
    checkpoint = options["checkpoint"]
    try:
        source = open_source(paths[0], access) if checkpoint is None else None
    except EvaluationError as error:
        if str(error).endswith("annotated first"):
            raise UsageError(f"{error}: name a checkpoint with --checkpoint") from error
        raise
    only = None if options["only"] is None else read_clip_list(options["only"], access)
    labels = _labels_of(checkpoint, access) if source is None else source.labels
    about = {
        "clip_column": options["clip_column"],
        "label_column": options["label_column"],
        "threshold": options["truth_threshold"],
    }
    truth = read_stated_truth(options["truth"], labels, access, **about)
    teacher = None
    if options["teacher"] is not None:
        try:
            teacher = open_source(options["teacher"], access, labels)
        except EvaluationError as error:
            raise UsageError(f"--teacher: {error}") from error
    with contextlib.ExitStack() as stack:
        if source is None:
            if truth is not None:
                _check_truth(truth, labels, options)
            source = open_source(stack.enter_context(_annotated(paths, options)), access)
        if only is not None:
            source = only_of(source, only, options["only"])
        if truth is None:
            truth = read_truth(options["truth"], source, access, **about)
        _measure(source, truth, teacher, options)


def _measure(source: Source, truth: Truth, teacher: Source | None, options: dict[str, Any]) -> None:
    from rich.console import Console

    from evaluation import present
    from evaluation.evaluate import Own
    from evaluation.evaluate import evaluate as measure
    from evaluation.thresholds import check_folds
    from evaluation.truth import groups_of

    grouped: tuple[list[str] | None, int] = None, 0

    def check(own: Own) -> None:
        """Refuses a fit that cannot be before the measuring, which takes longer."""
        nonlocal grouped
        if options["thresholds"] is None:
            return
        if options["group_by"] is not None:
            grouped = groups_of(source, options["group_by"], own.clip_ids)
        try:
            check_folds(options["folds"], len(own.clip_ids), grouped[0], own.hashes)
        except ValueError as error:
            raise UsageError(f"--thresholds: {error}") from error

    evaluation = measure(
        source,
        truth,
        teacher=teacher,
        labels_at_least=options["labels_at_least"],
        replicates=options["bootstrap"],
        seed=options["seed"],
        group_by=options["group_by"],
        first=check,
    )

    def picture() -> bytes:
        from evaluation.picture import picture as draw

        return draw(evaluation, Path(options["picture"]).suffix[1:].lower())

    _write("--save", options["save"], lambda: present.as_json(evaluation))
    _write("--markdown", options["markdown"], lambda: present.markdown(evaluation))
    _write("--per-label", options["per_label"], lambda: present.per_label_csv(evaluation))
    _write("--picture", options["picture"], picture)
    # After the files: who reads the tables may stop reading.
    console = Console(stderr=options["as_json"])  # so that JSON stands alone
    if options["as_json"]:
        click.echo(present.as_json(evaluation).rstrip("\n"))
    else:
        present.show(evaluation, console)
    if options["thresholds"]:
        _fit_thresholds(source, evaluation, grouped, options, console)


def _labels_of(checkpoint: str, access: Access) -> tuple[Label, ...]:
    from student.checkpoint import CheckpointError, read_checkpoint
    from transforms.checkpoint import local_checkpoint

    try:
        return read_checkpoint(local_checkpoint(checkpoint, access)).labels
    except CheckpointError as error:
        raise UsageError(f"--checkpoint: {error}") from error


def _check_truth(truth: Truth, labels: Sequence[Label], options: dict[str, Any]) -> None:
    """Refuses, before hours of work, a truth that is of no use whatever the scores will be."""
    from evaluation.truth import resolve

    most = int(resolve(truth, labels).matrix.sum(axis=0).max(initial=0))
    if options["labels_at_least"] > most:
        raise UsageError(
            f"no label has {options['labels_at_least']} positives in {truth.name}, the most is "
            f"{most}; lower --labels-at-least"
        )
    if options["thresholds"] and options["folds"] > len(truth.clips):
        raise UsageError(
            f"--thresholds: {len(truth.clips)} clips cannot be dealt into {options['folds']} folds: "
            "give more clips, or ask for fewer --folds"
        )


@contextlib.contextmanager
def _annotated(paths: tuple[str, ...], options: dict[str, Any]) -> Iterator[str]:
    """The output that --checkpoint makes of the audio; a temporary one while the context lasts."""
    from rich.console import Console

    from pipeline import display
    from pipeline.run import execute, prepare

    with contextlib.ExitStack() as stack:
        output = options["output"] or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="earmark-evaluate-")
        )
        err = Console(stderr=True)
        job = prepare(
            AnnotateOptions(
                inputs=paths,
                output=output,
                checkpoint=options["checkpoint"],
                device=options["device"],
                dtype=options["dtype"],
                pool=options["pool"],
                limit=options["limit"],
                billing_project=options["billing_project"],
            )
        )
        display.show_job(job, err)
        execute(
            job,
            lambda job, folder: display.live(job, folder, err),
            lambda job, places: display.watch_job(job, places, err),
        )
        yield output


def _fit_thresholds(
    source: Source,
    evaluation: Evaluation,
    grouped: tuple[list[str] | None, int],
    options: dict[str, Any],
    console: Any,
) -> None:
    """Fits for all labels of the student, on all clips of the truth that it has scored."""
    from evaluation.thresholds import FEWEST_POSITIVES, fit_thresholds, highest_target

    own = evaluation.own

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    console.print()
    groups, without = grouped
    if groups is not None:
        say(
            f"--group-by {options['group_by']}: {len(own.clip_ids) - without:,} clips in "
            f"{len(set(groups)) - without:,} groups; {without:,} clips without it, each by itself."
        )
    dealt: dict[str, Any] = {
        "folds": options["folds"],
        "seed": options["seed"],
        "groups": groups,
        "hashes": own.hashes,
    }
    target = options["target_precision"]
    try:
        fitted = fit_thresholds(
            own.truth,
            own.scores,
            own.labels,
            target_precision=target,
            **dealt,
            weights_sha256=source.weights_sha256,
            truth_name=evaluation.truth_name,
            clip_ids=own.clip_ids,
        )
    except ValueError as error:
        raise UsageError(f"--thresholds: {error}") from error
    if fitted.positives < FEWEST_POSITIVES:
        say(
            f"The truth has {fitted.positives:,} labels in all: below {FEWEST_POSITIVES}, thresholds and "
            "calibration are mostly luck. Look at them before you use them."
        )
    _show_fitted(fitted, console, say)
    if target is not None and not any(label.reaches_target for label in fitted.labels):
        reached = highest_target(own.truth, own.scores, target, **dealt)
        raise UsageError(
            f"--target-precision {target:g}: no label reaches it, so that the file would tag nothing; it "
            "is not written. "
            + (
                f"The highest target that any label reaches is {reached[0]:g} ({reached[1]} of "
                f"{len(own.labels)} do); more clips can show more"
                if reached
                else "No label reaches a lower one either: give more clips with their labels"
            )
        )
    _write("--thresholds", options["thresholds"], fitted.to_json)


def _show_fitted(fitted: FittedThresholds, console: Any, say: Callable[[str], None]) -> None:
    from rich.table import Table

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    console.print("Thresholds, on clips that the fit did not see", style="bold")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("threshold", "micro precision", "recall", "F1", "macro precision", "recall", "F1"):
        table.add_column(name, justify="right" if table.columns else "left", overflow="fold")
    shown = {"global": "one for all, fitted", "tuned": "one a label, fitted"}
    for name, total in fitted.totals.items():
        of = (
            total.micro_precision, total.micro_recall, total.micro_f1,
            total.macro_precision, total.macro_recall, total.macro_f1,
        )  # fmt: skip
        table.add_row(shown.get(name, f"{name} for all"), *map(number, of))
    console.print(table)
    say(
        f"Fitted rows are cross-fitted: each of {fitted.folds} folds has the thresholds of a fit of the "
        "others, which differ from fold to fold. "
        + (
            "Fitted on all clips, no one threshold for all labels reaches the target; its row is of the "
            "folds for which one did on the others."
            if fitted.shared is None
            else f"Fitted on all clips, the one for all is {fitted.shared:g}."
        )
    )
    if fitted.target_precision is not None:
        reach = sum(bool(label.reaches_target) for label in fitted.labels)
        say(
            f"{reach:,} of {len(fitted.labels):,} labels reach a precision of "
            f"{fitted.target_precision:g}; the others have no threshold and never become tags."
        )
    better = fitted.calibrated.ece <= fitted.uncalibrated.ece
    say(
        f"Expected calibration error: {fitted.uncalibrated.ece:.4f} of the scores, "
        f"{fitted.calibrated.ece:.4f} calibrated"
        + (
            "."
            if better
            else ": on these clips the scores are the better probabilities as they are."
        )
    )


def _write(option: str, file: str | None, content: Callable[[], str | bytes]) -> None:
    if file is None:
        return
    made = content()
    try:
        Path(file).write_bytes(made if isinstance(made, bytes) else made.encode())
    except OSError as error:
        raise UsageError(f"{option} {file!r} cannot be written: {error.strerror}") from error
    click.echo(f"Wrote {file}", err=True)
