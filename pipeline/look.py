"""`earmark report` and `earmark compare`: the commands; `report`, `compare` and `page` do the work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.quantities import counted
from pipeline.terminal import errors_said, visible

if TYPE_CHECKING:  # heavy to import, and only types here
    from evaluation.scores import Source
    from pipeline.compare import Change, Comparison
    from pipeline.page import Media
    from pipeline.preview import Wanted
    from transforms.storage import Access

_SHOWN = 15  # labels and clips in the terminal
_FLIPS = 3  # tags of a clip that are named there

_max_audio_mb = click.option(
    "--max-audio-mb",
    type=click.FloatRange(0),
    default=8.0,
    show_default=True,
    metavar="N",
    help="Megabytes of the page for sound, the most telling clips first.",
)
_no_audio = click.option(
    "--no-audio", is_flag=True, help="Leave out sounds and spectrograms: no shard is opened."
)
_seed = click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of what is drawn at random.",
)


@click.command()
@click.argument("output", metavar="OUTPUT")
@click.option("--to", metavar="FILE", help="Where the page goes. [default: report.html in OUTPUT]")
@click.option(
    "--labels",
    type=click.IntRange(0),
    default=12,
    show_default=True,
    metavar="N",
    help="How many of the most frequent labels show clips.",
)
@click.option(
    "--clips",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Best, borderline and random clips of each label.",
)
@_max_audio_mb
@_no_audio
@_seed
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def report(output: str, verbose: bool, **options: Any) -> None:
    """Write one HTML page of what OUTPUT holds, with clips to listen to.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket. The page opens from disk and
    loads nothing.
    """
    with errors_said(verbose, kept="Run the same command again"):
        access = _access(options["billing_project"])
        _check(options["to"], "--to", drawn=True)
        source = _source("OUTPUT", output, access)
        from pipeline.page import report_page, wanted_in
        from pipeline.report import measure
        from transforms.output import publish_bytes

        measured = _said(
            lambda: measure(
                source, labels=options["labels"], each=options["clips"], seed=options["seed"]
            )
        )
        if not measured.clips:
            damaged = f" ({visible(measured.unreadable[0])})" if measured.unreadable else ""
            raise UsageError(
                f"{source.uri}/clips holds no clip that can be read{damaged}: there is nothing to "
                "report; annotate first"
            )
        media = _media(wanted_in(measured), options, access)
        page = report_page(measured, source, media).encode()
        if options["to"] is None:
            from pipeline.ledger import REPORT_FILE

            try:
                publish_bytes(source.output, REPORT_FILE, page)
            except OSError as error:
                raise UsageError(
                    f"{source.uri}/{REPORT_FILE} cannot be written ({error.strerror or error}); name "
                    "another place with --to"
                ) from error
            place = f"{source.uri}/{REPORT_FILE}"
        else:
            _write("--to", options["to"], page)
            place = options["to"]
        for said in measured.unreadable:
            click.echo(f"Left out: {visible(said)}", err=True)
        click.echo(
            f"{counted(measured.clips, 'clip')}, {measured.failed:,} of them failed, {counted(measured.tags, 'tag')}."
        )
        _say_media(media)
        click.echo(f"Wrote {visible(place)} ({len(page) / 1e6:.1f} MB); open it in a browser.")


@click.command()
@click.argument("a", metavar="OUTPUT_A")
@click.argument("b", metavar="OUTPUT_B")
@click.option("--to", metavar="FILE", help="Write a page with clips to listen to.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--save", metavar="FILE", help="Write everything as JSON.")
@click.option(
    "--clips",
    type=click.IntRange(0),
    default=12,
    show_default=True,
    metavar="N",
    help="How many of the most changed clips are told of.",
)
@_max_audio_mb
@_no_audio
@_seed
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def compare(a: str, b: str, verbose: bool, **options: Any) -> None:
    """Hold two outputs over the same clips against each other.

    They may be of two checkpoints, or of one with other thresholds or options. Clips are
    matched by clip_id, else by their bytes and member; labels by mid, else by name.
    """
    with errors_said(verbose, kept="Run the same command again"):
        access = _access(options["billing_project"])
        _check(options["to"], "--to", drawn=options["to"] is not None)
        _check(options["save"], "--save", drawn=False)
        sources = _source("OUTPUT_A", a, access), _source("OUTPUT_B", b, access)
        from pipeline.compare import as_json
        from pipeline.compare import compare as measure

        result = _said(lambda: measure(*sources, changes=options["clips"], seed=options["seed"]))
        if options["save"]:
            _write("--save", options["save"], as_json(result).encode())
            click.echo(f"Wrote {options['save']}", err=True)
        if options["to"]:
            from pipeline.page import comparison_page, wanted_row

            media = _media([wanted_row(change.row) for change in result.changes], options, access)
            _write("--to", options["to"], comparison_page(result, media).encode())
            _say_media(media, err=options["as_json"])
            click.echo(f"Wrote {options['to']}", err=True)
        # After the files: who reads the tables may stop reading.
        if options["as_json"]:
            click.echo(as_json(result).rstrip("\n"))
        else:
            _show(result)


def _access(billing_project: str | None) -> Access:
    from transforms.storage import Access

    return Access(billing_project)


def _source(name: str, place: str, access: Access) -> Source:
    from evaluation.scores import open_source

    source = _said(lambda: open_source(place, access))
    if not source.run:
        raise UsageError(
            f"{name} {place!r} is a Parquet file; expected the folder that earmark annotate wrote"
        )
    return source


def _said(do: Callable[[], Any]) -> Any:
    from evaluation.scores import EvaluationError

    try:
        return do()
    except EvaluationError as error:
        raise UsageError(visible(str(error))) from error


def _check(file: str | None, option: str, *, drawn: bool) -> None:
    """Refuses what cannot be written before any work is done."""
    if file is not None:
        if not Path(file).absolute().parent.is_dir():
            raise UsageError(
                f"{option} {file!r} cannot be written: there is no folder {str(Path(file).parent)!r}"
            )
        if Path(file).is_dir():
            raise UsageError(f"{option} {file!r} cannot be written: it is a folder; name a file")
    if drawn and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "the page needs matplotlib, which is not installed: pip install --editable '.[report]'"
        )


def _media(wanted: Sequence[Wanted], options: dict[str, Any], access: Access) -> Media:
    from pipeline.page import Media
    from pipeline.preview import Previews, previews

    found = Previews() if options["no_audio"] else previews(wanted, access)
    return Media(found, int(options["max_audio_mb"] * 1e6))


def _say_media(media: Media, err: bool = False) -> None:
    said = f"{counted(media.sounds, 'clip')} with sound ({media.audio_bytes / 1e6:.1f} MB)"
    if media.silenced:
        said += f", {media.silenced:,} for which --max-audio-mb has no room"
    absent = media.absent
    if absent:
        said += f"; {sum(absent.values()):,} without: " + "; ".join(
            f"{visible(why)} ({count:,})" for why, count in absent.most_common(3)
        )
    click.echo(f"{said}.", err=err)


def _write(option: str, file: str, content: bytes) -> None:
    try:
        Path(file).write_bytes(content)
    except OSError as error:
        raise UsageError(f"{option} {file!r} cannot be written: {error.strerror}") from error


def _show(result: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.compare import headline

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"A: {visible(result.a)}\nB: {visible(result.b)}")
    for name, a, b in result.differences:
        console.print(visible(f"  {name}: {_short(a)} in A, {_short(b)} in B"), style="dim")
    for note in result.notes:
        console.print(visible(note), style="yellow")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in headline(result):
        table.add_row(name, value)
    console.print(table)
    if result.unscored_a or result.unscored_b:
        console.print(
            f"Of the clips that both have, {result.unscored_a:,} have no scores in A and "
            f"{result.unscored_b:,} none in B; they are left out."
        )
    changed = [
        one for one in result.by_change() if one.gained or one.lost or round(one.mean_change, 4)
    ]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("label", overflow="fold")
    for name in ("tags A", "tags B", "gained", "lost", "Jaccard", "mean A", "mean B"):
        table.add_column(name, justify="right")
    for one in changed[:_SHOWN]:
        agreement = "" if one.agreement is None else f"{one.agreement:.3f}"
        table.add_row(
            _cell(one.name), f"{one.tags_a:,}", f"{one.tags_b:,}", f"+{one.gained:,}", f"-{one.lost:,}",
            agreement, f"{one.mean_a:.4f}", f"{one.mean_b:.4f}",
        )  # fmt: skip
    if changed:
        console.print()
        console.print(table)
    if len(changed) > _SHOWN:
        console.print(f"{len(changed) - _SHOWN:,} more labels changed; --json or --to has them.")
    if result.changes:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("most changed clips", overflow="fold")
        table.add_column("label", overflow="fold")
        for name in ("A", "B"):
            table.add_column(name, justify="right")
        table.add_column("tags", overflow="fold")
        for change in result.changes[:_SHOWN]:
            clip = _cell(str(change.row["clip_id"]))
            table.add_row(
                clip,
                _cell(change.label),
                f"{change.a:.3f}",
                f"{change.b:.3f}",
                _cell(_flips(change)),
            )
        console.print()
        console.print(table)


def _flips(change: Change) -> str:
    """The tags that a clip gained and lost, the first few by name."""
    flips = [*(f"+{name}" for name in change.gained), *(f"-{name}" for name in change.lost)]
    more = f" and {len(flips) - _FLIPS} more" if len(flips) > _FLIPS else ""
    return ", ".join(flips[:_FLIPS]) + more


def _cell(text: str) -> Any:
    from rich.text import Text

    return Text(visible(text))  # not a string, which may be taken for markup


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
