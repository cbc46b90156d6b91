"""Unpacks a compressed stream as it is read: gzip, zlib, bzip2, xz and Zstandard."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zlib
from typing import Any, BinaryIO, cast

import pyarrow as pa

_BLOCK_BYTES = 1 << 20

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_HEAD_BYTES = max(map(len, _MAGIC))


class DamagedStream(Exception):
    """A compressed stream is cut, or what is in it cannot be unpacked; the message says how."""


def unpacked(stream: BinaryIO, otherwise: str | None = None) -> BinaryIO:
    """The stream as it was before it was compressed; itself where it is not.

    Known by its first bytes, whatever the file is called. Parts that were packed one
    by one and put together are read as one.

    Args:
        stream: seekable, at its start.
        otherwise: the form of a stream that begins like none: "zlib" or None.

    Raises:
        DamagedStream: (from `read`) once all that can be unpacked was given.
    """
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    form = next((form for magic, form in _MAGIC.items() if head.startswith(magic)), otherwise)
    if form is None:
        return stream
    opened: Any
    if form == "gzip":
        opened = gzip.GzipFile(fileobj=stream)
    elif form == "bz2":
        opened = bz2.BZ2File(stream)
    elif form == "xz":
        opened = lzma.LZMAFile(stream)  # noqa: SIM115
    elif form == "zstd":
        opened = _Zstandard(stream)
    else:
        opened = _Zlib(stream)
    return cast(BinaryIO, _ToTheBreak(opened))


class _ToTheBreak:
    """Gives what can be unpacked of a stream that is cut, before it raises."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._break: DamagedStream | None = None

    def read(self, size: int | None = -1) -> bytes:
        pieces: list[bytes] = []
        left = sys.maxsize if size is None or size < 0 else size
        while left > 0:
            piece = b"" if self._break else self._read1(min(left, _BLOCK_BYTES))
            if not piece:
                if self._break and not pieces:
                    raise self._break
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _read1(self, size: int) -> bytes:
        try:
            return bytes(self._opened.read1(size))
        except OSError as error:
            # bz2, gzip and Arrow raise one for what they cannot unpack, then without an errno.
            if error.errno is not None:
                raise
            self._break = DamagedStream(str(error) or type(error).__name__)
        except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            self._break = DamagedStream(str(error) or type(error).__name__)
        return b""


class _Zstandard:
    """Arrow's decompressor, in small reads: one that meets a cut gives nothing."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

    def read1(self, size: int) -> bytes:
        return bytes(self._stream.read(min(size, 16 << 10)))


class _Zlib:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._unpack = stream, zlib.decompressobj()

    def read1(self, size: int) -> bytes:
        while not self._unpack.eof:
            packed = self._unpack.unconsumed_tail or self._stream.read(64 << 10)
            if not packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if piece := self._unpack.decompress(packed, size):
                return piece
        return b""
