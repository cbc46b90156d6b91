"""What a training run came to, epoch by epoch: a CSV, and its curves as a picture."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

# The names that the model card and the curves know, in the order of the CSV's columns; the
# metrics are those of `evaluation.metrics`. A row may lack any but `epoch`, and have others.
COLUMNS = (
    "epoch", "step", "training_loss", "validation_loss",
    "f1", "roc_auc", "accuracy", "mAP",
    "macro_map", "macro_auc", "d_prime", "weighted_map", "lwlrap",
)  # fmt: skip

_LOSSES = {"training_loss": "training", "validation_loss": "validation"}
_SHOWN = {
    "f1": "F1 (micro, at 0.5)",
    "mAP": "mAP (micro)",
    "roc_auc": "ROC AUC (at 0.5)",
    "accuracy": "accuracy (exact match)",
    "macro_map": "macro mAP",
}
# Okabe and Ito's colours, which the colour-blind tell apart, and marks for print.
_STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v")
)  # fmt: skip
_MARKED_EPOCHS = 30

Row = Mapping[str, float | None]


def write_metrics_csv(path: Path, epochs: Sequence[Row]) -> None:
    """Writes the metrics of a run's epochs, one row each; the file is complete at every moment.

    What the file already says of epochs before the first of `epochs` stays, so that a
    resumed run may give its own epochs only. What it says of that epoch and of later ones is
    replaced: it is of a run that was given up. Without `epochs` the file stays as it is.

    Args:
        path: the CSV; its folder exists.
        epochs: numbers by name, with `epoch` in each; None, like an absent name, is an empty
            cell.

    Raises:
        ValueError: a row lacks `epoch` or holds something else than numbers, the epochs are
            not ascending, or the file that is there is no such CSV.
    """
    for row in epochs:
        for name, value in row.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(
                    f"{path}: {name} of epoch {row.get('epoch')} is {value!r}, no number"
                )
    numbers = [_epoch(row, path) for row in epochs]
    for before, after in itertools.pairwise(numbers):
        if before >= after:
            raise ValueError(
                f"{path}: epoch {after} follows epoch {before}, expected ascending ones"
            )
    if not epochs:
        return
    kept = read_metrics_csv(path) if path.exists() else []
    rows = [row for row in kept if _epoch(row, path) < numbers[0]] + list(epochs)

    present = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in COLUMNS if name in present]
    columns += [name for name in present if name not in COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # Python's own digits: a float is read back as it was
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.getvalue(), "utf-8")
    partial.replace(path)


def _epoch(row: Row, path: Path) -> float:
    epoch = row.get("epoch")
    if epoch is None or not math.isfinite(epoch):
        raise ValueError(f"{path}: a row's epoch is {epoch!r}, expected its number: {dict(row)}")
    return epoch


def read_metrics_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV of `write_metrics_csv`; whole numbers are int, empty cells are left out.

    Raises:
        ValueError: a cell holds no number, or a row has more or fewer cells than the header.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        columns = next(reader, [])
        rows = []
        for cells in reader:
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells under {len(columns)} "
                    "columns; the file was cut or edited: remove it, or mend the line"
                )
            rows.append(
                {
                    name: _number(cell, f"{path}, line {reader.line_num}, column {name!r}")
                    for name, cell in zip(columns, cells, strict=True)
                    if cell
                }
            )
    return rows


def _number(cell: str, place: str) -> float:
    try:
        return int(cell)
    except ValueError:
        pass
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"{place}: {cell!r}, expected a number or nothing") from error


def draw_curves(metrics: Sequence[Row], path_png: Path, title: str) -> None:
    """Draws the losses, and beside them F1, mAP, ROC AUC, accuracy and macro mAP, by epoch.

    What the rows lack is not drawn; a number that is not finite is a gap in its curve.

    Args:
        metrics: rows with `epoch` and any of `COLUMNS`.
        path_png: the picture to write, 150 dots an inch.
        title: above both panels, as plain text.

    Raises:
        ValueError: the rows hold none of the curves.
        ImportError: matplotlib is not installed.
    """
    # Not pyplot, whose figures and backend are the whole process's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = sorted(metrics, key=lambda row: _epoch(row, path_png))
    panels = []
    for names, heading, zero in (
        (_LOSSES, "Loss", False),
        (_SHOWN, "On the validation clips", True),
    ):
        curves = {label: _curve(rows, name) for name, label in names.items()}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if curves:
            panels.append((heading, curves, zero))
    if not panels:
        raise ValueError(
            f"{path_png}: {len(rows)} epochs hold none of {', '.join([*_LOSSES, *_SHOWN])}: there is "
            "nothing to draw"
        )

    figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, wrap=True, parse_math=False)
    for axes, (heading, curves, from_zero) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for (label, (epochs, values)), (colour, mark) in zip(curves.items(), _STYLES, strict=False):
            # Marks would run together in a long run, and a curve of one epoch has no line.
            axes.plot(
                epochs, values, label=label, color=colour, lw=1.6, clip_on=False,
                marker=mark if len(epochs) <= _MARKED_EPOCHS else None, markersize=4,
            )  # fmt: skip
        axes.set_title(heading, fontsize=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(color="0.88", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Below the panel, where no curve can run under it.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9
        )
    partial = path_png.with_name(f".{path_png.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(path_png)


def _curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one column, where it is there; both empty without a finite value."""
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    finite = [math.isfinite(value) for _, value in points]
    if not any(finite):
        return [], []
    return [epoch for epoch, _ in points], [
        value if is_finite else math.nan
        for (_, value), is_finite in zip(points, finite, strict=True)
    ]
