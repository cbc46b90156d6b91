"""Writes the scored clips of a shard as one Parquet file, published in one step."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from student.labels import Label
from transforms.output import Output
from transforms.records import ScoredClip, Shard, as_text
from transforms.segments import merge_chunks
from transforms.source import SOURCE_KEY
from transforms.storage import public_url

ScoreType = Literal["float32", "float16"]

CLIPS_FOLDER = "clips"
RUN_FILE = "run.json"
RUN_KEY = b"earmark.run"  # Parquet key-value metadata: the run description, as in run.json
SHARD_KEY = b"earmark.shard"  # Parquet key-value metadata: the ShardSummary

# Rows are held as columns of one row group: large enough to scan fast (17 MB of
# 527 float32 scores), small enough to hold in memory.
ROWS_PER_GROUP = 8_192
BYTES_PER_GROUP = 64 << 20  # many tags, chunks or much metadata fill a group sooner

COUNTED = ("duration_s", "tags", "error")  # the columns that `count_row` looks at

_TAIL_BYTES = 128 << 10  # holds the footer of all but files of many row groups


@dataclass(frozen=True)
class RowOptions:
    """What of a scored clip goes into its row."""

    thresholds: tuple[float | None, ...]  # one a label; None: never a tag
    top_k: int | None = None  # tags per clip at most
    chunks: bool = False
    segments: bool = False
    embeddings: bool = False
    score_type: ScoreType = "float32"


@dataclass
class ShardSummary:
    """Totals of one shard; kept in its file's footer, so that nobody reads rows to count."""

    clips: int = 0
    failed: int = 0  # without scores
    audio_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)  # "stage/type" -> clips
    tags: Counter[str] = field(default_factory=Counter)  # label name -> clips
    partial: int = 0  # with scores and an error: of a part of their audio

    def add(self, other: ShardSummary) -> None:
        """Adds another shard's totals to these."""
        self.clips += other.clips
        self.failed += other.failed
        self.partial += other.partial
        self.audio_s += other.audio_s
        self.failures.update(other.failures)
        self.tags.update(other.tags)


class DamagedOutput(ValueError):
    """A file of an output is not what was published; the message says what to do."""


def clips_schema(labels: int, embedding_size: int, options: RowOptions) -> pa.Schema:
    """The columns of `clips/*.parquet`; docs/schema.md describes them."""
    score = pa.float16() if options.score_type == "float16" else pa.float32()
    scores = pa.list_(score, labels)
    fields: list[tuple[str, pa.DataType]] = [
        ("clip_id", pa.string()),
        ("shard", pa.string()),
        ("member", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("duration_s", pa.float64()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int16()),
        ("codec", pa.string()),
        ("audio_xxh128", pa.string()),
        ("peak_dbfs", pa.float32()),
        ("rms_dbfs", pa.float32()),
        ("tags", pa.list_(pa.struct(
            [("index", pa.int16()), ("mid", pa.string()), ("name", pa.string()), ("score", pa.float32())]
        ))),
        ("scores", scores),
        ("metadata", pa.string()),
        ("error", pa.struct([("stage", pa.string()), ("type", pa.string()), ("message", pa.string())])),
    ]  # fmt: skip
    if options.chunks:
        chunk = pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("scores", scores)])
        fields.append(("chunks", pa.list_(chunk)))
    if options.segments:
        segment = pa.struct(
            [("index", pa.int16()), ("mid", pa.string()), ("name", pa.string()),
             ("start_s", pa.float64()), ("end_s", pa.float64()), ("score", pa.float32())]
        )  # fmt: skip
        fields.append(("segments", pa.list_(segment)))
    if options.embeddings:
        fields.append(("embedding", pa.list_(pa.float32(), embedding_size)))
    return pa.schema(
        [pa.field(name, kind, nullable=name not in ("clip_id", "shard")) for name, kind in fields]
    )


def clip_row(
    scored: ScoredClip, shard: Shard, clip_id: str, labels: Sequence[Label], options: RowOptions
) -> dict[str, Any]:
    """A clip as a row of `clips_schema`."""
    clip = scored.clip
    row: dict[str, Any] = {
        "clip_id": clip_id,
        "shard": as_text(public_url(shard.uri)),
        "member": clip.member,
        "start_s": clip.start_s,
        "end_s": clip.end_s,
        "duration_s": clip.duration_s,
        "sample_rate": clip.sample_rate,
        "channels": clip.channels,
        "codec": clip.codec,
        "audio_xxh128": clip.xxh128,
        "peak_dbfs": clip.peak_dbfs,
        "rms_dbfs": clip.rms_dbfs,
        "tags": None if scored.scores is None else tags_of(scored.scores, labels, options),
        "scores": scored.scores,
        "metadata": _json(clip.metadata) if clip.metadata else None,
        "error": None
        if clip.error is None
        else {"stage": clip.error.stage, "type": clip.error.type, "message": clip.error.message},
    }
    if options.chunks:
        row["chunks"] = None if scored.scores is None else scored.chunks
    if options.segments:
        row["segments"] = None
        if scored.scores is not None:
            starts_s, ends_s, scores = zip(*scored.chunks, strict=True)
            row["segments"] = segments_of(starts_s, ends_s, np.stack(scores), labels, options)
    if options.embeddings:
        row["embedding"] = scored.embedding
    return row


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(metadata, ensure_ascii=False, default=str)
        return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
    except (ValueError, RecursionError) as error:
        return json.dumps({"unwritable": f"{type(error).__name__} in the clip's metadata"})


def tags_of(
    scores: np.ndarray[Any, np.dtype[np.float32]], labels: Sequence[Label], options: RowOptions
) -> list[dict[str, Any]]:
    """The labels whose score reaches their threshold, highest first, at most `top_k`."""
    stored = _as_stored(scores, options)
    reached = (stored >= _as_array(options.thresholds)).nonzero()[0]
    best = reached[np.argsort(-stored[reached], kind="stable")][: options.top_k].tolist()
    return [
        {
            "index": label.index,
            "mid": label.mid,
            "name": label.name,
            "score": float(stored[label.index]),
        }
        for label in (labels[index] for index in best)
    ]


def segments_of(
    starts_s: ArrayLike,
    ends_s: ArrayLike,
    scores: NDArray[np.float32],
    labels: Sequence[Label],
    options: RowOptions,
) -> list[dict[str, Any]]:
    """The segments of a clip from its chunks, as `merge_chunks` has them.

    All that reach their threshold, whatever `top_k` is. Scores are [chunks, labels].
    """
    stored = _as_stored(scores, options)
    return merge_chunks(starts_s, ends_s, stored, _as_array(options.thresholds), labels)


def _as_stored(scores: NDArray[np.float32], options: RowOptions) -> NDArray[np.float32]:
    """The scores as they are stored, which decide, so that the table agrees with itself."""
    if options.score_type == "float32":
        return scores
    return scores.astype(options.score_type).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _as_array(thresholds: tuple[float | None, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [labels]; NumPy makes NaN of None, which no score reaches."""
    return np.asarray(thresholds, np.float32)


def rows_to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows of `clip_row` as a table; score vectors go in without a Python list of floats."""
    columns = []
    for column in schema:
        values = [row[column.name] for row in rows]
        if column.name == "chunks":
            columns.append(_chunks_array(values, column.type))
        elif pa.types.is_fixed_size_list(column.type):
            columns.append(_vectors_array(values, column.type))
        else:
            columns.append(pa.array(values, column.type))
    return pa.table(columns, schema=schema)


def _vectors_array(vectors: Sequence[Any], kind: pa.FixedSizeListType) -> pa.Array:
    """Vectors as fixed-size lists; a missing one is a list of nulls, not a null list.

    pyarrow writes null fixed-size lists but up to version 25 cannot read them back
    (apache/arrow GH-35692): one failed clip would make its whole file unreadable.
    """
    missing = np.array([vector is None for vector in vectors], bool)
    matrix = np.zeros((len(vectors), kind.list_size), kind.value_type.to_pandas_dtype())
    if not missing.all():
        matrix[~missing] = np.stack([vector for vector in vectors if vector is not None])
    absent = np.repeat(missing, kind.list_size)
    values = pa.array(matrix.ravel(), kind.value_type, mask=absent)
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def _chunks_array(clips: Sequence[Any], kind: pa.ListType) -> pa.Array:
    flat = [chunk for chunks in clips if chunks is not None for chunk in chunks]
    offsets = np.concatenate(
        [[0], np.cumsum([0 if chunks is None else len(chunks) for chunks in clips])]
    )
    struct = pa.StructArray.from_arrays(
        [
            pa.array([start for start, _, _ in flat], pa.float64()),
            pa.array([end for _, end, _ in flat], pa.float64()),
            _vectors_array([scores for _, _, scores in flat], kind.value_type.field("scores").type),
        ],
        fields=list(kind.value_type),
    )
    missing = pa.array([chunks is None for chunks in clips], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct, type=kind, mask=missing)


def write_rows(
    rows: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    output: Output,
    name: str,
    run: str,
    before_publishing: Callable[[], None] = lambda: None,
    *,
    source: Mapping[str, Any] | None = None,
    replaces: str | None = None,
) -> tuple[ShardSummary, int]:
    """Writes `rows` to `name` in `output`, which appears complete or not at all.

    Two writers of one name both succeed; the file is that of the first, and both
    are the same.

    Args:
        rows: of `clip_row`.
        schema: of `clips_schema`.
        output: where.
        name: `clips/<shard_id>.parquet`.
        run: the run description, JSON, for the file's metadata.
        before_publishing: called when the file is whole; what it raises stops it
            from being published.
        source: of `transforms.source`, for the file's metadata.
        replaces: the version of a file of this name that this one takes the place of.

    Returns:
        The shard's totals, and the bytes published (0 where another writer was first).

    Raises:
        OSError: the file cannot be written or published; then it is not there.
    """
    summary = ShardSummary()
    with output.scratch(name) as scratch:
        with (
            scratch.open("wb") as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            group: list[Mapping[str, Any]] = []
            size = 0
            for row in rows:
                group.append(row)
                size += held_bytes(row)
                count_row(summary, row)
                if len(group) >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
                    writer.write_table(rows_to_table(group, schema))
                    group, size = [], 0
            if group or summary.clips == 0:
                writer.write_table(rows_to_table(group, schema))
            writer.add_key_value_metadata(file_metadata(run, summary, source))
        before_publishing()
        size = scratch.stat().st_size
        published = output.publish(scratch, name, replace=replaces or False)
    return summary, size if published else 0


def file_metadata(
    run: str, summary: ShardSummary, source: Mapping[str, Any] | None
) -> dict[bytes, bytes]:
    """A file's key-value metadata: what made it, its totals, and what its source was."""
    metadata = {RUN_KEY: run.encode(), SHARD_KEY: json.dumps(vars(summary)).encode()}
    return metadata | ({} if source is None else {SOURCE_KEY: json.dumps(source).encode()})


def held_bytes(row: Mapping[str, Any]) -> int:
    """Roughly what a row of `clip_row` takes until it is written."""
    vectors = 1 + len(row.get("chunks") or ())
    scores = row["scores"].nbytes if row["scores"] is not None else 0
    named = len(row["tags"] or ()) + len(row.get("segments") or ())
    return vectors * scores + 200 * named + len(row["metadata"] or "")


def count_row(summary: ShardSummary, row: Mapping[str, Any]) -> None:
    """Adds a row of `clip_row`, or what of it is `COUNTED`, to a shard's totals."""
    summary.clips += 1
    summary.audio_s += row["duration_s"] or 0.0
    if row["error"] is not None:
        summary.failed += row["tags"] is None
        summary.partial += row["tags"] is not None
        summary.failures[f"{row['error']['stage']}/{row['error']['type']}"] += 1
    summary.tags.update(tag["name"] for tag in row["tags"] or ())


def finished_shards(output: Output) -> set[str]:
    """The ids of the shards that have a file."""
    names = output.names(CLIPS_FOLDER)
    return {n.removesuffix(".parquet") for n in names if n.endswith(".parquet") and n[0] != "."}


def check_claim(output: Output, run: str) -> None:
    """Makes sure that `output` is still the one that this run began, or goes on with.

    Raises:
        RuntimeError: another run has emptied it with --overwrite since.
    """
    content = output.read(RUN_FILE)
    claimed = json.loads(content).get("id") if content is not None else None
    if claimed != json.loads(run).get("id"):
        raise RuntimeError(
            f"another run has started {output.uri} anew; this one publishes nothing more"
        )


@dataclass(frozen=True)
class Footer:
    """What a finished file says of itself."""

    summary: ShardSummary
    fingerprint: str  # of the making
    source: dict[str, Any] | None  # of `transforms.source`; files of old have none
    rows: int  # as Parquet counts them


def read_summary(output: Output, name: str) -> tuple[ShardSummary, str]:
    """(totals, fingerprint of the making) in a finished file's footer; see `read_footer`."""
    footer = read_footer(output, name)
    return footer.summary, footer.fingerprint


def read_footer(output: Output, name: str) -> Footer:
    """What a finished file says of itself, in one or two requests.

    Raises:
        ValueError: the file is no finished output of earmark.
        OSError: it cannot be read.
    """
    try:
        parquet = _read_footer(output, name)
        metadata = parquet.metadata or {}
        stated = json.loads(metadata[SHARD_KEY])
        making = json.loads(metadata[RUN_KEY])["fingerprint"]
        source = json.loads(metadata.get(SOURCE_KEY, b"null"))
        stated["failures"] = Counter(stated["failures"])
        stated["tags"] = Counter(stated["tags"])
        summary = ShardSummary(**stated)
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DamagedOutput(
            f"{output.uri}/{name} is not a file that earmark finished; remove it and run again"
        ) from error
    return Footer(summary, making, source, parquet.num_rows)


def _read_footer(output: Output, name: str) -> pq.FileMetaData:
    """A Parquet file's footer, in one request where it is not very large."""
    tail = output.tail(name, _TAIL_BYTES)
    if len(tail) >= 8 and int.from_bytes(tail[-8:-4], "little") + 8 > len(tail):
        tail = output.tail(name, int.from_bytes(tail[-8:-4], "little") + 8)
    return pq.read_metadata(io.BytesIO(tail))
