"""The bundled student is what its card says, measured through the whole program."""

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from transformers import ASTFeatureExtractor, ASTForAudioClassification
from transformers import pipeline as hf_pipeline

from pipeline.cli import cli
from pipeline.demo import write_demo_shards
from student import Student
from student.checkpoint import BUNDLED_DIRECTORY
from student.labels import audioset_labels

METRICS = json.loads((BUNDLED_DIRECTORY / "metrics.json").read_text())


def test_transformers_loads_it_as_it_is(noise):
    waveform = noise(70_000)
    extractor = ASTFeatureExtractor.from_pretrained(BUNDLED_DIRECTORY)
    model = ASTForAudioClassification.from_pretrained(BUNDLED_DIRECTORY, dtype="float32")
    tagger = hf_pipeline("audio-classification", model=model, feature_extractor=extractor)
    theirs = {answer["label"]: answer["score"] for answer in tagger(waveform, top_k=527)}
    ours = Student.load("bundled", device="cpu").score([waveform])[0]
    names = [label.name for label in audioset_labels()]
    np.testing.assert_allclose(ours, [theirs[name] for name in names], atol=1e-5)


def test_it_finds_the_class_of_held_out_clips_as_often_as_its_card_says(shared, tmp_path):
    """ESC-10's fold 4, from Opus in a tar to scores in Parquet."""
    held_out = set((BUNDLED_DIRECTORY / "held_out.txt").read_text().split())
    copied = 0
    with tarfile.open(tmp_path / "esc10.tar", "w") as subset:
        for path in sorted((shared / "corpus").glob("permissive-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if (
                        member.name.startswith("esc10")
                        and member.name.partition(".")[0] in held_out
                    ):
                        subset.addfile(member, tar.extractfile(member))
                        copied += member.name.endswith(".ogg")
    assert copied == METRICS["esc10_clips"] == 80

    command = ["annotate", str(tmp_path / "esc10.tar"), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(cli, command).exit_code == 0
    table = pq.read_table(next((tmp_path / "out" / "clips").glob("*.parquet")))
    index_of = {label.mid: label.index for label in audioset_labels()}
    right = 0
    for row in table.select(["scores", "metadata"]).to_pylist():
        own = {index_of[mid] for mid in json.loads(row["metadata"])["labels"]}
        right += bool(own & set(np.argsort(-np.array(row["scores"]))[:5].tolist()))
    assert right / copied == pytest.approx(METRICS["esc10_own_label_in_top5"], abs=0.03)
    assert right / copied > 0.6


def test_demo_shows_truth_beside_tags(tmp_path):
    result = CliRunner().invoke(cli, ["demo", str(tmp_path)])
    assert result.exit_code == 0, result.output
    right, total = map(int, _numbers(result.output, "A true label is among the highest 3 in "))
    assert total == 20 and right >= 12
    assert "1 failed to decode" in result.output
    summary = json.loads((tmp_path / "tags" / "summary.json").read_text())
    assert (summary["clips"], summary["failed"]) == (21, 1)


def test_demo_shards_are_the_same_every_time(tmp_path):
    first = [path.read_bytes() for path in write_demo_shards(tmp_path / "a")]
    assert first == [path.read_bytes() for path in write_demo_shards(tmp_path / "b")]


def _numbers(text, before):
    rest = text.split(before)[1].split(" clips.")[0]
    return rest.split(" of ")
