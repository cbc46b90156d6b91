"""Which clips a student learns from, what is known of them, and how they come out of storage."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench.stand_ins import CloudStorage
from evaluation.scores import EvaluationError, open_source
from evaluation.truth import read_truth
from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from student.labels import audioset_labels
from training.clips import (
    Batches,
    CachedClips,
    Draws,
    Split,
    StreamedClips,
    Wanted,
    audible,
    audio_s_of,
    cache_sounds,
    decode,
    drawing_weights,
    find_clips,
    join_scores,
    join_truth,
    read_sounds,
)
from training.presets import Consistent, DistilAst
from transforms.records import EncodedClip
from transforms.shards import plan_shards
from transforms.storage import DEFAULT_ACCESS

LABELS = audioset_labels()
INDEX = {label.name: label.index for label in LABELS}
SPEC = FeatureSpec(num_mel_bins=32, max_length=128)  # 1.28 s


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    """Two tars of six clips; of the second one clip is broken, one too long, one too short."""
    folder = tmp_path_factory.mktemp("clips")
    for shard in range(2):
        members = []
        for number in range(6):
            samples = 4_800 * (number + 1)
            if shard == 1:
                samples = {4: 31 * 4_000, 5: 90}.get(number, samples)
            rate = 4_000 if (shard, number) == (1, 4) else 16_000  # 31 s of few bytes
            sound = encoded(noise(samples, 10 * shard + number), rate, format="flac")
            if (shard, number) == (1, 3):
                sound = b"no sound"
            about = {"recording": f"r{number // 2}", "fold": number % 3}
            if number != 2:
                about["labels"] = ["Speech", "Music", "Wolpertinger"][: 1 + number % 3]
            name = f"{'ab'[shard]}{number}"
            members += [(f"{name}.flac", sound), (f"{name}.json", json.dumps(about).encode())]
        make_tar(folder / f"{shard}.tar", members)
    return plan_shards([str(folder / "*.tar")]).shards


def members(table):
    return [clip_id.rpartition("/")[2].removesuffix(".flac") for clip_id in table.ids]


def scores_file(path, ids, values=None, column="clip_id", **columns):
    scores = np.zeros((len(ids), 527), np.float32)
    scores[:, 0] = np.arange(len(ids)) / 100 if values is None else values
    table = {column: ids, **columns}
    table["scores"] = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 527)
    pq.write_table(pa.table(table), path)
    return open_source(str(path))


# ------------------------------------------------------------------ the split


def test_a_share_is_held_out_whoever_else_is_there():
    ids = [f"shard/{number}.wav" for number in range(4_000)]
    held_out = {clip_id for clip_id in ids if Split(0.1).is_held_out(clip_id, {})}
    assert 0.085 < len(held_out) / len(ids) < 0.115
    assert held_out == {clip_id for clip_id in reversed(ids) if Split(0.1).is_held_out(clip_id, {})}
    more = {clip_id for clip_id in ids if Split(0.3).is_held_out(clip_id, {})}
    assert held_out < more
    assert not any(Split(0.0).is_held_out(clip_id, {}) for clip_id in ids)
    assert all(Split(1.0).is_held_out(clip_id, {}) for clip_id in ids)


def test_a_group_stays_together():
    split = Split(0.5, group_by="recording")
    sides = {}
    for number in range(600):
        group = number % 60
        side = split.is_held_out(f"clip-{number}", {"recording": group})
        assert sides.setdefault(group, side) == side
    assert 15 < sum(sides.values()) < 45
    alone = [split.is_held_out(f"clip-{number}", {}) for number in range(100)]  # without the field
    assert alone == [Split(0.5).is_held_out(f"clip-{number}", {}) for number in range(100)]
    assert 25 < sum(alone) < 75


def test_a_field_may_say_who_is_held_out():
    split = Split(0.5, hold_out=("fold", "4"))
    for number in range(50):
        clip_id = f"clip-{number}"
        assert split.is_held_out(clip_id, {"fold": 4})
        assert not split.is_held_out(clip_id, {"fold": 3})
        without = split.is_held_out(clip_id, {"fold": None})
        assert without == Split(0.5).is_held_out(clip_id, {})


def test_clips_are_dealt_to_two_sides_and_counted(shards):
    found = find_clips(shards, Split(0.0, "recording", ("fold", "1")), label_field="labels")
    assert members(found.train) == ["a0", "a2", "a3", "a5", "b0", "b2", "b3", "b5"]
    assert members(found.validation) == ["a1", "a4", "b1", "b4"]
    assert found.train.groups == ["r0", "r1", "r1", "r2"] * 2
    assert found.train.stated[0] == ["Speech"] and found.train.stated[1] is None
    assert not found.skipped
    again = find_clips(shards, Split(0.0, "recording", ("fold", "1")), label_field="labels")
    assert again == found

    assert len(find_clips(shards, Split(0.0), limit=8).train) == 8
    everything = find_clips(shards, Split(0.0), only_validation=True)
    assert (len(everything.train), len(everything.validation)) == (0, 12)


def test_what_cannot_be_read_is_counted(tmp_path, make_tar, encoded, noise):
    whole = make_tar(tmp_path / "x.tar", [("a.wav", encoded(noise(8_000)))] * 3)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole.read_bytes()[:20_000])
    found = find_clips(plan_shards([str(broken)]).shards, Split(0.0))
    assert len(found.train) == 1
    [(reason, clips)] = found.skipped.items()
    assert reason.startswith("unreadable: ") and clips == 1


# ------------------------------------------------------------------ joining


@pytest.mark.parametrize("by", ["clip_id", "hash", "key"])
def test_scores_are_joined_by_any_name(shards, tmp_path, by):
    found = find_clips(shards, Split(0.4))
    sides = [found.train.ids, found.validation.ids]
    assert all(sides)
    everyone = [*sides[0], *sides[1]]
    hashes = [next(iter(n[1])) for t in (found.train, found.validation) for n in t.names]
    left_out = {everyone[0], everyone[-1]}
    rows = [row for row, clip_id in enumerate(everyone) if clip_id not in left_out][::-1]
    named = {
        "clip_id": [everyone[row] for row in rows],
        "hash": [f"elsewhere/{row}" for row in rows],
        "key": [everyone[row].rpartition("/")[2].removesuffix(".flac") for row in rows],
    }[by]
    more = {"audio_xxh128": [hashes[row] for row in rows]} if by == "hash" else {}
    source = scores_file(tmp_path / "s.parquet", named, [row / 100 for row in rows], **more)

    join_scores(found, [source])

    assert found.skipped == {"without teacher scores": 2}
    assert found.train.ids == sides[0][1:] and found.validation.ids == sides[1][:-1]
    got = np.concatenate([found.train.scores[:, 0], found.validation.scores[:, 0]])
    np.testing.assert_allclose(got, np.arange(1, len(everyone) - 1) / 100, rtol=1e-6)
    assert found.train.scores.shape == (len(found.train), 527)


def test_the_first_source_that_has_a_clip_counts(shards, tmp_path):
    found = find_clips(shards, Split(0.0))
    ids = list(found.train.ids)
    first = scores_file(tmp_path / "1.parquet", ids[:5], np.full(5, 0.1))
    second = scores_file(tmp_path / "2.parquet", ids[3:], np.full(9, 0.2))
    join_scores(found, [first, second])
    np.testing.assert_allclose(found.train.scores[:, 0], [0.1] * 5 + [0.2] * 7, rtol=1e-6)
    assert not found.skipped


def test_clips_of_like_names_keep_their_own_scores_and_labels(tmp_path, make_tar, encoded, noise):
    """Three shards of `0.flac` to `3.flac`: on which side a clip is must not decide."""
    for shard in range(3):
        sounds = [encoded(noise(800, 4 * shard + n), format="flac") for n in range(4)]
        facts = json.dumps({"fold": shard}).encode()
        members = [
            m for n, s in enumerate(sounds) for m in ((f"{n}.flac", s), (f"{n}.json", facts))
        ]
        make_tar(tmp_path / f"{shard}.tar", members)
    shards = plan_shards([str(tmp_path / "*.tar")]).shards
    found = find_clips(shards, Split(hold_out=("fold", "1")))
    assert (len(found.train), len(found.validation)) == (8, 4)
    ids = sorted([*found.train.ids, *found.validation.ids])
    without = found.train.ids[0]  # another of its name must not lend it a score or a label
    source = scores_file(
        tmp_path / "s.parquet",
        [clip_id for clip_id in ids if clip_id != without],
        [row / 100 for row, clip_id in enumerate(ids) if clip_id != without],
    )
    rows = [{"clip_id": clip_id, "labels": [LABELS[n].name]} for n, clip_id in enumerate(ids)]
    truth = tmp_path / "truth.jsonl"
    truth.write_text("\n".join(json.dumps(row) for row in rows if row["clip_id"] != without))

    join_truth(found, LABELS, read_truth(str(truth), source))
    for table in (found.train, found.validation):
        for clip_id, own in zip(table.ids, table.truths, strict=True):
            assert own == (None if clip_id == without else (ids.index(clip_id),))

    join_scores(found, [source])
    assert found.skipped == {"without teacher scores": 1}
    assert without not in found.train.ids
    for table in (found.train, found.validation):
        expected = [ids.index(clip_id) / 100 for clip_id in table.ids]
        np.testing.assert_allclose(table.scores[:, 0], expected, rtol=1e-6)


def test_labels_that_fit_several_clips_are_refused(tmp_path, make_tar, encoded, noise):
    for shard in range(2):
        sound = encoded(noise(800, shard), format="flac")
        make_tar(tmp_path / f"{shard}.tar", [("same.flac", sound)])
    found = find_clips(plan_shards([str(tmp_path / "*.tar")]).shards, Split(0.0))
    truth = tmp_path / "truth.csv"
    truth.write_text("file,labels\nsame.flac,Speech\n")
    source = scores_file(tmp_path / "s.parquet", found.train.ids)
    with pytest.raises(EvaluationError, match=r"'same\.flac' \(member\).*by clip_id"):
        join_truth(found, LABELS, read_truth(str(truth), source))


def test_own_labels_come_from_the_metadata(shards):
    found = find_clips(shards, Split(0.0, hold_out=("fold", "1")), label_field="labels")
    unknown = join_truth(found, LABELS, None)
    own = dict(zip(members(found.train), found.train.truths, strict=True))
    own |= dict(zip(members(found.validation), found.validation.truths, strict=True))
    speech, music = INDEX["Speech"], INDEX["Music"]
    assert own["a0"] == (speech,) and own["b1"] == tuple(sorted((speech, music)))
    assert own["a2"] is None  # nothing is said of it
    assert own["a5"] == tuple(sorted((speech, music)))
    assert unknown == {"Wolpertinger": 2}
    np.testing.assert_array_equal(
        found.train.labelled, [of is not None for of in found.train.truths]
    )
    matrix = found.train.truth(527)
    assert matrix[0].nonzero()[0].tolist() == [speech] and not matrix[1].any()


def test_own_labels_come_from_a_file(shards, tmp_path):
    found = find_clips(shards, Split(0.0, hold_out=("fold", "1")))
    truth = tmp_path / "truth.csv"
    truth.write_text('file,labels\na0.flac,Dog\nb1.flac,"Speech,Griffin"\nx.flac,Cat\n')
    source = scores_file(tmp_path / "s.parquet", found.train.ids)
    unknown = join_truth(found, LABELS, read_truth(str(truth), source))
    assert unknown == {"Griffin": 1}
    assert found.train.truths == [(INDEX["Dog"],), *[None] * 7]
    assert found.validation.truths == [None, None, (INDEX["Speech"],), None]

    truth.write_text("file,labels\na0.flac,Griffin\nb1.flac,Wolpertinger\n")
    with pytest.raises(EvaluationError, match="none of the 2 labels"):
        join_truth(found, LABELS, read_truth(str(truth), source))


def test_clips_of_equal_bytes_share_the_labels_of_their_hash(tmp_path, make_tar, encoded, noise):
    sound = encoded(noise(800), format="flac")
    make_tar(tmp_path / "0.tar", [("x.flac", sound), ("y.flac", sound)])
    found = find_clips(plan_shards([str(tmp_path / "0.tar")]).shards, Split(0.0))
    digest = next(iter(found.train.names[0][1]))
    source = scores_file(
        tmp_path / "s.parquet", ["elsewhere"], audio_xxh128=[digest], labels=[["Dog"]]
    )
    truth = read_truth(str(tmp_path / "s.parquet"), source, label_column="labels")
    by_hash = replace(truth, names=((frozenset(), frozenset({digest}), *[frozenset()] * 3),))
    join_truth(found, LABELS, by_hash)
    assert found.train.truths == [(INDEX["Dog"],)] * 2


# ------------------------------------------------------------------ sounds


def test_what_is_no_sound_is_counted_by_its_fault(shards, tmp_path):
    found = find_clips(shards, Split(0.0))
    skipped = Counter()
    cached = cache_sounds(Wanted.of(found.train, shards), 16_000, tmp_path)
    kept = audible(cached, 13, skipped)
    assert [reason for reason in skipped if "undecodable" not in reason] == [
        "longer than 30 s", "shorter than a frame", "gone since they were found",
    ]  # fmt: skip
    assert sum(skipped.values()) == 4 and len(kept) == 9
    assert {members(found.train)[row] for row in kept["row"]} == {
        *("a0 a1 a2 a3 a4 a5 b0 b1 b2".split())
    }


def test_a_sound_is_what_was_stored(noise, encoded):
    heard = noise(3_000) * 12  # clipped
    clip = EncodedClip("x", io.BytesIO(encoded(np.clip(heard, -1, 1))), 0, "", {})
    sound, fault = decode(clip, 16_000)
    assert fault == "" and sound.dtype == np.int16 and len(sound) == 3_000
    np.testing.assert_allclose(sound / 32_767, np.clip(heard, -1, 1), atol=1e-4)


def test_streamed_and_cached_are_the_same_clips(shards, tmp_path):
    found = find_clips(shards, Split(0.3))
    cached = cache_sounds(Wanted.of(found.train, shards), 16_000, tmp_path)
    streamed = StreamedClips(Wanted.of(found.train, shards), 16_000, seed=0)
    assert len(streamed) == len(found.train) == len(cached)
    orders = []
    for epoch in (0, 1, 0):
        streamed.set_epoch(epoch)
        examples = list(streamed)
        orders.append([example["row"] for example in examples])
        assert sorted(orders[-1]) == sorted(cached["row"]) == list(range(len(found.train)))
        by_row = {example["row"]: example for example in examples}
        for stored in cached:
            assert by_row[stored["row"]]["waveform"] == stored["waveform"]
            assert by_row[stored["row"]]["fault"] == stored["fault"]
        first = epoch * len(found.train)
        assert sorted(example["draw"] for example in examples) == list(
            range(first, first + len(found.train))
        )
    assert orders[0] == orders[2] != orders[1]
    others = StreamedClips(Wanted.of(found.train, shards), 16_000, seed=1)
    assert [example["row"] for example in others] != orders[0]


def test_only_the_clips_of_a_table_are_decoded(shards):
    rows = {find_clips(shards, Split(0.0)).train.ids[2]: 7}
    [sound] = read_sounds(shards, rows, "", 16_000, DEFAULT_ACCESS)
    assert sound["row"] == 7 and len(sound["waveform"]) == 2 * 3 * 4_800


def test_a_cache_is_made_once_and_knows_what_it_is_of(shards, tmp_path, monkeypatch):
    found = find_clips(shards, Split(0.0))
    once = cache_sounds(Wanted.of(found.train, shards), 16_000, tmp_path)
    fewer = cache_sounds(Wanted.of(found.train.take([0, 1]), shards), 16_000, tmp_path)
    assert (len(once), len(fewer)) == (12, 2)
    monkeypatch.setattr("training.clips.decode", lambda *_: pytest.fail("decoded again"))
    again = cache_sounds(Wanted.of(found.train, shards), 16_000, tmp_path)
    assert again["waveform"] == once["waveform"]


def test_a_cache_is_made_anew_where_the_sound_has_changed(tmp_path, make_tar, encoded, noise):
    stored = []
    for gain in (1, 2):
        make_tar(tmp_path / "s.tar", [("a.flac", encoded(gain * noise(800), format="flac"))])
        shards = plan_shards([str(tmp_path / "s.tar")]).shards
        wanted = Wanted.of(find_clips(shards, Split(0.0)).train, shards)
        stored.append(cache_sounds(wanted, 16_000, tmp_path / "cache")[0]["waveform"])
    assert stored[0] != stored[1]


def test_clips_that_are_gone_are_counted(shards, tmp_path):
    found = find_clips(shards, Split(0.0))
    cached = cache_sounds(Wanted.of(found.train.take([0, 1]), shards), 16_000, tmp_path)
    skipped = Counter()
    assert len(audible(cached, 5, skipped)) == 2
    assert skipped == {"gone since they were found": 3}


def test_a_worker_process_reads_from_cloud_storage(shards, lead_to):
    """Its parent has asked there before, and a connection does not survive a fork."""
    with CloudStorage("clips") as cloud:
        cloud.put("clips", "0.tar", Path(shards[0].uri).read_bytes())
        lead_to(cloud.env)
        remote = plan_shards(["gs://clips/0.tar"]).shards
        found = find_clips(remote, Split(0.0))
        streamed = StreamedClips(Wanted.of(found.train, remote), 16_000, seed=0)
        loader = torch.utils.data.DataLoader(streamed, batch_size=None, num_workers=1)
        assert sorted(example["row"] for example in loader) == list(range(6))


def test_scores_that_are_no_numbers_are_refused(shards, tmp_path):
    found = find_clips(shards, Split(0.0))
    source = scores_file(tmp_path / "s.parquet", found.train.ids[:2], [0.5, np.nan])
    with pytest.raises(EvaluationError, match="that is no number"):
        join_scores(found, [source])


def test_where_a_shard_lies_does_not_move_its_clips(tmp_path, make_tar, encoded, noise):
    members = [(f"{n}.flac", encoded(noise(800, n), format="flac")) for n in range(8)]
    sides = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        make_tar(tmp_path / place / "s.tar", members)
        found = find_clips(plan_shards([str(tmp_path / place)]).shards, Split(0.6))
        sides.append([clip_id.rpartition("/")[2] for clip_id in found.validation.ids])
    assert sides[0] == sides[1] != []


# ------------------------------------------------------------------ the order


def test_every_clip_is_drawn_once_an_epoch_and_no_draw_twice():
    draws = Draws(50, seed=3)
    epochs = []
    for epoch in range(3):
        draws.set_epoch(epoch)
        epochs.append(list(draws))
        assert sorted(place for place, _ in epochs[-1]) == list(range(50))
        assert len(draws) == 50
    numbers = [number for epoch in epochs for _, number in epoch]
    assert len(set(numbers)) == 150
    orders = [[place for place, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    again = Draws(50, seed=3)
    again.set_epoch(1)
    assert list(again) == epochs[1]
    other = Draws(50, seed=4)
    assert [place for place, _ in other] != orders[0]


def test_draws_follow_their_weights():
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    draws, drawn = Draws(4, 0, weights), Counter()
    for epoch in range(500):
        draws.set_epoch(epoch)
        drawn.update(place for place, _ in draws)
    assert drawn[3] == 0 and sum(drawn.values()) == 2_000
    assert 0.45 < drawn[0] / 2_000 < 0.55 and 0.2 < drawn[1] / 2_000 < 0.3


def test_a_cached_clip_knows_its_draw(shards, tmp_path):
    found = find_clips(shards, Split(0.0))
    clips = CachedClips(cache_sounds(Wanted.of(found.train, shards), 16_000, tmp_path))
    assert len(clips) == 12
    example = clips[3, 40]
    assert (example["row"], example["draw"]) == (3, 40)


def test_weights_favour_rare_labels_and_own_labels():
    targets = np.zeros((100, 3), np.float32)
    targets[:, 0] = 0.9  # common
    targets[:2, 1] = 0.8  # rare
    targets[:, 2] = 0.05  # below what counts as a label
    nobody = np.zeros(100, bool)
    uniform = drawing_weights(targets, nobody, 0.0, 1.0)
    np.testing.assert_allclose(uniform, 0.01)
    rare = drawing_weights(targets, nobody, 0.5, 1.0)
    common = 0.9 / (90 + 10)
    own = np.full(100, common)
    own[:2] += 0.8 / (1.6 + 10)
    np.testing.assert_allclose(rare, 0.5 * 0.01 + 0.5 * own / own.sum(), rtol=1e-6)
    assert rare.sum() == pytest.approx(1) and rare[0] > 3 * rare[50]

    labelled = np.arange(100) < 10
    twice = drawing_weights(targets, labelled, 0.0, 2.5)
    assert twice[0] == pytest.approx(2.5 * twice[50]) and twice.sum() == pytest.approx(1)
    nothing = drawing_weights(np.zeros((4, 3), np.float32), np.zeros(4, bool), 0.7, 1.0)
    np.testing.assert_allclose(nothing, 0.25)


# ------------------------------------------------------------------ batches


def example_of(samples, draw=0, row=0):
    sound = np.arange(samples, dtype=np.int64) % 30_000
    return {"row": row, "waveform": sound.astype(np.int16).tobytes(), "fault": "", "draw": draw}


def batches_of(recipe, clips=3):
    truths = [(1,), None, ()][:clips]
    scores = np.random.default_rng(0).random((clips, 5)).astype(np.float32)
    return Batches(truths, scores, 5, SPEC, recipe)


def test_a_batch_brings_everything_that_is_known():
    batches = batches_of(DistilAst())
    silent = {"row": 2, "waveform": b"", "fault": "undecodable", "draw": 9}
    batch = batches([example_of(3_000, 7, row=1), example_of(30_000, 8, row=0), silent])
    assert batch["waveforms"].shape == (3, 20_480) and batch["waveforms"].dtype == torch.float32
    assert batch["lengths"].tolist() == [3_000, 20_480, FRAME_SAMPLES]
    assert batch["weights"].tolist() == [1, 1, 0]
    assert batch["labelled"].tolist() == [False, True, True]  # that none is true is known too
    assert batch["truth"].tolist() == [[0] * 5, [0, 1, 0, 0, 0], [0] * 5]
    np.testing.assert_array_equal(batch["scores"], batches.scores[[1, 0, 2]])
    assert batch["draws"].tolist() == [7, 8, 9] and batch["rows"].tolist() == [1, 0, 2]
    heard = np.arange(3_000) / 32_767
    np.testing.assert_allclose(batch["waveforms"][0, :3_000], heard, atol=1e-6)
    assert not batch["waveforms"][0, 3_000:].any() and not batch["waveforms"][2].any()
    # The published recipe hears the beginning of a longer clip.
    assert float(batch["waveforms"][1, 100]) == pytest.approx(100 / 32_767)


def test_crops_are_of_the_stated_length_anywhere_and_by_their_draw():
    recipe = replace(
        DistilAst(), crop_share=1.0, crop_min_s=0.2, crop_max_s=0.6, seed=5, random_start=True
    )
    draws = range(200)
    batches = batches_of(recipe)

    def cut(of=batches, order=draws):
        batch = of([example_of(16_000, draw) for draw in order])
        starts = (batch["waveforms"][:, 0] * 32_767).round()
        return dict(
            zip(order, zip(batch["lengths"].tolist(), starts.tolist(), strict=True), strict=True)
        )

    first = cut()
    lengths, starts = (np.array(values) for values in zip(*first.values(), strict=True))
    assert 0.2 * 16_000 - 1 <= lengths.min() < 3_600 and 9_200 < lengths.max() <= 0.6 * 16_000
    assert starts.min() < 500 and starts.max() > 10_000
    assert (starts + lengths <= 16_000).all()
    assert cut(order=draws[::-1]) == first  # whatever else is in the batch
    other = cut(batches_of(replace(recipe, seed=6)))
    assert sum(other[draw] == first[draw] for draw in draws) < 5

    half = cut(batches_of(replace(recipe, crop_share=0.5)))
    assert 60 < sum(length < 16_000 for length, _ in half.values()) < 140


def test_a_crop_is_never_longer_than_the_clip_or_a_chunk():
    ours = Consistent()  # 1 to 10 s of clips of 0.1 s, and of chunks of 1.28 s
    batch = batches_of(ours)([example_of(1_600, draw) for draw in range(30)])
    assert set(batch["lengths"].tolist()) == {1_600}
    batch = batches_of(ours)([example_of(60_000, draw) for draw in range(60)])
    assert max(batch["lengths"].tolist()) == SPEC.chunk_samples
    starts = (batch["waveforms"][:, 0] * 32_767).round()
    assert float(starts.min()) < 5_000 and float(starts.max()) > 20_000


def test_the_seconds_of_a_cache():
    sounds = [b"", bytes(2 * 16_000), bytes(2 * 4_000)]
    cached = datasets.Dataset.from_dict({"waveform": sounds, "row": [0, 1, 2]})
    assert audio_s_of(cached, 16_000) == 1.25
    assert audio_s_of(cached.select([2]), 16_000) == 0.25
