"""`earmark export`: when each label is heard, for programs that show it beside the sound.

The events are an output's `segments`, or are made of its `chunks` with the output's thresholds.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.terminal import errors_said

if TYPE_CHECKING:  # heavy to import, and only types here
    from student.labels import Label
    from transforms.output import Output
    from transforms.write import RowOptions

AUDACITY_SUFFIX = ".txt"
RAVEN_SUFFIX = ".selections.txt"  # what Raven gives its own
_RAVEN_COLUMNS = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)",
    "Label", "Score",
)  # fmt: skip
_CSV_OF_CLIP = ("clip_id", "shard", "member")
_CSV_OF_PART = ("start_s", "end_s")  # of a clip that is a part of a recording
_CSV_OF_EVENT = ("start_s", "end_s", "index", "mid", "name", "score")
_STEM_BYTES = 100  # with hash and suffix far below what any file system takes


@click.command()
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--audacity",
    metavar="DIR",
    help="Folder for a label track of each clip, which Audacity imports beside the sound.",
)
@click.option("--raven", metavar="DIR", help="Folder for a Raven selection table of each clip.")
@click.option("--csv", metavar="FILE", help="One table of all events.")
@click.option(
    "--label",
    "only",
    multiple=True,
    metavar="NAME",
    help="Only events of this label, by name or mid; can be given several times.",
)
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    metavar="S",
    help="Only events whose highest score is at least S.",
)
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def export(output: str, verbose: bool, **options: Any) -> None:
    """Write when each label is heard in the clips of OUTPUT, for Audacity, Raven or a table.

    OUTPUT is what `earmark annotate --segments` (or `--chunks`) wrote, here or in a bucket. A clip
    without events has no file.
    """
    with errors_said(
        verbose, "Files that were written are whole; the same command writes them anew"
    ):
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        job = prepare(ExportOptions(output, **options))

        def shown(shards: Iterable[str]) -> Iterable[str]:
            return track(
                shards,
                "exporting",
                len(job.shards),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )

        done = execute(job, shown)
        click.echo(
            f"{done.events:,} event{'s' * (done.events != 1)} in {done.with_events:,} of {done.clips:,} "
            f"clip{'s' * (done.clips != 1)} of {output}"
            + (f", {done.failed:,} of which have no scores" if done.failed else "")
            + f" ({done.wall_s:.1f} s)."
        )
        for what, place in (
            ("label tracks for Audacity", job.options.audacity),
            ("selection tables for Raven", job.options.raven),
        ):
            if place:
                click.echo(f"Wrote {done.with_events:,} {what} into {place}.")
        if job.options.csv:
            click.echo(f"Wrote {job.options.csv}.")


@dataclass(frozen=True)
class ExportOptions:
    """The options of `earmark export`; `--help` describes them."""

    source: str
    audacity: str | None = None
    raven: str | None = None
    csv: str | None = None
    only: tuple[str, ...] = ()
    min_score: float | None = None
    billing_project: str | None = None


@dataclass(frozen=True)
class ExportJob:
    """An export whose options have been checked."""

    options: ExportOptions
    source: Output
    labels: tuple[Label, ...]
    rows: RowOptions  # the thresholds of the output, for segments made of chunks
    student_rate: int  # Hz
    shards: list[str]
    only: frozenset[int] | None  # indices of the labels that are wanted; None: all


@dataclass
class Exported:
    """What an export came to."""

    clips: int = 0
    failed: int = 0  # have no scores
    with_events: int = 0
    events: int = 0
    wall_s: float = 0.0


def prepare(options: ExportOptions) -> ExportJob:
    """Checks what can be checked, and writes nothing.

    Raises:
        UsageError: OUTPUT, a label or a place cannot be used as asked.
    """
    from pipeline.recorded import recorded_labels, recorded_run
    from transforms.output import open_output
    from transforms.storage import Access
    from transforms.write import CLIPS_FOLDER, RowOptions, finished_shards

    if not options.source:
        raise UsageError("OUTPUT is empty; is a shell variable unset?")
    places = (
        ("--audacity", options.audacity),
        ("--raven", options.raven),
        ("--csv", options.csv),
    )
    if all(place is None for _, place in places):
        raise UsageError(
            "what is to be written? Give --audacity DIR, --raven DIR or --csv FILE, or several of them"
        )
    for name, place in places:
        if place is not None and (not place or "://" in place):
            raise UsageError(
                f"{name} is {place!r}; expected a path of this machine: Audacity and Raven open no URLs"
            )
    if options.csv is not None and Path(options.csv).is_dir():
        raise UsageError(f"--csv {options.csv!r} is a folder; name a file")
    try:
        source = open_output(options.source, Access(options.billing_project))
    except (ImportError, ValueError) as error:
        raise UsageError(f"OUTPUT {options.source!r} cannot be used: {error}") from error
    made = recorded_run(source, options.source)
    labels = recorded_labels(source, made)
    try:
        thresholds = tuple(made["thresholds"][label.name] for label in labels)
        rate = int(made["scoring"]["features"]["sample_rate"])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{source.uri}/run.json lacks {error}: take the folder as earmark annotate wrote it"
        ) from error
    rows = RowOptions(thresholds, score_type=made["scoring"]["score_type"])
    shards = sorted(finished_shards(source))
    if not shards:
        raise UsageError(
            f"{source.uri}/{CLIPS_FOLDER} holds no finished shard: there is nothing to export"
        )
    return ExportJob(options, source, labels, rows, rate, shards, _wanted(options.only, labels))


def execute(
    job: ExportJob, shown: Callable[[Iterable[str]], Iterable[str]] = lambda shards: shards
) -> Exported:
    """Writes the files; one row group of the output is in memory at a time.

    Args:
        job: of `prepare`.
        shown: is given the shards one by one, and gives them back.

    Raises:
        UsageError: the output has no events, or cannot be read; a file cannot be written.
    """
    started, done, options = time.monotonic(), Exported(), job.options
    with ExitStack() as opened:
        table = None
        for shard_id in shown(job.shards):
            for clip, events in _clips_of(job, shard_id):
                if options.csv and table is None:
                    table = opened.enter_context(_Table(Path(options.csv)))
                done.clips += 1
                done.failed += events is None
                events = [event for event in events or () if _is_wanted(job, event)]
                if not events:
                    continue
                done.with_events += 1
                done.events += len(events)
                if table is not None:
                    table.add(clip, events)
                name = clip["clip_id"].removeprefix(f"{shard_id}/")
                stem = f"{_safe(shard_id)}/{safe_stem(name, clip['clip_id'])}"
                if options.audacity:
                    _write(options.audacity, stem + AUDACITY_SUFFIX, audacity_track(events))
                if options.raven:
                    # A student hears nothing above half its own rate, whatever the source's.
                    high_hz = min(clip["sample_rate"] or job.student_rate, job.student_rate) / 2
                    _write(options.raven, stem + RAVEN_SUFFIX, raven_table(events, high_hz))
    done.wall_s = time.monotonic() - started
    return done


def audacity_track(events: Sequence[dict[str, Any]]) -> str:
    """An Audacity label track: start, end and label of each event, seconds with six decimals."""
    return "".join(f"{e['start_s']:.6f}\t{e['end_s']:.6f}\t{_cell(e['name'])}\n" for e in events)


def raven_table(events: Sequence[dict[str, Any]], high_hz: float) -> str:
    """A Raven selection table; labels have no frequencies, so each covers all that is heard.

    Args:
        events: segments.
        high_hz: up to where the student hears.
    """
    lines = ["\t".join(_RAVEN_COLUMNS)]
    for number, event in enumerate(events, 1):
        lines.append(
            f"{number}\tSpectrogram 1\t1\t{event['start_s']:.6f}\t{event['end_s']:.6f}\t0.0\t{high_hz:.1f}"
            f"\t{_cell(event['name'])}\t{event['score']:.4f}"
        )
    return "\n".join(lines) + "\n"


def safe_stem(name: str, clip_id: str) -> str:
    """A file name without suffix for a clip, the same in every export and unique by a hash.

    Letters, digits, `.`, `-` and `_` of `name` stay; whatever else, path separators included,
    becomes `_`. The hash keeps apart what that makes equal, and what differs by case alone.
    """
    digest = hashlib.sha256(clip_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{_safe(name)}-{digest}"


def _safe(name: str) -> str:
    plain = re.sub(r"[^\w.-]+", "_", name).lstrip(".-_")
    return plain.encode("utf-8", "replace")[:_STEM_BYTES].decode("utf-8", "ignore") or "clip"


def _cell(text: str) -> str:
    """Text for one cell of a line of cells."""
    return re.sub(r"\s+", " ", text).strip()


def _write(folder: str, name: str, text: str) -> None:
    path = Path(folder) / name
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


class _Table:
    """The table of all events: built beside FILE, and put there once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._stream: TextIO

    def __enter__(self) -> _Table:
        try:
            self._stream = self._partial.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise UsageError(
                f"--csv {str(self._path)!r} cannot be written: {error.strerror}"
            ) from error
        self._csv = csv.writer(self._stream, lineterminator="\n")
        of_part = [f"clip_{column}" for column in _CSV_OF_PART]
        self._csv.writerow([*_CSV_OF_CLIP, *of_part, *_CSV_OF_EVENT])
        return self

    def add(self, clip: dict[str, Any], events: Iterable[dict[str, Any]]) -> None:
        """Adds a clip's events."""
        of_clip = [clip.get(column) for column in (*_CSV_OF_CLIP, *_CSV_OF_PART)]
        for event in events:
            self._csv.writerow([*of_clip, *(event[column] for column in _CSV_OF_EVENT)])

    def __exit__(self, kind: Any, *_: object) -> None:
        self._stream.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


def _wanted(names: Sequence[str], labels: Sequence[Label]) -> frozenset[int] | None:
    if not names:
        return None
    known = {key: label.index for label in labels for key in (label.name, label.mid) if key}
    for name in names:
        if name not in known:
            lower = {key.lower(): key for key in known}
            close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
            hint = f"; the nearest are {', '.join(repr(lower[key]) for key in close)}" * bool(close)
            raise UsageError(f"--label {name!r} is no label of this output{hint}")
    return frozenset(known[name] for name in names)


def _is_wanted(job: ExportJob, event: dict[str, Any]) -> bool:
    return (job.only is None or event["index"] in job.only) and (
        job.options.min_score is None or event["score"] >= job.options.min_score
    )


def _clips_of(
    job: ExportJob, shard_id: str
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]] | None]]:
    """(some columns, events) of each clip of a shard; no events, but None, without scores.

    Raises:
        UsageError: the file cannot be read, or has neither segments nor chunks.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from transforms.segments import chunks_of_clips
    from transforms.write import CLIPS_FOLDER, segments_of

    place = f"{CLIPS_FOLDER}/{shard_id}.parquet"
    try:
        with job.source.open(place) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
            names = file.schema_arrow.names
            plain = [c for c in (*_CSV_OF_CLIP, "sample_rate", *_CSV_OF_PART) if c in names]
            made_of = next((column for column in ("segments", "chunks") if column in names), None)
            if made_of is None:
                raise UsageError(
                    f"{job.source.uri} has no events: its clips have neither segments nor chunks. "
                    "Annotate into a new folder with --segments (or --chunks), and export that"
                )
            for group in range(file.num_row_groups):
                # Without Arrow's threads, one of which could abort the process as it ends.
                table = file.read_row_group(group, [*plain, made_of], use_threads=False)
                events: Iterable[list[dict[str, Any]] | None]
                if made_of == "segments":
                    events = table[made_of].to_pylist()
                else:
                    clips = chunks_of_clips(table[made_of].combine_chunks())
                    events = (clip and segments_of(*clip, job.labels, job.rows) for clip in clips)
                yield from zip(table.select(plain).to_pylist(), events, strict=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, UsageError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{job.source.uri}/{place} cannot be read ({reason})") from error
