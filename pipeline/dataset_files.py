"""The files of a dataset: Parquet with an audio column, or tars of audio and JSON."""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.extract import Wanted, suffix_of
from pipeline.views import Views
from transforms.cut import write_clip
from transforms.records import ClipError, EncodedClip

# A reader that wants one clip reads a row group, which is why the audio of few clips is in it.
_ROWS_PER_GROUP = 256
_BYTES_PER_GROUP = 32 << 20
_LARGEST_CELL = (1 << 31) - (1 << 20)  # bytes, of a column that Arrow counts in 32 bits

_COLUMNS = (
    "duration_s", "sample_rate", "channels", "codec", "audio_xxh128", "start_s", "end_s", "metadata"
)  # fmt: skip


class ClipProblem(ValueError):
    """Why a clip cannot be in the dataset."""


@dataclass
class Totals:
    """What a split holds."""

    clips: int = 0
    audio_s: float = 0.0
    size_bytes: int = 0  # of its files
    files: list[str] = field(default_factory=list)
    partial: Counter[str] = field(default_factory=Counter)  # error type -> clips


class About:
    """What the output says of the wanted clips, a shard's at a time."""

    def __init__(self, views: Views, wanted: Sequence[Wanted], *, scores: bool) -> None:
        self._views, self._shard = views, ""
        self._rows: dict[str, dict[str, Any]] = {}
        self._scores: dict[str, Any] = {}
        self._with_scores = scores
        ids = pa.table({"clip_id": pa.array([row.clip_id for row in wanted], pa.string())})
        columns = [name for name in _COLUMNS if name in views.columns]
        chosen = ["clip_id", "shard", "tags", "error", *columns, *["scores"] * scores]
        with views.errors_explained():
            views.connection.register("chosen_ids", ids)
            # One pass over the files; DuckDB lays aside what does not fit into memory.
            views.connection.execute(
                f"CREATE TEMP TABLE chosen AS SELECT {', '.join(chosen)} "
                "FROM all_rows SEMI JOIN chosen_ids USING (clip_id) ORDER BY shard"
            )
            views.connection.unregister("chosen_ids")

    def of(self, row: Wanted) -> dict[str, Any]:
        """The columns of a clip, with `scores` as an Arrow scalar."""
        if row.shard != self._shard:
            with self._views.errors_explained():
                found = self._views.connection.sql(
                    "SELECT * EXCLUDE (shard) FROM chosen WHERE shard = $1", params=[row.shard]
                ).to_arrow_table()
            if self._with_scores:
                column = found["scores"].combine_chunks()
                self._scores = dict(zip(found["clip_id"].to_pylist(), column, strict=True))
                found = found.drop_columns(["scores"])
            self._rows = {one["clip_id"]: one for one in found.to_pylist()}
            self._shard = row.shard
        about = self._rows[row.clip_id]
        return about | ({"scores": self._scores[row.clip_id]} if self._with_scores else {})


@dataclass
class Clip:
    """A clip that is to be written."""

    key: str  # a name without a dot or a folder, unlike any other clip's
    suffix: str  # of its audio
    audio: BinaryIO
    size_bytes: int
    about: dict[str, Any]

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, row: Wanted, found: EncodedClip, about: dict[str, Any], folder: Path
    ) -> Iterator[Clip]:
        """The clip with the bytes that were found; a part of a recording is cut out of them.

        Raises:
            ClipProblem: it cannot be cut out.
        """
        if not _is_part(row):
            found.audio.seek(0)
            yield cls(key_of(row), suffix_of(row), found.audio, found.size_bytes, about)
            return
        piece = folder / ".piece.flac"
        try:
            _, amiss = write_clip(found.audio, piece, "flac", *row.part_s)
        except ClipError as error:
            raise ClipProblem(f"{error.type}: {error.message}") from error
        if amiss is not None and about["error"] is None:
            raise ClipProblem(amiss)
        try:
            with piece.open("rb") as stream:
                yield cls(key_of(row), ".flac", stream, piece.stat().st_size, about)
        finally:
            piece.unlink()

    def columns(self) -> dict[str, Any]:
        """What both formats say of it."""
        about = self.about
        start_s = about.get("start_s") or 0.0
        end_s = about.get("end_s")
        return {
            "clip_id": about["clip_id"],
            "tags": [tag["name"] for tag in about["tags"]],
            "tag_scores": [tag["score"] for tag in about["tags"]],
            "duration_s": about["duration_s"],
            "start_s": start_s,
            # Readers of JSON guess a column's type by the first rows: none is null.
            "end_s": start_s + about["duration_s"] if end_s is None else end_s,
            "sample_rate": about["sample_rate"],
            "channels": about["channels"],
            "codec": about["codec"] or "",
            "audio_xxh128": about["audio_xxh128"],
            "error": about["error"]["type"] if about["error"] else "",
            "metadata": about["metadata"] or "{}",
        }


def key_of(row: Wanted) -> str:
    """A clip's key: readable, without a dot, where WebDataset ends a key, and with a hash."""
    stem = posixpath.splitext(posixpath.basename(row.clip_id))[0]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:80].strip("_-") or "clip"
    return f"{readable}-{xxhash.xxh3_64_hexdigest(row.clip_id.encode())}"


def _is_part(row: Wanted) -> bool:
    return bool(row.part_s[0]) or row.part_s[1] is not None


def _of_columns(views: Views, *, scores: bool) -> dict[str, Any]:
    from datasets import ClassLabel, List, Value

    features = {
        "clip_id": Value("string"),
        "tags": List(ClassLabel(names=[label.name for label in views.labels.rows])),
        "tag_scores": List(Value("float32")),
        **dict.fromkeys(("duration_s", "start_s", "end_s"), Value("float64")),
        "sample_rate": Value("int32"),
        "channels": Value("int16"),
        **dict.fromkeys(("codec", "audio_xxh128", "error", "metadata"), Value("string")),
    }
    if scores:
        features["scores"] = List(Value("float32"), length=len(views.labels.rows))
    return features


class ParquetFiles:
    """The Parquet files of a split, with the features in their schema as `datasets` has them."""

    suffix = ".parquet"

    def __init__(self, folder: Path, split: str, features: Any, target_bytes: int) -> None:
        self._folder, self._split, self._target = folder, split, target_bytes
        self._schema = features.arrow_schema
        self._index = {name: n for n, name in enumerate(features["tags"].feature.names)}
        self._file: Any = None
        self._held: list[dict[str, Any]] = []
        self._size = 0
        self.totals = Totals()

    @staticmethod
    def features(views: Views, wanted: Sequence[Wanted], *, scores: bool) -> Any:
        """The columns of a dataset, as `datasets` describes them."""
        from datasets import Audio, Features

        return Features({"audio": Audio(), **_of_columns(views, scores=scores)})

    def add(self, clip: Clip) -> None:
        """Adds a clip; its audio is in memory until its row group is written.

        Raises:
            ClipProblem: it is too large for a cell.
        """
        if clip.size_bytes > _LARGEST_CELL:
            raise ClipProblem(
                f"{clip.size_bytes / 2**30:.1f} GiB are too large for a cell: take --format webdataset"
            )
        if self._size + clip.size_bytes > _BYTES_PER_GROUP or len(self._held) >= _ROWS_PER_GROUP:
            self._write()
        row = clip.columns()
        row["tags"] = [self._index[name] for name in row["tags"]]
        row["audio"] = {"bytes": clip.audio.read(), "path": clip.key + clip.suffix}
        if "scores" in clip.about:
            row["scores"] = clip.about["scores"]
        self._held.append(row)
        self._size += clip.size_bytes
        _count(self.totals, clip)

    def close(self) -> None:
        """Writes what is held, and ends the file."""
        self._write()
        self._end()

    def _write(self) -> None:
        if not self._held:
            return
        if self._file is None:
            name = f"{self._split}-{len(self.totals.files):05d}{self.suffix}"
            self.totals.files.append(name)
            self._stream = (self._folder / name).open("wb")
            self._file = pq.ParquetWriter(
                self._stream,
                self._schema,
                compression="zstd",
                use_dictionary=False,  # nothing is there twice that counts
                write_page_index=True,  # lets the Hub show single rows
            )
        arrays = [
            _scores_array([row["scores"] for row in self._held], column.type)
            if column.name == "scores"
            else pa.array([row[column.name] for row in self._held], column.type)
            for column in self._schema
        ]
        self._file.write_table(pa.table(arrays, schema=self._schema))
        self._held, self._size = [], 0
        if self._stream.tell() >= self._target:
            self._end()

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self.totals.size_bytes += self._stream.tell()
            self._stream.close()
            self._file = None


def _scores_array(scores: Sequence[Any], kind: pa.DataType) -> pa.Array:
    values = pa.concat_arrays([one.values.cast(pa.float32()) for one in scores])
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


class TarFiles:
    """The tars of a split: for each clip its audio and a `.json` under one key."""

    suffix = ".tar"

    def __init__(self, folder: Path, split: str, features: Any, target_bytes: int) -> None:
        self._folder, self._split, self._target = folder, split, target_bytes
        self._tar: tarfile.TarFile | None = None
        self._suffix = next(name for name in features if name != "json" and name[0] != "_")
        self.totals = Totals()

    @staticmethod
    def features(views: Views, wanted: Sequence[Wanted], *, scores: bool) -> Any:
        """As of `ParquetFiles`. All audio has one suffix, the most frequent, since it is a column."""
        from datasets import Features, Value

        suffixes = Counter(".flac" if _is_part(row) else suffix_of(row) for row in wanted)
        (suffix, _), *_ = suffixes.most_common(1)
        return Features(
            {
                # As Audio the dataset could not even be loaded without torchcodec and FFmpeg.
                suffix[1:]: Value("binary"),
                "json": _of_columns(views, scores=scores),
                "__key__": Value("string"),
                "__url__": Value("string"),
            }
        )

    def add(self, clip: Clip) -> None:
        """Adds a clip; its audio goes through in pieces."""
        if self._tar is None:
            name = f"{self._split}-{len(self.totals.files):05d}{self.suffix}"
            self.totals.files.append(name)
            self._tar = tarfile.open(self._folder / name, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        about = clip.columns()
        if "scores" in clip.about:
            # Nine digits are what a float32 needs.
            about["scores"] = [float(f"{score:.9g}") for score in clip.about["scores"].as_py()]
        text = json.dumps(about, ensure_ascii=False).encode()
        self._add(f"{clip.key}.{self._suffix}", clip.audio, clip.size_bytes)
        self._add(f"{clip.key}.json", io.BytesIO(text), len(text))
        _count(self.totals, clip)
        if self._tar.offset >= self._target:  # type: ignore[attr-defined]
            self.close()

    def _add(self, name: str, stream: BinaryIO, size: int) -> None:
        member = tarfile.TarInfo(name)
        member.size = size
        assert self._tar is not None
        self._tar.addfile(member, stream)
        self._tar.members = []  # type: ignore[attr-defined]  # it would keep them all

    def close(self) -> None:
        """Ends the file."""
        if self._tar is not None:
            self._tar.close()
            self.totals.size_bytes += (self._folder / self.totals.files[-1]).stat().st_size
            self._tar = None


def _count(totals: Totals, clip: Clip) -> None:
    totals.clips += 1
    totals.audio_s += clip.about["duration_s"]
    if clip.about["error"] is not None:
        totals.partial[clip.about["error"]["type"]] += 1
