"""Reads which labels are true of which clips, from the forms in which people keep it."""

from __future__ import annotations

import ast
import csv
import difflib
import io
import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from evaluation.scores import (
    NAME_KINDS,
    EvaluationError,
    Names,
    Source,
    batches,
    names_of,
    open_parquet,
    open_source,
    row_names,
    score_matrix,
)
from student.labels import Label, audioset_labels, audioset_ontology
from transforms.output import open_output
from transforms.storage import DEFAULT_ACCESS, Access, is_local, read_all

CLIP_COLUMNS = ("clip_id", "id", "file", "filename", "path", "member", "fname", "segment_id")
# Those of machine ids first: they cannot be misread.
LABEL_COLUMNS = ("mids", "labels", "label", "tags", "classes")
METADATA = "metadata:"  # begins a --truth that is a field of the rows' own metadata
TRUTH_THRESHOLD = 0.3  # of scores as truth, where nothing else is said

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")
_SEPARATOR = re.compile(r"\s*[,;|\t]\s*")
_MID = re.compile(r"/[a-z]+/[0-9a-z_]+")


@dataclass(frozen=True)
class Truth:
    """Clips and what is true of them, as it was stated."""

    name: str  # where it is from, for people
    clips: tuple[str, ...]  # as the truth names them
    names: tuple[Names, ...]  # of each clip: what a row is compared with
    labels: tuple[tuple[str, ...], ...]  # of each clip: mids or names, as stated
    without: int = 0  # its own rows that name no clip or state nothing: no clips of the truth


def read_truth(
    truth: str,
    source: Source,
    access: Access = DEFAULT_ACCESS,
    *,
    clip_column: str | None = None,
    label_column: str | None = None,
    threshold: float | None = None,
) -> Truth:
    """The truth that a user names.

    Args:
        truth: `metadata:FIELD` for a field of the rows' own metadata; a folder that `earmark
            annotate` wrote; AudioSet's segments (CSV); or a CSV, TSV, JSON Lines or Parquet
            file with a column of clips and one of labels. Local paths or URLs.
        source: what is evaluated: its labels' names are understood, and the metadata is its.
        access: how remote storage is used.
        clip_column: the column that names the clip; by default the first of CLIP_COLUMNS.
        label_column: the column of labels; by default the first of LABEL_COLUMNS.
        threshold: of a truth that is scores: those from which a label counts as true. By
            default the tags of an output count, and TRUTH_THRESHOLD for a Parquet file.

    Raises:
        EvaluationError: it cannot be read, or a column is not there.
    """
    stated = read_stated_truth(
        truth,
        source.labels,
        access,
        clip_column=clip_column,
        label_column=label_column,
        threshold=threshold,
    )
    return _of_metadata(source, truth.removeprefix(METADATA)) if stated is None else stated


def read_stated_truth(
    truth: str,
    labels: Sequence[Label],
    access: Access = DEFAULT_ACCESS,
    *,
    clip_column: str | None = None,
    label_column: str | None = None,
    threshold: float | None = None,
) -> Truth | None:
    """`read_truth` before there are scores; None where the truth is `metadata:FIELD`.

    Args:
        truth: as of `read_truth`, and so are the others.
        labels: of the checkpoint that is evaluated: their names are understood.

    Raises:
        EvaluationError: it cannot be read, a column is not there, or an option is not of it.
    """
    place, columns = f"--truth {truth!r}", (clip_column, label_column)
    if truth.startswith(METADATA):
        _refuse_columns(truth, columns)
        _refuse_threshold(truth, threshold)
        return None
    if not truth.lower().endswith(_TABLE_SUFFIXES):
        _refuse_columns(truth, columns)
        try:
            opened = open_source(truth, access)
        except EvaluationError as error:
            cure = (
                f". For the field {truth!r} of the clips' own metadata: --truth {METADATA}{truth}"
                if is_local(truth) and not os.path.exists(truth)
                else ""
            )
            raise EvaluationError(f"--truth: {error}{cure}") from error
        return _of_output(opened, threshold)
    try:
        if truth.lower().endswith(".parquet"):
            folder, name = posixpath.split(truth)
            with open_output(folder or ".", access).open(name) as stream:
                file = open_parquet(stream)
                held = file.schema_arrow.names
                if "scores" in held and label_column is None and not _first(held, LABEL_COLUMNS):
                    return _of_output(
                        open_source(truth, access, labels),
                        TRUTH_THRESHOLD if threshold is None else threshold,
                    )
                columns = _columns(truth, held, clip_column, label_column)
                kind = file.schema_arrow.field(columns[1]).type
                if pa.types.is_map(kind):
                    raise EvaluationError(
                        f"--truth {truth!r}: the column {columns[1]!r} is {kind}; expected text or a "
                        "list of the labels that are true"
                    )
                rows = file.read(list(columns), use_threads=False).to_pylist()
        else:
            text = read_all(truth, access).decode("utf-8-sig")
            if truth.lower().endswith((".jsonl", ".ndjson")):
                rows = _json_lines(place, text)
                held = list(dict.fromkeys(key for row in rows for key in row))
            else:
                segments = _audioset_segments(place, text)
                if segments is not None and columns == (None, None):
                    _refuse_threshold(truth, threshold)
                    return _of_segments(truth, segments)
                held, rows = _csv(place, text)
            columns = _columns(truth, held, clip_column, label_column)
    except (OSError, ImportError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"--truth {truth!r} cannot be read: {reason}") from error
    _refuse_threshold(truth, threshold)
    return _of_rows(truth, rows, *columns, known_names(labels))


def read_clip_list(file: str, access: Access = DEFAULT_ACCESS) -> tuple[Names, ...]:
    """What clips are known by that a table lists: the `--only` of a user.

    Args:
        file: CSV, TSV, JSON Lines or Parquet with a column of clips, the first of CLIP_COLUMNS
            that there is. Beside `clip_id`, `member` and `audio_xxh128` are understood.
        access: how remote storage is used.

    Raises:
        EvaluationError: it cannot be read, or names no clip.
    """
    place = f"--only {file!r}"
    if not file.lower().endswith(_TABLE_SUFFIXES):
        raise EvaluationError(
            f"{place}: expected a table of clips that ends in {', '.join(_TABLE_SUFFIXES)}"
        )
    more = ("member", "audio_xxh128")
    try:
        if file.lower().endswith(".parquet"):
            folder, name = posixpath.split(file)
            with open_output(folder or ".", access).open(name) as stream:
                parquet = open_parquet(stream)
                held = parquet.schema_arrow.names
                column = _clip_column(place, held)
                wanted = list(dict.fromkeys([column, *(one for one in more if one in held)]))
                rows = parquet.read(wanted, use_threads=False).to_pylist()
        else:
            text = read_all(file, access).decode("utf-8-sig")
            if file.lower().endswith((".jsonl", ".ndjson")):
                rows = _json_lines(place, text)
                held = list(dict.fromkeys(key for row in rows for key in row))
            else:
                held, rows = _csv(place, text)
            column = _clip_column(place, held)
    except (OSError, ImportError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"{place} cannot be read: {reason}") from error
    names: dict[str, Names] = {}
    for row in rows:
        clip, *others = (
            "" if row.get(one) is None else str(row[one]).strip() for one in (column, *more)
        )
        if clip:
            names[clip] = names_of(clip, *(other or None for other in others))
    if not names:
        raise EvaluationError(f"{place} names no clip in its column {column!r}")
    return tuple(names.values())


def _clip_column(place: str, held: Sequence[str]) -> str:
    if not held:
        raise EvaluationError(f"{place} is empty")
    # Not the only one there is, whatever its name: of a list without a header that is a clip.
    column = _first(held, CLIP_COLUMNS)
    if column is None:
        raise EvaluationError(
            f"{place} has the columns {', '.join(held)}; expected one of clips, called "
            f"{', '.join(CLIP_COLUMNS)}"
        )
    return column


def known_names(labels: Sequence[Label]) -> frozenset[str]:
    """Every name and mid that can be told apart in a list: AudioSet's and the checkpoint's.

    Names are there as they are, and in lower case.
    """
    ontology = audioset_ontology().values()
    named = (*labels, *audioset_labels(), *ontology)
    names = {one.name for one in named}
    known = names | {name.casefold() for name in names} | {one.mid for one in named}
    return frozenset(known - {""})  # a label that is not AudioSet's has no mid


def parse_labels(value: Any, known: frozenset[str]) -> tuple[str, ...]:
    """The labels in a cell: a list, a JSON list, or text with a separator.

    Names have commas in them ("Domestic animals, pets"), so the longest stretch of text that is
    a known name, in whatever case, is taken as one; commas, semicolons, bars and tabs (and
    spaces, between mids) separate the rest. Of an object, such as a tag of earmark's, the mid or
    else the name counts.

    Raises:
        EvaluationError: an object has neither.
    """
    if _says_nothing(value):
        return ()
    if isinstance(value, Mapping):
        named = value.get("mid") or value.get("name") or value.get("label")
        if _says_nothing(named):
            shown = str(dict(value))
            raise EvaluationError(
                f"{shown if len(shown) < 80 else shown[:79] + '…'} is an object without mid, name "
                "or label; expected a list of the labels that are true (scores are compared from "
                "a Parquet file with clip_id and scores)"
            )
        return parse_labels(named, known)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(dict.fromkeys(label for item in value for label in _item(item, known)))
    text = str(value).strip()
    if _is_known(text, known):
        return (text,)
    held = _literal(text)
    if held is not None:
        return parse_labels(held, known)
    words = text.split()
    if len(words) > 1 and all(_MID.fullmatch(word) for word in words):
        return tuple(dict.fromkeys(words))
    return tuple(dict.fromkeys(_separated(text, known)))


def _literal(text: str) -> Any:
    """The list or object that a text spells, in JSON or as Python's str() does; None for others."""
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}"))):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        # Of what is no literal, or nested too deeply.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _is_known(text: str, known: frozenset[str]) -> bool:
    return text in known or text.casefold() in known


def _item(value: Any, known: frozenset[str]) -> tuple[str, ...]:
    """A member of a list: text in it is one label, whatever is in it."""
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    return parse_labels(value, known)


def _separated(text: str, known: frozenset[str]) -> Iterator[str]:
    ends = [*_SEPARATOR.finditer(text)]
    starts = [0, *(match.end() for match in ends)]
    stops = [*(match.start() for match in ends), len(text)]
    first = 0
    while first < len(starts):
        last = next(
            (
                last
                for last in range(len(stops) - 1, first, -1)
                if _is_known(text[starts[first] : stops[last]], known)
            ),
            first,
        )
        label = text[starts[first] : stops[last]].strip().strip('"')
        if label:
            yield label
        first = last + 1


@dataclass(frozen=True)
class Resolved:
    """A truth in terms of a checkpoint's labels."""

    matrix: NDArray[np.bool_]  # [clips, labels]
    unknown: Counter[str]  # label as stated -> clips; the checkpoint has no such label


def resolve(truth: Truth, labels: Sequence[Label], clips: Sequence[int] | None = None) -> Resolved:
    """The truth as bool [clips, labels].

    A label is known by its mid, by its name, by AudioSet's name for its mid, and where none of
    these is the same, by its name in whatever case.

    Args:
        truth: as stated.
        labels: the checkpoint's.
        clips: places in the truth; all of them by default.

    Raises:
        EvaluationError: labels are stated, and the checkpoint knows none of them.
    """
    places = range(len(truth.clips)) if clips is None else clips
    by_text = _by_text(labels)
    matrix = np.zeros((len(places), len(labels)), bool)
    unknown: Counter[str] = Counter()
    stated = 0
    for row, place in enumerate(places):
        for text in truth.labels[place]:
            stated += 1
            index = by_text.get(text, by_text.get(text.casefold()))
            if index is None:
                unknown[text] += 1
            else:
                matrix[row, index] = True
    if unknown and stated == sum(unknown.values()):
        names = [label.name for label in labels]
        examples = "; ".join(
            repr(text) + _nearest(text, names) for text, _ in unknown.most_common(3)
        )
        raise EvaluationError(
            f"none of the {len(unknown)} labels of {truth.name} is one of the checkpoint's "
            f"{len(labels)}: {examples}. Labels are mids or display names; "
            + (
                "is this the field of the labels?"
                if truth.name.startswith(METADATA)
                else "is --label-column right?"
            )
        )
    return Resolved(matrix, unknown)


def _by_text(labels: Sequence[Label]) -> dict[str, int]:
    ontology = audioset_ontology()
    found: dict[str, int] = {label.name.casefold(): label.index for label in labels}
    for label in labels:
        if label.mid in ontology:
            name = ontology[label.mid].name
            found.setdefault(name.casefold(), label.index)
            found[name] = label.index
    found.update((label.mid, label.index) for label in labels if label.mid)
    found.update((label.name, label.index) for label in labels)
    # AudioSet's mid of a label that the checkpoint has by name alone.
    found.update(
        (label.mid, found[label.name])
        for label in audioset_labels()
        if label.name in found and label.mid not in found
    )
    return found


def _nearest(text: str, names: list[str]) -> str:
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.6)
    return f" (nearest: {close[0]!r})" if close else ""


# ------------------------------------------------------------------ where it is from


def _of_rows(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    clip_column: str,
    label_column: str,
    known: frozenset[str],
) -> Truth:
    labels: dict[str, dict[str, None]] = {}
    without = 0
    for row in rows:
        clip, stated = row.get(clip_column), row.get(label_column)
        # An empty cell says that nothing is true, a null does not say.
        if clip is None or str(clip).strip() == "" or _says_nothing(stated):
            without += 1
            continue
        # One row a clip, or one row a label of it: both are in use.
        clip = str(clip).strip()
        held = labels.setdefault(clip, {})
        held.update(dict.fromkeys(_labels_of(stated, known, name, clip)))
    if not labels:
        raise EvaluationError(
            f"--truth {name!r} has no row with both a clip in column {clip_column!r} and labels in "
            f"column {label_column!r}"
        )
    return Truth(
        name,
        tuple(labels),
        tuple(names_of(clip) for clip in labels),
        tuple(tuple(held) for held in labels.values()),
        without,
    )


def _of_metadata(source: Source, path: str) -> Truth:
    """A field of each row's metadata; `a.b` is the field b of the object a, where no field is `a.b`."""
    known = known_names(source.labels)
    clips: list[str] = []
    names: list[Names] = []
    labels: list[tuple[str, ...]] = []
    fields: Counter[str] = Counter()
    without = 0
    for batch in batches(source, ["clip_id", "member", "audio_xxh128", "metadata"]):
        if "metadata" not in batch.schema.names:
            raise EvaluationError(f"{source.uri!r} has no column 'metadata'")
        for known_by, clip, text in zip(
            row_names(batch, source),
            batch.column("clip_id").to_pylist(),
            batch.column("metadata").to_pylist(),
            strict=True,
        ):
            metadata = _metadata(text, clip, source)
            fields.update(list(metadata))
            value = _field(metadata, path)
            if value is _ABSENT:
                continue
            if _says_nothing(value):
                without += 1
                continue
            clips.append(clip)
            names.append(known_by)
            labels.append(_labels_of(value, known, f"{METADATA}{path}", clip))
    if not clips:
        raise EvaluationError(
            f"--truth {METADATA}{path}: no row of {source.uri!r} has a value of this field in its "
            f"metadata (it has {_named(fields)})"
        )
    return Truth(f"{METADATA}{path}", tuple(clips), tuple(names), tuple(labels), without)


def groups_of(source: Source, path: str, clip_ids: Sequence[str]) -> tuple[list[str], int]:
    """(a group for each clip, clips without the field): clips of one value are one group.

    A clip without the field is a group of its own.

    Args:
        source: whose metadata has the field.
        path: of the field, as after `metadata:`.
        clip_ids: of the clips.

    Raises:
        EvaluationError: none of the clips has it, or a file cannot be read.
    """
    asked = set(clip_ids)
    values: dict[str, str] = {}
    fields: Counter[str] = Counter()
    for batch in batches(source, ["clip_id", "metadata"]):
        if "metadata" not in batch.schema.names:
            break
        columns = (batch.column(name).to_pylist() for name in ("clip_id", "metadata"))
        for clip_id, text in zip(*columns, strict=True):
            if clip_id not in asked:
                continue
            metadata = _metadata(text, clip_id, source)
            fields.update(list(metadata))
            value = _field(metadata, path)
            if not (value is _ABSENT or _says_nothing(value)):
                values[clip_id] = str(value)
    if not values:
        raise EvaluationError(
            f"--group-by: none of the {len(asked):,} compared clips of {source.uri!r} has {path!r} in its "
            f"metadata (it has {_named(fields)})"
        )
    # Told apart by how they begin: a value may be spelt as some clip's id is.
    groups = [
        f"value {values[clip_id]}" if clip_id in values else f"clip {clip_id}"
        for clip_id in clip_ids
    ]
    return groups, len(asked) - len(values)


def _named(fields: Counter[str]) -> str:
    return ", ".join(field for field, _ in fields.most_common(20)) or "no field"


def _metadata(text: str | None, clip_id: str, source: Source) -> Mapping[str, Any]:
    """What a row's metadata holds; nothing where the row has none."""
    try:
        metadata = json.loads(text) if text else {}
    except ValueError as error:
        raise EvaluationError(
            f"the metadata of {clip_id!r} in {source.uri!r} is no JSON ({error})"
        ) from error
    if not isinstance(metadata, Mapping):
        raise EvaluationError(
            f"the metadata of {clip_id!r} in {source.uri!r} is {text!r}; expected a JSON object"
        )
    return metadata


_ABSENT = object()  # a field that is not there; one that is there may be null


def _field(metadata: Any, path: str) -> Any:
    if not isinstance(metadata, Mapping):
        return _ABSENT
    if path in metadata:
        return metadata[path]
    first, _, rest = path.partition(".")
    return _field(metadata.get(first), rest) if rest else _ABSENT


def _says_nothing(value: Any) -> bool:
    """Whether a value is null or NaN, which do not say what is true."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _labels_of(value: Any, known: frozenset[str], truth: str, clip: str) -> tuple[str, ...]:
    """`parse_labels`, whose error says of which clip."""
    try:
        return parse_labels(value, known)
    except EvaluationError as error:
        raise EvaluationError(f"--truth {truth!r}, clip {clip!r}: {error}") from error
    except RecursionError as error:
        raise EvaluationError(
            f"--truth {truth!r}, clip {clip!r}: lists are nested too deeply; expected one list of labels"
        ) from error


def _of_output(source: Source, threshold: float | None) -> Truth:
    """The tags of another output, or its scores from `threshold` on."""
    clips: list[str] = []
    names: list[Names] = []
    labels: list[tuple[str, ...]] = []
    without = 0
    wanted = "tags" if threshold is None else "scores"
    for batch in batches(source, ["clip_id", "member", "audio_xxh128", "error", wanted]):
        if wanted not in batch.schema.names:
            raise EvaluationError(f"{source.uri!r} has no column {wanted!r}")
        if "error" in batch.schema.names:
            fine = batch.column("error").is_null()
            without += batch.num_rows - fine.true_count
            batch = batch.filter(fine)
        clips += batch.column("clip_id").to_pylist()
        names += row_names(batch, source)
        labels += _stated(batch.column(wanted), source, threshold)
    if not clips:
        raise EvaluationError(f"--truth {source.uri!r} has no scored clip")
    what = "tags" if threshold is None else f"scores from {threshold:g}"
    return Truth(f"{what} of {source.name}", tuple(clips), tuple(names), tuple(labels), without)


def _stated(column: pa.Array, source: Source, threshold: float | None) -> Iterator[tuple[str, ...]]:
    """What a column of tags, or of scores from `threshold` on, says of each clip."""
    if threshold is None:
        for tags in column.to_pylist():
            yield tuple(tag["mid"] or tag["name"] for tag in tags or ())
        return
    texts = [label.mid or label.name for label in source.labels]
    for scores in score_matrix(column, source):
        yield tuple(texts[index] for index in np.flatnonzero(scores >= threshold))


# AudioSet's own file begins with three lines of comment, of which the third names the columns.
_SEGMENT_COLUMNS = ("ytid", "start_seconds", "end_seconds", "positive_labels")


def _audioset_segments(place: str, text: str) -> list[list[str]] | None:
    """Rows of AudioSet's segments file; None where the text is something else."""
    lines = text.splitlines()
    header = next((line for line in lines if line.strip() and not _is_comment(line)), "")
    for line in (*(line.lstrip("# ") for line in lines[:5] if _is_comment(line)), header):
        if tuple(cell.strip().lower() for cell in line.split(",")) == _SEGMENT_COLUMNS:
            break
    else:
        return None
    # What is left out leaves an empty line, so that errors can name lines.
    data = ("" if _is_comment(line) else line.strip() for line in lines)
    rows = [cells for _, cells in _csv_rows(place, data)]
    return rows[1:] if rows and rows[0][0].lower() == "ytid" else rows


def _is_comment(line: str) -> bool:
    # An id may begin with anything but a number sign.
    return line.startswith("#")


def _of_segments(name: str, rows: list[list[str]]) -> Truth:
    """AudioSet's segments: `YTID, start, end, "mids"`."""
    clips, names, labels = [], [], []
    for number, row in enumerate(rows, 1):
        try:
            ytid, start_s, end_s, mids = row
            forms = segment_names(ytid, float(start_s), float(end_s))
        except ValueError as error:
            raise EvaluationError(
                f"--truth {name!r}: segment {number} is {','.join(row)!r}; expected "
                'YTID, start_seconds, end_seconds, "mid,mid"'
            ) from error
        clips.append(f"{ytid}_{float(start_s):g}_{float(end_s):g}")
        names.append(forms)
        labels.append(tuple(mid.strip() for mid in mids.split(",") if mid.strip()))
    if not clips:
        raise EvaluationError(f"--truth {name!r} holds no segment")
    return Truth(name, tuple(clips), tuple(names), tuple(labels))


def segment_names(ytid: str, start_s: float, end_s: float) -> Names:
    """What a file of an AudioSet segment may be called, without its suffix.

    The id alone, or with `Y` before it; with the start, or start and end, after it, in seconds
    (`30`, `30.0`, `30.000`), in milliseconds, or (the start alone) in six digits of seconds.
    """
    spans = [f"{start_s:g}_{end_s:g}", f"{start_s:.1f}_{end_s:.1f}", f"{start_s:.3f}_{end_s:.3f}"]
    spans += [f"{round(1000 * start_s)}_{round(1000 * end_s)}", f"{round(1000 * start_s)}"]
    spans += [f"{start_s:g}", f"{start_s:.1f}", f"{start_s:.3f}"]
    if start_s == int(start_s):
        spans.append(f"{int(start_s):06d}")
    forms = frozenset([ytid, f"Y{ytid}", *(f"{ytid}_{span}" for span in spans)])
    return tuple(frozenset() if kind == "audio_xxh128" else forms for kind in NAME_KINDS)


# ------------------------------------------------------------------ tables


def _csv(place: str, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns, rows) of a table with a header; `place` is what errors call it."""
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise EvaluationError(f"{place} is empty")
    delimiter = max("\t,;", key=first.count)
    lines = _csv_rows(place, io.StringIO(text, newline=""), delimiter)
    _, cells = next(lines)
    header = [cell.strip() for cell in cells]
    rows = []
    for number, cells in lines:
        if any(cell.strip() for cell in cells[len(header) :]):
            other = ";" if delimiter != ";" else ","
            raise EvaluationError(
                f"{place}, line {number} has {len(cells)} cells, the header "
                f"{len(header)} ({', '.join(header)}): {delimiter.join(cells)!r}. Put quotes around "
                f"a cell with several labels, or separate them by {other!r} instead of {delimiter!r}"
            )
        rows.append(dict(zip(header, cells, strict=False)))
    return header, rows


def _csv_rows(
    place: str, lines: Iterable[str], delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """(line that it begins in, cells) of each row with any.

    Raises:
        EvaluationError: a quote is not closed, or stands where it cannot.
    """
    # Strict, or a quote that is not closed swallows the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise EvaluationError(
                f"{place}: the row that begins in line {number} cannot be read: {error}. Is "
                "a quote not closed, or one in a cell not doubled?"
            ) from error
        if cells:
            yield number, cells


def _json_lines(place: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"{place}, line {number} is no JSON ({error}); expected an object a line"
            ) from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{place}, line {number} is no JSON object")
        rows.append(row)
    return rows


def _columns(
    name: str, held: Sequence[str], clip_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """The columns that name the clip and its labels."""
    found = []
    for option, stated, usual in (
        ("--clip-column", clip_column, CLIP_COLUMNS),
        ("--label-column", label_column, LABEL_COLUMNS),
    ):
        column = _first(held, (stated,) if stated else usual)
        if column is None:
            looked_for = repr(stated) if stated else "none of " + ", ".join(usual)
            raise EvaluationError(
                f"--truth {name!r} has the columns {', '.join(held)}"
                + (f", not {looked_for}" if stated else f", {looked_for}")
                + f"; name the right one with {option}"
            )
        found.append(column)
    return found[0], found[1]


def _first(held: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` that is held, in whatever case, as it is held."""
    by_name = {column.casefold(): column for column in reversed(held)}
    exact = next((name for name in wanted if name in held), None)
    return exact or next((by_name[n.casefold()] for n in wanted if n.casefold() in by_name), None)


def _refuse_threshold(truth: str, threshold: float | None) -> None:
    if threshold is not None:
        raise EvaluationError(
            f"--truth-threshold is of scores, and --truth {truth!r} states labels; leave it out"
        )


def _refuse_columns(truth: str, columns: Iterable[str | None]) -> None:
    if any(columns):
        raise EvaluationError(
            f"--clip-column and --label-column are of a table, and --truth {truth!r} is none; "
            "leave them out"
        )
