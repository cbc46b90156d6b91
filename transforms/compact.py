"""Writes the rows of an output's files in the order of `clip_id` into few large files.

A file's row groups, sorted one by one, are the runs of an external sort. The ids of a shard's
clips begin with the shard's, so that almost always runs do not overlap, and one after the other
is in memory. Those that do are laid on disk and merged, a piece of each at a time.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transforms.output import Output
from transforms.row_hash import hash_rows
from transforms.storage import is_local
from transforms.write import (
    BYTES_PER_GROUP,
    CLIPS_FOLDER,
    RUN_KEY,
    SHARD_KEY,
    ShardSummary,
    file_metadata,
    read_footer,
)

# DuckDB's own row groups are as large; BigQuery asks for 16 MiB or more, which `BYTES_PER_GROUP` is
# also after compression.
MAX_ROWS_PER_GROUP = 122_880

_ROWS_AT_ONCE = 8_192  # of a merge
_FOOTERS_AT_ONCE = 32  # a remote one is a round trip
_RUNS_AHEAD = 4  # remote ones that are fetched while one is written
_KEY = "clip_id"

Item = TypeVar("Item")
Result = TypeVar("Result")


class CompactError(ValueError):
    """Files cannot be compacted; the message says why."""


@dataclass(frozen=True)
class Run:
    """A row group of a file, and between which ids its rows are."""

    name: str  # of the file
    group: int
    rows: int
    first: str
    last: str


@dataclass(frozen=True)
class Planned:
    """The rows that are to be compacted."""

    schema: pa.Schema
    clusters: list[list[Run]]  # in order; only the runs of one cluster overlap
    total: ShardSummary  # as the files' footers say
    files: int


@dataclass
class Part:
    """A new file."""

    name: str
    rows: int
    row_groups: int
    size_bytes: int
    summary: ShardSummary
    digest: int  # of `hash_rows`, of the file as it was read again


def plan(source: Output, names: Sequence[str], fingerprint: str) -> Planned:
    """What is in the files, from their footers.

    Args:
        source: where they are.
        names: `clips/<shard_id>.parquet`.
        fingerprint: of the making that all have to be of.

    Raises:
        CompactError: a file is damaged, of another making, or has other columns.
        OSError: it cannot be read.
    """
    schema: pa.Schema | None = None
    total, runs = ShardSummary(), []

    def look(name: str) -> tuple[ShardSummary, str, pa.Schema, list[Run]]:
        with _readable(source, name):
            footer = read_footer(source, name)
            with source.open(name) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
                if footer.rows != footer.summary.clips:
                    raise ValueError(
                        f"its footer says {footer.summary.clips:,} clips, Parquet {footer.rows:,} rows"
                    )
                found = [_run(file, name, group) for group in range(file.num_row_groups)]
                own = file.schema_arrow.remove_metadata()
        return footer.summary, footer.fingerprint, own, [run for run in found if run is not None]

    at_once = 1 if is_local(source.uri) else _FOOTERS_AT_ONCE
    for name, (summary, making, own, found) in zip(
        names, _ahead(look, names, at_once), strict=True
    ):
        place = f"{source.uri}/{name}"
        if making != fingerprint:
            raise CompactError(f"{place} is of another making than the run.json beside it")
        if schema is not None and own != schema:
            raise CompactError(
                f"{place} has other columns than {source.uri}/{names[0]}: they are of two versions of "
                "earmark; annotate anew to have one table"
            )
        schema = own
        total.add(summary)
        runs += found
    if schema is None:
        raise CompactError(f"{source.uri}/{CLIPS_FOLDER} holds no finished file")
    return Planned(schema, _clusters(runs), total, len(names))


def _run(file: pq.ParquetFile, name: str, group: int) -> Run | None:
    """A row group as a run; None where it has no row."""
    about = file.metadata.row_group(group)
    if not about.num_rows:
        return None
    column = about.column(0)
    statistics = column.statistics if column.path_in_schema == _KEY else None
    if statistics is not None and statistics.has_min_max:
        first, last = statistics.min, statistics.max
    else:  # ids too long for a footer
        ends = pc.min_max(file.read_row_group(group, [_KEY], use_threads=False)[_KEY]).as_py()
        first, last = ends["min"], ends["max"]
    return Run(name, group, about.num_rows, first, last)


def _clusters(runs: Iterable[Run]) -> list[list[Run]]:
    clusters: list[list[Run]] = []
    last = ""
    for run in sorted(runs, key=lambda run: (run.first, run.last)):
        # Two with one id between them are merged as well: it may be there twice.
        if clusters and run.first <= last:
            clusters[-1].append(run)
            last = max(last, run.last)
        else:
            clusters.append([run])
            last = run.last
    return clusters


class Rows:
    """The planned rows, in order. `digest` and `rows` are of those that were read so far."""

    def __init__(self, source: Output, planned: Planned) -> None:
        self._source, self._planned = source, planned
        self.digest = self.rows = 0

    def __iter__(self) -> Iterator[pa.Table]:
        """Tables of consecutive rows.

        Raises:
            CompactError: a file is damaged, or has changed since it was planned.
            OSError: it cannot be read, or the temporary folder is full.
        """
        single: list[Run] = []
        for cluster in self._planned.clusters:
            if len(cluster) == 1:
                single += cluster
                continue
            yield from self._read(single)
            single = []
            yield from self._merged(cluster)
        yield from self._read(single)

    def _read(self, runs: Sequence[Run]) -> Iterator[pa.Table]:
        """Each run as a sorted table, counted and hashed as it lay there."""
        at_once = 1 if is_local(self._source.uri) else _RUNS_AHEAD
        for table, digest in _ahead(self._read_one, runs, at_once):
            self.digest = (self.digest + digest) % (1 << 64)
            self.rows += table.num_rows
            yield table

    def _read_one(self, run: Run) -> tuple[pa.Table, int]:
        with (
            _readable(self._source, run.name),
            self._source.open(run.name) as stream,
            pq.ParquetFile(stream, pre_buffer=False) as file,
        ):
            # Without Arrow's threads, one of which could abort the process as it ends.
            table = file.read_row_group(run.group, use_threads=False).combine_chunks()
        digest = hash_rows(table)
        table = table.cast(self._planned.schema).take(pc.sort_indices(table[_KEY]))
        if (len(table), table[_KEY][0].as_py(), table[_KEY][-1].as_py()) != (
            run.rows, run.first, run.last,
        ):  # fmt: skip
            raise CompactError(
                f"{self._source.uri}/{run.name} was replaced while it was read; the same command again "
                "reads what is there now"
            )
        return table, digest

    def _merged(self, runs: Sequence[Run]) -> Iterator[pa.Table]:
        """Runs that overlap: sorted onto disk, then read side by side, each from its beginning."""
        schema = self._planned.schema
        piece_rows = max(16, _ROWS_AT_ONCE // len(runs))
        keys, pieces = [], []  # of each run: its ids; the batches that it is on disk
        with tempfile.TemporaryDirectory(prefix="earmark-compact-") as folder:
            place = str(Path(folder) / "runs.arrow")
            with pa.OSFile(place, "wb") as target, pa.ipc.new_file(target, schema) as writer:
                batches = 0
                for table in self._read(runs):
                    keys.append(table[_KEY].cast(pa.large_string()).combine_chunks())
                    count = 0
                    for batch in table.combine_chunks().to_batches(max_chunksize=piece_rows):
                        writer.write_batch(batch)
                        count += 1
                    pieces.append(range(batches, batches + count))
                    batches += count
            starts = np.cumsum([0, *map(len, keys)])
            order = pc.sort_indices(pa.chunked_array(keys)).to_numpy()  # stable
            del keys
            with pa.OSFile(place, "rb") as stored, pa.ipc.open_file(stored) as reader:
                cursors = [_Cursor(reader, own) for own in pieces]
                for at in range(0, len(order), _ROWS_AT_ONCE):
                    wanted = order[at : at + _ROWS_AT_ONCE]
                    # Of each run the next rows, one run after the other: the order of numbers.
                    in_place = np.sort(wanted)
                    counts = np.diff(np.searchsorted(in_place, starts))
                    found = [
                        batch
                        for cursor, count in zip(cursors, counts.tolist(), strict=True)
                        for batch in cursor.take(count)
                    ]
                    table = pa.Table.from_batches(found, schema).combine_chunks()
                    yield table.take(pa.array(np.searchsorted(in_place, wanted)))


class _Cursor:
    """The rows of a run on disk, from its beginning; one batch is in memory."""

    def __init__(self, reader: Any, numbers: Iterable[int]) -> None:
        self._reader, self._numbers = reader, iter(numbers)
        self._left: Any = None

    def take(self, count: int) -> Iterator[pa.RecordBatch]:
        while count:
            if self._left is None:
                self._left = self._reader.get_batch(next(self._numbers))
            some = self._left.slice(0, count)
            count -= some.num_rows
            rest = self._left.slice(some.num_rows)
            self._left = rest if rest.num_rows else None
            yield some


def write_parts(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    output: Output,
    run: str,
    target_bytes: int,
    before_publishing: Callable[[], None] = lambda: None,
) -> Iterator[Part]:
    """Writes `clips/part-00000.parquet` and so on; each appears whole, and was read again before.

    Without rows there is one file all the same, which says which columns there are.

    Args:
        tables: rows of `schema`, in the order in which they are to be.
        schema: of the rows.
        output: where.
        run: the run description, JSON, for the files' metadata.
        target_bytes: about how large a file is to be.
        before_publishing: called when a file is whole; what it raises stops it from being published.

    Raises:
        CompactError: a file is not what was written.
        OSError: it cannot be written or published.
    """
    groups = _groups(tables, min(BYTES_PER_GROUP, target_bytes))
    group = next(groups, schema.empty_table())
    number = 0
    while group is not None:
        name = f"{CLIPS_FOLDER}/part-{number:05d}.parquet"
        summary = ShardSummary()
        with output.scratch(name) as scratch:
            size = 0
            with (
                scratch.open("wb") as stream,
                pq.ParquetWriter(stream, schema, compression="zstd") as writer,
            ):
                while group is not None:
                    writer.write_table(group, row_group_size=max(1, len(group)))
                    count_table(summary, group)
                    before, size = size, stream.tell()
                    group = next(groups, None)
                    if size + (size - before) // 2 >= target_bytes:  # another would be too much
                        break
                writer.add_key_value_metadata(file_metadata(run, summary, None))
            part = _read_again(scratch, name, summary)
            before_publishing()
            output.publish(scratch, name, replace=True)
        yield part
        number += 1


def _groups(tables: Iterable[pa.Table], limit: int) -> Iterator[pa.Table]:
    """The rows in tables that are a row group each."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        row_bytes = max(1, table.nbytes // max(1, len(table)))
        while len(table):
            room = min(MAX_ROWS_PER_GROUP - rows, -(-(limit - size) // row_bytes))
            some, table = table.slice(0, room), table.slice(room)
            held.append(some)
            rows += len(some)
            size += len(some) * row_bytes
            if rows >= MAX_ROWS_PER_GROUP or size >= limit:
                yield pa.concat_tables(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held)


def _read_again(file: Path, name: str, summary: ShardSummary) -> Part:
    digest = rows = 0
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        groups = parquet.num_row_groups
        for group in range(groups):
            table = parquet.read_row_group(group, use_threads=False)
            digest = (digest + hash_rows(table)) % (1 << 64)
            rows += len(table)
        metadata = parquet.metadata.metadata or {}
    if rows != summary.clips or not {RUN_KEY, SHARD_KEY} <= metadata.keys():
        raise CompactError(f"{name} is not what was written: {rows:,} rows of {summary.clips:,}")
    return Part(name, rows, groups, file.stat().st_size, summary, digest)


def count_table(summary: ShardSummary, table: pa.Table) -> None:
    """Adds rows to totals, as `transforms.write.count_row` does one by one."""
    failed = table["error"].is_valid()
    without = table["tags"].is_null()
    summary.clips += len(table)
    summary.audio_s += pc.sum(table["duration_s"]).as_py() or 0.0
    summary.failed += pc.sum(pc.and_(failed, without)).as_py() or 0
    summary.partial += pc.sum(pc.and_not(failed, without)).as_py() or 0
    for error in table["error"].filter(failed).to_pylist():
        summary.failures[f"{error['stage']}/{error['type']}"] += 1
    names = pc.struct_field(pc.list_flatten(table["tags"]), "name")
    summary.tags.update(_counts(names))


def _counts(names: pa.ChunkedArray) -> Counter[str]:
    counted = Counter[str]()
    for one in names.value_counts():
        counted[one["values"].as_py()] += one["counts"].as_py()
    return counted


def differing(stated: ShardSummary, counted: ShardSummary) -> list[str]:
    """Which totals are not the same; seconds of audio are sums of floats, in another order here."""

    def alike(one: Any, other: Any) -> bool:
        if isinstance(one, float):
            return abs(one - other) <= 1e-6 * max(1.0, abs(other))
        if isinstance(one, Mapping):
            return +Counter(one) == +Counter(other)
        return bool(one == other)

    return [
        name for name, value in vars(stated).items() if not alike(value, getattr(counted, name))
    ]


def _ahead(one: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> Iterator[Result]:
    """The results of `one` in order, the next few being made while one is used."""
    if at_once == 1:
        yield from map(one, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def _readable(source: Output, name: str) -> Iterator[None]:
    """What is wrong with a file is said with its name; that storage fails is left as it is."""
    try:
        yield
    except (OSError, ValueError, IndexError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompactError(
            f"{source.uri}/{name} cannot be read ({reason}); where it is damaged, remove it and "
            "annotate once more"
        ) from error
