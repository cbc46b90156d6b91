"""The recipe of the bundled student, on a few clips; and the sounds that it synthesises."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from student import Student
from student.features import FeatureSpec
from student.labels import audioset_labels
from training import bundled
from training.card import card
from training.corpus import is_held_out, read_corpus
from training.sounds import SAMPLE_RATE, SOUNDS, synthesise

SPEC = FeatureSpec(num_mel_bins=64, max_length=512)


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


def test_corpus_is_split_by_group_and_only_training_targets_are_lifted(corpus):
    folder, scores = corpus
    train, held_out = read_corpus(folder, SPEC, limit=0)
    assert sorted(train.ids + held_out.ids) == [f"clip-{n}" for n in range(8)]
    assert "clip-2" in held_out.ids  # ESC-10 fold 4
    assert {"clip-0", "clip-1"} <= set(train.ids)
    dog = next(label.index for label in audioset_labels() if label.mid == "/m/0bt9lr")
    expected = scores[0].astype(np.float32)
    expected[dog] = max(expected[dog], 0.8)
    np.testing.assert_array_equal(train.targets[train.ids.index("clip-0")], expected)
    held = held_out.targets[held_out.ids.index("clip-2")]
    np.testing.assert_array_equal(held, scores[2].astype(np.float32))


def test_groups_are_held_out_whole_and_about_a_tenth():
    facts = [{"group": f"{number:x}"} for number in range(2_000)]
    sides = [is_held_out(clip) for clip in facts]
    assert sides == [is_held_out(clip) for clip in facts]
    assert 0.08 < np.mean(sides) < 0.12


def test_the_recipe_gives_a_checkpoint_that_loads(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    monkeypatch.setattr(bundled, "SYNTHETIC_PER_SOUND", 1)
    monkeypatch.setattr(bundled, "SYNTHETIC_VALIDATION_PER_SOUND", 1)
    output = tmp_path / "student"
    arguments = ["--corpus", str(folder), "--output", str(output), "--batch", "4"]
    bundled.main([*arguments, "--steps", "3"])
    student = Student.load(str(output))
    assert student.parameters == 2_846_351
    assert student.labels == audioset_labels()
    assert student.features.chunk_s == 5.12
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["esc10_clips"], metrics["synthetic_clips"], metrics["steps"]) == (1, 20, 3)
    assert "author 0" in (output / "ATTRIBUTION.md").read_text()
    assert "2,846,351" in (output / "README.md").read_text()
    assert (output / "held_out.txt").read_text().split()[0] == "clip-2"

    weights = (output / "model.safetensors").read_bytes()
    bundled.main([*arguments, "--steps", "3"])
    assert (output / "model.safetensors").read_bytes() == weights  # seeded
    bundled.main([*arguments, "--steps", "3", "--measure-only"])
    assert json.loads((output / "metrics.json").read_text()) == metrics


def test_patchout_keeps_what_is_audible():
    torch.manual_seed(0)
    model = bundled.ASTForAudioClassification(bundled.config(SPEC)).eval()
    inputs = torch.randn(2, 512, 64)
    inside = torch.ones(2, 512, dtype=torch.bool)
    with torch.no_grad():
        whole = bundled.logits_of(model, inputs, inside, keep=1.0)
        torch.testing.assert_close(whole, model(inputs).logits)
        assert not torch.allclose(bundled.logits_of(model, inputs, inside, keep=0.4), whole)


@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.name)
def test_synthetic_sounds_are_audible_labelled_and_repeatable(sound):
    names = {label.name for label in audioset_labels()}
    assert set(sound.labels) <= names
    for duration_s in (1.0, 7.3):
        wave = synthesise(sound, np.random.default_rng(1), duration_s)
        assert wave.dtype == np.float32 and len(wave) == int(duration_s * SAMPLE_RATE)
        assert np.abs(wave).max() <= 1.0
        assert (np.abs(wave).max() > 0.01) == (sound.name != "silence")
        again = synthesise(sound, np.random.default_rng(1), duration_s)
        np.testing.assert_array_equal(wave, again)


def test_the_bundled_students_card_and_numbers_belong_together():
    folder = Path(bundled.__file__).parent.parent / "student" / "bundled"
    metrics = json.loads((folder / "metrics.json").read_text())
    size = (folder / "model.safetensors").stat().st_size
    assert (folder / "README.md").read_text("utf-8") == card(metrics, size)
