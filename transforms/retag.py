"""Recomputes the tags of a finished file from its scores, into a file of another output."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from student.labels import Label
from transforms.output import Output
from transforms.segments import chunks_of_clips
from transforms.write import (
    RowOptions,
    ShardSummary,
    file_metadata,
    read_footer,
    segments_of,
    tags_of,
)

_ROWS_AT_ONCE = 1_024  # whose tags are Python objects at a time


class RetagError(ValueError):
    """A file's tags cannot be recomputed; the message says why."""


def retag_file(
    source: Output,
    output: Output,
    name: str,
    labels: Sequence[Label],
    options: RowOptions,
    fingerprint: str,
    run: str,
    before_publishing: Callable[[], None] = lambda: None,
) -> tuple[ShardSummary, ShardSummary]:
    """Copies `name` from `source` to `output` with other tags; it appears complete or not at all.

    All columns but `tags` and `segments`, which is made of `chunks`, the order of rows and
    the row groups stay as they are. One row group is in memory at a time.

    Args:
        source: where the finished file is.
        output: where the new one is to be, under the same name.
        name: `clips/<shard_id>.parquet`.
        labels: of the scores.
        options: the new thresholds and `top_k`, and the `score_type` of the file.
        fingerprint: of the making that the file has to be of.
        run: the new run description, JSON, for the new file's metadata.
        before_publishing: called when the file is whole; what it raises stops it from being
            published.

    Returns:
        (totals of the file as it was, totals of the new one).

    Raises:
        RetagError: the file cannot be read, is of another making, or lacks what is needed.
        OSError: the new one cannot be written.
    """
    place = f"{source.uri}/{name}"
    with _readable(place):
        footer = read_footer(source, name)
    before = footer.summary
    if footer.fingerprint != fingerprint:
        raise RetagError(
            f"{place} is of another making than the run.json beside it; annotate once more into a new "
            "folder, and retag that"
        )
    after = replace(before, tags=Counter())
    with contextlib.ExitStack() as opened:
        with _readable(place):
            file = opened.enter_context(
                pq.ParquetFile(opened.enter_context(source.open(name)), pre_buffer=False)
            )
        schema = file.schema_arrow.remove_metadata()
        check_retaggable(schema, labels, options, place)
        with output.scratch(name) as scratch:
            with (
                scratch.open("wb") as target,
                pq.ParquetWriter(target, schema, compression="zstd") as writer,
            ):
                others = [name for name in schema.names if name not in ("tags", "segments")]
                for group in range(file.num_row_groups):
                    with _readable(place):
                        table = file.read_row_group(group, others, use_threads=False)
                    for at, column in enumerate(schema):
                        if column.name == "tags":
                            new = _tags(table["scores"], labels, options, after, column.type)
                        elif column.name == "segments":
                            new = _segments(table["chunks"], labels, options, column.type)
                        else:
                            continue
                        table = table.add_column(at, column, new)
                    writer.write_table(table)
                writer.add_key_value_metadata(file_metadata(run, after, footer.source))
            before_publishing()
            output.publish(scratch, name)
    return before, after


@contextlib.contextmanager
def _readable(place: str) -> Iterator[None]:
    """What goes wrong while a file of the source is read is the file's fault, not the output's."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RetagError(
            f"{place} cannot be read ({reason}); where it is damaged, remove it, annotate once more, "
            "and retag again"
        ) from error


def check_retaggable(
    schema: pa.Schema, labels: Sequence[Label], options: RowOptions, place: str
) -> None:
    """Makes sure that a file has what its tags and segments are made of.

    Raises:
        RetagError: as of `check_columns`, or it has segments without the chunks' scores.
    """
    check_columns(schema, labels, options, place)
    if "segments" in schema.names and "chunks" not in schema.names:
        raise RetagError(
            f"{place} has a column 'segments' and no 'chunks', without which segments cannot be "
            "recomputed: other tags need another earmark annotate, with --segments, and with --chunks "
            "to spare you the next one"
        )


def check_columns(
    schema: pa.Schema, labels: Sequence[Label], options: RowOptions, place: str
) -> None:
    """Makes sure that a file has what its tags are made of.

    Raises:
        RetagError: it lacks scores, or they are of other labels or another type.
    """
    for column in ("scores", "tags", "error"):
        if column not in schema.names:
            raise RetagError(
                f"{place} has no column {column!r}, without which tags cannot be recomputed: take the "
                "output as earmark annotate wrote it"
            )
    expected = pa.list_(
        pa.float16() if options.score_type == "float16" else pa.float32(), len(labels)
    )
    found = schema.field("scores").type
    # The name of a list's items may differ.
    if not pa.types.is_fixed_size_list(found) or (found.value_type, found.list_size) != (
        expected.value_type,
        expected.list_size,
    ):
        raise RetagError(
            f"{place} has scores of type {found}, expected {expected} as run.json and labels.parquet "
            "say: take the output as earmark annotate wrote it"
        )


def _tags(
    scores: pa.ChunkedArray,
    labels: Sequence[Label],
    options: RowOptions,
    summary: ShardSummary,
    kind: pa.DataType,
) -> pa.ChunkedArray:
    """The column `tags`, null for a clip without scores; each tag is counted in `summary`."""
    columns = []
    for start in range(0, len(scores), _ROWS_AT_ONCE):
        vectors = scores.slice(start, _ROWS_AT_ONCE).combine_chunks()
        values = vectors.flatten()
        # A clip without scores has a list of nulls.
        missing = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, len(labels))[:, 0]
        matrix = values.to_numpy(zero_copy_only=False).reshape(-1, len(labels))
        tags = [
            None if absent else tags_of(row, labels, options)
            for row, absent in zip(matrix, missing, strict=True)
        ]
        for row in tags:
            summary.tags.update(tag["name"] for tag in row or ())
        columns.append(pa.array(tags, kind))
    return pa.chunked_array(columns, kind)


def _segments(
    chunks: pa.ChunkedArray, labels: Sequence[Label], options: RowOptions, kind: pa.DataType
) -> pa.ChunkedArray:
    """The column `segments`, null for a clip without scores."""
    columns = []
    for start in range(0, len(chunks), _ROWS_AT_ONCE):
        clips = chunks_of_clips(chunks.slice(start, _ROWS_AT_ONCE).combine_chunks())
        segments = [clip and segments_of(*clip, labels, options) for clip in clips]
        columns.append(pa.array(segments, kind))
    return pa.chunked_array(columns, kind)
