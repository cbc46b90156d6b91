"""Reads scores where they lie: an output of `earmark annotate`, or a plain Parquet file.

Clips are joined by their names. One clip may be known by several: its `clip_id`, the hash of
its bytes, its member, the member's file name, and that without its audio suffix. Names are
compared in this order, and the first that meets decides: an exact name is never outdone by
a similar one. `join` has the rules.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from student.labels import Label, audioset_labels
from transforms.output import Output, open_output
from transforms.storage import DEFAULT_ACCESS, Access
from transforms.suffixes import AUDIO_SUFFIXES
from transforms.write import CLIPS_FOLDER, RUN_FILE

# As the errors of this package name the kinds of names, in the order in which they are compared.
NAME_KINDS = ("clip_id", "audio_xxh128", "member", "file name", "file name without suffix")
_HASH, _MEMBER, _FILE_NAME, _STEM = range(1, len(NAME_KINDS))
_SIMILAR = (_FILE_NAME, _STEM)

_EXPECTED = (
    "expected the folder that earmark annotate wrote, or a .parquet file with clip_id and scores: "
    "audio is annotated first (earmark annotate, or earmark evaluate --checkpoint)"
)
_ROWS_AT_ONCE = 2_048  # 4 MB of 527 float32 scores

# What clips are known by, one set for each of NAME_KINDS. Those of the last two kinds are a
# member's ends: of `a/b.wav` itself and `b.wav`, and both without the suffix.
Names = tuple[frozenset[str], ...]


class EvaluationError(ValueError):
    """Scores or a truth cannot be used; the message names them and says what to do."""


@dataclass(frozen=True)
class Only:
    """Clips that alone are looked at."""

    name: str  # where they are listed
    clip_ids: frozenset[str]  # as the source has them
    absent: int  # clips of the list that the source has no row of


@dataclass(frozen=True)
class Source:
    """Where scores lie, and what is known of them before they are read."""

    uri: str
    name: str  # of the checkpoint, or of the file
    output: Output
    files: tuple[str, ...]  # in `output`
    labels: tuple[Label, ...]
    weights_sha256: str | None = None
    has_tags: bool = False  # an output has, whatever its thresholds
    summary: dict[str, Any] = field(default_factory=dict)  # summary.json; empty where there is none
    run: dict[str, Any] = field(default_factory=dict)  # run.json; empty of a file
    only: Only | None = None  # rows of other clips are passed over; None: all are read

    @property
    def clips_per_s(self) -> float | None:
        """Clips a second of the last run into this output, reading and decoding included."""
        return self.summary.get("clips_per_s") or None  # 0: the rows were written without a model

    @property
    def audio_s_per_s(self) -> float | None:
        """Seconds of audio a second of the last run into this output."""
        heard_s = self.summary.get("metrics", {}).get("audio_seconds")
        wall_s = self.summary.get("wall_s")
        return heard_s / wall_s if heard_s and wall_s else None


@dataclass(frozen=True)
class Matched:
    """The rows of a source that are of the clips asked for.

    `clips` are places in the list that was asked for; one that is neither in `clips` nor in
    `failed` has no row.
    """

    clips: NDArray[np.int64]  # [scored], ascending
    clip_ids: tuple[str, ...]  # [scored] of the rows
    hashes: tuple[str | None, ...]  # [scored] audio_xxh128 of the rows, where it is known
    scores: NDArray[np.float32]  # [scored, labels]
    tags: NDArray[np.bool_] | None  # [scored, labels]; None where none were read
    failed: dict[int, str]  # place -> "stage/type" of the row's error
    joined_by: Counter[str]  # of NAME_KINDS -> clips
    unasked: int  # scored rows that were not asked for
    other_bytes: int  # of them, those with the name of a clip asked for, but other bytes
    repeated: int  # scored rows with the bytes of a clip that another row stands for


def open_source(
    uri: str, access: Access = DEFAULT_ACCESS, labels: Sequence[Label] | None = None
) -> Source:
    """A folder that `earmark annotate` wrote, or a Parquet file with `clip_id` and `scores`.

    Args:
        uri: a local path or a URL.
        access: how remote storage is used.
        labels: of a Parquet file, which does not state its own; by default AudioSet's.

    Raises:
        EvaluationError: it is neither, or cannot be read.
    """
    uri = uri.rstrip("/")
    if "://" not in uri and os.path.isfile(uri) and not uri.endswith(".parquet"):
        raise EvaluationError(f"{uri!r} is a file; {_EXPECTED}")
    try:
        if uri.endswith(".parquet"):
            folder, name = posixpath.split(uri)
            return _open_file(uri, open_output(folder or ".", access), name, labels)
        return _open_folder(uri, open_output(uri, access))
    except (OSError, ImportError, pa.ArrowException, ValueError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{uri!r} cannot be read: {_reason(error)}") from error


def _open_folder(uri: str, output: Output) -> Source:
    run_json = output.read(RUN_FILE)
    if run_json is None:
        raise EvaluationError(f"{uri!r} has no {RUN_FILE}; {_EXPECTED}")
    try:
        run = json.loads(run_json)
        checkpoint = run["checkpoint"]
        checkpoint_name, weights_sha256 = checkpoint["name"], checkpoint.get("weights_sha256")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{uri}/{RUN_FILE} does not say which checkpoint made the scores; expected what earmark "
            "annotate writes: is the folder whole?"
        ) from error
    with output.open("labels.parquet") as stream:
        rows = read_table(stream, ["index", "mid", "name"]).to_pylist()
    summary = output.read("summary.json")
    return Source(
        uri,
        name=_short(checkpoint_name),
        output=output,
        files=tuple(
            f"{CLIPS_FOLDER}/{name}"
            for name in sorted(output.names(CLIPS_FOLDER))
            if name.endswith(".parquet") and not name.startswith(".")
        ),
        labels=tuple(Label(row["index"], row["mid"] or "", row["name"]) for row in rows),
        weights_sha256=weights_sha256,
        has_tags=True,
        summary=json.loads(summary) if summary else {},
        run=run,
    )


def _short(checkpoint: str) -> str:
    """A checkpoint's name: the last part of a path or URL; owner/name of the hub stays."""
    is_place = checkpoint.startswith(("/", ".", "~")) or "://" in checkpoint
    return posixpath.basename(checkpoint.rstrip("/")) if is_place else checkpoint


def _open_file(uri: str, output: Output, name: str, labels: Sequence[Label] | None) -> Source:
    with output.open(name) as stream:
        schema = open_parquet(stream).schema_arrow
    missing = [column for column in ("clip_id", "scores") if column not in schema.names]
    if missing:
        raise EvaluationError(
            f"{uri!r} has no column {missing[0]!r} (it has {', '.join(schema.names)}); "
            "scores are read from the columns clip_id and scores"
        )
    _check_types(uri, schema)
    labels = tuple(labels or audioset_labels())
    kind = schema.field("scores").type
    if pa.types.is_fixed_size_list(kind) and kind.list_size != len(labels):
        raise EvaluationError(
            f"{uri!r} holds {kind.list_size} scores a clip, but {len(labels)} labels are expected; "
            "a file of other labels must be the folder that earmark annotate wrote, which names them"
        )
    return Source(uri, posixpath.basename(name).removesuffix(".parquet"), output, (name,), labels)


def _check_types(uri: str, schema: pa.Schema) -> None:
    """Refuses columns that hold something else than those of an output."""
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)

    def is_text(kind: pa.DataType) -> bool:
        return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)

    def is_scores(kind: pa.DataType) -> bool:
        return any(of(kind) for of in lists) and types.is_floating(kind.value_type)

    def is_error(kind: pa.DataType) -> bool:
        named = {field.name for field in kind} if types.is_struct(kind) else set()
        return types.is_null(kind) or named >= {"stage", "type"}

    for name, fits, expected in (
        ("clip_id", is_text, "text"),
        ("scores", is_scores, "lists of floating point numbers"),
        ("member", is_text, "text"),
        ("audio_xxh128", is_text, "text"),
        ("metadata", is_text, "JSON as text"),
        ("error", is_error, "a struct with stage and type"),
    ):
        if name in schema.names and not fits(schema.field(name).type):
            raise EvaluationError(
                f"the column {name!r} of {uri!r} is {schema.field(name).type}; expected {expected}: "
                "convert the column, or give it another name if it is something else"
            )


def open_parquet(stream: BinaryIO) -> pq.ParquetFile:
    """A Parquet file that is read by the thread that asks, if its readers use no threads.

    Arrow's read-ahead would hold the stream, which is Python's, on threads of its own. One that
    lets go of it while the interpreter ends aborts the process.
    """
    return pq.ParquetFile(stream, pre_buffer=False)


def read_table(stream: BinaryIO, columns: Sequence[str]) -> pa.Table:
    """Some columns of a small Parquet file; see `open_parquet`."""
    return open_parquet(stream).read(list(columns), use_threads=False)


def batches(source: Source, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a source in order, those of `columns` that it has, a few thousand at once.

    Of a source with `only`, its rows alone, and their `clip_id` in any case.

    Raises:
        EvaluationError: a file cannot be read.
    """
    only = None if source.only is None else pa.array(sorted(source.only.clip_ids), pa.string())
    for name in source.files:
        try:
            with source.output.open(name) as stream, open_parquet(stream) as file:
                wanted = [column for column in columns if column in file.schema_arrow.names]
                if only is not None and "clip_id" not in wanted:
                    wanted.append("clip_id")
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
                    if only is not None:
                        ids = batch.column("clip_id")
                        batch = batch.filter(pc.is_in(ids, only.cast(ids.type)))
                    yield batch
        except (OSError, pa.ArrowException) as error:
            raise EvaluationError(
                f"{source.output.uri}/{name} cannot be read: {_reason(error)}"
            ) from error


def names_of(clip_id: str, member: str | None = None, xxh128: str | None = None) -> Names:
    """What a row is known by. Where only one name is known, it may be any of them but the hash."""
    member = clip_id if member is None else member
    hashes = frozenset([xxh128] if xxh128 else [])
    by_id, by_member = frozenset([clip_id]), frozenset([member])
    return by_id, hashes, by_member, _ends(member), _ends(_stem(member))


def row_names(batch: pa.RecordBatch, source: Source) -> Iterator[Names]:
    """The names of each row of a batch with `clip_id` and, where there are, `member` and hash.

    Raises:
        EvaluationError: a row has no `clip_id`.
    """
    ids = batch.column("clip_id")
    if ids.null_count:
        raise EvaluationError(
            f"{ids.null_count} rows of {source.uri!r} have no clip_id; every row needs one: give "
            "them a name, or leave them out"
        )
    columns = (ids.to_pylist(), _column(batch, "member"), _column(batch, "audio_xxh128"))
    return (names_of(*of) for of in zip(*columns, strict=True))


def _column(batch: pa.RecordBatch, name: str) -> list[Any]:
    """A column's values; nulls where the batch has no such column."""
    return batch.column(name).to_pylist() if name in batch.schema.names else [None] * batch.num_rows


@dataclass(frozen=True)
class Joined:
    """Which rows are of which clips; both are known by their places in what was given."""

    rows: dict[int, int]  # clip -> its row
    kinds: dict[int, int]  # clip -> which of NAME_KINDS it met its row by
    repeated: dict[int, int]  # row that no clip has -> a clip of the same bytes
    other_bytes: frozenset[int]  # rows that no clip has, with the name of one but other bytes


def join(clips: Sequence[Names], rows: Iterable[Names], clips_of: str, rows_of: str) -> Joined:
    """Finds out which rows are of which clips, by what both are known by.

    A row is held against all clips by the most exact kind of name that meets any:

    1. `clip_id`;
    2. the hash of the bytes. Rows of equal bytes may stand for each other, so that a hash that
       fits several does no harm;
    3. the member;
    4. the member's end: the whole member of one side is the end of the other's, folder by
       folder. The bare file name so counts only where one side has no folder: `bed/0.wav` is
       not `bird/0.wav`;
    5. the same without the suffixes of audio formats.

    Clips and rows whose hashes differ are not the same by kinds 3 to 5, unless their suffixes
    differ too: then one may have been made from the other. A clip that met its row leaves rows
    with less exact names alone.

    Args:
        clips: what each clip is known by.
        rows: what each row is known by.
        clips_of: what the clips are of, for errors: "the truth".
        rows_of: likewise, of the rows.

    Raises:
        EvaluationError: a name, other than a hash, fits several rows or several clips.
    """
    joining = _Join(clips)
    for row, names in enumerate(rows):
        joining.meet(row, names)
    return joining.finish(clips_of, rows_of)


def only_of(source: Source, clips: Sequence[Names], name: str) -> Source:
    """`source` with the rows of some clips alone.

    Args:
        source: which is read once for it.
        clips: what each clip wanted is known by; see `join`.
        name: where they are listed, for errors and for people.

    Raises:
        EvaluationError: none of them is there, or a name fits several rows or clips.
    """
    ids: list[str] = []
    names: list[Names] = []
    for batch in batches(source, ["clip_id", "member", "audio_xxh128"]):
        names += row_names(batch, source)
        ids += batch.column("clip_id").to_pylist()
    joined = join(clips, names, f"--only {name}", repr(source.uri))
    found = frozenset(ids[row] for row in {*joined.rows.values(), *joined.repeated})
    if not found:
        wanted = next((one for kind in clips[0] for one in kind), "") if clips else ""
        raise EvaluationError(
            f"--only {name!r}: none of its {len(clips):,} clips has a row in {source.uri!r}. It names "
            f"clips such as {wanted!r}, the output has {ids[0] if ids else None!r}"
        )
    return replace(source, only=Only(name, found, len(clips) - len(joined.rows)))


def match(
    source: Source, clips: Sequence[Names], clips_of: str = "the truth", *, tags: bool = False
) -> Matched:
    """Reads the scores of `clips`; rows of others are let go at once. See `join`.

    Args:
        source: whose rows are read.
        clips: what each clip asked for is known by.
        clips_of: what they are of, for errors.
        tags: whether to read tags too, of a source that has any.

    Raises:
        EvaluationError: a name fits several rows or several clips, a row holds another number
            of scores than there are labels, or a file cannot be read.
    """
    joining = _Join(clips)
    kept: list[NDArray[np.float32]] = []
    kept_tags: list[NDArray[np.bool_]] = []
    kept_ids: list[str] = []
    kept_hashes: list[str | None] = []
    places: dict[int, int] = {}  # row -> its place in what is kept
    errors: dict[int, str] = {}  # row -> "stage/type"
    row = 0
    columns = ["clip_id", "member", "audio_xxh128", "scores", "error"]
    tags = tags and source.has_tags
    for batch in batches(source, columns + ["tags"] * tags):
        take: list[int] = []
        of_rows = zip(row_names(batch, source), _column(batch, "error"), strict=True)
        for in_batch, (names, error) in enumerate(of_rows):
            # Of audio that decodes in part there are scores beside the error.
            if error is not None and not _has_scores(batch.column("scores")[in_batch]):
                errors[row] = f"{error['stage']}/{error['type']}"
            if joining.meet(row, names) and row not in errors:
                places[row] = len(kept_ids) + len(take)
                take.append(in_batch)
            row += 1
        if take:
            taken = batch.take(pa.array(take))
            kept.append(score_matrix(taken.column("scores"), source))
            if tags and "tags" in taken.schema.names:
                kept_tags.append(tag_matrix(taken.column("tags"), source))
            kept_ids += taken.column("clip_id").to_pylist()
            kept_hashes += _column(taken, "audio_xxh128")
    joined = joining.finish(clips_of, repr(source.uri))

    found = sorted(clip for clip, row in joined.rows.items() if row in places)
    order = [places[joined.rows[clip]] for clip in found]
    scores = np.concatenate(kept) if kept else np.zeros((0, len(source.labels)), np.float32)
    # Files of another making may lack tags; those of some rows are no help.
    tagged = np.concatenate(kept_tags) if len(kept_tags) == len(kept) > 0 else None
    # Read in the order asked for, as a rule: then nothing is copied.
    if order != list(range(len(scores))):
        scores = scores[order]
        tagged = None if tagged is None else tagged[order]
    repeated = sum(row not in errors for row in joined.repeated)
    return Matched(
        clips=np.array(found, np.int64),
        clip_ids=tuple(kept_ids[place] for place in order),
        hashes=tuple(kept_hashes[place] for place in order),
        scores=scores,
        tags=tagged,
        failed={clip: errors[row] for clip, row in joined.rows.items() if row in errors},
        joined_by=Counter(NAME_KINDS[joined.kinds[clip]] for clip in found),
        unasked=row - len(errors) - len(found) - repeated,
        other_bytes=sum(row not in errors for row in joined.other_bytes),
        repeated=repeated,
    )


class _Join:
    """The work of `join`, row by row: a row that may be of no clip is forgotten at once."""

    def __init__(self, clips: Sequence[Names]) -> None:
        self._clips = clips
        # For each kind: name -> clips. Of the ends of members, those of clips are in `_ends`,
        # whole members in `_whole`: one of a pair must be whole.
        self._exact: dict[int, dict[str, list[int]]] = {
            kind: {} for kind in range(len(NAME_KINDS)) if kind not in _SIMILAR
        }
        self._whole: dict[int, dict[str, list[int]]] = {kind: {} for kind in _SIMILAR}
        self._ends: dict[int, dict[str, list[int]]] = {kind: {} for kind in _SIMILAR}
        for clip, names in enumerate(clips):
            for kind, of_kind in self._exact.items():
                for name in names[kind]:
                    of_kind.setdefault(name, []).append(clip)
            for kind in _SIMILAR:
                for name in _whole(names, kind):
                    self._whole[kind].setdefault(name, []).append(clip)
                for name in names[kind]:
                    self._ends[kind].setdefault(name, []).append(clip)
        self._met: list[list[tuple[int, list[int], str]]] = [[] for _ in NAME_KINDS]
        self._spare: list[tuple[int, list[int], int | None]] = []  # rows whose hash fits several
        self._best: dict[int, int] = {}  # clip -> the most exact kind by which a row is its own
        self._repeated: dict[int, int] = {}
        self._other_bytes: set[int] = set()

    def meet(self, row: int, names: Names) -> bool:
        """Whether a row may be of a clip."""
        same_bytes: list[int] = []  # several clips
        other_bytes = False
        for kind in range(len(NAME_KINDS)):
            clips, name = self._meeting(kind, names)
            if kind > _HASH and clips:
                same = [clip for clip in clips if _may_be_equal(names, self._clips[clip])]
                other_bytes |= len(same) < len(clips)
                clips = same
            if same_bytes:  # any of them will do, but a name may tell
                clips = [clip for clip in clips if clip in same_bytes]
                if len(clips) == 1:
                    self._spare.append((row, same_bytes, clips[0]))
                    return True
            elif kind == _HASH and len(clips) > 1:
                same_bytes = clips
            elif clips:
                return self._remember(row, kind, clips, name)
        if same_bytes:
            self._spare.append((row, same_bytes, None))
            return True
        if other_bytes:
            self._other_bytes.add(row)
        return False

    def _meeting(self, kind: int, names: Names) -> tuple[list[int], str]:
        """The clips that a row meets by a kind of name, and the name."""
        if kind not in _SIMILAR:
            of_kind = self._exact[kind]
            return next(
                ((of_kind[name], name) for name in names[kind] if name in of_kind), ([], "")
            )
        pairs = [(self._ends[kind], name) for name in _whole(names, kind)]
        pairs += [(self._whole[kind], name) for name in names[kind]]
        met = {clip: name for of_kind, name in pairs for clip in of_kind.get(name, ())}
        return sorted(met), next(iter(met.values()), "")

    def _remember(self, row: int, kind: int, clips: list[int], name: str) -> bool:
        # By a hash, the first row of equal bytes will do.
        if all(self._best.get(clip, kind + 1) < kind + (kind == _HASH) for clip in clips):
            if kind == _HASH:
                self._repeated[row] = clips[0]
            return False  # each has a row of its own already
        if len(clips) == 1:
            self._best[clips[0]] = min(kind, self._best.get(clips[0], kind))
        self._met[kind].append((row, clips, name))
        return True

    def finish(self, clips_of: str, rows_of: str) -> Joined:
        """Gives each clip its row, from the most exact kind of name down.

        Raises:
            EvaluationError: several would do.
        """
        rows: dict[int, int] = {}
        kinds: dict[int, int] = {}
        several: dict[str, int] = {}  # a row's name -> clips that it fits
        clashes: dict[int, tuple[int, str]] = {}  # clip -> (kind, name) of several rows
        for kind, met in enumerate(self._met):
            now: dict[int, int] = {}
            for row, clips, name in met:
                left = [clip for clip in clips if clip not in rows]
                if len(left) > 1:
                    several[name] = len(left)
                elif left and left[0] not in now:
                    now[left[0]] = row
                elif left and kind != _HASH:
                    clashes[left[0]] = (kind, name)
                elif kind == _HASH:
                    self._repeated[row] = clips[0]
            rows |= now
            kinds |= dict.fromkeys(now, kind)
            if kind == _HASH:
                self._share_out(rows, kinds)
        if several:
            name, clips = next(iter(several.items()))
            raise EvaluationError(
                f"rows of {rows_of} have {len(several)} names that fit more than one clip of "
                f"{clips_of}, such as {name!r}, which fits {clips}; name the clips of {clips_of} by "
                "clip_id, as the output has it"
            )
        if clashes:
            kind, name = next(iter(clashes.values()))
            raise EvaluationError(
                f"{len(clashes)} clips of {clips_of} fit more than one row of {rows_of}, "
                f"such as {name!r} ({NAME_KINDS[kind]}); name the clips of {clips_of} by clip_id, as "
                "the output has it"
            )
        return Joined(rows, kinds, self._repeated, frozenset(self._other_bytes))

    def _share_out(self, rows: dict[int, int], kinds: dict[int, int]) -> None:
        """Gives rows whose bytes are those of several clips to those that have none."""
        left: list[tuple[int, list[int]]] = []
        for row, clips, told in self._spare:
            if told is None or told in rows:
                left.append((row, clips))
            else:
                rows[told], kinds[told] = row, _HASH
        for row, clips in left:
            clip = next((clip for clip in clips if clip not in rows), None)
            if clip is None:
                self._repeated[row] = clips[0]
            else:
                rows[clip], kinds[clip] = row, _HASH


def _whole(names: Names, kind: int) -> Iterable[str]:
    """The whole members among the ends of a kind."""
    members = names[_MEMBER]
    return members if kind == _FILE_NAME else {_stem(member) for member in members}


def _may_be_equal(one: Names, other: Names) -> bool:
    """Whether two may be the same clip: not if their bytes differ and their formats do not."""
    if not one[_HASH] or not other[_HASH] or one[_HASH] & other[_HASH]:
        return True
    formats = [
        {posixpath.splitext(member)[1].lower() for member in names[_MEMBER]}
        for names in (one, other)
    ]
    return not formats[0] & formats[1]


def _has_scores(row: pa.ListScalar) -> bool:
    values = row.values
    return values is not None and len(values) > 0 and values.null_count == 0


def score_matrix(column: pa.Array, source: Source) -> NDArray[np.float32]:
    """Lists of scores as [rows, labels].

    Raises:
        EvaluationError: a row has another number of scores than there are labels.
    """
    flat, labels = column.flatten(), len(source.labels)
    if len(flat) != len(column) * labels or flat.null_count:
        raise EvaluationError(
            f"{source.uri!r} has rows without {labels} scores and without an error that says why; "
            "every clip needs a score for each label"
        )
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(column), labels)
    return matrix.astype(np.float32, copy=False)


def tag_matrix(column: pa.Array, source: Source) -> NDArray[np.bool_]:
    """Lists of tags as [rows, labels]: which labels each row is tagged with.

    Raises:
        EvaluationError: a tag's index is that of no label.
    """
    matrix = np.zeros((len(column), len(source.labels)), bool)
    index = pc.struct_field(column.flatten(), "index").to_numpy(zero_copy_only=False)
    if len(index) and not 0 <= index.min() <= index.max() < len(source.labels):
        raise EvaluationError(
            f"{source.uri!r} has tags whose index is not within its {len(source.labels)} labels: is "
            "its labels.parquet that of another checkpoint?"
        )
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    matrix[np.repeat(np.arange(len(column)), counts), index] = True
    return matrix


def _ends(path: str) -> frozenset[str]:
    """A path, and what is left of it as folders are taken from its front, to the file name."""
    parts = path.split("/")
    return frozenset([path, *("/".join(parts[first:]) for first in range(1, len(parts)))]) - {""}


def _stem(path: str) -> str:
    """A path without its suffix, if that is one of audio: `a.b` of `a.b.wav` and of `a.b`."""
    stem, suffix = posixpath.splitext(path)
    return stem if suffix.lower() in AUDIO_SUFFIXES else path


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]
