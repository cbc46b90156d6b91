"""`earmark verify`: whether an output holds each clip of its inputs once, and says nothing false."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from pipeline import flags
from pipeline.options import UsageError
from pipeline.terminal import EXIT_FAILURES, errors_said, visible

if TYPE_CHECKING:  # heavy to import, and only types here
    from pipeline.options import AnnotateOptions
    from pipeline.plan import Todo
    from transforms.output import Output
    from transforms.records import Shard
    from transforms.storage import Access
    from transforms.verify import Checked, Problem
    from transforms.write import ShardSummary

_SHARDS_AT_ONCE = 4  # remote ones wait for storage most of the time
_SHOWN = 20


@click.command()
@click.argument("output", metavar="OUTPUT")
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@flags.inputs_from
@click.option(
    "--quick",
    is_flag=True,
    help="Compare listings, footers and totals only: read no rows, no clips.",
)
@click.option(
    "--audio",
    is_flag=True,
    help="Read the inputs' audio too, and compare its hash with audio_xxh128 of each row.",
)
@click.option(
    "--show",
    type=click.IntRange(1),
    default=_SHOWN,
    show_default=True,
    metavar="N",
    help="Name at most N things of each kind that is wrong.",
)
@click.option("--json", "as_json", is_flag=True, help="Say it as JSON.")
@flags.billing_project
@click.option("--verbose", "-v", is_flag=True, help="Show tracebacks.")
def verify(
    output: str,
    inputs: tuple[str, ...],
    inputs_from: tuple[str, ...],
    quick: bool,
    audio: bool,
    show: int,
    as_json: bool,
    billing_project: str | None,
    verbose: bool,
) -> None:
    """Recount OUTPUT: every clip of its inputs is there once, and all that it says is true.

    OUTPUT is what `earmark annotate` wrote. Its inputs are those that run.json names, unless
    others are given. Exits with 0, or with 1 and what is wrong.
    """
    with errors_said(verbose, "Nothing was changed"):
        if quick and audio:
            raise UsageError("--quick reads no audio: leave out --audio or --quick")
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True, highlight=False, soft_wrap=True)

        def shown(shards: Iterable[Any], count: int) -> Iterable[Any]:
            return track(
                shards, "verifying", count, console=console, transient=True,
                disable=not console.is_terminal,
            )  # fmt: skip

        found = verify_output(
            output, inputs, inputs_from, billing_project, quick=quick, audio=audio, shown=shown, keep=show
        )  # fmt: skip
        if as_json:
            click.echo(json.dumps(found.as_json(), indent=2))
        else:
            for line in found.lines():
                click.echo(visible(line))
        if found.counts:
            sys.exit(EXIT_FAILURES)


@dataclass
class Found:
    """What a recount came to."""

    output: str
    keep: int  # problems of a kind that are named
    quick: bool = False
    shards: int = 0  # that have a file
    of: str = "shard"  # what a file holds
    total: ShardSummary = field(default_factory=lambda: _no_totals())
    compared: int | None = None  # shards of the inputs; None: there were none to compare with
    notes: list[str] = field(default_factory=list)  # what could not be looked at
    counts: Counter[str] = field(default_factory=Counter)  # kind -> how many
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, *problems: Problem) -> None:
        """Counts problems; keeps the first few of each kind."""
        for problem in problems:
            self.counts[problem.kind] += 1
            named = self.named.setdefault(problem.kind, [])
            if len(named) < self.keep:
                named.append(problem.what)

    def lines(self) -> Iterator[str]:
        """For people: the notes, what is wrong, or that nothing is."""
        from transforms.verify import KINDS

        for note in self.notes:
            yield f"Note: {note}."
        for kind, meaning in KINDS.items():
            if count := self.counts[kind]:
                yield f"{count:,} {meaning}:"
                yield from (f"  {what}" for what in self.named[kind])
                if count > len(self.named[kind]):
                    yield f"  and {count - len(self.named[kind]):,} more"
        total = self.total
        what = (
            f"{total.clips:,} clips in {self.shards:,} {self.of}{'s' * (self.shards != 1)}, "
            f"{total.clips - total.failed:,} scored and {total.failed:,} failed"
        )
        if self.counts:
            yield f"{self.output} is not as it should be: {what}."
        elif self.compared is None:
            yield f"Verified {self.output}: {what}; not compared with the inputs."
        else:
            of = f"{self.compared:,} shards" if self.quick else "clip"
            said = (
                f"each of the inputs' {of} has its file"
                if self.quick
                else f"each {of} of the inputs once"
            )
            yield f"Verified {self.output}: {what}; {said}."

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": self.output,
            "good": not self.counts,
            "shards": self.shards,
            "clips": self.total.clips,
            "failed": self.total.failed,
            "input_shards": self.compared,
            "notes": self.notes,
            "problems": {
                kind: {"count": count, "named": self.named[kind]}
                for kind, count in self.counts.items()
            },
        }


def _no_totals() -> ShardSummary:
    from transforms.write import ShardSummary

    return ShardSummary()


def verify_output(
    output: str,
    inputs: tuple[str, ...] = (),
    inputs_from: tuple[str, ...] = (),
    billing_project: str | None = None,
    *,
    quick: bool = False,
    audio: bool = False,
    shown: Any = lambda shards, count: shards,
    keep: int = _SHOWN,
) -> Found:
    """Recounts an output; see `verify`.

    Args:
        output: where it is.
        inputs: to compare with, in place of those that `run.json` names.
        inputs_from: files that name inputs.
        billing_project: as for annotate.
        quick: read no rows and no clips.
        audio: hash the inputs' audio.
        shown: is given what is looked at one by one, and how many there are; gives them back.
        keep: how many problems of a kind are named.

    Raises:
        UsageError: there is no output, or its `run.json` or `labels.parquet` is of no use.
        OSError: storage does not answer.
    """
    import numpy as np

    from pipeline import ledger
    from pipeline.at_once import few_at_once
    from pipeline.plan import Todo
    from pipeline.recorded import recorded_labels, recorded_options, recorded_rows, recorded_run
    from transforms.output import open_output
    from transforms.storage import Access, is_local
    from transforms.verify import Problem, check_file
    from transforms.write import CLIPS_FOLDER, finished_shards

    access = Access(billing_project)
    try:
        place = open_output(output, access)
    except (ImportError, ValueError) as error:
        raise UsageError(f"OUTPUT {output!r} cannot be used: {error}") from error
    made = recorded_run(place, output)
    labels = recorded_labels(place, made)
    rows = recorded_rows(made, labels, place.uri)
    found = Found(output, keep, quick)
    if ledger.digest(made["scoring"]) != made["fingerprint"]:
        found.add(Problem("run", "run.json: its fingerprint is not that of its scoring"))

    finished = sorted(finished_shards(place))
    found.shards = len(finished)
    compacted = made.get(ledger.COMPACTED_KEY)
    planned, alone = Todo(), finished
    if compacted is None:
        options = recorded_options(made, output, inputs, inputs_from)
        planned, alone = _planned(
            options, access, place, set(finished), bool(inputs or inputs_from), found
        )
    else:
        found.of, whole = "file", compacted["from"]["output"]
        if inputs or inputs_from or audio:
            raise UsageError(
                f"OUTPUT {output!r} was made by earmark compact, and its files are no shards' that could "
                f"be compared with inputs: verify the output that it was made of, {whole!r}"
            )
        found.notes.append(
            "not compared with the inputs: it was made by earmark compact, and its files are no shards'; "
            f"verify {whole} for that"
        )

    def one(item: Shard | str) -> tuple[Checked, list[Problem]]:
        shard, shard_id = (None, item) if isinstance(item, str) else (item, item.id)
        name = f"{CLIPS_FOLDER}/{shard_id}.parquet"
        checked = check_file(
            place, name, labels, rows, made["fingerprint"], quick=quick, compacted=compacted is not None
        )  # fmt: skip
        compared: list[Problem] = []
        if shard is not None and not quick:
            compared = list(_compared(shard, checked, name, access, audio))
        return checked, compared

    at_once = 1 if is_local(place.uri) else _SHARDS_AT_ONCE
    digests = []
    items: Iterator[Shard | str] = chain(planned, alone)
    for checked, compared in shown(few_at_once(one, items, at_once), len(finished)):
        found.add(*checked.problems, *compared)
        if checked.summary is not None:
            found.total.add(checked.summary)
        digests.append(checked.id_digests)
    if digests and not quick:
        found.add(*_doubles(place, finished, np.concatenate(digests)))
    complete = not found.counts["unreadable"]
    if compacted is not None and complete and found.total.clips != compacted["clips"]:
        found.add(
            Problem(
                "totals",
                f"run.json: {compacted['clips']:,} clips were compacted, the files hold "
                f"{found.total.clips:,}: one is missing, or is not of this output",
            )
        )
    _check_summary(place, found, complete=complete)
    return found


def _planned(
    options: AnnotateOptions,
    access: Access,
    output: Output,
    finished: set[str],
    given: bool,
    found: Found,
) -> tuple[Todo, list[str]]:
    """(the shards of the inputs that have a file, ids of files without one); what is odd is told of."""
    from pipeline import ledger
    from pipeline.plan import Packer, Todo, named_inputs, shards_of
    from transforms.listing import InputError
    from transforms.records import as_text
    from transforms.storage import public_url
    from transforms.verify import Problem

    try:
        inputs = named_inputs(options, access)
    except UsageError as error:
        if given:
            raise
        found.notes.append(f"not compared with the inputs: {error}")
        return Todo(), sorted(finished)
    there, gone = [], []
    for place in inputs:
        try:
            next(shards_of((place,), options, access, Counter()), None)
            there.append(place)
        except InputError as error:
            if given:
                raise UsageError(str(error)) from error
            gone.append(str(error))
    for reason in gone:
        found.notes.append(f"an input is gone, and its clips are not compared: {reason}")
    packer, foreign = Packer(), set(finished)
    apart: set[str] = set()  # files of loose files that cannot be compared
    folders = set()  # of loose files
    if there:
        found.compared = 0
        for shard in shards_of(tuple(there), options, access, Counter()):
            found.compared += 1
            if shard.kind == "files":
                folders.add(as_text(public_url(shard.uri)))
            if shard.id in foreign:
                foreign.remove(shard.id)
                packer.add(shard)
            elif shard.id not in finished:
                found.add(
                    Problem(
                        "missing shard",
                        f"{as_text(public_url(shard.uri))} (clips/{shard.id}.parquet)",
                    )
                )
    if foreign and not given:
        # A later run into this output may have had other inputs; files say what theirs were.
        later, loose = _by_source(output, sorted(foreign), options, access)
        if later:
            for shard in later.values():
                packer.add(shard)
            found.compared = (found.compared or 0) + len(later)
            found.notes.append(
                f"{len(later):,} shards are not of the inputs that run.json names, and were found where their "
                "files say"
            )
        # Of loose files only their folder is recorded, and not which of them a glob named.
        apart = {
            shard_id
            for shard_id, uri in loose.items()
            if not gone and shard_id not in later and uri not in folders
        }
        if apart:
            found.notes.append(
                f"{len(apart):,} files are of loose files that no input of run.json names, and are not "
                "compared with them; name all inputs for that"
            )
        foreign -= later.keys()
    if gone and foreign:
        found.notes.append(f"{len(foreign):,} files are not compared with their shards")
    elif there:
        for shard_id in sorted(foreign - apart):
            found.add(Problem("foreign file", f"clips/{shard_id}.parquet"))
    planned = packer.todo()
    changed = [f"{as_text(public_url(s.uri))} ({how})" for s, how in islice(ledger.changed_shards(output, planned), 1_000)]  # fmt: skip
    if changed:
        more = ", ..." * (len(changed) > 5)
        found.notes.append(
            f"{len(changed):,} shards have changed since they were annotated: {', '.join(changed[:5])}{more}"
        )
    return planned, sorted(foreign)


def _by_source(
    output: Output, shard_ids: list[str], options: AnnotateOptions, access: Access
) -> tuple[dict[str, Shard], dict[str, str]]:
    """Of finished shards: (those found again where their files say they came from, folders of loose files)."""
    from pipeline import ledger
    from pipeline.plan import shards_of
    from transforms.listing import InputError
    from transforms.write import Footer

    sources, loose = set(), {}
    for shard_id, footer in ledger.footers(output, shard_ids):
        if isinstance(footer, Footer) and footer.source is not None:
            uri = str(footer.source["uri"])
            sources.add(uri)
            if "files" in footer.source:
                loose[shard_id] = uri
    wanted, again = set(shard_ids), {}
    for uri in sorted(sources):
        try:
            for shard in shards_of((uri,), options, access, Counter()):
                if shard.id in wanted:
                    again[shard.id] = shard
        except (InputError, OSError):
            continue
    return again, loose


def _compared(
    shard: Shard, checked: Checked, name: str, access: Access, audio: bool
) -> Iterator[Problem]:
    """How a file's rows differ from the clips of its shard."""
    from transforms.records import BROKEN_SHARD, as_text
    from transforms.recount import read_ids, recount
    from transforms.storage import public_url
    from transforms.verify import Problem

    if any(problem.kind == "unreadable" for problem in checked.problems):
        return
    # The paths of a Parquet file may be whole where its audio is not.
    broken = shard.kind == "parquet" and any(
        clip_id.startswith(f"{shard.id}/{BROKEN_SHARD}") for clip_id in checked.ids
    )
    try:
        digests = dict(read_ids(shard, access)) if audio or broken else {}
        expected = Counter(digests.keys() if audio or broken else recount(shard, access))
    except OSError as error:
        reason = error.strerror or error
        yield Problem(
            "missing clip",
            f"{name}: its source {as_text(public_url(shard.uri))} cannot be read: {reason}",
        )
        return
    rows = Counter(checked.ids)
    for clip_id in (expected - rows).elements():
        yield Problem("missing clip", clip_id)
    for clip_id in rows.keys() - expected.keys():
        yield Problem("foreign row", clip_id)
    if audio:
        for clip_id, digest in zip(checked.ids, checked.hashes, strict=True):
            if digest is None or clip_id not in digests:
                continue
            if digests[clip_id] is None:
                yield Problem("changed audio", f"{clip_id} (it cannot be read)")
            elif digests[clip_id] != digest:
                yield Problem("changed audio", clip_id)


def _doubles(output: Output, finished: list[str], digests: Any) -> Iterator[Problem]:
    """The ids that several rows have. Their numbers are compared first, which takes 8 bytes a clip."""
    import numpy as np
    import pyarrow.parquet as pq

    from transforms.verify import Problem, digest_of
    from transforms.write import CLIPS_FOLDER

    values, times = np.unique(digests, return_counts=True)
    suspects = set(values[times > 1].tolist())
    if not suspects:
        return
    seen: Counter[str] = Counter()
    for shard_id in finished:
        with output.open(f"{CLIPS_FOLDER}/{shard_id}.parquet") as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            ids = file.read(["clip_id"], use_threads=False)["clip_id"].to_pylist()
        seen.update(clip_id for clip_id in ids if digest_of(clip_id) in suspects)
    for clip_id, rows in seen.items():
        if rows > 1:
            yield Problem("double row", f"{clip_id} ({rows:,} rows)")


def _check_summary(output: Output, found: Found, *, complete: bool) -> None:
    from pipeline import ledger
    from transforms.verify import Problem

    content = output.read(ledger.SUMMARY_FILE)
    if content is None:
        found.notes.append(
            f"{ledger.SUMMARY_FILE} is not there: no run into this output has come to its end"
        )
        return
    try:
        stated = json.loads(content)
    except ValueError as error:
        found.add(Problem("run", f"{ledger.SUMMARY_FILE} is damaged ({error})"))
        return
    if complete:
        for what in ledger.differing_totals(stated, found.total):
            found.add(Problem("totals", f"{ledger.SUMMARY_FILE}: {what}"))
