"""What is done to a batch of sounds: within its bounds, in step with the targets, repeatable."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from student.feature_spec import FeatureSpec
from student.features import POWER_FLOOR, LogMel
from training.augment import Sounds, augment_sounds, disguise, draw_disguise
from training.presets import Consistent, DistilAst

CLIPS, SAMPLES, LABELS = 6, 8_000, 4
OFF = DistilAst()
ALL_ON = replace(
    OFF,
    mixup_share=0.7,
    gain_db=6.0,
    speed=0.2,
    equaliser_db=4.0,
    frequency_mask=0.3,
    time_mask=0.3,
    masks=2,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def sounds():
    """Six sounds of other lengths and loudness; the third without labels, the last silent."""
    random = np.random.default_rng(0)
    waveforms = np.zeros((CLIPS, SAMPLES), np.float32)
    lengths = np.array([8_000, 6_000, 8_000, 4_000, 7_000, 8_000])
    for row, length in enumerate(lengths[:-1]):
        waveforms[row, :length] = 0.02 * (row + 1) * random.standard_normal(length)
    return Sounds(
        torch.from_numpy(waveforms),
        torch.from_numpy(lengths),
        torch.from_numpy(random.random((CLIPS, LABELS)).astype(np.float32)),
        torch.eye(CLIPS)[:, :LABELS],
        torch.tensor([True, True, False, True, True, True]),
        torch.ones(CLIPS),
    )


def power(waveforms, lengths):
    return waveforms.square().sum(dim=1) / lengths


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in Sounds.__dataclass_fields__
    )


def test_the_published_recipe_changes_nothing(sounds):
    assert same(augment_sounds(sounds, OFF, generator()), sounds)
    spec = FeatureSpec(num_mel_bins=32, max_length=48)
    features = LogMel(spec)(sounds.waveforms, sounds.lengths)
    drawn = draw_disguise(CLIPS, OFF, generator())
    assert torch.equal(disguise(features, sounds.lengths, drawn, spec), features)


def test_a_generator_decides_everything(sounds):
    once, again, other = (augment_sounds(sounds, ALL_ON, generator(n)) for n in (1, 1, 2))
    assert same(once, again)
    assert not torch.equal(once.waveforms, other.waveforms)
    assert not torch.equal(once.scores, other.scores)
    drawn = [draw_disguise(CLIPS, ALL_ON, generator(n)) for n in (1, 1, 2)]
    for name in ("curve", "frequency", "time"):
        first, second, third = (getattr(each, name) for each in drawn)
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_what_was_given_stays_as_it_is(sounds):
    before = {name: getattr(sounds, name).clone() for name in Sounds.__dataclass_fields__}
    augment_sounds(sounds, ALL_ON, generator())
    assert all(torch.equal(getattr(sounds, name), value) for name, value in before.items())


# ------------------------------------------------------------------ mixing

MIXED = replace(OFF, mixup_share=1.0, mixup_beta=1.0)


def test_shares_are_those_of_the_loudness_and_of_the_targets(sounds):
    """A clip is found in the mix by regression, as the sounds are independent noise."""
    mixed = augment_sounds(sounds, MIXED, generator(4))
    basis = sounds.waveforms.double()
    seen = 0
    for row in range(CLIPS - 1):  # the last is silent
        parts = np.linalg.lstsq(basis[:-1].T.numpy(), mixed.waveforms[row].double().numpy())[0]
        assert parts[row] == pytest.approx(1, abs=1e-5)
        others = [other for other in np.flatnonzero(np.abs(parts) > 1e-4) if other != row]
        if not others:  # drawn to be its own partner, or with the silent one
            assert torch.equal(mixed.scores[row], sounds.scores[row])
            continue
        [other] = others
        loudness = power(sounds.waveforms, sounds.lengths)
        theirs = parts[other] ** 2 * loudness[other] / loudness[row]  # to 1 of its own
        share = 1 / (1 + float(theirs))
        assert 0.5 <= share <= 1
        for name in ("scores", "truth"):
            given = getattr(sounds, name)
            expected = share * given[row] + (1 - share) * given[other]
            torch.testing.assert_close(getattr(mixed, name)[row], expected, rtol=1e-4, atol=1e-5)
        assert mixed.lengths[row] == max(sounds.lengths[row], sounds.lengths[other])
        assert mixed.labelled[row] == (sounds.labelled[row] and sounds.labelled[other])
        seen += 1
    assert seen >= 3


def test_about_the_stated_share_is_mixed():
    clips = 2_000
    sounds = Sounds(
        torch.randn((clips, 500), generator=generator()),
        torch.full((clips,), 500),
        torch.eye(clips),
        torch.zeros(clips, 1),
        torch.ones(clips, dtype=torch.bool),
        torch.ones(clips),
    )
    mixed = augment_sounds(sounds, replace(OFF, mixup_share=0.4, mixup_beta=1.0), generator())
    own = mixed.scores.diagonal()
    assert 0.36 < float((own < 1).float().mean()) < 0.44
    # Beta(1, 1) is uniform, and the larger part is a clip's own: 0.5 to 1, 0.75 on average.
    assert 0.73 < float(own[own < 1].mean()) < 0.77


def test_silence_and_what_could_not_be_read_are_never_mixed(sounds):
    sounds.waveforms[3] = 1e-5  # -100 dBFS
    sounds.weights[1] = 0
    aside = [1, 3, 5]
    for seed in range(20):
        mixed = augment_sounds(sounds, MIXED, generator(seed))
        for name in ("waveforms", "scores", "truth", "lengths", "labelled"):
            assert torch.equal(getattr(mixed, name)[aside], getattr(sounds, name)[aside])
        for row in (0, 2, 4):  # nor are they in another
            residual = mixed.waveforms[row] - sounds.waveforms[row]
            assert abs(float(residual @ sounds.waveforms[1])) < 0.2 * float(
                sounds.waveforms[1].square().sum()
            )
        assert torch.equal(mixed.weights, sounds.weights)


def test_a_beta_near_0_leaves_sounds_whole(sounds):
    mixed = augment_sounds(sounds, replace(MIXED, mixup_beta=1e-9), generator())
    assert mixed.waveforms.isfinite().all()
    torch.testing.assert_close(mixed.scores, sounds.scores)


# ------------------------------------------------------------------ gain and speed


def test_gain_stays_within_its_bounds_and_is_drawn_for_each_clip(sounds):
    ratios = []
    for seed in range(40):
        louder = augment_sounds(sounds, replace(OFF, gain_db=6.0), generator(seed))
        ratios.append(power(louder.waveforms, sounds.lengths)[:-1] / power(
            sounds.waveforms, sounds.lengths)[:-1])  # fmt: skip
    gain_db = 10 * torch.stack(ratios).log10()
    assert float(gain_db.max()) <= 6.001 and float(gain_db.min()) >= -6.001
    assert float(gain_db.max()) > 5 and float(gain_db.min()) < -5
    assert float(gain_db.std(dim=1).min()) > 0.5


def test_speed_changes_pitch_and_length_together():
    time_s = torch.arange(16_000) / 16_000
    waveforms = torch.zeros(2, 16_000)
    waveforms[0, :8_000] = (2 * math.pi * 440 * time_s).sin()[:8_000]
    waveforms[1] = (2 * math.pi * 440 * time_s).sin()
    sounds = Sounds(
        waveforms,
        torch.tensor([8_000, 16_000]),
        torch.zeros(2, 1),
        torch.zeros(2, 1),
        torch.zeros(2, dtype=torch.bool),
        torch.ones(2),
    )
    faster = slower = 0
    for seed in range(12):
        changed = augment_sounds(sounds, replace(OFF, speed=0.2), generator(seed))
        assert changed.waveforms.shape == waveforms.shape
        rate = 8_000 / float(changed.lengths[0])
        assert 0.79 < rate < 1.21
        for row, length in enumerate(changed.lengths.tolist()):
            assert float(changed.waveforms[row, length + 1 :].abs().sum()) == 0
        heard = changed.waveforms[0, : int(changed.lengths[0])]
        crossings = int((heard[1:] * heard[:-1] < 0).sum())
        assert crossings == pytest.approx(440, abs=3)  # half a second of it, at any speed
        if rate > 1:
            faster += 1
            assert int(changed.lengths[1]) == pytest.approx(16_000 / rate, abs=3)
        else:
            slower += 1
            assert int(changed.lengths[1]) == 16_000  # no more than is heard at once
    assert faster and slower


# ------------------------------------------------------------------ what is hidden

MASKED = replace(OFF, frequency_mask=0.4, time_mask=0.25)


def hidden(recipe, frames, bins, clips=200):
    """Which frames and bins are masked whole: (bool [clips, frames], bool [clips, bins])."""
    spec = FeatureSpec(num_mel_bins=bins, max_length=frames)
    drawn = draw_disguise(clips, recipe, generator(7))
    masked = disguise(
        torch.ones(clips, frames, bins), torch.full((clips,), 160 * frames), drawn, spec
    )
    assert set(masked.unique().tolist()) <= {0.0, 1.0}
    return (masked == 0).all(dim=2), (masked == 0).all(dim=1)


@pytest.mark.parametrize("masks", [1, 2])
def test_masks_cover_what_they_may_and_hold_the_mean(masks):
    frames, bins = hidden(replace(MASKED, masks=masks), 128, 64)
    most_frames, most_bins = int(frames.sum(dim=1).max()), int(bins.sum(dim=1).max())
    assert most_frames <= masks * math.ceil(0.25 * 128)
    assert most_bins <= masks * math.ceil(0.4 * 64)
    assert most_frames > 0.25 * 128 * 0.9 and most_bins > 0.4 * 64 * 0.9  # and may be as wide
    # Any place may be hidden; the outermost seldom are.
    assert frames.any(dim=0)[2:-2].all() and bins.any(dim=0)[2:-2].all()
    if masks == 1:  # a mask is one span
        for row in bins:
            assert int((row[1:] != row[:-1]).sum()) <= 2


def test_a_mask_lies_within_its_axis():
    """Were a part of it beyond, less would be covered than its width, half the widest on average."""
    _, bins = hidden(MASKED, 16, 64, clips=2_000)
    assert float(bins.sum(dim=1).float().mean()) == pytest.approx(0.2 * 64, abs=0.6)


def test_ours_is_specaugments_48_and_192():
    frames, _ = hidden(Consistent(), 1_024, 4, clips=400)
    _, bins = hidden(Consistent(), 4, 128, clips=400)
    assert 180 < int(frames.sum(dim=1).max()) <= 192
    assert 45 < int(bins.sum(dim=1).max()) <= 48


def test_student_and_teacher_are_disguised_alike_whatever_their_resolution():
    fine = hidden(MASKED, 256, 128)
    coarse = hidden(MASKED, 128, 32)
    for of_fine, of_coarse in zip(fine, coarse, strict=True):
        times = of_fine.shape[1] // of_coarse.shape[1]
        shares = of_fine.reshape(len(of_fine), -1, times).float().mean(dim=2)
        # A coarse place is hidden where its middle is: within a mask all of it, outside little.
        within = of_coarse[:, 1:-1] & of_coarse[:, 2:] & of_coarse[:, :-2]
        assert within.any() and (shares[:, 1:-1][within] == 1).all()
        assert (shares[of_coarse] > 0).all() and (shares[~of_coarse] <= 0.5).all()

    drawn = draw_disguise(3, replace(OFF, equaliser_db=6.0), generator(1))
    curves = []
    for bins in (128, 32):
        spec = FeatureSpec(num_mel_bins=bins, max_length=64, mean=-5.0, std=3.0)
        features = torch.zeros(3, 64, bins)
        moved = disguise(features, torch.full((3,), 64 * 160), drawn, spec)
        curves.append(moved[:, 0] * 2 * spec.std)
    ends = [curve[:, [0, -1]] for curve in curves]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(curves[0][:, ::4], curves[1], atol=0.4, rtol=0)
    assert float(curves[0].abs().max()) > 0.5


def test_the_equaliser_leaves_padding_and_the_floor():
    spec = FeatureSpec(num_mel_bins=32, max_length=64)
    lengths = torch.tensor([1_600, 64 * 160])
    waveforms = torch.zeros(2, 64 * 160)
    waveforms[0, :1_600] = 0.1 * torch.randn(1_600, generator=generator())
    features = LogMel(spec)(waveforms, lengths)  # the second is silent: at the floor throughout
    drawn = draw_disguise(2, replace(OFF, equaliser_db=10.0), generator(3))
    moved = disguise(features, lengths, drawn, spec)
    heard = 1 + (1_600 - 400) // 160
    assert torch.equal(moved[0, heard:], features[0, heard:])
    assert not torch.isclose(moved[0, :heard], features[0, :heard]).all(dim=0).any()
    floor = (math.log(POWER_FLOOR) - spec.mean) / (2 * spec.std)
    assert float(moved.min()) >= floor - 1e-5
    in_decibels = (moved[0, :heard] - features[0, :heard]) * 2 * spec.std * 10 / math.log(10)
    at_ends = in_decibels[0, [0, -1]]
    expected = drawn.curve[0, [0, -1]] * 10 / math.log(10)
    torch.testing.assert_close(at_ends, expected, atol=1e-3, rtol=0)
