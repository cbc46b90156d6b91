"""A checkpoint's feature numbers, for those who need the numbers and not torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FRAME_SAMPLES = 400  # 25 ms at 16 kHz; transformers fixes it in samples for every rate
HOP_SAMPLES = 160  # 10 ms at 16 kHz


@dataclass(frozen=True)
class FeatureSpec:
    """A checkpoint's feature numbers; the defaults are those of `ASTFeatureExtractor`."""

    sample_rate: int = 16_000  # Hz
    num_mel_bins: int = 128
    max_length: int = 1_024  # frames
    mean: float = -4.2677393
    std: float = 4.5689974
    do_normalize: bool = True

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any]) -> FeatureSpec:
        """Reads `preprocessor_config.json`'s entries, with transformers' defaults.

        Raises:
            ValueError: the file describes another feature extractor, or numbers
                that cannot be right.
        """
        kind = config.get("feature_extractor_type", "ASTFeatureExtractor")
        if kind != "ASTFeatureExtractor":
            raise ValueError(f"feature_extractor_type is {kind!r}, expected 'ASTFeatureExtractor'")
        default = cls()
        spec = cls(
            sample_rate=int(config.get("sampling_rate", default.sample_rate)),
            num_mel_bins=int(config.get("num_mel_bins", default.num_mel_bins)),
            max_length=int(config.get("max_length", default.max_length)),
            mean=float(config.get("mean", default.mean)),
            std=float(config.get("std", default.std)),
            do_normalize=bool(config.get("do_normalize", default.do_normalize)),
        )
        if min(spec.sample_rate, spec.num_mel_bins, spec.max_length) < 1 or not spec.std > 0:
            raise ValueError(f"{spec} has a number that is not positive")
        if not math.isfinite(spec.mean) or not math.isfinite(spec.std):
            raise ValueError(f"{spec} has a mean or std that is not finite")
        return spec

    @property
    def chunk_samples(self) -> int:
        """Samples in one full chunk: 163,840 (10.24 s) for AST's 1,024 frames."""
        return self.max_length * HOP_SAMPLES

    @property
    def chunk_s(self) -> float:
        """Length of one full chunk in seconds."""
        return self.chunk_samples / self.sample_rate
