"""What the structure of an audio file says of its own end: how long it is, and whether it is cut.

Decoders stop at the end of a file that was cut, often without a word. What they decoded is held
against what is found here. Nothing is believed that cannot be wrong by accident: a length that is
given as unknown, in any of the ways in which streams are recorded, says nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_HEAD_BYTES = 4_096
_OGG_PAGE_BYTES = 65_307  # the largest page
_MOST_CHUNKS = 1_000  # a damaged file may have millions, of no bytes each

# Lengths that mean "unknown": 0, all ones, and what recorders into a pipe write instead.
_UNKNOWN_FROM = 0x7FFF_0000

# ETSI TS 102 366, table F.7.1: kbit/s by half the frame size code.
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)

# ISO/IEC 11172-3 and 13818-3: kbit/s by [MPEG-1, else][layer - 1][index].
_MPEG_KBPS = (
    (
        (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
        (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    ),
    (
        (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
        (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
        (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    ),
)
_MPEG_RATES = (44_100, 48_000, 32_000)

_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_MP4_BOXES = frozenset(
    b"ftyp moov mdat moof free skip wide udta meta uuid sidx mfra styp pnot prft emsg".split()
)


@dataclass(frozen=True)
class Stated:
    """What a file says of its length; all None and False where it says nothing that counts."""

    duration_s: float | None = None
    missing_s: float | None = None  # of samples that would lie beyond the end of the file
    cut: bool = False  # the file ends before its own structure does


def within_tags(file: BinaryIO) -> tuple[int, int]:
    """(first, one past the last) byte of what lies between ID3, APE and Lyrics3 tags.

    Decoders of streams without a container take tags at the end for damaged frames. Tags are
    trusted as far as they stay within the file, which stays positioned where it was.
    """
    position = file.tell()
    end = file.seek(0, 2)
    start = 0
    while (size := _leading_tag(_read(file, start, 32))) and start + size < end:
        start += size
    while size := _trailing_tag(file, start, end):
        end -= size
    file.seek(position)
    return start, end


def _leading_tag(head: bytes) -> int:
    if head[:3] == b"ID3" and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)  # a footer
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + int(struct.unpack_from("<I", head, 12)[0])
    return 0


def _trailing_tag(file: BinaryIO, start: int, end: int) -> int:
    tail = _read(file, max(start, end - 160), min(160, end - start))
    if tail[-128:-125] == b"TAG":
        return 128
    size = 0
    if tail[-32:-24] == b"APETAGEX" and len(tail) >= 32:
        size, _, flags = struct.unpack_from("<III", tail[-32:], 12)
        size += 32 if flags & 0x8000_0000 else 0  # a header, which the size leaves out
    elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
        size = int(tail[-15:-9]) + 15
    elif tail[-10:-7] == b"3DI" and len(tail) >= 10:  # the footer of an ID3v2.4 at the end
        size = 20 + (tail[-4] << 21 | tail[-3] << 14 | tail[-2] << 7 | tail[-1])
    return size if 0 < size < end - start else 0


def stated_of(file: BinaryIO) -> Stated:
    """What a file states, without its tags; it stays positioned where it was.

    Known are RIFF (WAV, AVI), RF64, BW64, W64, CAF, FLAC, Ogg, MPEG audio with a Xing header, MP4 and
    its kin, Matroska and ASF.
    """
    position = file.tell()
    size = file.seek(0, 2)
    head = _read(file, 0, _HEAD_BYTES)
    try:
        return _stated(file, head, size)
    except (struct.error, IndexError, ZeroDivisionError):  # it ends, or is damaged, in a header
        return Stated()
    finally:
        file.seek(position)


def _stated(file: BinaryIO, head: bytes, size: int) -> Stated:
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _of_wav(file, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        stated = 8 + int(struct.unpack_from("<I", head, 4)[0])
        # OpenDML's AVI goes on in further RIFFs behind this one.
        return Stated(cut=size < stated < _UNKNOWN_FROM)
    if head[:4] == b"riff" and head[24:28] == b"wave":
        return _of_w64(file, size)
    if head[:4] == b"caff":
        return _of_caf(file, size)
    if head[:4] == b"fLaC":
        return _of_flac(head)
    if head[:4] == b"OggS":
        return _of_ogg(file, size)
    if head[4:8] in _MP4_BOXES:
        return _of_mp4(file, size)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _of_matroska(head, size)
    if head[:4] == b"\x30\x26\xb2\x75":
        return _of_asf(file, size)
    return _of_mpeg(head, size)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(max(0, position))
    return file.read(size)


def _of_wav(file: BinaryIO, size: int, order: str) -> Stated:
    position, byte_rate, long_data = 12, 0, None
    for _ in range(_MOST_CHUNKS):
        header = _read(file, position, 8)
        name, length = header[:4], int(struct.unpack(order + "I", header[4:])[0])
        position += 8
        if name == b"ds64":
            long_data = int(struct.unpack_from("<Q", _read(file, position, 16), 8)[0])
        elif name == b"fmt ":
            byte_rate = int(struct.unpack_from(order + "I", _read(file, position, 12), 8)[0])
        elif name == b"data":
            if length == 0xFFFF_FFFF and long_data is not None:
                length = long_data
            elif length >= _UNKNOWN_FROM and size < length:
                return Stated()
            beyond = position + length - size
            if beyond <= 0 or length == 0:
                return Stated()
            return Stated(missing_s=beyond / byte_rate if byte_rate else None, cut=True)
        position += length + length % 2
        if position >= size:
            break
    return Stated()


def _of_w64(file: BinaryIO, size: int) -> Stated:
    position, byte_rate = 40, 0
    for _ in range(_MOST_CHUNKS):
        header = _read(file, position, 36)
        length = int(struct.unpack_from("<Q", header, 16)[0])  # its own 24 bytes included
        if header[:4] == b"fmt ":
            byte_rate = int(struct.unpack_from("<I", header, 32)[0])
        elif header[:16] == _W64_DATA:
            beyond = position + length - size
            if beyond <= 0 or length >= 1 << 62:
                return Stated()
            return Stated(missing_s=beyond / byte_rate if byte_rate else None, cut=True)
        if length < 24:
            break
        position += length + -length % 8
    return Stated()


def _of_caf(file: BinaryIO, size: int) -> Stated:
    position, byte_rate = 8, 0.0
    for _ in range(_MOST_CHUNKS):
        name, length = struct.unpack(">4sq", _read(file, position, 12))
        position += 12
        if name == b"desc":
            rate, _, _, packet_bytes, packet_frames = struct.unpack(
                ">d4sIII", _read(file, position, 24)
            )
            byte_rate = rate * packet_bytes / packet_frames if packet_frames else 0.0
        elif name == b"data":
            beyond = position + length - size
            if length < 0 or beyond <= 0:
                return Stated()
            return Stated(missing_s=beyond / byte_rate if byte_rate else None, cut=True)
        if length < 0:
            break
        position += length
    return Stated()


def _of_flac(head: bytes) -> Stated:
    if head[4] & 0x7F:  # the first block is not STREAMINFO
        return Stated()
    packed = int.from_bytes(head[18:26], "big")
    samples, rate = packed & (1 << 36) - 1, packed >> 44
    return Stated(duration_s=samples / rate) if samples else Stated()


def _of_ogg(file: BinaryIO, size: int) -> Stated:
    """Cut where the last page is not whole, or not marked as a stream's last (RFC 3533)."""
    tail = _read(file, size - _OGG_PAGE_BYTES - 27, _OGG_PAGE_BYTES + 27)
    at = len(tail)
    while (at := tail.rfind(b"OggS\0", 0, at)) >= 0:
        page = tail[at:]
        if len(page) < 27:
            return Stated(cut=True)
        segments = page[27 : 27 + page[26]]
        if page[5] > 7:  # in a packet, by accident
            continue
        whole = len(segments) == page[26] and len(page) >= 27 + page[26] + sum(segments)
        return Stated(cut=not whole or not page[5] & 4)
    return Stated(cut=True)


def _of_mp4(file: BinaryIO, size: int) -> Stated:
    position = 0
    for _ in range(100_000):  # fragments are two boxes each
        if position >= size:
            return Stated()
        header = _read(file, position, 16)
        length, name = struct.unpack_from(">I4s", header)
        if name not in _MP4_BOXES or length == 0:
            return Stated()  # up to the end; or what follows is no box
        if length == 1:
            length = int(struct.unpack_from(">Q", header, 8)[0])
        if length < 8:
            return Stated()
        position += length
        if position > size:
            return Stated(cut=True)
    return Stated()


def _of_matroska(head: bytes, size: int) -> Stated:
    length, at = _ebml_size(head, 4)
    position = at + (length or 0)
    if head[position : position + 4] != b"\x18\x53\x80\x67":
        return Stated()
    length, at = _ebml_size(head, position + 4)
    return Stated(cut=length is not None and at + length > size)


def _ebml_size(head: bytes, at: int) -> tuple[int | None, int]:
    """(size of an element or None where it is unknown, where its content begins)."""
    length = 9 - head[at].bit_length()
    raw = int.from_bytes(head[at : at + length], "big")
    most = (1 << 7 * length) - 1
    size = raw & most
    return (None if size == most else size), at + length


def _of_asf(file: BinaryIO, size: int) -> Stated:
    header = int(struct.unpack_from("<Q", _read(file, 16, 8))[0])
    data = _read(file, header, 24)
    if data[:4] != b"\x36\x26\xb2\x75":
        return Stated()
    length = int(struct.unpack_from("<Q", data, 16)[0])
    return Stated(cut=50 < length < 1 << 62 and header + length > size)


def _of_mpeg(head: bytes, size: int) -> Stated:
    """Of a Xing or Info header in the first frame, unless the file is as long as that says."""
    start = 0
    while start < len(head) - 4 and not mpeg_frame_bytes(head[start : start + 4]):
        start += 1
    frame = head[start : start + 200]
    if (at := max(frame.find(b"Xing"), frame.find(b"Info"))) < 0:
        return Stated()
    flags, frames, stated_bytes = struct.unpack_from(">III", frame, at + 4)
    if not flags & 1 or frames == 0:
        return Stated()
    if flags & 2 and stated_bytes <= size - start + 4:
        return Stated()  # all bytes are here, so the number of frames is at fault if anything is
    samples = frames * (1_152 if frame[1] & 0x08 else 576)
    optional = sum(length for bit, length in enumerate((4, 4, 100, 4)) if flags >> bit & 1)
    encoder = frame[at + 8 + optional :][:24]
    if len(encoder) == 24 and encoder[:4] in (b"LAME", b"Lavf", b"Lavc", b"GOGO"):
        # What the encoder put in front and behind, which decoders take away.
        samples -= (encoder[21] << 4 | encoder[22] >> 4) + ((encoder[22] & 15) << 8 | encoder[23])
    return Stated(duration_s=max(0, samples) / _mpeg_rate(frame))


def _mpeg_rate(header: bytes) -> int:
    """Hz; versions 2 and 2.5 have a half and a quarter of version 1's."""
    return _MPEG_RATES[header[2] >> 2 & 3] // {3: 1, 2: 2, 0: 4}[header[1] >> 3 & 3]


def mpeg_frame_bytes(header: bytes) -> int:
    """Length of the frame of MPEG audio that begins with these 4 bytes; 0 where none does."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    index, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return 0
    bits = 1_000 * _MPEG_KBPS[version != 3][layer - 1][index]
    padding = header[2] >> 1 & 1
    if layer == 1:
        return 4 * (12 * bits // _mpeg_rate(header) + padding)
    slots = 72 if layer == 3 and version != 3 else 144
    return slots * bits // _mpeg_rate(header) + padding


def frame_bytes(codec: str, header: bytes) -> int:
    """Length that the frame of a stream without a container states; 0 where it is not known.

    Args:
        codec: ffmpeg's name.
        header: the frame's first 6 bytes.
    """
    if codec in ("mp1", "mp2", "mp3"):
        return mpeg_frame_bytes(header)
    if len(header) < 6 or header[:2] != b"\x0b\x77":
        return 0
    if codec == "eac3":
        return 2 * ((header[2] & 7) << 8 | header[3]) + 2
    if codec == "ac3" and header[4] & 0x3F < 38 and header[4] >> 6 < 3:
        kbps, rate = _AC3_KBPS[(header[4] & 0x3F) >> 1], (48_000, 44_100, 32_000)[header[4] >> 6]
        words = kbps * 96_000 // rate
        return 2 * (words + (header[4] & 1 if rate == 44_100 else 0))
    return 0


def holds_bitstream(content: bytes) -> bool:
    """Whether frames of MPEG audio or ADTS (four), LOAS, AC-3 or E-AC-3 (three) follow one another.

    Bytes of AC-3 may be swapped, as they are where it poses as samples.
    """
    values = np.frombuffer(content, np.uint8)
    for first, second in ((0x0B, 0x77), (0x77, 0x0B)):
        gaps = np.diff(np.flatnonzero((values[:-1] == first) & (values[1:] == second)))
        if (np.abs(np.diff(gaps)) <= 2).any():  # AC-3 at 44.1 kHz has frames of two sizes
            return True
    loas = np.flatnonzero((values[:-2] == 0x56) & (values[1:-1] >> 5 == 7))
    ends = loas + 3 + ((values[loas + 1].astype(np.int32) & 0x1F) << 8 | values[loas + 2])
    next_of = dict(zip(loas.tolist(), ends.tolist(), strict=True))
    if any(next_of.get(end) in next_of for end in next_of.values()):
        return True
    at = np.flatnonzero((values[:-5] == 0xFF) & (values[1:-4] >= 0xE0))
    second, third, fourth, fifth, sixth = (values[at + n].astype(np.int32) for n in range(1, 6))
    layer = second >> 1 & 3
    adts = (second >> 4 == 15) & (layer == 0)
    lengths = np.where(
        adts,
        (fourth & 3) << 11 | fifth << 3 | sixth >> 5,
        _mpeg_lengths(second, third),
    )
    # Frames of one stream agree in version and layer, and MPEG's in the rate.
    sort = np.where(adts, second << 8, second << 8 | third & 0x0C)
    sort_at = np.full(len(values), -1, np.int32)
    length_at = np.zeros(len(values), np.int32)
    sort_at[at], length_at[at] = np.where(lengths >= 8, sort, -1), lengths
    next_at = at
    alike = lengths >= 8
    for _ in range(3):
        next_at = np.minimum(next_at + length_at[next_at], len(values) - 1)
        alike &= sort_at[next_at] == sort
    return bool(alike.any())


def _mpeg_lengths(second: NDArray[np.int32], third: NDArray[np.int32]) -> NDArray[np.int32]:
    """`mpeg_frame_bytes` of many headers, by their second and third bytes."""
    return _MPEG_LENGTHS[(second & 0x1F) << 8 | third]


_MPEG_LENGTHS = np.array(
    [
        mpeg_frame_bytes(bytes((0xFF, 0xE0 | index >> 8, index & 0xFF, 0)))
        for index in range(32 << 8)
    ],
    np.int32,
)
