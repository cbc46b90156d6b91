"""Metrics by epoch: the CSV and the picture."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from training.curves import COLUMNS, draw_curves, read_metrics_csv, write_metrics_csv


def epochs(first, last, **other):
    return [
        {
            "epoch": number,
            "step": 153 * number,
            "training_loss": 1.6 / number,
            "validation_loss": 0.3 + 0.5 / number,
            "f1": 0.5 - 0.1 / number,
            "roc_auc": 0.73 - 0.05 / number,
            "accuracy": 0.07 - 0.05 / number,
            "mAP": 0.48 - 0.15 / number,
            "macro_map": 0.4 - 0.2 / number,
            **other,
        }
        for number in range(first, last + 1)
    ]


def test_what_is_written_is_read_back(tmp_path):
    file = tmp_path / "metrics.csv"
    rows = [
        {"epoch": 0.1, "step": 3, "training_loss": 0.1 + 0.2, "d_prime": math.inf},
        {"epoch": 1, "step": 6, "training_loss": 1e-17, "seconds": 2.5, "f1": None},
    ]
    write_metrics_csv(file, rows)
    assert read_metrics_csv(file) == [
        rows[0],
        {name: value for name, value in rows[1].items() if value is not None},
    ]
    assert type(read_metrics_csv(file)[1]["step"]) is int
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_known_columns_come_first_in_their_order_and_others_after(tmp_path):
    file = tmp_path / "metrics.csv"
    write_metrics_csv(file, [{"seconds": 1, "f1": 0.5, "epoch": 1}, {"epoch": 2, "step": 9}])
    with file.open(newline="") as stream:
        assert next(csv.reader(stream)) == ["epoch", "step", "f1", "seconds"]
    assert set(epochs(1, 1)[0]) <= set(COLUMNS)


def test_a_nan_stays_one(tmp_path):
    write_metrics_csv(tmp_path / "metrics.csv", [{"epoch": 1, "f1": math.nan}])
    assert math.isnan(read_metrics_csv(tmp_path / "metrics.csv")[0]["f1"])


def test_a_resumed_run_keeps_the_epochs_before_it(tmp_path):
    file = tmp_path / "metrics.csv"
    write_metrics_csv(file, epochs(1, 5))
    write_metrics_csv(file, epochs(4, 4, f1=0.9))  # resumed from the checkpoint of epoch 3
    assert read_metrics_csv(file) == epochs(1, 3) + epochs(4, 4, f1=0.9)
    write_metrics_csv(file, epochs(5, 6, lwlrap=0.3))
    assert read_metrics_csv(file) == (
        epochs(1, 3) + epochs(4, 4, f1=0.9) + epochs(5, 6, lwlrap=0.3)
    )


def test_a_run_of_its_own_keeps_nothing_of_another(tmp_path):
    file = tmp_path / "metrics.csv"
    write_metrics_csv(file, epochs(1, 5))
    write_metrics_csv(file, epochs(1, 2))
    assert read_metrics_csv(file) == epochs(1, 2)


def test_no_epochs_change_nothing(tmp_path):
    file = tmp_path / "metrics.csv"
    write_metrics_csv(file, [])
    assert not file.exists()
    write_metrics_csv(file, epochs(1, 2))
    write_metrics_csv(file, [])
    assert read_metrics_csv(file) == epochs(1, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"f1": 0.5}], "a row's epoch is None"),
        ([{"epoch": math.nan}], "a row's epoch is nan"),
        ([{"epoch": 1, "f1": "good"}], "f1 of epoch 1 is 'good', no number"),
        ([{"epoch": 1, "f1": True}], "f1 of epoch 1 is True, no number"),
        ([{"epoch": 2}, {"epoch": 2}], "epoch 2 follows epoch 2"),
    ],
)
def test_rows_that_are_no_metrics_are_refused_and_the_file_stays(tmp_path, rows, message):
    file = tmp_path / "metrics.csv"
    write_metrics_csv(file, epochs(1, 2))
    with pytest.raises(ValueError, match=message):
        write_metrics_csv(file, rows)
    assert read_metrics_csv(file) == epochs(1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,f1\n1,good\n", "line 2, column 'f1': 'good', expected a number"),
        ("epoch,f1\n1,0.5\n2\n", "line 3: 1 cells under 2 columns"),
    ],
)
def test_a_damaged_file_is_told_by_its_line(tmp_path, text, message):
    file = tmp_path / "metrics.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics_csv(file)
    with pytest.raises(ValueError, match=message):
        write_metrics_csv(file, epochs(3, 3))
    assert file.read_text() == text


def colours(picture):
    """The colours that a picture holds, as hexadecimal RGB."""
    red, green, blue = (imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3).T
    return {f"#{colour:06X}" for colour in np.unique(red << 16 | green << 8 | blue)}


BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def test_the_picture_shows_a_curve_of_each_metric(tmp_path):
    draw_curves(epochs(1, 10), tmp_path / "curves.png", "A student")
    assert {BLUE, ORANGE, GREEN, PINK, "#000000", "#FFFFFF"} <= colours(tmp_path / "curves.png")
    height, width = imread(tmp_path / "curves.png").shape[:2]
    assert (height, width) == (690, 1560)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_what_was_not_measured_is_not_drawn(tmp_path):
    file = tmp_path / "curves.png"
    rows = [{"epoch": row["epoch"], "training_loss": row["training_loss"]} for row in epochs(1, 3)]
    draw_curves(rows, file, "A student")
    assert BLUE in colours(file) and not {ORANGE, GREEN} & colours(file)
    assert imread(file).shape[1] == 780  # one panel


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        (epochs(1, 1), "one epoch"),
        ([*epochs(1, 3), {"epoch": 4, "f1": math.nan, "training_loss": math.inf}], "gaps"),
        (epochs(1, 3), r"$\frac{ _x_ {} 100 % \n & <b>"),
        (epochs(1, 3), "a name as long as names of folders can be, " * 5),
    ],
)
def test_odd_numbers_and_titles_are_drawn(tmp_path, rows, title):
    draw_curves(rows, tmp_path / "curves.png", title)
    assert {BLUE, ORANGE} <= colours(tmp_path / "curves.png")


def test_a_number_that_is_not_finite_is_a_gap_and_not_zero(tmp_path):
    pictures = []
    for number, value in enumerate([math.nan, math.inf, 0.0]):
        rows = [{"epoch": 1, "f1": 0.5}, {"epoch": 2, "f1": value}, {"epoch": 3, "f1": 0.6}]
        draw_curves(rows, tmp_path / f"{number}.png", "A student")
        pictures.append(imread(tmp_path / f"{number}.png"))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("rows", [[], [{"epoch": 1, "step": 3, "f1": math.nan}]])
def test_without_a_curve_there_is_no_picture(tmp_path, rows):
    with pytest.raises(ValueError, match="there is nothing to draw"):
        draw_curves(rows, tmp_path / "curves.png", "A student")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from training.curves import draw_curves; "
        "assert 'matplotlib' not in sys.modules; "
        "draw_curves([{'epoch': 1, 'f1': 0.5}], Path(sys.argv[1]), 'x'); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
    assert (tmp_path / "curves.png").exists()
