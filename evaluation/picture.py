"""Draws an evaluation: precision over recall, reliability, labels. Needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from evaluation.evaluate import Evaluation
from evaluation.metrics import precision_recall
from evaluation.present import ranked_labels

_CURVES = 6  # of labels beside the micro average
_BARS = 12  # labels from either end
_STUDENT, _TEACHER = "#1f5fa8", "#d9822b"


FORMATS = ("png", "svg", "pdf")


def picture(evaluation: Evaluation, file_format: str = "png") -> bytes:
    """A picture of about 2,400 x 1,700 pixels, in one of `FORMATS`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps state of its own and may want a display.
    figure = Figure(figsize=(16, 11.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    _curves(figure.add_subplot(grid[0, 0]), evaluation)
    _reliability(figure.add_subplot(grid[1, 0]), evaluation)
    _bars(figure.add_subplot(grid[:, 1]), evaluation)
    names = " and ".join(m.name for m in (evaluation.student, evaluation.teacher) if m)
    figure.suptitle(
        _plain(
            f"{names} against {evaluation.truth_name}: {evaluation.availability.scored:,} clips"
        ),
        fontsize=15,
    )
    file = io.BytesIO()
    figure.savefig(file, format=file_format)
    return file.getvalue()


def _curves(axes: Any, evaluation: Evaluation) -> None:
    student, teacher = evaluation.student, evaluation.teacher
    best_populated = np.argsort(-evaluation.positives, kind="stable")[:_CURVES]
    for index in best_populated[evaluation.positives[best_populated] > 0]:
        precision, recall = precision_recall(
            evaluation.truth[:, index], evaluation.scores[:, index]
        )
        name = _short(evaluation.labels[index].name, 24)
        count = evaluation.positives[index]
        axes.step(recall, precision, where="pre", lw=1, alpha=0.75, label=f"{name} ({count:,})")
    if evaluation.truth.any():
        precision, recall = precision_recall(evaluation.truth, evaluation.scores)
        micro = f"micro, {_short(student.name, 20)}: {student.card.mAP:.3f}"
        axes.step(recall, precision, where="pre", color=_STUDENT, lw=2.8, label=micro)
    if teacher and evaluation.teacher_scores is not None and evaluation.truth.any():
        precision, recall = precision_recall(evaluation.truth, evaluation.teacher_scores)
        micro = f"micro, {_short(teacher.name, 20)}: {teacher.card.mAP:.3f}"
        axes.step(recall, precision, where="pre", color=_TEACHER, lw=2.2, ls="--", label=micro)
    axes.set(
        title="Precision and recall: micro, and the labels with most positives",
        xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    # Beside the axes: curves may be anywhere in them.
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _reliability(axes: Any, evaluation: Evaluation) -> None:
    axes.plot([0, 1], [0, 1], color="0.5", lw=1, ls=":", label="as often true as the score says")
    models = [(evaluation.student, _STUDENT, "o-")]
    if evaluation.teacher:
        models.append((evaluation.teacher, _TEACHER, "s--"))
    for model, color, style in models:
        r = model.reliability
        held = r.pairs > 0
        axes.plot(
            r.mean_score[held], r.share_true[held], style, color=color, ms=5, lw=1.6,
            label=f"{_short(model.name, 20)}: ECE {r.ece:.4f}",
        )  # fmt: skip
    axes.set(
        title="Reliability, over all clips and labels",
        xlabel="mean score", ylabel="share that is true", xlim=(0, 1), ylim=(0, 1.02),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _bars(axes: Any, evaluation: Evaluation) -> None:
    least, ranked = ranked_labels(evaluation)
    cut = len(ranked) > 2 * _BARS
    shown = [*ranked[:_BARS], *ranked[-_BARS:]] if cut else ranked
    places = np.arange(len(shown), dtype=float)
    if cut:
        places[_BARS:] += 1  # a gap between the ends
        axes.axhline(_BARS, color="0.6", lw=0.8, ls=":")
    student, teacher = evaluation.student, evaluation.teacher
    axes.barh(
        places,
        student.label_precision[shown],
        color=_STUDENT,
        alpha=0.85,
        label=_short(student.name, 30),
    )
    low = student.label_precision[shown] - student.label_low[shown]
    high = student.label_high[shown] - student.label_precision[shown]
    if not np.isnan(low).all():
        known = ~np.isnan(low)  # rare labels have none
        bars = np.maximum([low[known], high[known]], 0)
        axes.errorbar(
            student.label_precision[shown][known], places[known], xerr=bars, fmt="none",
            ecolor="0.25", lw=1, label="95 % of the bootstrap",
        )  # fmt: skip
    if teacher:
        axes.plot(
            teacher.label_precision[shown], places, "D", color=_TEACHER, ms=5, label=_short(teacher.name, 30)
        )  # fmt: skip
    axes.set_yticks(
        places,
        [f"{_short(evaluation.labels[i].name, 32)} ({evaluation.positives[i]:,})" for i in shown],
        fontsize=9,
    )
    axes.invert_yaxis()
    which = (
        f"the {_BARS} highest and {_BARS} lowest of {len(ranked)}"
        if cut
        else f"all {len(ranked)} of them"
    )
    axes.set(
        title=f"Average precision of labels with {least} positives or more:\n{which}",
        xlabel="average precision", xlim=(0, 1.02),
    )  # fmt: skip
    axes.grid(axis="x", alpha=0.25)
    axes.margins(y=0.01)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)


def _short(text: str, length: int) -> str:
    return _plain(text if len(text) <= length else text[: length - 1] + "…")


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
