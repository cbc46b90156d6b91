from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student import CheckpointError, DeviceError, Student, checkpoint
from student.checkpoint import DEFAULT_THRESHOLD, find_checkpoint, read_checkpoint
from student.feature_spec import FeatureSpec
from student.labels import Label, audioset_labels
from student.model import (
    choose_device,
    choose_dtype,
    devices_of,
    has_int8,
    load_model,
    settle_dtype,
)
from student.weights import ACTIVATIONS, Network, network_of, read_network

Noise = Callable[..., NDArray[np.float32]]
MakeCheckpoint = Callable[..., Path]

CHUNK = 128 * 160  # samples of the tiny student
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# 257 spectrum bins leave Kaldi's lowest mel filters empty, in AST as here.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def by_transformers(
    folder: Path, waveforms: list[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(scores, embeddings) of transformers alone, one waveform at a time."""
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    model = ASTForAudioClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores, embeddings = [], []
    for waveform in waveforms:
        inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.inference_mode():
            pooled = model.audio_spectrogram_transformer(**inputs).pooler_output
            scores.append(model(**inputs).logits.sigmoid()[0].numpy())
        embeddings.append(pooled[0].numpy())
    return np.stack(scores), np.stack(embeddings)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, for a test to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_json(file: Path, **entries: object) -> None:
    content = json.loads(file.read_text("utf-8")) | entries
    file.write_text(json.dumps(content), "utf-8")


# ------------------------------------------------- the published student's size


@pytest.fixture(scope="module")
def distil_ast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random checkpoint with the architecture of bookbot/distil-ast-audioset."""
    torch.manual_seed(6)
    names = {label.index: label.name for label in audioset_labels()}
    model = ASTForAudioClassification(ASTConfig(num_hidden_layers=6, id2label=names))
    folder = tmp_path_factory.mktemp("distil-ast")
    model.save_pretrained(folder)
    ASTFeatureExtractor().save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)  # 176 MB that pytest would keep


@pytest.fixture(scope="module")
def distil_student(distil_ast: Path) -> Student:
    return Student.load(str(distil_ast), device="cpu")


def test_distil_ast_has_44_066_831_parameters(distil_student: Student) -> None:
    assert distil_student.parameters == 44_066_831


def test_distil_ast_states_its_sizes(distil_student: Student) -> None:
    assert distil_student.labels == audioset_labels()
    assert distil_student.features == FeatureSpec()
    assert distil_student.embedding_size == 768
    assert distil_student.device == torch.device("cpu")
    assert distil_student.dtype == torch.float32
    assert distil_student.max_batch == 3  # of 1,214 tokens each


def test_distil_ast_scores_and_embeddings_equal_transformers(
    distil_ast: Path, distil_student: Student, noise: Noise
) -> None:
    seconds = np.arange(50_000) / 16_000
    waveforms = [noise(163_840), (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)]
    scores, embeddings = distil_student.score(waveforms, embeddings=True)
    expected_scores, expected_embeddings = by_transformers(distil_ast, waveforms)
    assert (scores.dtype, scores.shape) == (np.float32, (2, 527))
    assert (embeddings.dtype, embeddings.shape) == (np.float32, (2, 768))
    assert np.abs(scores - expected_scores).max() <= 1e-5
    assert np.abs(embeddings - expected_embeddings).max() <= 1e-4
    # Otherwise the comparison would say nothing.
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    assert np.ptp(scores[0]) > 0.3


# -------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification"]
)
def test_scores_are_sigmoids_whatever_the_problem_type(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, noise: Noise, problem_type: str | None
) -> None:
    names = [label.name for label in audioset_labels()]
    folder = make_checkpoint(tmp_path / "tiny", names, problem_type=problem_type)
    waveforms = [noise(CHUNK), noise(9_000, seed=1)]
    scores = Student.load(str(folder), device="cpu").score(waveforms)
    assert np.abs(scores - by_transformers(folder, waveforms)[0]).max() <= 1e-5
    assert scores.sum(axis=1).min() > 2  # a softmax's would be 1


def test_scores_alone_equal_scores_beside_embeddings(tiny_student: Student, noise: Noise) -> None:
    alone = tiny_student.score([noise(CHUNK)])
    scores, embeddings = tiny_student.score([noise(CHUNK)], embeddings=True)
    assert np.array_equal(alone, scores)
    assert embeddings.shape == (1, 32)


def test_an_array_of_waveforms_equals_a_list(tiny_student: Student, noise: Noise) -> None:
    waveforms = np.stack([noise(CHUNK), noise(CHUNK, seed=1)])
    assert np.array_equal(tiny_student.score(waveforms), tiny_student.score(list(waveforms)))


def test_more_waveforms_than_a_batch_equal_one_by_one(
    tiny_student: Student, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [CHUNK, 500, 9_000, 0, CHUNK, 12_345, 700]
    waveforms = [noise(samples, seed) for seed, samples in enumerate(lengths)]
    alone = [tiny_student.score([waveform], embeddings=True) for waveform in waveforms]
    monkeypatch.setattr(tiny_student, "max_batch", 3)
    scores, embeddings = tiny_student.score(waveforms, embeddings=True)
    np.testing.assert_allclose(scores, np.concatenate([s for s, _ in alone]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(embeddings, np.concatenate([e for _, e in alone]), rtol=0, atol=1e-5)


def test_a_waveform_without_samples_scores_as_padding(tiny_student: Student, noise: Noise) -> None:
    empty = tiny_student.score([np.zeros(0, np.float32)])
    assert np.array_equal(empty, tiny_student.score([noise(399)]))
    assert not np.array_equal(empty, tiny_student.score([noise(CHUNK)]))


def test_a_short_waveform_is_repeated_where_that_was_asked(
    tiny_checkpoint: Path, tiny_student: Student, noise: Noise
) -> None:
    repeating = Student.load(str(tiny_checkpoint), device="cpu", pad="repeat")
    assert (tiny_student.pad, repeating.pad) == ("zero", "repeat")
    short = [noise(samples, samples) for samples in (400, 5_000, CHUNK // 2, CHUNK - 1_000)]
    full = [waveform[np.arange(CHUNK) % len(waveform)] for waveform in short]
    before = [waveform.copy() for waveform in short]
    scores = repeating.score(short)
    np.testing.assert_allclose(scores, tiny_student.score(full), rtol=0, atol=1e-6)
    assert all(np.array_equal(one, other) for one, other in zip(short, before, strict=True))
    assert np.abs(scores - tiny_student.score(short)).max(axis=1).min() > 1e-3
    # Its batch makes no difference, nor does the padding where nothing is to be padded.
    alone = np.concatenate([repeating.score([waveform]) for waveform in short])
    np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-6)
    for whole in (noise(CHUNK), noise(CHUNK + 200), np.zeros(0, np.float32)):
        assert np.array_equal(repeating.score([whole]), tiny_student.score([whole]))


def test_an_unknown_padding_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="pad is 'reflect', expected 'zero' or 'repeat'"):
        Student.load(str(tiny_checkpoint), device="cpu", pad="reflect")  # type: ignore[arg-type]


def test_no_waveforms_give_no_scores(tiny_student: Student) -> None:
    scores, embeddings = tiny_student.score([], embeddings=True)
    assert (scores.dtype, scores.shape) == (np.float32, (0, 527))
    assert (embeddings.dtype, embeddings.shape) == (np.float32, (0, 32))


def test_the_longest_waveform_that_a_student_hears(tiny_student: Student, noise: Noise) -> None:
    limit = 127 * 160 + 400
    assert tiny_student.score([noise(limit)]).shape == (1, 527)
    with pytest.raises(ValueError) as refusal:
        tiny_student.score([noise(CHUNK), noise(limit + 1)])
    assert str(refusal.value) == (
        "waveform 1 has 20721 samples, but this student hears at most 20720 (128 frames) at once; "
        "cut it into chunks of 20480"
    )


def test_a_stereo_waveform_is_refused(tiny_student: Student, noise: Noise) -> None:
    with pytest.raises(ValueError, match=r"waveform 0 has shape \(1000, 2\), expected mono"):
        tiny_student.score([noise((1_000, 2))])


def test_a_waveform_in_place_of_a_list_is_refused(tiny_student: Student, noise: Noise) -> None:
    with pytest.raises(ValueError, match=r"waveform 0 has shape \(\), expected mono"):
        tiny_student.score(noise(1_000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_waveform_that_is_not_finite_is_refused(
    tiny_student: Student, noise: Noise, value: float
) -> None:
    broken = noise(1_000)
    broken[7] = value
    with pytest.raises(ValueError, match="waveform 1 holds NaN or infinite samples"):
        tiny_student.score([noise(1_000), broken])


def test_scoring_changes_no_waveform(tiny_student: Student, noise: Noise) -> None:
    waveform = noise(CHUNK)
    tiny_student.score([waveform])
    assert np.array_equal(waveform, noise(CHUNK))


def test_bfloat16_gives_float32_scores_near_those_of_float32(
    tiny_checkpoint: Path, tiny_student: Student, noise: Noise
) -> None:
    student = Student.load(str(tiny_checkpoint), device="cpu", dtype="bfloat16")
    assert student.dtype == torch.bfloat16
    scores, embeddings = student.score([noise(16_000)], embeddings=True)
    assert (scores.dtype, embeddings.dtype) == (np.float32, np.float32)
    difference = np.abs(scores - tiny_student.score([noise(16_000)])).mean()
    assert 0 < difference < 0.01


# ----------------------------------------------------------- devices and dtypes


@without_cuda
def test_auto_is_float32_on_the_cpu_where_there_is_no_cuda() -> None:
    device = choose_device("auto")
    assert device == torch.device("cpu")
    assert choose_dtype("auto", device) == torch.float32


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_never_replaced_by_the_cpu(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' was asked for.*use --device cpu"):
        Student.load(str(tiny_checkpoint), device=device)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu cuda", "mps", "meta"])
def test_an_unknown_device_is_refused(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' is .*use auto, cpu, cuda or cuda:N"):
        Student.load(str(tiny_checkpoint), device=device)


@pytest.mark.parametrize("dtype", ["float64", "int4", "half", ""])
def test_an_unknown_dtype_is_refused(tiny_checkpoint: Path, dtype: str) -> None:
    with pytest.raises(DeviceError) as refusal:
        Student.load(str(tiny_checkpoint), device="cpu", dtype=dtype)
    assert str(refusal.value) == (
        f"dtype {dtype!r} is unknown; use auto, reduced, float32, bfloat16, float16, int8"
    )


def test_reduced_is_int8_where_it_is_faster_and_float32_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("student.model.has_int8", lambda: True)
    assert choose_dtype("reduced", cpu, hidden_size=768) is torch.int8
    assert choose_dtype("reduced", cpu, hidden_size=192) is torch.float32
    assert choose_dtype("int8", cpu) is torch.int8
    assert choose_dtype("auto", cpu) is torch.float32
    monkeypatch.setattr("student.model.has_int8", lambda: False)
    assert choose_dtype("reduced", cpu, hidden_size=768) is torch.float32
    with pytest.raises(DeviceError, match="this processor has no instructions for it"):
        choose_dtype("int8", cpu)
    with pytest.raises(DeviceError, match="dtype 'int8' is for CPUs"):
        choose_dtype("int8", torch.device("cuda"))


@pytest.mark.skipif(not has_int8(), reason="this processor has no VNNI")
def test_int8_is_checked_against_float32_before_it_is_used(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, facts = torch.device("cpu"), read_checkpoint(str(tiny_checkpoint))
    monkeypatch.setattr("student.model._INT8_LEAST_WIDTH", 1)
    with pytest.raises(DeviceError, match=r"by up to 0\.\d{3} on four made sounds"):
        Student.load(str(tiny_checkpoint), device="cpu", dtype="int8")
    assert settle_dtype("reduced", cpu, facts) is torch.float32
    # Once a process: of a local run the launcher and the worker are one.
    monkeypatch.setattr("student.model._int8_difference", lambda _: pytest.fail("judged twice"))
    assert settle_dtype("reduced", cpu, facts) is torch.float32
    monkeypatch.undo()
    monkeypatch.setattr("student.model._INT8_LEAST_WIDTH", 1)
    # One that bears it: in the bundled student rounding is small beside what it has learned.
    assert settle_dtype("reduced", cpu, read_checkpoint("bundled")) is torch.int8
    assert Student.load("bundled", device="cpu", dtype="int8").dtype is torch.int8


def test_float16_on_the_cpu_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(DeviceError, match="dtype 'float16' is for GPUs"):
        Student.load(str(tiny_checkpoint), device="cpu", dtype="float16")


# ----------------------------------------------------------------- checkpoints


def test_a_checkpoints_facts(tiny_checkpoint: Path) -> None:
    facts = read_checkpoint(str(tiny_checkpoint))
    assert facts.name == str(tiny_checkpoint)
    assert facts.directory == tiny_checkpoint.resolve()
    assert facts.labels == audioset_labels()
    assert facts.features == FeatureSpec(num_mel_bins=32, max_length=128)
    assert facts.thresholds == (DEFAULT_THRESHOLD,) * 527
    assert not facts.has_own_thresholds
    assert not facts.is_bundled
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert facts.weights_sha256 == hashlib.sha256(weights).hexdigest()
    names = ("config.json", "preprocessor_config.json")
    configs = b"".join((tiny_checkpoint / name).read_bytes() for name in names)
    assert facts.config_sha256 == hashlib.sha256(configs).hexdigest()


def test_weights_in_several_files_load_and_hash_as_one(
    tiny_checkpoint: Path, tiny_student: Student, copy: Path, noise: Noise
) -> None:
    (copy / "model.safetensors").unlink()
    model = ASTForAudioClassification.from_pretrained(tiny_checkpoint)
    model.save_pretrained(copy, max_shard_size="50KB")
    files = sorted(copy.glob("model-*.safetensors"))
    assert len(files) > 1
    student = Student.load(str(copy), device="cpu")
    expected = tiny_student.score([noise(CHUNK)])
    np.testing.assert_allclose(student.score([noise(CHUNK)]), expected, rtol=0, atol=1e-6)
    joined = b"".join(file.read_bytes() for file in files)
    assert student.checkpoint.weights_sha256 == hashlib.sha256(joined).hexdigest()


def test_weights_are_hashed_again_only_when_a_file_has_changed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    sha256 = checkpoint._sha256

    def watched(files: list[Path]) -> str:
        hashed.extend(files)
        return sha256(files)

    monkeypatch.setattr(checkpoint, "_sha256", watched)
    file = copy / "model.safetensors"
    first = read_checkpoint(str(copy)).weights_sha256
    assert read_checkpoint(str(copy)).weights_sha256 == first
    assert hashed.count(file) == 1
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    written = copy / "other"
    written.write_bytes(content)
    stat = file.stat()
    os.utime(written, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    written.rename(file)  # of the same size and time
    second = read_checkpoint(str(copy)).weights_sha256
    assert second == hashlib.sha256(content).hexdigest() != first
    content[-1] ^= 2
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert read_checkpoint(str(copy)).weights_sha256 == hashlib.sha256(content).hexdigest()
    assert hashed.count(file) == 3


def test_a_checkpoint_with_labels_of_its_own(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, noise: Noise
) -> None:
    folder = make_checkpoint(tmp_path / "own", ["knock", "Dog", "hiss"])
    student = Student.load(str(folder), device="cpu")
    assert student.labels == (
        Label(0, "", "knock"),
        Label(1, "/m/0bt9lr", "Dog"),
        Label(2, "", "hiss"),
    )
    scores = student.score([noise(CHUNK)])
    assert scores.shape == (1, 3)
    assert np.abs(scores - by_transformers(folder, [noise(CHUNK)])[0]).max() <= 1e-5


def test_a_checkpoint_that_states_mids(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "own", ["knock", "Dog"], label_mids=["/x/k", "/m/0bt9lr"])
    assert read_checkpoint(str(folder)).labels == (
        Label(0, "/x/k", "knock"),
        Label(1, "/m/0bt9lr", "Dog"),
    )


def test_thresholds_are_read_by_mid_and_by_name(copy: Path) -> None:
    stated = {"/m/09x0r": 0.75, "Dog": 0, "Bark": 1}
    (copy / "thresholds.json").write_text(json.dumps(stated))
    facts = read_checkpoint(str(copy))
    expected = dict.fromkeys((label.name for label in audioset_labels()), DEFAULT_THRESHOLD)
    expected |= {"Speech": 0.75, "Dog": 0.0, "Bark": 1.0}
    assert facts.has_own_thresholds
    assert {la.name: t for la, t in zip(facts.labels, facts.thresholds, strict=True)} == expected


def test_thresholds_of_labels_without_mids(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "own", ["knock", "hiss", "hum"])
    (folder / "thresholds.json").write_text('{"hiss": 0.9}')
    assert read_checkpoint(str(folder)).thresholds == (DEFAULT_THRESHOLD, 0.9, DEFAULT_THRESHOLD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Unicorn": 0.5}', "states a threshold for 'Unicorn', which is no label"),
        ('{"": 0.5}', "states a threshold for '', which is no label"),
        ('{"Dog": 1.5}', "the threshold of 'Dog' is 1.5, expected 0 to 1"),
        ('{"Dog": NaN}', "the threshold of 'Dog' is nan, expected 0 to 1"),
        ('{"Dog": true}', "the threshold of 'Dog' is True, expected 0 to 1"),
        ('{"Dog": "0.5"}', "the threshold of 'Dog' is '0.5', expected 0 to 1"),
        ("[0.5]", "holds a JSON list, expected an object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_thresholds_that_cannot_be_right_are_refused(
    copy: Path, content: str, message: str
) -> None:
    (copy / "thresholds.json").write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(str(copy))
    assert message in str(refusal.value)
    assert str(copy / "thresholds.json") in str(refusal.value)


@pytest.mark.parametrize("name", ["./nothing", "nothing", "a/b/c", "/no/such/folder"])
def test_a_missing_directory_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint(name)
    assert str(refusal.value) == (
        f"checkpoint {name!r} is neither 'bundled', nor an existing directory, nor a Hugging Face "
        "id such as 'bookbot/distil-ast-audioset'"
    )


@pytest.mark.parametrize("name", ["someone/two--dashes", "someone/ends.", "-someone/tiny"])
def test_a_name_that_the_hub_would_never_take_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint '{name}'"):
        find_checkpoint(name)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_directory_without_a_config_is_refused(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(str(copy))
    assert str(refusal.value) == (
        f"{copy} holds no {file}; a checkpoint is a directory written by transformers' "
        "save_pretrained, of the model and of its feature extractor"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds a JSON list, expected an object"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_config_that_is_no_json_object_is_refused(
    copy: Path, file: str, content: bytes, message: str
) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(str(copy))
    assert f"{copy / file} {message}" in str(refusal.value)


def test_a_model_of_another_type_is_refused(copy: Path) -> None:
    edit_json(copy / "config.json", model_type="wav2vec2")
    with pytest.raises(CheckpointError, match="is of model_type 'wav2vec2'; earmark runs 'audio-"):
        read_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_mel_bins": 64}, "num_mel_bins is 64 in config.json but 32 in preprocessor_config"),
        ({"max_length": 1_024}, "max_length is 1024 in config.json but 128 in preprocessor_config"),
        ({"id2label": {"0": "a", "2": "b"}}, "must name the indices 0 to 1 without gaps"),
        ({"id2label": {"x": "a"}}, "'x'"),
        ({"id2label": {}}, "0 labels"),
        ({"id2label": None}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"0": "LABEL_0"}}, "does not name its 1 labels"),
        ({"label_mids": ["/m/0bt9lr"]}, "states 1 mids for 527 labels"),
        ({"label_mids": 5}, ""),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_right_is_refused(
    copy: Path, entries: dict[str, Any], message: str
) -> None:
    edit_json(copy / "config.json", **entries)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(str(copy))
    assert str(refusal.value).startswith(f"checkpoint {str(copy)!r}: ")
    assert message in str(refusal.value)


def test_another_feature_extractor_is_refused(copy: Path) -> None:
    edit_json(copy / "preprocessor_config.json", feature_extractor_type="Wav2Vec2FeatureExtractor")
    with pytest.raises(
        CheckpointError, match="feature_extractor_type is 'Wav2Vec2FeatureExtractor'"
    ):
        read_checkpoint(str(copy))


def test_a_directory_without_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"holds no model\.safetensors; convert older weights"
    ):
        read_checkpoint(str(copy))


@pytest.mark.parametrize("kept", [0, 5, 1_000, -1_000, -1])
def test_truncated_weights_are_refused_before_they_are_loaded(copy: Path, kept: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(str(copy))
    assert str(refusal.value).startswith(f"{file} is damaged or cut short: ")


def test_weights_that_lack_a_tensor_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["classifier.dense.bias"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refusal:
        Student.load(str(copy), device="cpu")
    assert str(refusal.value) == (
        f"the weights in {copy} lack 1 of the model's tensors, 'classifier.dense.bias' first: "
        "the file is damaged or of another architecture"
    )


def test_weights_of_another_number_of_labels_are_refused(copy: Path) -> None:
    edit_json(copy / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Student.load(str(copy), device="cpu")


# ------------------------------------------------ weights, read without transformers


def flat(part: Any) -> Any:
    """A network's content with its tensors as arrays, to be compared with ==."""
    if isinstance(part, torch.Tensor):
        return part.dtype, part.tolist()
    if dataclasses.is_dataclass(part):
        return {f.name: flat(getattr(part, f.name)) for f in dataclasses.fields(part)}
    return [flat(one) for one in part] if isinstance(part, tuple) else part


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def uneven(copy: Path) -> Path:
    """A tiny checkpoint no two of whose tensors are alike; a fresh model's biases are all zero."""
    random = torch.Generator().manual_seed(4)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=random)

    rewrite(copy, change)
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_those_that_transformers_loads(uneven: Path, dtype: torch.dtype) -> None:
    rewrite(uneven, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    facts = read_checkpoint(str(uneven))
    network = read_network(facts)
    assert isinstance(network, Network)
    assert network.positions.dtype == torch.float32
    assert flat(network) == flat(network_of(load_model(facts)))


def test_weights_by_the_names_that_they_have_in_memory(uneven: Path) -> None:
    facts = read_checkpoint(str(uneven))
    expected, model = flat(read_network(facts)), load_model(facts)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert tensors.keys() != load_file(uneven / "model.safetensors").keys()
    save_file(tensors, uneven / "model.safetensors", metadata={"format": "pt"})
    assert expected is not None
    assert flat(read_network(facts)) == expected


def test_weights_in_several_files_are_read_without_transformers(uneven: Path) -> None:
    facts = read_checkpoint(str(uneven))
    expected, model = flat(read_network(facts)), load_model(facts)
    model.save_pretrained(uneven, max_shard_size="50KB")
    (uneven / "model.safetensors").unlink(missing_ok=True)
    assert (uneven / "model.safetensors.index.json").exists()
    assert expected is not None
    assert flat(read_network(facts)) == expected


@pytest.mark.parametrize(
    "config", [*({"hidden_act": name} for name in ACTIVATIONS), {"qkv_bias": False}], ids=str
)
def test_usual_architectures_score_as_transformers_without_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, noise: Noise, config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = make_checkpoint(tmp_path / "tiny", ["knock", "hiss", "hum"], **config)
    monkeypatch.delattr("student.model.load_model")
    waveforms = [noise(CHUNK), noise(9_000, seed=1)]
    scores = Student.load(str(folder), device="cpu").score(waveforms)
    assert np.abs(scores - by_transformers(folder, waveforms)[0]).max() <= 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "prelu"])  # the second has weights
def test_other_activations_are_transformers(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, noise: Noise, activation: str
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", ["knock", "hiss", "hum"], hidden_act=activation)
    assert read_network(read_checkpoint(str(folder))) is None
    scores = Student.load(str(folder), device="cpu").score([noise(CHUNK)])
    assert np.abs(scores - by_transformers(folder, [noise(CHUNK)])[0]).max() <= 1e-5


def test_what_may_mean_more_is_left_to_transformers(uneven: Path, noise: Noise) -> None:
    def is_read_here() -> bool:
        return read_network(read_checkpoint(str(uneven))) is not None

    expected = Student.load(str(uneven), device="cpu").score([noise(CHUNK)])
    assert is_read_here()
    rewrite(uneven, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert not is_read_here()
    rewrite(uneven, lambda tensors: tensors.pop("extra"))
    assert is_read_here()
    edit_json(uneven / "config.json", quantization_config=None)
    assert not is_read_here()
    found = Student.load(str(uneven), device="cpu").score([noise(CHUNK)])
    assert np.array_equal(found, expected)


def test_an_exact_gelu_is_torchs_whoever_loads_it(copy: Path) -> None:
    facts = read_checkpoint(str(copy))
    for network in (read_network(facts), network_of(load_model(facts))):
        assert network is not None
        assert all(layer.activation is F.gelu for layer in network.layers)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"classifier.dense.bias": "none"}}'],
)
def test_an_index_that_cannot_be_right_is_refused(copy: Path, index: str) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=f"the weights in {copy} cannot be loaded"):
        Student.load(str(copy), device="cpu")


def test_a_layer_that_lacks_a_tensor_is_refused(copy: Path) -> None:
    name = "audio_spectrogram_transformer.encoder.layer.1.output.dense.weight"
    rewrite(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors, 'audio_spectrogram"):
        Student.load(str(copy), device="cpu")


# ------------------------------------------------------------------------- hub


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download needs: `someone/tiny` at `main`."""

    def __init__(self, *args: Any, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = "/api/models/someone/"
        if path.startswith(f"{api}gated/"):
            self.refuse(403, "GatedRepo")
        elif path.startswith(f"{api}down/"):
            self.refuse(500, "")
        elif path.startswith(f"{api}cut/"):
            self.close_connection = True  # without an answer
        elif path in (f"{api}tiny/revision/main", f"{api}tiny/revision/{COMMIT}"):
            self.answer({"id": "someone/tiny", "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}tiny/revision/"):
            self.refuse(404, "RevisionNotFound")
        elif path == f"{api}tiny/tree/{COMMIT}":
            self.answer(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in sorted(self.folder.iterdir())
                ]
            )
        elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
            self.send((self.folder / path.rpartition("/")[2]).read_bytes())
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, content: object) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for name, value in {**etag, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


# What comes of `attempt(name)` for each name in argv, as JSON.
_ATTEMPTS = """
import json, sys
from student import CheckpointError
outcomes = {}
for name in sys.argv[1:]:
    try:
        outcomes[name] = attempt(name)
    except CheckpointError as error:
        outcomes[name] = str(error)
    except Exception as error:
        outcomes[name] = f"not a CheckpointError but {type(error).__name__}: {error}"
print(json.dumps(outcomes))
"""
_FIND = """
from student.checkpoint import find_checkpoint
attempt = lambda name: [str(find_checkpoint(name))]
"""
_SCORE = """
import numpy as np
from student import Student
def attempt(name):
    student = Student.load(name, device="cpu")
    waveform = np.sin(np.arange(20_480) / 7).astype(np.float32)
    return [str(student.checkpoint.directory), student.score([waveform])[0].tolist()]
"""


def elsewhere(attempt: str, names: list[str], hf_home: Path, **environment: str) -> dict[str, Any]:
    """Attempts names in a process of its own: the hub's settings are read at import."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", attempt + _ATTEMPTS, *names],
        env=inherited | {"HF_HOME": str(hf_home)} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unreachable(name: str, repo: str) -> str:
    return (
        f"checkpoint '{name}' is not in the local cache and the Hugging Face Hub cannot be reached: "
        f"connect to the network once, or give a local directory (`hf download {repo} --local-dir "
        "DIR` elsewhere, then --checkpoint DIR), or use --checkpoint bundled"
    )


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def from_hub(tiny_checkpoint: Path, hub_cache: Path) -> dict[str, Any]:
    """What came of loading each of these names from a stand-in of the hub."""
    names = [
        "someone/tiny",
        f"someone/tiny@{COMMIT}",
        "someone/tiny@v9",
        "someone/nothing",
        "someone/gated",
        "someone/down",
        "someone/cut",
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, folder=tiny_checkpoint))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return elsewhere(_SCORE, names, hub_cache, HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def offline(from_hub: dict[str, Any], hub_cache: Path) -> dict[str, Any]:
    """What came of looking for these names without a network, after `from_hub`."""
    return elsewhere(_FIND, ["someone/tiny", "someone/other@v1"], hub_cache, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("name", ["someone/tiny", f"someone/tiny@{COMMIT}"])
def test_a_checkpoint_of_the_hub_is_fetched_and_scores(
    from_hub: dict[str, Any], tiny_checkpoint: Path, tiny_student: Student, name: str
) -> None:
    directory, scores = from_hub[name]
    expected = tiny_student.score([np.sin(np.arange(20_480) / 7).astype(np.float32)])[0]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    fetched = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
    assert fetched == {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir()}


def test_a_checkpoint_that_the_hub_does_not_have(from_hub: dict[str, Any]) -> None:
    assert from_hub["someone/nothing"] == (
        "the Hugging Face Hub has no checkpoint 'someone/nothing', or it is private: check the "
        "spelling, or log in with `hf auth login`"
    )


def test_a_revision_that_the_hub_does_not_have(from_hub: dict[str, Any]) -> None:
    assert from_hub["someone/tiny@v9"] == "checkpoint 'someone/tiny' has no revision 'v9'"


def test_a_gated_checkpoint_says_how_to_get_it(from_hub: dict[str, Any]) -> None:
    assert from_hub["someone/gated"] == (
        "checkpoint 'someone/gated' is gated: accept its terms on the Hugging Face Hub, then "
        "`hf auth login`"
    )


@pytest.mark.parametrize("name", ["someone/down", "someone/cut"])
def test_a_hub_that_fails_says_what_to_do(from_hub: dict[str, Any], name: str) -> None:
    assert from_hub[name] == unreachable(name, name)


def test_a_fetched_checkpoint_is_found_offline(
    offline: dict[str, Any], from_hub: dict[str, Any]
) -> None:
    assert offline["someone/tiny"] == from_hub["someone/tiny"][:1]


def test_a_checkpoint_that_was_never_fetched_says_what_to_do_offline(
    offline: dict[str, Any],
) -> None:
    assert offline["someone/other@v1"] == unreachable("someone/other@v1", "someone/other")


# ------------------------------------------------- batches that do not fit a GPU


class Memory:
    """Room for `limit` chunks in a student's batches; more raise as torch does."""

    def __init__(self, student: Student, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit = limit
        self.batches: list[int] = []  # sizes of those that were tried
        whole = student._batches.begin

        def score(arrays: list[NDArray[np.float32]]) -> Any:
            self.batches.append(len(arrays))
            if len(arrays) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(arrays)

        monkeypatch.setattr(student._batches, "begin", score)


@pytest.fixture
def narrow(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """(a student with batches of 8, its memory that has room for so many chunks)."""

    def make(limit: int) -> tuple[Student, Memory]:
        student = Student.load(str(tiny_checkpoint), device="cpu")
        monkeypatch.setattr(student, "max_batch", 8)
        monkeypatch.setattr(student, "_fitting", 8)
        return student, Memory(student, limit, monkeypatch)

    return make


@pytest.mark.parametrize(
    ("limit", "halvings", "batches"),
    [
        (8, 0, [8, 3]),
        (7, 1, [8, 4, 4, 3]),
        (4, 1, [8, 4, 4, 3]),
        (3, 2, [8, 4, 2, 2, 2, 2, 1, 2]),
        (1, 3, [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_later_ones_start_so(
    narrow: Callable[[int], Any], noise: Noise, limit: int, halvings: int, batches: list[int],
    tiny_student: Student,
) -> None:  # fmt: skip
    student, memory = narrow(limit)
    waveforms = [noise(5_000 + 1_000 * n, n) for n in range(11)]
    scores, embeddings = student.score(waveforms, embeddings=True)
    assert memory.batches == batches
    assert student.take_halvings() == halvings
    expected, expected_embeddings = tiny_student.score(waveforms, embeddings=True)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(embeddings, expected_embeddings, rtol=0, atol=1e-5)
    assert np.abs(scores[:-1] - scores[1:]).max(axis=1).min() > 0.01  # no two alike

    memory.batches.clear()
    student.score(waveforms[:8])
    fits = max(size for size in (8, 4, 2, 1) if size <= limit)
    assert memory.batches == [fits] * (8 // fits)
    assert student.take_halvings() == 0


def test_one_chunk_that_does_not_fit_is_an_error(
    narrow: Callable[[int], Any], noise: Noise
) -> None:
    student, memory = narrow(0)
    with pytest.raises(torch.OutOfMemoryError):
        student.score([noise(CHUNK)])
    assert (memory.batches, student.take_halvings()) == ([1], 0)
    with pytest.raises(torch.OutOfMemoryError):
        student.score([noise(CHUNK)] * 5)
    assert memory.batches == [1, 5, 2, 1]


def test_halving_is_told(
    narrow: Callable[[int], Any], noise: Noise, caplog: pytest.LogCaptureFixture
) -> None:
    student, _ = narrow(5)
    student.score([noise(CHUNK)] * 8)
    assert [record.getMessage() for record in caplog.records] == [
        "a batch of 8 chunks does not fit the memory of cpu; going on with 4"
    ]


def test_other_errors_are_not_taken_for_want_of_memory(
    narrow: Callable[[int], Any], noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = narrow(8)

    def broken(arrays: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(student._batches, "begin", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        student.score([noise(CHUNK)] * 4)
    assert student.take_halvings() == 0


def test_devices_are_all_gpus_or_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_of("cuda") == devices_of("auto") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices_of("cuda:2") == ["cuda:2"]
    assert devices_of("cpu") == ["cpu"]
    with pytest.raises(DeviceError, match="device 'cuda:4' was asked for, but there are 4"):
        devices_of("cuda:4")


@without_cuda
def test_devices_are_the_cpu_where_there_is_no_gpu() -> None:
    assert devices_of("auto") == ["cpu"]
    with pytest.raises(DeviceError):
        devices_of("cuda")


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "model-00001-of-00001.safetensors", "both"]
)
def test_no_pickle_of_a_checkpoint_is_opened(copy: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "unpickled"
    content = pickle.dumps(Touches(trap))
    pickle.loads(content)
    assert trap.exists()  # it would
    trap.unlink()
    if name != "both":
        (copy / "model.safetensors").unlink()
    (copy / ("pytorch_model.bin" if name == "both" else name)).write_bytes(content)
    if name == "both":
        Student.load(str(copy), device="cpu")
    else:
        with pytest.raises(CheckpointError):
            Student.load(str(copy), device="cpu")
    assert not trap.exists()


def test_a_zipped_pickle_under_the_name_of_safe_weights_is_not_opened(
    copy: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "unpickled"
    torch.save({"w": Touches(trap)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        Student.load(str(copy), device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("entry", ["auto_map", "transformers_weights", "custom_pipelines"])
def test_a_checkpoint_with_code_of_its_own_is_refused(
    copy: Path, tmp_path: Path, file: str, entry: str
) -> None:
    trap = tmp_path / "imported"
    (copy / "modeling.py").write_text(f"open({str(trap)!r}, 'w')\nclass Model: pass\n")
    content = json.loads((copy / file).read_text())
    value = {"AutoModelForAudioClassification": "modeling.Model", "AutoConfig": "modeling.Model"}
    (copy / file).write_text(json.dumps(content | {entry: value}))
    with pytest.raises(CheckpointError, match=f"{entry}.*earmark runs none"):
        Student.load(str(copy), device="cpu")
    assert not trap.exists()


def test_an_adapter_is_refused(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Touches(trap)))
    with pytest.raises(CheckpointError, match="merge it into the weights"):
        Student.load(str(copy), device="cpu")
    assert not trap.exists()
