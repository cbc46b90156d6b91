"""`earmark distill`: the command; `training.distill` does the work."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.terminal import errors_said, quiet

_SHAPE = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size "
    "frequency_stride time_stride num_mel_bins max_length"
).split()


class _LayersOption(click.Command):
    """A command whose `--teacher-layers` takes as many numbers as follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        taking = False  # numbers for the option before
        for argument in args:
            if taking and argument.isdecimal():
                first = joined[-1] == "--teacher-layers"
                joined[-1:] = [joined[-1], argument] if first else [f"{joined[-1]} {argument}"]
                continue
            taking = argument.startswith("--teacher-layers")
            joined.append(argument)
        return super().parse_args(ctx, joined)


@click.command(
    cls=_LayersOption,
    epilog="`--preset P --show` prints every number of a preset, each of which --set changes. "
    "Several GPUs: `accelerate launch -m pipeline distill ...`.\n\n"
    + flags.examples(
        "earmark distill shards --teacher MIT/ast-finetuned-audioset-10-10-0.4593 --output student",
        "earmark distill shards --teacher-scores teacher-tags --preset distil-ast --output student",
        "earmark distill --preset consistent --show",
    ),
)
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option("--output", "-o", metavar="DIR", help="Folder for the student; a new one.")
@click.option(
    "--teacher",
    metavar="C",
    help="The teacher: a checkpoint as of annotate. It runs along, unless its scores are stored.",
)
@click.option(
    "--teacher-scores",
    multiple=True,
    metavar="OUT",
    help="Stored scores of DATA: what earmark annotate wrote with the teacher, or a Parquet file of clip_id and scores.",
)
@click.option(
    "--preset",
    type=click.Choice(["distil-ast", "consistent"]),
    default="consistent",
    show_default=True,
    help="distil-ast is the published recipe, consistent is ours.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another number of the preset."
)
@click.option("--show", is_flag=True, help="Print the numbers of the preset, and do nothing.")
@click.option(
    "--teacher-layers",
    metavar="N N ...",
    help="The teacher's layers that the student begins as, counted from 0.",
)
@click.option(
    "--student-layers",
    type=click.IntRange(1),
    metavar="N",
    help="So many of the teacher's layers, evenly spread, the last one kept.",
)
@click.option(
    "--fresh",
    multiple=True,
    metavar="NAME=VALUE",
    help=f"A student that has learned nothing, of this shape: {', '.join(_SHAPE)}.",
)
@click.option(
    "--student",
    metavar="C",
    help="A student that learns on: a checkpoint, whole. Its features and shape stay.",
)
@click.option(
    "--truth",
    metavar="FILE",
    help="Labels of the clips' own, as of evaluate: a file, or metadata:FIELD.",
)
@click.option(
    "--validation", multiple=True, metavar="DATA", help="Clips to judge by; else a share of DATA."
)
@click.option(
    "--validation-share",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    metavar="R",
    help="Share of DATA that is held out.",
)
@click.option(
    "--group-by",
    metavar="FIELD",
    help="Field of the clips' metadata, such as the recording: equal ones stay on one side.",
)
@click.option(
    "--hold-out",
    metavar="FIELD=VALUE",
    help="Hold out the clips whose metadata says this; the share is of clips without FIELD.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Keep the clips decoded here (32 kB a second of audio). Without it every epoch decodes anew.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    metavar="N",
    help="Processes that read and decode.",
)
@click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu or cuda.")
@click.option(
    "--max-steps",
    type=click.IntRange(1),
    metavar="N",
    help="Stop after N steps, whatever epochs says.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N clips only.")
@click.option("--resume", is_flag=True, help="Go on where an earlier run into DIR was stopped.")
@click.option(
    "--save-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the weights are stored.",
)
@click.option("--title", metavar="T", help="The student's name in its model card.")
@click.option("--licence", metavar="L", help="Its licence, such as apache-2.0, for the model card.")
@click.option("--data-licence", metavar="L", help="DATA's licence, in words, likewise.")
@click.option(
    "--push-to-hub", metavar="ID", help="Upload it to the Hugging Face Hub as owner/name."
)
@click.option("--private", is_flag=True, help="With --push-to-hub: as a private repository.")
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show logs and tracebacks.")
def distill(data: tuple[str, ...], verbose: bool, **options: Any) -> None:
    """Train a student on DATA to score like a teacher.

    DATA is what annotate reads: tars, Parquet, folders, here or at a URL. DIR becomes a
    checkpoint that transformers and `earmark annotate --checkpoint DIR` load.
    """
    quiet(verbose)
    with errors_said(verbose, kept=lambda: _kept(options["output"])):
        _run(data, options)


def _kept(output: str | None) -> str:
    """What a run that was stopped has kept."""
    from training.request import epoch_of, last_checkpoint

    last = last_checkpoint(Path(output)) if output else None
    if last is None:
        return "No epoch was judged, so nothing is kept: the same command begins anew"
    return f"What was learned to the end of epoch {epoch_of(last):g} is kept: add --resume to go on"


def _run(data: tuple[str, ...], options: dict[str, Any]) -> None:
    """Everything that can be checked is, before torch and transformers are loaded, which takes seconds."""
    for package in ("accelerate", "matplotlib", "tensorboard"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed, which training needs: pip install --editable '.[train]'"
            )
    from training.presets import as_settings
    from training.request import DistillError, begin, epoch_of, is_finished, is_first_process

    recipe = _recipe(options)
    if options["show"]:
        lines = []
        for name, value in as_settings(recipe).items():
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{name}={shown}")
        click.echo("\n".join(lines))  # at once: `head` may close the pipe after a few
        return
    _check(data, options)
    request = _request(data, options, recipe)
    try:
        begin(request)
    except DistillError as error:
        raise UsageError(str(error)) from error
    if request.resume and is_finished(request.output):
        if is_first_process():
            click.echo(
                f"{request.output} is finished: its {epoch_of(request.output):g} epochs are done. To let "
                f"it learn on, give it to a new --output with --student {request.output}"
            )
    else:
        _train(request)
    if options["push_to_hub"] and is_first_process():
        _push(request.output, options)


def _train(request: Any) -> None:
    from evaluation.scores import EvaluationError
    from student import CheckpointError, DeviceError
    from training.clips import ClipsError
    from training.distill import distill
    from training.progress import Progress
    from training.request import DistillError, is_first_process
    from training.trainer import TrainingFailed

    def say(line: str) -> None:
        click.echo(line, err=True)

    try:
        distilled = distill(request, say, callbacks=[Progress(say)])
    except TrainingFailed as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except (DistillError, ClipsError, EvaluationError, CheckpointError, DeviceError) as error:
        raise UsageError(str(error)) from error
    if is_first_process():
        _show(distilled)


def _push(output: Path, options: dict[str, Any]) -> None:
    from training.hub import HubError, push

    try:
        place = push(output, options["push_to_hub"], private=options["private"])
    except HubError as error:
        raise UsageError(str(error)) from error
    click.echo(f"Uploaded to {place}")


def _recipe(options: dict[str, Any]) -> Any:
    from training.presets import PRESETS, RecipeError, with_settings

    layers, option = {}, ""
    if options["teacher_layers"] is not None:
        layers, option = {"teacher_layers": options["teacher_layers"]}, "--teacher-layers"
    if options["student_layers"] is not None:
        if layers:
            raise UsageError(
                "--teacher-layers and --student-layers both say how the student begins: give one"
            )
        layers = {"teacher_layers": "None", "student_layers": str(options["student_layers"])}
        option = "--student-layers"
    recipe: Any = PRESETS[options["preset"]]()
    stated = dict(_pair("--set", text) for text in options["settings"])
    for named, settings in (("--set", stated), (option, layers)):
        try:
            recipe = with_settings(recipe, settings)
        except RecipeError as error:
            raise UsageError(f"{named}: {error}") from error
    return recipe


def _check(data: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuses what contradicts itself, and what is named and is not there."""
    from evaluation.scores import EvaluationError, open_source
    from evaluation.truth import METADATA
    from student.checkpoint import CheckpointError, find_checkpoint
    from transforms.storage import Access, is_local

    if not data:
        raise UsageError("Missing argument 'DATA...'.")
    if not options["output"]:
        raise UsageError("Missing option '--output' / '-o'.")
    if options["push_to_hub"]:
        from training.hub import HubError, check_id

        try:
            check_id(options["push_to_hub"])
        except HubError as error:
            raise UsageError(str(error)) from error
    layers_set = {name.partition("=")[0].strip() for name in options["settings"]} & {
        "teacher_layers", "student_layers",
    }  # fmt: skip
    if options["fresh"] and (options["teacher_layers"] or options["student_layers"] or layers_set):
        raise UsageError(
            "--fresh begins with nothing, --teacher-layers and --student-layers with layers"
        )
    if options["student"] and (
        options["teacher_layers"] or options["student_layers"] or layers_set
    ):
        raise UsageError(
            "--student begins as a checkpoint, --teacher-layers and --student-layers as a teacher's "
            "layers: give one"
        )
    if options["validation"] and (options["hold_out"] or options["group_by"]):
        raise UsageError(
            "--hold-out and --group-by divide DATA; with --validation nothing of it is held out"
        )
    if options["private"] and not options["push_to_hub"]:
        raise UsageError("--private is for --push-to-hub")
    directories = []
    for name in ("teacher", "student"):
        if options[name] and is_local(options[name]):
            try:
                directories.append(find_checkpoint(options[name]))
            except CheckpointError as error:
                raise UsageError(f"--{name}: {error}") from error
    # Scores in a file are of a checkpoint's labels; one that is fetched first says them later.
    if directories or not (options["teacher"] or options["student"]):
        labels = _labels_in(directories[0]) if directories else None
        for place in options["teacher_scores"]:
            try:
                open_source(place, Access(options["billing_project"]), labels)
            except EvaluationError as error:
                raise UsageError(f"--teacher-scores: {error}") from error
    truth = options["truth"]
    if truth and not truth.startswith(METADATA) and is_local(truth) and not Path(truth).exists():
        raise UsageError(
            f"--truth {truth!r} cannot be read: no such file; expected one, or {METADATA}FIELD for a "
            "field of the clips' own metadata"
        )


def _labels_in(directory: Path) -> Any:
    """A checkpoint's labels, of its config alone: `read_checkpoint` says all that is wrong with it."""
    from student.labels import checkpoint_labels

    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        id2label = {int(index): str(name) for index, name in config["id2label"].items()}
        return checkpoint_labels(id2label, config.get("label_mids"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{directory} is no checkpoint whose labels can be read ({type(error).__name__}: {error}); "
            "expected what transformers' save_pretrained writes"
        ) from error


def _request(data: tuple[str, ...], options: dict[str, Any], recipe: Any) -> Any:
    from training.request import Request, Split
    from transforms.storage import Access

    access = Access(options["billing_project"])
    hold_out = _pair("--hold-out", options["hold_out"]) if options["hold_out"] else None
    return Request(
        output=Path(options["output"]),
        recipe=recipe,
        preset=options["preset"],
        shards=_shards(data, access),
        data=", ".join(data),
        split=Split(options["validation_share"], options["group_by"], hold_out),
        validation_data=", ".join(options["validation"]) or None,
        validation_shards=_shards(options["validation"], access) if options["validation"] else (),
        teacher=options["teacher"],
        teacher_scores=options["teacher_scores"],
        fresh=_shape(options["fresh"]) if options["fresh"] else None,
        student=options["student"],
        truth=options["truth"],
        cache=Path(options["cache"]) if options["cache"] else None,
        workers=options["workers"],
        device=options["device"],
        max_steps=options["max_steps"],
        resume=options["resume"],
        save_dtype=options["save_dtype"],
        licence=options["licence"],
        data_licence=options["data_licence"],
        limit=options["limit"],
        title=options["title"],
        access=access,
    )


def _shards(patterns: tuple[str, ...], access: Any) -> Any:
    from transforms.listing import InputError
    from transforms.shards import plan_shards

    try:
        return plan_shards(patterns, access=access).shards
    except (InputError, OSError) as error:
        raise UsageError(str(error)) from error


def _shape(pairs: tuple[str, ...]) -> dict[str, int]:
    """The shape of a fresh student; AST's own numbers where none are given."""
    shape = {
        "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "patch_size": 16,
        "frequency_stride": 10, "time_stride": 10, "num_mel_bins": 128, "max_length": 1_024,
    }  # fmt: skip
    for text in pairs:
        name, value = _pair("--fresh", text)
        if name not in _SHAPE:
            raise UsageError(f"--fresh {text!r}: expected one of {', '.join(_SHAPE)}")
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--fresh {text!r}: {value!r} is no whole number above 0")
        shape[name] = int(value)
    return shape


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{option} {text!r}: expected NAME=VALUE")
    return name.strip(), value.strip()


def _show(distilled: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from evaluation.provenance import HELD_OUT_FILE
    from training.lesson import counts

    out = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("held out", "loss", "F1", "ROC AUC", "accuracy", "mAP", "macro mAP", "d'"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    rows = [("student", distilled.student), ("teacher", distilled.teacher)]
    for name, judged in rows:
        if judged is not None:
            loss = "" if judged.loss != judged.loss else f"{judged.loss:.4g}"
            card, field = judged.card, judged.field
            numbers = (
                card.f1,
                card.roc_auc,
                card.accuracy,
                card.mAP,
                field.macro_map,
                field.d_prime,
            )
            table.add_row(name, loss, *(f"{number:.3f}" for number in numbers))
    left_out = f"; left out: {counts(distilled.skipped)}" if distilled.skipped else ""
    out.print(
        f"{distilled.train_clips:,} clips learned from, {distilled.validation_clips:,} held out"
        f"{left_out}; true is: {distilled.truth_is}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    out.print(table, highlight=False)
    for line in (
        f"Use it: earmark annotate DATA --checkpoint {distilled.output}",
        f"Held out: {distilled.output / HELD_OUT_FILE}, for earmark evaluate --only",
    ):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
