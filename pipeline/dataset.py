"""`earmark dataset`: clips of an output as a dataset, with their audio, that `load_dataset` reads."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.quantities import counted
from pipeline.terminal import EXIT_FAILURES, errors_said, printable

if TYPE_CHECKING:  # heavy to import, and only types here
    from pipeline.dataset_files import Totals
    from pipeline.extract import Wanted
    from pipeline.views import Views
    from transforms.storage import Access

LEFT_OUT_FILE = "left_out.csv"
CARD_FILE = "README.md"
DATA_FOLDER = "data"
_ONLY_SPLIT = (("train", 1.0),)  # what load_dataset calls the files where no split is named
_NAMED = 20  # clips without audio that are told of one by one


@click.command(
    epilog=flags.examples(
        "earmark dataset tags --tag Dog --under Music --any --to dogs-and-music",
        "earmark dataset tags --tag 'Siren>0.5' --split train=0.9,test=0.1 --to sirens",
    )
)
@click.argument("output", metavar="OUTPUT")
@click.option("--to", required=True, metavar="DIR", help="A new local folder for the dataset.")
@click.option(
    "--where",
    metavar="SQL",
    help="Clips for which this holds: a condition as of `earmark query`, with score('Dog') and has('Animal').",
)
@flags.tags
@flags.under
@flags.any_of
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N clips.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parquet", "webdataset"]),
    default="parquet",
    show_default=True,
    help="Parquet with an audio column, or tars of audio and .json.",
)
@click.option("--scores", is_flag=True, help="Keep the scores of all labels, not the tags alone.")
@click.option(
    "--split",
    metavar="NAME=R,...",
    help="Splits and their shares of the clips, such as train=0.9,test=0.1. Clips with the same audio, or of one recording, stay together. [default: all is train]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Of --split."
)
@click.option(
    "--shard-mb",
    type=click.FloatRange(0, min_open=True),
    default=500.0,
    show_default=True,
    metavar="MB",
    help="About how large a file is to be (MiB).",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help=f"Exit with 0 although the audio of some clips was not found; {LEFT_OUT_FILE} names them.",
)
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def dataset(output: str, verbose: bool, **options: Any) -> None:
    """Write clips of OUTPUT with their audio as a dataset that `datasets.load_dataset` reads.

    OUTPUT is what `earmark annotate` wrote, here or in a bucket. The audio is fetched from where
    it lies, as it is; a part of a recording is cut out, as FLAC.
    """
    with errors_said(verbose, "DIR appears once it is whole: run the same command again"):
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)

        def shown(rows: Iterable[Any], count: int) -> Iterable[Any]:
            return track(
                rows, "writing", count, console=console, transient=True,
                disable=not console.is_terminal,
            )  # fmt: skip

        asked = DatasetOptions(output, **options)
        done = write_dataset(asked, shown)
        for line in done.lines():
            click.echo(printable(line))
        for row, why in done.left_out[:_NAMED]:
            click.echo(printable(f"{row.clip_id}: {why}"), err=True)
        if done.left_out:
            click.echo(
                (f"{len(done.left_out):,} clips have" if len(done.left_out) != 1 else "1 clip has")
                + f" no audio any more; {asked.to}/{LEFT_OUT_FILE} names them all",
                err=True,
            )
            if not asked.allow_missing:
                sys.exit(EXIT_FAILURES)


@dataclass(frozen=True)
class DatasetOptions:
    """The options of `earmark dataset`; `--help` describes them."""

    output: str
    to: str
    where: str | None = None
    tags: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    any_of: bool = False
    limit: int | None = None
    format_: str = "parquet"
    scores: bool = False
    split: str | None = None
    seed: int = 0
    shard_mb: float = 500.0
    allow_missing: bool = False
    billing_project: str | None = None


@dataclass
class Written:
    """What a dataset came to."""

    options: DatasetOptions
    splits: dict[str, Totals]
    tags: Counter[str]  # label -> clips
    left_out: list[tuple[Wanted, str]] = field(default_factory=list)  # with the reason

    def lines(self) -> Iterable[str]:
        """For people."""
        for name, totals in self.splits.items():
            yield (
                f"{name}: {counted(totals.clips, 'clip')}, {totals.audio_s / 3600:.2f} h, "
                f"{totals.size_bytes / 2**20:,.1f} MiB in "
                f"{counted(len(totals.files), 'file')}"
            )
        yield f"Wrote {self.options.to}: datasets.load_dataset({self.options.to!r}) reads it."


def write_dataset(
    options: DatasetOptions,
    shown: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, count: rows,
) -> Written:
    """Writes the dataset into a hidden folder beside DIR, which becomes DIR when it is whole.

    Args:
        options: of the command.
        shown: is given the clips one by one, and how many there are; gives them back.

    Raises:
        UsageError: the options, OUTPUT or DIR cannot be used as asked, or no clip is left.
        OSError: storage does not answer.
    """
    from pipeline.extract import wanted_of
    from pipeline.query import refuse_inside
    from pipeline.views import open_views
    from transforms.output import partial_of, remove_abandoned
    from transforms.storage import CLOUD_STORAGE, Access

    if options.billing_project and not options.output.startswith(CLOUD_STORAGE):
        raise UsageError("--billing-project is for gs://, and OUTPUT is not there")
    if not options.to:
        raise UsageError("--to is empty; is a shell variable unset?")
    refuse_inside("--to", options.to, options.output)
    target = Path(options.to).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"--to {options.to!r} is there already: give a new folder, or remove that one"
        )
    shares = shares_of(options.split)
    access = Access(options.billing_project)
    with open_views(options.output, access) as views:
        sql = sql_of(options, views)
        wanted = views.interruptible(lambda: wanted_of(views, sql, None, chunk=False))
        if not wanted:
            raise UsageError("no clip is as asked: there is nothing to write")
        split_of = divide(wanted, shares, options.seed)
        partial = partial_of(target)
        try:
            if target.parent.is_dir():
                remove_abandoned(target.parent)
            (partial / DATA_FOLDER).mkdir(parents=True)
            done = _fill(partial, wanted, split_of, shares, options, views, access, shown)
            _write_left_out(partial / LEFT_OUT_FILE, done.left_out)
            # An empty folder gives way.
            partial.replace(target)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(partial)):
                raise
            raise UsageError(
                f"--to {options.to!r} cannot be written: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done


def sql_of(options: DatasetOptions, views: Views) -> str:
    """The query for the ids of the clips that are wanted.

    Raises:
        UsageError: a label is unknown, or a condition cannot be understood.
    """
    from pipeline.query import QueryOptions, condition_of

    asked = QueryOptions(
        options.output, tags=options.tags, under=options.under, any_of=options.any_of
    )
    flagged = condition_of(asked, views)[0]
    if options.where is not None:
        _check_condition(options.where, views)
    # The line ends, so that a comment does.
    conditions = [f"({text}\n)" for text in (options.where, flagged) if text]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    limit = f" LIMIT {options.limit}" if options.limit is not None else ""
    return f"SELECT clip_id FROM clips{where} ORDER BY clip_id{limit}"


def _check_condition(text: str, views: Views) -> None:
    """Refuses what is not one condition.

    Raises:
        UsageError: it is empty, is no expression, or its value is not true or false.
    """
    if not text.strip():
        raise UsageError("--where is empty; is a shell variable unset?")
    try:
        # In parentheses it is one expression, and alone it cannot close what it did not open.
        sql = views.checked(f"SELECT ({text}\n) FROM clips")
        views.checked(f"SELECT clip_id FROM clips WHERE {text}\n")
        with views.errors_explained():
            kind = str(views.connection.sql(sql).types[0])
    except UsageError as error:
        raise UsageError(f"--where {text!r}: {error}") from error
    if kind != "BOOLEAN":
        raise UsageError(
            f"--where {text!r} is a value ({kind}), not a condition such as 'duration_s < 30'"
        )


def shares_of(text: str | None) -> tuple[tuple[str, float], ...]:
    """(name, share) of each split of `train=0.9,test=0.1`.

    Raises:
        UsageError: it cannot be understood, or the shares are not 1 in sum.
    """
    if text is None:
        return _ONLY_SPLIT
    shares = []
    for one in text.split(","):
        parsed = re.fullmatch(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*([0-9]*\.?[0-9]+)\s*", one)
        if parsed is None or parsed.group(1) == "all" or float(parsed.group(2)) <= 0:
            raise UsageError(
                f"--split {text!r}: {one!r} is not NAME=SHARE, such as train=0.9 (a name has letters, "
                "digits and _, and is not 'all', which datasets keeps for itself)"
            )
        shares.append((parsed.group(1), float(parsed.group(2))))
    if len({name.lower() for name, _ in shares}) != len(shares):
        raise UsageError(f"--split {text!r} names a split twice")
    if abs(sum(share for _, share in shares) - 1) > 1e-6:
        raise UsageError(
            f"--split {text!r}: the shares are {sum(share for _, share in shares):g} in sum, expected 1"
        )
    return tuple(shares)


def divide(
    wanted: Sequence[Wanted], shares: Sequence[tuple[str, float]], seed: int
) -> dict[str, str]:
    """clip_id -> split, about as large as the shares say; no sound is in two of them.

    Clips with the same encoded bytes stay together, as do those of one recording (the same member
    of the same shard), and whatever these two hold together in turn. Which group comes where
    depends on the seed and on what is wanted alone, not on its order.

    Raises:
        UsageError: a split gets no clip.
    """
    import xxhash

    above: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def top(key: tuple[Any, ...]) -> tuple[Any, ...]:
        while (upper := above.setdefault(key, key)) != key:
            above[key] = key = above.setdefault(upper, upper)
        return key

    for row in wanted:
        own = top(("clip", row.clip_id))
        above[own] = top(("bytes", row.xxh128) if row.xxh128 else own)
        above[top(own)] = top(("member", row.shard, row.member))
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in wanted:
        groups.setdefault(top(("clip", row.clip_id)), []).append(row.clip_id)

    def drawn(clip_ids: list[str]) -> tuple[int, str]:
        first = min(clip_ids)
        return xxhash.xxh3_64_intdigest(f"{seed}/{first}".encode()), first

    split_of: dict[str, str] = {}
    names, ends, end = [name for name, _ in shares], [], 0.0
    for _, share in shares:
        end += share
        ends.append(end * len(wanted))
    done = 0
    for clip_ids in sorted(groups.values(), key=drawn):
        middle = done + len(clip_ids) / 2
        at = next((at for at, end in enumerate(ends) if middle < end), len(ends) - 1)
        split_of.update(dict.fromkeys(clip_ids, names[at]))
        done += len(clip_ids)
    for name, share in shares:
        if name not in split_of.values():
            raise UsageError(
                f"--split {name}={share:g} gets none of the {counted(len(wanted), 'clip')}, in {counted(len(groups), 'group')} "
                "that stay together: give it more, or ask for more clips"
            )
    return split_of


def _fill(
    folder: Path,
    wanted: Sequence[Wanted],
    split_of: dict[str, str],
    shares: Sequence[tuple[str, float]],
    options: DatasetOptions,
    views: Views,
    access: Access,
    shown: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Written:
    from pipeline import dataset_card
    from pipeline.dataset_files import About, Clip, ClipProblem, ParquetFiles, TarFiles
    from pipeline.extract import found_clips

    about = About(views, wanted, scores=options.scores)
    files = ParquetFiles if options.format_ == "parquet" else TarFiles
    features = files.features(views, wanted, scores=options.scores)
    writers = {
        name: files(folder / DATA_FOLDER, name, features, int(options.shard_mb * 2**20))
        for name, _ in shares
    }
    done = Written(options, {}, Counter())
    try:
        for row, found in shown(found_clips(wanted, views, access), len(wanted)):
            if isinstance(found, str):
                done.left_out.append((row, found))
                continue
            try:
                with Clip.of(row, found, about.of(row), folder) as clip:
                    writers[split_of[row.clip_id]].add(clip)
            except ClipProblem as problem:
                done.left_out.append((row, str(problem)))
                continue
            done.tags.update(name for name, _ in row.tags)
    finally:
        for writer in writers.values():
            writer.close()
    done.splits = {name: writer.totals for name, writer in writers.items() if writer.totals.clips}
    if not done.splits:
        raise UsageError(
            f"the audio of none of the {counted(len(wanted), 'clip')} was found; of the first: "
            f"{done.left_out[0][0].clip_id}: {done.left_out[0][1]}"
        )
    card = dataset_card.card(done, features, views, files.suffix)
    (folder / CARD_FILE).write_text(card, "utf-8")
    return done


def _write_left_out(place: Path, left_out: Iterable[tuple[Wanted, str]]) -> None:
    rows = [(row.clip_id, row.shard, row.member or "", why) for row, why in left_out]
    if not rows:
        return
    with place.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("clip_id", "shard", "member", "reason"))
        writer.writerows(rows)
