"""Reads clips from the rows of a table: Parquet, and datasets that `datasets` saved to disk.

Their audio lies in one column, in any of the forms that `datasets.Audio` casts from.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from pyarrow import types

from transforms.audio_bytes import AUDIO_FIELDS, is_audio_bytes, wav_of
from transforms.records import ClipError, EncodedClip, UnreadableClip, as_text

_PARQUET_ROWS = 16  # rows of a Parquet file held at a time
_NO_THREADS = pa.ipc.IpcReadOptions(use_threads=False)  # as in `open_parquet`
_PEEK_ROWS = 8  # first rows of a column of bytes whose name tells nothing

Clips = Iterator[EncodedClip | UnreadableClip]
# Gives (a seekable file at its start, xxh128, bytes) of a path in a table; raises ClipError.
OpenFile = Callable[[str], tuple[BinaryIO, str, int]]
# The first values of a column, where they are needed to tell what it holds.
Peek = Callable[[str], list[Any]]


def audio_column(schema: pa.Schema, peek: Peek = lambda _: []) -> str | None:
    """The column that holds audio as Hugging Face stores it.

    That which the schema's `huggingface` metadata calls Audio; else a struct with `bytes`,
    or with `array` and `sampling_rate`; else bytes, or a struct with a path, under a name
    such as `audio`, `wav` or `bytes`; else bytes that begin as audio does. Of several, the
    one named `audio`, else the first.

    Args:
        schema: of the table.
        peek: gives the first values of a column.
    """
    declared = _declared_features(schema)
    if declared is not None:
        named = [name for name, kind in declared.items() if kind == "Audio"]
        if found := _first(name for name in named if _holds_audio(schema.field(name).type)):
            return found
    # An image has the type that audio has.
    fields = [f for f in schema if declared is None or declared.get(f.name) in (None, "Value")]
    return (
        _first(f.name for f in fields if _is_encoded(f.type) or _is_array(f.type))
        or _named_as_audio([f.name for f in fields if _is_bytes(f.type) or _is_path(f.type)])
        or _first(
            field.name
            for field in fields
            if _is_bytes(field.type)
            and any(is_audio_bytes(value) for value in peek(field.name) if value)
        )
    )


def _declared_features(schema: pa.Schema) -> dict[str, str | None] | None:
    """Columns and the `_type` of their feature, as `datasets` writes them; None where it has not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature.get("_type") if isinstance(feature, dict) else None
            for name, feature in features.items()
            if schema.get_field_index(name) >= 0
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _first(names: Iterator[str]) -> str | None:
    found = list(names)
    return "audio" if "audio" in found else next(iter(found), None)


def _named_as_audio(names: list[str]) -> str | None:
    by_name = {name.lower(): name for name in reversed(names)}
    return next((by_name[name] for name in AUDIO_FIELDS if name in by_name), None)


def _holds_audio(kind: pa.DataType) -> bool:
    """Whether a column that is called Audio has a type that it can have."""
    return (
        is_text(kind) or _is_bytes(kind) or _is_encoded(kind) or _is_array(kind) or _is_path(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _member(kind: pa.DataType, name: str) -> pa.DataType | None:
    if not types.is_struct(kind) or kind.get_field_index(name) < 0:
        return None
    return kind.field(name).type


def _is_encoded(kind: pa.DataType) -> bool:
    content = _member(kind, "bytes")
    return content is not None and _is_bytes(content)


def _is_array(kind: pa.DataType) -> bool:
    array, rate = _member(kind, "array"), _member(kind, "sampling_rate")
    return array is not None and rate is not None and _is_list(array)


def _is_path(kind: pa.DataType) -> bool:
    path, content = _member(kind, "path"), _member(kind, "bytes")
    return path is not None and is_text(path) and (content is None or types.is_null(content))


def is_damage(error: Exception) -> bool:
    """Whether pyarrow failed over the content of a file, rather than over reaching it.

    For damaged pages and footers it raises OSError too, then without an errno.
    """
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


# ------------------------------------------------------------------- Parquet


def parquet_audio_column(parquet: pq.ParquetFile) -> str | None:
    """The column of a Parquet file that holds audio."""

    def peek(name: str) -> list[Any]:
        for batch in parquet.iter_batches(_PEEK_ROWS, columns=[name], use_threads=False):
            return batch.column(0).to_pylist()
        return []

    return audio_column(parquet.schema_arrow, peek)


def parquet_members(
    parquet: pq.ParquetFile, column: str, row_group: int, first_row: int
) -> list[str] | None:
    """What the clips of a row group are called, without their audio.

    Args:
        parquet: the file.
        column: of `parquet_audio_column`.
        row_group: its number.
        first_row: of the row group in the file.

    Returns:
        None where the names are not known without the audio.
    """
    kind = parquet.schema_arrow.field(column).type
    if not types.is_struct(kind):
        return None
    paths: list[Any] = [None] * parquet.metadata.row_group(row_group).num_rows
    if kind.get_field_index("path") >= 0:
        table = parquet.read_row_group(row_group, columns=[f"{column}.path"], use_threads=False)
        paths = [cell and cell["path"] for cell in table[column].to_pylist()]
    return [
        as_text(str(path)) if path else f"row-{first_row + place:08d}"
        for place, path in enumerate(paths)
    ]


def open_parquet(stream: BinaryIO) -> pq.ParquetFile:
    """A Parquet file without Arrow's threads, which must not hold a Python file.

    One could abort the process as it ends.
    """
    return pq.ParquetFile(stream, pre_buffer=False)


def read_parquet(
    stream: BinaryIO, row_groups: tuple[int, int] | None, open_file: OpenFile
) -> Clips:
    """Clips row by row. A damaged row group is one `UnreadableClip`; the next ones are read."""
    try:
        parquet = open_parquet(stream)
        column = parquet_audio_column(parquet)
        if column is None:
            raise pa.ArrowInvalid("it has no audio column")
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield _broken("the Parquet file is broken", error)
        return
    columns = _columns(parquet.schema_arrow, column)
    rows = [parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups)]
    first, end = row_groups or (0, len(rows))
    for group in range(first, end):
        row = sum(rows[:group])
        try:
            for batch in parquet.iter_batches(
                batch_size=_PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False
            ):
                yield from _clips_of(row, batch, column, open_file)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            lost = f"rows {row} to {sum(rows[: group + 1]) - 1}"
            yield _broken(f"row group {group} is broken, {lost} are lost", error)


def _broken(what: str, error: Exception) -> UnreadableClip:
    reason = (str(error).splitlines() or [""])[0]
    return UnreadableClip(None, ClipError("read", "BrokenShard", f"{what}: {reason}"), {})


# --------------------------------------------------------------------- Arrow


def open_arrow(stream: BinaryIO) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """(schema, batches) of an Arrow file, in the stream form of `datasets` or the file form."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream, options=_NO_THREADS)
        return file.schema, (file.get_batch(n) for n in range(file.num_record_batches))
    reader = pa.ipc.open_stream(stream, options=_NO_THREADS)
    return reader.schema, iter(reader)


def arrow_audio_column(schema: pa.Schema, batch: pa.RecordBatch | None) -> str | None:
    """The column of an Arrow file that holds audio, as its schema and first batch show."""

    def peek(name: str) -> list[Any]:
        return [] if batch is None else batch.column(name)[:_PEEK_ROWS].to_pylist()

    return audio_column(schema, peek)


def count_arrow_rows(stream: BinaryIO, enough: int) -> int:
    """How many rows an Arrow file gives, counting little further than `enough`."""
    rows = 0
    try:
        for batch in open_arrow(stream)[1]:
            batch.validate(full=True)
            rows += batch.num_rows
            if rows >= enough:
                break
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        rows += 1  # the row that says that the file is broken
    return min(rows, enough)


def read_arrow(stream: BinaryIO, open_file: OpenFile) -> Clips:
    """Clips row by row, a batch in memory at a time (100 rows where `datasets` wrote it).

    Where the file breaks, one `UnreadableClip` follows the rows before.
    """
    row, column = 0, None
    try:
        schema, batches = open_arrow(stream)
        for batch in batches:
            batch.validate(full=True)  # Arrow would follow a damaged offset anywhere
            if column is None:
                column = arrow_audio_column(schema, batch)
                if column is None:
                    raise pa.ArrowInvalid("it has no audio column")
            yield from _clips_of(row, batch.select(_columns(schema, column)), column, open_file)
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield _broken(f"the Arrow file is broken after {row} rows", error)


# ---------------------------------------------------------------------- rows


def _columns(schema: pa.Schema, column: str) -> list[str]:
    """The columns that are read: the audio, and what can be metadata."""
    return [f.name for f in schema if f.name == column or not _is_bytes(f.type)]


def _clips_of(first_row: int, batch: pa.RecordBatch, column: str, open_file: OpenFile) -> Clips:
    others = [name for name in batch.schema.names if name != column]
    for position in range(batch.num_rows):
        metadata = {name: _value(batch.column(name)[position]) for name in others}
        cell = batch.column(column)[position]
        clip = _clip(f"row-{first_row + position:08d}", cell, metadata, open_file)
        if isinstance(clip, UnreadableClip):
            yield clip
            continue
        with closing(clip.audio):
            yield clip


def _clip(
    row: str, cell: pa.Scalar, metadata: dict[str, Any], open_file: OpenFile
) -> EncodedClip | UnreadableClip:
    content, path = None, None
    if cell.is_valid:
        if types.is_struct(cell.type):
            content = cell["bytes"].as_py() if _is_encoded(cell.type) else None
            path = _value(cell["path"]) if "path" in cell else None
        elif is_text(cell.type):
            path = _value(cell)
        else:
            content = cell.as_py()
    member = as_text(str(path)) if path else row
    try:
        if content is None and cell.is_valid and _is_array(cell.type):
            content = _wav_of_array(cell)
        if content is None and path:
            audio, digest, size = open_file(str(path))
            return EncodedClip(member, audio, size, digest, metadata)
        if content is None:
            raise ClipError("read", "NoBytes", "the row holds no audio bytes, and no path")
    except ClipError as error:
        return UnreadableClip(member, error, metadata)
    digest = xxhash.xxh128_hexdigest(content)
    return EncodedClip(member, io.BytesIO(content), len(content), digest, metadata)


def _wav_of_array(cell: pa.StructScalar) -> bytes | None:
    """A WAV of `array` at `sampling_rate`; None where there is no array."""
    array, rate = cell["array"], cell["sampling_rate"].as_py()
    if not array.is_valid:
        return None
    try:
        if rate is None or rate != int(rate):
            raise ValueError(f"the sampling_rate is {rate}")
        return wav_of(_samples_of(array), int(rate))
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        message = f"the row's array cannot be read: {error}"
        raise ClipError("read", "BadArray", message) from error


def _samples_of(array: pa.Scalar) -> NDArray[np.generic]:
    """[samples] of a list, or [samples, channels] of a list of channels (or of frames)."""
    values = array.values
    if _is_list(values.type):
        lengths = {len(channel) if channel.is_valid else 0 for channel in values}
        if len(lengths) > 1:
            raise ValueError("its channels differ in length")
        flat, channels = values.flatten(), len(values)
        shaped = _numbers(flat).reshape(channels, -1) if channels else _numbers(flat)
        # `datasets` and torchaudio have channels first, soundfile frames.
        return shaped if shaped.ndim == 1 or len(shaped) > shaped.shape[1] else shaped.T
    return _numbers(values)


def _numbers(values: pa.Array) -> NDArray[np.generic]:
    if values.null_count:
        raise ValueError(f"{values.null_count} of its {len(values)} samples are null")
    if types.is_float16(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.float32)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _value(scalar: pa.Scalar) -> Any:
    """A table's value as JSON can hold it; None where it cannot be one of Python's."""
    try:
        return _plain(scalar.as_py())
    except (
        ValueError,
        OverflowError,
        pa.ArrowException,
    ):  # text that is no UTF-8, the year 31,000,000
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if not isinstance(entry, bytes)}
    if isinstance(value, list):
        return [_plain(entry) for entry in value if not isinstance(entry, bytes)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
