"""Does the failed rows of a finished file once more; its other rows stay as they are, bit for bit."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transforms.output import Output
from transforms.records import EncodedClip, Shard, UnreadableClip, as_text, clip_id_of, name_of
from transforms.source import describe_source
from transforms.storage import public_url
from transforms.write import (
    BYTES_PER_GROUP,
    COUNTED,
    ROWS_PER_GROUP,
    ShardSummary,
    count_row,
    file_metadata,
    held_bytes,
    read_footer,
    rows_to_table,
)

Clip = EncodedClip | UnreadableClip


class RetryError(ValueError):
    """A file's failed rows cannot be done once more beside the others; the message says why."""


@dataclass(frozen=True)
class Retry:
    """Which failed rows are done once more: all, or some by their error."""

    stages: tuple[str, ...] = ()  # none: any
    types: tuple[str, ...] = ()  # none: any

    def selects(self, stage: str, type: str) -> bool:
        """Whether a row with such an error is done once more."""
        return (not self.stages or stage in self.stages) and (not self.types or type in self.types)

    def count(self, summary: ShardSummary) -> int:
        """How many rows of a shard are, by its totals."""
        return sum(
            clips for error, clips in summary.failures.items() if self.selects(*error.split("/", 1))
        )


class Mending:
    """A finished file on its way to one in which failed rows have been done once more.

    The shard is read from its start, so that each clip is known by its id and by the hash of
    its bytes, and only what failed is decoded. Clips that are found for the first time, behind
    a break that has been repaired, get rows too.

    Args:
        output: where.
        name: of the finished file.
        shard: that it is of.
        retry: which rows.

    Raises:
        OSError, ValueError: the file cannot be read.
    """

    def __init__(self, output: Output, name: str, shard: Shard, retry: Retry) -> None:
        self._output, self._name, self._shard = output, name, shard
        # Before the file is read: what is read is then of this version, or it is not replaced.
        self._version = output.version(name)
        with self._open() as file:
            table = file.read(["clip_id", "audio_xxh128", "error"], use_threads=False)
        self._ids: list[str] = table["clip_id"].to_pylist()
        self._hashes = table["audio_xxh128"].to_pylist()
        self._failed = [error is not None for error in table["error"].to_pylist()]
        self._selected = [
            error is not None and retry.selects(error["stage"], error["type"])
            for error in table["error"].to_pylist()
        ]
        self._numbers = {clip_id: number for number, clip_id in enumerate(self._ids)}
        self._places: deque[int | str] = deque()  # a row that stays, or the id of a new one
        self._kept: set[int] = set()
        self.to_do = any(self._selected)
        self.summary = ShardSummary()

    def failed(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        """Of all clips of the shard, in order, those that are to be decoded and scored.

        Raises:
            RetryError: a row that is fine is of other bytes, or of a clip that is gone.
        """
        seen: dict[str, int] = {}
        for clip in clips:
            clip_id = clip_id_of(self._shard.id, name_of(clip), seen)
            if self._stays(clip, clip_id):
                self._kept.add(self._numbers[clip_id])
                self._places.append(self._numbers[clip_id])
            else:
                self._places.append(clip_id)
                yield clip
        for number, clip_id in enumerate(self._ids):
            if not self._failed[number] and number not in self._kept:
                raise self._refusal(f"has no clip {clip_id!r} any more, whose row is fine")

    def _stays(self, clip: Clip, clip_id: str) -> bool:
        number = self._numbers.get(clip_id)
        if number is None or self._selected[number]:
            return False
        expected = self._hashes[number]
        same = isinstance(clip, UnreadableClip) or clip.xxh128 == expected
        if self._failed[number]:
            return same  # other bytes deserve another try
        if not same:
            raise self._refusal(f"has other bytes for {clip_id!r}, whose row is fine")
        return True

    def _refusal(self, what: str) -> RetryError:
        return RetryError(
            f"{as_text(public_url(self._shard.uri))} {what}: the shard has changed since, and its "
            "file stays as it is; earmark annotate --refresh does the shard anew"
        )

    def write(
        self,
        rows: Iterable[Mapping[str, Any]],
        run: str,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> int:
        """Writes the rows that stay, and the new ones in their places; replaces the file in one step.

        Args:
            rows: of `clip_row`, one for each clip that `failed` gave, in order.
            run: the run description, JSON.
            before_publishing: as for `write_rows`.

        Returns:
            Bytes published; 0 where the file was replaced by another in the meantime.

        Raises:
            RetryError: from `failed`; the file stays.
            OSError: the file cannot be written or published; then the old one stays.
        """
        if self._version is None or self._output.version(self._name) != self._version:
            raise RetryError(
                f"{self._output.uri}/{self._name} is another file by now: somebody else is at work on "
                "this output; run the same command again"
            )
        with self._open() as file, self._output.scratch(self._name) as scratch:
            schema = file.schema_arrow.remove_metadata()
            with (
                scratch.open("wb") as stream,
                pq.ParquetWriter(stream, schema, compression="zstd") as writer,
            ):
                for table in self._tables(self._in_order(rows), file, schema):
                    for row in table.select(list(COUNTED)).to_pylist():
                        count_row(self.summary, row)
                    writer.write_table(table)
                if self.summary.clips == 0:
                    writer.write_table(schema.empty_table())
                source = describe_source(self._shard)
                writer.add_key_value_metadata(file_metadata(run, self.summary, source))
            before_publishing()
            size = scratch.stat().st_size
            published = self._output.publish(scratch, self._name, replace=self._version)
        if not published:
            self.summary = read_footer(self._output, self._name).summary
        return size if published else 0

    def _in_order(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[int | Mapping[str, Any]]:
        """Numbers of rows that stay, and new rows, as their clips lie in the shard."""
        for row in rows:
            while isinstance(place := self._places.popleft(), int):
                yield place
            yield {**row, "clip_id": place}
        for place in self._places:
            assert isinstance(place, int), f"{place} got no row"
            yield place

    def _tables(
        self, places: Iterable[int | Mapping[str, Any]], file: pq.ParquetFile, schema: pa.Schema
    ) -> Iterator[pa.Table]:
        """The new file's row groups: at most one of the old ones is in memory."""
        groups = file.metadata
        ends = np.cumsum([groups.row_group(n).num_rows for n in range(groups.num_row_groups)])
        held: list[int | Mapping[str, Any]] = []
        at, size = 0, 0
        for place in places:
            if isinstance(place, int):
                group = int(np.searchsorted(ends, place, side="right"))
                moves, at = group != at, group
                if moves and held:
                    yield self._table(held, file, schema, ends)
                    held, size = [], 0
            else:
                size += held_bytes(place)
            held.append(place)
            if len(held) >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
                yield self._table(held, file, schema, ends)
                held, size = [], 0
        if held:
            yield self._table(held, file, schema, ends)

    def _table(
        self,
        held: list[int | Mapping[str, Any]],
        file: pq.ParquetFile,
        schema: pa.Schema,
        ends: np.ndarray[Any, Any],
    ) -> pa.Table:
        numbers = [place for place in held if isinstance(place, int)]
        old, first = schema.empty_table(), 0
        if numbers:
            group = int(np.searchsorted(ends, numbers[0], side="right"))
            old = file.read_row_group(group, use_threads=False).replace_schema_metadata(None)
            first = int(ends[group]) - old.num_rows
        new = rows_to_table([place for place in held if not isinstance(place, int)], schema)
        # Slices, not `take`: what is not touched cannot be changed.
        pieces: list[tuple[pa.Table, int, int]] = []
        fresh = 0
        for place in held:
            table, row = (old, place - first) if isinstance(place, int) else (new, fresh)
            fresh += table is new
            if pieces and pieces[-1][0] is table and pieces[-1][2] == row:
                pieces[-1] = (table, pieces[-1][1], row + 1)
            else:
                pieces.append((table, row, row + 1))
        slices = [table.slice(start, end - start) for table, start, end in pieces]
        return pa.concat_tables(slices).combine_chunks()

    @contextlib.contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        # Without Arrow's threads, one of which could abort the process as it ends.
        with self._output.open(self._name) as stream:
            yield pq.ParquetFile(stream, pre_buffer=False)
