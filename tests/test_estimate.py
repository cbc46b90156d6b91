"""`earmark estimate`: what is said before a run, and how it is held against what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.roofline import flops_of
from bench.stand_ins import CloudStorage
from pipeline import forecast
from pipeline.cli import cli
from pipeline.expected import COMPARED, compared, sentence
from pipeline.ledger import beside_estimate
from pipeline.profile import SIDES
from transforms.chunk import cut_chunks
from transforms.write import ShardSummary


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise) -> Path:
    """Three tars of 12 clips of 1 to 3 s, one clip in twelve broken."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = [
            (f"{shard}-{n:02d}.wav", encoded(noise(16_000 + 3_000 * n, seed=20 * shard + n)))
            for n in range(11)
        ]
        make_tar(folder / f"s-{shard}.tar", [*members, (f"{shard}-99.flac", b"fLaC no more")])
    return folder


AUDIO_S = 3 * sum(1 + 3_000 * n / 16_000 for n in range(11))


def stated(earmark, *arguments: object) -> dict:
    said = earmark({}, "estimate", *arguments, "--json")
    return json.JSONDecoder().raw_decode(said, said.index("{"))[0]  # what stderr says is around it


@pytest.fixture
def run(earmark, tiny_checkpoint):
    def estimate(*arguments: object) -> dict:
        return stated(earmark, *arguments, "--checkpoint", tiny_checkpoint)

    return estimate


def test_what_was_read_whole_is_known_and_not_guessed(run, shards):
    found = run(shards)
    assert found["shards"] == 3
    assert found["input_bytes"] == sum(file.stat().st_size for file in shards.iterdir())
    assert found["clips"] == {"expected": 36, "low": 36, "high": 36}
    assert found["audio_s"]["expected"] == pytest.approx(AUDIO_S, rel=1e-3)
    assert found["audio_s"]["low"] == pytest.approx(found["audio_s"]["high"])
    assert found["failed"]["expected"] == 3
    assert found["sample"]["all_read"] and found["sample"]["tagged_clips"] == 36
    assert found["binds"] in {stage for stages, _ in SIDES.values() for stage in stages}
    assert not (shards / "estimate.json").exists()


def test_a_few_clips_stand_for_all_with_a_range(run, shards):
    found = run(shards, "--sample", 12, "--seed", 3)
    chunks = found["chunks"]
    assert found["sample"]["tagged_clips"] == 12
    assert chunks["low"] < chunks["expected"] < chunks["high"]
    # A WAV's bytes tell its seconds, and all bytes were read.
    assert found["audio_s"]["expected"] == pytest.approx(AUDIO_S, rel=0.01)
    assert run(shards, "--sample", 12, "--seed", 3)["chunks"] == chunks


@pytest.mark.parametrize("form", ["tars", "files", "parquet", "mixed"])
def test_a_draw_of_parts_comes_near_in_every_form(run, form, tmp_path, shared, monkeypatch):
    from bench.estimate import inputs_of

    tars = [str(shared / "corpus" / f"permissive-0000{n}.tar") for n in (0, 2, 4)]
    monkeypatch.setattr(forecast, "_CENSUS_BYTES", 0)
    monkeypatch.setattr(forecast, "_PART_BYTES", 300_000)
    monkeypatch.setattr(forecast, "_PASSES", 1)
    found = run(*inputs_of(tars, form, tmp_path))
    assert not found["sample"]["all_read"]
    assert found["clips"]["expected"] == pytest.approx(1_500, rel=0.2)
    assert found["audio_s"]["expected"] == pytest.approx(6_640, rel=0.2)
    assert found["clips"]["low"] <= found["clips"]["expected"] <= found["clips"]["high"]


def test_after_the_run_expected_and_actual_stand_side_by_side(earmark, run, shards, tmp_path):
    out = tmp_path / "out"
    found = run(shards, "--output", out)
    assert json.loads((out / "estimate.json").read_text()) == found
    said = earmark({}, "annotate", shards, "--output", out)
    beside = json.loads((out / "summary.json").read_text())["estimate"]
    assert set(beside) == {"clips", "audio_s", "audio_bytes", "output_bytes", "wall_s"}
    assert beside["clips"]["actual"] == 36 and beside["clips"]["ratio"] == 1
    assert beside["audio_s"]["ratio"] == pytest.approx(1, abs=0.001)
    assert beside["audio_bytes"]["ratio"] == 1
    assert beside["output_bytes"]["ratio"] == pytest.approx(1, abs=0.2)
    assert re.search(r"Beside its estimate: clips \+0 %, audio \+0 %, bytes \+0 %, output", said)
    # Finished shards need no more estimate.
    again = earmark({}, "estimate", shards, "--output", out, "--checkpoint", _student(out), code=2)
    assert "nothing to estimate: all 3 shards have a file" in again


def _student(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["checkpoint"]["name"]


def test_a_run_of_other_shards_or_options_is_not_held_against_it(earmark, run, shards, tmp_path):
    out = tmp_path / "out"
    run(shards / "s-0.tar", "--output", out)
    said = earmark({}, "annotate", shards, "--output", out)
    assert "Not held against its estimate: the estimate is of 1 shards, this run did 3." in said
    run(shards, "--output", tmp_path / "chunks")
    said = earmark({}, "annotate", shards, "--output", tmp_path / "chunks", "--chunks")
    assert "the estimate is of a run with another chunks" in said
    summary = json.loads((tmp_path / "chunks" / "summary.json").read_text())
    assert set(summary["estimate"]) == {"not_compared"}


def test_overwrite_removes_the_estimate_of_the_run_before(earmark, run, shards, tmp_path):
    out = tmp_path / "out"
    run(shards, "--output", out)
    earmark({}, "annotate", shards, "--output", out)
    said = earmark({}, "annotate", shards, "--output", out, "--overwrite")
    assert "its estimate" not in said and not (out / "estimate.json").exists()


def test_without_an_estimate_there_is_no_word_of_it(earmark, shards, tmp_path):
    said = earmark({}, "annotate", shards, "--output", tmp_path / "out")
    assert "its estimate" not in said
    assert "estimate" not in json.loads((tmp_path / "out" / "summary.json").read_text())


def test_options_that_make_the_table_larger_are_seen(run, shards):
    plain, more = (run(shards, *extra) for extra in ([], ["--chunks", "--embeddings"]))
    assert more["output_bytes"]["expected"] > 1.5 * plain["output_bytes"]["expected"]
    assert plain["scoring"]["chunks"] is False and more["scoring"]["chunks"] is True
    assert run(shards, "--limit", 5)["clips"] == {"expected": 5, "low": 5, "high": 5}


def test_workers_share_shards_and_cost_by_the_hour(run, shards):
    found = run(shards, "--workers", "1,3,9", "--price-per-hour", "2.5")
    one, three, nine = found["workers"]
    assert [entry["workers"] for entry in found["workers"]] == [1, 3, 9]
    assert one["wall_s"]["expected"] > three["wall_s"]["expected"]
    assert nine["wall_s"]["expected"] == pytest.approx(three["wall_s"]["expected"], abs=0.2)
    for entry in found["workers"]:
        assert entry["wall_s"]["low"] <= entry["wall_s"]["expected"] <= entry["wall_s"]["high"]
        hours = entry["worker_h"]["expected"]
        assert hours == pytest.approx(
            entry["wall_s"]["expected"] * entry["workers"] / 3_600, rel=0.02
        )
        assert entry["cost"]["expected"] == pytest.approx(2.5 * hours, rel=0.02)


def test_a_gpu_is_said_to_be_no_measurement_and_has_a_wide_range(earmark, run, shards):
    found = run(shards, "--gpu", "nvidia-l4")
    assert "no GPU of this type was measured" in found["source"] and found["dtype"] == "bfloat16"
    wall = found["workers"][0]["wall_s"]
    assert wall["high"] > 2 * wall["low"]
    assert run(shards, "--gpu", "none")["source"] is None


def test_what_a_person_sees(earmark, shards, tiny_checkpoint):
    said = earmark(
        {},
        "estimate",
        shards,
        "--checkpoint",
        tiny_checkpoint,
        "--sample",
        12,
        "--price-per-hour",
        1,
    )
    assert re.search(r"^Clips: +36$", said, re.MULTILINE)
    assert re.search(r"^Audio: +[\d.]+ s$", said, re.MULTILINE)
    assert re.search(r"^workers +time +worker hours +cost$", said, re.MULTILINE)
    assert "3 shards, so 4 workers are more than can work" in said
    assert "Bottleneck: " in said


def test_mistakes_are_said_before_anything_is_read(earmark, shards, tmp_path):
    for arguments, message in [
        (["--workers", "0,2"], "--workers '0,2': expected numbers from 1 on"),
        (["--price-per-hour", "nan"], "--price-per-hour nan is no price"),
        (["--price-per-hour", "inf"], "--price-per-hour inf is no price"),
        (["--gpu", "abacus"], "--gpu 'abacus' is unknown"),
        (["--save", tmp_path / "no" / "x.json"], "cannot be written: there is no folder"),
        (["--save", tmp_path], "cannot be written: it is a folder; name a file"),
        (["--checkpoint", "nowhere/"], "nowhere/"),
        (["--device", "cuda:7"], "device 'cuda:7' was asked for"),
    ]:
        assert message in earmark({}, "estimate", shards, *arguments, code=2)
    assert "does not exist" in earmark({}, "estimate", tmp_path / "none", code=2)
    assert "Missing argument" in earmark({}, "estimate", code=2)


def test_a_bucket_is_sampled_and_gets_the_estimate(earmark, shards, tiny_checkpoint):
    with CloudStorage("in", "out") as cloud:
        for file in shards.iterdir():
            cloud.put("in", file.name, file.read_bytes())
        options = ["--output", "gs://out/tags", "--checkpoint", tiny_checkpoint]
        said = earmark(cloud.env, "estimate", "gs://in/*.tar", *options)
        assert re.search(r"^Clips: +36$", said, re.MULTILINE)
        assert cloud.names("out") == ["tags/estimate.json"]
        said = earmark(cloud.env, "annotate", "gs://in/*.tar", *options)
        assert "Beside its estimate: clips +0 %" in said


# ------------------------------------------------------------------------- arithmetic


def test_the_last_worker_to_be_done_sets_the_time():
    share = forecast._longest_share
    assert share([1, 1, 1, 1], 4, 2) == 0.5
    assert share([1, 1, 1, 1], 4, 3) == 0.5  # one of them has two
    assert share([1, 1, 1, 5], 4, 8) == 5 / 8
    assert share([], 200_000, 2) == 0.5


def test_the_operations_of_a_chunk_are_those_of_the_roofline():
    from transformers import ASTConfig

    config = ASTConfig(num_hidden_layers=6, id2label={n: str(n) for n in range(527)})
    counted = flops_of(config, last_queries=2)
    ours = forecast.flop_per_chunk(config.to_dict())
    assert ours == pytest.approx(sum(counted.values()) - counted["head"], rel=1e-6)


def test_a_damaged_estimate_is_said_to_be_one():
    for content in (b"{", b"[]", b'{"format": "else"}', b"{}"):
        found = compared(content, {}, 1, {})
        assert "estimate.json cannot be read" in found["not_compared"]
    assert compared(None, {}, 1, {}) is None


def test_only_what_is_known_is_compared():
    scoring = dict.fromkeys(COMPARED, 1)
    content = {
        "format": "earmark.estimate/1",
        "shards": 2,
        "scoring": scoring,
        "source": None,
        "workers": [{"workers": 1, "run_s": {"expected": 10.0, "low": 9.0, "high": 12.0}}],
        "clips": {"expected": 100, "low": 90, "high": 110},
        "audio_s": {"expected": 0, "low": 0, "high": 0},
    }
    text = json.dumps(content).encode()
    found = compared(
        text, scoring, 2, {"clips": 110, "audio_s": 3.0, "wall_s": 20.0, "audio_bytes": None}
    )
    assert found["clips"] == {"expected": 100, "low": 90, "high": 110, "actual": 110, "ratio": 1.1}
    assert found["audio_s"]["ratio"] is None and found["wall_s"]["ratio"] == 2
    assert sentence(found) == "Beside its estimate: clips +10 %, time +100 %."
    content["source"] = "a table"  # of a GPU: no time of this machine
    assert "wall_s" not in compared(json.dumps(content).encode(), scoring, 2, {"wall_s": 1.0})


@pytest.mark.parametrize(
    ("run", "compared_too"),
    [
        ({"computed_by": {"device": "cpu"}, "options": {"devices": None}}, True),
        ({"computed_by": {"device": "cpu"}, "options": {"devices": "2"}}, False),
        ({"computed_by": {}, "options": {"devices": None}}, False),  # workers elsewhere
    ],
)
def test_time_is_compared_where_one_process_of_this_machine_ran(run, compared_too):
    scoring = dict.fromkeys(COMPARED, 1)
    content = {
        "format": "earmark.estimate/1",
        "shards": 1,
        "scoring": scoring,
        "source": None,
        "workers": [{"workers": 1, "run_s": {"expected": 10.0, "low": 9.0, "high": 12.0}}],
        "clips": {"expected": 1, "low": 1, "high": 1},
        "audio_s": {"expected": 1, "low": 1, "high": 1},
    }
    found = beside_estimate(
        json.dumps(content).encode(), run | {"scoring": scoring}, 1, ShardSummary(1), 5.0, {}
    )
    assert ("wall_s" in found) == compared_too


def test_an_input_without_audio_and_one_that_cannot_be_decoded(run, make_tar, tmp_path):
    empty = make_tar(tmp_path / "empty.tar", [("a.txt", b"no audio")])
    found = run(empty)
    assert found["clips"]["expected"] == found["audio_s"]["expected"] == 0
    broken = make_tar(tmp_path / "broken.tar", [(f"{n}.mp3", b"no audio") for n in range(20)])
    found = run(broken, "--decode-processes", 1)
    assert found["failed"]["expected"] == found["clips"]["expected"] == 20
    assert found["audio_s"]["expected"] == 0


def test_ranges_of_a_draw_hold_the_truth_about_as_often_as_they_say(
    tmp_path, make_tar, monkeypatch
):
    """Draws of 40 from 4,000 numbers; the interval is of 80 %."""
    chance = np.random.default_rng(1)
    numbers = chance.gamma(2.0, 3.0, 4_000)
    held = 0
    for _ in range(300):
        drawn = chance.choice(numbers, 40, replace=False)
        weights = forecast._weights(40, chance)
        found = forecast._range(weights @ drawn / weights.sum(axis=1))
        held += found.low <= numbers.mean() <= found.high
    assert 0.70 < held / 300 < 0.88


def test_help_names_the_options_of_annotate_in_the_same_words():
    texts = [CliRunner().invoke(cli, [name, "--help"]).output for name in ("estimate", "annotate")]
    for option in ("--embeddings", "--files-per-shard N", "--score-type [float32|float16]"):
        assert all(option in text for text in texts)


def test_a_manifest_is_counted_in_rows(earmark, run, tiny_checkpoint, tmp_path, encoded, noise):
    for number in range(30):
        (tmp_path / f"{number}.wav").write_bytes(encoded(noise(16_000, seed=number)))
    manifest = tmp_path / "m.csv"
    manifest.write_text("where\n" + "\n".join(f"{number}.wav" for number in range(30)))
    found = run(manifest, "--path-column", "where", "--segments")
    assert found["clips"] == {"expected": 30, "low": 30, "high": 30}
    assert found["input_bytes"] == 0 and found["input_rows"] == 30
    assert found["audio_s"]["expected"] == pytest.approx(30)
    assert found["scoring"]["segments"] is True
    said = earmark(
        {}, "annotate", manifest, "--path-column", "where", "--output", tmp_path / "out",
        "--checkpoint", tiny_checkpoint, "--limit", 10,
    )  # fmt: skip
    assert "Input: 1 shard, 30 rows of manifests" in said


def test_chunks_are_those_that_are_cut():
    for length in (1, 99, 100, 101, 149, 150, 151, 250, 999):
        samples = np.zeros(length, np.float32)
        for hop in (100, 50, 30):
            cut = len(list(cut_chunks([samples], 100, 100, hop)))
            assert forecast._chunks(length / 100, 1.0, hop / 100) == cut, (length, hop)


def test_a_clip_scored_in_part_has_not_failed(run, make_tar, encoded, noise, tmp_path):
    whole = encoded(noise(32_000, seed=1))
    tar = make_tar(tmp_path / "a.tar", [("a.wav", whole)])
    found = run(tar, "--max-duration-s", 1)
    assert found["failed"]["expected"] == 0
    assert found["chunks"]["expected"] == 1
    assert found["audio_s"]["expected"] == pytest.approx(1, abs=0.1)
