"""Reads clips from TFRecord files of `tf.train.Example`, without TensorFlow.

The format of the file: https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords
format details"; that of a record: tensorflow/core/example/example.proto and feature.proto.
"""

from __future__ import annotations

import functools
import io
import math
import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import google_crc32c
import xxhash

from transforms.audio_bytes import AUDIO_FIELDS, is_audio_bytes
from transforms.records import ClipError, EncodedClip, UnreadableClip, as_text
from transforms.unpack import DamagedStream, unpacked

# `x.tfrecord`, `x.tfrecords.gz`, `x.tfrecord-00000-of-00010`, `x.tfrecord-00000-of-00010.gz`
TFRECORD_NAME = re.compile(r"\.tfrecords?(\.gz|\.gzip|\.zlib)?(-\d+-of-\d+)?(\.gz|\.gzip|\.zlib)?$")
MAX_FEATURE_BYTES = 1 << 20  # of metadata; a larger one is left out

_MAX_RECORD_BYTES = (1 << 31) - 1  # of a protocol buffer
_NAME_FEATURES = (
    *("filename", "file_name", "audio/filename", "audio/path", "path", "__key__", "key"),
    *("id", "audio/id", "clip_id", "video_id", "name"),
)

Clips = Iterator[EncodedClip | UnreadableClip]


def read_tfrecord(stream: BinaryIO) -> Clips:
    """Clips record by record, each value of a record's audio feature a clip.

    The audio feature is the one with a name such as `audio`, `audio/encoded` or `wav`, else
    one whose bytes begin as audio does. A record with a wrong checksum is one
    `UnreadableClip`; the next ones are read as long as their places are known.
    """
    number = -1
    try:
        for number, record in enumerate(_records(stream)):
            if record is None:
                yield _broken(f"record {number} of the TFRecord file is damaged: wrong checksum")
                continue
            yield from _clips_of(number, record)
    except _BrokenFile as error:
        yield _broken(f"the TFRecord file is broken after {number + 1} records: {error}")


def has_audio(stream: BinaryIO) -> tuple[bool, str]:
    """(whether the first record has audio or cannot be read, the features that it has)."""
    try:
        record = next(_records(stream), None)
    except _BrokenFile:
        return True, ""  # reading it gives the row that says what is broken
    features = None if record is None else _features(record)
    if features is None:
        return True, ""
    return _audio_feature(features) is not None, ", ".join(sorted(features))[:300]


def count_tfrecord_clips(stream: BinaryIO, enough: int) -> int:
    """How many clips a TFRecord file gives, counting no further than `enough`."""
    return sum(1 for _ in islice(read_tfrecord(stream), enough))


# ------------------------------------------------------------------- records


class _BrokenFile(Exception):
    """No further record can be found; the message says why."""


def _records(stream: BinaryIO) -> Iterator[bytes | None]:
    """The records; None for one whose checksum is wrong."""
    head = stream.read(12)
    stream.seek(0)
    try:
        # Only a file that is not compressed begins with a length and its checksum.
        plain = (
            stream if _is_length(head) else unpacked(stream, "zlib" if head[:1] == b"x" else None)
        )
        while head := plain.read(12):
            if len(head) < 12:
                raise _BrokenFile("it ends inside a record")
            if not _is_length(head):
                raise _BrokenFile("a length has a wrong checksum")
            size = int.from_bytes(head[:8], "little")
            if size > _MAX_RECORD_BYTES:
                raise _BrokenFile(f"a record has {size} bytes; an Example has less than 2 GiB")
            record, checksum = plain.read(size), plain.read(4)
            if len(record) < size or len(checksum) < 4:
                raise _BrokenFile("it ends inside a record")
            yield record if _masked_crc(record) == checksum else None
    except DamagedStream as error:
        raise _BrokenFile(str(error)) from error


def _is_length(head: bytes) -> bool:
    return len(head) == 12 and _masked_crc(head[:8]) == head[8:]


def _masked_crc(data: bytes) -> bytes:
    """The checksum that TFRecord stores: CRC-32C, rotated, with a constant added."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# ------------------------------------------------------------------ features


@functools.cache
def _example() -> Any:
    """The class of `tensorflow.Example`, in a pool of its own beside TensorFlow's."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="example.proto", package="tensorflow", syntax="proto3"
    )

    def add(owner: Any, name: str, number: int, kind: Any, repeated: bool = False) -> None:
        field = owner.field.add(name=name, number=number)
        field.label = field_types.LABEL_REPEATED if repeated else field_types.LABEL_OPTIONAL
        if isinstance(kind, str):
            field.type, field.type_name = field_types.TYPE_MESSAGE, f".tensorflow.{kind}"
        else:
            field.type = kind

    kinds = {
        "Bytes": field_types.TYPE_BYTES,
        "Float": field_types.TYPE_FLOAT,
        "Int64": field_types.TYPE_INT64,
    }
    for name, kind in kinds.items():
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(kinds, 1):
        add(feature, f"{name.lower()}_list", number, f"{name}List")
        feature.field[-1].oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field_types.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _features(record: bytes) -> Any:
    """The features of an Example by name; None where the record is none."""
    from google.protobuf.message import DecodeError

    try:
        return _example().FromString(record).features.feature
    except DecodeError:
        return None


def _audio_feature(features: Any) -> str | None:
    encoded = [name for name in sorted(features) if any(features[name].bytes_list.value)]
    by_name = {name.lower(): name for name in encoded}
    for name in AUDIO_FIELDS:
        if name in by_name:
            return by_name[name]
    return next((n for n in encoded if is_audio_bytes(features[n].bytes_list.value[0])), None)


def _clips_of(number: int, record: bytes) -> Clips:
    features = _features(record)
    if features is None:
        error = ClipError("read", "NoExample", "the record is no tf.train.Example")
        yield UnreadableClip(f"record-{number:08d}", error, {})
        return
    audio = _audio_feature(features)
    metadata = {
        name: value
        for name, feature in sorted(features.items())
        if name != audio
        and feature.ByteSize() <= MAX_FEATURE_BYTES
        and (value := _value_of(feature)) is not None
    }
    named = next(
        (
            str(metadata[n])
            for n in _NAME_FEATURES
            if isinstance(metadata.get(n), str | int) and metadata[n] != ""
        ),
        None,
    )
    member = as_text(named) if named else f"record-{number:08d}"
    if audio is None:
        names = ", ".join(sorted(features))[:300] or "none"
        message = f"the record has no feature of encoded audio; it has {names}"
        yield UnreadableClip(member, ClipError("read", "NoBytes", message), metadata)
        return
    for content in features[audio].bytes_list.value:
        digest = xxhash.xxh128_hexdigest(content)
        yield EncodedClip(member, io.BytesIO(content), len(content), digest, metadata)


def _value_of(feature: Any) -> Any:
    """A feature as JSON can hold it: a single value by itself; None where it is bytes or nothing."""
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind == "bytes_list":
        try:
            values = [value.decode("utf-8") for value in values]
        except UnicodeDecodeError:
            return None
    elif kind == "float_list":
        values = [value if math.isfinite(value) else None for value in values]
    return values[0] if len(values) == 1 else values or None


def _broken(message: str) -> UnreadableClip:
    return UnreadableClip(None, ClipError("read", "BrokenShard", message), {})
