"""Tells encoded audio by its first bytes or by the name of its field, and makes it of samples."""

from __future__ import annotations

import re
import struct

import numpy as np
from numpy.typing import NDArray

# What a field that holds a clip is called, most telling first.
AUDIO_FIELDS = (
    *("audio", "audio/encoded", "encoded_audio", "audio_encoded", "audio/bytes", "audio_bytes"),
    *("wav", "flac", "mp3", "ogg", "opus", "m4a", "waveform", "sound", "speech", "encoded"),
    *("bytes", "content", "data"),
)

# RIFF and its 64-bit kin, FLAC, Ogg, AIFF, CAF, WavPack, AU, AMR, TTA, Monkey's Audio, Matroska
# (WebM), MP3 with a tag, ISO media (MP4, M4A, 3GP; not the still images of that form), AC-3.
_MAGIC = re.compile(
    rb"(?s)(?:RIFF|RF64|RIFX).{4}WAVE|riff\x2e\x91\xcf\x11|fLaC|OggS|FORM.{4}AIF[FC]|caff\x00\x01"
    rb"|wvpk|\.snd|#!AMR|TTA[12]|MAC \x00?|\x1aE\xdf\xa3|ID3[\x02-\x04]"
    rb"|.{4}ftyp(?!heic|heix|mif1|msf1|avif|avis)|\x0b\x77"
)


def is_audio_bytes(head: bytes) -> bool:
    """Whether a file that begins with `head` (12 bytes or more) is in a form that holds audio."""
    return _MAGIC.match(head) is not None or _is_mpeg_frame(head)


def _is_mpeg_frame(head: bytes) -> bool:
    """Whether an MP3 (or MP2, or AAC in ADTS) frame begins: 11 bits of sync and no reserved value."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    if layer == 0:  # ADTS: MPEG-4 or MPEG-2 AAC
        return head[1] & 0xF6 == 0xF0 and head[2] >> 2 & 15 < 13
    return version != 1 and head[2] >> 4 not in (0, 15) and head[2] >> 2 & 3 != 3


# numpy's kind and width: the format tag of a WAV, 1 for integers and 3 for floats.
_WAV_FORMATS = {"i2": 1, "i4": 1, "f4": 3, "f8": 3}


def wav_of(samples: NDArray[np.generic], sample_rate: int) -> bytes:
    """A WAV file that holds the samples as they are, the same bytes each time.

    libsndfile writes the time into a float WAV.

    Args:
        samples: int16, int32, float32 or float64, [samples] or [samples, channels]; full
            scale is the type's, or 1.0.
        sample_rate: Hz.

    Raises:
        ValueError: a WAV cannot hold it.
    """
    kind = f"{samples.dtype.kind}{samples.dtype.itemsize}"
    if kind not in _WAV_FORMATS:
        raise ValueError(f"samples are {samples.dtype}; expected int16, int32, float32 or float64")
    if samples.ndim not in (1, 2) or not 0 < sample_rate < 1 << 31:
        raise ValueError(f"{list(samples.shape)} samples at {sample_rate} Hz are no audio")
    channels = samples.shape[1] if samples.ndim == 2 else 1
    data = samples.astype(samples.dtype.newbyteorder("<"), copy=False).tobytes()
    frame_bytes = channels * samples.dtype.itemsize
    if len(data) + 64 >= 1 << 32 or frame_bytes >= 1 << 16:
        raise ValueError(f"{list(samples.shape)} samples are more than a WAV holds")
    form = struct.pack(
        "<HHIIHH", _WAV_FORMATS[kind], channels, sample_rate, sample_rate * frame_bytes & 0xFFFFFFFF,
        frame_bytes, 8 * samples.dtype.itemsize,
    )  # fmt: skip
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"fact" + struct.pack("<II", 4, len(data) // frame_bytes)
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
