"""Holds a finished file against what it says of itself, row for row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from student.labels import Label
from transforms.output import Output
from transforms.retag import RetagError, check_columns
from transforms.write import COUNTED, RowOptions, ShardSummary, count_row, read_footer, tags_of

_ROWS_AT_ONCE = 1_024  # whose tags are Python objects at a time
_TOLERANCE_S = 1e-6  # a total's seconds of audio, of so many: sums of floats

# What can be wrong with an output, in the order in which it is told.
KINDS = {
    "run": "what stands beside the rows is damaged, or contradicts itself",
    "missing shard": "shards of the inputs without a file",
    "foreign file": "files whose shard is not in the inputs",
    "unreadable": "files that cannot be read to their last row",
    "making": "files of another making than run.json",
    "totals": "totals that differ from the rows",
    "missing clip": "clips of the inputs without a row",
    "foreign row": "rows whose clip is not in the inputs",
    "double row": "clip ids that are in the output more than once",
    "changed audio": "rows whose clip has other bytes by now, or cannot be read any more",
    "row": "rows that contradict themselves",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # of `KINDS`
    what: str  # names the place


@dataclass
class Checked:
    """What a look at one file showed."""

    problems: list[Problem] = field(default_factory=list)
    summary: ShardSummary | None = (
        None  # as its rows add up, or its footer where rows were not read
    )
    ids: list[str] = field(default_factory=list)  # of its rows; none where they were not read
    hashes: list[str | None] = field(default_factory=list)  # `audio_xxh128` of each

    @property
    def id_digests(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """A number for each id: equal ids have equal ones."""
        return np.array([digest_of(clip_id) for clip_id in self.ids], np.uint64)


def digest_of(clip_id: str) -> int:
    """A number of 64 bits for an id."""
    return xxhash.xxh3_64_intdigest(clip_id.encode())


def check_file(
    output: Output,
    name: str,
    labels: Sequence[Label],
    options: RowOptions,
    fingerprint: str,
    *,
    quick: bool = False,
    compacted: bool = False,
) -> Checked:
    """Looks at one file: all of its rows, or (`quick`) its footer alone. A row group is in memory.

    Args:
        output: where it is.
        name: `clips/<shard_id>.parquet`.
        labels: of the scores.
        options: what goes into a row.
        fingerprint: of the making that it has to be of.
        quick: read no rows.
        compacted: it is no shard's, but has rows of many, sorted by their ids.

    Raises:
        OSError: storage does not answer.
    """
    checked = Checked()

    def wrong(kind: str, what: str) -> None:
        checked.problems.append(Problem(kind, f"{name}: {what}"))

    try:
        footer = read_footer(output, name)
    except FileNotFoundError:
        wrong("unreadable", "it is not there any more")
        return checked
    except ValueError as error:
        wrong("unreadable", str(error))
        return checked
    if footer.fingerprint != fingerprint:
        wrong(
            "making", f"its fingerprint is {footer.fingerprint[:12]}..., not {fingerprint[:12]}..."
        )
    if footer.rows != footer.summary.clips:
        wrong(
            "totals",
            f"its footer says {footer.summary.clips:,} clips, Parquet {footer.rows:,} rows",
        )
    checked.summary = footer.summary
    if quick:
        return checked
    counted = ShardSummary()
    try:
        with output.open(name) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            check_columns(file.schema_arrow, labels, options, name)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                first = counted.clips
                for row in table.select(list(COUNTED)).to_pylist():
                    count_row(counted, row)
                checked.ids += table["clip_id"].to_pylist()
                checked.hashes += table["audio_xxh128"].to_pylist()
                for number, what in _contradictions(table, labels, options):
                    wrong("row", f"row {first + number}, {checked.ids[first + number]}: {what}")
    except RetagError as error:
        wrong("unreadable", str(error))
        return checked
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wrong("unreadable", f"row group after row {counted.clips:,}: {reason}")
        return checked
    for what in _differences(footer.summary, counted):
        wrong("totals", what)
    shard_id = name.rpartition("/")[2].removesuffix(".parquet")
    if compacted:
        for before, clip_id in pairwise(checked.ids):
            if clip_id < before:
                wrong("row", f"clip_id {clip_id} comes after {before}: the rows are not sorted")
    else:
        for clip_id in checked.ids:
            if not clip_id.startswith(f"{shard_id}/"):
                wrong("row", f"clip_id {clip_id} is not of this shard")
    checked.summary = counted
    return checked


def _differences(stated: ShardSummary, counted: ShardSummary) -> Iterator[str]:
    for name, said in vars(stated).items():
        found = getattr(counted, name)
        if isinstance(said, float):
            if abs(said - found) > _TOLERANCE_S * max(1.0, found):
                yield f"its footer says {name} {said:.3f}, the rows add up to {found:.3f}"
        elif isinstance(said, int):
            if said != found:
                yield f"its footer says {said:,} {name}, the rows are {found:,}"
        elif said != found:
            yield f"{name} of its footer differ from those of the rows"


def _contradictions(
    table: pa.Table, labels: Sequence[Label], options: RowOptions
) -> Iterator[tuple[int, str]]:
    """(number of the row, what is wrong with it) in one row group."""
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        some = table.slice(start, _ROWS_AT_ONCE)
        values = some["scores"].combine_chunks().flatten()
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        absent = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, len(labels))
        scores = values.to_numpy(zero_copy_only=False).reshape(-1, len(labels))
        outside = ~((scores >= 0) & (scores <= 1)) & ~absent  # NaN is outside too
        tags, errors = some["tags"].to_pylist(), some["error"].to_pylist()
        for row in range(some.num_rows):
            if absent[row].all():
                if errors[row] is None:
                    yield start + row, "it has neither scores nor an error"
                if tags[row] is not None:
                    yield start + row, "it has tags and no scores"
            elif absent[row].any():
                yield start + row, f"{absent[row].sum():,} of its scores are null"
            elif outside[row].any():
                index = int(outside[row].argmax())
                yield start + row, f"the score of {labels[index].name} is {scores[row][index]}"
            elif tags[row] != tags_of(scores[row], labels, options):
                yield start + row, "its tags are not those of its scores and thresholds"
        if "chunks" in table.schema.names:
            yield from ((start + row, what) for row, what in _wrong_chunks(some, absent))


def _wrong_chunks(
    table: pa.Table, absent: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
) -> Iterator[tuple[int, str]]:
    for row, chunks in enumerate(table["chunks"]):
        if not chunks.is_valid:
            if not absent[row].all():
                yield row, "it has scores and no chunks"
            continue
        flat = chunks.values.field("scores").flatten().to_numpy(zero_copy_only=False)
        if not ((flat >= 0) & (flat <= 1)).all():
            yield row, "a score of a chunk is not within 0 and 1"
