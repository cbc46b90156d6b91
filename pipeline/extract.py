"""Cuts the audio of a query's rows out of where it lies, into files or to the loudspeaker."""

from __future__ import annotations

import contextlib
import csv
import os
import posixpath
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import xxhash

from pipeline.ledger import from_folder
from pipeline.options import UsageError
from pipeline.rows import safe
from pipeline.views import Views
from transforms.cut import write_clip
from transforms.find import find_clips
from transforms.records import ClipError, EncodedClip
from transforms.storage import Access
from transforms.suffixes import AUDIO_SUFFIXES

TABLE_FILE = "clips.csv"
_HEADER = (
    "file", "clip_id", "shard", "member", "start_s", "end_s", "written_s", "tags", "problem",
)  # fmt: skip
_OWN_NAME = re.compile(r"[A-Za-z0-9._-]*-[0-9a-f]{12}(-[0-9.]+-[0-9.]+)?\.[a-z0-9]+")
PLAYED = 10  # clips of --play without --limit
_PLAYERS = {
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error"),
    "aplay": ("-q",),
}


@dataclass(frozen=True)
class Wanted:
    """A row whose audio is wanted."""

    clip_id: str
    shard: str
    member: str | None
    xxh128: str | None
    codec: str | None
    tags: tuple[tuple[str, float], ...]  # (name, score), highest first
    part_s: tuple[float | None, float | None]  # of the recording, that the clip is
    chunk_s: tuple[float, float] | None  # of the clip, that alone is wanted

    @property
    def cut_s(self) -> tuple[float | None, float | None]:
        """Start and end in the recording; None: its beginning, its end."""
        start_s, end_s = self.part_s
        if self.chunk_s is None:
            return start_s, end_s
        return (start_s or 0.0) + self.chunk_s[0], (start_s or 0.0) + self.chunk_s[1]


@dataclass
class Extracted:
    """What became of a row."""

    wanted: Wanted
    file: str | None = None  # in the folder
    written_s: float | None = None
    problem: str | None = None


def wanted_of(views: Views, sql: str, limit: int | None, *, chunk: bool) -> list[Wanted]:
    """What a query's rows are the audio of, in the order of the query, each once.

    Args:
        views: of the output.
        sql: a query with a column `clip_id`; with `chunk` also `start_s` and `end_s`.
        limit: most rows.
        chunk: whether only that chunk of the clip is wanted.

    Raises:
        UsageError: a column is missing.
    """
    with views.errors_explained():
        relation = views.connection.sql(views.checked(sql))
        needed = {"clip_id": "VARCHAR"}
        if chunk:
            needed |= {"start_s": "DOUBLE", "end_s": "DOUBLE"}
        for name in needed:
            if name not in relation.columns:
                raise UsageError(
                    f"the audio of rows is found by {', '.join(needed)}: add {name} to the columns of the "
                    f"query, which has {', '.join(map(views.header, relation.columns))}"
                )
        if limit is not None:
            relation = relation.limit(limit)
        cast = ", ".join(f"CAST({name} AS {kind})" for name, kind in needed.items())
        asked = dict.fromkeys(relation.project(cast).fetchall())
    unknown = [row for row in asked if any(value is None for value in row)]
    if unknown:
        raise UsageError(f"a row has no {' or no '.join(needed)}; leave such rows out")
    about: dict[str, tuple[Any, ...]] = {}
    part = ("start_s", "end_s") if "start_s" in views.columns else ("NULL", "NULL")
    ids = list(dict.fromkeys(row[0] for row in asked))
    with views.errors_explained():
        views.connection.register("wanted", pa.table({"clip_id": pa.array(ids, pa.string())}))
        found = views.connection.execute(
            f"SELECT clip_id, shard, member, audio_xxh128, codec, tags, {', '.join(part)} "
            "FROM all_rows SEMI JOIN wanted USING (clip_id)"
        )
        while rows := found.fetchmany(1_024):
            about |= {row[0]: row[1:] for row in rows}
        views.connection.unregister("wanted")
    missing = [clip_id for clip_id in ids if clip_id not in about]
    if missing:
        raise UsageError(
            f"the output has no clip {missing[0]!r}: clip_id is to be that of its rows"
        )
    wanted = []
    for clip_id, *chunk_s in asked:
        shard, member, xxh128, codec, tags, start_s, end_s = about[clip_id]
        wanted.append(
            Wanted(
                clip_id, shard, member, xxh128, codec,
                tuple((tag["name"], tag["score"]) for tag in tags or ()),
                (start_s, end_s),
                (chunk_s[0], chunk_s[1]) if chunk else None,
            )
        )  # fmt: skip
    return wanted


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds what is not an earlier extract's.

    Raises:
        UsageError: it is a file, cannot be read, or holds something and no `clips.csv` of ours.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UsageError(f"--extract {str(folder)!r} is a file; name a folder")
        if any(folder.iterdir()) and _earlier(folder) is None:
            raise UsageError(
                f"--extract {str(folder)!r} is not empty, and holds no {TABLE_FILE} of an earlier extract: "
                "give a new folder"
            )
    except OSError as error:
        raise UsageError(
            f"--extract {str(folder)!r} cannot be read: {error.strerror or error}"
        ) from error


def _earlier(folder: Path) -> list[str] | None:
    """Names of the files of an earlier extract; None: its table is not there, or no table of ours."""
    try:
        with (folder / TABLE_FILE).open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream)
            if tuple(next(rows, ())) != _HEADER:
                return None
            return [row[0] for row in rows if row and _OWN_NAME.fullmatch(row[0])]
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, csv.Error):
        return None


def extract(
    wanted: Sequence[Wanted],
    folder: Path,
    format: str,
    views: Views,
    access: Access,
    shown: Callable[[Iterable[Any]], Iterable[Any]] = lambda done: done,
) -> list[Extracted]:
    """Writes a file for each row, and `clips.csv` beside them, also where it is interrupted.

    The files of an earlier extract into the folder are removed first.

    Args:
        wanted: of `wanted_of`.
        folder: where; it is made.
        format: `flac`, `wav`, or `original` for the bytes as they lie there.
        views: of the output.
        access: how remote storage is used.
        shown: is given what was done, one by one, and gives it back.

    Returns:
        What became of each row, in their order.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = {row: Extracted(row) for row in wanted}
        for name in _earlier(folder) or ():
            (folder / name).unlink(missing_ok=True)
        try:
            for row in shown(_extracted(wanted, folder, format, views, access)):
                done[row.wanted] = row
        finally:
            _write_csv(folder / TABLE_FILE, done.values())
    except OSError as error:
        if error.filename is None:
            raise
        raise UsageError(f"{error.filename!r} cannot be written: {error.strerror}") from error
    return list(done.values())


def play(wanted: Sequence[Wanted], views: Views, access: Access) -> list[Extracted]:
    """Plays each clip, or says where its file is if there is nothing to play it with."""
    player = next((name for name in _PLAYERS if shutil.which(name)), None)
    with contextlib.ExitStack() as stack:
        if player is None:
            folder = Path(tempfile.mkdtemp(prefix="earmark-play-"))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-play-")))
        done = []
        for row in _extracted(wanted, folder, "wav", views, access):
            done.append(row)
            if row.file is None:
                continue
            click.echo(described(row.wanted))
            if player is not None:
                subprocess.run([player, *_PLAYERS[player], str(folder / row.file)], check=False)
            else:
                click.echo(f"  {folder / row.file}")
        if player is None:
            click.echo(
                f"There is neither of {' and '.join(_PLAYERS)} to play them; the files stay in {folder}",
                err=True,
            )
    return done


def described(row: Wanted) -> str:
    """A row in a line, for the terminal."""
    tags = ", ".join(f"{name} {score:.2f}" for name, score in row.tags[:5])
    span = f" {row.chunk_s[0]:g}-{row.chunk_s[1]:g} s" if row.chunk_s else ""
    return safe(f"{row.clip_id}{span}: {tags or 'no tag'}")


def file_name(row: Wanted, suffix: str) -> str:
    """A name for a row's file: readable, unlike any other's, and nothing but a name."""
    member = posixpath.basename(row.clip_id)
    stem = posixpath.splitext(member)[0]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:80].strip("._-") or "clip"
    name = f"{readable}-{xxhash.xxh3_64_hexdigest(row.clip_id.encode())[:12]}"
    if row.chunk_s is not None:
        name += f"-{row.chunk_s[0]:.3f}-{row.chunk_s[1]:.3f}"
    return name + suffix


def _extracted(
    wanted: Sequence[Wanted], folder: Path, format: str, views: Views, access: Access
) -> Iterator[Extracted]:
    for row, clip in found_clips(wanted, views, access):
        if isinstance(clip, str):
            yield Extracted(row, problem=clip)
        else:
            yield _written(row, clip, folder, format)


def found_clips(
    wanted: Sequence[Wanted], views: Views, access: Access
) -> Iterator[tuple[Wanted, EncodedClip | str]]:
    """(row, its clip, or why there is none) of each row, shard by shard.

    A clip is open until the next is asked for, and has the bytes that were annotated.
    """
    shards: dict[str, list[Wanted]] = {}
    for row in wanted:
        if row.member is None or row.xxh128 is None:
            yield row, "the row is of a clip that could not be read"
        else:
            shards.setdefault(row.shard, []).append(row)
    root = views.run["options"].get("audio_root")
    for shard, rows in shards.items():
        left: dict[str, list[Wanted]] = {}
        for row in rows:
            left.setdefault(str(row.member), []).append(row)
        seen, problem = set(), None
        try:
            found = find_clips(
                shard,
                list(left),
                access,
                clips=_clips_of(shard, views),
                audio_root=root and from_folder(views.run.get("started_in"), root),
            )
            for clip in found:
                seen.add(clip.member)
                same = [row for row in left.get(clip.member, ()) if row.xxh128 == clip.xxh128]
                for row in same:
                    left[clip.member].remove(row)
                    yield row, clip
                if not any(left.values()):
                    break
        except UsageError:
            raise
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            problem = f"{shard} cannot be read: {reason[0]}"
        for row in (row for rows in left.values() for row in rows):
            if row.member in seen:
                why = "its audio is not what was annotated: it has changed since"
            else:
                why = problem or f"{row.member} is not in {shard} any more"
            yield row, why


def _clips_of(shard: str, views: Views) -> int:
    """How many clips a remote tar has; 0 where nobody asks."""
    if "://" not in shard or not shard.endswith(".tar"):
        return 0
    with views.errors_explained():
        ((count,),) = views.connection.execute(
            "SELECT count(*) FROM all_rows WHERE shard = $1", [shard]
        ).fetchall()
    return int(count)


def _written(row: Wanted, clip: EncodedClip, folder: Path, format: str) -> Extracted:
    start_s, end_s = row.cut_s
    if format == "original" and (start_s or end_s is not None):
        return Extracted(
            row, problem="it is a part of a recording, whose bytes cannot be cut: take flac or wav"
        )
    name = file_name(row, suffix_of(row) if format == "original" else f".{format}")
    partial = folder / f".{name}.{os.getpid()}.partial"
    written_s, amiss = None, None
    try:
        if format == "original":
            clip.audio.seek(0)
            with partial.open("wb") as target:
                shutil.copyfileobj(clip.audio, target, 1 << 20)
        else:
            written_s, amiss = write_clip(clip.audio, partial, format, start_s, end_s)
        partial.replace(folder / name)
    except ClipError as error:
        return Extracted(row, problem=f"{error.type}: {error.message}")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Extracted(row, name, written_s, amiss)


def suffix_of(row: Wanted) -> str:
    """That of the member where it is an audio format's, else a guess from the codec."""
    suffix = posixpath.splitext(row.member or "")[1].lower()
    if suffix in AUDIO_SUFFIXES:
        return suffix
    codec = re.sub(r"[^a-z0-9]", "", (row.codec or "").lower())
    known = {"vorbis": ".ogg", "opus": ".opus", "aac": ".m4a"}
    return known.get(codec) or (".wav" if codec.startswith("pcm") else f".{codec or 'audio'}")


def _write_csv(place: Path, done: Iterable[Extracted]) -> None:
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(_HEADER)
            for row in done:
                wanted = row.wanted
                tags = "; ".join(f"{name} {score:.4f}" for name, score in wanted.tags)
                cells = (
                    row.file, wanted.clip_id, wanted.shard, wanted.member, *wanted.cut_s,
                    row.written_s, tags, row.problem,
                )  # fmt: skip
                writer.writerow(["" if cell is None else cell for cell in cells])
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
