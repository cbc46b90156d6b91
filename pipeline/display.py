"""What a person sees: the plan, the live line, the summary."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.run import Job, Outcome
from student.labels import is_audioset
from transforms.progress import Progress, read_progress
from transforms.write import CLIPS_FOLDER

_LOG_EVERY_S = 10.0  # where the output is no terminal
_REFRESH_S = 0.5
_TOP_TAGS = 10


def show_job(job: Job, console: Console) -> None:
    """Says what is about to happen, and to what."""
    checkpoint, shards = job.checkpoint, len(job.plan.shards)
    console.print(
        f"Student: {escape(checkpoint.name)}, {len(checkpoint.labels)} labels "
        f"({'AudioSet' if is_audioset(checkpoint.labels) else 'its own'}), on {job.device} in {job.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    if checkpoint.is_bundled:
        console.print(
            "  The bundled student is a small demonstration model; for real work use "
            "--checkpoint bookbot/distil-ast-audioset",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in sorted(job.plan.ignored.items()))
    console.print(
        f"Input: {shards} shard{'s' * (shards != 1)}, {_size(sum(s.size_bytes for s in job.plan.shards))}"
        + (f", {job.finished} of them finished earlier" if job.finished else "")
        + (f"; left aside as no audio: {escape(ignored)}" if ignored else ""),
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def live(job: Job, folder: Path, console: Console) -> Iterator[None]:
    """Shows clips, speed, failures and time left while its context lasts."""
    size = sum(shard.size_bytes for shard in job.todo)
    limits = [shard.max_clips for shard in job.todo if shard.max_clips is not None]
    clips = sum(limits) if len(limits) == len(job.todo) else None
    started, stop = time.monotonic(), threading.Event()

    def line() -> str:
        done, elapsed_s = read_progress(folder), time.monotonic() - started
        # Bytes tell how far a run is, unless it stops at a number of clips.
        share = done.clips / clips if clips else done.bytes / size if size else 0.0
        return progress_line(done, share, len(job.todo), elapsed_s)

    def show_in_terminal() -> None:
        with console.status("loading the student") as status:
            while not stop.wait(_REFRESH_S):
                status.update(line())

    def log() -> None:
        while not stop.wait(_LOG_EVERY_S):
            console.print(line(), highlight=False, soft_wrap=True)

    thread = threading.Thread(target=show_in_terminal if console.is_terminal else log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def progress_line(done: Progress, share: float, shards: int, elapsed_s: float) -> str:
    """One line on how far a run is; `share` of the work done gives the time left."""
    rate = done.clips / elapsed_s
    line = (
        f"{done.clips:,} clips, {done.shards}/{shards} shards, {rate:.1f} clips/s, "
        f"{done.audio_s / elapsed_s:.0f}x real time, {done.failed:,} failed"
    )
    if done.shards == shards:
        return f"{line}, finishing"
    if share < 0.01:
        return f"{line}, time left unknown yet"
    return f"{line}, {_duration(elapsed_s * max(0.0, 1 - share) / share)} left"


def show_outcome(outcome: Outcome, output: str, console: Console) -> None:
    """The end of a run: totals, failures, the most frequent tags, how to go on."""
    total = outcome.total
    if outcome.shards:
        console.print(
            f"{outcome.clips:,} clips ({_duration(outcome.audio_s)} of audio) in {_duration(outcome.wall_s)}: "
            f"{outcome.clips / outcome.wall_s:.1f} clips/s, {outcome.audio_s / outcome.wall_s:.0f}x real time",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("Nothing left to do: every shard is finished.")
    console.print(
        f"The output holds {total.clips:,} clips, {total.clips - total.failed:,} scored and {total.failed:,} failed.",
        highlight=False,
        soft_wrap=True,
    )
    if not total.clips:
        console.print("No shard held any audio.", style="yellow")
    for reason, count in total.failures.most_common():
        stage, _, kind = reason.partition("/")
        console.print(
            f"  {count:,} failed to {stage}: {kind}", style="red", highlight=False, soft_wrap=True
        )
    if total.tags:
        table = Table("most frequent tags", "clips", box=None, header_style="bold", pad_edge=False)
        table.columns[1].justify = "right"
        for name, count in total.tags.most_common(_TOP_TAGS):
            table.add_row(escape(name), f"{count:,}")
        console.print(table)
    clips = f"{output.rstrip('/')}/{CLIPS_FOLDER}/*.parquet".replace("'", "''")
    query = f"SELECT member, [t.name for t in tags] AS tags FROM '{clips}' LIMIT 10"
    console.print("Query it, for instance with DuckDB:", highlight=False, soft_wrap=True)
    command = f"  python -c {json.dumps(f'import duckdb; duckdb.sql({query!r}).show()')}"
    console.print(command, markup=False, highlight=False, soft_wrap=True)


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6_000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3_600:.1f} h"
