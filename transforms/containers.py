"""Which files hold clips, and into which shards they are divided."""

from __future__ import annotations

import dataclasses
import json
import posixpath
from collections.abc import Iterator
from typing import BinaryIO, Literal

import pyarrow as pa

from transforms.listing import InputError
from transforms.opening import open_shard
from transforms.read_table import (
    arrow_audio_column,
    is_damage,
    open_arrow,
    open_parquet,
    parquet_audio_column,
)
from transforms.read_tfrecord import TFRECORD_NAME, has_audio
from transforms.read_zip import zip_members
from transforms.records import Shard
from transforms.storage import (
    Access,
    public_url,
    read_all,
)
from transforms.suffixes import TAR_SUFFIXES, is_audio

PARQUET_SHARD_BYTES = 512 << 20  # of row groups; larger Parquet files are split
STATE_FILE = "state.json"  # names the files of a dataset that `datasets` saved to disk


def kind_of(name: str) -> Literal["tar", "parquet", "arrow", "tfrecord", "zip"] | None:
    """The kind of the shard that a file of this name is; None where it is no container."""
    name = name.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".arrow"):
        return "arrow"
    if name.endswith(".zip"):
        return "zip"
    return "tfrecord" if TFRECORD_NAME.search(name) else None


class SavedDatasets:
    """Datasets that `datasets` saved to disk: which Arrow files of a folder belong to one.

    The same folder may hold what `map` and `filter` cached beside them.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._names: dict[str, set[str] | None] = {}  # folder -> what its state.json names
        self._seen: dict[str, set[str]] = {}

    def leaves_out(self, uri: str, named: bool) -> str | None:
        """Why an Arrow file is no input; None where it is one."""
        folder, name = posixpath.split(uri)
        self._seen.setdefault(folder, set()).add(name)
        names = self._names_of(folder)
        if names is None:
            return None if named else f".arrow without {STATE_FILE}"
        return None if name in names else f".arrow not in {STATE_FILE}"

    def check(self, uri: str) -> None:
        """Refuses a dataset that lacks a file; called with `STATE_FILE`, which sorts after `data-*`.

        Raises:
            InputError: a file that it names is not there.
        """
        folder = posixpath.dirname(uri)
        lacks = sorted((self._names_of(folder) or set()) - self._seen.get(folder, set()))
        if lacks:
            raise InputError(
                f"{folder!r} lacks {lacks[0]!r}, which its {STATE_FILE} names"
                + (f", and {len(lacks) - 1} more" if len(lacks) > 1 else "")
                + ": copy the dataset again, whole"
            )

    def _names_of(self, folder: str) -> set[str] | None:
        if folder not in self._names:
            self._names[folder] = self._read(folder)
        return self._names[folder]

    def _read(self, folder: str) -> set[str] | None:
        try:
            state = json.loads(read_all(f"{folder}/{STATE_FILE}", self._access))
            return {str(file["filename"]) for file in state["_data_files"]}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # another program's state.json
            return None


def shards_with_audio(whole: Shard, *, must_have_audio: bool, access: Access) -> Iterator[Shard]:
    """One shard, or several where it is a large Parquet file; none where there is no audio."""
    if whole.kind == "parquet":
        yield from _parquet_shards(whole, access)
        return
    with open_shard(whole, access, in_order=False) as stream:
        if whole.kind == "zip":
            there = zip_members(stream, is_audio) != []
            lacks = "no audio member: expected files with the suffix of an audio format"
        elif whole.kind == "tfrecord":
            there, features = has_audio(stream)
            lacks = (
                "no encoded audio in its first record: expected a tf.train.Example with bytes in a "
                f"feature such as 'audio' or 'audio/encoded', found {features or 'no feature'}"
            )
        else:
            there, columns = _arrow_has_audio(stream)
            lacks = f"no audio column: expected one as `datasets` saves it, found {columns}"
    if there:
        yield whole
    elif must_have_audio:
        raise InputError(f"{public_url(whole.uri)!r} has {lacks}")


def _arrow_has_audio(stream: BinaryIO) -> tuple[bool, str]:
    """(whether an Arrow file has audio or cannot be read, its columns)."""
    try:
        schema, batches = open_arrow(stream)
        column = arrow_audio_column(schema, None)
        if column is None and (first := next(batches, None)) is not None:
            first.validate(full=True)
            column = arrow_audio_column(schema, first)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return True, ""  # reading it gives the row that says what is broken
    return column is not None, _columns_of(schema)


def _columns_of(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)[:300]


def _parquet_shards(whole: Shard, access: Access) -> Iterator[Shard]:
    """One shard, or several where the row groups are large; none where there is no audio."""
    size = whole.size_bytes
    try:
        with open_shard(whole, access) as stream:
            parquet = open_parquet(stream)
            footer = parquet.metadata
            column = parquet_audio_column(parquet)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield whole  # reading it gives the row that says what is broken
        return
    if column is None:
        return
    if size <= PARQUET_SHARD_BYTES or footer.num_row_groups < 2:
        yield whole
        return
    first, group_bytes = 0, 0
    for group in range(footer.num_row_groups):
        columns = footer.row_group(group)
        group_bytes += sum(
            columns.column(c).total_compressed_size for c in range(columns.num_columns)
        )
        if group_bytes >= PARQUET_SHARD_BYTES or group == footer.num_row_groups - 1:
            yield dataclasses.replace(
                whole,
                id=f"{whole.id}-rg{first:05d}-{group + 1:05d}",
                size_bytes=group_bytes,
                row_groups=(first, group + 1),
                file_sizes=(size,),
            )
            first, group_bytes = group + 1, 0
