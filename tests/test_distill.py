"""`earmark distill`, from clips and a teacher to a checkpoint that others load."""

import base64
import csv
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi, errors
from safetensors.torch import load_file
from transformers import (
    ASTForAudioClassification,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    TrainerCallback,
)
from transformers import pipeline as transformers_pipeline

from bench.stand_ins import CloudStorage
from evaluation import thresholds
from evaluation.provenance import LEARNED_FILE, read_learned, write_learned
from pipeline.cli import cli
from student import DeviceError, Student
from student.checkpoint import read_checkpoint
from student.feature_spec import FeatureSpec
from student.labels import audioset_labels
from training import hub, trainer
from training.clips import Split
from training.distill import Request, distill, training_arguments
from training.hub import HubError, check_id, push
from training.initialise import layers_of, student_from_teacher
from training.losses import LOSSES
from training.presets import PRESETS, Consistent, DistilAst, RecipeError, with_settings
from training.progress import Progress, duration
from training.request import DistillError, begin, epoch_of, last_checkpoint, settings_of
from training.trainer import TrainingFailed
from transforms.shards import plan_shards

REPO = Path(__file__).resolve().parents[1]
LABELS = audioset_labels()
NAMES = [label.name for label in LABELS]
SHARE = 0.3  # of the recordings below: 10 clips of 5 are held out, 10 are learned from

# ------------------------------------------------------------------ the presets


def test_presets_have_the_same_fields():
    names = [[field.name for field in fields(preset)] for preset in PRESETS.values()]
    assert names[0] == names[1]
    assert {name: preset for name, preset in PRESETS.items()} == {
        "distil-ast": DistilAst,
        "consistent": Consistent,
    }


def test_the_published_numbers_are_those_of_the_card():
    recipe = DistilAst()
    assert recipe.teacher_layers == (0, 2, 4, 6, 8, 10)
    assert (recipe.loss, recipe.alpha, recipe.temperature) == ("softmax-kl", 0.5, 2.0)
    assert (recipe.learning_rate, recipe.batch, recipe.accumulation) == (3e-5, 32, 4)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (recipe.schedule, recipe.warmup_ratio) == ("linear", 0.1)
    assert (recipe.epochs, recipe.seed, recipe.precision) == (10, 0, "float16")
    nothing = "crop_share mixup_share gain_db speed equaliser_db frequency_mask time_mask".split()
    assert not any(getattr(recipe, name) for name in nothing)
    assert (recipe.average_decay, recipe.early_stop_epochs, recipe.keep_patches) == (0, 0, 1)


def test_ours_is_per_class_and_hides_48_bins_and_192_frames():
    recipe = Consistent()
    assert recipe.teacher_layers is None and recipe.loss == "sigmoid-bce"
    assert (recipe.alpha, recipe.temperature) == (0.1, 1.0)
    assert (recipe.frequency_mask * 128, recipe.time_mask * 1_024) == (48, 192)
    assert (recipe.crop_min_s, recipe.crop_max_s) == (1.0, 10.0)
    assert min(recipe.mixup_share, recipe.gain_db, recipe.crop_share, recipe.average_decay) > 0


def test_settings_are_read_by_the_kind_of_their_field():
    given = {
        "learning_rate": "1e-4",
        "batch": " 8 ",
        "random_start": "True",
        "loss": "sigmoid-bce",
        "teacher_layers": "0, 3 5",
        "precision": "bfloat16",
    }
    recipe = with_settings(DistilAst(), given)
    expected = replace(
        DistilAst(), learning_rate=1e-4, batch=8, random_start=True, loss="sigmoid-bce",
        teacher_layers=(0, 3, 5), precision="bfloat16",
    )  # fmt: skip
    assert recipe == expected
    assert with_settings(recipe, {"teacher_layers": "None"}).teacher_layers is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("learning_rate", "fast", "expected a number"),
        ("learning_rate", "0", "learning_rate is 0, expected more than 0"),
        ("learning_rate", "nan", "learning_rate is nan, expected a number"),
        ("learning_rate", "inf", "learning_rate is inf"),
        ("batch", "2.5", "expected a whole number"),
        ("batch", "0", "batch is 0, expected 1 or more"),
        ("accumulation", "-1", "accumulation is -1, expected 1 or more"),
        ("alpha", "1.5", "alpha is 1.5, expected 0 to 1"),
        ("temperature", "0", "temperature is 0, expected more than 0"),
        ("average_decay", "1", "average_decay is 1, expected 0 to 0.999999"),
        ("keep_patches", "0", "keep_patches is 0, expected 0.01 to 1"),
        ("speed", "0.9", "speed is 0.9, expected 0 to 0.5"),
        ("epochs", "inf", "epochs is inf"),
        ("gain_db", "inf", "gain_db is inf"),
        ("masks", "-1", "masks is -1, expected 0 or more"),
        ("seed", "-1", "seed is -1, expected 0"),
        ("crop_max_s", "0.5", "crop_max_s is 0.5, less than crop_min_s 1"),
        ("random_start", "maybe", "expected true or false"),
        ("loss", "mse", "expected softmax-kl or sigmoid-bce"),
        ("schedule", "constant", "expected linear or cosine"),
        ("teacher_layers", "0 two", "expected layer numbers such as 0 2 4 6 8 10, or None"),
        ("teacher_layers", "", "expected layer numbers such as 0 2 4 6 8 10, or None"),
        ("temprature", "2", "no 'temprature' (is temperature meant?); it has teacher_layers, "),
    ],
)
def test_a_number_that_cannot_be_is_named(name, text, expected):
    with pytest.raises(RecipeError) as refused:
        with_settings(DistilAst(), {name: text})
    assert expected in str(refused.value) and name in str(refused.value)
    assert text.strip() in str(refused.value) or name == "temprature"


def test_show_prints_every_number():
    done = CliRunner().invoke(cli, ["distill", "--show", "--set", "batch=7"])
    assert done.exit_code == 0
    shown = dict(line.split("=", 1) for line in done.output.splitlines())
    assert list(shown) == [field.name for field in fields(Consistent)]
    assert shown["batch"] == "7" and shown["teacher_layers"] == "None"
    done = CliRunner().invoke(cli, ["distill", "--show", "--preset", "distil-ast"])
    shown = dict(line.split("=", 1) for line in done.output.splitlines())
    again = with_settings(Consistent(), shown)  # what is shown can be given
    assert asdict(again) == asdict(DistilAst())


# ------------------------------------------------------------------ clips, a teacher, its scores


@pytest.fixture(scope="module")
def tars(tmp_path_factory, make_tar, encoded, noise):
    """Twenty clips of 0.3 to 1.2 s in two tars, two to a recording; the last is broken."""
    folder = tmp_path_factory.mktemp("distill")
    for shard in range(2):
        members = []
        for number in range(10):
            samples = 4_800 + 1_600 * number
            tone = 0.3 * np.sin(np.arange(samples) * (0.02 + 0.03 * number + 0.3 * shard))
            sound = encoded(
                tone.astype(np.float32) + noise(samples, 10 * shard + number), format="flac"
            )
            if (shard, number) == (1, 9):
                sound = b"no sound"
            labels = ["Speech", "Music", "Dog"][: 1 + number % 3]
            about = {"labels": labels, "recording": f"r{shard}{number // 2}"}
            name = f"{'ab'[shard]}{number}"
            members += [(f"{name}.flac", sound), (f"{name}.json", json.dumps(about).encode())]
        make_tar(folder / f"{shard}.tar", members)
    return folder / "*.tar"


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, tars, tiny_checkpoint):
    """What `earmark annotate` wrote with the teacher."""
    output = tmp_path_factory.mktemp("distill") / "scores"
    run("annotate", tars, "--output", output, "--checkpoint", tiny_checkpoint)
    return output


@pytest.fixture(scope="module")
def request_of(tars, tiny_checkpoint):
    """A small request; what is given by name is set in it, or in its recipe."""
    shards = plan_shards([str(tars)]).shards

    def make(output, preset=Consistent, **changed):
        numbers = {
            "student_layers": 1, "teacher_layers": None, "batch": 4, "accumulation": 2,
            "epochs": 2.0, "learning_rate": 1e-3, "average_decay": 0.9 * (preset is Consistent),
            "crop_min_s": 0.2, "crop_max_s": 1.0, "warmup_ratio": 0.0,
        }  # fmt: skip
        of_recipe = {field.name for field in fields(preset)}
        numbers |= {name: changed.pop(name) for name in list(changed) if name in of_recipe}
        request = Request(
            output=output, recipe=replace(preset(), **numbers), preset="consistent", shards=shards,
            data="clips", split=Split(SHARE, "recording"), teacher=str(tiny_checkpoint),
            device="cpu",
        )  # fmt: skip
        return replace(request, **changed)

    return make


@pytest.fixture
def only_weights(monkeypatch):
    """Without the picture and the thresholds, which cost more than so small a training."""
    monkeypatch.setattr("training.distill.draw_curves", lambda *_: None)
    monkeypatch.setattr("training.distill.thresholds_of", lambda *_: None)


def silent(line):
    pass


def run(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


SMALL = (
    "--device cpu --workers 0 --set batch=4 --set accumulation=2 --set epochs=2 "
    "--set learning_rate=1e-3"
).split()
COMMAND = [
    *SMALL, "--student-layers", "1", "--validation-share", str(SHARE), "--group-by", "recording",
]  # fmt: skip


def refused(*arguments, code=2):
    """The one line in which `earmark distill` says what is wrong."""
    said = [line for line in run("distill", *arguments, code=code).splitlines() if line]
    errors_ = [line for line in said if line.startswith("Error: ")]
    assert len(errors_) == 1 and said[-1] == errors_[0], said
    return errors_[0]


# ------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module", autouse=True)
def few_labels_choose_thresholds():
    """As many as these small data have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.distill.FEWEST_POSITIVES", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, tars, annotated, tiny_checkpoint):
    """(folder of a student, what was said): stored scores, own labels, a cache, averaged."""
    folder = tmp_path_factory.mktemp("distill")
    said = run(
        "distill", tars, "--output", folder / "student", "--teacher", tiny_checkpoint,
        "--teacher-scores", annotated, *COMMAND, "--truth", "metadata:labels",
        "--cache", folder / "cache", "--set", "average_decay=0.9", "--set", "epochs=3",
        "--licence", "apache-2.0", "--title", "Tiny",
    )  # fmt: skip
    return folder / "student", said


@pytest.fixture(scope="module")
def metrics(made):
    with (made[0] / "metrics.csv").open() as stream:
        return [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)
        ]


def test_what_was_done_is_said(made):
    _, said = made
    assert "19 clips have labels of their own" in said
    assert "left out: 1 without teacher scores" in said
    assert "9 clips to learn from, 10 held out" in said
    assert len(re.findall(r"^epoch \d\.00  held out: loss [\d.]+, mAP", said, re.MULTILINE)) == 3
    assert re.search(r"epoch 3\.00/3  step 6/6  loss [\d.]+  \d+ clips/s  0 s left", said)
    assert "true is: the clips' own labels" in said
    assert re.search(r"^teacher +0\.\d{3}", said, re.MULTILINE)


def test_a_student_is_loaded_by_transformers(made, noise):
    folder, _ = made
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.problem_type) == (1, "multi_label_classification")
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label_mids == [label.mid for label in LABELS]
    sound = noise(16_000)
    inputs = extractor(sound, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.sigmoid()[0].numpy()
    ours = Student.load(str(folder), device="cpu").score([sound])[0]
    np.testing.assert_allclose(ours, scores, atol=1e-4)

    tagger = transformers_pipeline("audio-classification", model=str(folder), device="cpu")
    tags = tagger({"raw": sound, "sampling_rate": 16_000}, top_k=3)
    best = np.argsort(-scores)[:3]
    assert [tag["label"] for tag in tags] == [NAMES[index] for index in best]
    np.testing.assert_allclose([tag["score"] for tag in tags], scores[best], atol=1e-4)


def test_a_student_is_loaded_by_annotate_with_its_thresholds(made, tars, tmp_path):
    folder, _ = made
    thresholds = folder / "thresholds.json"
    assert len(json.loads(thresholds.read_text())["labels"]) == 527
    said = run("annotate", tars, "--checkpoint", folder, "--output", tmp_path / "out",
               "--thresholds", thresholds,)  # fmt: skip
    assert "20 clips, 19 scored and 1 failed" in said


def test_a_student_learns_on_whole(made, tars, annotated, tmp_path, monkeypatch):
    """Of a learning rate of nearly nothing comes what was there; the card says what it was."""
    folder = Path(shutil.copytree(made[0], tmp_path / "student"))
    elsewhere = ("elsewhere/a", "a", "ff", "elsewhere.tar")
    write_learned(folder / LEARNED_FILE, [elsewhere])
    monkeypatch.setattr("training.distill.FEWEST_POSITIVES", thresholds.FEWEST_POSITIVES)
    said = run(
        "distill", tars, "--output", tmp_path / "on", "--student", folder,
        "--teacher-scores", annotated, *SMALL, "--set", "learning_rate=1e-12", "--set", "epochs=1",
        "--set", "average_decay=0", "--validation-share", SHARE, "--group-by", "recording",
        "--truth", "metadata:labels",
    )  # fmt: skip
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "on"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    facts = "preprocessor_config.json"
    assert (tmp_path / "on" / facts).read_text() == (folder / facts).read_text()
    card = (tmp_path / "on" / "README.md").read_text()
    assert "It learned on from the weights of student." in card and str(folder) not in card
    # What it had learned from before counts.
    learned = read_learned(tmp_path / "on" / LEARNED_FILE)
    assert learned[0] == elsewhere and len(learned) > 1
    # So few held-out clips choose no thresholds, and that is said.
    assert not (tmp_path / "on" / "thresholds.json").exists()
    assert "No thresholds.json" in said and "Tags come from 0.2" in said


def test_a_student_that_learns_on_is_the_only_beginning(made, tars, annotated, tmp_path):
    folder, _ = made
    command = (tars, "-o", tmp_path / "x", "--student", folder, "--teacher-scores", annotated)
    error = refused(*command, "--student-layers", 1)
    assert "--student begins as a checkpoint" in error
    error = refused(*command, "--set", "student_layers=3")
    assert "--student begins as a checkpoint" in error
    error = refused(*command, "--fresh", "hidden_size=32")
    assert "--fresh begins with nothing, --student with a checkpoint" in error


def test_a_student_that_learned_from_what_judges_now_says_so(made, tars, annotated, tmp_path):
    folder, _ = made
    command = ("distill", tars, "--student", folder, "--teacher-scores", annotated, *SMALL,
               "--set", "epochs=1", "--truth", "metadata:labels", "--max-steps", "1")  # fmt: skip
    same = run(
        *command, "-o", tmp_path / "same", "--validation-share", SHARE, "--group-by", "recording"
    )
    assert "flatter" not in same + (tmp_path / "same" / "README.md").read_text()
    other = run(*command, "-o", tmp_path / "other", "--validation-share", "0.5")
    said = "Before, this student learned from some of the same shards"
    assert said in other and said in (tmp_path / "other" / "README.md").read_text()
    shutil.copytree(folder, tmp_path / "stranger", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "stranger" / "distill.json").unlink()
    command = tuple(tmp_path / "stranger" if part == folder else part for part in command)
    stranger = run(*command, "-o", tmp_path / "third", "--validation-share", "0.5")
    assert "What this student had learned from before is not known here" in stranger


def test_a_teacher_of_another_rate_may_have_its_scores_stored(
    made, tars, annotated, tiny_checkpoint, tmp_path
):
    folder, _ = made
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    facts = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    (tmp_path / "other" / "preprocessor_config.json").write_text(
        json.dumps(facts | {"sampling_rate": 32_000})
    )
    command = (tars, "-o", tmp_path / "s", "--student", folder, "--teacher", tmp_path / "other")
    error = refused(*command, *SMALL)
    assert "hears at 16000 Hz, --teacher" in error and "give its output with --teacher" in error
    run("distill", *command, *SMALL, "--max-steps", "1", "--teacher-scores", annotated)


def test_a_row_an_epoch_and_the_card_says_the_same(made, metrics):
    folder, _ = made
    assert [(row["epoch"], row["step"]) for row in metrics] == [(1, 2), (2, 4), (3, 6)]
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"]
    assert metrics[-1]["training_loss"] < metrics[0]["training_loss"]
    card = (folder / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.splitlines()
        if line.startswith("|")
    ]
    of_epochs = [row for row in rows if re.fullmatch(r"[\d.]+", row[0])]
    head = next(row for row in rows if "Validation loss" in row or "Validation Loss" in row)
    assert len(of_epochs) == 3
    for name, key in (
        ("training loss", "training_loss"),
        ("epoch", "epoch"),
        ("step", "step"),
        ("validation loss", "validation_loss"),
        ("f1", "f1"),
        ("map", "mAP"),
    ):
        place = [cell.casefold() for cell in head].index(name)
        shown = [float(row[place].replace(",", "")) for row in of_epochs]
        np.testing.assert_allclose(shown, [row[key] for row in metrics], atol=5e-5)
    # The last epoch is what is kept: its numbers stand in the table of models.
    student = next(row for row in rows if row[0] == "Tiny" and len(row) == 5)
    judged = [float(cell) for cell in student[1:]]
    last = [metrics[-1][name] for name in ("f1", "roc_auc", "accuracy", "mAP")]
    np.testing.assert_allclose(judged, last, atol=5e-5)
    assert "| labels | unknown |" not in card and "apache-2.0" in card
    assert "1 without teacher scores" in card or "without teacher scores" in card


def test_the_trainers_own_files_are_there(made, metrics):
    folder, _ = made
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (6, 3)
    judged = [entry["eval_mAP"] for entry in state["log_history"] if "eval_mAP" in entry]
    assert judged == [row["mAP"] for row in metrics]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    logged = {
        name: [event.value for event in events.Scalars(name)] for name in ("train/loss", "eval/mAP")
    }
    np.testing.assert_allclose(logged["eval/mAP"], judged, rtol=1e-6)
    np.testing.assert_allclose(
        logged["train/loss"], [row["training_loss"] for row in metrics], rtol=1e-6
    )


def test_the_weights_kept_are_the_average(made):
    folder, _ = made
    last = folder / "checkpoints" / "checkpoint-6"
    kept, raw = (
        dict(AutoModelForAudioClassification.from_pretrained(place).named_parameters())
        for place in (folder, last)
    )
    average = load_file(last / "average.safetensors")
    assert kept.keys() == average.keys() == raw.keys()
    assert all(torch.equal(weight, average[name]) for name, weight in kept.items())
    assert not any(torch.equal(weight, raw[name]) for name, weight in kept.items())


# ------------------------------------------------------------------ equal runs


class Stop(TrainerCallback):
    """Ctrl-C after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_of(output):
    return (output / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("only_weights")
@pytest.mark.parametrize("kept", ["cached", "streamed"])
def test_a_resumed_run_is_that_which_was_not_interrupted(kept, request_of, tmp_path):
    """Stopped in the middle of the second epoch; augmented, averaged, the teacher running along."""
    cache = tmp_path / "cache" if kept == "cached" else None
    more = {"cache": cache, "mixup_share": 0.8, "keep_patches": 0.7, "speed": 0.1}
    more |= {"balance": 0.5} if cache else {"early_stop_epochs": 5}
    whole = request_of(tmp_path / "whole", **more)
    distill(whole, silent)
    stopped = replace(whole, output=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, silent, [Stop(3)])
    assert not (stopped.output / "model.safetensors").exists()
    # What a kill leaves of a checkpoint that was being written is no checkpoint.
    (stopped.output / "checkpoints" / "checkpoint-3").mkdir()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    distill(replace(stopped, resume=True), silent, [Count()])
    assert steps == [3, 4]  # the first epoch was not done again
    assert weights_of(stopped.output) == weights_of(whole.output)
    assert (stopped.output / "metrics.csv").read_text() == (
        whole.output / "metrics.csv"
    ).read_text()


@pytest.mark.usefixtures("only_weights")
def test_a_run_that_was_stopped_says_what_is_kept(tars, tiny_checkpoint, tmp_path, monkeypatch):
    command = ["distill", tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, *COMMAND]
    stop = {"step": 1}

    class Interrupted(Progress):
        def on_step_end(self, args, state, control, **passed):
            if state.global_step == stop["step"]:
                raise KeyboardInterrupt

    monkeypatch.setattr("training.progress.Progress", Interrupted)
    said = run(*command, code=130)
    assert "Stopped. No epoch was judged, so nothing is kept: the same command begins anew." in said
    said = run(*command, "--resume", code=130)
    assert "nothing was kept: this run begins at the start" in said
    stop["step"] = 3  # of 2 an epoch
    said = run(*command, code=130)
    kept = "What was learned to the end of epoch 1 is kept: add --resume to go on."
    assert f"Stopped. {kept}" in said
    stop["step"] = 0
    said = run(*command, "--resume")
    assert "Going on after epoch 1 of 2" in said and "held out: " in said
    assert "is finished: its 2 epochs are done" in run(*command, "--resume")


@pytest.mark.parametrize("kept", ["cached", "streamed"])
def test_who_learned_from_which_clips_is_written_and_told(
    kept, tars, tiny_checkpoint, annotated, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.distill.draw_curves", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    more = ["--cache", tmp_path / "cache"] if kept == "cached" else []
    run("distill", tars, "-o", "s", "--teacher", tiny_checkpoint, *COMMAND, *more)
    with (tmp_path / "s" / "held_out.csv").open() as stream:
        held_out = list(csv.DictReader(stream))
    learned = pq.read_table(tmp_path / "s" / "learned_from.parquet").to_pylist()
    rows = pq.read_table(annotated / "clips").to_pylist()
    columns = ("clip_id", "member", "audio_xxh128", "shard")
    ours = {tuple(row[name] for name in columns) for row in [*held_out, *learned]}
    theirs = {tuple(row[name] for name in columns) for row in rows}
    assert ours == theirs and len(ours) == len(held_out) + len(learned) == 20
    recordings = [
        {json.loads(row["metadata"])["recording"] for row in rows
         if row["clip_id"] in {one["clip_id"] for one in side}}
        for side in (held_out, learned)
    ]  # fmt: skip
    assert not recordings[0] & recordings[1]

    run("annotate", tars, "--output", "tags", "--checkpoint", "s")
    command = ("evaluate", "tags", "--truth", "metadata:labels", "--bootstrap", 0)
    told = "The student learned from 9 of these clips"  # of ten one is broken
    said = run(*command)
    assert told in said and "--only s/held_out.csv leaves them out" in said
    said = run(*command, "--only", "s/held_out.csv")
    assert "10 of the truth's 10 clips are compared" in said and "learned from" not in said


@pytest.mark.usefixtures("only_weights")
def test_a_seed_decides_the_student(request_of, tmp_path):
    """A fresh student: its first weights are drawn, too."""
    shape = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16,
        "frequency_stride": 16, "time_stride": 16, "num_mel_bins": 32, "max_length": 96,
    }  # fmt: skip
    weights = {}
    for name, seed in (("once", 3), ("again", 3), ("other", 4)):
        request = request_of(tmp_path / name, fresh=shape, seed=seed, epochs=1.0)
        distill(request, silent)
        weights[name] = weights_of(request.output)
    assert weights["once"] == weights["again"] != weights["other"]
    config = json.loads((tmp_path / "once" / "preprocessor_config.json").read_text())
    assert config["mean"] != pytest.approx(-4.2677393)  # measured on the clips
    assert (config["num_mel_bins"], config["max_length"]) == (32, 96)


@pytest.mark.usefixtures("only_weights")
def test_a_teacher_that_runs_along_and_its_stored_scores_teach_the_same(
    request_of, annotated, tmp_path
):
    along = request_of(tmp_path / "along", DistilAst, limit=19)
    stored = replace(along, output=tmp_path / "stored", teacher_scores=(str(annotated),))
    distilled = [distill(each, silent) for each in (along, stored)]
    teacher = AutoModelForAudioClassification.from_pretrained(along.teacher)
    begun, one, other = (
        torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        for model in (
            student_from_teacher(teacher, (1,)),
            AutoModelForAudioClassification.from_pretrained(along.output),
            AutoModelForAudioClassification.from_pretrained(stored.output),
        )
    )
    # Features of a teacher that runs along are float32, those of annotate float64.
    assert float((one - other).norm()) < 0.02 * float((one - begun).norm())
    assert distilled[0].student.loss == pytest.approx(distilled[1].student.loss, rel=1e-3)


@pytest.mark.usefixtures("only_weights")
def test_beside_stored_scores_an_assistant_is_half_of_the_target(
    request_of, annotated, tiny_checkpoint, make_checkpoint, tmp_path
):
    """Cross-entropy is linear in the target: so is the loss of weights that hardly move."""
    other = make_checkpoint(tmp_path / "other", NAMES)
    with torch.no_grad():
        model = ASTForAudioClassification.from_pretrained(other)
        model.classifier.dense.weight.neg_()
    model.save_pretrained(other)
    assistant = trainer.Listener.of(
        model.eval().requires_grad_(False), read_checkpoint(str(other)).features
    )
    numbers = {"learning_rate": 1e-12, "alpha": 0.0, "epochs": 1.0, "limit": 19, "mixup_share": 0.0}

    def loss(name, **begins):
        request = request_of(tmp_path / name, student=str(tiny_checkpoint), **numbers, **begins)
        distill(request, silent)
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        return state["log_history"][0]["loss"]

    stored = loss("stored", teacher_scores=(str(annotated),))
    along = loss("along", teacher=str(other))
    both = loss("both", teacher_scores=(str(annotated),), assistant=assistant)
    assert abs(stored - along) > 0.1 * stored
    # What is stored is of whole clips, which are cut here, the same in all three.
    assert both == pytest.approx((stored + along) / 2, rel=1e-4)


@pytest.mark.usefixtures("only_weights")
def test_the_teacher_hears_what_the_student_hears(request_of, tmp_path, monkeypatch):
    heard = []
    original = trainer.Listener.of.__func__

    def listen(cls, model, spec):
        who = len(listeners)
        listeners.append(model)

        def hook(module, arguments):
            if torch.is_grad_enabled() or who_is_teacher(module):
                heard.append((module, arguments[0].detach().clone()))

        model.register_forward_pre_hook(hook)
        assert who < 2
        return original(cls, model, spec)

    def who_is_teacher(module):
        return not next(module.parameters()).requires_grad

    listeners = []
    monkeypatch.setattr(trainer.Listener, "of", classmethod(listen))
    request = request_of(tmp_path / "student", mixup_share=0.9, equaliser_db=3.0, epochs=1.0)
    distill(request, silent)
    teacher, student = (
        [who_is_teacher(module) for module, _ in heard],
        [features for module, features in heard if not who_is_teacher(module)],
    )
    assert len(student) == 3  # batches of an epoch
    pairs = [(heard[place - 1], heard[place]) for place, of in enumerate(teacher) if not of]
    for (module, theirs), (_, ours) in pairs:
        assert who_is_teacher(module)
        assert torch.equal(theirs, ours)
    assert any(bool((features == 0).all(dim=1).any()) for features in student)  # masks are in it


@pytest.mark.usefixtures("only_weights")
def test_a_student_is_judged_as_seldom_as_asked(request_of, tmp_path):
    request = request_of(tmp_path / "s", epochs=3.0, judge_every_epochs=2)
    distill(request, silent)
    with (request.output / "metrics.csv").open() as stream:
        assert [float(row["epoch"]) for row in csv.DictReader(stream)] == [2, 3]


def test_the_recipe_reaches_the_trainer(request_of, tmp_path):
    recipe = DistilAst()
    request = replace(request_of(tmp_path / "s"), recipe=recipe, workers=4)
    arguments = training_arguments(request, torch.device("cpu"), 128 * 100)
    assert arguments.get_warmup_steps(1_000) == 100
    assert arguments.get_warmup_steps(250) == 25  # of four processes, each with its share
    for name, value in (
        ("learning_rate", 3e-5), ("per_device_train_batch_size", 32),
        ("gradient_accumulation_steps", 4), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8),
        ("num_train_epochs", 10), ("seed", 0), ("lr_scheduler_type", "linear"), ("fp16", False),
    ):  # fmt: skip
        assert getattr(arguments, name) == value
    # Of a stream what the last batches of several readers hold is lost: at most a twentieth.
    assert arguments.dataloader_num_workers == 4
    assert training_arguments(request, torch.device("cpu"), 1_000).dataloader_num_workers == 1
    cached = replace(request, cache=tmp_path)
    assert training_arguments(cached, torch.device("cpu"), 1_000).dataloader_num_workers == 4


def test_a_step_sees_a_share_of_the_patches_rather_the_audible_ones(tiny_checkpoint):
    model = AutoModelForAudioClassification.from_pretrained(tiny_checkpoint).eval()
    features = torch.randn(2, 128, 32)
    with torch.no_grad():
        whole = model(features).logits
    numbered = torch.arange(18.0)[None, :, None].expand(2, 18, 32)  # 2 tokens, 2 bands of 8 spans
    embeddings = model.audio_spectrogram_transformer.embeddings
    seen = []
    patches = trainer.PatchDropout(model)
    layers_of(model)[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    frames = torch.tensor([48.0, 128.0])  # three spans of the first clip's are heard
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        with patches.keeping(1.0, frames, random):
            torch.testing.assert_close(model(features).logits, whole)
        with patches.keeping(0.4, frames, random):
            assert not torch.allclose(model(features).logits, whole)
        torch.testing.assert_close(model(features).logits, whole)  # nor is it left on
        assert [tokens.shape[1] for tokens in seen] == [18, 2 + 6, 18]

        first = embeddings.register_forward_hook(lambda *_: numbered)
        embeddings._forward_hooks.move_to_end(first.id, last=False)
        kept = torch.zeros(2, 16)
        for _ in range(100):
            with patches.keeping(0.4, frames, random):
                model(features)
            tokens = seen[-1][:, :, 0]
            assert tokens[:, :2].tolist() == [[0, 1]] * 2
            kept.scatter_add_(1, tokens[:, 2:].long() - 2, torch.ones(2, 6))
    assert float(kept.max()) <= 100  # none twice
    spans = kept.reshape(2, 2, 8).mean(dim=1) / 100
    assert float(spans[0, :3].min()) > 0.6 > 0.35 > float(spans[0, 3:].max())
    assert float(spans[1].min()) > 0.25 and float(spans[1].max()) < 0.5


def test_progress_is_said_now_and_then():
    said = []
    progress = Progress(said.append, every_s=0.0)
    arguments = SimpleNamespace(
        train_batch_size=4, gradient_accumulation_steps=2, world_size=1, num_train_epochs=2.0
    )
    state = SimpleNamespace(global_step=10, max_steps=20, epoch=1.0, is_world_process_zero=True)
    control = SimpleNamespace(last_loss=0.25)
    progress.on_train_begin(arguments, state, control)
    state.global_step, state.epoch = 11, 1.1
    progress.on_step_end(arguments, state, control)
    assert re.fullmatch(r"epoch 1\.10/2  step 11/20  loss 0\.25  \d+ clips/s  \d+ s left", said[0])
    state.is_world_process_zero = False
    progress.on_step_end(arguments, state, control)
    assert len(said) == 1
    assert [duration(s) for s in (5, 89, 100, 3_600, 5_500, 36_000)] == [
        "5 s", "89 s", "2 min", "60 min", "1 h 32 min", "10 h 00 min",
    ]  # fmt: skip


# ------------------------------------------------------------------ stops and refusals


@pytest.mark.usefixtures("only_weights")
def test_training_stops_early_and_keeps_the_best(request_of, tmp_path):
    request = request_of(
        tmp_path / "student", learning_rate=1.0, epochs=9.0, early_stop_epochs=2,
        average_decay=0.0, max_grad_norm=100.0,
    )  # fmt: skip
    distilled = distill(request, silent)
    with (request.output / "metrics.csv").open() as stream:
        maps = [float(row["mAP"]) for row in csv.DictReader(stream)]
    best = int(np.argmax(maps))
    assert len(maps) == best + 1 + 2 < 9
    assert distilled.student.card.mAP == pytest.approx(maps[best])
    assert maps[-1] < maps[best]


def test_a_loss_that_is_no_number_stops_and_says_the_cure(
    tmp_path, monkeypatch, tars, tiny_checkpoint
):
    calls = Counter()
    real = LOSSES["sigmoid-bce"]

    def broken(*arguments, **numbers):
        calls["loss"] += 1
        loss = real(*arguments, **numbers)
        return loss * math.nan if calls["loss"] == 3 else loss  # the third batch

    monkeypatch.setitem(LOSSES, "sigmoid-bce", broken)
    error = refused(
        tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, *COMMAND, code=1,
    )  # fmt: skip
    assert "the loss is nan at step 2: " in error
    assert "learning_rate below 0.001" in error and "precision=float32" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is nothing to learn from"),
        (["--teacher", "nope"], "--teacher: checkpoint 'nope' is neither"),
        (["--student", "nope"], "--student: checkpoint 'nope' is neither"),
        (["--teacher", "CKPT", "--set", "epochs=two"], "--set: epochs is 'two', expected a number"),
        (["--teacher", "CKPT", "--teacher-layers", "none"], "--teacher-layers: teacher_layers is"),
        (["--teacher-scores", "x.csv"], "--teacher-scores: 'x.csv' is a file; expected the folder"),
        (["--teacher-scores", "no.parquet"], "--teacher-scores: 'no.parquet' cannot be read"),
        (["--teacher", "CKPT", "--truth", "no.csv"], "--truth 'no.csv' cannot be read"),
        (["--teacher", "CKPT", "-o", "."], "--output '.' is not empty"),
        (["--teacher", "CKPT", "--resume"], "nothing was begun there"),
    ],
)
def test_what_is_wrong_is_told_before_torch_is_loaded(
    arguments, said, tars, tiny_checkpoint, tmp_path
):
    (tmp_path / "x.csv").write_text("clip_id\n")
    named = [str(tiny_checkpoint) if argument == "CKPT" else argument for argument in arguments]
    heavy = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "tensorboard"}
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli; "
        f"done = CliRunner().invoke(cli, ['distill', {str(tars)!r}, '-o', 's', *{named!r}]); "
        f"print(done.output, done.exit_code, {heavy} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert said in done.stdout and done.stdout.rstrip().endswith("2 set()"), (
        done.stdout + done.stderr
    )


def test_an_absurd_rate_is_found_out(request_of, tmp_path):
    request = request_of(
        tmp_path / "s", learning_rate=1e30, average_decay=0.0, epochs=6.0, accumulation=1
    )
    with pytest.raises(TrainingFailed, match=r"the loss is (nan|inf) at step [1-9]\d*: try"):
        distill(request, silent)


@pytest.mark.usefixtures("only_weights")
def test_what_has_learned_nothing_may_be_begun_anew(request_of, tmp_path):
    """After a loss that was no number the cure is another rate, into the same folder."""
    request = request_of(tmp_path / "s", epochs=1.0)
    with pytest.raises(KeyboardInterrupt):
        distill(request, silent, [Stop(1)])
    distill(replace(request, recipe=replace(request.recipe, learning_rate=1e-4)), silent)
    begun = json.loads((request.output / "distill.json").read_text())
    assert begun["recipe"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("where", ["gpu", "cpu"])
def test_too_little_memory_says_the_cure(where, request_of, tmp_path, monkeypatch):
    def hungry(*arguments, **numbers):
        if where == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return torch.empty(1 << 50)

    monkeypatch.setitem(LOSSES, "sigmoid-bce", hungry)
    with pytest.raises(TrainingFailed, match="halve batch and double accumulation") as failed:
        distill(request_of(tmp_path / "s"), silent)
    assert "a batch of 4 clips" in str(failed.value)


def test_an_output_in_use_is_refused(made, tars, tiny_checkpoint, tmp_path):
    folder, _ = made
    before = weights_of(folder)
    error = refused(tars, "-o", folder, "--teacher", tiny_checkpoint, *COMMAND)
    assert "is not empty" in error
    assert f"it holds a finished student, which learns on with --student {folder}" in error
    assert weights_of(folder) == before
    error = refused(tars, "-o", tmp_path, "--teacher", tiny_checkpoint, *COMMAND, "--resume")
    assert "nothing was begun there" in error


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--set", "learning_rate=0.002"], "learning_rate was 0.001, is 0.002"),
        (["--set", "seed=1"], "seed was 0, is 1"),
        (["--limit", "9"], "limit was None, is 9"),
        (["--group-by", "other"], "split was [0.3, 'recording', []], is [0.3, 'other', []]"),
        (["--preset", "distil-ast"], "preset was 'consistent', is 'distil-ast'"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(
    made, tars, annotated, tiny_checkpoint, changed, named
):
    folder, _ = made
    error = refused(
        tars, "-o", folder, "--teacher", tiny_checkpoint, "--teacher-scores", annotated, *COMMAND,
        "--truth", "metadata:labels", "--cache", folder.parent / "cache", "--set",
        "average_decay=0.9", "--set", "epochs=3", "--resume", *changed,
    )  # fmt: skip
    assert f"--resume: {named}; " in error
    assert len(error) < 200


def test_what_was_kept_is_not_begun_anew_where_the_settings_are_damaged(request_of, tmp_path):
    kept = tmp_path / "s" / "checkpoints" / "checkpoint-2"
    kept.mkdir(parents=True)
    (kept / "trainer_state.json").write_text('{"epoch": 1.0}')
    (tmp_path / "s" / "distill.json").write_text('{"recipe": ')
    with pytest.raises(DistillError, match="is not empty"):
        begin(request_of(tmp_path / "s"))
    with pytest.raises(DistillError, match=r"distill\.json is damaged"):
        begin(request_of(tmp_path / "s", resume=True))


@pytest.mark.usefixtures("only_weights")
def test_a_checkpoint_that_was_being_written_is_nothing_that_is_kept(request_of, tmp_path):
    """Of a run with an average; without one, its checkpoint would be whole."""
    request = request_of(tmp_path / "s", average_decay=0.9)
    part = request.output / "checkpoints" / "checkpoint-99"
    part.mkdir(parents=True)
    (part / "trainer_state.json").write_text('{"epoch": 99.0}')
    (request.output / "distill.json").write_text(json.dumps(settings_of(request)))
    assert last_checkpoint(request.output) is None
    distill(request_of(request.output, average_decay=0.0), callbacks=[])
    assert not part.exists() and epoch_of(last_checkpoint(request.output)) == 2


def test_a_finished_run_may_be_resumed(made, tars, annotated, tiny_checkpoint):
    folder, _ = made
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    said = run(
        "distill", tars, "-o", folder, "--teacher", tiny_checkpoint, "--teacher-scores", annotated,
        *COMMAND, "--truth", "metadata:labels", "--cache", folder.parent / "cache", "--set",
        "average_decay=0.9", "--set", "epochs=3", "--resume", "--licence", "apache-2.0",
        "--title", "Tiny",
    )  # fmt: skip
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert said == (
        f"{folder} is finished: its 3 epochs are done. To let it learn on, give it to a new --output "
        f"with --student {folder}\n"
    )


@pytest.mark.usefixtures("only_weights")
def test_clips_without_scores_are_left_out(annotated, tars, tiny_checkpoint, tmp_path):
    rows = pq.read_table(annotated / "clips", columns=["clip_id", "scores", "error"]).to_pylist()
    rows = [row for row in rows if row["error"] is None][::2]
    scores = np.array([row["scores"] for row in rows], np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 527)
    file = tmp_path / "half.parquet"
    pq.write_table(pa.table({"clip_id": [row["clip_id"] for row in rows], "scores": column}), file)
    said = run(
        "distill", tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, "--teacher-scores",
        file, *COMMAND, "--set", "epochs=1",
    )  # fmt: skip
    assert "left out: 10 without teacher scores" in said
    learned, held_out = map(int, re.findall(r"(\d+) clips to learn from, (\d+) held out", said)[0])
    assert learned + held_out == 10
    assert "without teacher scores" in (tmp_path / "s" / "README.md").read_text()


def test_scores_of_other_clips_say_what_both_are_named(tars, tiny_checkpoint, tmp_path):
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(527, np.float32)), 527)
    pq.write_table(pa.table({"clip_id": ["elsewhere"], "scores": column}), tmp_path / "s.parquet")
    error = refused(tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint,
                    "--teacher-scores", tmp_path / "s.parquet", *COMMAND)  # fmt: skip
    assert "20 without teacher scores" in error
    assert re.search(r"names such as '.*a0.*', the scores are of clips such as 'elsewhere'", error)


@pytest.mark.usefixtures("only_weights")
def test_a_stream_is_resumed_with_as_many_workers(tars, tiny_checkpoint, tmp_path):
    command = ("distill", tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, *COMMAND,
               "--set", "epochs=1")  # fmt: skip
    run(*command)
    said = run(*command, "--resume", "--workers", "1", code=2)
    assert "--resume: --workers and processes were [0, 1], are [1, 1]" in said


@pytest.mark.usefixtures("only_weights")
def test_clips_that_cannot_be_heard_are_counted(
    tars, tiny_checkpoint, tmp_path, make_tar, encoded, noise
):
    """Without stored scores the broken clip is found when it is decoded."""
    about = json.dumps({"recording": "r00"}).encode()  # which is learned from, as the broken one is
    long = encoded(noise(31_000), 1_000, format="flac")
    make_tar(
        tmp_path / "more.tar",
        [("x.flac", b"no sound"), ("x.json", about), ("y.flac", long), ("y.json", about)],
    )
    base = [
        tars,
        tmp_path / "more.tar",
        "--teacher",
        tiny_checkpoint,
        *COMMAND,
        "--set",
        "epochs=1",
    ]
    said = run("distill", *base, "-o", tmp_path / "cached", "--cache", tmp_path / "cache")
    assert "1 longer than 30 s" in said and "2 undecodable: " in said
    run("distill", *base, "-o", tmp_path / "streamed")
    card = (tmp_path / "streamed" / "README.md").read_text()
    assert "- 3: undecodable, or too long or short" in card


@pytest.mark.usefixtures("only_weights")
def test_clips_to_judge_by_may_lie_elsewhere(tars, tiny_checkpoint, tmp_path):
    first = tars.parent / "0.tar"
    base = ["--teacher", tiny_checkpoint, *SMALL, "--student-layers", 1, "--max-steps", 1]
    (tmp_path / "s" / "cache").mkdir(parents=True)  # left by a run that was killed as it began
    said = run("distill", tars, *base, "-o", tmp_path / "s", "--validation", first)
    assert not (tmp_path / "s" / "cache").exists()
    assert "10 clips to learn from, 10 held out; left out: 10 also held out" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--validation-share", "0"], "none is held out to judge by; raise --validation-share"),
        (["--validation-share", "1"], "none is to learn from; is everything held out?"),
        (["--truth", "{folder}/griffins.csv"], "none of the 1 labels"),
        (["--truth", "{folder}/missing.csv"], "missing.csv' cannot be read"),
        (["--teacher", "{folder}/nowhere"], "nowhere"),
        (["--teacher", "{folder}/three", "--teacher-scores", "{scores}"], "has other labels (527)"),
        (["--set", "batch=0"], "batch is 0, expected 1 or more"),
        (["--set", "batch"], "--set 'batch': expected NAME=VALUE"),
        (["--set", "balance=0.5"], "balance is 0.5, but a stream"),
        (["--student-layers", "3"], "a student of 3 layers cannot be taken from a teacher of 2"),
        (["--fresh", "depth=3"], "expected one of hidden_size"),
        (["--fresh", "hidden_size=-3"], "is no whole number above 0"),
        (["--fresh", "hidden_size=31"], "hidden_size"),
        (["--fresh", "hidden_size=32", "--student-layers", "1"], "--fresh begins with nothing"),
        (["--validation", "{folder}"], "with --validation nothing of it is held out"),
        (["--push-to-hub", "me"], "expected owner/name"),
        (["--push-to-hub", "me/my--student"], "me/my--student"),
        (["--private"], "--private is for --push-to-hub"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--teacher-layers", "1"], "give one"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments, expected, tars, tiny_checkpoint, annotated, tmp_path, make_checkpoint
):
    make_checkpoint(tmp_path / "three", ["Speech", "Music", "Dog"])
    (tmp_path / "griffins.csv").write_text("file,labels\na0.flac,Griffin\nb2.flac,Griffin\n")
    given = [text.format(folder=tmp_path, scores=annotated) for text in arguments]
    output = tmp_path / "student"
    command = SMALL if "--fresh" in arguments and "--student-layers" not in arguments else COMMAND
    error = refused(tars, "-o", output, "--teacher", tiny_checkpoint, *command, *given)
    assert expected in error
    assert not output.exists()


def test_missing_arguments_are_named(tars, tiny_checkpoint, tmp_path, annotated):
    assert "DATA" in refused("-o", tmp_path / "s")
    assert "--output" in refused(tars)
    assert "nothing to learn from" in refused(tars, "-o", tmp_path / "s")
    error = refused(tars, "-o", tmp_path / "s", "--teacher-scores", annotated)
    assert "have no layers to begin with" in error
    teacher = ["-o", tmp_path / "s", "--teacher", tiny_checkpoint]
    assert "--teacher-layers" in run("distill", tars, *teacher, "--teacher-layers", code=2)
    error = refused(tars, *teacher, "--device", "cpu", "--teacher-layers", "0", "9")
    assert "teacher layers 0 9: the teacher has no layer 9" in error
    assert "nowhere.tar" in refused(tmp_path / "nowhere.tar", *teacher)


@pytest.mark.usefixtures("only_weights")
def test_unknown_labels_among_known_ones_are_said(tars, tiny_checkpoint, tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text("file,labels\na0.flac,Dog\na1.flac,Griffin\nb2.flac,Griffin\n")
    said = run(
        "distill", tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, *COMMAND, "--truth",
        truth, "--set", "epochs=1",
    )  # fmt: skip
    assert "3 clips have labels of their own" in said
    assert "labels that the teacher does not know, left out: 2 Griffin" in said


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub_stand_in(monkeypatch):
    """A Hub that keeps what is uploaded: ({path: content}, commits, repositories that were made)."""
    stored, commits, made_repos = {}, [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            host = f"http://127.0.0.1:{self.server.server_port}"
            answer = {}
            if self.path == "/api/repos/create":
                made_repos.append(json.loads(body))
                answer = {"url": f"{host}/me/tiny", "name": "me/tiny"}
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    item = json.loads(line)
                    if item["key"] == "header":
                        commits.append(item["value"]["summary"])
                    else:
                        content = base64.b64decode(item["value"]["content"])
                        stored[item["value"]["path"]] = content
                answer = {"commitUrl": f"{host}/me/tiny/commit/1", "commitOid": "1" * 40}
            self._send(answer)

        def do_GET(self):
            self._send({"sha": "0" * 40, "id": "me/tiny", "siblings": []})

        def _send(self, answer):
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=endpoint, token="hf_stand_in"))
    yield stored, commits, made_repos
    server.shutdown()
    server.server_close()


def test_what_belongs_to_a_student_is_uploaded(made, hub_stand_in):
    folder, _ = made
    stored, commits, made_repos = hub_stand_in
    place = push(folder, "me/tiny", private=True)
    assert place.endswith("/me/tiny/commit/1")
    assert sorted(stored) == [
        "README.md", "config.json", "curves.png", "metrics.csv", "model.safetensors",
        "preprocessor_config.json", "thresholds.json", "trainer_state.json",
    ]  # fmt: skip
    for name, content in stored.items():
        assert content == (folder / name).read_bytes()
    assert commits == ["Student distilled with Earmark"]
    assert made_repos == [{"name": "tiny", "organization": "me", "visibility": "private"}]


@pytest.mark.usefixtures("only_weights")
def test_the_command_uploads_in_the_end(hub_stand_in, tars, tiny_checkpoint, tmp_path):
    said = run(
        "distill", tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, *COMMAND, "--max-steps",
        1, "--push-to-hub", "me/tiny",
    )  # fmt: skip
    assert re.search(r"Uploaded to http://127\.0\.0\.1:\d+/me/tiny/commit/1", said)
    assert hub_stand_in[0]["model.safetensors"] == weights_of(tmp_path / "s")


def test_an_upload_that_fails_leaves_the_student_and_says_how_to_go_on(made, monkeypatch):
    folder, _ = made

    def without_login(*_, **__):
        raise errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(HfApi, "create_repo", without_login)
    with pytest.raises(HubError, match=r"not logged in; run `hf auth login`") as failed:
        push(folder, "me/tiny")
    assert str(folder) in str(failed.value)

    def without_network(*_, **__):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(HfApi, "create_repo", without_network)
    with pytest.raises(HubError, match=r"no route to host\. The student is in .* `hf upload"):
        push(folder, "me/tiny")


@pytest.mark.parametrize("name", ["me", "me/", "/you", "a/b/c", "me/my student", "me/x.git", ""])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(HubError, match="--push-to-hub"):
        check_id(name)
    check_id("me/tiny-student_1.0")


# ------------------------------------------------------------------ the whole product


def test_from_a_teacher_to_a_student_in_use(tars, annotated, tiny_checkpoint, tmp_path):
    """Teacher, its scores in Parquet, a student, its scores, how good they are."""
    student, tags = tmp_path / "student", tmp_path / "tags"
    run(
        "distill", tars, "-o", student, "--teacher", tiny_checkpoint, "--teacher-scores", annotated,
        *COMMAND, "--set", "epochs=10", "--set", "average_decay=0", "--cache", tmp_path / "cache",
    )  # fmt: skip
    run("annotate", tars, "--checkpoint", student, "--output", tags)
    report = tmp_path / "report.json"
    said = run(
        "evaluate", tags, "--truth", annotated, "--teacher", annotated, "--save", report,
        "--bootstrap", 0,
    )  # fmt: skip
    assert "macro mAP" in said
    report = json.loads(report.read_text())
    assert report["availability"]["scored"] == 19
    # The teacher's own tags are the truth: it is never wrong. What the student began as was.
    assert report["teacher"]["card"]["mAP"] > 0.99
    untrained = student_from_teacher(
        AutoModelForAudioClassification.from_pretrained(tiny_checkpoint), (1,)
    )
    untrained.save_pretrained(tmp_path / "untrained")
    AutoFeatureExtractor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "untrained")
    before = tmp_path / "before.json"
    run("annotate", tars, "--checkpoint", tmp_path / "untrained", "--output", tmp_path / "first")
    run("evaluate", tmp_path / "first", "--truth", annotated, "--save", before, "--bootstrap", 0)
    learned = report["student"]["card"]["mAP"]
    assert learned > json.loads(before.read_text())["student"]["card"]["mAP"] + 0.05


def test_no_more_clips_judge_than_the_limit(request_of, tmp_path, monkeypatch, only_weights):
    monkeypatch.setattr("training.lesson.MAX_HELD_OUT_CLIPS", 2)
    request = request_of(tmp_path / "student", max_steps=1, split=Split(0.6))
    done = distill(request, say=lambda line: None)
    assert done.validation_clips == 2
    assert done.skipped["held out beyond the 2 that judge"] >= 1


def test_the_trainers_state_is_json_that_any_reader_takes(made):
    def refuse(name):
        raise ValueError(name)

    json.loads((made[0] / "trainer_state.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("option", "value"), [("--hold-out", "fold=4"), ("--group-by", "no such field")]
)
def test_a_split_by_a_field_that_no_clip_has_is_refused(
    tars, tiny_checkpoint, tmp_path, option, value
):
    said = run(
        "distill", tars, "--output", tmp_path / "student", "--teacher", tiny_checkpoint,
        "--student-layers", 1, option, value, code=2,
    )  # fmt: skip
    name = value.partition("=")[0]
    assert (
        f"{option}: no clip's metadata has a field {name!r}; it has 'labels', 'recording'" in said
    )


def test_the_weights_can_be_read_by_whoever_may_read_the_rest(made):
    folder = made[0]
    modes = {name: (folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(set(modes.values())) == 1


def test_a_value_that_holds_out_no_clip_is_refused(tars, tiny_checkpoint, tmp_path):
    error = refused(
        tars, "-o", tmp_path / "student", "--teacher", tiny_checkpoint, "--student-layers", 1,
        "--hold-out", "recording=r99",
    )  # fmt: skip
    assert "--hold-out: no clip's metadata has recording=r99" in error


def test_a_truth_that_meets_no_clip_is_refused(tars, tiny_checkpoint, tmp_path):
    (tmp_path / "truth.csv").write_text("file,labels\nelsewhere.flac,Speech\n")
    command = (tars, "-o", tmp_path / "s", "--teacher", tiny_checkpoint, "--student-layers", 1)
    error = refused(*command, "--truth", tmp_path / "truth.csv")
    assert "names none of the 20 clips, which are known by names such as 'a" in error
    error = refused(*command, "--truth", "metadata:lables")
    assert "none of the 20 clips has a field 'lables' in its metadata, which has 'labels'" in error


def test_features_do_not_follow_autocast(tiny_checkpoint, noise):
    """float16 does not hold the power of a loud sound, and bfloat16 not its digits."""
    listener = trainer.Listener.of(
        ASTForAudioClassification.from_pretrained(tiny_checkpoint),
        FeatureSpec(num_mel_bins=32, max_length=128),
    )
    waveforms, lengths = torch.from_numpy(noise((2, 8_000))), torch.tensor([8_000, 8_000])
    expected = listener.log_mel(waveforms, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(listener.hear(waveforms, lengths), expected, rtol=0, atol=0)


def test_a_gpu_by_number_is_refused(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr("training.distill.choose_device", lambda _: torch.device("cuda", 1))
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=1"):
        distill(request_of(tmp_path / "student"), say=lambda line: None)


@pytest.mark.parametrize(("every", "stops"), [(1, False), (2, True)])
def test_patience_is_in_epochs_however_seldom_is_judged(tmp_path, every, stops):
    keeper = trainer.KeepBest(4, every, tmp_path)
    keeper.trainer = SimpleNamespace(average=None)
    state = SimpleNamespace(
        log_history=[{"eval_mAP": value} for value in (0.5, 0.4, 0.3)], is_world_process_zero=True
    )
    control = SimpleNamespace(should_training_stop=False)
    keeper.on_evaluate(None, state, control, {"eval_mAP": 0.3})
    assert control.should_training_stop is stops


@pytest.mark.usefixtures("only_weights")
def test_the_card_names_what_judged_and_what_was_used(request_of, tmp_path):
    request = request_of(tmp_path / "s", max_steps=1, validation_data="other clips")
    done = distill(request, say=lambda line: None)
    card = (tmp_path / "s" / "README.md").read_text("utf-8")
    assert done.card.hyperparameters["precision"] == "float32"
    assert (done.card.hyperparameters["steps"], done.card.hyperparameters["total_batch"]) == (1, 8)
    assert [data.name for data in done.card.data] == ["clips", "other clips"]
    assert "What is true of these clips is what the teacher says of them" in card


def test_thresholds_know_their_weights(made):
    stated = json.loads((made[0] / "thresholds.json").read_text())["fitted_on"]["weights_sha256"]
    assert stated == read_checkpoint(str(made[0])).weights_sha256


@pytest.mark.usefixtures("only_weights")
def test_teacher_and_student_in_cloud_storage(
    made, tars, annotated, tiny_checkpoint, earmark, tmp_path
):
    folder, _ = made
    with CloudStorage("models") as cloud:
        for name, place in (("teacher", tiny_checkpoint), ("student", folder)):
            for file in place.iterdir():
                if file.suffix in (".json", ".safetensors"):
                    cloud.put("models", f"{name}/{file.name}", file.read_bytes())
        common = (*SMALL, "--set", "epochs=1", "--max-steps", "1")
        earmark(cloud.env, "distill", tars, "-o", tmp_path / "a", "--teacher", "gs://models/teacher",
                "--student-layers", 1, *common)  # fmt: skip
        earmark(cloud.env, "distill", tars, "-o", tmp_path / "b", "--student", "gs://models/student",
                "--teacher-scores", annotated, *common)  # fmt: skip
        card = (tmp_path / "b" / "README.md").read_text()
        assert "It learned on from the weights of gs://models/student." in card
        error = earmark(cloud.env, "distill", tars, "-o", tmp_path / "c", "--student",
                        "gs://models/no", "--teacher-scores", annotated, *common, code=2)  # fmt: skip
        assert "checkpoint 'gs://models/no' cannot be fetched" in error
