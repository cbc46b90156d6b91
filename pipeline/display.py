"""What a person sees: the plan, the live line, the summary."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from pipeline.dataflow import Places
from pipeline.expected import sentence
from pipeline.profile import SIDES
from pipeline.quantities import amount as _amount
from pipeline.quantities import counted
from pipeline.quantities import duration as _duration
from pipeline.rehearse import Rehearsal
from pipeline.run import Job, Outcome
from pipeline.terminal import printable
from student.labels import is_audioset
from transforms.progress import Progress, read_progress
from transforms.records import ClipError

_LOG_EVERY_S = 10.0  # where the output is no terminal
_REFRESH_S = 0.5
_TOP_TAGS = 10


def escape(text: str) -> str:
    """A name as text: neither rich nor the terminal takes anything in it for an instruction."""
    return markup.escape(printable(text))


def show_job(job: Job, console: Console) -> None:
    """Says what is about to happen, and to what."""
    checkpoint, workers = job.checkpoint, job.workers
    where = f"{workers.count} {workers.gpu} a worker" if workers.count else workers.device
    if workers.processes > workers.devices and where.startswith("cuda"):
        where = f"{workers.devices} of {where}" if workers.devices > 1 else where
        where += f", shared by {workers.processes} processes,"
    elif workers.processes > 1:
        where = f"{workers.processes} of {where}, a process each"
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"Student: {escape(checkpoint.name)}, {len(checkpoint.labels)} labels "
        f"({'AudioSet' if is_audioset(checkpoint.labels) else 'its own'}), on {where} in {workers.dtype}"
    )
    if checkpoint.is_bundled:
        say(
            "  The bundled student is a small demonstration model; for real work use "
            "--checkpoint bookbot/distil-ast-audioset",
            style="yellow",
        )
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in sorted(job.ignored.items()))
    say(
        f"Input: {job.shards:,} shard{'s' * (job.shards != 1)}, {_amount(job.size_bytes, job.rows)}"
        + (f", {job.skipped:,} of them finished earlier" if job.skipped else "")
        + (f"; left aside as no audio: {escape(ignored)}" if ignored else "")
    )
    for note in job.notes:
        say(f"  {escape(note)}", style="yellow")


def show_rehearsal(job: Job, rehearsal: Rehearsal, console: Console) -> None:
    """What a dry run found, and what would be done."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"The output {escape(job.output.uri)} can be written.")
    if rehearsal.left:
        say(f"  {escape(rehearsal.left)}", style="yellow")
    clip = rehearsal.clip
    if clip is None:
        say("There is no clip to try: every shard is finished, or the first one is empty.")
    elif clip.clip.error is not None:
        error = clip.clip.error
        say(
            f"The first clips could not be tagged; the last, {escape(str(clip.clip.member))}: "
            f"{escape(error.type)}: {escape(error.message)}",
            style="yellow",
        )
    else:
        found = ", ".join(f"{escape(tag['name'])} {tag['score']:.2f}" for tag in rehearsal.tags[:3])
        say(
            f"One clip tagged here, {escape(str(clip.clip.member))}: {found or 'no score reaches its threshold'} "
            f"(loaded in {_duration(rehearsal.load_s)}, tagged in {_duration(rehearsal.score_s)})"
        )
    shards = f"{job.todo.shards:,} shard{'s' * (job.todo.shards != 1)}"
    say(f"To do: {shards}, {_amount(job.todo.size_bytes, job.todo.rows)}.")
    if job.settings:
        say("The job's options:")
        for setting in job.settings:
            say(f"  --{setting.option}={escape(setting.value)}")
            say(f"      {escape(setting.why)}", style="dim")
    if job.options.job_file:
        say(f"The job is in {escape(job.options.job_file)}.")
    say("Nothing was run, and nothing submitted." if job.settings else "Nothing was run.")
    for note in job.notes:
        say(escape(note), style="yellow")


def show_submitted(job: Job, console: Console) -> None:
    """The end of a command that does not wait for its job."""
    template = job.template
    said = (
        f"Wrote the template {template}; no job was started."
        if template
        else "Submitted. When the job is done, the same command sums it up."
    )
    console.print(printable(said), highlight=False, soft_wrap=True, markup=False)


def watch_job(job: Job, places: Places, console: Console) -> Callable[[str, dict[str, int]], None]:
    """Says where a Dataflow job is seen; gives what prints a line whenever something has changed."""

    def say(line: str) -> None:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)

    say(f"Job {places.job_id}: {places.console}")
    say(f"Cancel it with: {places.cancel}")
    started = time.monotonic()

    def show(state: str, counters: dict[str, int]) -> None:
        elapsed_s = time.monotonic() - started
        clips, failed = counters.get("clips", 0), counters.get("clips_failed", 0)
        line = f"{state} after {_duration(elapsed_s)}"
        if clips:
            line += (
                f": {counted(clips, 'clip')}, {counters.get('shards', 0):,}/{counted(job.todo.shards, 'shard')}, "
                f"{clips / elapsed_s:.1f} clips/s, {failed:,} failed"
            )
        say(line)

    return show


@contextmanager
def live(job: Job, folder: Path, console: Console) -> Iterator[None]:
    """Shows clips, speed, failures and time left while its context lasts."""
    started, stop = time.monotonic(), threading.Event()

    def line() -> str:
        done, elapsed_s = read_progress(folder), time.monotonic() - started
        return progress_line(done, job.todo.done(done), job.todo.shards, elapsed_s)

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
        f"{counted(done.clips, 'clip')}, {done.shards}/{counted(shards, 'shard')}, {rate:.1f} clips/s, "
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
            f"{counted(outcome.clips, 'clip')} ({_duration(outcome.audio_s)} of audio) in {_duration(outcome.wall_s)}: "
            f"{outcome.clips / outcome.wall_s:.1f} clips/s, {outcome.audio_s / outcome.wall_s:.0f}x real time",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("Nothing left to do: every shard is finished.")
    console.print(
        f"The output holds {counted(total.clips, 'clip')}, {total.clips - total.failed:,} scored "
        f"and {total.failed:,} failed.",
        highlight=False,
        soft_wrap=True,
    )
    if outcome.estimate is not None:
        console.print(sentence(outcome.estimate), highlight=False, soft_wrap=True, markup=False)
    if not total.clips:
        console.print("No shard held any audio.", style="yellow")
    for reason, count in total.failures.most_common():
        stage, _, kind = reason.partition("/")
        in_part = total.partial and ClipError(stage, kind, "").partial
        console.print(
            f"  {count:,} in part only: {escape(kind)}"
            if in_part
            else f"  {count:,} failed to {escape(stage)}: {escape(kind)}",
            style="yellow" if in_part else "red",
            highlight=False,
            soft_wrap=True,
        )
    if total.tags:
        table = Table("most frequent tags", "clips", box=None, header_style="bold", pad_edge=False)
        table.columns[1].justify = "right"
        for name, count in total.tags.most_common(_TOP_TAGS):
            table.add_row(escape(name), f"{count:,}")
        console.print(table)
    elif total.clips > total.failed:
        console.print(
            "No score reached its threshold, so that no clip has a tag; all scores are there. `earmark "
            "retag` with a lower --threshold makes tags of them.",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
    asked = f"earmark query {shlex.quote(output)} --limit 10"
    console.print(printable(f"Look at it: {asked}"), markup=False, highlight=False, soft_wrap=True)


def show_profile(profile: dict[str, Any] | None, console: Console) -> None:
    """Where the time of a run went, the bottleneck, and what to do about it."""
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    if profile is None:
        say("No profile: nothing was annotated, or the runner tells no metrics.")
        return
    say(
        f"{profile['shards']:,} shard{'s' * (profile['shards'] != 1)} took "
        f"{_duration(profile['shards_s'])} of the workers' time. Both sides of a shard work at once:"
    )
    table = Table(
        "", "seconds", "share", "ms a clip", box=None, header_style="bold", pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for side in SIDES:
        table.add_row(f"{side} side", style="bold")
        for stage, took in profile[side].items():
            a_clip = took["ms_per_clip"]
            table.add_row(
                f"  {stage}",
                f"{took['s']:,.3f}",
                f"{100 * took['share']:.1f} %",
                "" if a_clip is None else f"{a_clip:,.3f}",
            )
    table.add_row("before it", style="bold")
    for stage, took in profile["before"].items():
        table.add_row(f"  {stage}", f"{took['s']:,.3f}", f"{100 * took['share']:.1f} %*", "")
    console.print(table)
    say("* of the whole run; the shares of each side add up to 100 %.")
    say(f"Bottleneck: {profile['bottleneck']}. {profile['advice']}.")
