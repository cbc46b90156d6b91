"""What people and programs see of an evaluation: tables, JSON, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.evaluate import MIN_POSITIVES_OF_INTERVAL, Evaluation, Interval, Quality
from evaluation.metrics import CardMetrics, FieldMetrics
from evaluation.provenance import HELD_OUT_FILE

FORMAT = "earmark.evaluation/1"  # of the JSON
CARD_COLUMNS = {"f1": "F1", "roc_auc": "ROC AUC", "accuracy": "Accuracy", "mAP": "mAP"}
FIELD_COLUMNS = {
    "macro_map": "macro mAP",
    "macro_auc": "macro AUC",
    "d_prime": "d'",
    "weighted_map": "weighted mAP",
    "lwlrap": "lwlrap",
}
CARD_NOTE = (
    "Micro-averaged over all clips and labels, a label being predicted from 0.5; ROC AUC is of "
    "those predictions, not of the scores; accuracy is the share of clips with every label right. "
    "Not on the scale on which AudioSet results are usually stated."
)
FIELD_NOTE = (
    "Means over the labels that have positives; weighted mAP by their number. d' is of macro AUC."
)
RANGE = "95 %"
_SHOWN_LABELS = 5
_SHOWN_GAP = 0.0005  # less is 0.000
_FEW = 3  # positives


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn; the first column is text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    turned: bool = False  # on a terminal rows become columns: few models, many metrics


def sheets(evaluation: Evaluation) -> tuple[Sheet, ...]:
    """The tables of an evaluation, in the order in which they are read."""
    return (
        _metrics(evaluation, "As the published card states it", CARD_COLUMNS, CARD_NOTE),
        _metrics(evaluation, "As AudioSet taggers are compared", FIELD_COLUMNS, FIELD_NOTE),
        *_tagging(evaluation),
        *_agreement(evaluation),
        *_speed(evaluation),
        *_buckets(evaluation),
    )


def availability(evaluation: Evaluation) -> Iterator[str]:
    """Sentences on what was compared and what could not be."""
    a = evaluation.availability
    with_positives = a.labels_compared - a.labels_without_positives
    yield (
        f"{a.scored:,} of the truth's {a.truth_clips:,} clips are compared, on {a.labels_compared} of "
        f"{a.labels} labels, {with_positives} of which have positives."
    )
    if a.labels_without_positives:
        yield (
            f"{a.labels_without_positives} labels have no positive: they count as absent everywhere in "
            "the micro averages, and not at all in the macro ones. --labels-at-least 1 leaves them out."
        )
    if a.truth_without:
        yield f"{a.truth_without:,} rows of the truth name no clip or say nothing of it."
    for reason, clips in a.failed.items():
        stage, _, kind = reason.partition("/")
        yield f"{clips:,} clips of the truth failed to {stage}: {kind}."
    if a.absent and a.only:
        yield f"{a.absent:,} clips of the truth are not in {a.only}, or have no row."
    elif a.absent:
        some = ", ".join(a.absent_examples[:3])
        yield f"{a.absent:,} clips of the truth have no row, such as {some}."
    if a.only_absent:
        yield f"{a.only_absent:,} clips of {a.only} have no row."
    if a.learned:
        held_out = f"{a.learned.place}/{HELD_OUT_FILE}"
        # With that list they are copies of held-out clips, and it does not leave them out.
        cure = "" if a.only == held_out else f": --only {held_out} leaves them out"
        yield (
            f"The student learned from {a.learned.clips:,} of these clips, which flatters the "
            f"numbers{cure}."
        )
    if a.tuned:
        yield (
            f"The thresholds of the tags were fitted on {_most(a.tuned.clips, a.scored)} of these clips "
            f"({a.tuned.place}), which flatters the tags, not the scores: docs/thresholds.md says how "
            "to check them."
        )
    if a.teacher_lacks:
        yield f"{a.teacher_lacks:,} scored clips of the truth are left out: the teacher lacks them."
    if a.own_tags_are_truth:
        yield (
            "The truth is what the output is tagged with, tag for tag: if it was made from it, the "
            "numbers say how the scores were cut, not how good they are."
        )
    if a.teacher_is_student:
        yield "The teacher's scores are the student's own, digit for digit: is --teacher another run?"
    if a.unasked:
        other = (
            f"; {a.other_bytes:,} of them have the name of one, but other bytes"
            if a.other_bytes
            else ""
        )
        yield f"{a.unasked:,} scored clips are not in the truth{other}."
    if a.repeated:
        yield f"{a.repeated:,} scored rows repeat the bytes of a clip that is compared."
    for whose, joined_by in (("", a.joined_by), ("The teacher's are joined", a.teacher_joined_by)):
        if set(joined_by) - {"clip_id"}:
            kinds = ", ".join(f"{kind} ({clips:,})" for kind, clips in joined_by.items())
            yield f"{whose or 'Joined'} by {kinds}."
    if a.unknown_labels:
        named = ", ".join(
            f"{text} ({clips:,})" for text, clips in list(a.unknown_labels.items())[:3]
        )
        yield (
            f"{len(a.unknown_labels)} labels of the truth are none of the checkpoint's and were "
            f"skipped: {named}{', ...' * (len(a.unknown_labels) > 3)}."
        )
    if a.clips_without_label:
        yield f"Of {a.clips_without_label:,} compared clips no label of the checkpoint is true."


def _most(clips: int, of: int) -> str:
    """How many, where that is known of a sample."""
    return "all" if clips >= of else f"about {clips:,}"


def show(evaluation: Evaluation, console: Any) -> None:
    """Prints an evaluation on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    def say(text: str, style: str | None = None) -> None:
        console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    who = " and ".join(model.name for model in _models(evaluation))
    say(f"{who} against {evaluation.truth_name}", "bold")
    for sentence in availability(evaluation):
        say(f"  {sentence}")
    for sheet in (*sheets(evaluation), *_extremes(evaluation)):
        console.print()
        say(sheet.title, "bold")
        lines = (sheet.header, *sheet.rows)
        header, *rows = zip(*lines, strict=True) if sheet.turned else lines
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for number, name in enumerate(header):
            table.add_column(escape(name), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        if sheet.note:
            say(sheet.note, "dim")


def markdown(evaluation: Evaluation) -> str:
    """An evaluation as a section of a model card."""
    lines = ["## Evaluation results", "", f"Against {_text(evaluation.truth_name)}."]
    lines += ["", *(f"- {_text(sentence)}" for sentence in availability(evaluation))]
    for sheet in sheets(evaluation):
        lines += ["", f"### {_text(sheet.title)}", ""]
        lines += markdown_table(sheet)
        if sheet.note:
            lines += ["", sheet.note]
    each = _every_label(evaluation)
    if each.rows:
        # Hundreds of rows, which a reader opens who looks for a label.
        lines += ["", f"<details><summary>{each.title}</summary>", "", *markdown_table(each)]
        lines += ["", *[each.note, ""] * bool(each.note), "</details>"]
    return "\n".join(lines) + "\n"


def markdown_table(sheet: Sheet) -> list[str]:
    """The lines of a sheet as a Markdown table."""
    header, *rows = [
        "| " + " | ".join(map(_text, cells)) + " |" for cells in (sheet.header, *sheet.rows)
    ]
    return [header, "|---" + "|---:" * (len(sheet.header) - 1) + "|", *rows]


def as_json(evaluation: Evaluation) -> str:
    """Everything but the arrays, for programs. What is not defined or not finite is null."""
    labels = []
    for index, label in enumerate(evaluation.labels):
        entry = {
            "index": label.index,
            "mid": label.mid or None,
            "name": label.name,
            "positives": int(evaluation.positives[index]),
            "student": _label(evaluation.student, index),
        }
        if evaluation.teacher:
            entry["teacher"] = _label(evaluation.teacher, index)
            entry["gap"] = evaluation.label_gaps[index]
        labels.append(entry)
    a = evaluation.agreement
    whole = {
        "format": FORMAT,
        "truth": evaluation.truth_name,
        "availability": asdict(evaluation.availability),
        "bootstrap": {
            "replicates": evaluation.replicates,
            "groups": evaluation.groups,
            "level": 0.95,
        },
        "student": _quality(evaluation.student),
        "teacher": _quality(evaluation.teacher) if evaluation.teacher else None,
        "agreement": asdict(a) if a else None,
        "by_positives": [asdict(bucket) for bucket in evaluation.buckets],
        "labels": labels,
    }
    return json.dumps(_plain(whole), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def per_label_csv(evaluation: Evaluation) -> str:
    """A row a label: positives, average precision with its interval, AUC; the teacher's beside it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["index", "mid", "name", "positives", "average_precision", "low", "high", "roc_auc"]
    teacher = evaluation.teacher
    if teacher:
        names += ["teacher_average_precision", "teacher_roc_auc", "gap"]
    writer.writerow(names)
    for index, label in enumerate(evaluation.labels):
        s = evaluation.student
        numbers = [s.label_precision, s.label_low, s.label_high, s.label_auc]
        if teacher:
            numbers += [teacher.label_precision, teacher.label_auc, evaluation.label_gaps]
        writer.writerow(
            [label.index, label.mid, label.name, int(evaluation.positives[index])]
            + ["" if np.isnan(column[index]) else f"{column[index]:.6f}" for column in numbers]
        )
    return text.getvalue()


# ------------------------------------------------------------------ sheets


def _models(evaluation: Evaluation) -> list[Quality]:
    return [evaluation.student] + ([evaluation.teacher] if evaluation.teacher else [])


def _metrics(evaluation: Evaluation, title: str, columns: dict[str, str], note: str) -> Sheet:
    rows: list[tuple[str, ...]] = []
    for model in _models(evaluation):
        rows += _with_range(model.name, [model.intervals[name] for name in columns])
    if evaluation.agreement:
        gaps = evaluation.agreement.differences
        rows += _with_range("gap", [gaps[name] for name in columns], signed=True)
    if evaluation.replicates:
        note += (
            f" {RANGE}: where the number would be on other clips of this kind and number, by "
            f"{evaluation.replicates} bootstrap replicates"
            + ("." if evaluation.groups is None else f" of {evaluation.groups:,} groups of clips.")
        )
    return Sheet(title, ("Model", *columns.values()), tuple(rows), note, turned=True)


def _tagging(evaluation: Evaluation) -> Iterator[Sheet]:
    rows = []
    for model in _models(evaluation):
        if model.tagging is None:
            continue
        total = model.tagging.total
        of = (
            total.micro_precision, total.micro_recall, total.micro_f1,
            total.macro_precision, total.macro_recall, total.macro_f1,
        )  # fmt: skip
        cells = [model.name, f"{model.tagging.clips:,}", f"{model.tagging.tags:,}"]
        rows.append((*cells, *("" if value is None else f"{value:.3f}" for value in of)))
    if rows:
        header = (
            "Model", "clips with a tag", "tags", "micro precision", "micro recall", "micro F1",
            "macro precision", "macro recall", "macro F1",
        )  # fmt: skip
        yield Sheet("The tags that the output has", header, tuple(rows), turned=True)


def _agreement(evaluation: Evaluation) -> Iterator[Sheet]:
    if evaluation.agreement is None or evaluation.teacher is None:
        return
    a = evaluation.agreement
    rows = (
        ("same highest label", f"{a.top1:.1%}"),
        ("teacher's highest label among the student's 5", f"{a.top1_in_top5:.1%}"),
        ("Jaccard index of the 5 highest", f"{a.top5_jaccard:.3f}"),
        ("KL divergence from the teacher, nats a clip", f"{a.kl:.3f}"),
        ("cross-entropy to the teacher, nats a clip", f"{a.bce:.3f}"),
    )
    name = f"How near {evaluation.student.name} is to {evaluation.teacher.name}"
    yield Sheet(name, ("measure", "value"), rows)


def _speed(evaluation: Evaluation) -> Iterator[Sheet]:
    rows = tuple(
        (
            model.name,
            f"{model.clips_per_s:.1f}",
            f"{model.audio_s_per_s:.0f}" if model.audio_s_per_s else "unknown",
        )
        for model in _models(evaluation)
        if model.clips_per_s
    )
    if rows:
        yield Sheet(
            "Speed of the last run into the output",
            ("Model", "clips/s", "audio s/s"),
            rows,
            "With reading, decoding and starting, on whatever machine it ran: compare runs of one machine only.",
        )


def _buckets(evaluation: Evaluation) -> Iterator[Sheet]:
    header = ["positives", "labels"]
    for name in (
        *(model.name for model in _models(evaluation)),
        *["gap"] * bool(evaluation.teacher),
    ):
        header += [name, *[RANGE] * bool(evaluation.replicates)]
    rows = []
    for bucket in evaluation.buckets:
        span = f"{bucket.low}+" if bucket.high is None else f"{bucket.low}-{bucket.high}"
        cells = [span, str(bucket.labels)]
        for one, sign in ((bucket.student_map, ""), (bucket.teacher_map, ""), (bucket.gap, "+")):
            if one is not None:
                cells += [f"{one.value:{sign}.3f}", *[_range(one)] * bool(evaluation.replicates)]
        rows.append(tuple(cells))
    if rows:
        yield Sheet(
            "Macro mAP of labels by their number of positives",
            tuple(header),
            tuple(rows),
            turned=True,
        )


def _extremes(evaluation: Evaluation) -> Iterator[Sheet]:
    """The labels at both ends: by the gap to the teacher, or else by average precision."""
    least, ranked = ranked_labels(evaluation)
    if len(ranked) < 2 * _SHOWN_LABELS:
        return
    shown = [*ranked[:_SHOWN_LABELS], *ranked[-_SHOWN_LABELS:]]
    title, ties = f"The {_SHOWN_LABELS} highest and the {_SHOWN_LABELS} lowest", ""
    if evaluation.teacher:
        gaps = evaluation.label_gaps
        by_gap = sorted(ranked, key=lambda index: gaps[index])
        # One that is shown as 0.000 comes off neither worse nor better.
        differing = [index for index in by_gap if abs(gaps[index]) >= _SHOWN_GAP]
        if not differing:
            return
        worst = differing[: min(_SHOWN_LABELS, -(-len(differing) // 2))]
        best = differing[len(worst) :][-_SHOWN_LABELS:]
        shown = [*worst, *best]
        title = f"The {len(worst)} labels that come off worst beside {evaluation.teacher.name}"
        title += f" and the {len(best)} that come off best," if best else ","
        equal = len(ranked) - len(differing)
        ties = f"; {equal} are equal" if equal else ""
    title += f" of {len(ranked)} labels with {least} positives or more{ties}"
    yield _labels(evaluation, title, shown)


def _every_label(evaluation: Evaluation) -> Sheet:
    """All labels with positives, from the highest average precision down."""
    held = np.flatnonzero(evaluation.positives)
    order = np.argsort(-evaluation.student.label_precision[held], kind="stable")
    return _labels(evaluation, f"Each of {len(held)} labels", [int(k) for k in held[order]])


def _labels(evaluation: Evaluation, title: str, places: Sequence[int]) -> Sheet:
    student, teacher, shown = evaluation.student, evaluation.teacher, list(places)
    rare = evaluation.positives[shown] < MIN_POSITIVES_OF_INTERVAL
    ranges = bool(evaluation.replicates) and not rare.all()
    header = ["label", "positives", "AP", *[RANGE] * ranges]
    if teacher:
        header += [f"AP of {teacher.name}", "gap"]
    rows = []
    for index in shown:
        cells = [evaluation.labels[index].name, f"{evaluation.positives[index]:,}"]
        value = float(student.label_precision[index])
        cells.append(f"{value:.3f}")
        if ranges:
            low, high = float(student.label_low[index]), float(student.label_high[index])
            cells.append(_range(Interval(value, low, high)))
        if teacher:
            cells += [
                f"{teacher.label_precision[index]:.3f}",
                f"{evaluation.label_gaps[index]:+.3f}",
            ]
        rows.append(tuple(cells))
    note = f"Labels with fewer than {MIN_POSITIVES_OF_INTERVAL} positives have no interval."
    said = note if evaluation.replicates and rare.any() else ""
    return Sheet(title, tuple(header), tuple(rows), said)


def ranked_labels(evaluation: Evaluation) -> tuple[int, list[int]]:
    """(least positives, places): labels from the highest average precision down.

    Those with few positives, whose precision is mostly luck, are left out where others are.
    """
    least = _FEW if (evaluation.positives >= _FEW).any() else 1
    enough = np.flatnonzero(evaluation.positives >= least)
    order = np.argsort(-evaluation.student.label_precision[enough], kind="stable")
    return least, [int(index) for index in enough[order]]


# ------------------------------------------------------------------ numbers and text


def _with_range(
    name: str, intervals: Sequence[Interval], signed: bool = False
) -> list[tuple[str, ...]]:
    """A row of values, and below it one of their ranges where there are any."""
    sign = "+" if signed else ""
    rows = [(name, *(f"{one.value:{sign}.4f}" for one in intervals))]
    if not all(math.isnan(one.low) for one in intervals):
        rows.append((RANGE, *map(_range, intervals)))
    return rows


def _range(one: Interval) -> str:
    """An interval in a cell, which stays empty where there is none."""
    if math.isnan(one.low):
        return ""
    bounded = math.isfinite(one.low) and math.isfinite(one.high)
    return f"{one.low:.3f}…{one.high:.3f}" if bounded else "not bounded"


def _text(text: str) -> str:
    """Text as it may stand in a cell or a line of Markdown."""
    return re.sub(r"([\\|`*_\[\]<>#])", r"\\\1", re.sub(r"\s+", " ", text)).strip()


def _label(quality: Quality, index: int) -> dict[str, Any]:
    return {
        "average_precision": quality.label_precision[index],
        "low": quality.label_low[index],
        "high": quality.label_high[index],
        "roc_auc": quality.label_auc[index],
    }


def _quality(quality: Quality) -> dict[str, Any]:
    metrics: tuple[CardMetrics | FieldMetrics, ...] = (quality.card, quality.field)
    card, field = map(asdict, metrics)
    return {
        "name": quality.name,
        "uri": quality.uri,
        "card": card,
        "field": field,
        "intervals": {
            name: [interval.low, interval.high] for name, interval in quality.intervals.items()
        },
        "reliability": asdict(quality.reliability),
        "tags": asdict(quality.tagging) if quality.tagging else None,
        "clips_per_s": quality.clips_per_s,
        "audio_s_per_s": quality.audio_s_per_s,
    }


def _plain(value: Any) -> Any:
    """Without numpy, and with null for what JSON cannot say."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
