"""Reads manifests: tables and lists whose rows name audio files.

A manifest is read twice: once when a run is planned, to recognise its form and to divide it into
slices of rows, and once by the worker that has a slice. Both read records with the same functions.
A record that is wrong in any way is a row with an error, never a gap.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from transforms.read_table import is_text
from transforms.records import ClipError, ManifestSlice, as_text, unique
from transforms.storage import is_local, is_signed, shown_url, unsigned_url

PATH_COLUMNS = (
    "path audio_filepath file_name filename filepath file_path audio_path audio_file audiofilename "
    "wav_path wav_file fname file uri url audio_url audio wav recording"
).split()
ID_COLUMNS = "id clip_id utt_id utterance_id segment_id cut_id uid key".split()
START_COLUMNS = (
    "start offset start_s start_sec start_seconds start_time start_time_s start_time_seconds "
    "start_offset_s begin onset"
).split()
END_COLUMNS = (
    "end end_s end_sec end_seconds end_time end_time_s end_time_seconds end_offset_s stop"
).split()
DURATION_COLUMNS = "duration duration_s duration_sec duration_seconds".split()

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".scp")
FOLDER_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an AudioFolder

MAX_LINE_BYTES = 16 << 20
_HEAD_LINES = 4
_AT_MOST = 16  # times the rows of a shard, where one file has them all
_PARQUET_ROWS = 1_000
_DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV (separated by ;)", "|": "CSV (separated by |)"}
_AUDIOSET_COLUMNS = ("ytid", "start_seconds", "end_seconds", "positive_labels")
_SEGMENT_FILE = re.compile(
    r"Y?(?P<ytid>[\w-]{11})(?:_(?P<start>\d+(?:\.\d+)?)(?:_(?P<end>\d+(?:\.\d+)?))?)?", re.ASCII
)


class ManifestError(ValueError):
    """A manifest as a whole cannot be used; the message goes on after the manifest's name."""


@dataclass(frozen=True)
class ManifestOptions:
    """What a user says of manifests. A column that is `""` is none, one that is None is looked for."""

    path_column: str | None = None
    id_column: str | None = None
    start_column: str | None = None
    end_column: str | None = None
    audio_root: str | None = None  # what relative paths begin at; None: the manifest's folder


DEFAULT_MANIFESTS = ManifestOptions()


@dataclass(frozen=True)
class ManifestRow:
    """What one row of a manifest says. `url` is None where `error` says why."""

    member: str  # the path as the manifest gives it
    url: str | None
    metadata: dict[str, Any]
    start_s: float | None = None
    end_s: float | None = None
    name: str | None = None
    error: ClipError | None = None


@dataclass(frozen=True)
class Manifest:
    """How a manifest is to be read; `slice` repeats it for each part."""

    form: str  # a name of `_ROW_OF`
    delimiter: str = ""  # of a table
    columns: tuple[str, ...] = ()  # of a table
    header_lines: int = 0
    options: ManifestOptions = DEFAULT_MANIFESTS  # the path column found or said

    def said(self) -> str:
        """The form, and the columns by which it is read, in words."""
        if self.form == "audioset":
            return "an AudioSet segments manifest: path by 'YTID', cut by start and end"
        if self.form in ("wav.scp", "segments"):
            return f"a Kaldi {self.form}"
        if self.form == "lhotse":
            return "a lhotse manifest"
        if self.form == "json":
            return f"a JSON lines manifest: path column {self.options.path_column!r}"
        roles = _roles_of(self.columns, self.options)
        said = f"a {_DELIMITERS[self.delimiter]} manifest: path column {roles.path!r}"
        if roles.id:
            said += f", id column {roles.id!r}"
        cut = [column for column in (roles.start, roles.end or roles.duration) if column]
        return said + (f", cut by {' and '.join(map(repr, cut))}" if cut else "")


@dataclass(frozen=True)
class _Roles:
    """Which columns say where the audio is, which part of it, and what it is called."""

    path: str | None
    id: str | None
    start: str | None
    end: str | None
    duration: str | None  # only beside a start: alone, it is a fact of the file


# ------------------------------------------------------------------ recognising


def recognise(name: str, head: Sequence[bytes], options: ManifestOptions) -> Manifest | None:
    """The form of a text file, from its name and first lines; None where it is no manifest.

    Args:
        name: of the file, without its folder and without `.gz`.
        head: its first lines, at least `_HEAD_LINES` where there are so many.
        options: what the user says.

    Raises:
        ManifestError: it is meant to be a manifest, and cannot be used.
    """
    if head and head[0].startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError("is UTF-16: save it as UTF-8")
    lines = [as_line(line).lstrip("\ufeff") for line in head]
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise ManifestError("is empty: expected a header and rows, or JSON lines")
    first = filled[0].lstrip()
    if first.startswith("{"):
        return _json_form(first, options)
    if first.startswith("["):
        raise ManifestError("begins as a JSON array: write one object a line (JSON lines)")
    if name.endswith(".scp"):
        return Manifest("wav.scp", options=options)
    if name == "segments":
        return Manifest("segments", options=options)
    comments = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if any("YTID" in line for line in lines[:comments]):
        return Manifest("audioset", ",", _AUDIOSET_COLUMNS, comments, options)
    header = lines.index(filled[0])
    tables = [
        (delimiter, _header_of(lines[header], delimiter))
        for delimiter in sorted(
            _DELIMITERS, key=lambda d: d != "\t" if name.endswith(".tsv") else 0
        )
    ]
    best = max(tables, key=lambda table: len(table[1]))
    fitting = [table for table in tables if _paths_among(table[1], options)]
    if fitting:
        best = max(fitting, key=lambda table: len(table[1]))
    delimiter, columns = best
    named = tuple(map(_plain_name, columns))
    if not fitting and named[:3] == _AUDIOSET_COLUMNS[:3]:
        return Manifest("audioset", ",", _AUDIOSET_COLUMNS, header + 1, options)
    if not fitting and not name.endswith(MANIFEST_SUFFIXES):
        return Manifest("wav.scp", options=options) if _is_scp(filled) else None
    roles = _roles_of(columns, options)  # refuses none and several
    found = ManifestOptions(
        roles.path, options.id_column, options.start_column, options.end_column, options.audio_root
    )
    return Manifest("table", delimiter, columns, header + 1, found)


def recognise_parquet(schema: pa.Schema, options: ManifestOptions) -> Manifest:
    """How a Parquet file without audio is read as a manifest, once it is JSON lines.

    Raises:
        ManifestError: no column of text names the audio, or several do.
    """
    texts = [field.name for field in schema if is_text(field.type)]
    if not _paths_among(texts, options):
        raise ManifestError(_no_path([f"{field.name}: {field.type}" for field in schema], options))
    path = _roles_of(texts, options).path
    _roles_of(schema.names, ManifestOptions(path, *_columns_said(options)))
    return Manifest("json", options=ManifestOptions(path, *_columns_said(options)))


def parquet_lines(file: pq.ParquetFile) -> Iterator[bytes]:
    """The rows of a Parquet file as JSON lines, without its binary columns."""
    kept = [
        field.name
        for field in file.schema_arrow
        if not pa.types.is_binary(field.type) and not pa.types.is_large_binary(field.type)
    ]
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=kept, use_threads=False):
        for record in _pythonic(batch):
            yield json.dumps(record, default=_as_json).encode() + b"\n"


def _pythonic(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # of one cell; see below
        names = batch.schema.names
        return [{n: _cell(batch.column(n)[row]) for n in names} for row in range(batch.num_rows)]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException):  # no UTF-8; the year 31,000,000
        return None


def _as_json(value: Any) -> Any:
    return None if isinstance(value, bytes) else str(value)


def head_of(lines: Iterator[bytes]) -> list[bytes]:
    """The first lines: enough for `recognise`."""
    return [line for line, _ in zip(lines, range(_HEAD_LINES), strict=False)]


def lines_of(stream: io.IOBase) -> Iterator[bytes]:
    """The lines of a file, with their ends.

    Raises:
        ManifestError: one is longer than any row is.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ManifestError(f"has a line {number} of more than {MAX_LINE_BYTES >> 20} MiB")
        yield line


def as_line(line: bytes) -> str:
    """A line as text; bytes that are no UTF-8 are kept, as in names of files."""
    return line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def _json_form(first: str, options: ManifestOptions) -> Manifest:
    record = _object(first)
    if record is None:
        raise ManifestError("has a first line that begins as JSON and is no JSON object")
    if _is_lhotse(record):
        return Manifest("lhotse", options=options)
    texts = [key for key in record if isinstance(record[key], str) or key == options.path_column]
    path = _roles_of(texts, options, record).path
    return Manifest("json", options=ManifestOptions(path, *_columns_said(options)))


def _is_lhotse(record: Mapping[str, Any]) -> bool:
    if str(record.get("type", "")).endswith("Cut"):
        return True
    return isinstance(record.get("sources"), list) and "sampling_rate" in record


def _is_scp(lines: Sequence[str]) -> bool:
    return all(
        re.fullmatch(r"\S+[ \t]+\S.*(\||\.[A-Za-z][A-Za-z0-9]{1,4})\s*", line) for line in lines
    )


def _columns_said(options: ManifestOptions) -> tuple[str | None, ...]:
    return options.id_column, options.start_column, options.end_column, options.audio_root


def _header_of(line: str, delimiter: str) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    fields = next(iter(csv.reader([line], delimiter=delimiter, skipinitialspace=True)), [])
    return tuple(unique(as_text(field.strip()), seen) for field in fields)


def _plain_name(column: str) -> str:
    return re.sub(r"[ -]+", "_", column.strip().lower())


def _paths_among(columns: Iterable[str], options: ManifestOptions) -> list[str]:
    if options.path_column:
        return [column for column in columns if column == options.path_column]
    return [column for column in columns if _plain_name(column) in PATH_COLUMNS]


def _no_path(columns: Iterable[str], options: ManifestOptions) -> str:
    asked = f"column {options.path_column!r}" if options.path_column else "path column"
    return (
        f"has no {asked}; it has {', '.join(columns)[:300] or 'none'}: name the column of the audio's "
        f"paths with --path-column ({', '.join(PATH_COLUMNS[:4])} and the like are found)"
    )


def _roles_of(
    columns: Sequence[str], options: ManifestOptions, record: Mapping[str, Any] | None = None
) -> _Roles:
    """Which columns have which part; those of `record`, whose texts `columns` are, may be more.

    Raises:
        ManifestError: no column names the audio, several may, or one that was said is absent.
    """
    every = list(record) if record is not None else list(columns)
    paths = _paths_among(columns, options)
    if not paths:
        raise ManifestError(_no_path(every, options))
    if len(paths) > 1:
        raise ManifestError(
            f"has several columns that may name the audio, {', '.join(paths)}: say which with "
            "--path-column"
        )
    return _other_roles(paths[0], every, options)


def _other_roles(
    path: str | None, columns: Sequence[str], options: ManifestOptions, *, may_lack: bool = False
) -> _Roles:
    plain = {column: _plain_name(column) for column in columns if column != path}

    def found(said: str | None, known: Sequence[str], option: str) -> str | None:
        if said == "":
            return None
        if said is not None:
            if said not in columns and may_lack:
                return None
            if said not in columns:
                raise ManifestError(
                    f"has no column {said!r} ({option}); it has {', '.join(columns)}"
                )
            return said
        several = sorted(
            (c for c in plain if plain[c] in known), key=lambda c: known.index(plain[c])
        )
        if len(several) > 1 and option != "--id-column":
            raise ManifestError(
                f"has several columns that may cut the audio, {', '.join(several)}: say which with "
                f"{option} ('' for none)"
            )
        return several[0] if several else None

    starts, ends = START_COLUMNS, END_COLUMNS
    if "onset" in plain.values():  # beside which `offset` is the end, as in DCASE's tables
        starts = [name for name in starts if name != "offset"]
        ends = [*ends, "offset"]
    start = found(options.start_column, starts, "--start-column")
    no_cut = options.start_column == ""
    end = None if no_cut else found(options.end_column, ends, "--end-column")
    duration = None
    if start and not end and options.end_column is None:
        duration = found(None, DURATION_COLUMNS, "--end-column")
    return _Roles(path, found(options.id_column, ID_COLUMNS, "--id-column"), start, end, duration)


# --------------------------------------------------------------------- dividing


def divide(
    manifest: Manifest,
    lines: Iterator[bytes],
    root: str,
    rows_per_slice: int,
    *,
    embedded: bool,
    files: Mapping[str, str] | None = None,
) -> Iterator[tuple[ManifestSlice, tuple[str, ...], str]]:
    """Yields the slices of a manifest, the files of their rows where the rows do not say them, and
    a digest that stays when URLs are signed anew.

    Consecutive rows of one file are in one slice, unless they are far too many.

    Args:
        manifest: of `recognise`.
        lines: the whole file's.
        root: what relative paths begin at.
        rows_per_slice: how many rows make a slice, if the next one is of another file.
        embedded: whether a slice holds its rows, for files in which a worker cannot find a place.
        files: of a Kaldi `segments` the path of each recording (`scp_paths`); of an AudioSet
            manifest the files of each YTID (`segment_files`).

    Raises:
        ManifestError: the end of a row cannot be found.
    """
    begin = sum(len(next(lines, b"")) for _ in range(manifest.header_lines))
    first_row = 0
    raws: list[bytes] = []
    found: list[str] = []
    previous: Any = None

    def cut() -> tuple[ManifestSlice, tuple[str, ...], str]:
        content = b"".join(raws)
        part = ManifestSlice(
            form=manifest.form,
            delimiter=manifest.delimiter,
            columns=manifest.columns,
            path_column=manifest.options.path_column,
            id_column=manifest.options.id_column,
            start_column=manifest.options.start_column,
            end_column=manifest.options.end_column,
            root=root,
            first_row=first_row,
            rows=len(raws),
            start=begin,
            end=begin + len(content),
            digest=xxhash.xxh3_64_hexdigest(content),
            text=content.decode("utf-8", "surrogateescape") if embedded else None,
        )
        return part, tuple(found), _identity(part, content, found)

    taken = _Taken(lines)
    for content in _records(manifest, iter(taken)):
        file = None if files is None else _file_of(manifest, content, files)
        if len(raws) >= rows_per_slice and (
            len(raws) >= _AT_MOST * rows_per_slice
            or _audio_of(manifest, content, file) != _audio_of(manifest, previous, *found[-1:])
        ):
            part, its_files, identity = cut()
            yield part, its_files, identity
            first_row, begin = first_row + part.rows, part.end
            raws.clear()
            found.clear()
        raws.append(taken.take())  # with blank lines before it: the slices make up the file
        if file is not None:
            found.append(file)
        previous = content
    if raws:
        yield cut()


class _Taken:
    """Lines on their way to a reader, and those that it took since the last look."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._taken: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self._taken.append(line)
            yield line

    def take(self) -> bytes:
        taken = b"".join(self._taken)
        self._taken.clear()
        return taken


def _records(manifest: Manifest | ManifestSlice, lines: Iterator[bytes]) -> Iterator[Any]:
    """Yields the rows below a header: fields of a table, JSON objects, or a line's text.

    None stands for one that is none of these. Blank lines are no rows. No line is taken before
    it is needed.
    """
    if manifest.delimiter and manifest.delimiter != "\t":
        yield from _csv_records(lines, manifest.delimiter)
        return
    for raw in lines:
        line = as_line(raw).lstrip("\ufeff")
        if not line.strip():
            continue
        if manifest.form in ("json", "lhotse"):
            yield _object(line)
        elif manifest.delimiter:
            yield [_unquoted(field) for field in line.split("\t")]
        else:
            yield line


def _csv_records(lines: Iterator[bytes], delimiter: str) -> Iterator[list[str] | None]:
    """As the csv module reads them: a quoted field may hold line ends."""
    in_row = unclosed = False

    def texts() -> Iterator[str]:
        nonlocal in_row, unclosed
        for raw in lines:
            in_row = True
            yield raw.decode("utf-8", "surrogateescape")
        unclosed = in_row

    reader = csv.reader(texts(), delimiter=delimiter, skipinitialspace=True)
    number = 0
    while True:
        number += 1
        in_row = False
        fields: list[str] | None = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # such as a zero byte; the next line is a row again
            unclosed = unclosed or "field larger" in str(error)
        if unclosed:
            raise ManifestError(f"has a quote that is not closed, in row {number} below its header")
        if fields != []:
            yield fields


def _unquoted(field: str) -> str:
    """A field of a TSV, where a quote is a mark like any other unless it encloses all."""
    inner = field[1:-1]
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def _object(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line, parse_constant=lambda _: None)  # NaN is no JSON
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _audio_of(manifest: Manifest, content: Any, file: str | None = None) -> Any:
    """What rows of one file have in common."""
    if file is not None or content is None:
        return file
    if manifest.form == "table":
        place = manifest.columns.index(manifest.options.path_column or "")
        return content[place] if place < len(content) else None
    if manifest.form == "json":
        return content.get(manifest.options.path_column)
    if manifest.form == "lhotse":
        return _recording_of(content).get("sources")
    return content


def _file_of(manifest: Manifest, content: Any, files: Mapping[str, str]) -> str:
    if manifest.form == "segments":
        parts = content.split()
        return files.get(parts[1], "") if len(parts) > 1 else ""
    if content is None or len(content) < 3:
        return ""
    ytid, start, end = (field.strip() for field in content[:3])
    return find_segment(files.get(ytid, ""), start, end)


def scp_paths(lines: Iterable[bytes]) -> dict[str, str]:
    """Of a Kaldi `wav.scp`: the path (or command) of each recording."""
    parts = (as_line(line).strip().split(None, 1) for line in lines)
    return {part[0]: part[1] for part in parts if len(part) == 2}


# --------------------------------------------------------------------- the rows


def rows_of(
    part: ManifestSlice, content: bytes, files: Sequence[str] = ()
) -> Iterator[ManifestRow]:
    """Yields what each row of a slice says.

    Args:
        part: the slice.
        content: its bytes.
        files: the file of each row, where `divide` gave them.
    """
    row_of = _ROW_OF[part.form]
    for place, record in enumerate(_records(part, lines_of(io.BytesIO(content)))):
        row = _Row(part, part.first_row + place)
        yield row_of(row, record, files[place] if files else None)


def folder_rows(manifest: Manifest, lines: Iterator[bytes]) -> Iterator[ManifestRow]:
    """The rows of an AudioFolder's metadata; `url` is the path as it is given."""
    for _ in range(manifest.header_lines):
        next(lines, b"")
    options = manifest.options
    part = ManifestSlice(
        manifest.form, manifest.delimiter, manifest.columns, options.path_column, "", "", ""
    )
    for number, content in enumerate(_records(manifest, lines)):
        yield _ROW_OF[manifest.form](_Row(part, number), content, None)


@dataclass(frozen=True)
class _Row:
    """The place of a row, and what becomes of it."""

    part: ManifestSlice
    number: int  # from 0, header and blank lines not counted

    def refused(
        self,
        why: str,
        metadata: dict[str, Any],
        type: str = "BadManifestRow",
        *,
        path: Any = None,
        name: str | None = None,
    ) -> ManifestRow:
        """A row that says what is wrong with it."""
        is_path = isinstance(path, str) and path.strip()
        member = shown(path) if is_path else name or f"row-{self.number:08d}"
        message = f"row {self.number + 1} of the manifest: {why}"
        return ManifestRow(
            member, None, metadata, name=name, error=ClipError("read", type, as_text(message))
        )

    def audio(
        self,
        path: Any,
        metadata: dict[str, Any],
        name: Any = None,
        *,
        start: Any = None,
        end: Any = None,
        duration: Any = None,
    ) -> ManifestRow:
        """A row that names audio, or is refused for what it says."""
        name = None if _is_none(name) else as_text(str(name))
        if _is_none(path) or not isinstance(path, str):
            return self.refused("it names no audio", metadata, name=name)
        path = path.strip()
        if "\0" in path:
            return self.refused("its path holds a zero byte", metadata, name=name)
        if self.part.form in ("wav.scp", "segments") and path.endswith("|"):
            return self.refused(_COMMAND, metadata, "Command", name=name)
        try:
            start_s, end_s = _span(start, end, duration)
        except ValueError as error:
            return self.refused(str(error), metadata, path=path, name=name)
        url = locate(path, self.part.root)
        return ManifestRow(shown(path), url, metadata, start_s, end_s, name)


_COMMAND = "it is a command, and commands are not run"


def _table_row(row: _Row, content: list[str] | None, file: str | None) -> ManifestRow:
    if content is None:
        return row.refused("its quotes or line ends cannot be understood", {})
    columns = row.part.columns
    # A path may be no UTF-8, all else is text.
    record = {
        column: value if column == row.part.path_column else as_text(value)
        for column, value in zip(columns, content, strict=False)
    }
    if any(field.strip() for field in content[len(columns) :]):
        why = f"it has {len(content)} fields, the header has {len(columns)}"
        metadata = {column: as_text(value) for column, value in record.items()}
        return row.refused(why, metadata, path=record.get(row.part.path_column or ""))
    return _row_of_record(row, record)


def _json_row(row: _Row, content: dict[str, Any] | None, file: str | None) -> ManifestRow:
    if content is None:
        return row.refused("it is no JSON object", {})
    return _row_of_record(row, content)


def _row_of_record(row: _Row, record: dict[str, Any]) -> ManifestRow:
    part = row.part
    path = record.get(part.path_column or "")
    options = ManifestOptions(part.path_column, part.id_column, part.start_column, part.end_column)
    try:
        roles = _other_roles(part.path_column, tuple(record), options, may_lack=True)
    except ManifestError as error:
        metadata = {key: value for key, value in record.items() if key != part.path_column}
        return row.refused(f"it {error}", metadata, path=path)
    used = {part.path_column, roles.id, roles.start, roles.end}
    start, end, duration = (
        record.get(column) if column else None
        for column in (roles.start, roles.end, roles.duration)
    )
    if _is_none(start):
        duration = None  # alone, it is a fact of the file
    if not _is_none(duration):
        used.add(roles.duration)
    metadata = {key: value for key, value in record.items() if key not in used}
    name = record.get(roles.id) if roles.id else None
    return row.audio(path, metadata, name, start=start, end=end, duration=duration)


def _scp_row(row: _Row, content: str, file: str | None) -> ManifestRow:
    name, path = [*content.split(None, 1), ""][:2]
    return row.audio(path, {}, name)


def _segment_row(row: _Row, content: str, file: str | None) -> ManifestRow:
    fields = content.split()
    if len(fields) < 4:
        return row.refused("it has not the four fields of Kaldi's segments", {})
    name, recording, start, end = map(as_text, fields[:4])
    metadata = {"recording": recording}
    if not file:
        why = f"wav.scp has no recording {recording!r}"
        return row.refused(why, metadata, path=recording, name=name)
    if _number(end) == -1:  # Kaldi's word for the end of the recording
        end = ""
    return row.audio(file, metadata, name, start=start, end=end)


def _lhotse_row(row: _Row, content: dict[str, Any] | None, file: str | None) -> ManifestRow:
    if content is None:
        return row.refused("it is no JSON object", {})
    name = None if _is_none(content.get("id")) else as_text(str(content["id"]))
    recording = _recording_of(content)
    is_cut = recording is not content
    used = ("id", "start", "duration", "recording", "type") if is_cut else ("id", "sources")
    metadata = {key: value for key, value in content.items() if key not in used}
    sources = recording.get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        why = (
            f"a {content.get('type', 'cut')} without one recording: expected recordings or MonoCuts"
        )
        return row.refused(why, metadata, name=name)
    kinds = sorted({str(source.get("type")) for source in sources})
    if "command" in kinds:
        return row.refused(_COMMAND, metadata, "Command", name=name)
    if len(sources) != 1 or kinds[0] not in ("file", "url"):
        found = f"{len(sources)} of type {', '.join(kinds)}" if kinds else "none"
        why = f"its recording has other sources than one file or url: {found}"
        return row.refused(why, metadata, name=name)
    start, duration = content.get("start"), content.get("duration")
    if not is_cut or (start == 0 and duration == recording.get("duration")):
        start = duration = None  # the whole recording
    return row.audio(sources[0].get("source"), metadata, name, start=start, duration=duration)


def _recording_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    recording = content if "sources" in content else content.get("recording")
    return recording if isinstance(recording, dict) else {}


def _audioset_row(row: _Row, content: list[str] | None, file: str | None) -> ManifestRow:
    if content is None or len(content) < 3 or not content[0].strip():
        return row.refused("it is not YTID, start_seconds, end_seconds, positive_labels", {})
    ytid, start, end = (as_text(field.strip()) for field in content[:3])
    metadata: dict[str, Any] = {"start_seconds": _number(start), "end_seconds": _number(end)}
    labels = as_text(",".join(content[3:])).strip()
    if labels:
        metadata["positive_labels"] = [label.strip() for label in labels.split(",")]
    if not file:
        why = "no file has this YTID, and these times if any, in its name"
        return row.refused(why, metadata, "FileNotFound", path=ytid, name=ytid)
    named = segment_of(file)
    if row.part.start_column == "" or (named is not None and named[1] is not None):
        return row.audio(file, metadata, ytid)
    return row.audio(file, metadata, ytid, start=start, end=end)


_ROW_OF: dict[str, Callable[[_Row, Any, str | None], ManifestRow]] = {
    "table": _table_row,
    "json": _json_row,
    "lhotse": _lhotse_row,
    "wav.scp": _scp_row,
    "segments": _segment_row,
    "audioset": _audioset_row,
}


def _span(start: Any, end: Any, duration: Any) -> tuple[float | None, float | None]:
    """(start, end) in seconds; (None, None) is all of it.

    Raises:
        ValueError: they are no times, or none that can be.
    """
    start_s, end_s = _seconds("start", start), _seconds("end", end)
    duration_s = _seconds("duration", duration)
    if start_s is None and end_s is None:
        return None, None
    start_s = start_s or 0.0
    if end_s is None and duration_s is not None:
        end_s = start_s + duration_s
    if end_s is not None and end_s <= start_s:
        raise ValueError(f"its end, {end_s:g} s, is not after its start, {start_s:g} s")
    return start_s, end_s


def _seconds(what: str, value: Any) -> float | None:
    if _is_none(value):
        return None
    seconds = None if isinstance(value, bool) else _number(value)
    if seconds is None:
        raise ValueError(f"its {what} {str(value)[:40]!r} is no number of seconds")
    if seconds < 0:
        raise ValueError(f"its {what}, {seconds:g} s, is less than 0")
    return seconds


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def shown(path: str) -> str:
    """A path as it is stored and said: valid text, and a URL without what lets one in."""
    return as_text(shown_url(path))


def _identity(part: ManifestSlice, content: bytes, files: Sequence[str]) -> str:
    """What tells a slice's rows from others: its digest, unless URLs in it are signed anew each day."""
    if b"?" not in content or b"http" not in content:
        return part.digest
    urls = (row.url or "" for row in rows_of(part, content, files))
    if not any(is_signed(url.strip()) for url in urls):
        return part.digest
    records = [_unsigned(record) for record in _records(part, lines_of(io.BytesIO(content)))]
    return xxhash.xxh3_64_hexdigest(json.dumps(records).encode())


def _unsigned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unsigned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unsigned(entry) for entry in value]
    if not isinstance(value, str):
        return value
    # A line of a `wav.scp` has a name before the URL.
    return " ".join(unsigned_url(word) if is_signed(word) else word for word in value.split())


def locate(path: str, root: str) -> str:
    """Where a path leads: URLs and absolute paths to themselves, others below `root`."""
    if path.startswith("file://"):
        return path.removeprefix("file://")
    if not is_local(path) or os.path.isabs(path):
        return path
    if is_local(root):
        return os.path.join(root, path)
    if not {".", ".."} & set(path.split("/")):
        return f"{root.rstrip('/')}/{path}"
    scheme, _, place = root.partition("://")
    bucket, _, folder = place.partition("/")
    return f"{scheme}://{bucket}{posixpath.normpath(posixpath.join('/', folder, path))}"


# --------------------------------------------------------------------- AudioSet


def segment_of(file: str) -> tuple[str, str | None, str | None] | None:
    """(YTID, start, end) that the name of a file of AudioSet says, times as they are written.

    The names in use: `YTID.wav`, `YYTID.wav`, `YTID_30.000.wav`, `YTID_30.000_40.000.wav`,
    `YTID_30000.wav`, `YTID_30000_40000.wav`.
    """
    stem = posixpath.splitext(posixpath.basename(file))[0]
    if re.fullmatch(r".*_\d+", stem) and re.fullmatch(r"\.\d+", posixpath.splitext(file)[1]):
        stem = posixpath.basename(file)  # no suffix, but the decimals of a time
    found = _SEGMENT_FILE.fullmatch(stem)
    return (found["ytid"], found["start"], found["end"]) if found else None


def segment_files(files: Iterable[str]) -> dict[str, str]:
    """The files of each YTID, separated by zero bytes: millions of them take little room so."""
    index: dict[str, str] = {}
    for file in files:
        if (named := segment_of(file)) is not None:
            known = index.get(named[0])
            index[named[0]] = file if known is None else f"{known}\0{file}"
    return index


def find_segment(files: str, start: str, end: str) -> str:
    """Of a YTID's files, the one that is the segment, else the whole recording, else ""."""
    whole = ""
    for file in sorted(filter(None, files.split("\0"))):
        named = segment_of(file)
        if named is None:
            continue
        if named[1] is None:
            whole = whole or file
        elif _is_time(named[1], start) and (named[2] is None or _is_time(named[2], end)):
            return file
    return whole


def _is_time(written: str, expected: str) -> bool:
    """Whether a time in a name, seconds or milliseconds, is one of a manifest's."""
    seconds = _number(expected)
    if seconds is None:
        return False
    found = float(written)
    return abs(found - seconds) < 0.001 or (
        "." not in written and abs(found / 1_000 - seconds) < 0.001
    )
