"""Recognises manifests among the files that are named, and divides them into shards."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import posixpath
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.audio_bytes import is_audio_bytes
from transforms.listing import InputError, below, file_system_of, matches, stored_file, uri_of
from transforms.manifest import (
    MANIFEST_SUFFIXES,
    Manifest,
    ManifestError,
    ManifestOptions,
    divide,
    head_of,
    lines_of,
    parquet_lines,
    recognise,
    recognise_parquet,
    scp_paths,
    segment_files,
)
from transforms.meter import Meter
from transforms.read_table import (
    is_damage,
)
from transforms.records import ManifestSlice, Shard, as_text
from transforms.shard_id import shard_id, short_hash
from transforms.storage import (
    CLOUD_STORAGE,
    Access,
    StoredFile,
    find_cloud,
    is_local,
    is_signed,
    open_file_system,
    open_remote,
    public_name,
    public_url,
    read_all,
    unsigned_url,
)
from transforms.suffixes import is_audio

_NO_AUDIO = (b"PK\3\4", b"%PDF", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"7z\xbc\xaf", b"Rar!",
             b"\x89HDF", b"\x93NUMPY", b"\x7fELF", b"SQLite", b"BZh", b"\xfd7zXZ")  # fmt: skip
_LOOKED_AT_BYTES = 64 << 10
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def _manifest_name(path: str) -> str:
    return posixpath.basename(path).lower().removesuffix(".gz")


def is_manifest_name(path: str) -> bool:
    """Whether a name has the suffix of a form of manifest."""
    return _manifest_name(path).endswith(MANIFEST_SUFFIXES)


def look_for_manifest(
    uri: str, file: StoredFile, access: Access, options: ManifestOptions
) -> Manifest | None:
    """How a file is to be read that the user named; None where it may be audio.

    Raises:
        InputError: it is neither.
    """
    name = _manifest_name(file.path)
    with open_file(uri, file, access) as stream:
        start = stream.read(_LOOKED_AT_BYTES)
    is_meant = is_manifest_name(file.path)
    # The mark of UTF-16 is also how MPEG audio may begin.
    if is_audio_bytes(start) and not (is_meant and start.startswith(_UTF16)):
        return None
    packed = start.startswith(b"\x1f\x8b")
    if packed:
        try:
            start = zlib.decompressobj(31).decompress(start, _LOOKED_AT_BYTES)
        except zlib.error as error:
            raise InputError(f"{public_url(uri)!r} is a damaged gzip file: {error}") from error
    is_text = _is_text(start, is_meant) or (is_meant and start.startswith(_UTF16))
    if not is_text or not (start or is_meant):
        if packed or is_meant or start.startswith(_NO_AUDIO):
            raise InputError(
                f"{public_url(uri)!r} is no audio, no manifest and no shard that earmark reads; name tars, Parquet, "
                "audio files, manifests, or folders of them"
            )
        return None
    try:
        manifest = recognise(name, head_of(text_lines(uri, file, access)), options)
    except ManifestError as error:
        raise InputError(f"{public_url(uri)!r} {error}") from error
    if manifest is None:
        raise InputError(
            f"{public_url(uri)!r} is text: no audio, and no manifest, which has a header with a column such as path, "
            "or JSON lines. A list of inputs is given with --inputs-from"
        )
    return manifest


def _is_text(start: bytes, any_encoding: bool) -> bool:
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", start):
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return any_encoding or error.start >= len(start) - 3 >= 1  # cut inside a letter
    return True


def open_file(uri: str, file: StoredFile, access: Access) -> BinaryIO:
    """A listed file, open for reading."""
    if is_local(uri):
        return open(uri, "rb")
    fs, path = open_file_system(uri, access)
    if not file.size:  # a web server that does not say
        return io.BytesIO(read_all(uri, access))
    return open_remote(fs, path, file.size, checksum=file.checksum, in_order=True)


def text_lines(uri: str, file: StoredFile, access: Access) -> Iterator[bytes]:
    """The lines of a text file, unpacked where it is gzip.

    Raises:
        ManifestError: it cannot be unpacked, or is no text.
    """
    with open_file(uri, file, access) as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            yield from lines_of(stream)
            return
        try:
            yield from lines_of(cast(BinaryIO, gzip.GzipFile(fileobj=stream)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(f"is a damaged gzip file: {error}") from error


def manifest_shards(
    uri: str,
    file: StoredFile,
    manifest: Manifest,
    rows_per_shard: int,
    access: Access,
    meter: Meter | None,
    notes: list[str],
) -> Iterator[Shard]:
    """The shards of a manifest of text.

    Raises:
        InputError: it has no rows, or cannot be divided into them.
    """
    folder = posixpath.dirname(public_name(uri, uri))
    root = folder
    if manifest.options.audio_root:
        root = uri_of(*file_system_of(manifest.options.audio_root, access))
    files = None
    try:
        if manifest.form in ("wav.scp", "segments"):
            scp, segments = uri, f"{folder}/segments"
            if manifest.form == "segments":
                scp, segments = f"{folder}/wav.scp", uri
            if (found := _stored_at(segments, access)) is not None:
                paths = _stored_at(scp, access)
                if paths is None:
                    raise ManifestError(
                        "needs a wav.scp beside it, with the paths of its recordings"
                    )
                manifest = dataclasses.replace(manifest, form="segments")
                files = scp_paths(text_lines(scp, paths, access))
                uri, file = segments, found
        elif manifest.form == "audioset":
            fs, path = file_system_of(root, access)
            listed = (found.path for _, found, _ in matches(fs, path, root, access, meter))
            files = segment_files(below(path, name) for name in listed if is_audio(name))
        notes.append(f"reads {as_text(public_url(uri))} as {manifest.said()}")
        packed = not file.size or _is_packed(uri, file, access)
        parts = divide(
            manifest,
            text_lines(uri, file, access),
            root,
            rows_per_shard,
            embedded=packed,
            files=files,
        )
        yield from _shards_of(uri, file, parts)
    except ManifestError as error:
        raise InputError(f"{public_url(uri)!r} {error}") from error


def parquet_manifest_shards(
    uri: str,
    file: StoredFile,
    rows_per_shard: int,
    access: Access,
    options: ManifestOptions,
    notes: list[str],
) -> Iterator[Shard]:
    """The shards of a Parquet file without audio, whose rows name audio files.

    Raises:
        InputError: it has no column that names them.
    """
    with open_file(uri, file, access) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False)
        try:
            manifest = recognise_parquet(parquet.schema_arrow, options)
        except ManifestError as error:
            raise InputError(
                f"{public_url(uri)!r} has no audio column (a struct<bytes, path> as Hugging Face stores audio), and "
                f"as a manifest it {error}"
            ) from error
        root = posixpath.dirname(public_name(uri, uri))
        if options.audio_root:
            root = uri_of(*file_system_of(options.audio_root, access))
        notes.append(
            f"reads {as_text(public_url(uri))} as a Parquet manifest: {manifest.said().partition(': ')[2]}"
        )
        try:
            lines = parquet_lines(parquet)
            yield from _shards_of(
                uri, file, divide(manifest, lines, root, rows_per_shard, embedded=True)
            )
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            raise InputError(f"{public_url(uri)!r} is a damaged Parquet file: {error}") from error


def _shards_of(
    uri: str, file: StoredFile, parts: Iterable[tuple[ManifestSlice, tuple[str, ...], str]]
) -> Iterator[Shard]:
    number = -1
    for number, (part, files, identity) in enumerate(parts):
        # What is in the rows and where their paths begin, wherever they stand in the manifest.
        content = dataclasses.replace(part, digest=identity, first_row=0, start=0, end=0, text=None)
        places = [unsigned_url(file) if is_signed(file) else file for file in files]
        yield Shard(
            id=f"{shard_id(uri)}-{number:05d}-{short_hash(json.dumps([vars(content), places]))}",
            uri=uri,
            kind="manifest",
            size_bytes=part.end - part.start,
            files=files,
            file_sizes=(file.size,),
            manifest=part,
        )
    if number < 0:
        raise InputError(f"{public_url(uri)!r} is a manifest without rows")


def _is_packed(uri: str, file: StoredFile, access: Access) -> bool:
    with open_file(uri, file, access) as stream:
        return stream.read(2) == b"\x1f\x8b"


def _stored_at(uri: str, access: Access) -> StoredFile | None:
    fs, path = open_file_system(uri, access)
    if uri.startswith(CLOUD_STORAGE):
        return find_cloud(path, access)
    try:
        return stored_file(fs, path, fs.info(path))
    except FileNotFoundError:
        return None
