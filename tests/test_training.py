"""The recipe of the bundled student, on a few clips; and the sounds that it synthesises."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from student import Student
from student.checkpoint import BUNDLED_DIRECTORY
from student.labels import audioset_labels
from training import bundled
from training.assistant import Assistant, train_assistant
from training.attribution import attributions
from training.corpus import corpus_clips
from training.lesson import DistillError
from training.sounds import SAMPLE_RATE, SOUNDS, synthesise
from training.trainer import WeightAverage, put_weights
from transforms.read import read_clips
from transforms.shards import plan_shards

LABELS = audioset_labels()


@pytest.fixture
def corpus(tmp_path, make_tar, encoded, noise):
    """Eight clips in the corpus's form: three of ESC-10, five of other sources."""
    members, ids = [], []
    for number in range(8):
        facts = {"repo": "some/sounds", "licence": "CC0-1.0", "author": f"author {number}"}
        facts["group"] = f"group-{number}"
        if number < 3:
            facts |= {"esc10_fold": number + 2, "esc10_class": "Dog bark", "labels": ["/m/0bt9lr"]}
        ids.append(f"clip-{number}")
        audio = encoded(noise(8_000 * (number + 1), seed=number), format="ogg")
        members += [(f"{ids[-1]}.ogg", audio), (f"{ids[-1]}.json", json.dumps(facts).encode())]
    make_tar(tmp_path / "permissive-00000.tar", members)
    make_tar(tmp_path / "sharealike-00000.tar", [("never.ogg", b"must not be read")])
    scores = np.random.default_rng(0).random((8, 527)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 527)
    pq.write_table(
        pa.table({"clip_id": ids, "scores": column}), tmp_path / "teacher_scores.parquet"
    )
    return tmp_path, scores


def test_the_share_alike_clips_stay_out(corpus):
    folder, _ = corpus
    clips = [(clip.member, clip.metadata["group"]) for clip in corpus_clips(folder)]
    assert clips == [(f"clip-{number}.ogg", f"group-{number}") for number in range(8)]


def test_only_the_first_label_of_an_esc10_clip_is_its_own(corpus, tmp_path):
    folder, _ = corpus
    bundled.write_esc10_labels(folder, tmp_path / "labels.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert rows == [
        {"clip_id": f"clip-{number}.ogg", "labels": ["/m/0bt9lr"]} for number in range(3)
    ]


def test_synthesised_scores_are_known_by_construction(tmp_path):
    bundled.write_synthetic(tmp_path, 2)
    rows = pq.read_table(tmp_path / bundled.SYNTHETIC_SCORES).to_pylist()
    [shard] = plan_shards([str(tmp_path / bundled.SYNTHETIC_TAR)]).shards
    members = [clip.member for clip in read_clips(shard)]
    assert members == [f"{row['clip_id']}.wav" for row in rows]
    assert len(rows) == 2 * len(SOUNDS)
    index_of = {label.name: label.index for label in LABELS}
    for row, sound in zip(rows[::2], SOUNDS, strict=True):
        expected = np.zeros(527, np.float16)
        expected[[index_of[name] for name in sound.labels]] = 0.7
        expected[index_of[sound.labels[0]]] = 0.9
        np.testing.assert_array_equal(np.array(row["scores"], np.float16), expected)


def test_what_is_held_out_is_fold_4_and_no_synthesised_sound():
    split = bundled.SPLIT
    assert split.is_held_out("a", {"esc10_fold": 4, "group": "g"})
    assert not split.is_held_out("a", {"esc10_fold": 2, "group": "g"})
    assert not any(split.is_held_out(f"s{n}", {"esc10_fold": 0}) for n in range(100))
    groups = [split.is_held_out("x", {"group": f"{number:x}"}) for number in range(2_000)]
    assert 0.08 < np.mean(groups) < 0.12


def test_the_recipe_gives_a_checkpoint_that_loads(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    monkeypatch.setattr(bundled, "SYNTHETIC_PER_SOUND", 1)
    monkeypatch.setattr(bundled, "SYNTHETIC_VALIDATION_PER_SOUND", 1)
    for name in ("FIRST", "THEN"):
        monkeypatch.setattr(bundled, name, replace(getattr(bundled, name), batch=8))
    output, work = tmp_path / "student", tmp_path / "work"
    arguments = ["--corpus", str(folder), "--output", str(output), "--work", str(work)]
    arguments += ["--workers", "0", "--epochs", "1"]
    bundled.main(arguments)
    said = (work / "then" / "README.md").read_text()
    assert "It learned on from the weights of student." in said
    student = Student.load(str(output))
    assert student.parameters == 2_846_351
    assert student.labels == LABELS
    assert student.features.chunk_s == 5.12
    assert (output / "model.safetensors").stat().st_size < 8_000_000
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["esc10_clips"], metrics["synthetic_clips"]) == (1, len(SOUNDS))
    assert metrics["synthetic_train_clips"] == len(SOUNDS)
    assert metrics["epochs"] == {"first": 1, "assistant": 1, "then": 1}
    held_out = (output / "held_out.txt").read_text().split()
    assert "clip-2" in held_out and not {"clip-0", "clip-1"} & set(held_out)
    assert metrics["corpus_clips"] + metrics["held_out_clips"] == 8
    assert "author 0" in (output / "ATTRIBUTION.md").read_text()
    card = (output / "README.md").read_text()
    assert str(tmp_path) not in card and "half from what a convolutional network" in card
    assert "2,846,351" in card and "demonstration" in card
    assert f"{100 * metrics['synthetic_own_label_in_top3']:.1f} %" in card


def test_authors_are_named_by_repository_and_licence():
    facts = [
        {"repo": "b/sounds", "licence": "MIT", "author": "Ann"},
        {"repo": "b/sounds", "licence": "CC0-1.0", "author": ""},
        {"repo": "a/sounds", "licence": "MIT", "author": "[list](AUTHORS)"},
        {"repo": "b/sounds", "licence": "MIT", "author": "Ann"},
        {"repo": "b/sounds", "licence": "MIT", "author": "Bob"},
    ]
    said = attributions(facts)
    assert said.index("## a/sounds") < said.index("## b/sounds")
    assert "- MIT: Ann; Bob\n" in said and "- CC0-1.0: not named\n" in said
    assert "- MIT: others, listed in the repository\n" in said


@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.name)
def test_synthetic_sounds_are_audible_labelled_and_repeatable(sound):
    names = {label.name for label in LABELS}
    assert set(sound.labels) <= names
    for duration_s in (1.0, 7.3):
        wave = synthesise(sound, np.random.default_rng(1), duration_s)
        assert wave.dtype == np.float32 and len(wave) == int(duration_s * SAMPLE_RATE)
        assert np.abs(wave).max() <= 1.0
        assert (np.abs(wave).max() > 0.01) == (sound.name != "silence")
        again = synthesise(sound, np.random.default_rng(1), duration_s)
        np.testing.assert_array_equal(wave, again)


def test_the_bundled_students_card_and_numbers_belong_together():
    metrics = json.loads((BUNDLED_DIRECTORY / "metrics.json").read_text())
    card = (BUNDLED_DIRECTORY / "README.md").read_text("utf-8")
    for name in (
        "esc10_own_label_in_top5", "esc10_right_class_of_ten", "teacher_top1_in_top5",
        "teacher_top1_in_top5_where_above_0.5", "synthetic_own_label_in_top3",
    ):  # fmt: skip
        assert f"| {100 * metrics[name]:.1f} % |" in card
    size_bytes = (BUNDLED_DIRECTORY / "model.safetensors").stat().st_size
    assert f"{metrics['parameters']:,}" in card and f"{size_bytes / 1e6:.1f} MB" in card
    held_out = (BUNDLED_DIRECTORY / "held_out.txt").read_text().split()
    assert len(held_out) == metrics["held_out_clips"]


def test_an_assistant_is_called_as_a_model_and_kept_as_a_file(tmp_path):
    torch.manual_seed(0)
    assistant = Assistant(527).eval()
    features = torch.randn(2, 96, 32)
    with torch.no_grad():
        logits = assistant(features).logits
    assert logits.shape == (2, 527)
    assert sum(weight.numel() for weight in assistant.parameters()) == 2_389_871
    save_file(assistant.state_dict(), tmp_path / "a.safetensors")
    again = Assistant(527).eval()
    again.load_state_dict(load_file(tmp_path / "a.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again(features).logits, logits)


def test_an_average_is_of_what_normalisations_know_too():
    assistant = Assistant(3)
    average = WeightAverage(assistant, 0.5, None)
    average.on_train_begin(None, SimpleNamespace(global_step=100), None)
    name = "stem.1.running_mean"
    before = average.weights[name].clone()
    assistant(torch.randn(4, 96, 32) + 5)
    after = assistant.state_dict()[name].clone()
    assert not torch.allclose(before, after)
    average.on_step_end(None, None, None)
    torch.testing.assert_close(average.weights[name], (before + after) / 2)
    put_weights(assistant, average.weights)
    torch.testing.assert_close(assistant.state_dict()[name], (before + after) / 2)


@pytest.mark.parametrize(("steps", "most"), [(3, 0.004), (8, 3e-5), (100, 1e-11)])
def test_the_average_of_a_short_training_has_let_go_of_its_beginning(steps, most):
    """Of the weights before the first step hardly anything is left, however slow the decay."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.999, None)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.on_train_begin(None, SimpleNamespace(global_step=0), None)
        model.weight.fill_(0.0)
    for _ in range(steps):
        average.on_step_end(None, None, None)
    assert 0 <= float(average.weights["weight"]) < most


def test_an_assistant_learns_once(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    arguments = argparse.Namespace(
        corpus=folder, work=tmp_path / "work", epochs=2.0, workers=0, resume=False, limit=None
    )
    arguments.work.mkdir()
    bundled.write_synthetic(arguments.work, 1)
    bundled.write_esc10_labels(folder, arguments.work / bundled.LABELS)
    recipe = replace(bundled.ASSISTANTS, batch=8, judge_every_epochs=1)
    request = bundled.request(arguments, recipe, tmp_path / "assistant", fresh=bundled.SHAPE)
    said = []
    first = train_assistant(request, said.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said if "held out: l" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert not first.model.training

    def never(*_):
        raise AssertionError("it has learned already")

    monkeypatch.setattr("training.assistant.trainer_of", never)
    with pytest.raises(DistillError, match="is not empty"):
        train_assistant(request, said.append)
    other = replace(request, resume=True, recipe=replace(recipe, epochs=3.0))
    with pytest.raises(DistillError, match=r"--resume: epochs was 2\.0, is 3\.0"):
        train_assistant(other, said.append)
    again = train_assistant(replace(request, resume=True), said.append)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
