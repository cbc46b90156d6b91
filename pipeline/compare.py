"""Two outputs over the same clips, side by side: what `earmark compare` shows."""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evaluation.scores import EvaluationError, Source, batches, open_parquet
from pipeline.quantities import counted
from pipeline.report import Place, clip_name, rows_at, thresholds_of
from student.labels import Label

RANKED_CLIPS = 20_000  # clips whose labels are ranked in both: sorting is what costs most
_GROUPS_HELD = 8  # row groups of B, 17 MB each
_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class LabelShift:
    """One label in both outputs, over the clips that both have scored."""

    name: str
    mid: str
    threshold_a: float | None
    threshold_b: float | None
    mean_a: float
    mean_b: float
    mean_change: float  # of the absolute difference
    tags_a: int
    tags_b: int
    gained: int  # a tag in B and not in A
    lost: int

    @property
    def agreement(self) -> float | None:
        """Clips tagged in both by clips tagged in either."""
        either = self.tags_a + self.gained
        return (self.tags_a - self.lost) / either if either else None


@dataclass(frozen=True)
class Change:
    """A clip whose tags or scores changed much, and the label that changed most."""

    row: dict[str, Any]  # of A
    label: str
    a: float
    b: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass
class Comparison:
    """How two outputs differ. Only labels that both have are compared."""

    a: str
    b: str
    clips: int = 0  # scored in both
    matched: int = 0  # rows that both have, scored or not
    matched_by: dict[str, int] = field(default_factory=dict)
    only_a: int = 0
    only_b: int = 0
    unscored_a: int = 0  # of the matched, those without scores in A
    unscored_b: int = 0
    labels: list[LabelShift] = field(default_factory=list)
    labels_only_a: int = 0
    labels_only_b: int = 0
    flipped: int = 0  # clips that gained or lost a tag
    gained: int = 0
    lost: int = 0
    jaccard: float | None = None  # mean over clips with a tag in either
    same_top: float = 0.0  # share of clips whose highest label is the same
    rank_correlation: float | None = None  # mean over clips of Spearman's, over their labels
    ranked: int = 0  # clips that it is of
    mean_change: float = 0.0  # of the absolute difference, over clips and labels
    largest_change: float = 0.0
    changes: list[Change] = field(default_factory=list)
    differences: list[tuple[str, Any, Any]] = field(default_factory=list)  # of run.json
    notes: list[str] = field(default_factory=list)

    def by_change(self) -> list[LabelShift]:
        """The labels, those with most changed tags first."""
        return sorted(self.labels, key=lambda one: (-one.gained - one.lost, -one.mean_change))


def compare(a: Source, b: Source, *, changes: int = 12, seed: int = 0) -> Comparison:
    """Reads both outputs, A in order and B where its rows are.

    Args:
        a: of `evaluation.scores.open_source`.
        b: likewise.
        changes: how many of the most changed clips are told of.
        seed: of the clips that are drawn for the rank correlation.

    Raises:
        EvaluationError: the outputs have no label or no clip in common, or cannot be read.
    """
    common, only_a, only_b = common_labels(a.labels, b.labels)
    if not common:
        raise EvaluationError(
            f"{a.uri!r} and {b.uri!r} have no label in common: {a.labels[0].name!r} and such here, "
            f"{b.labels[0].name!r} and such there"
        )
    result = Comparison(a.uri, b.uri, labels_only_a=only_a, labels_only_b=only_b)
    result.differences = _differences(a.run, b.run)
    if only_a or only_b:
        result.notes.append(
            f"The label sets differ: {len(common):,} labels are in both, {only_a:,} only in A, {only_b:,} "
            "only in B, which are left out of everything here."
        )
    in_b = _match(a, b, result)
    if not result.matched:
        raise EvaluationError(
            f"{a.uri!r} and {b.uri!r} have no clip in common, neither by clip_id nor by the bytes and "
            "their member: are they of the same data?"
        )
    _measure(a, b, common, in_b, result, changes, np.random.default_rng(seed))
    return result


def common_labels(
    a: Sequence[Label], b: Sequence[Label]
) -> tuple[list[tuple[Label, Label]], int, int]:
    """(labels of both, by mid, else by name; how many only A has; how many only B has)."""
    by_mid = {label.mid: label for label in b if label.mid}
    by_name = {label.name: label for label in b}
    common: list[tuple[Label, Label]] = []
    taken: set[int] = set()
    for label in a:
        other = by_mid.get(label.mid) if label.mid else None
        other = other or by_name.get(label.name)
        # A name is no proof where both state a mid, and these differ.
        if (
            other is None
            or other.index in taken
            or (label.mid and other.mid and label.mid != other.mid)
        ):
            continue
        taken.add(other.index)
        common.append((label, other))
    return common, len(a) - len(common), len(b) - len(common)


def _match(a: Source, b: Source, result: Comparison) -> NDArray[np.int64]:
    """[rows of A] the row of B that is the same clip, or -1: by `clip_id`, else by bytes and member."""
    ids: dict[str, int] = {}
    names: dict[tuple[Any, ...], deque[int]] = {}
    columns = ["clip_id", "member", "audio_xxh128", "start_s", "end_s"]
    rows_b = 0
    for row in _rows(b, columns):
        ids[row["clip_id"]] = rows_b
        if row.get("audio_xxh128"):
            names.setdefault(clip_name(row), deque()).append(rows_b)
        rows_b += 1
    matched: list[int] = []
    left: list[tuple[int, tuple[Any, ...]]] = []
    for place, row in enumerate(_rows(a, columns)):
        other = ids.pop(row["clip_id"], -1)
        matched.append(other)
        if other < 0 and row.get("audio_xxh128"):
            left.append((place, clip_name(row)))
    by_id = sum(other >= 0 for other in matched)
    free = set(ids.values())
    for place, name in left:
        while names.get(name):
            other = names[name].popleft()
            if other in free:
                free.discard(other)
                matched[place] = other
                break
    in_b = np.array(matched, np.int64)
    result.matched = int((in_b >= 0).sum())
    result.matched_by = {"clip_id": by_id, "audio_xxh128 and member": result.matched - by_id}
    result.only_a = len(in_b) - result.matched
    result.only_b = rows_b - result.matched
    for count, which in ((result.only_a, "A"), (result.only_b, "B")):
        if count:
            result.notes.append(
                f"{counted(count, 'clip')} {'is' if count == 1 else 'are'} only in {which} and left out."
            )
    return in_b


def _rows(source: Source, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in batches(source, columns):
        yield from batch.to_pylist()


class _RowsOf:
    """Rows of an output by their number over all files; the last few row groups are kept."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: OrderedDict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = OrderedDict()
        self._groups: list[tuple[str, int]] = []
        starts = [0]
        for name in source.files:
            with source.output.open(name) as stream, open_parquet(stream) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    self._groups.append((name, group))
                    starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        self._open: tuple[str, Any, pq.ParquetFile] | None = None

    def take(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(scores [rows, labels], NaN where there are none; tags [rows, labels])."""
        count = len(self._source.labels)
        scores = np.empty((len(rows), count), np.float32)
        tags = np.empty((len(rows), count), bool)
        of = np.searchsorted(self._starts, rows, "right") - 1
        for group in np.unique(of).tolist():
            here = of == group
            all_scores, all_tags = self._group(group)
            inside = rows[here] - self._starts[group]
            scores[here], tags[here] = all_scores[inside], all_tags[inside]
        return scores, tags

    def _group(self, group: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        name, within = self._groups[group]
        if self._open is None or self._open[0] != name:
            self.close()
            stream = self._source.output.open(name)
            self._open = name, stream, open_parquet(stream)
        table = self._open[2].read_row_group(
            within, ["scores", "tags.list.element.index"], use_threads=False
        )
        self._held[group] = read = matrices(
            table["scores"].combine_chunks(), table["tags"].combine_chunks(), self._source
        )
        if len(self._held) > _GROUPS_HELD:
            self._held.popitem(last=False)
        return read

    def close(self) -> None:
        """Lets go of the file that is open."""
        if self._open is not None:
            self._open[2].close()
            self._open[1].close()
            self._open = None


def matrices(
    scores: pa.Array, tags: pa.Array, source: Source
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(scores [rows, labels], NaN where there are none; which labels are tags [rows, labels])."""
    rows, count = len(scores), len(source.labels)
    present = scores.is_valid().to_numpy(zero_copy_only=False)
    flat = scores.flatten().to_numpy(zero_copy_only=False)
    if len(flat) != present.sum() * count:
        raise EvaluationError(
            f"{source.uri!r} has rows of another number of scores than its labels.parquet has labels "
            f"({count}); take the folder as earmark annotate wrote it"
        )
    matrix = np.full((rows, count), np.nan, np.float32)
    matrix[present] = flat.reshape(-1, count)
    tagged = np.zeros((rows, count), bool)
    lengths = pc.fill_null(pc.list_value_length(tags), 0).to_numpy(zero_copy_only=False)
    index = pc.struct_field(tags.flatten(), "index").to_numpy(zero_copy_only=False)
    tagged[np.repeat(np.arange(rows), lengths), index] = True
    return matrix, tagged


def _measure(
    a: Source,
    b: Source,
    common: Sequence[tuple[Label, Label]],
    in_b: NDArray[np.int64],
    result: Comparison,
    changes: int,
    random: np.random.Generator,
) -> None:
    at_a = np.array([one.index for one, _ in common])
    at_b = np.array([other.index for _, other in common])
    count = len(common)
    sums = {name: np.zeros(count) for name in ("a", "b", "change")}
    tagged = {name: np.zeros(count, np.int64) for name in ("a", "b", "gained", "lost")}
    jaccards = same_top = 0.0
    with_tags = 0
    ranks: list[NDArray[np.float64]] = []
    share = min(1.0, RANKED_CLIPS / result.matched)
    largest: list[tuple[tuple[int, float, int], Place, int, float, float, Any, Any]] = []
    other_rows, row = _RowsOf(b), 0
    for file, first, batch in _with_places(a, ["scores", "tags.list.element.index"]):
        others = in_b[row : row + batch.num_rows]
        row += batch.num_rows
        here = np.flatnonzero(others >= 0)
        if not len(here):
            continue
        scores_a, tags_a = matrices(batch.column("scores"), batch.column("tags"), a)
        scores_b, tags_b = other_rows.take(others[here])
        scores_a, tags_a = scores_a[here][:, at_a], tags_a[here][:, at_a]
        scores_b, tags_b = scores_b[:, at_b], tags_b[:, at_b]
        has_a, has_b = ~np.isnan(scores_a[:, 0]), ~np.isnan(scores_b[:, 0])
        result.unscored_a += int((~has_a).sum())
        result.unscored_b += int((~has_b).sum())
        both = has_a & has_b
        here = here[both]
        if not len(here):
            continue
        scores_a, tags_a, scores_b, tags_b = (
            values[both] for values in (scores_a, tags_a, scores_b, tags_b)
        )
        result.clips += len(here)
        change = np.abs(scores_b - scores_a)
        gained, lost = tags_b & ~tags_a, tags_a & ~tags_b
        for name, values in (("a", scores_a), ("b", scores_b), ("change", change)):
            sums[name] += values.sum(axis=0, dtype=np.float64)
        for name, flags in (("a", tags_a), ("b", tags_b), ("gained", gained), ("lost", lost)):
            tagged[name] += np.count_nonzero(flags, axis=0)
        either = np.count_nonzero(tags_a | tags_b, axis=1)
        shared = np.count_nonzero(tags_a & tags_b, axis=1)
        jaccards += float((shared[either > 0] / either[either > 0]).sum())
        with_tags += int((either > 0).sum())
        result.flipped += int((shared < either).sum())
        same_top += float((scores_a.argmax(axis=1) == scores_b.argmax(axis=1)).sum())
        drawn = random.random(len(here)) < share
        if drawn.any() and count > 2:
            ranks.append(_rank_correlations(scores_a[drawn], scores_b[drawn]))

        most = change.max(axis=1)
        result.largest_change = max(result.largest_change, float(most.max()))
        flips = np.count_nonzero(gained | lost, axis=1)
        # Tags first; where no score changed but the thresholds, the label whose tag did.
        for i in np.lexsort((-most, -flips))[:changes].tolist():
            label = int((change[i] if most[i] > 0 else gained[i] | lost[i]).argmax())
            entry = (
                (int(flips[i]), float(most[i]), -(row + i)), (file, first + int(here[i])), label,
                float(scores_a[i, label]), float(scores_b[i, label]),
                np.flatnonzero(gained[i]), np.flatnonzero(lost[i]),
            )  # fmt: skip
            if not flips[i] and most[i] <= 0:
                break
            if len(largest) < changes:
                heapq.heappush(largest, entry)
            elif entry[0] > largest[0][0]:
                heapq.heapreplace(largest, entry)
    other_rows.close()
    if not result.clips:
        raise EvaluationError(
            f"no clip has scores in both {a.uri!r} and {b.uri!r}: {result.matched:,} are in both, and "
            f"{result.unscored_a:,} have no scores in the first, {result.unscored_b:,} in the second"
        )

    clips = result.clips
    thresholds_a, thresholds_b = thresholds_of(a), thresholds_of(b)
    result.labels = [
        LabelShift(
            one.name, one.mid, thresholds_a[one.index], thresholds_b[other.index],
            sums["a"][i] / clips, sums["b"][i] / clips, sums["change"][i] / clips,
            int(tagged["a"][i]), int(tagged["b"][i]), int(tagged["gained"][i]), int(tagged["lost"][i]),
        )
        for i, (one, other) in enumerate(common)
    ]  # fmt: skip
    result.gained, result.lost = int(tagged["gained"].sum()), int(tagged["lost"].sum())
    result.jaccard = jaccards / with_tags if with_tags else None
    result.same_top = same_top / clips
    if ranks:
        all_ranks = np.concatenate(ranks)
        result.ranked = int(np.isfinite(all_ranks).sum())
        result.rank_correlation = float(np.nanmean(all_ranks)) if result.ranked else None
    result.mean_change = float(sums["change"].sum() / clips / count)
    names = [one.name for one, _ in common]
    columns = [
        "clip_id", "shard", "member", "start_s", "end_s", "duration_s", "sample_rate", "channels",
        "codec", "audio_xxh128", "rms_dbfs", "error",
    ]  # fmt: skip
    rows = rows_at(a, [entry[1] for entry in largest], columns)
    result.changes = [
        Change(
            rows[place], names[label], of_a, of_b,
            tuple(names[i] for i in gained), tuple(names[i] for i in lost),
        )
        for _, place, label, of_a, of_b, gained, lost in sorted(
            largest, key=lambda entry: entry[0], reverse=True
        )
    ]  # fmt: skip


def _with_places(
    source: Source, columns: Sequence[str]
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    for file, name in enumerate(source.files):
        first = 0
        try:
            with source.output.open(name) as stream, open_parquet(stream) as parquet:
                for batch in parquet.iter_batches(
                    _ROWS_AT_ONCE, columns=list(columns), use_threads=False
                ):
                    yield file, first, batch
                    first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise EvaluationError(f"{source.output.uri}/{name} cannot be read: {reason}") from error


def _rank_correlations(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """[clips] Spearman's correlation of the labels of each clip; equal scores rank by label."""

    def ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
        order = np.argsort(scores, axis=1, kind="stable")
        ranked = np.empty_like(order)
        np.put_along_axis(ranked, order, np.arange(scores.shape[1])[None], axis=1)
        return ranked.astype(np.float64)

    n = a.shape[1]
    squares: NDArray[np.float64] = ((ranks(a) - ranks(b)) ** 2).sum(axis=1)
    return 1 - 6 * squares / (n * (n**2 - 1))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two `run.json` say otherwise of how scores and tags came about."""
    checkpoints = a.get("checkpoint", {}).get("name"), b.get("checkpoint", {}).get("name")
    found = [("checkpoint", *checkpoints)] if checkpoints[0] != checkpoints[1] else []
    scoring_a, scoring_b = a.get("scoring", {}), b.get("scoring", {})
    for name in {**scoring_a, **scoring_b}:
        if scoring_a.get(name) != scoring_b.get(name):
            found.append((name, scoring_a.get(name), scoring_b.get(name)))
    return found


# ----------------------------------------------------------------------- words


def headline(result: Comparison) -> list[list[str]]:
    """The numbers to begin with, as (what, value)."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    flipped = 100 * result.flipped / result.clips
    return [
        ["Clips in both", f"{result.clips:,}"],
        ["Only in A", f"{result.only_a:,}"],
        ["Only in B", f"{result.only_b:,}"],
        ["Same highest label", f"{100 * result.same_top:.1f} %"],
        ["Jaccard of tags", number(result.jaccard)],
        ["Rank correlation", number(result.rank_correlation)],
        ["Clips with other tags", f"{result.flipped:,} ({flipped:.1f} %)"],
        ["Tags gained", f"{result.gained:,}"],
        ["Tags lost", f"{result.lost:,}"],
        ["Mean change of a score", f"{result.mean_change:.5f}"],
    ]


def as_json(result: Comparison) -> str:
    """Everything, as JSON."""
    whole = {
        **{k: v for k, v in vars(result).items() if k not in ("labels", "changes", "differences")},
        "labels": [vars(one) | {"agreement": one.agreement} for one in result.by_change()],
        "changes": [
            {
                "clip_id": change.row["clip_id"],
                "label": change.label,
                "a": change.a,
                "b": change.b,
                "gained": change.gained,
                "lost": change.lost,
            }
            for change in result.changes
        ],
        "differences": [{"of": name, "a": a, "b": b} for name, a, b in result.differences],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
