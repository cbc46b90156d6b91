"""`earmark evaluate`, from scores to tables, and the command end to end."""

import csv
import importlib.util
import io
import json
import math
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console
from sklearn.metrics import average_precision_score

from evaluation import metrics, present
from evaluation.evaluate import Interval, agreement_of, evaluate
from evaluation.provenance import learned_from, write_learned
from evaluation.scores import EvaluationError, names_of, open_source
from evaluation.truth import Truth, read_truth, resolve
from pipeline.cli import cli
from student.checkpoint import read_checkpoint
from student.labels import Label, audioset_labels

NAMES = [label.name for label in audioset_labels()]


@pytest.fixture(scope="module")
def shard(tmp_path_factory, make_tar, encoded, noise):
    """Twelve clips, of which one is broken, with a truth in their metadata."""
    members = []
    for number in range(12):
        tone = np.sin(np.arange(16_000) * (0.02 + 0.03 * number)).astype(np.float32)
        sound = b"broken" if number == 7 else encoded(tone + noise(16_000, number), format="flac")
        labels = ["Speech", "Music", "Dog"][: 1 + number % 3]
        about = {"labels": labels, "recording": f"r{number // 2}"}
        members += [(f"c{number}.flac", sound), (f"c{number}.json", json.dumps(about).encode())]
    return make_tar(tmp_path_factory.mktemp("evaluate") / "shard.tar", members)


@pytest.fixture(scope="module")
def output(tmp_path_factory, shard, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("evaluate") / "out"
    command = [
        "annotate",
        str(shard),
        "--output",
        str(folder),
        "--checkpoint",
        str(tiny_checkpoint),
    ]
    assert CliRunner().invoke(cli, command).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def rows(output):
    return pq.read_table(output / "clips").to_pylist()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, rows):
    """A file of scores that are nearer to the truth, of all clips but one."""
    random = np.random.default_rng(1)
    kept = [row for row in rows if row["error"] is None][:-1]
    scores = random.random((len(kept), 527)).astype(np.float16) * 0.4
    for row, of_row in zip(kept, scores, strict=True):
        for name in json.loads(row["metadata"])["labels"]:
            of_row[NAMES.index(name)] = 0.75
    column = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 527)
    file = tmp_path_factory.mktemp("evaluate") / "teacher.parquet"
    stems = [row["member"].removesuffix(".flac") for row in kept]
    pq.write_table(pa.table({"clip_id": stems, "scores": column}), file)
    return file


def run(*arguments, code=0):
    done = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


# ------------------------------------------------------------------ the command


def test_numbers_are_those_of_the_rows(output, rows, tmp_path):
    asked = ["evaluate", str(output), "--truth", "metadata:labels", "--bootstrap", "0"]
    done = CliRunner().invoke(cli, [*asked, "--json", "--save", str(tmp_path / "e.json")])
    said = json.loads((tmp_path / "e.json").read_text())
    assert json.loads(done.stdout) == said  # and nothing beside it

    scored = [row for row in rows if row["error"] is None]
    scores = np.array([row["scores"] for row in scored], np.float32)
    truth = np.zeros(scores.shape, bool)
    for number, row in enumerate(scored):
        for name in json.loads(row["metadata"])["labels"]:
            truth[number, NAMES.index(name)] = True
    micro = average_precision_score(truth, scores, average="micro")
    assert said["student"]["card"]["mAP"] == pytest.approx(micro)
    dog = NAMES.index("Dog")
    by_name = {label["name"]: label for label in said["labels"]}
    own = average_precision_score(truth[:, dog], scores[:, dog])
    assert by_name["Dog"]["student"]["average_precision"] == pytest.approx(own)
    assert by_name["Dog"]["positives"] == truth[:, dog].sum()
    assert by_name["Cat"]["student"]["average_precision"] is None
    field = metrics.as_dict(metrics.field_metrics(truth, scores))
    assert said["student"]["field"] == pytest.approx(field)
    assert said["student"]["intervals"]["mAP"] == [None, None]

    available = said["availability"]
    assert (available["truth_clips"], available["scored"]) == (12, 11)
    assert available["failed"] == {"decode/InvalidDataError": 1}
    assert available["labels_without_positives"] == 524
    assert said["student"]["clips_per_s"] > 0 and said["student"]["audio_s_per_s"] > 0


def test_what_could_not_be_compared_is_said(output, tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text(
        "file,labels\nc0.flac,Speech\nc1.flac,Wolpertinger\nc7.flac,Dog\nc99.flac,Dog\nc98.flac,Dog\n"
    )
    said = run(output, "--truth", truth, "--bootstrap", 0)
    said = re.sub(r"\s+", " ", said)
    assert "2 of the truth's 5 clips are compared, on 527 of 527 labels, 1 of which" in said
    assert "526 labels have no positive" in said
    assert "1 clips of the truth failed to decode: InvalidDataError." in said
    assert "2 clips of the truth have no row, such as c99.flac, c98.flac." in said
    assert "9 scored clips are not in the truth." in said
    assert "Joined by member (2)." in said
    assert (
        "1 labels of the truth are none of the checkpoint's and were skipped: Wolpertinger (1)."
        in said
    )
    assert "Of 1 compared clips no label of the checkpoint is true." in said


def test_teacher_and_student_side_by_side(output, rows, teacher, tmp_path):
    files = {name: tmp_path / f"e.{name}" for name in ("json", "md", "csv", "png")}
    options = ["--save", files["json"], "--markdown", files["md"], "--per-label", files["csv"],
               "--picture", files["png"], "--bootstrap", 50]  # fmt: skip
    shown = run(output, "--truth", "metadata:labels", "--teacher", teacher, *options)
    assert "How near tiny is to teacher" in shown
    assert "The teacher's are joined by file name without suffix (10)." in shown

    said = json.loads(files["json"].read_text())
    assert said["availability"]["teacher_lacks"] == 1
    assert said["availability"]["scored"] == 10
    # All true labels have 0.75 and none other more than 0.4.
    assert said["teacher"]["card"] == {"f1": 1, "roc_auc": 1, "accuracy": 1, "mAP": 1}
    assert said["teacher"]["field"]["macro_map"] == 1
    assert said["teacher"]["field"]["d_prime"] is None  # infinite
    gap = said["agreement"]["differences"]["macro_map"]
    assert gap["value"] == pytest.approx(said["student"]["field"]["macro_map"] - 1)
    assert gap["low"] < gap["high"] < 0
    assert said["availability"]["joined_by"] == {"clip_id": 11}
    assert said["availability"]["teacher_joined_by"] == {"file name without suffix": 10}
    of_many = said["by_positives"][-1]
    assert (of_many["low"], of_many["labels"]) == (10, 1)  # Speech
    assert of_many["teacher_map"] == {"value": 1, "low": 1, "high": 1}
    by_name = {label["name"]: label for label in said["labels"]}
    assert by_name["Dog"]["positives"] == 3
    assert by_name["Dog"]["student"]["low"] is None  # too few for an interval
    for name in ("Speech", "Music", "Dog"):
        own = by_name[name]["student"]["average_precision"]
        assert by_name[name]["gap"] == pytest.approx(own - 1)
    assert by_name["Cat"]["gap"] is None

    table = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert [row["name"] for row in table] == NAMES
    speech = table[0]
    dog = next(row for row in table if row["name"] == "Dog")
    assert (dog["positives"], dog["low"], dog["high"]) == ("3", "", "")
    assert float(speech["gap"]) == pytest.approx(float(speech["average_precision"]) - 1, abs=1e-6)
    assert float(speech["low"]) <= float(speech["average_precision"]) <= float(speech["high"])
    assert next(row for row in table if row["name"] == "Cat")["average_precision"] == ""

    text = files["md"].read_text()
    folded = text.split("<details><summary>Each of 3 labels</summary>\n\n")[1].split("</details>")[
        0
    ]
    lines = [line.split(" | ") for line in folded.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| label", "positives", "AP", "95 %", "AP of teacher", "gap |"]
    assert {line[0] for line in lines[1:]} == {"| Speech", "| Music", "| Dog"}
    by_label = {line[0]: line for line in lines}
    assert by_label["| Dog"][5] == f"{by_name['Dog']['gap']:+.3f} |"
    assert by_label["| Dog"][3] == ""
    assert "fewer than 10 positives have no interval" in folded
    assert "| Model | F1 | ROC AUC | Accuracy | mAP |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    image = files["png"].read_bytes()
    assert image.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width > 2_000 and height > 1_500


def test_an_output_as_its_own_truth_is_perfect(output, tmp_path):
    """The tags of an output are the scores from the threshold that it was made with."""
    for more in ([], ["--truth-threshold", "0.2"]):
        file = tmp_path / "e.json"
        run(output, "--truth", output, "--save", file, "--bootstrap", 0, *more)
        said = json.loads(file.read_text())
        assert said["student"]["field"]["macro_map"] == 1
        assert said["availability"]["joined_by"] == {"clip_id": 11}
        assert said["availability"]["own_tags_are_truth"]
        assert said["student"]["tags"]["total"]["micro_f1"] == 1
    shown = run(output, "--truth", output, "--teacher", output, "--save", file, "--bootstrap", 50)
    assert "The truth is what the output is tagged with, tag for tag" in shown
    assert "The teacher's scores are the student's own" in shown
    assert f"Wrote {file}" in shown
    said = json.loads(file.read_text())
    assert said["availability"]["teacher_is_student"]
    assert (said["student"]["name"], said["teacher"]["name"]) == ("tiny, student", "tiny, teacher")
    agreement = said["agreement"]
    assert (agreement["top1"], agreement["top5_jaccard"]) == (1, 1)
    assert agreement["kl"] == pytest.approx(0, abs=1e-9)
    assert agreement["differences"]["f1"] == {"value": 0, "low": 0, "high": 0}


def test_the_tags_of_an_output_are_judged_as_they_are(output, rows, tmp_path):
    """By hand; and retagging changes them, and nothing else."""
    run(output, "--truth", "metadata:labels", "--save", tmp_path / "e.json", "--bootstrap", 0)
    before = json.loads((tmp_path / "e.json").read_text())["student"]
    scored = [row for row in rows if row["error"] is None]
    tags = [{tag["name"] for tag in row["tags"]} for row in scored]
    true = [set(json.loads(row["metadata"])["labels"]) for row in scored]
    right = sum(len(mine & theirs) for mine, theirs in zip(tags, true, strict=True))
    found = before["tags"]
    assert found["tags"] == sum(map(len, tags)) > 0
    assert found["clips"] == sum(map(bool, tags))
    assert found["total"]["micro_precision"] == pytest.approx(right / found["tags"], abs=1e-4)
    assert found["total"]["micro_recall"] == pytest.approx(right / sum(map(len, true)), abs=1e-4)

    again = tmp_path / "again"
    command = ["retag", str(output), "--output", str(again), "--threshold", "0.99999"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    shown = run(
        again, "--truth", "metadata:labels", "--save", tmp_path / "e.json", "--bootstrap", 0
    )
    after = json.loads((tmp_path / "e.json").read_text())["student"]
    assert (after["card"], after["field"]) == (before["card"], before["field"])
    left = sum(score >= 0.99999 for row in scored for score in row["scores"])
    assert after["tags"]["tags"] == left < before["tags"]["tags"]
    assert "The tags that the output has" in shown


def test_clips_of_a_recording_are_resampled_together(output, tmp_path):
    file = tmp_path / "e.json"
    common = (output, "--truth", "metadata:labels", "--bootstrap", 50, "--save", file)
    run(*common)
    alone = json.loads(file.read_text())
    shown = run(*common, "--group-by", "recording")
    together = json.loads(file.read_text())
    assert (alone["bootstrap"]["groups"], together["bootstrap"]["groups"]) == (None, 6)
    assert alone["student"]["intervals"]["f1"] != together["student"]["intervals"]["f1"]
    assert "50 bootstrap replicates of 6 groups of clips." in re.sub(r"\s+", " ", shown)


def test_scores_without_tags_have_none_to_judge(output, teacher, tmp_path):
    run(teacher, "--truth", output, "--save", tmp_path / "e.json", "--bootstrap", 0)
    assert json.loads((tmp_path / "e.json").read_text())["student"]["tags"] is None
    # What another tool calls tags is none of an output's, and no obstacle.
    table = pq.read_table(teacher)
    for column in (pa.array([["dog"]] * len(table)), pa.nulls(len(table))):
        pq.write_table(table.append_column("tags", column), tmp_path / "t.parquet")
        run(tmp_path / "t.parquet", "--truth", output, "--bootstrap", 0)


def test_audio_is_annotated_first(output, shard, tiny_checkpoint, tmp_path):
    made, again = tmp_path / "made.json", tmp_path / "again.json"
    common = ["--truth", "metadata:labels", "--bootstrap", 0]
    folder = tmp_path / "kept"
    run("--checkpoint", tiny_checkpoint, shard, "--output", folder, *common, "--save", made)
    assert (folder / "run.json").is_file()
    run(output, *common, "--save", again)
    made, again = (json.loads(file.read_text()) for file in (made, again))
    assert made["labels"] == again["labels"]
    said = run("--checkpoint", tiny_checkpoint, shard, *common)  # into a temporary folder
    assert "11 of the truth's 12 clips" in said
    said = run("--checkpoint", tiny_checkpoint, shard, *common, "--limit", 3)
    assert "3 of the truth's 3 clips" in said


def test_audio_is_annotated_as_it_is_asked_for(shard, tiny_checkpoint, tmp_path):
    run("--checkpoint", tiny_checkpoint, shard, "--output", tmp_path / "out", "--bootstrap", 0,
        "--truth", "metadata:labels", "--pool", "mean", "--dtype", "bfloat16")  # fmt: skip
    scoring = json.loads((tmp_path / "out" / "run.json").read_text())["scoring"]
    assert (scoring["pool"], scoring["dtype"]) == ("mean", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--truth", "no.csv"], "'no.csv' cannot be read"),
        (["--truth", "t.csv", "--label-column", "what"], "not 'what'"),
        (["--truth", "other.csv"], "none of the 1 labels of other.csv"),
        (["--truth", "metadata:labels", "--clip-column", "id"], "are of a table"),
        (["--truth", "metadata:labels", "--truth-threshold", "0.3"], "states labels; leave it out"),
        (["--truth", "t.csv", "--labels-at-least", "3"], "the most is 2"),
        (["--truth", "t.csv", "--thresholds", "t.json", "--folds", "4"], "3 clips cannot be dealt"),
        (["--truth", "metadata:labels", "--teacher", "no.parquet"], "'no.parquet' cannot be read"),
    ],
)
def test_what_is_of_no_use_is_said_before_anything_is_annotated(
    shard, tiny_checkpoint, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("id,labels\nc0,Dog\nc1,Dog\nc2,Cat\n")
    (tmp_path / "other.csv").write_text("id,labels\nc0,Wolpertinger\n")
    shown = run("--checkpoint", tiny_checkpoint, shard, "--output", "out", *arguments, code=2)
    assert said in re.sub(r"\s+", " ", shown)
    assert not (tmp_path / "out").exists()


def test_thresholds_are_fitted_on_what_was_compared(output, tmp_path):
    file = tmp_path / "t.json"
    said = run(output, "--truth", "metadata:labels", "--bootstrap", 0, "--thresholds", file,
               "--folds", 3, "--group-by", "recording")  # fmt: skip
    assert "Thresholds, on clips that the fit did not see" in said
    assert re.search(r"The truth has \d\d labels in all: below 100, thresholds and", said)
    assert "--group-by recording: 11 clips in 6 groups; 0 clips without it" in said
    fitted = json.loads(file.read_text())
    assert fitted["fitted_on"]["clips"] == 11
    assert fitted["fitted_on"]["groups"] == 6
    run_json = json.loads((output / "run.json").read_text())
    assert fitted["fitted_on"]["weights_sha256"] == run_json["checkpoint"]["weights_sha256"]


def test_an_output_and_a_truth_in_cloud_storage(output, rows, earmark, tmp_path):
    from bench.stand_ins import CloudStorage

    with CloudStorage("tags") as cloud:
        for file in output.rglob("*"):
            if file.is_file():
                cloud.put("tags", f"out/{file.relative_to(output)}", file.read_bytes())
        lines = [f"{row['member']};Speech" for row in rows]
        cloud.put("tags", "truth.csv", "\n".join(["file;label", *lines]).encode())
        options = ["--bootstrap", 0, "--save", tmp_path / "e.json", "--billing-project", "p"]
        earmark(cloud.env, "evaluate", "gs://tags/out", "--truth", "gs://tags/truth.csv", *options)
        said = json.loads((tmp_path / "e.json").read_text())
        assert said["availability"]["scored"] == 11
        assert said["availability"]["failed"] == {"decode/InvalidDataError": 1}
        gone = earmark(cloud.env, "evaluate", "gs://tags/no", "--truth", "metadata:x", code=2)
        assert "has no run.json" in gone
        gone = earmark(
            cloud.env, "evaluate", "gs://tags/out", "--truth", "gs://tags/no.csv", code=2
        )
        assert "'gs://tags/no.csv' cannot be read: No such file" in gone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--truth", "metadata:labels"], "has no run.json"),
        (["SHARD", "--truth", "metadata:labels"], "audio is annotated first (earmark annotate, or"),
        (
            ["OUT", "--truth", "metadata:labels", "--group-by", "recording", "--bootstrap", "0"],
            "--group-by is for --thresholds and --bootstrap",
        ),
        (["OUT", "--truth", "metadata:labels", "--limit", "3"], "--limit is of the annotation"),
        (["OUT", "--truth", "metadata:labels", "--picture", "e.jpg"], "ends in .png, .svg, .pdf"),
        (["OUT", "OUT", "--truth", "metadata:labels"], "2 outputs were given"),
        (["OUT", "--truth", "metadata:labels", "--output", "x"], "name the checkpoint too"),
        (["OUT", "--truth", "metadata:labels", "--target-precision", "0.9"], "is for --thresholds"),
        (["OUT", "--truth", "metadata:labels", "--save", "no/where/e.json"], "there is no folder"),
        (["OUT", "--truth", "metadata:recording"], "none of the 6 labels of metadata:recording"),
        (
            ["OUT", "--truth", "metadata:labels", "--labels-at-least", "99"],
            "lower --labels-at-least",
        ),
        (["OUT", "--truth", "metadata:labels", "--teacher", "no.parquet"], "cannot be read"),
        (
            ["OUT", "--truth", "metadata:labels", "--thresholds", "t.json", "--folds", "50"],
            "11 clips cannot be dealt into 50",
        ),
        (["OUT", "--truth", "metadata:labels", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["OUT", "--truth", "metadata:labels", "--bootstrap", "49"], "too few for an interval"),
        (["OUT", "--truth", "metadata:labels", "--pool", "mean"], "--pool is of the annotation"),
        (["OUT", "--truth", "metadata:labels", "--save", "."], "it is a folder"),
        (
            ["OUT", "--truth", "metadata:labels", "--thresholds", "t.json", "--group-by", "take"],
            "none of the 11 compared clips",
        ),
        (
            ["--checkpoint", "CKPT", "nothing.tar", "--truth", "metadata:labels"],
            "'nothing.tar' does not exist",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    output, shard, tiny_checkpoint, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    named = {"OUT": output, "SHARD": shard, "CKPT": tiny_checkpoint}
    shown = run(*(named.get(argument, argument) for argument in arguments), code=2)
    assert said in re.sub(r"\s+", " ", shown) and shown.count("Error:") == 1
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_truth_of_other_clips_says_what_both_are_named(output, tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text("file,labels\nelsewhere.wav,Dog\n")
    said = run(output, "--truth", truth, code=2)
    assert "'elsewhere.wav'" in said and "c0.flac'" in said


def test_a_picture_without_matplotlib_says_how_to_get_it(output, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else find(name, *a),
    )
    said = run(output, "--truth", "metadata:labels", "--picture", tmp_path / "e.png", code=2)
    assert "pip install --editable '.[train]'" in said


def test_the_largest_gaps_are_shown_beside_a_teacher(output):
    source = open_source(str(output))
    names = tuple(NAMES[:12])
    clips = [row.as_py() for row in pq.read_table(output / "clips")["member"]][:6]
    truth = Truth("t", tuple(clips), tuple(map(names_of, clips)), (*[names] * 5, ()))
    evaluation = evaluate(source, truth, teacher=source, replicates=0)
    # Not from any model: gaps of -0.12, -0.11 and so on, in the labels' order.
    teacher = replace(
        evaluation.teacher,
        label_precision=evaluation.student.label_precision + 0.12 - np.arange(527) / 100,
    )
    console = Console(file=io.StringIO(), width=200)
    present.show(replace(evaluation, teacher=teacher), console)
    title, _, *rows = console.file.getvalue().split("\n\n")[-1].splitlines()
    assert (
        "5 labels that come off worst beside tiny, teacher and the 5 that come off best, of 12"
        in title
    )
    gaps = [row.split()[-1] for row in rows]
    assert gaps == [f"{-0.12 + k / 100:+.3f}" for k in (0, 1, 2, 3, 4, 7, 8, 9, 10, 11)]


def test_two_models_of_one_name_are_told_apart(output, tmp_path):
    truth = ["--truth", "metadata:labels", "--bootstrap", 0]
    for place in ("a", "b"):
        shutil.copytree(output, tmp_path / place / "out")
    files = [tmp_path / name for name in ("near.json", "far.json")]
    run(tmp_path / "a/out", *truth, "--teacher", output, "--save", files[0])
    run(tmp_path / "a/out", *truth, "--teacher", tmp_path / "b/out", "--save", files[1])
    names = [
        [json.loads(file.read_text())[who]["name"] for who in ("student", "teacher")]
        for file in files
    ]
    assert names[0] == [f"tiny, {tmp_path}/a/out", f"tiny, {output}"]
    assert names[1] == [f"tiny, {tmp_path}/a/out", f"tiny, {tmp_path}/b/out"]


def test_a_label_needs_ten_positives_for_an_interval(output):
    """Of three clips, all ranked first, the bootstrap would say that it is 1.000 to 1.000."""
    source = open_source(str(output))
    evaluation = evaluate(source, read_truth("metadata:labels", source), replicates=50)
    positives = dict(zip(NAMES, evaluation.positives.tolist(), strict=True))
    assert (positives["Speech"], positives["Music"], positives["Dog"]) == (11, 7, 4)
    known = {NAMES[k] for k in np.flatnonzero(~np.isnan(evaluation.student.label_low))}
    assert known == {"Speech"}
    by_low = {bucket.low: bucket.student_map for bucket in evaluation.buckets}
    assert math.isnan(by_low[1].low) and math.isnan(by_low[5].low)
    assert by_low[10].low <= by_low[10].value <= by_low[10].high


def test_the_interval_of_a_bucket_is_of_its_labels(output):
    source = open_source(str(output))
    truth = read_truth("metadata:labels", source)
    # Twelve labels of 4 positives each: 48 in all.
    few = replace(
        truth,
        labels=tuple(tuple(NAMES[20:32]) if n % 3 == 0 else () for n in range(len(truth.labels))),
    )
    evaluation = evaluate(source, few, teacher=source, replicates=60, seed=3)
    (bucket,) = evaluation.buckets
    assert (bucket.low, bucket.labels) == (1, 12)
    # All labels are in it, so that it is the field's macro mAP.
    whole = evaluation.student.intervals["macro_map"]
    assert (
        bucket.student_map.value,
        bucket.student_map.low,
        bucket.student_map.high,
    ) == pytest.approx((whole.value, whole.low, whole.high))
    assert bucket.teacher_map == bucket.student_map
    assert (bucket.gap.value, bucket.gap.low, bucket.gap.high) == (0, 0, 0)


# ------------------------------------------------------------------ arrays


def test_agreement_by_hand():
    teacher = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.6]], np.float32)
    student = np.array([[0.7, 0.1, 0.6], [0.1, 0.4, 0.9]], np.float32)
    top1, in_top, jaccard, kl, bce = agreement_of(student, teacher, top=2)
    assert top1 == 1 / 2
    assert in_top == 1  # label 0 is among 0 and 2, label 1 among 2 and 1
    # Clip 0: {0, 1} and {0, 2} have 1 of 3 in common; clip 1: {1, 2} and {2, 1} all.
    assert jaccard == pytest.approx((1 / 3 + 1) / 2)
    t, s = teacher.astype(float), student.astype(float)
    cross = -(t * np.log(s) + (1 - t) * np.log(1 - s)).sum() / 2
    own = -(t * np.log(t) + (1 - t) * np.log(1 - t)).sum() / 2
    assert (kl, bce) == pytest.approx((cross - own, cross))


def test_scores_of_zero_and_one_are_finite():
    teacher, student = np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    *_, kl, bce = agreement_of(student, teacher)
    assert math.isfinite(kl) and math.isfinite(bce) and kl > 10


def test_only_labels_that_both_have_are_compared(output, tmp_path):
    """A teacher of another order and of fewer labels stands beside, column by column."""
    source = open_source(str(output))
    truth = read_truth("metadata:labels", source)
    whole = evaluate(source, truth, teacher=source, replicates=0)
    turned = [NAMES.index(name) for name in ("Music", "Speech", "Dog")]
    matrix = whole.scores[:, turned]
    labels = [replace(source.labels[k], index=place) for place, k in enumerate(turned)]
    file = tmp_path / "few.parquet"
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), 3)
    pq.write_table(pa.table({"clip_id": list(whole.clip_ids), "scores": column}), file)
    few = evaluate(source, truth, teacher=open_source(str(file), labels=labels), replicates=0)
    assert [label.name for label in few.labels] == ["Speech", "Dog", "Music"]
    assert np.array_equal(few.scores, few.teacher_scores)
    assert few.agreement.kl == pytest.approx(0, abs=1e-9)
    assert few.truth.sum() == whole.truth.sum()


def test_rare_labels_can_be_left_out(output):
    source = open_source(str(output))
    truth = read_truth("metadata:labels", source)
    every = evaluate(source, truth, replicates=0)
    some = evaluate(source, truth, replicates=0, labels_at_least=1)
    assert [label.name for label in some.labels] == ["Speech", "Dog", "Music"]
    assert some.student.field.macro_map == every.student.field.macro_map
    assert some.student.card.mAP > every.student.card.mAP  # fewer false ones to be above
    assert sum(bucket.labels for bucket in every.buckets) == 3
    assert {(bucket.low, bucket.high) for bucket in every.buckets} <= {(1, 4), (5, 9), (10, 29)}


def test_hostile_names_break_neither_tables_nor_terminal(output):
    source = open_source(str(output))
    truth = read_truth("metadata:labels", source)
    hostile = "a|b [bold]\n# c [/nothing] `*_<script>"
    labels = (*source.labels[:-1], Label(526, "", hostile))
    evaluation = evaluate(replace(source, name=hostile, labels=labels), truth, replicates=3)
    lines = present.markdown(replace(evaluation, truth_name=hostile)).splitlines()
    assert not any(line.startswith("# c") for line in lines)
    rows = [line for line in lines if line.startswith("|")]
    assert sum("script" in row for row in rows) >= 2
    for block in re.findall(r"(?:^\|.*\n)+", "\n".join(lines) + "\n", re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    console = Console(file=io.StringIO(), width=200)
    present.show(evaluation, console)
    assert "[bold]" in console.file.getvalue()
    assert json.loads(present.as_json(evaluation))["student"]["name"] == hostile


def test_no_score_may_be_nan(output, tmp_path):
    scores = np.full(527, np.nan, np.float32)
    file = tmp_path / "nan.parquet"
    column = pa.FixedSizeListArray.from_arrays(pa.array(scores), 527)
    pq.write_table(pa.table({"clip_id": ["x"], "scores": column}), file)
    truth = Truth("t", ("x",), (names_of("x"),), (("Dog",),))
    with pytest.raises(
        EvaluationError, match=r"nan.parquet': the score of label 0 of clip 0 is nan"
    ):
        evaluate(open_source(str(file)), truth)
    assert resolve(truth, audioset_labels()).matrix.sum() == 1


# ------------------------------------------------------------------ what is read, and of which clips


def test_no_thread_but_the_callers_reads_a_file(output, teacher, tmp_path, monkeypatch):
    """Arrow's own threads would let go of a Python file while the interpreter ends: an abort."""
    readers = set()

    class Watched(io.FileIO):
        def read(self, size=-1):
            readers.add(threading.get_ident())
            return super().read(size)

        def readinto(self, buffer):
            readers.add(threading.get_ident())
            return super().readinto(buffer)

    def opened(self, name):
        return Watched(f"{self.uri}/{name}")

    monkeypatch.setattr("transforms.output.LocalOutput.open", opened)
    truth = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"file": ["c0.flac", "c1.flac"], "labels": ["Dog", "Speech"]}), truth)
    run(output, "--truth", truth, "--only", truth, "--teacher", teacher, "--bootstrap", 0)
    assert readers == {threading.get_ident()}


def listed(folder, suffix, rows):
    """A list of two clips and one that is nowhere, in each form that `--only` takes."""
    first = {name: rows[1][name] for name in ("clip_id", "member", "audio_xxh128")}
    # Under another name: the same bytes.
    table = [
        first,
        {"clip_id": "elsewhere/z", "member": "z.flac", "audio_xxh128": rows[4]["audio_xxh128"]},
        {"clip_id": "nowhere", "member": "nowhere", "audio_xxh128": None},
    ]
    file = folder / f"only.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(table), file)
    elif suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, table)))
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(first))
            writer.writeheader()
            writer.writerows(table)
    return file


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_only_some_clips_are_looked_at(output, rows, tmp_path, suffix):
    file = listed(tmp_path, suffix, rows)
    told = tmp_path / "e.json"
    asked = ("--only", file, "--bootstrap", 0, "--save", told)
    said = run(output, "--truth", "metadata:labels", *asked)
    assert "2 of the truth's 2 clips are compared" in said
    assert f"1 clips of {file} have no row." in said
    available = json.loads(told.read_text())["availability"]
    assert (available["only"], available["only_absent"]) == (str(file), 1)
    positives = {label["name"]: label["positives"] for label in
                 json.loads(told.read_text())["labels"] if label["positives"]}  # fmt: skip
    assert positives == {"Speech": 2, "Music": 2}  # of c1 and c4
    said = run(output, "--truth", output, *asked)
    assert "2 of the truth's 11 clips are compared" in said
    assert f"9 clips of the truth are not in {file}, or have no row." in said


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("o.csv", "clip_id\nelsewhere\n", "none of its 1 clips has a row in"),
        ("o.csv", "a,b\n1,2\n", "has the columns a, b; expected one of clips, called clip_id, id"),
        ("o.csv", "clip_id,member\n,x\n", "names no clip in its column 'clip_id'"),
        ("o.csv", "", "is empty"),
        ("o.csv", "c0.flac\nc1.flac\n", "has the columns c0.flac; expected one of clips"),
        ("o.jsonl", "", "is empty"),
        ("o.jsonl", "{", "line 1 is no JSON"),
        ("o.parquet", "no", "cannot be read"),
        ("o.png", "no", "expected a table of clips that ends in .csv"),
        ("o.csv", None, "cannot be read: No such file"),
    ],
)
def test_a_list_of_clips_that_cannot_be_used_is_named(output, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    said = run(output, "--truth", "metadata:labels", "--only", tmp_path / name, code=2)
    assert f"Error: --only '{tmp_path / name}'" in said and expected in said


def test_thresholds_judged_on_the_clips_that_tuned_them_are_told(
    output, rows, shard, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    half = {"fit": rows[:6], "judge": rows[6:]}
    for name, some in half.items():
        ids = "\n".join(row["clip_id"] for row in some)
        (tmp_path / f"{name}.csv").write_text(f"clip_id\n{ids}\n")
    of = ("--truth", "metadata:labels", "--bootstrap", 0)
    run(output, *of, "--only", "fit.csv", "--thresholds", "t.json", "--folds", 2)
    fitted = json.loads((tmp_path / "t.json").read_text())["fitted_on"]
    assert fitted["truth"] == "metadata:labels" and len(fitted["some_clips"].split()) == 6
    made = ("--thresholds", "t.json", "--output")
    assert CliRunner().invoke(cli, ["retag", str(output), *made, "retagged"]).exit_code == 0
    annotate = ["annotate", str(shard), "--checkpoint", str(tiny_checkpoint), *made, "annotated"]
    assert CliRunner().invoke(cli, annotate).exit_code == 0
    sentence = "The thresholds of the tags were fitted on "
    for tagged in ("retagged", "annotated"):
        assert f"{sentence}all of these clips (t.json)" in run(tagged, *of, "--only", "fit.csv")
        assert f"{sentence}about 6 of these clips (t.json)" in run(tagged, *of)
        assert sentence not in run(tagged, *of, "--only", "judge.csv")
    assert sentence not in run(output, *of)
    file = tmp_path / "t.json"
    file.write_text(file.read_text().replace('"threshold": 0.', '"threshold": 0.0'))
    assert sentence not in run("retagged", *of)  # these are no longer what it was tagged by
    file.unlink()
    assert sentence not in run("retagged", *of)


def test_clips_learned_from_are_known_by_their_bytes(output, tiny_checkpoint, tmp_path):
    """Another corpus may have the same names."""
    rows = [("same", "same", "11", "s"), ("renamed", "renamed", "22", "s"), ("a", "a", "", "s")]
    student = Path(shutil.copytree(tiny_checkpoint, tmp_path / "student"))
    write_learned(student / "learned_from.parquet", rows)
    facts = {"name": str(student), "weights_sha256": read_checkpoint(str(student)).weights_sha256}
    source = replace(open_source(str(output)), run={"checkpoint": facts})

    def clips(clip_id, of_bytes):
        before = learned_from(source, [clip_id], [of_bytes])
        return before.clips if before else 0

    assert clips("same", "11") == clips("same", None) == clips("other", "22") == 1
    assert clips("a", "33") == 1  # of which the bytes were not known
    assert clips("same", "33") == clips("other", None) == clips("other", "33") == 0
    # Another student in its folder by now.
    source = replace(source, run={"checkpoint": facts | {"weights_sha256": "0" * 64}})
    assert clips("same", "11") == 0


def test_what_was_tuned_is_of_the_clips_that_the_teacher_has_too(
    output, rows, teacher, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, some in {"fit": rows[:6], "judge": rows[6:]}.items():
        ids = "\n".join(row["clip_id"] for row in some)
        (tmp_path / f"{name}.csv").write_text(f"clip_id\n{ids}\n")
    of = ("--truth", "metadata:labels", "--bootstrap", 0)
    run(output, *of, "--only", "fit.csv", "--thresholds", "t.json", "--folds", 2)
    command = ["retag", str(output), "--thresholds", "t.json", "--output", "retagged"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    pq.write_table(pq.read_table(teacher).slice(6), "beside.parquet")  # none of the fit
    said = run("retagged", *of, "--teacher", "beside.parquet")
    assert "lacks them" in said and "were fitted on" not in said


# ------------------------------------------------------------------ refused before any work


def test_a_fit_that_cannot_be_is_refused_before_the_measuring(output, tmp_path, monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("measured first")

    monkeypatch.setattr("evaluation.evaluate.card_metrics", measured)
    file = tmp_path / "t.json"
    asked = ("--truth", "metadata:labels", "--thresholds", file, "--folds")
    said = run(output, *asked, 12, code=2)  # of 12 clips one has failed
    assert "11 clips cannot be dealt into 12 folds" in said
    said = run(output, *asked, 7, "--group-by", "recording", code=2)
    assert "6 groups of clips cannot be dealt into 7 folds" in said
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teacher", "nope.parquet"], "--teacher: 'nope.parquet' cannot be read: No such file"),
        (["--truth", "labels"], "--truth metadata:labels"),
        (["--truth", "metadata:recording"], "display names; is this the field of the labels?"),
        (["--group-by", "r"], "has 'r' in its metadata (it has labels, recording)"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(output, arguments, said):
    truth = [] if "--truth" in arguments else ["--truth", "metadata:labels"]
    shown = run(output, *truth, *arguments, code=2)
    assert said in re.sub(r"\s+", " ", shown) and "Error: " in shown


# ------------------------------------------------------------------ what is no news


def test_ties_with_the_teacher_are_left_out(output):
    source = open_source(str(output))
    names = tuple(NAMES[:12])
    clips = [row.as_py() for row in pq.read_table(output / "clips")["member"]][:6]
    truth = Truth("t", tuple(clips), tuple(map(names_of, clips)), (*[names] * 5, ()))
    evaluation = evaluate(source, truth, teacher=source, replicates=0)
    precision = evaluation.student.label_precision

    def shown(*gaps):
        theirs = precision.copy()
        theirs[: len(gaps)] -= gaps
        console = Console(file=io.StringIO(), width=200)
        teacher = replace(evaluation.teacher, label_precision=theirs)
        present.show(replace(evaluation, teacher=teacher), console)
        last = console.file.getvalue().split("\n\n")[-1].splitlines()
        return last[0], [row.split()[-1] for row in last[2:]]

    title, gaps = shown(0.2, -0.1, 0.0004)
    assert gaps == ["-0.100", "+0.200"]
    assert "The 1 labels that come off worst" in title and title.endswith("; 10 are equal")
    title, gaps = shown(0.3)
    assert gaps == ["+0.300"] and "come off best" not in title
    assert "come off" not in shown()[0]


def test_an_interval_without_bounds_says_so():
    assert present._range(Interval(4.0, 3.0, math.inf)) == "not bounded"
    assert present._range(Interval(math.nan, -math.inf, math.inf)) == "not bounded"
    assert present._range(Interval(1.0, math.nan, math.nan)) == ""
    assert present._range(Interval(1.0, 0.5, 1.5)) == "0.500…1.500"
