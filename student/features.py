"""Log-mel features as AST was trained on them, in batched torch.

The numbers are Kaldi's fbank as `transformers.ASTFeatureExtractor` calls it:
25 ms periodic-free Hann frames every 10 ms without edge padding, per-frame DC
removal, pre-emphasis 0.97, 512-point power spectrum, Kaldi mel filters from
20 Hz to Nyquist, natural logarithm with a floor, then padding and normalisation
in that order. Unlike Kaldi itself, samples stay in [-1, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from student.feature_spec import FRAME_SAMPLES, HOP_SAMPLES, FeatureSpec

FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOW_HZ = 20.0
_LOUDEST = 1e15  # samples of damaged float audio, whose power float32 would not hold
_CPU_FRAMES = 256  # that go through the spectrum at once
POWER_FLOOR = 1.1920928955078125e-07  # float32 epsilon, Kaldi's floor under the logarithm


def mel_filters(num_mel_bins: int, sample_rate: int) -> NDArray[np.float64]:
    """Kaldi's triangular filters, float64 [257 spectrum bins, mel bins].

    Triangles are equally wide and linear on the mel scale 1127 ln(1 + f/700),
    from 20 Hz to Nyquist; Kaldi gives the Nyquist bin no weight.
    """

    def mel(hz: Any) -> Any:
        return 1127.0 * np.log(1.0 + hz / 700.0)

    edges = np.linspace(mel(LOW_HZ), mel(sample_rate / 2), num_mel_bins + 2)
    spectrum = mel(np.arange(FFT_SAMPLES // 2 + 1) * sample_rate / FFT_SAMPLES)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (spectrum - left) / (centre - left)
    falling = (right - spectrum) / (right - centre)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters


class LogMel(torch.nn.Module):
    """Turns waveforms into AST's input on the device that the module is on.

    Args:
        spec: the checkpoint's feature numbers.
        dtype: what the spectrum is computed in. float64 gives transformers' features to
            1e-5; float32 is several times as fast, and good enough to train on, or for a model
            that rounds them to 16 bits.
    """

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, spec: FeatureSpec, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.spec = spec
        # float64 on purpose: in float32 a loud tone's rounding noise reaches the
        # quiet bins, whose logarithm then differs from transformers' by 1e-2.
        window = torch.hann_window(FRAME_SAMPLES, periodic=False, dtype=dtype)
        filters = torch.from_numpy(mel_filters(spec.num_mel_bins, spec.sample_rate)).to(dtype)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def power(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Mel power [n, frames, mel bins] of float32 [n, samples]; no floor, no padding."""
        if self.window.dtype is torch.float32:
            waveforms = waveforms.clamp(-_LOUDEST, _LOUDEST)
        frames = waveforms.to(self.window.dtype).unfold(1, FRAME_SAMPLES, HOP_SAMPLES)
        # A CPU is twice as fast with pieces that stay in its caches, and whose memory it has.
        at_once = _CPU_FRAMES if waveforms.device.type == "cpu" else max(1, frames.shape[1])
        return torch.cat([self._power(part) for part in frames.split(at_once, dim=1)], dim=1)

    def _power(self, frames: torch.Tensor) -> torch.Tensor:
        frames = frames - frames.mean(dim=2, keepdim=True)
        # Pre-emphasis and window in one; the sample before a frame's first is its first.
        shaped = frames * self.window
        shaped[..., 0] *= 1 - PREEMPHASIS
        shaped[..., 1:].addcmul_(frames[..., :-1], self.window[1:], value=-PREEMPHASIS)
        spectrum = torch.fft.rfft(shaped, n=FFT_SAMPLES)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        mel: torch.Tensor = power @ self.filters
        return mel

    def forward(self, waveforms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """AST's input features.

        Args:
            waveforms: float32 [n, samples], zero beyond each one's length.
            lengths: int64 [n], samples of each waveform.

        Returns:
            float32 [n, max_length, mel bins]. Frames beyond a waveform's end are
            zero before normalisation, as AST was trained; a waveform shorter than
            one frame (400 samples) is all padding; frames past max_length are cut.
        """
        spec = self.spec
        used = min(waveforms.shape[1], (spec.max_length - 1) * HOP_SAMPLES + FRAME_SAMPLES)
        features = waveforms.new_zeros((len(waveforms), spec.max_length, spec.num_mel_bins))
        if used >= FRAME_SAMPLES:
            frames = 1 + (used - FRAME_SAMPLES) // HOP_SAMPLES
            counts = (lengths - FRAME_SAMPLES).div(HOP_SAMPLES, rounding_mode="floor") + 1
            inside = torch.arange(frames, device=waveforms.device) < counts[:, None]
            # A CPU is twice as fast with one waveform at a time, in its caches.
            at_once = 1 if waveforms.device.type == "cpu" else len(waveforms)
            for first in range(0, len(waveforms), at_once):
                rows = slice(first, first + at_once)
                log_mel = self.power(waveforms[rows, :used]).clamp_min(POWER_FLOOR).log()
                kept = torch.where(inside[rows, :, None], log_mel, 0.0)
                features[rows, :frames] = kept.to(features.dtype)
        if spec.do_normalize:
            features = (features - spec.mean) / (2 * spec.std)
        return features
