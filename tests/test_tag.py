"""Tagging inside another pipeline: the function, the transform, the model handler, docs/beam.md."""

import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import soundfile
import torch
from apache_beam.metrics import MetricsFilter
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.window import FixedWindows, TimestampedValue

import transforms.tag
from student.model import DeviceError
from transforms.decode_clip import decode_clips
from transforms.records import EncodedClip
from transforms.score import score_clips
from transforms.tag import StudentModelHandler, TagClips, TaggedClip, tag_clips
from transforms.write import RowOptions, tags_of

ROOT = Path(__file__).resolve().parent.parent
RATE = 16_000  # Hz, of the tiny student; its chunks are 1.28 s


@pytest.fixture(scope="module")
def good(noise, encoded):
    """Three clips as files: one shorter than a chunk, one of 44.1 kHz stereo, one of three chunks."""
    return [
        encoded(noise(12_000, seed=1)),
        encoded(noise((44_100, 2), seed=2), 44_100, "flac"),
        encoded(noise(60_000, seed=3), format="ogg"),
    ]


def run(make, *options):
    """What `make(pipeline)` gives, and the run's counts and distributions."""
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner", "FnApiRunner", *options]))
    with tempfile.TemporaryDirectory() as folder:

        def keep(item):
            (Path(folder) / uuid.uuid4().hex).write_bytes(pickle.dumps(item))

        _ = make(pipeline) | "Keep" >> beam.Map(keep)
        result = pipeline.run()
        result.wait_until_finish()
        kept = [pickle.loads(file.read_bytes()) for file in Path(folder).iterdir()]
    metrics = result.metrics().query(MetricsFilter())
    counters = {m.key.metric.name: m.committed for m in metrics["counters"]}
    return kept, counters, {m.key.metric.name: m.committed for m in metrics["distributions"]}


# ------------------------------------------------------------------- tag_clips


def test_a_tagged_clip_is_the_row_that_annotate_would_write(good, tiny_student):
    tagged = tag_clips(good, tiny_student, top_k=5)
    encoded = [EncodedClip("", io.BytesIO(c), len(c), "", {}) for c in good]
    scored = list(score_clips(decode_clips(encoded, tiny_student.features), tiny_student))
    options = RowOptions(tiny_student.checkpoint.thresholds, top_k=5)
    for clip, row in zip(tagged, scored, strict=True):
        np.testing.assert_array_equal(clip.scores, row.scores)
        assert [tag._asdict() for tag in clip.tags] == tags_of(
            row.scores, tiny_student.labels, options
        )
        assert len(clip.tags) == 5
        for name in ("duration_s", "sample_rate", "channels", "codec", "peak_dbfs", "rms_dbfs"):
            assert getattr(clip, name) == getattr(row.clip, name)
        assert clip.error is None
    assert [clip.codec for clip in tagged] == ["pcm_s16le", "flac", "vorbis"]
    assert tagged[1].sample_rate == 44_100 and tagged[1].channels == 2
    assert len({clip.audio_xxh128 for clip in tagged}) == 3


def test_a_waveform_is_tagged_as_the_file_that_holds_it(noise, encoded, tiny_student):
    waveform = noise(50_000)
    of_waveform, of_file = tag_clips([waveform, encoded(waveform, subtype="FLOAT")], tiny_student)
    np.testing.assert_allclose(of_waveform.scores, of_file.scores, atol=1e-6)
    assert of_waveform.duration_s == of_file.duration_s == 3.125
    assert of_waveform.peak_dbfs == pytest.approx(of_file.peak_dbfs, abs=1e-5)
    assert of_waveform.rms_dbfs == pytest.approx(of_file.rms_dbfs, abs=1e-5)
    assert (of_waveform.sample_rate, of_waveform.channels) == (RATE, 1)
    assert of_waveform.codec is None and of_waveform.audio_xxh128 is None


def faulty(noise, encoded):
    """Clips that cannot be tagged, and stage and type of the error of each."""
    infinite = noise(20_000)
    infinite[7] = np.nan
    return [
        (b"not audio at all", ("decode", "InvalidDataError")),
        (b"", ("decode", "InvalidDataError")),
        (encoded(noise(100)), ("decode", "TooShort")),
        (encoded(infinite, subtype="FLOAT"), ("decode", "NonFinite")),
        (infinite, ("decode", "NonFinite")),
        (np.full(20_000, 1e300), ("decode", "NonFinite")),
        (noise(399), ("decode", "TooShort")),
        (noise(0), ("decode", "TooShort")),
        (noise((20_000, 2)), ("read", "NotMono")),
        (np.zeros(20_000, np.int16), ("read", "NotFloat")),
        ("a/path.wav", ("read", "NotAudio")),
        (None, ("read", "NotAudio")),
    ]


def test_a_clip_that_fails_never_fails_the_others(good, noise, encoded, tiny_student):
    bad = faulty(noise, encoded)
    mixed, expected = [], []
    for position, (clip, error) in enumerate(bad):
        mixed += [clip, good[position % len(good)]]
        expected += [error, None]
    tagged = tag_clips(mixed, tiny_student)
    assert [clip.error and clip.error[:2] for clip in tagged] == expected
    alone = tag_clips(good, tiny_student)
    for position, clip in enumerate(tagged[1::2]):
        np.testing.assert_allclose(clip.scores, alone[position % len(good)].scores, atol=1e-5)
    for clip in tagged[::2]:
        assert clip.scores is None and clip.tags == () and clip.error.message


def test_thresholds_and_pool(good, tiny_student):
    labels = len(tiny_student.labels)
    (every,) = tag_clips(good[2:], tiny_student, thresholds=0)
    assert len(every.tags) == labels
    assert [tag.score for tag in every.tags] == sorted((t.score for t in every.tags), reverse=True)
    per_label = np.ones(labels)
    per_label[17] = 0
    (one,) = tag_clips(good[2:], tiny_student, thresholds=per_label)
    assert [tag.index for tag in one.tags] == [17]
    (mean,) = tag_clips(good[2:], tiny_student, pool="mean")
    assert (mean.scores <= every.scores + 1e-6).all() and (mean.scores < every.scores).any()
    with pytest.raises(
        ValueError, match=r"there are 3 thresholds, but checkpoint .* has 527 labels"
    ):
        tag_clips(good, tiny_student, thresholds=[0.1, 0.2, 0.3])


def test_hop_and_padding(good, noise, tiny_student, tiny_checkpoint):
    waveform = noise(60_000, seed=3)
    (tagged,) = tag_clips([waveform], tiny_student, chunk_hop_s=0.5)
    starts = [*range(0, 60_000 - 20_480, 8_000), 60_000 - 20_480]
    pieces = [waveform[start : start + 20_480] for start in starts]
    np.testing.assert_allclose(tagged.scores, tiny_student.score(pieces).max(axis=0), atol=1e-6)
    (of_file,) = tag_clips(good[2:], tiny_student, chunk_hop_s=0.5)
    (plain,) = tag_clips(good[2:], tiny_student)
    assert (of_file.scores != plain.scores).any()

    handler = StudentModelHandler(str(tiny_checkpoint), device="cpu", chunk_hop_s=0.5, pad="repeat")
    results = handler.run_inference([noise(5_000), waveform], handler.load_model())
    repeated = np.resize(noise(5_000), 20_480)
    short, long = (result.inference for result in results)
    np.testing.assert_allclose(short.scores, tiny_student.score([repeated])[0], atol=1e-6)
    np.testing.assert_allclose(long.scores, tagged.scores, atol=1e-6)


def test_clips_are_taken_as_they_are_needed(noise, tiny_student, monkeypatch):
    taken, at_first_batch = [], []
    begin = tiny_student.begin

    def counting(waveforms):
        at_first_batch.append(len(taken))
        return begin(waveforms)

    monkeypatch.setattr(tiny_student, "begin", counting)
    monkeypatch.setattr(tiny_student, "max_batch", 4)
    clips = (taken.append(1) or noise(2_000, seed) for seed in range(12))
    assert len(tag_clips(clips, tiny_student)) == 12
    assert at_first_batch[0] == 4


# -------------------------------------------------------------------- TagClips


def test_tag_clips_keeps_keys_and_gives_one_for_one(
    good, noise, encoded, tiny_checkpoint, tiny_student
):
    clips = [*good, b"broken", encoded(noise(100)), good[0]]
    keyed = [((key, "a key may be anything"), clip) for key, clip in enumerate(clips)]
    tagged, counters, distributions = run(
        lambda p: p | beam.Create(keyed) | TagClips(str(tiny_checkpoint), device="cpu", top_k=3)
    )
    assert sorted(key for key, _ in tagged) == sorted(key for key, _ in keyed)
    found = {key[0]: clip for key, clip in tagged}
    for key, clip in enumerate(tag_clips(clips, tiny_student, top_k=3)):
        assert found[key].error == clip.error and found[key].audio_xxh128 == clip.audio_xxh128
        assert (found[key].scores is None) == (clip.scores is None)
        if clip.scores is not None:
            np.testing.assert_allclose(found[key].scores, clip.scores, atol=1e-5)
    assert counters["clips"] == 6
    assert counters["clips_failed"] == counters["clips_failed_decode"] == 2
    assert counters["num_inferences"] == 1 + 1 + 3 + 1
    assert counters["audio_seconds"] == round(0.75 + 1 + 3.75 + 0.75)
    assert distributions["inference_request_batch_size"].sum == 6
    assert distributions["load_model_latency_milli_secs"].count == 1
    assert distributions["model_byte_size"].max == tiny_student.size_bytes


@pytest.mark.parametrize("held_bytes", [1, 64 << 20], ids=["in process", "in finish_bundle"])
def test_timestamps_and_windows_stay(noise, tiny_checkpoint, encoded, monkeypatch, held_bytes):
    monkeypatch.setattr(transforms.tag, "_MAX_HELD_BYTES", held_bytes)
    clips = [(str(second), encoded(noise(1_000, second))) for second in (1, 12, 13, 25)]

    def where(keyed, timestamp=beam.DoFn.TimestampParam, window=beam.DoFn.WindowParam):
        return keyed[0], float(timestamp), float(window.start)

    placed, _, distributions = run(
        lambda p: (
            p
            | beam.Create(clips)
            | "Stamp" >> beam.Map(lambda clip: TimestampedValue(clip, int(clip[0])))
            | beam.WindowInto(FixedWindows(10))
            | TagClips(str(tiny_checkpoint), device="cpu")
            | beam.Map(where)
        )
    )
    assert sorted(placed) == [("1", 1, 0), ("12", 12, 10), ("13", 13, 10), ("25", 25, 20)]
    assert distributions["inference_request_batch_size"].max == (1 if held_bytes == 1 else 4)


def test_tagged_clips_survive_a_shuffle_and_can_be_grouped(good, tiny_checkpoint, tiny_student):
    tagged, _, _ = run(
        lambda p: (
            p
            | beam.Create([("one", good[0]), ("two", good[1]), ("two", good[2])])
            | TagClips(str(tiny_checkpoint), device="cpu")
            | beam.Reshuffle()
            | beam.GroupByKey()
        )
    )
    grouped = {key: sorted(clips, key=lambda c: c.duration_s) for key, clips in tagged}
    assert [len(grouped["one"]), len(grouped["two"])] == [1, 2]
    expected = tag_clips(good, tiny_student)
    assert [*grouped["one"], *grouped["two"]] == expected  # in all but the scores
    clip = grouped["one"][0]
    assert isinstance(clip, TaggedClip) and clip.scores.dtype == np.float32
    np.testing.assert_allclose(clip.scores, expected[0].scores, atol=1e-5)


def test_tag_clips_is_one_step_in_the_stage_of_what_feeds_it():
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner", "FnApiRunner"]))
    tagged = (
        pipeline
        | beam.Create([("a", b"")]).with_output_types(tuple[str, bytes])
        | TagClips("bundled", device="cpu")
    )
    assert str(tagged.element_type) == "Tuple[<class 'str'>, <class 'transforms.tag.TaggedClip'>]"
    proto = pipeline.to_runner_api()
    steps = {t.unique_name: t for t in proto.components.transforms.values()}
    (inside,) = [t for name, t in steps.items() if name.startswith("TagClips/")]
    assert inside.spec.urn == "beam:transform:pardo:v1"
    # A second environment (as a resource hint makes one) would be a second stage.
    assert inside.environment_id == next(
        t.environment_id
        for name, t in steps.items()
        if name.startswith("Create/") and t.environment_id
    )
    hints = proto.components.environments[inside.environment_id].resource_hints
    assert not hints


def test_one_student_a_process_whatever_the_threads(good, tiny_checkpoint):
    tagged, _, distributions = run(
        lambda p: (
            p
            | beam.Create([(key, good[0]) for key in range(8)])
            | TagClips(str(tiny_checkpoint), device="cpu")
        ),
        *("--direct_num_workers", "2", "--direct_running_mode", "multi_threading"),
    )
    assert sorted(key for key, _ in tagged) == list(range(8))
    assert distributions["load_model_latency_milli_secs"].count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_an_error_and_never_the_cpu(good, tiny_checkpoint):
    with pytest.raises(Exception, match="device 'cuda' was asked for, but torch"):
        run(
            lambda p: (
                p | beam.Create([("a", good[0])]) | TagClips(str(tiny_checkpoint), device="cuda")
            )
        )
    with pytest.raises(DeviceError, match="device 'cuda' was asked for, but torch"):
        StudentModelHandler(str(tiny_checkpoint), device="cuda").load_model()


@pytest.mark.parametrize("make", [TagClips, StudentModelHandler])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pool": "median"}, "pool is 'median', expected 'max' or 'mean'"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"pad": "reflect"}, "pad is 'reflect', expected 'zero' or 'repeat'"),
        ({"chunk_hop_s": 0.0}, "chunk_hop_s is 0.0, expected a number above 0"),
        ({"thresholds": 1.5}, "a threshold is 1.5, expected 0 to 1"),
        ({"thresholds": [0.2, float("nan")]}, "a threshold is nan, expected 0 to 1"),
    ],
)
def test_options_are_checked_where_they_are_written(make, option, message):
    with pytest.raises(ValueError, match=message):
        make("bundled", **option)


def test_too_long_a_hop_is_told_before_any_clip(tiny_checkpoint):
    handler = StudentModelHandler(str(tiny_checkpoint), device="cpu", chunk_hop_s=1.5)
    with pytest.raises(ValueError, match=r"at most 1\.28 s, the length of this student's chunk"):
        handler.load_model()


def test_a_wrong_number_of_thresholds_is_told_before_any_clip(tiny_checkpoint):
    handler = StudentModelHandler(str(tiny_checkpoint), device="cpu", thresholds=np.full(5, 0.5))
    with pytest.raises(ValueError, match="there are 5 thresholds"):
        handler.load_model()


# -------------------------------------------------------- StudentModelHandler


def test_run_inference(good, noise, tiny_checkpoint, tiny_student):
    examples = [*good, noise(30_000), b"broken"]
    handler = StudentModelHandler(str(tiny_checkpoint), device="cpu", top_k=2, max_batch_size=2)
    results, counters, distributions = run(
        lambda p: p | beam.Create(examples) | RunInference(handler)
    )
    assert {result.model_id for result in results} == {str(tiny_checkpoint)}
    assert all(result.example is None for result in results)
    found = {result.inference.audio_xxh128: result.inference for result in results}
    for clip in tag_clips(examples, tiny_student, top_k=2):
        assert found[clip.audio_xxh128].error == clip.error
        assert len(found[clip.audio_xxh128].tags) == len(clip.tags)
    assert counters["num_inferences"] == counters["clips"] == 5
    assert counters["clips_failed"] == counters["clips_failed_decode"] == 1
    assert counters.get("failed_batches_counter", 0) == 0
    assert distributions["inference_request_batch_size"].max == 2
    size = sum(len(clip) for clip in good) + 4 * 30_000 + len(b"broken")
    assert distributions["inference_request_batch_byte_size"].sum == size
    assert distributions["load_model_latency_milli_secs"].count == 1


def test_run_inference_with_keys(good, tiny_checkpoint):
    handler = KeyedModelHandler(StudentModelHandler(str(tiny_checkpoint), device="cpu"))
    keyed = [("one", good[0]), ("broken", b"?"), ("three", good[2])]
    results, _, _ = run(lambda p: p | beam.Create(keyed) | RunInference(handler))
    found = {key: result.inference for key, result in results}
    assert found["one"].duration_s == 0.75 and found["one"].error is None
    assert found["three"].duration_s == 3.75
    assert found["broken"].error.type == "InvalidDataError"


def test_the_handler_tells_beam_what_it_needs():
    handler = StudentModelHandler("bundled")
    assert handler.batch_elements_kwargs() == {"min_batch_size": 64, "max_batch_size": 64}
    assert StudentModelHandler(
        "bundled", min_batch_size=2, max_batch_size=8
    ).batch_elements_kwargs() == {"min_batch_size": 2, "max_batch_size": 8}
    assert handler.get_num_bytes([b"123", np.zeros(5, np.float32), None]) == 3 + 20
    assert handler.get_resource_hints() == {}
    assert not handler.share_model_across_processes()
    with pytest.raises(ValueError, match="expected 1 <= min_batch_size <= max_batch_size"):
        StudentModelHandler("bundled", min_batch_size=9, max_batch_size=8)
    with pytest.raises(
        ValueError, match="inference_args \\['top_k'\\], but the student takes none"
    ):
        RunInference(handler, inference_args={"top_k": 3}).expand(None)


def test_the_handler_takes_another_checkpoint(tiny_checkpoint, make_checkpoint, tmp_path, good):
    handler = StudentModelHandler(str(tiny_checkpoint), device="cpu", thresholds=0.0)
    other = make_checkpoint(tmp_path / "other", ["dog", "cat"])
    handler.update_model_path(str(other))
    (result,) = handler.run_inference(good[:1], handler.load_model())
    assert result.model_id == str(other)
    assert {tag.name for tag in result.inference.tags} == {"dog", "cat"}
    handler.update_model_path(None)  # Beam calls it so before the first refresh
    assert handler.load_model().checkpoint.name == str(other)


# ---------------------------------------------------------------- docs/beam.md


def test_the_examples_of_the_docs_do_what_they_say(tmp_path, noise):
    """Each Python block is a program of its own, run in a folder with `sounds/`."""
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "noise.wav", noise(80_000), RATE)
    time_s = np.arange(4 * RATE) / RATE
    soundfile.write(tmp_path / "sounds" / "tone.flac", 0.3 * np.sin(880 * np.pi * time_s), RATE)
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"RIFF, and no more")
    docs, found = (ROOT / "docs" / "beam.md").read_text("utf-8"), {}
    blocks = re.findall(r"```python\n(.*?)```", docs, re.S)
    assert len(blocks) == 2
    for block, written in zip(blocks, ("tags.tsv", "highest.tsv"), strict=True):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=dict(os.environ), timeout=200,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        lines = dict(line.split("\t") for line in (tmp_path / written).read_text().splitlines())
        found[written] = {Path(path).name: value for path, value in lines.items()}
        assert sorted(found[written]) == ["broken.wav", "noise.wav", "tone.flac"]
    shown = re.search(r"such as\n\n```\n(.*?)```", docs, re.S).group(1)
    for path, value in (line.split("\t") for line in shown.splitlines()):
        assert found["tags.tsv"][Path(path).name] == value
    assert "InvalidDataError" in found["highest.tsv"]["broken.wav"]
    assert 0.3 <= float(found["highest.tsv"]["noise.wav"]) <= 1
