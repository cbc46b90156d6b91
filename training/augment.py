"""What is done to a batch of sounds before the student hears it.

Everything is drawn from a generator that is given, so that a batch is the same in every run
and after a resumption. Waveforms are changed first, then the features that are made of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from student.feature_spec import FRAME_SAMPLES, HOP_SAMPLES, FeatureSpec
from student.features import POWER_FLOOR
from training.presets import Recipe

_BANDS = 5  # points of the equaliser's curve
_SILENT = 1e-7  # mean square, -70 dBFS


@dataclass
class Sounds:
    """A batch of sounds and what is known of them; all on one device."""

    waveforms: Tensor  # float32 [clips, samples], zero beyond each one's length
    lengths: Tensor  # int64 [clips], samples
    scores: Tensor  # the teacher's, float32 [clips, labels]
    truth: Tensor  # own labels, float32 [clips, labels]
    labelled: Tensor  # bool [clips]: whether `truth` is known
    weights: Tensor  # float32 [clips]: 0 where there was nothing to hear


def augment_sounds(sounds: Sounds, recipe: Recipe, random: torch.Generator) -> Sounds:
    """Mixes, speeds up or down, and makes louder or softer.

    Two sounds are mixed at the loudness that their shares say, whatever theirs was, and
    their targets in the same shares. `random` is on the CPU.
    """
    clips, samples = sounds.waveforms.shape
    waveforms, lengths = sounds.waveforms, sounds.lengths
    scores, truth, labelled = sounds.scores, sounds.truth, sounds.labelled

    if recipe.mixup_share and clips > 1:
        partner = torch.randperm(clips, generator=random).to(waveforms.device)
        share = _beta(recipe.mixup_beta, clips, random).to(waveforms.device)
        share = torch.maximum(share, 1 - share)
        mixed = (_uniform(clips, random) < recipe.mixup_share).to(waveforms.device)
        mixed &= (sounds.weights > 0) & (sounds.weights[partner] > 0)
        mixed &= partner != torch.arange(clips, device=waveforms.device)
        # Silence has no loudness to be a share of, and what noise is in it is not to be heard.
        power = waveforms.square().sum(dim=1) / lengths.clamp_min(1)
        mixed &= (power > _SILENT) & (power[partner] > _SILENT)
        share = torch.where(mixed, share, torch.ones_like(share))
        gain = ((1 - share) / share * power / power[partner].clamp_min(_SILENT)).sqrt()
        waveforms = waveforms + gain[:, None] * waveforms[partner]
        lengths = torch.where(mixed, torch.maximum(lengths, lengths[partner]), lengths)
        keep = share[:, None]
        scores = keep * scores + (1 - keep) * scores[partner]
        truth = keep * truth + (1 - keep) * truth[partner]
        labelled = labelled & (labelled[partner] | ~mixed)

    if recipe.speed:
        # One speed for the whole batch: a batch of tensors of equal length.
        rate = 1 + recipe.speed * (2 * float(_uniform(1, random)) - 1)
        stretched = max(FRAME_SAMPLES, round(samples / rate))
        waveforms = functional.interpolate(
            waveforms[:, None], size=stretched, mode="linear", align_corners=False
        )[:, 0]
        lengths = (lengths.double() * stretched / samples).long().clamp(FRAME_SAMPLES, samples)
        if stretched >= samples:
            waveforms = waveforms[:, :samples]
        else:
            waveforms = functional.pad(waveforms, (0, samples - stretched))

    if recipe.gain_db:
        gain_db = recipe.gain_db * (2 * _uniform(clips, random) - 1)
        waveforms = waveforms * (10 ** (gain_db / 20)).to(waveforms.device)[:, None]

    return Sounds(waveforms, lengths, scores, truth, labelled, sounds.weights)


@dataclass(frozen=True)
class Disguise:
    """An equaliser's curve and masks, as shares of the axes: the same for any resolution."""

    curve: Tensor  # nepers of power [clips, _BANDS]
    frequency: Tensor  # [clips, masks, 2]: start and width, shares of the mel bins
    time: Tensor  # [clips, masks, 2]: start and width, shares of the frames


def draw_disguise(clips: int, recipe: Recipe, random: torch.Generator) -> Disguise:
    """What hides a part of each clip's features."""

    def spans(widest: float) -> Tensor:
        width = widest * torch.rand((clips, recipe.masks), generator=random)
        start = (1 - width) * torch.rand((clips, recipe.masks), generator=random)
        return torch.stack([start, width], dim=2)

    curve_db = recipe.equaliser_db * torch.randn((clips, _BANDS), generator=random)
    return Disguise(
        curve_db * math.log(10) / 10, spans(recipe.frequency_mask), spans(recipe.time_mask)
    )


def disguise(features: Tensor, lengths: Tensor, drawn: Disguise, spec: FeatureSpec) -> Tensor:
    """`features` [clips, frames, mel bins] equalised and masked; a mask has the mean's value, 0.

    Args:
        features: as `LogMel` makes them.
        lengths: samples of each clip, int64 [clips]; padding is not equalised.
        drawn: what to do, made by `draw_disguise`.
        spec: of the features.
    """
    frames, bins = features.shape[1:]
    device = features.device
    if bool((drawn.curve != 0).any()):
        curve = functional.interpolate(
            drawn.curve[:, None], size=bins, mode="linear", align_corners=True
        )[:, 0].to(device)
        mean, scale = (spec.mean, 2 * spec.std) if spec.do_normalize else (0.0, 1.0)
        floor = (math.log(POWER_FLOOR) - mean) / scale
        counts = (lengths - FRAME_SAMPLES).div(HOP_SAMPLES, rounding_mode="floor") + 1
        inside = torch.arange(frames, device=device) < counts[:, None]
        shifted = (features + curve[:, None] / scale).clamp_min(floor)
        features = torch.where(inside[..., None], shifted, features)
    hidden_frames = _covered(drawn.time, frames).to(device)
    hidden_bins = _covered(drawn.frequency, bins).to(device)
    return features.masked_fill(hidden_frames[:, :, None] | hidden_bins[:, None, :], 0.0)


def _covered(spans: Tensor, size: int) -> Tensor:
    """Which of `size` places any span of [clips, masks, (start, width)] covers: bool [clips, size]."""
    place = (torch.arange(size) + 0.5) / size
    start, width = spans[..., :1], spans[..., 1:]
    return ((place >= start) & (place < start + width)).any(dim=1)


def _uniform(count: int, random: torch.Generator) -> Tensor:
    return torch.rand(count, generator=random)


def _beta(parameter: float, count: int, random: torch.Generator) -> Tensor:
    """Beta(parameter, parameter), from two gamma variables; torch's own takes no generator."""
    first, second = (
        torch._standard_gamma(torch.full((count,), parameter, dtype=torch.float64), random)
        for _ in range(2)
    )
    # Both can underflow where the parameter is near 0: then one has all.
    total = first + second
    return torch.where(total > 0, first / total.clamp_min(1e-300), torch.tensor(1.0)).float()
