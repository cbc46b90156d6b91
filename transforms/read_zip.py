"""Reads clips from a zip archive: each member with the suffix of an audio format is one."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import BinaryIO, cast

from transforms.records import ClipError, EncodedClip, UnreadableClip, as_text

Clips = Iterator[EncodedClip | UnreadableClip]
# Gives (a seekable copy at its start, xxh128, bytes) of an open file.
Spool = Callable[[BinaryIO], tuple[BinaryIO, str, int]]

# What zipfile raises for a member that is damaged, or packed in a way that it does not know.
_MEMBER_ERRORS = (
    *(zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError),
    *(ValueError, OverflowError, struct.error),  # names that are no UTF-8, places before the start
)

_ENCRYPTED = 1  # a bit of a member's flags


def zip_members(stream: BinaryIO, is_audio: Callable[[str], bool]) -> list[str] | None:
    """The audio members in the archive's order; None where the archive is broken."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return [
                i.filename for i in archive.infolist() if not i.is_dir() and is_audio(i.filename)
            ]
    except _MEMBER_ERRORS:
        return None


def read_zip(stream: BinaryIO, is_audio: Callable[[str], bool], spool: Spool) -> Clips:
    """Clips in the order of the archive's directory.

    A member that cannot be read is one `UnreadableClip`, and the next ones are read; so
    is an archive without a directory, of which nothing can be.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except _MEMBER_ERRORS as error:
        message = f"the zip is broken: {error}"
        yield UnreadableClip(None, ClipError("read", "BrokenShard", message), {})
        return
    with archive:
        for info in archive.infolist():
            if info.is_dir() or not is_audio(info.filename):
                continue
            member = as_text(info.filename)
            try:
                if info.flag_bits & _ENCRYPTED:
                    raise zipfile.BadZipFile("it is encrypted")
                with archive.open(info) as packed:
                    audio, digest, size = spool(cast(BinaryIO, packed))
            except _MEMBER_ERRORS as error:
                message = f"the member of the zip cannot be read: {error}"
                yield UnreadableClip(member, ClipError("read", "BrokenMember", message), {})
                continue
            with closing(audio):
                yield EncodedClip(member, audio, size, digest, {})
