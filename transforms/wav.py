"""WAV files of 16-bit samples: where these lie, and what poses as them.

ffmpeg looks into such a file for a bitstream, through 32 packets of up to 0.1 s, which is 4 to 30 ms of
CPU time a clip, and takes five times as long to read it as it takes to read it as it is.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from transforms.stated import holds_bitstream

_PCM16 = re.compile(rb"(?s)R(?:IFF|F64).{4}WAVE.*?fmt .{4}(?:\x01\x00|\xfe\xff).{12}\x10\x00")
_HEADER_BYTES = 4_096  # in which "fmt " is looked for
_PROBED_BYTES = 16_384
_DTS_WITHIN_BYTES = 600_000  # ffmpeg's 32 packets of stereo at 48 kHz, and a header
_DTS_SYNC_WORDS = (  # as 16-bit little-endian samples; ETSI TS 102 114
    (0x7FFE, 0x8001),
    (0xFE7F, 0x0180),
    (0x1FFF, 0xE800),
    (0xFF1F, 0x00E8),
    (0x5864, 0x2520),  # of an extension without a core
)
_POSING_BYTES = 65_536  # of samples, in which a bitstream would have to begin
_POSING_S = 0.2  # the same for what has more of them: two packets of ffmpeg's
_SPDIF_PREAMBLES = (b"\x72\xf8\x1f\x4e", b"\xf8\x72\x4e\x1f")  # IEC 61937, in either byte order
_MOST_CHANNELS = 8


@dataclass(frozen=True)
class PlainPcm16:
    """Where the samples of a WAV lie, and how."""

    start: int  # byte of the file
    end: int
    channels: int
    sample_rate: int  # Hz

    @property
    def frames(self) -> int:
        """Samples of each channel."""
        return (self.end - self.start) // (2 * self.channels)

    def bytes_in(self, seconds: float) -> int:
        """Bytes of so long a piece."""
        return 2 * self.channels * round(seconds * self.sample_rate)


def plain_pcm16(file: BinaryIO) -> PlainPcm16 | None:
    """The samples of a WAV that is nothing else, and as long as it says it is.

    None where anything about it is odd, or looks like a bitstream that poses as samples: that is for
    ffmpeg to say. The file is at its start then.
    """
    size = file.seek(0, 2)
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    plain = whole_pcm16(header, size)
    if plain is not None:
        content = header + file.read(_DTS_WITHIN_BYTES)
        posing = content[plain.start : plain.start + max(_POSING_BYTES, plain.bytes_in(_POSING_S))]
        if (
            any(preamble in posing for preamble in _SPDIF_PREAMBLES)
            or holds_bitstream(posing)
            or _holds_dts(content)
        ):
            plain = None
    file.seek(0)
    return plain


def whole_pcm16(header: bytes, size: int) -> PlainPcm16 | None:
    """The samples of a RIFF of `size` bytes in all, by its first bytes; None where these are odd."""
    if header[:4] != b"RIFF" or header[8:16] != b"WAVEfmt " or len(header) < 44:
        return None
    riff_bytes, fmt_bytes = (int.from_bytes(header[at : at + 4], "little") for at in (4, 16))
    code, channels, rate, bytes_a_s, align, bits = struct.unpack_from("<HHIIHH", header, 20)
    if riff_bytes + 8 != size or fmt_bytes != 16 or (code, bits) != (1, 16):
        return None
    if not 0 < channels <= _MOST_CHANNELS or align != 2 * channels:
        return None
    if not rate or bytes_a_s != rate * align:
        return None
    at = 36
    while header[at : at + 4] in (b"LIST", b"JUNK", b"fact", b"bext"):
        at += 8 + (int.from_bytes(header[at + 4 : at + 8], "little") + 1 & ~1)
    data_bytes = int.from_bytes(header[at + 4 : at + 8], "little")
    if header[at : at + 4] != b"data" or not data_bytes or data_bytes % align:
        return None
    return PlainPcm16(at + 8, size, channels, rate) if at + 8 + data_bytes == size else None


def holds_pcm16(file: BinaryIO) -> tuple[bool, bool]:
    """(whether it is a WAV of 16-bit samples, whether these are no bitstream).

    The second is certain where the first bytes hold no row of frames, and all that ffmpeg would
    look at no sync word of DTS, which may follow silence. The file is at its start then.
    """
    header = file.read(_HEADER_BYTES)
    matched = _PCM16.match(header)
    certain = False
    if matched is not None:
        content = header + file.read(_DTS_WITHIN_BYTES)
        certain = not _holds_dts(content) and not holds_bitstream(content[:_PROBED_BYTES])
    file.seek(0)
    return matched is not None, certain


def _holds_dts(content: bytes) -> bool:
    samples = np.frombuffer(content, "<u2", len(content) // 2)
    return any(
        (samples[np.flatnonzero(samples[:-1] == first) + 1] == second).any()
        for first, second in _DTS_SYNC_WORDS
    )
