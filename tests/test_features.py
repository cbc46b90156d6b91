from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import ASTFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from student.feature_spec import FeatureSpec
from student.features import LogMel, mel_filters

Noise = Callable[..., NDArray[np.float32]]

# 257 spectrum bins leave Kaldi's lowest mel filters empty, in AST as here.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

PADDING = 4.2677393 / (2 * 4.5689974)  # a zero, normalised


def features(*waveforms: NDArray[np.float32], **numbers: object) -> NDArray[np.float32]:
    """[n, frames, bins] of waveforms of any lengths, in one batch."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.zeros((len(waveforms), int(lengths.max())))
    for row, waveform in enumerate(waveforms):
        batch[row, : len(waveform)] = torch.from_numpy(waveform)
    return LogMel(FeatureSpec(**numbers))(batch, lengths).numpy()


def reference(waveform: NDArray[np.float32], sample_rate: int = 16_000, **numbers: object):
    extractor = ASTFeatureExtractor(sampling_rate=sample_rate, **numbers)
    return extractor(waveform, sampling_rate=sample_rate, return_tensors="np")["input_values"]


def assert_close(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 1e-4


def tone(samples: int, hz: float, amplitude: float) -> NDArray[np.float32]:
    seconds = np.arange(samples) / 16_000
    return (amplitude * np.sin(2 * np.pi * hz * seconds)).astype(np.float32)


def chirp(samples: int) -> NDArray[np.float32]:
    seconds = np.arange(samples) / 16_000
    return (0.9 * np.sin(2 * np.pi * (20 + 400 * seconds) * seconds)).astype(np.float32)


def test_speech_gives_the_golden_features(shared: Path) -> None:
    waveform = np.load(shared / "golden" / "mr_quilter.npy")
    assert_close(features(waveform)[0], np.load(shared / "golden" / "mr_quilter.features.npy"))


def test_speech_gives_the_first_frame_that_transformers_tests_expect(shared: Path) -> None:
    expected = json.loads((shared / "golden" / "expected_first_frame.json").read_text("utf-8"))
    ours = features(np.load(shared / "golden" / "mr_quilter.npy"))
    assert list(ours.shape) == [1, *expected["shape"]]
    np.testing.assert_allclose(
        ours[0, expected["frame"], :30], expected["mel_bins_0_29"], rtol=0, atol=expected["atol"]
    )


@pytest.mark.parametrize(
    "samples",
    [240, 241, 320, 399, 400, 401, 559, 560, 16_000, 163_839, 163_840, 164_080, 200_000],
)
def test_noise_of_any_length_equals_transformers(noise: Noise, samples: int) -> None:
    waveform = noise(samples)
    assert_close(features(waveform), reference(waveform))


@pytest.mark.parametrize("samples", [400, 16_000, 163_840])
def test_silence_equals_transformers(samples: int) -> None:
    waveform = np.zeros(samples, np.float32)
    assert_close(features(waveform), reference(waveform))


@pytest.mark.parametrize(
    "waveform",
    [
        tone(32_000, 1_000, 1.0),
        tone(32_000, 7_999, 1.0),
        tone(32_000, 25, 1.0),
        tone(32_000, 440, 1e-4),
        np.sign(tone(32_000, 440, 1.0)),
        np.ones(32_000, np.float32),
        chirp(163_840),
        tone(32_000, 440, 16_411.0),
    ],
    ids=["1 kHz", "7999 Hz", "25 Hz", "faint", "square", "constant", "chirp", "far above 1"],
)
def test_tones_equal_transformers(waveform: NDArray[np.float32]) -> None:
    assert_close(features(waveform), reference(waveform))


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_mel_bins": 64, "max_length": 512},
        {"num_mel_bins": 32, "max_length": 128},
        {"max_length": 1},
        {"mean": -8.591, "std": 5.6806},
        {"mean": 0.0, "std": 0.5},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_other_numbers_equal_transformers(noise: Noise, numbers: dict[str, object]) -> None:
    waveform = noise(16_123)
    assert_close(features(waveform, **numbers), reference(waveform, **numbers))


@pytest.mark.parametrize("sample_rate", [8_000, 22_050, 32_000, 44_100, 48_000])
def test_other_sample_rates_equal_transformers(noise: Noise, sample_rate: int) -> None:
    waveform = noise(16_000)
    ours = features(waveform, sample_rate=sample_rate, num_mel_bins=64)
    assert_close(ours, reference(waveform, sample_rate, num_mel_bins=64))


@pytest.mark.parametrize("samples", [1, 100, 239, 240, 399])
def test_less_than_one_frame_is_all_padding(noise: Noise, samples: int) -> None:
    expected = np.full((1, 1_024, 128), PADDING, np.float32)
    np.testing.assert_allclose(features(noise(samples)), expected, rtol=0, atol=1e-6)


def test_padding_follows_the_last_whole_frame(noise: Noise) -> None:
    ours = features(noise(400 + 159 + 160))[0]  # one sample short of a third frame's end
    assert np.abs(ours[:2] - PADDING).min() > 0
    np.testing.assert_allclose(ours[2:], np.full((1_022, 128), PADDING), rtol=0, atol=1e-6)


def test_a_batch_of_different_lengths_equals_one_by_one(noise: Noise) -> None:
    waveforms = [noise(n, seed) for seed, n in enumerate([50_000, 1, 300, 400, 16_001, 163_840])]
    together = features(*waveforms)
    alone = np.concatenate([features(waveform) for waveform in waveforms])
    assert np.array_equal(together, alone)


def test_a_batch_of_nothing_but_too_short_waveforms_is_padding(noise: Noise) -> None:
    expected = np.full((2, 1_024, 128), PADDING, np.float32)
    np.testing.assert_allclose(features(noise(10), noise(399)), expected, rtol=0, atol=1e-6)


def test_audio_past_the_last_frame_changes_nothing(noise: Noise) -> None:
    waveform = noise(200_000)
    last = 1_023 * 160 + 400
    assert np.array_equal(features(waveform), features(waveform[:last]))
    assert not np.array_equal(features(waveform), features(waveform[: last - 1]))


@pytest.mark.parametrize(("bins", "sample_rate"), [(128, 16_000), (23, 8_000), (64, 44_100)])
def test_mel_filters_equal_transformers_kaldi_filters(bins: int, sample_rate: int) -> None:
    expected = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=bins,
        min_frequency=20.0,
        max_frequency=sample_rate / 2,
        sampling_rate=sample_rate,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    ours = mel_filters(bins, sample_rate)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_a_preprocessor_config_of_transformers_is_read_back(tmp_path: Path) -> None:
    extractor = ASTFeatureExtractor(
        sampling_rate=8_000,
        num_mel_bins=40,
        max_length=256,
        mean=-5.5,
        std=3.25,
        do_normalize=False,
    )
    extractor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    assert FeatureSpec.from_preprocessor_config(config) == FeatureSpec(
        sample_rate=8_000,
        num_mel_bins=40,
        max_length=256,
        mean=-5.5,
        std=3.25,
        do_normalize=False,
    )


def test_an_empty_preprocessor_config_means_transformers_defaults() -> None:
    extractor = ASTFeatureExtractor()
    assert FeatureSpec.from_preprocessor_config({}) == FeatureSpec(
        sample_rate=extractor.sampling_rate,
        num_mel_bins=extractor.num_mel_bins,
        max_length=extractor.max_length,
        mean=extractor.mean,
        std=extractor.std,
        do_normalize=extractor.do_normalize,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            "feature_extractor_type is 'WhisperFeatureExtractor', expected 'ASTFeatureExtractor'",
        ),
        ({"std": 0.0}, "std=0.0, do_normalize=True) has a number that is not positive"),
        ({"std": float("nan")}, "std=nan"),
        ({"mean": float("inf")}, "mean=inf"),
        ({"num_mel_bins": 0}, "num_mel_bins=0"),
        ({"max_length": -1}, "max_length=-1"),
        ({"sampling_rate": 0}, "sample_rate=0"),
        ({"max_length": "long"}, "'long'"),
    ],
    ids=str,
)
def test_a_preprocessor_config_that_cannot_be_right_is_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        FeatureSpec.from_preprocessor_config(config)
    assert message in str(refusal.value)


def test_a_chunk_of_ast_is_ten_and_a_quarter_seconds() -> None:
    assert (FeatureSpec().chunk_samples, FeatureSpec().chunk_s) == (163_840, 10.24)


def test_a_chunk_of_another_rate_and_length() -> None:
    spec = FeatureSpec(sample_rate=8_000, max_length=100)
    assert (spec.chunk_samples, spec.chunk_s) == (16_000, 2.0)


@pytest.mark.parametrize("loudest", [1.0, 1e16, 3e38])
def test_float32_features_are_numbers_however_loud_the_audio(loudest: float, noise: Noise) -> None:
    waveform = torch.from_numpy(noise(16_000))[None]
    waveform = (waveform / waveform.abs().max() * loudest).to(torch.float32)
    lengths = torch.tensor([16_000])
    found = LogMel(FeatureSpec(max_length=128), torch.float32)(waveform, lengths)
    assert found.isfinite().all()
    if loudest == 1.0:  # and where it is not absurd, it is what float64 gives
        exact = LogMel(FeatureSpec(max_length=128))(waveform, lengths)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)
