"""`earmark query`: asks an output, in SQL or in flags, and cuts out the audio of the answer."""

from __future__ import annotations

import csv
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.quantities import counted
from pipeline.terminal import EXIT_FAILURES, errors_said

if TYPE_CHECKING:  # heavy to import, and only types here
    from pipeline.views import LabelRow, Views

_CONDITION = re.compile(r"(.+?)\s*(>=|<=|>|<)\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*", re.DOTALL)
_NAMED = 5  # rows without a file that are told of one by one
_ORDER = re.compile(r"(.+?)\s+(asc|desc)", re.IGNORECASE | re.DOTALL)


@click.command()
@click.argument("output", metavar="OUTPUT")
@click.argument("sql", required=False, metavar="[SQL]")
@flags.tags
@flags.under
@flags.any_of
@click.option(
    "--chunk",
    is_flag=True,
    help="Ask for chunks instead of clips, by their own scores (needs annotate --chunks). With SQL: --extract and --play take what is between the rows' start_s and end_s.",
)
@click.option(
    "--sort",
    metavar="NAME",
    help="By the score of a label, highest first, or by a column; 'NAME desc' and 'NAME asc' say how.",
)
@click.option("--limit", type=click.IntRange(0), metavar="N", help="At most N rows.")
@click.option(
    "--columns",
    multiple=True,
    metavar="NAMES",
    help="Columns and labels (their scores), with commas between them. May be repeated.",
)
@click.option(
    "--format",
    "format_",
    # Those of pipeline.rows; a test compares them.
    type=click.Choice(["table", "csv", "jsonl", "parquet"]),
    help="[default: that of --to FILE's suffix, else table]",
)
@click.option("--to", metavar="FILE", help="Write the rows to a local file.")
@click.option(
    "--extract",
    metavar="DIR",
    help="Write the audio of each row to DIR, with clips.csv, instead of the rows.",
)
@click.option(
    "--format-audio",
    type=click.Choice(["flac", "wav", "original"]),
    help="Of --extract; original is the file as it lies there. [default: flac]",
)
@click.option("--play", is_flag=True, help="Play the audio of each row. [default: of the first 10]")
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def query(output: str, verbose: bool, **options: Any) -> None:
    """Ask OUTPUT which clips have what, in SQL or with the options.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket; it is only read. SQL is
    DuckDB's, over the views clips, failures, tags, chunks, segments, labels and all_rows, with
    score('Dog') and has('Animal'). docs/query.md has examples.
    """
    began: list[str] = []

    def kept() -> str:
        if not began:
            return "Nothing was changed"
        return f"{began[0]} keeps the files that were written; its clips.csv names them"

    with errors_said(verbose, kept):
        try:
            _query(QueryOptions(output, **options), began)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads, such as `head`, has had enough. What is left must not be
            # written when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class QueryOptions:
    """The options of `earmark query`; `--help` describes them."""

    output: str
    sql: str | None = None
    tags: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    any_of: bool = False
    chunk: bool = False
    sort: str | None = None
    limit: int | None = None
    columns: tuple[str, ...] = ()
    format_: str | None = None
    to: str | None = None
    extract: str | None = None
    format_audio: str | None = None
    play: bool = False
    billing_project: str | None = None


def _query(options: QueryOptions, began: list[str]) -> None:
    """Answers; the folder of --extract is put into `began` once something of it is changed."""
    from pipeline.rows import format_of
    from pipeline.views import open_views
    from transforms.storage import CLOUD_STORAGE, Access

    for name in ("extract", "to", "columns", "sort"):
        value = getattr(options, name)
        if any(not text.strip() for text in ([value] if isinstance(value, str) else value or ())):
            raise UsageError(f"--{name} is empty; is a shell variable unset?")
    asked = ("tags", "under", "any_of", "sort", "columns")
    if options.sql is not None and any(getattr(options, name) for name in asked):
        raise UsageError(
            "SQL says itself which rows, columns and order: leave out --tag, --under, --any, --sort and "
            "--columns, or the SQL"
        )
    audio = options.extract is not None or options.play
    if options.sql is not None and options.chunk and not audio:
        raise UsageError(
            "--chunk beside SQL is for --extract and --play; FROM chunks asks for chunks"
        )
    if audio and (options.format_ or options.to or (options.extract is not None and options.play)):
        raise UsageError("one of --extract, --play and --format or --to at a time")
    if options.format_audio and options.extract is None:
        raise UsageError("--format-audio is for --extract")
    if options.chunk and options.format_audio == "original":
        raise UsageError("the bytes of a chunk cannot be cut out: take --format-audio flac or wav")
    if options.billing_project and not options.output.startswith(CLOUD_STORAGE):
        raise UsageError("--billing-project is for gs://, and OUTPUT is not there")
    format_ = format_of(options.to, options.format_)
    if options.to is not None:
        refuse_inside("--to", options.to, options.output)
    if options.extract is not None:
        refuse_inside("--extract", options.extract, options.output)
        from pipeline.extract import refuse_foreign

        refuse_foreign(Path(options.extract))
    with open_views(options.output, Access(options.billing_project)) as views:
        sql = options.sql if options.sql is not None else sql_of(options, views)
        if audio:
            _take_audio(views, sql, options, began)
        else:
            views.interruptible(lambda: _write(views, sql, options, format_))


def sql_of(options: QueryOptions, views: Views) -> str:
    """The query that the flags ask for.

    Raises:
        UsageError: a label or a column is unknown, or a condition cannot be understood.
    """
    view = "chunks" if options.chunk else "clips"
    columns = ("clip_id", "start_s", "end_s", "scores") if options.chunk else views.columns
    where, named, scores = condition_of(options, views)

    def expression(text: str, option: str) -> tuple[str, bool]:
        """(SQL, whether it is a label's score) of a column or label."""
        if text in columns:
            from pipeline.views import name_quoted

            return name_quoted(text), False
        if text not in views.labels:
            known = ", ".join(columns)
            try:
                views.labels.find(text)
            except UsageError as error:
                raise UsageError(f"{option} {text!r}: {error}; columns are {known}") from None
        label = views.labels.find(text)
        return scores.get(label.index, f"scores[{label.index + 1}]"), True

    from pipeline.views import name_quoted

    order = ""
    if options.sort is not None:
        sort, way = options.sort.strip(), None
        if sort not in columns and sort not in views.labels and (asked := _ORDER.fullmatch(sort)):
            sort, way = asked.group(1), asked.group(2).upper()
        by, is_score = expression(sort, "--sort")
        order = f" ORDER BY {by} {way or ('DESC' if is_score else 'ASC')} NULLS LAST, clip_id"
        if options.chunk:
            order += ", start_s"
        if is_score:
            named.append(views.labels.find(sort))
    if options.columns:
        chosen = [name for text in options.columns for name in _names(text, columns, views)]
        if options.extract is not None or options.play:  # the audio is found by these
            needed = ["clip_id", *(["start_s", "end_s"] if options.chunk else [])]
            chosen += [name for name in needed if name not in chosen]
    else:
        usual = (
            ("clip_id", "start_s", "end_s") if options.chunk else ("clip_id", "duration_s", "tags")
        )
        chosen = [*usual, *dict.fromkeys(label.name for label in named)]
    select = ", ".join(
        f"{expression(name, '--columns')[0]} AS {name_quoted(name)}" for name in chosen
    )
    where = where and f" WHERE {where}"
    limit = "" if options.limit is None else f" LIMIT {options.limit}"
    return f"SELECT {select} FROM {view}{where}{order}{limit}"


def condition_of(options: QueryOptions, views: Views) -> tuple[str, list[LabelRow], dict[int, str]]:
    """(SQL of --tag and --under, labels of --tag, SQL of the scores that `tags` holds, by label).

    The first is empty where nothing is asked.

    Raises:
        UsageError: a label is unknown, or a condition cannot be understood.
    """
    conditions, named, scores = [], [], {}
    for text in options.tags:
        label, condition, settled = _condition(text, options, views)
        conditions.append(condition)
        named.append(label)
        if settled and not options.any_of:
            # Every row that is left has this tag, and the tag has the score.
            scores[label.index] = f"list_filter(tags, lambda t: t.index = {label.index})[1].score"
    for text in options.under:
        below = views.labels.below(text)
        if options.chunk:
            reached = [_reaches(views.labels.rows[index]) for index in below]
            conditions.append(f"({' OR '.join(filter(None, reached)) or 'false'})")
        else:
            conditions.append(f"{views.has_macro(below)}(tags)")
    return (" OR " if options.any_of else " AND ").join(conditions), named, scores


def _condition(text: str, options: QueryOptions, views: Views) -> tuple[LabelRow, str, bool]:
    """(label, SQL, whether each row that it leaves has the tag) of `Dog` or `Dog>0.5`."""
    text = text.strip()
    parsed = None if text in views.labels else _CONDITION.fullmatch(text)
    if parsed is None:
        if "<" in text or ">" in text:
            raise UsageError(
                f"--tag {text!r} cannot be understood: expected a label, or a label, one of > >= < <=, and "
                "a number, such as 'Dog>0.5'"
            )
        label = views.labels.find(text)
        if options.chunk:
            reaches = _reaches(label)
            if reaches is None:
                raise UsageError(
                    f"--tag {text!r}: {label.name} has no threshold in this output and never is a tag; say "
                    "which score, such as --tag 'NAME>0.5'"
                )
            return label, reaches, False
        return label, f"{views.has_macro([label.index])}(tags)", True
    name, operator, value = parsed.groups()
    label = views.labels.find(name)
    try:
        score = _as_stored(float(value))
    except (ValueError, OverflowError):
        raise UsageError(f"--tag {text!r}: {value!r} is not a number") from None
    if not 0 <= score <= 1:
        raise UsageError(f"--tag {text!r}: a score is from 0 to 1, {value} is not")
    plain = f"scores[{label.index + 1}] {operator} {value}::FLOAT"
    # A score from the threshold up is in `tags`, a small column beside that of all scores.
    in_tags = (
        not options.chunk
        and views.run["scoring"]["top_k"] is None
        and label.threshold is not None
        and score >= label.threshold
    )
    if not in_tags:
        return label, plain, False
    reached = {">": ">", ">=": ">=", "<": ">=", "<=": ">"}[operator]
    with_it = (
        f"len(list_filter(tags, lambda t: t.index = {label.index} "
        f"AND t.score {reached} {value}::FLOAT)) > 0"
    )
    if operator in (">", ">="):
        return label, with_it, True
    return label, f"NOT ({with_it})", False


def _as_stored(score: float) -> float:
    """`score` as float32, in which thresholds are."""
    return float(struct.unpack("f", struct.pack("f", score))[0])


def _reaches(label: LabelRow) -> str | None:
    """Whether a score of a chunk makes a tag; None: none does."""
    if label.threshold is None:
        return None
    return f"scores[{label.index + 1}] >= {label.threshold!r}::FLOAT"


def _names(text: str, columns: tuple[str, ...], views: Views) -> list[str]:
    """The names in a value of --columns. A label with commas can stand alone, or in double quotes."""
    if text in columns or text in views.labels:
        return [text]
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def _write(views: Views, sql: str, options: QueryOptions, format_: str) -> None:
    from itertools import islice

    from pipeline import rows

    limit = options.limit
    with views.errors_explained():
        if format_ == "parquet":
            relation = views.connection.sql(views.checked(sql))
            names = [views.header(name) for name in relation.columns]
            relation = relation if limit is None else relation.limit(limit)
        else:
            result = views.execute(sql)
            names = [views.header(column[0]) for column in result.description]
        if format_ == "table":
            count, more = rows.write_table(names, rows.rows_of(result), limit)
            if more:
                click.echo(
                    f"The first {count} rows; --limit N shows more of them, --format csv all.",
                    err=True,
                )
            elif not count:
                click.echo("No row.", err=True)
            return
        if format_ == "parquet":

            def write(stream: Any) -> int:
                return rows.write_parquet(relation, names, stream)
        else:
            writer = rows.write_csv if format_ == "csv" else rows.write_jsonl

            def write(stream: Any) -> int:
                return writer(names, islice(rows.rows_of(result), limit), stream)

        binary = format_ == "parquet"
        if options.to is None:
            write(rows.to_stdout(binary))
        else:
            count = rows.write_file(options.to, write, binary=binary)
            click.echo(f"Wrote {counted(count, 'row')} to {options.to}", err=True)


def _take_audio(views: Views, sql: str, options: QueryOptions, began: list[str]) -> None:
    from rich.console import Console
    from rich.progress import track

    from pipeline import extract
    from pipeline.rows import safe
    from transforms.storage import Access

    access = Access(options.billing_project)
    limit = extract.PLAYED if options.play and options.limit is None else options.limit
    wanted = views.interruptible(lambda: extract.wanted_of(views, sql, limit, chunk=options.chunk))
    if options.extract is None:
        done = extract.play(wanted, views, access)
    else:
        console = Console(stderr=True)

        def shown(rows: Any) -> Any:
            return track(
                rows, "extracting", len(wanted), console=console, transient=True,
                disable=not console.is_terminal,
            )  # fmt: skip

        format_ = options.format_audio or "flac"
        began.append(options.extract)
        done = extract.extract(wanted, Path(options.extract), format_, views, access, shown)
        files = sum(row.file is not None for row in done)
        click.echo(
            f"Wrote {counted(files, 'file')} and {extract.TABLE_FILE} to {options.extract}",
            err=True,
        )
    amiss = [row for row in done if row.problem is not None]
    for row in amiss[:_NAMED]:
        click.echo(safe(f"{row.wanted.clip_id}: {row.problem}"), err=True)
    if len(amiss) > _NAMED:
        where = f"; {extract.TABLE_FILE} names them all" if options.extract is not None else ""
        click.echo(f"and {len(amiss) - _NAMED:,} more{where}", err=True)
    if any(row.file is None for row in done):
        sys.exit(EXIT_FAILURES)


def refuse_inside(option: str, place: str, output: str) -> None:
    """Refuses a place to write to that is none of this machine, or is in the output.

    Raises:
        UsageError: it is such a place.
    """
    if "://" in place:
        raise UsageError(f"{option} {place!r}: it is written on this machine; copy it from there")
    inside = [Path(place).resolve(), *Path(place).resolve().parents]
    if "://" not in output and Path(output).resolve() in inside:
        raise UsageError(
            f"{option} {place!r} is inside of OUTPUT, which is only read: choose another place"
        )
