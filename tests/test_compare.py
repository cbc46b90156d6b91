"""`earmark compare`: two outputs over the same clips."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

from evaluation.scores import open_source
from pipeline import compare as comparing
from pipeline.cli import cli
from pipeline.compare import common_labels, compare
from student.labels import Label, audioset_labels

HOSTILE = "<script>\x1b[31m\u202e[red].wav"


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    folder = tmp_path_factory.mktemp("shards")
    clips = [(f"{n}.wav", encoded(noise(24_000 + 3_000 * n, seed=n))) for n in range(8)]
    make_tar(folder / "s-0.tar", [*clips[:5], (HOSTILE, encoded(noise(40_000, seed=99)))])
    make_tar(folder / "s-1.tar", [*clips[5:], ("broken.ogg", b"OggS, but no more")])
    return folder


@pytest.fixture(scope="module")
def annotate(tmp_path_factory, tiny_checkpoint):
    def run(inputs, *options, checkpoint=tiny_checkpoint):
        output = tmp_path_factory.mktemp("output") / "out"
        done = earmark("annotate", inputs, "-o", output, "--checkpoint", checkpoint, *options)
        assert done.exit_code == 0, done.output
        return output

    return run


@pytest.fixture(scope="module")
def one(annotate, shards):
    return annotate(shards, "--threshold", "0.9")


@pytest.fixture(scope="module")
def other(annotate, shards):
    """Other scores (the mean over chunks) and another threshold."""
    return annotate(shards, "--threshold", "0.8", "--pool", "mean")


def rows_of(output):
    rows = pq.read_table(output / "clips").to_pylist()
    return {row["clip_id"]: row for row in rows if row["error"] is None}


def test_an_output_agrees_with_itself(one):
    result = compare(open_source(str(one)), open_source(str(one)))
    assert (result.matched, result.clips) == (10, 9)
    assert (result.unscored_a, result.unscored_b, result.only_a, result.only_b) == (1, 1, 0, 0)
    assert (result.flipped, result.gained, result.lost, result.changes) == (0, 0, 0, [])
    assert (result.same_top, result.jaccard, result.rank_correlation) == (1, 1, 1)
    assert result.differences == [] and result.notes == [] and result.mean_change == 0


def test_shifts_flips_and_agreement_are_those_of_a_slow_reading(one, other):
    result = compare(open_source(str(one)), open_source(str(other)), changes=3)
    left, right = rows_of(one), rows_of(other)
    assert set(left) == set(right) and result.clips == len(left)
    ids = sorted(left)
    a, b = (np.array([of[i]["scores"] for i in ids], np.float32) for of in (left, right))
    ta, tb = ([{t["name"] for t in of[i]["tags"]} for i in ids] for of in (left, right))
    assert result.flipped == sum(x != y for x, y in zip(ta, tb, strict=True)) > 0
    assert result.gained == sum(len(y - x) for x, y in zip(ta, tb, strict=True)) > 0
    assert result.lost == sum(len(x - y) for x, y in zip(ta, tb, strict=True))
    either = [(x & y, x | y) for x, y in zip(ta, tb, strict=True) if x | y]
    assert result.jaccard == pytest.approx(np.mean([len(x) / len(y) for x, y in either]))
    assert result.same_top == np.mean(a.argmax(1) == b.argmax(1))
    ranks = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert result.rank_correlation == pytest.approx(np.mean(ranks), abs=1e-3)
    assert result.mean_change == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    for shift in result.labels[::17]:
        index = next(label.index for label in audioset_labels() if label.name == shift.name)
        assert shift.mean_a == pytest.approx(a[:, index].mean(), abs=1e-6)
        assert shift.mean_b == pytest.approx(b[:, index].mean(), abs=1e-6)
        assert shift.mean_change == pytest.approx(np.abs(a - b)[:, index].mean(), abs=1e-6)
        assert shift.tags_a == sum(shift.name in of for of in ta)
        assert shift.tags_b == sum(shift.name in of for of in tb)
        assert shift.tags_b == shift.tags_a + shift.gained - shift.lost
        both = sum(shift.name in x and shift.name in y for x, y in zip(ta, tb, strict=True))
        any_ = sum(shift.name in x or shift.name in y for x, y in zip(ta, tb, strict=True))
        assert shift.agreement == (both / any_ if any_ else None)
    most = np.abs(a - b).max(axis=1)
    flips = [len(x ^ y) for x, y in zip(ta, tb, strict=True)]
    order = sorted(range(len(ids)), key=lambda i: (-flips[i], -most[i]))[:3]
    expected = [ids[i] for i in order]
    assert [change.row["clip_id"] for change in result.changes] == expected
    first = result.changes[0]
    assert abs(first.a - first.b) == pytest.approx(most[order[0]], abs=1e-6)
    assert result.largest_change == pytest.approx(most.max(), abs=1e-6)
    assert [name for name, _, _ in result.differences] == ["pool", "thresholds"]


def test_other_thresholds_alone_are_changes_of_clips(one, annotate, shards):
    lower = annotate(shards, "--threshold", "0.8")
    result = compare(open_source(str(one)), open_source(str(lower)), changes=100)
    assert result.largest_change == 0 and result.gained > 0
    assert len(result.changes) == result.flipped > 0
    gained = [len(change.gained) for change in result.changes]
    assert gained == sorted(gained, reverse=True) and sum(gained) == result.gained
    assert all(change.label in change.gained for change in result.changes)
    shown = earmark("compare", one, lower).output
    assert "most changed clips" in shown and "+" in shown


def test_clips_are_matched_by_bytes_where_they_lie_elsewhere(
    one, annotate, shards, make_tar, tmp_path, encoded, noise
):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(shards / "s-1.tar", moved / "other-name.tar")
    # The same member with other bytes is another clip.
    make_tar(moved / "new.tar", [("0.wav", encoded(noise(7_000, seed=70)))])
    result = compare(open_source(str(one)), open_source(str(annotate(moved, "--threshold", "0.9"))))
    assert result.matched_by == {"clip_id": 0, "audio_xxh128 and member": 4}
    assert (result.clips, result.only_a, result.only_b) == (3, 6, 1)
    assert result.notes == [
        "6 clips are only in A and left out.",
        "1 clip is only in B and left out.",
    ]
    assert result.mean_change == 0, "each clip has met itself"


def test_rows_of_b_may_lie_in_any_order(one, other, tmp_path, monkeypatch):
    """Row groups of two rows, from the last to the first, and one of them held at a time."""
    shuffled = shutil.copytree(other, tmp_path / "out")
    for file in (shuffled / "clips").glob("*.parquet"):
        table = pq.read_table(file)
        backwards = table.take(list(range(table.num_rows))[::-1])
        pq.write_table(backwards, file, row_group_size=2)
    monkeypatch.setattr(comparing, "_GROUPS_HELD", 1)
    straight = compare(open_source(str(one)), open_source(str(other)))
    found = compare(open_source(str(one)), open_source(str(shuffled)))
    assert found.labels == straight.labels and found.flipped == straight.flipped


def test_labels_are_matched_by_mid_else_by_name():
    a = [
        Label(0, "/m/1", "Dog"),
        Label(1, "", "Bees"),
        Label(2, "/m/3", "Cat"),
        Label(3, "", "Owl"),
    ]
    b = [
        Label(0, "", "Bees"),
        Label(1, "/m/1", "Hound"),
        Label(2, "/m/9", "Cat"),
        Label(3, "/m/4", "Owl"),
    ]
    common, only_a, only_b = common_labels(a, b)
    assert [(x.name, y.name) for x, y in common] == [
        ("Dog", "Hound"),
        ("Bees", "Bees"),
        ("Owl", "Owl"),
    ]
    assert (only_a, only_b) == (1, 1)


def test_two_label_sets(one, annotate, shards, make_checkpoint, tmp_path):
    names = ["Speech", "Frogs of the north", "Dog", "Music"]
    few = annotate(shards, checkpoint=make_checkpoint(tmp_path / "few", names))
    result = compare(open_source(str(one)), open_source(str(few)))
    assert [shift.name for shift in result.labels] == ["Speech", "Dog", "Music"]
    assert (result.labels_only_a, result.labels_only_b) == (524, 1)
    assert "3 labels are in both" in result.notes[0]
    left, right = rows_of(one), rows_of(few)
    dog = next(label.index for label in audioset_labels() if label.name == "Dog")
    assert result.labels[1].mean_a == pytest.approx(
        np.mean([r["scores"][dog] for r in left.values()])
    )
    assert result.labels[1].mean_b == pytest.approx(
        np.mean([r["scores"][2] for r in right.values()])
    )
    none = annotate(shards, checkpoint=make_checkpoint(tmp_path / "none", ["Frogs", "Newts"]))
    done = earmark("compare", one, none)
    assert done.exit_code == 2 and "no label in common" in done.output


def test_the_command_says_it_writes_it_and_shows_it(one, other, tmp_path):
    page, file = tmp_path / "c.html", tmp_path / "c.json"
    done = earmark("compare", one, other, "--to", page, "--save", file)
    assert done.exit_code == 0, done.output
    assert "Clips in both" in done.output and "pool: max in A, mean in B" in done.output
    assert "9 clips with sound" in done.output
    assert "\x1b[31m" not in done.output and "\u202e" not in done.output
    whole = json.loads(file.read_text("utf-8"))
    assert (whole["clips"], len(whole["labels"]), len(whole["changes"])) == (9, 527, 9)
    assert any(HOSTILE in change["clip_id"] for change in whole["changes"])
    printed = earmark("compare", one, other, "--json")
    assert json.loads(printed.stdout) == whole
    html = page.read_text("utf-8")
    assert HOSTILE not in html and html.count("<script") == 2
    assert "\\\\x1b[31m\\\\u202e[red]" in html


def test_the_page_of_a_comparison_works_in_a_browser(chromium, one, other, tmp_path):
    page = tmp_path / "c.html"
    assert earmark("compare", one, other, "--to", page).exit_code == 0
    chromium.open(page, width=400)
    names = chromium.run("[...document.querySelectorAll('.card .name')].map((n) => n.textContent)")
    assert len(names) == 9 and "<script>\\x1b[31m\\u202e[red].wav" in names
    chromium.run("document.querySelector('audio').play()")
    chromium.until("document.querySelector('audio').currentTime > 0.1")
    assert chromium.run("document.documentElement.scrollWidth") <= 400
    said = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
    assert [message for message in chromium.said if message["method"] in said] == []


def test_what_cannot_be_compared_is_said(one, annotate, make_tar, encoded, noise, tmp_path):
    away = make_tar(tmp_path / "away.tar", [("x.wav", encoded(noise(8_000, seed=5)))])
    for arguments, said in (
        ((one, tmp_path / "none"), "run.json"),
        ((one, annotate(away)), "no clip in common"),
        ((one, one, "--save", tmp_path / "no" / "c.json"), "there is no folder"),
    ):
        done = earmark("compare", *arguments)
        assert done.exit_code == 2 and said in done.output, done.output
