"""Reads the clips of a WebDataset tar."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any, BinaryIO, cast

from transforms.opening import BLOCK_BYTES, spool
from transforms.records import ClipError, EncodedClip, UnreadableClip, as_text
from transforms.suffixes import is_audio
from transforms.unpack import DamagedStream, unpacked

METADATA_SUFFIXES = (".json", ".txt", ".cls")
MAX_METADATA_BYTES = 1 << 20  # a sibling file larger than this is no metadata

_MAX_SAMPLE_CLIPS = 16  # clips of one key held while their metadata may still come
# tarfile copies what is left of it at every read, and asks its file for so much at once.
_TAR_BUFFER_BYTES = 64 << 10

Clips = Iterator[EncodedClip | UnreadableClip]


def count_tar_clips(stream: BinaryIO, enough: int) -> int:
    """How many clips a tar gives, counting no further than `enough`."""
    return sum(1 for _ in islice(read_tar(stream), enough))


class StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error.

    tarfile takes a damaged or missing header anywhere but at the start for the
    end of the archive, and stops without a word.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictTarInfo:
        """As tarfile's; a damaged header is a `ReadError`."""
        try:
            return cast(StrictTarInfo, super().fromtarfile(tar))
        except tarfile.EOFHeaderError:
            raise  # the zero block that ends an archive
        except tarfile.HeaderError as error:
            reason = {
                "EmptyHeaderError": "it ends without tar's end marker",
                "TruncatedHeaderError": "it ends inside a header",
            }.get(type(error).__name__, "a header is damaged")
            raise tarfile.ReadError(reason) from error
        except (ValueError, OverflowError) as error:  # numbers in extended headers
            raise tarfile.ReadError("a header is damaged") from error


def read_tar_from(stream: BinaryIO) -> Clips:
    """The clips of a tar from the header of a member on, at which an open file stands."""
    start = stream.tell()
    return read_tar(cast(BinaryIO, _From(stream, start)))


class _From(io.RawIOBase):
    """A file from a place on, which is its beginning."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self._stream, self._start = stream, start

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As any file's."""
        offset += self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset, whence) - self._start

    def read(self, size: int = -1) -> bytes:
        """As any file's."""
        return self._stream.read(size)


def read_tar(stream: BinaryIO) -> Clips:
    """Clips of a WebDataset tar: members with one key make a sample, each audio member a clip.

    The key is the member's folder and its base name up to the first dot.
    """
    sample = _Sample("")
    members, reading, name = 0, False, None
    # Unpacked here: tarfile reads only the first part of a concatenated gzip, checks no checksum
    # and knows no Zstandard.
    plain = unpacked(stream)
    try:
        with tarfile.open(
            fileobj=plain,
            mode="r|",
            bufsize=_TAR_BUFFER_BYTES,
            tarinfo=StrictTarInfo,
            errors="surrogateescape",
        ) as tar:
            for info in tar:
                members += 1
                name = as_text(info.name)
                if key_of(name) != sample.key:
                    yield from sample.take_all()
                    sample = _Sample(key_of(name))
                reading = is_audio(name)
                if info.issym() or info.islnk():
                    if reading:
                        target = as_text(info.linkname)
                        message = (
                            f"the member is a link to {target!r}; links in tars are not followed"
                        )
                        yield UnreadableClip(name, ClipError("read", "Link", message), {})
                elif info.isreg() and reading:
                    sample.add_audio(name, *spool(cast(BinaryIO, tar.extractfile(info))))
                    yield from sample.take_surplus()
                elif info.isreg() and _is_metadata(name) and info.size <= MAX_METADATA_BYTES:
                    content = cast(BinaryIO, tar.extractfile(info))
                    sample.add_metadata(name, content.read())
                reading = False
        while plain.read(BLOCK_BYTES):  # to the end, where a packed file keeps its checksum
            pass
    except (tarfile.TarError, DamagedStream) as error:
        yield from sample.take_all()
        # To the end, where a remote file's checksum is compared: what broke may be the way here.
        while stream.read(BLOCK_BYTES):
            pass
        place = f"inside member {members}" if reading else f"after {members} members"
        yield UnreadableClip(
            name if reading else None,
            ClipError("read", "BrokenShard", f"the tar is broken {place}: {_reason(error)}"),
            {},
        )
    else:
        yield from sample.take_all()


def key_of(name: str) -> str:
    """The key of a member: its folder, and its base name up to the first dot."""
    return posixpath.join(posixpath.dirname(name), posixpath.basename(name).partition(".")[0])


class _Sample:
    """The members of a tar that share a key, until the next key comes.

    Metadata may stand before or after its audio. Where the names have dots beyond
    the key (`a_0.5.wav`, `a_0.5.json`, `a_1.5.wav`, ...), metadata goes to the
    audio of the same stem; else to all audio of the sample.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._audio: list[tuple[str, BinaryIO, str, int]] = []
        self._stems: set[str] = set()
        self._metadata: dict[str, dict[str, Any]] = {}

    def add_audio(self, member: str, file: BinaryIO, digest: str, size: int) -> None:
        self._audio.append((member, file, digest, size))
        self._stems.add(posixpath.splitext(member)[0])

    def add_metadata(self, member: str, content: bytes) -> None:
        stem, suffix = posixpath.splitext(member)
        self._metadata.setdefault(stem, {}).update(_sibling(suffix.lower(), content))

    def take_all(self) -> Clips:
        """The clips; none is left."""
        return self._take(len(self._audio))

    def take_surplus(self) -> Clips:
        """All but the last clip where there are many: names with a dot early may all share a key."""
        return self._take(len(self._audio) - 1 if len(self._audio) >= _MAX_SAMPLE_CLIPS else 0)

    def _take(self, count: int) -> Clips:
        taken, self._audio = self._audio[:count], self._audio[count:]
        for member, file, digest, size in taken:
            metadata: dict[str, Any] = {}
            own = posixpath.splitext(member)[0]
            for stem, entries in self._metadata.items():
                if stem == own or stem not in self._stems:
                    metadata.update(entries)
            with closing(file):
                yield EncodedClip(member, file, size, digest, metadata)


def _reason(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "it ends inside a member"
    return text or type(error).__name__


def _is_metadata(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in METADATA_SUFFIXES


def _sibling(suffix: str, content: bytes) -> dict[str, Any]:
    """Metadata of a sample: the entries of a `.json` object; the text of `.txt` and `.cls`."""
    text = content.decode("utf-8", "replace")
    if suffix == ".json":
        try:
            parsed = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON
        except (ValueError, RecursionError):
            return {"json": text}
        return parsed if isinstance(parsed, dict) else {"json": parsed}
    return {suffix[1:]: text.strip()}
